"""The one place where exceptions become answers."""

import json
from typing import Any

import falcon
import pytest
from falcon.testing import TestClient

from inference_api.errors import add_error_handlers
from inference_api.model import AbandonedError, InferenceError, UnfitInputError
from inference_api.schema import MalformedError, ShapeError

SECRET = "s3cret"


class Raises:
    """A resource that raises what it was made with."""

    def __init__(self, exc: BaseException) -> None:
        self.exc = exc

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.media = {"half": "done"}
        raise self.exc


def ask(exc: BaseException) -> tuple[falcon.testing.Result, dict[str, Any]]:
    app = falcon.App()
    add_error_handlers(app)
    app.add_route("/", Raises(exc))
    answer = TestClient(app).simulate_get("/", headers={"X-Request-ID": "abc"})
    assert answer.headers["content-type"] == "application/problem+json"
    body = json.loads(answer.content)
    assert body.pop("type") == "about:blank"
    assert body.pop("request_id") == "abc"
    assert answer.status == f"{body.pop('status')} {body.pop('title')}"
    return answer, body


@pytest.mark.parametrize(
    ("exc", "status", "body"),
    [
        (MalformedError(SECRET), 400, {"detail": "The body is not JSON text in UTF-8."}),
        (
            ShapeError("/numbers/1", "Expected `int`"),
            422,
            {
                "detail": "The body does not fit the schema.",
                "errors": [{"pointer": "/numbers/1", "detail": "Expected `int`"}],
            },
        ),
        (
            UnfitInputError("too dark", 3),
            422,
            {"detail": "The model refused the input.", "errors": [{"pointer": "", "detail": "too dark"}]},
        ),
        (
            UnfitInputError("\ud800"),
            422,
            {"detail": "The model refused the input.", "errors": [{"pointer": "", "detail": "?"}]},
        ),
        (
            UnfitInputError("x" * 1001),
            422,
            {"detail": "The model refused the input.", "errors": [{"pointer": "", "detail": "x" * 1000}]},
        ),
        (
            UnfitInputError(""),
            422,
            {
                "detail": "The model refused the input.",
                "errors": [{"pointer": "", "detail": "The model refused the input."}],
            },
        ),
        (InferenceError(SECRET), 500, {"detail": "The model failed."}),
        (AbandonedError(SECRET), 503, {"detail": "The request was given up before the model was called."}),
        (RuntimeError(SECRET), 500, {"detail": "The service failed."}),
        (MemoryError(SECRET), 500, {"detail": "The service failed."}),
        (falcon.HTTPNotFound(description=SECRET), 404, {"detail": "There is nothing at this path."}),
        (falcon.HTTPBadRequest(title=SECRET, description=SECRET), 400, {"detail": "The request is not valid."}),
        (
            falcon.HTTPInvalidParam(SECRET, SECRET),
            400,
            {"detail": "The request is not valid."},
        ),
        (
            falcon.HTTPMethodNotAllowed(["GET"], description=SECRET),
            405,
            {"detail": "The path does not answer this method."},
        ),
        (falcon.HTTPUnauthorized(description="A key, please."), 401, {"detail": "A key, please."}),
        (falcon.HTTPContentTooLarge(description="At most 9."), 413, {"detail": "At most 9."}),
        (falcon.HTTPUnsupportedMediaType(description="JSON."), 415, {"detail": "JSON."}),
        (falcon.HTTPServiceUnavailable(description="Later."), 503, {"detail": "Later."}),
        (falcon.HTTPServiceUnavailable(), 503, {"detail": "Service Unavailable"}),
        (falcon.HTTPInternalServerError(description=SECRET), 500, {"detail": "Internal Server Error"}),
        (falcon.HTTPNotAcceptable(description=SECRET), 406, {"detail": "Not Acceptable"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_exception_has_its_answer(exc: Exception, status: int, body: dict[str, Any]) -> None:
    """None shows the words of an exception that is not meant for the client, nor what the resource had begun."""
    answer, shown = ask(exc)
    assert (answer.status_code, shown) == (status, body)
    assert SECRET not in answer.text


def test_the_headers_of_an_error_are_kept() -> None:
    """Allow, WWW-Authenticate and Retry-After."""
    assert ask(falcon.HTTPMethodNotAllowed(["GET", "HEAD"]))[0].headers["allow"] == "GET, HEAD"
    assert ask(falcon.HTTPUnauthorized(challenges=["Bearer"]))[0].headers["www-authenticate"] == "Bearer"
    assert ask(falcon.HTTPServiceUnavailable(retry_after=7))[0].headers["retry-after"] == "7"
    assert ask(AbandonedError())[0].headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("exc", "logged"),
    [
        (InferenceError(SECRET), "inference failed"),
        (RuntimeError(SECRET), "request failed"),
        (UnfitInputError(SECRET), None),
        (MalformedError(SECRET), None),
        (falcon.HTTPNotFound(), None),
    ],
)
def test_the_servers_own_faults_are_logged(
    caplog: pytest.LogCaptureFixture, exc: Exception, logged: str | None
) -> None:
    """With their traceback, and nothing else is."""
    ask(exc)
    assert [record.getMessage() for record in caplog.records] == ([] if logged is None else [logged])
    assert (SECRET in caplog.text) == (logged is not None)
