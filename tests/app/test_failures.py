"""A model that fails or refuses: what the client learns, and what the log has."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import falcon
import pytest

from inference_api.app import Service, create_starting_app
from inference_api.config import Settings
from inference_api.logs import record_fields
from tests import fakes
from tests.app.client import Client, call, call_app, problem

FAILED = "The model failed."
REFUSED = "The model refused the input."
ABANDONED = "The request was given up before the model was called."


@pytest.mark.parametrize(
    "how", ["raise", "exit", "nan", "infinity", "object", "surrogate", "huge", "cycle", "too deep"]
)
@pytest.mark.parametrize("is_array", [False, True])
def test_a_model_that_fails_is_a_500_that_tells_nothing(
    fake_client: Client, caplog: pytest.LogCaptureFixture, how: str, is_array: bool
) -> None:
    """Neither exception nor traceback nor payload; the log has the traceback, once."""
    body = [{"how": "fine"}, {"how": how}] if is_array else {"how": how}
    answer = fake_client.post("/broken", body, X_Request_ID="abc")
    problem(answer, 500, "Internal Server Error", FAILED)
    assert fakes.SECRET.encode() not in answer.body
    assert answer.headers["X-Model"] == "fake/1.2.3"
    (record,) = caplog.records
    assert (record.levelno, record.getMessage(), record.__dict__["path"]) == (
        logging.ERROR,
        "inference failed",
        "/broken",
    )
    assert record.exc_info
    if how in ("raise", "exit"):
        assert fakes.SECRET in caplog.text
    assert fake_client.post("/broken", {"how": "fine"}).json == {"input": "fine", "prediction": "fine"}


@pytest.mark.parametrize("how", ["nan", "text"])
def test_an_output_that_was_not_promised_is_a_500(fake_client: Client, how: str) -> None:
    """The document says a number: text is none, and NaN would become null without a word."""
    problem(fake_client.post("/liar", {"how": how}), 500, "Internal Server Error", FAILED)


def test_too_few_outputs_are_a_500_for_all_whom_they_concern(
    fake_client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody gets another one's answer."""
    answer = fake_client.post("/miscounting", [{"text": "a"}, {"text": "b"}])
    problem(answer, 500, "Internal Server Error", FAILED)
    assert "a list of as many outputs as inputs" in caplog.text


WORDS = {
    "plain": "the picture is too dark",
    "empty": REFUSED,
    "surrogate": "not text: ?!",
    "long": "é" * 1000,
    "control": "a\r\nb\x00\x1b[31m\u2028",
}


@pytest.mark.parametrize("which", fakes.MESSAGES)
@pytest.mark.parametrize("path", ["/picky", "/picky-batch"])
def test_a_model_words_its_refusal(
    fake_client: Client, caplog: pytest.LogCaptureFixture, path: str, which: str
) -> None:
    """422 with the ValueError's message, as far as it is text and not too long; that is no fault to log."""
    answer = fake_client.post(path, {"which": which})
    problem(answer, 422, "Unprocessable Content", REFUSED, [{"pointer": "", "detail": WORDS[which]}])
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("path", ["/picky", "/picky-batch"])
def test_a_refusal_whose_words_fail_is_a_failure(fake_client: Client, path: str) -> None:
    """500, and the next request is answered."""
    answer = fake_client.post(path, {"which": "unsayable"})
    assert answer.status_int == 500
    assert fakes.SECRET.encode() not in answer.body
    assert fake_client.post(path, {"which": "fine"}).status_int == 200


@pytest.mark.parametrize("path", ["/picky", "/picky_batch"])
def test_a_refusal_in_an_array_says_which_input(fake_client: Client, path: str) -> None:
    """The pointer is the place in the array."""
    answer = fake_client.post(path, [{"which": "fine"}, {"which": "plain"}, {"which": "fine"}])
    errors = [{"pointer": "/1", "detail": "the picture is too dark"}]
    problem(answer, 422, "Unprocessable Content", REFUSED, errors)


def test_a_request_that_nobody_waits_for_does_not_reach_the_model() -> None:
    """The server says so; the answer goes nowhere, but it is one."""
    client = Client({"count": fakes.Counting})
    model: Any = client.schema("/count").model
    body = b'[{"text": "a"}, {"text": "b"}]'
    caller = Caller(after=1, model=model)
    status, headers, answer = call(
        client,
        REQUEST_METHOD="POST",
        PATH_INFO="/count",
        CONTENT_LENGTH=str(len(body)),
        **{"wsgi.input": Input(body), "inference_api.caller": caller},
    )
    assert (status, json.loads(answer)["detail"]) == ("503 Service Unavailable", ABANDONED)
    assert headers["retry-after"] == "1"
    assert model.calls == ["a"]


