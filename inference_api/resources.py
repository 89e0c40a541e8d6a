"""The two resource classes: health and prediction."""

import hmac
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import falcon

from inference_api import errors
from inference_api.batching import Batcher, Call, Caller, Direct
from inference_api.logs import serving
from inference_api.schema import Schema

UNAUTHORIZED = "A valid key is needed: Authorization: Bearer …, or X-API-Key."
JSON = "application/json"
NOT_JSON_TYPE = f"The content type must be {JSON}."
MAX_LENGTH_DIGITS = 18


class Health:
    """Whether a balancer should send requests here (`/health`), and whether the process works (`/health/live`)."""

    def __init__(self, state: str = "healthy") -> None:
        self.state = state

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 where requests should be sent here, else 503; the state says why."""
        # The server knows when it drains or is stuck, see worker/lifecycle.py.
        state = req.env.get("inference_api.state", "healthy")
        if state == "healthy":
            state = self.state
        if state != "healthy":
            resp.status = falcon.HTTP_503
        resp.data = b'{"status":"%b"}' % state.encode()
        resp.cache_control = ("no-store",)

    def on_get_live(self, req: falcon.Request, resp: falcon.Response) -> None:
        """200 as long as anything is answered."""
        resp.data = b'{"status":"alive"}'
        resp.cache_control = ("no-store",)

    on_head = on_get
    on_head_live = on_get_live


class Later:
    """The body of an answer that is still to come, as a WSGI iterable of one item (PEP 3333).

    To iterate over it waits for the call. A server that would rather not keep a thread waiting calls `when_ready`
    before, and iterates once it is told to.
    """

    def __init__(
        self, req: falcon.Request, resp: falcon.Response, call: Call, encode: Callable[[list[Any]], bytes]
    ) -> None:
        self._req = req
        self._resp = resp
        self._call = call
        self._encode = encode

    def when_ready(self, tell: Callable[[], None]) -> None:
        """Begin the call; `tell` is called, in another thread, once it has ended."""
        self._call.begin(tell)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[bytes]:
        req, resp = self._req, self._resp
        resp.stream = None  # which is this: a cycle would keep the request until the collector finds it
        serving.environ = req.env
        try:
            body = self._encode(self._call.result())
        except Exception as exc:
            errors.handle(req, resp, exc)
            # Nothing has been sent, so that PEP 3333 allows another status and other fields instead of a success's.
            req.env["inference_api.start_response"](resp.status, [*resp.headers.items()], sys.exc_info())
            body = resp.data or b""
        finally:
            serving.environ = None
        yield body


class Prediction:
    """One model's predictions: one input, or an array of them, as JSON."""

    def __init__(
        self,
        schema: Schema,
        predictor: Direct | Batcher,
        *,
        api_keys: tuple[bytes, ...],
        max_body_bytes: int,
        predicted: Callable[[str, int], None],
    ) -> None:
        self._schema = schema
        self._predictor = predictor
        self._batcher = predictor if isinstance(predictor, Batcher) else None
        self._api_keys = api_keys
        self._max_body_bytes = max_body_bytes
        self._predicted = predicted
        self._x_model = f"{schema.model.name}/{schema.model.version}"

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Predict; what is wrong with the request, or fails, is raised for errors.py."""
        resp.set_header("X-Model", self._x_model)
        environ = req.env
        if self._api_keys:
            self._authorize(environ)
        content_type = environ.get("CONTENT_TYPE") or JSON
        if content_type != JSON and content_type.partition(";")[0].strip().lower() != JSON:
            raise falcon.HTTPUnsupportedMediaType(description=NOT_JSON_TYPE)
        schema = self._schema
        inputs, is_array = schema.decode(self._read(environ))
        if is_array:
            req.context["is_array"] = True
        echoes = schema.encode_inputs(inputs)
        caller = environ.get("inference_api.caller")
        if self._batcher is not None and caller is not None and inputs:
            call = self._batcher.call(inputs, caller)
            resp.stream = Later(req, resp, call, lambda outputs: self._answer(echoes, outputs, is_array))
        else:
            resp.data = self._answer(echoes, self._predictor.predict(inputs, caller or Caller()), is_array)

    def _answer(self, echoes: Sequence[bytes], outputs: Sequence[Any], is_array: bool) -> bytes:
        schema = self._schema
        body = schema.encode_answer(echoes, outputs, is_array)
        self._predicted(schema.path, len(outputs))
        return body

    def _authorize(self, environ: dict[str, Any]) -> None:
        given = environ.get("HTTP_X_API_KEY", "")
        scheme, _, credentials = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if not given and scheme.lower() == "bearer":
            given = credentials.strip()
        # Every key is compared, as bytes, so that the time taken tells nothing.
        matches = [hmac.compare_digest(key, given.encode("latin-1")) for key in self._api_keys]
        if not any(matches):
            raise falcon.HTTPUnauthorized(description=UNAUTHORIZED, challenges=['Bearer realm="inference-api"'])

    def _read(self, environ: dict[str, Any]) -> bytes:
        text = environ.get("CONTENT_LENGTH")
        if text:
            length = _content_length(text)
            if length > self._max_body_bytes:
                raise self._too_large()
            body: bytes = environ["wsgi.input"].read(length)
            if len(body) != length:
                raise falcon.HTTPBadRequest
            return body
        if not environ.get("wsgi.input_terminated"):
            return b""
        body = environ["wsgi.input"].read(self._max_body_bytes + 1)
        if len(body) > self._max_body_bytes:
            raise self._too_large()
        return body

    def _too_large(self) -> falcon.HTTPError:
        return falcon.HTTPContentTooLarge(description=f"The body may have at most {self._max_body_bytes} bytes.")


@lru_cache
def _content_length(text: str) -> int:
    """The number that a Content-Length is; of more digits than Python would convert, one that is too large, too."""
    if not text.isascii() or not text.isdigit():
        raise falcon.HTTPBadRequest
    return int(text) if len(text) <= MAX_LENGTH_DIGITS else sys.maxsize
