"""Wiring: from settings and models to the WSGI application."""

import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import falcon

from inference_api import errors, problems
from inference_api.batching import Batcher, Direct, Gathering
from inference_api.config import Settings, read_settings
from inference_api.docs import add_docs, add_get, openapi
from inference_api.logs import progress, serving
from inference_api.metrics import CONTENT_TYPE, Metrics, shared_metrics
from inference_api.model import ModelError, find_model, prepare
from inference_api.resources import Health, Prediction
from inference_api.schema import Schema

DEFAULT_THREADS = 2
APP_LOAD_ERROR = 4
"""The exit code by which a Gunicorn worker says that it cannot load, so that the master stops (gunicorn.arbiter)."""
STARTING = "The models are being loaded."

log = logging.getLogger("inference_api")

App = falcon.App[falcon.Request, falcon.Response]
StartResponse = Callable[..., Any]


class _RequestId:
    """Falcon middleware: the request's id comes back."""

    def process_response(self, req: falcon.Request, resp: falcon.Response, _resource: Any, _succeeded: bool) -> None:
        resp.set_header("X-Request-ID", problems.request_id(req.env))


def create_app(settings: Settings, schemas: Sequence[Schema], metrics: Metrics) -> App:
    """The application that serves these models."""
    app = _new_app(Health())
    for schema in schemas:
        app.add_route(
            schema.path,
            Prediction(
                schema,
                _predictor(settings, schema, metrics),
                api_keys=settings.api_keys,
                max_body_bytes=settings.max_body_bytes,
                predicted=metrics.predicted,
            ),
        )
    if settings.metrics:
        models = {schema.path: (schema.model.name, schema.model.version) for schema in schemas}

        def scrape() -> bytes:
            # The server knows when it was asked, see worker/loop.py.
            return metrics.render(models, (serving.environ or {}).get("inference_api.asked", math.inf))

        add_get(app, "/metrics", CONTENT_TYPE, scrape)
    if settings.docs:
        add_docs(app, openapi(schemas, with_keys=bool(settings.api_keys), with_metrics=settings.metrics))
    return app


def create_starting_app() -> App:
    """The application while models are being loaded: alive, not ready."""

    def unavailable(req: falcon.Request, resp: falcon.Response, **_: Any) -> None:
        raise falcon.HTTPServiceUnavailable(description=STARTING, retry_after=errors.RETRY_AFTER_SECONDS)

    app = _new_app(Health("starting"))
    app.add_sink(unavailable)
    return app


def _new_app(health: Health) -> App:
    app = falcon.App(middleware=[_RequestId()])
    errors.add_error_handlers(app)
    app.add_route("/health", health)
    app.add_route("/health/live", health, suffix="live")
    return app


def _predictor(settings: Settings, schema: Schema, metrics: Metrics) -> Direct | Batcher:
    predict_batch = _predict_batch(settings, schema)
    if predict_batch is None:
        return Direct(schema.call, thread_safe=getattr(schema.model, "thread_safe", True))
    gathering = Gathering(settings.max_batch_size)
    return Batcher(predict_batch, schema.call, gathering, observe=partial(metrics.batched, schema.path))


def _predict_batch(settings: Settings, schema: Schema) -> Callable[[list[Any]], Sequence[Any]] | None:
    return getattr(schema.model, "predict_batch", None) if settings.max_batch_size > 1 else None


def load_schemas(settings: Settings) -> list[Schema]:
    """Import the models and read their signatures and weights; raises ModelError."""
    schemas = []
    for spec in settings.models:
        with progress("loading model", model=str(spec)):
            schema = Schema(spec, find_model(spec))
            prepare(spec, schema.model, "load")
        schemas.append(schema)
    return schemas


class Service:
    """The WSGI application over its whole life: before, while and after its models are loaded."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.schemas: list[Schema] = []
        self._starting_app = create_starting_app()
        self._app: Callable[[dict[str, Any], StartResponse], Iterable[bytes]] = self._starting_app

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        environ["inference_api.start_response"] = start_response  # for an answer that comes later
        serving.environ = environ
        try:
            return self._app(environ, start_response)
        finally:
            serving.environ = None

    @property
    def threads(self) -> int:
        """How many requests are worth running at once."""
        batches = any(_predict_batch(self.settings, schema) is not None for schema in self.schemas)
        return self.settings.threads or (self.settings.max_batch_size if batches else DEFAULT_THREADS)

    @property
    def is_ready(self) -> bool:
        """Whether its models are served."""
        return self._app is not self._starting_app

    def load(self) -> None:
        """Load the models and serve them from now on; raises ModelError."""
        self.schemas = load_schemas(self.settings)
        self._serve()

    def start_preparing(self, tell_ready: Callable[[], None] = lambda: None) -> threading.Thread:
        """Do in a thread what each worker does before it serves; a failure ends the process.

        Meanwhile /health and every other path answer 503.
        """
        if any(getattr(schema.model, "warm_up", None) for schema in self.schemas):
            self._app = self._starting_app
        preparing = threading.Thread(
            target=self._prepare_or_exit, args=(tell_ready,), name="prepare-models", daemon=True
        )
        if self.is_ready:  # told before a model can be reached, which might end the process
            tell_ready()
        else:
            preparing.start()
        return preparing

    def prepare(self) -> None:
        """Load the models, if that is still to do, and warm them up; raises ModelError."""
        if not self.schemas:
            self.schemas = load_schemas(self.settings)
        for schema in self.schemas:
            with progress("warming up model", model=str(schema.spec)):
                prepare(schema.spec, schema.model, "warm_up")
        if not self.is_ready:
            self._serve()

    def _prepare_or_exit(self, tell_ready: Callable[[], None]) -> None:
        try:
            self.prepare()
        except BaseException as exc:
            is_ours = isinstance(exc, ModelError)
            log.critical("cannot start: %s", exc, exc_info=None if is_ours else exc)
            print(f"inference_api: {exc}", file=sys.stderr, flush=True)  # noqa: T201 - for whoever starts it by hand
            logging.shutdown()  # os._exit() would not let the last line out
            os._exit(APP_LOAD_ERROR)
        tell_ready()

    def _serve(self) -> None:
        self._app = create_app(self.settings, self.schemas, shared_metrics(self.settings.model_paths))


def get_app() -> Service:
    """The service as the environment describes it, for any WSGI server.

    With PRELOAD, its models are loaded when this returns; without, it answers 503 while a thread loads them.
    Raises SettingsError or ModelError.
    """
    service = Service(read_settings())
    if service.settings.preload:
        service.load()
    else:
        service.start_preparing()
    return service
