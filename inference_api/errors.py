"""The one place where exceptions become answers: problem details, and a log line for what is the server's fault."""

import logging
from collections.abc import Callable
from typing import Any

import falcon

from inference_api import problems
from inference_api.model import AbandonedError, InferenceError, UnfitInputError
from inference_api.problems import FieldError
from inference_api.schema import MalformedError, ShapeError

log = logging.getLogger("inference_api")

NOT_JSON = "The body is not JSON text in UTF-8."
ENCODED = "The body must have no content coding."
NOT_FIT = "The body does not fit the schema."
REFUSED = "The model refused the input."
FAILED = "The model failed."
INTERNAL = "The service failed."
ABANDONED = "The request was given up before the model was called."
RETRY_AFTER_SECONDS = 1
MAX_MESSAGE_CHARACTERS = 1000
"""How much of a model's words about an unfit input the client gets."""

# Details of our own, so that none quotes what the client sent.
_DETAILS = {
    400: "The request is not valid.",
    404: "There is nothing at this path.",
    405: "The path does not answer this method.",
}
_OWN_DESCRIPTIONS = frozenset({401, 413, 415, 503})  # raised by this package only, see resources.py


def _answer(req: falcon.Request, resp: falcon.Response, status: int, detail: str, *errors: FieldError) -> None:
    resp.status = f"{status} {problems.title(status)}"
    resp.content_type = problems.MEDIA_TYPE
    resp.data = problems.problem(status, detail, problems.request_id(req.env), *errors)


def _http_error(req: falcon.Request, resp: falcon.Response, exc: falcon.HTTPError, _params: Any) -> None:
    status = exc.status_code
    resp.set_headers(exc.headers or {})
    detail = exc.description if status in _OWN_DESCRIPTIONS else _DETAILS.get(status)
    _answer(req, resp, status, detail or problems.title(status))


def _malformed(req: falcon.Request, resp: falcon.Response, _exc: MalformedError, _params: Any) -> None:
    if req.env.get("HTTP_CONTENT_ENCODING"):  # RFC 9110 §15.5.16
        _answer(req, resp, 415, ENCODED)
        resp.set_header("Accept-Encoding", "identity")
    else:
        _answer(req, resp, 400, NOT_JSON)


def _shape(req: falcon.Request, resp: falcon.Response, exc: ShapeError, _params: Any) -> None:
    _answer(req, resp, 422, NOT_FIT, FieldError(exc.pointer, exc.detail))


def _unfit(req: falcon.Request, resp: falcon.Response, exc: UnfitInputError, _params: Any) -> None:
    pointer = f"/{exc.index}" if req.context.get("is_array") else ""
    # The words are the model's own, but what is not text in UTF-8 could not be sent.
    words = str(exc)[:MAX_MESSAGE_CHARACTERS].encode(errors="replace").decode()
    _answer(req, resp, 422, REFUSED, FieldError(pointer, words or REFUSED))


def _inference(req: falcon.Request, resp: falcon.Response, exc: InferenceError, _params: Any) -> None:
    log.error("inference failed", exc_info=exc, extra={"path": req.path})
    _answer(req, resp, 500, FAILED)


def _abandoned(req: falcon.Request, resp: falcon.Response, _exc: AbandonedError, _params: Any) -> None:
    _answer(req, resp, 503, ABANDONED)
    resp.retry_after = RETRY_AFTER_SECONDS


def _unexpected(req: falcon.Request, resp: falcon.Response, exc: Exception, _params: Any) -> None:
    log.error("request failed", exc_info=exc, extra={"path": req.path})
    _answer(req, resp, 500, INTERNAL)


_HANDLERS: dict[type[Exception], Callable[[falcon.Request, falcon.Response, Any, Any], None]] = {
    Exception: _unexpected,
    falcon.HTTPError: _http_error,
    MalformedError: _malformed,
    ShapeError: _shape,
    UnfitInputError: _unfit,
    InferenceError: _inference,
    AbandonedError: _abandoned,
}


def add_error_handlers(app: "falcon.App[Any, Any]") -> None:
    """Give every exception that can leave a resource its answer."""
    for exception, handler in _HANDLERS.items():
        app.add_error_handler(exception, handler)


def handle(req: falcon.Request, resp: falcon.Response, exc: Exception) -> None:
    """Make `resp` the answer to an exception that comes after the resource has been left."""
    _HANDLERS[next(cls for cls in type(exc).__mro__ if cls in _HANDLERS)](req, resp, exc, {})
