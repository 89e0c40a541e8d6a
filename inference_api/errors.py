"""The one place where exceptions become answers: problem details, and a log line for what is the server's fault."""

import logging
from typing import Any

import falcon

from inference_api import problems
from inference_api.model import AbandonedError, InferenceError, UnfitInputError
from inference_api.problems import FieldError
from inference_api.schema import MalformedError, ShapeError

log = logging.getLogger("inference_api")

REFUSED = "The model refused the input."
RETRY_AFTER_SECONDS = 1
MAX_MESSAGE_CHARACTERS = 1000
"""How much of a model's words about an unfit input the client gets."""

# Details of our own, so that none quotes what the client sent.
_DETAILS = {
    400: "The request is not valid.",
    404: "There is nothing at this path.",
    405: "The path does not answer this method.",
}
_OWN_DESCRIPTIONS = frozenset({401, 413, 415, 503})  # raised by this package only, see resources.py and app.py


def add_error_handlers(app: "falcon.App[Any, Any]") -> None:
    """Give every exception that can leave a resource its answer."""
    for kind in (Exception, falcon.HTTPError):  # Falcon has one of its own for the latter
        app.add_error_handler(kind, handle)


def handle(req: falcon.Request, resp: falcon.Response, exc: Exception, _params: Any = None) -> None:
    """Make `resp` the answer to an exception, which may come after the resource has been left."""

    def answer(status: int, detail: str, *errors: FieldError) -> None:
        resp.status = f"{status} {problems.title(status)}"
        resp.content_type = problems.MEDIA_TYPE
        resp.data = problems.problem(status, detail, problems.request_id(req.env), *errors)

    match exc:
        case falcon.HTTPError(status_code=status):
            resp.set_headers(exc.headers or {})
            detail = exc.description if status in _OWN_DESCRIPTIONS else _DETAILS.get(status)
            answer(status, detail or problems.title(status))
        case MalformedError() if req.env.get("HTTP_CONTENT_ENCODING"):  # RFC 9110 §15.5.16
            answer(415, "The body must have no content coding.")
            resp.set_header("Accept-Encoding", "identity")
        case MalformedError():
            answer(400, "The body is not JSON text in UTF-8.")
        case ShapeError():
            answer(422, "The body does not fit the schema.", FieldError(exc.pointer, exc.detail))
        case UnfitInputError():
            pointer = f"/{exc.index}" if req.context.get("is_array") else ""
            # The words are the model's own, but what is not text in UTF-8 could not be sent.
            words = str(exc)[:MAX_MESSAGE_CHARACTERS].encode(errors="replace").decode()
            answer(422, REFUSED, FieldError(pointer, words or REFUSED))
        case AbandonedError():
            answer(503, "The request was given up before the model was called.")
            resp.retry_after = RETRY_AFTER_SECONDS
        case InferenceError():
            log.error("inference failed", exc_info=exc, extra={"path": req.path})
            answer(500, "The model failed.")
        case _:
            log.error("request failed", exc_info=exc, extra={"path": req.path})
            answer(500, "The service failed.")