class Caller:
    """A request whose client leaves after so many calls of the model."""

    is_waiting = False

    def __init__(self, after: int, model: fakes.Counting) -> None:
        self.after = after
        self.model = model

    @property
    def abandoned(self) -> bool:
        return len(self.model.calls) >= self.after


class Input:
    """A wsgi.input that holds these bytes."""

    def __init__(self, data: bytes) -> None:
        self.read = lambda size: data[:size]


class BrokenInput:
    """A wsgi.input that cannot be read."""

    def read(self, size: int) -> bytes:
        raise OSError(fakes.SECRET)


def test_a_service_that_fails_is_a_500_that_tells_nothing(
    fake_client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """The same for what is neither the client's fault nor the model's."""
    status, headers, body = call(
        fake_client, REQUEST_METHOD="POST", PATH_INFO="/echo", CONTENT_LENGTH="9", **{"wsgi.input": BrokenInput()}
    )
    assert status == "500 Internal Server Error"
    assert json.loads(body) == {
        "type": "about:blank",
        "title": "Internal Server Error",
        "status": 500,
        "detail": "The service failed.",
        "request_id": headers["x-request-id"],
    }
    assert fakes.SECRET in caplog.text


@pytest.mark.parametrize("path", ["/predict", "/docs", "/metrics", "/nothing"])
def test_while_models_are_loaded_there_is_only_health(path: str) -> None:
    """Alive and not ready; all else is told to come back."""
    app = create_starting_app()
    assert ask(app, "/health") == ("503 Service Unavailable", {"status": "starting"})
    assert ask(app, "/health/live") == ("200 OK", {"status": "alive"})
    status, body = ask(app, path)
    assert (status, body["detail"]) == ("503 Service Unavailable", "The models are being loaded.")


def ask(app: falcon.App[Any, Any], path: str) -> tuple[str, Any]:
    status, headers, body = call_app(app, {"PATH_INFO": path})
    assert ("retry-after" in headers) == (not path.startswith("/health"))
    return status, json.loads(body)


class Lines(logging.Handler):
    """Keeps the fields of every line, as they are when it is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.fields: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.fields.append(record_fields(record))


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """What is logged meanwhile."""
    handler = Lines()
    logging.getLogger("inference_api").addHandler(handler)
    yield handler.fields
    logging.getLogger("inference_api").removeHandler(handler)


@pytest.fixture(scope="module")
def service() -> Service:
    """The whole service, with one model that fails."""
    service = Service(Settings.from_environ({"MODELS": "broken=tests.fakes:Broken"}))
    service.load()
    return service


TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        (f"00-{TRACE_ID}-00f067aa0ba902b7-01", TRACE_ID),
        (f"cc-{TRACE_ID}-00f067aa0ba902b7-01-more", TRACE_ID),
        ("", None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE_ID.upper()}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE_ID}-00f067aa0ba902b7-01-more", None),
        (f"ff-{TRACE_ID}-00f067aa0ba902b7-01", None),
        ("\xff\x85", None),
    ],
)
def test_the_log_has_a_failure_under_the_ids_of_its_request(
    service: Service, lines: list[dict[str, Any]], traceparent: str, trace_id: str | None
) -> None:
    """The request's id that the client got, and the trace id of a valid traceparent (W3C Trace Context)."""
    body = b'{"how": "raise"}'
    environ: dict[str, Any] = {"PATH_INFO": "/broken", "REQUEST_METHOD": "POST", "HTTP_TRACEPARENT": traceparent}
    environ |= {"CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body)}
    _, headers, answer = call_app(service, environ)
    (line,) = lines
    assert line["request_id"] == headers["x-request-id"] == json.loads(answer)["request_id"]
    assert line.get("trace_id") == trace_id
    assert (line["level"], line["message"], line["path"]) == ("ERROR", "inference failed", "/broken")
    assert "RuntimeError" in line["exception"]
    logging.getLogger("inference_api").error("of no request")
    assert "request_id" not in lines[-1]


def test_a_loaded_service_is_ready_before_it_can_be_asked() -> None:
    """It says so: a model may end the process at its first request, which must not look like a failed start."""
    service = Service(Settings.from_environ({}))
    service.load()
    told: list[bool] = []
    service.start_preparing(lambda: told.append(True))
    assert told == [True]
