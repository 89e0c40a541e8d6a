"""Answers that come later: what a server gets that need not keep a thread waiting for a batch."""

import gc
import io
import json
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest

from inference_api.app import Service
from inference_api.config import Settings
from inference_api.resources import Later
from tests import fakes
from tests.fakes import spec_of
from tests.unit.exchanges import wait_for

LIMIT_SECONDS = 60


class Caller:
    """A request whose client waits."""

    abandoned = is_waiting = False


@pytest.fixture(scope="module")
def service() -> Service:
    service = Service(Settings.from_environ({"MODELS": str(spec_of(fakes.BatchOfPicky, "predict"))}))
    service.load()
    return service


class Call:
    """One call of the application."""

    def __init__(self, service: Service, text: str, caller: Caller) -> None:
        body = json.dumps({"which": text}).encode()
        self.started: list[tuple[str, dict[str, str], bool]] = []
        environ: dict[str, Any] = {"REQUEST_METHOD": "POST", "PATH_INFO": "/predict", "CONTENT_LENGTH": str(len(body))}
        setup_testing_defaults(environ)
        environ |= {"wsgi.input": io.BytesIO(body), "HTTP_X_REQUEST_ID": "abc", "inference_api.caller": caller}
        self.result: Iterable[bytes] = service(environ, self._start_response)

    def _start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[..., Any]:
        self.started.append((status, dict(headers), exc_info is not None))
        return lambda _data: None

    def body(self) -> Any:
        """What comes once it is ready."""
        result, self.result = self.result, []
        assert isinstance(result, Later)
        assert len(result) == 1
        ready = threading.Event()
        result.when_ready(ready.set)
        assert ready.wait(LIMIT_SECONDS)
        (body,) = result
        return json.loads(body)


def test_a_prediction_comes_later(service: Service) -> None:
    """The head is there before."""
    call = Call(service, "fit", Caller())
    ((status, headers, is_another),) = call.started
    assert status == "200 OK" and not is_another
    assert call.body() == {"input": "fit", "prediction": "fit"}
    assert headers == {"x-model": "fake/1.2.3", "x-request-id": "abc", "content-type": "application/json"}
    assert len(call.started) == 1


def test_a_refusal_comes_later_with_a_head_of_its_own(service: Service) -> None:
    """It goes the way that PEP 3333 has for it, by the start_response() that the application was given."""
    call = Call(service, "plain", Caller())
    assert call.body()["errors"] == [{"pointer": "", "detail": "the picture is too dark"}]
    _, (status, headers, is_another) = call.started
    assert status == "422 Unprocessable Content" and is_another
    assert headers == {"x-model": "fake/1.2.3", "x-request-id": "abc", "content-type": "application/problem+json"}


@pytest.mark.parametrize("text", ["fit", "plain"])
def test_a_request_is_freed_with_its_answer(service: Service, text: str) -> None:
    """It is not kept until the garbage is collected some day, with its body."""
    caller = Caller()
    kept = weakref.ref(caller)
    gc.collect()
    gc.disable()
    try:
        call = Call(service, text, caller)
        call.body()
        del caller, call
        wait_for(lambda: kept() is None)  # the batcher's thread may still be about to let it go
    finally:
        gc.enable()


class Alone(fakes.BatchOfPicky):
    """Does without the batches of its base class."""

    predict_batch = None  # type: ignore[assignment]


@pytest.mark.parametrize(("model", "threads", "is_later"), [(fakes.BatchOfPicky, 32, True), (Alone, 2, False)])
def test_a_model_whose_predict_batch_is_none_has_none(model: type, threads: int, is_later: bool) -> None:
    """Its inputs are predicted at once, by as many threads as without."""
    service = Service(Settings.from_environ({"MODELS": str(spec_of(model, "predict"))}))
    service.load()
    assert service.threads == threads
    assert isinstance(Call(service, "fit", Caller()).result, Later) == is_later
