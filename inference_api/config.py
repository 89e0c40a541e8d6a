"""What operators set: environment variables, read once, checked, and held in one frozen dataclass."""

import functools
import math
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dotenv.parser import parse_stream

from inference_api.model import ModelSpec

DEFAULT_MODELS = "predict=inference_api.model:DummyModel,square_numbers=inference_api.model:SquareNumbersModel"
OWN_WORKER_CLASS = "inference_api.worker.Worker"
RESERVED_PATHS = frozenset({"health", "metrics", "docs", "openapi.json"})
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
SWITCHES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
MAX_WORKERS = 64
MAX_THREADS = 1024
MAX_SECONDS = 86_400.0
MASK = "***"

_PATH = re.compile(r"[A-Za-z0-9_-]{1,64}")
_API_KEY = re.compile(r"[\x21-\x7e]{8,512}")
_DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class SettingsError(RuntimeError):
    """A variable has a value that is not allowed; the message names the variable, the value and what is allowed."""


def available_cpus(affinity: int | None = None, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """How many CPUs this container may use: the scheduler affinity, cut by the cgroup's quota (v1 or v2)."""
    if affinity is None:
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, math.ceil(quota_cpus(cgroup))))


def quota_cpus(root: Path) -> float:
    """The CPUs that the cgroup mounted at `root` may use; MAX_WORKERS where it sets no bound."""

    def read(name: str) -> list[str]:
        try:
            return (root / name).read_text().split()
        except OSError:
            return []

    quota_and_period = read("cpu.max") or read("cpu/cpu.cfs_quota_us") + read("cpu/cpu.cfs_period_us")
    try:
        quota, period = (int(value) for value in quota_and_period)
    except ValueError:  # "max", or neither hierarchy is there
        return MAX_WORKERS
    return quota / period if quota > 0 and period > 0 else MAX_WORKERS


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return parse


def _workers(text: str) -> int:
    return _whole(1, MAX_WORKERS)(text) if text else available_cpus()


def _threads(text: str) -> int:
    return _whole(1, MAX_THREADS)(text) if text else 0  # known once the models are, see `app.Service`


def _seconds(low: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or not low <= float(text) <= MAX_SECONDS:
            raise ValueError(f"seconds from {low:g} to {MAX_SECONDS:g}")
        return float(text)

    return parse


def _switch(text: str) -> bool:
    try:
        return SWITCHES[text.lower()]
    except KeyError:
        raise ValueError("one of " + ", ".join(SWITCHES)) from None


def _host(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.:_-]{1,253}", text):
        raise ValueError("a host name or an address to listen on")
    return text


def _log_level(text: str) -> str:
    if text.upper() not in LOG_LEVELS:
        raise ValueError("one of " + ", ".join(LOG_LEVELS))
    return text.upper()


def _worker_class(text: str) -> str:
    if text not in (OWN_WORKER_CLASS, "gthread"):
        try:
            is_worker = _DOTTED_NAME.fullmatch(text) and hasattr(pkgutil.resolve_name(text), "init_process")
        except Exception:  # whatever its module raises
            is_worker = False
        if not is_worker:
            raise ValueError("gthread, or the dotted name of a Gunicorn worker class that can be imported")
    return text


def _models(text: str) -> tuple[ModelSpec, ...]:
    specs: list[ModelSpec] = []
    for item in text.split(","):
        path, equals, target = item.strip().partition("=")
        module, colon, class_name = target.partition(":")
        if not (equals and colon and _DOTTED_NAME.fullmatch(module) and class_name.isidentifier()):
            raise ValueError("path=module:Class, several separated by commas")
        if not _PATH.fullmatch(path):
            raise ValueError("a path of letters, digits, _ and - for each model")
        if path in RESERVED_PATHS:
            raise ValueError("paths other than " + ", ".join(sorted(RESERVED_PATHS)))
        if path in {spec.path for spec in specs}:
            raise ValueError("each path once")
        specs.append(ModelSpec(path, module, class_name))
    return tuple(specs)


def _api_keys(text: str) -> tuple[bytes, ...]:
    keys = [key.strip() for key in text.split(",") if key.strip()]
    if (text and not keys) or not all(_API_KEY.fullmatch(key) for key in keys):  # "," must not open the service
        raise ValueError("keys of 8 to 512 printable ASCII characters, separated by commas")
    return tuple(key.encode() for key in keys)


def _setting(default: str, parse: Callable[[str], Any], meaning: str, *, secret: bool = False) -> Any:
    return field(repr=not secret, metadata={"default": default, "parse": parse, "meaning": meaning})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The service's configuration; the variable of a field is its name in capitals.

    An empty value means the default, as `docker run --env-file` and Kubernetes manifests often leave one.
    """

    host: str = _setting("0.0.0.0", _host, "address to listen on")  # noqa: S104 - a container listens on all of them
    port: int = _setting("8000", _whole(1, 65_535), "port to listen on")
    web_concurrency: int = _setting(
        "", _workers, "worker processes; by default the CPUs of this container (affinity and quota)"
    )
    threads: int = _setting(
        "", _threads, "predictions at once in one worker; by default 2, or MAX_BATCH_SIZE where a model batches"
    )
    worker_class: str = _setting(
        OWN_WORKER_CLASS, _worker_class, "Gunicorn worker class; gthread works with fewer promises"
    )
    models: tuple[ModelSpec, ...] = _setting(
        DEFAULT_MODELS, _models, "what is served where: path=module:Class, several separated by commas"
    )
    max_batch_size: int = _setting(
        "32", _whole(1, MAX_THREADS), "inputs of concurrent requests in one call of predict_batch; 1 turns batching off"
    )
    max_pending: int = _setting("1024", _whole(1, 1_000_000), "requests waiting in one worker before it answers 503")
    max_connections: int = _setting("1000", _whole(1, 1_000_000), "open connections in one worker")
    request_timeout: float = _setting("25", _seconds(0.01), "seconds from the last byte of a request to its answer")
    read_timeout: float = _setting("10", _seconds(0.1), "seconds for a whole request to arrive")
    keep_alive: float = _setting("75", _seconds(0.1), "seconds an idle connection is kept")
    timeout: int = _setting("30", _whole(1, 86_400), "seconds without a heartbeat before a worker is replaced")
    drain_seconds: float = _setting(
        "0", _seconds(0), "at shutdown: seconds still serving while /health answers 503; 5 in the container"
    )
    graceful_timeout: float = _setting("30", _seconds(0.1), "at shutdown: seconds to finish what is in flight")
    max_requests: int = _setting("0", _whole(0, 2**31), "requests after which a worker is replaced; 0 is never")
    max_requests_jitter: int = _setting("0", _whole(0, 2**31), "up to this many requests more, at random")
    max_body_bytes: int = _setting("1048576", _whole(1, 2**30), "bytes of the largest request body")
    preload: bool = _setting("true", _switch, "load models before the fork, so that workers share the memory")
    log_level: str = _setting("INFO", _log_level, "DEBUG, INFO, WARNING, ERROR or CRITICAL")
    access_log: bool = _setting("on", _switch, "one log line a request")
    api_keys: tuple[bytes, ...] = _setting(
        "", _api_keys, "keys, separated by commas, that open the model paths; none: open to all", secret=True
    )
    docs: bool = _setting("on", _switch, "/openapi.json and the /docs page")
    metrics: bool = _setting("on", _switch, "/metrics for Prometheus")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "Settings":
        """Read and check every variable; raises SettingsError for the first bad one."""
        values: dict[str, Any] = {}
        for setting in fields(cls):
            variable = setting.name.upper()
            text = environ.get(variable, "").strip() or setting.metadata["default"]
            try:
                values[setting.name] = setting.metadata["parse"](text)
            except ValueError as exc:
                shown = repr(text[:200]) if setting.repr else MASK
                raise SettingsError(f"{variable}={shown} is not allowed: it must be {exc}") from None
        settings = cls(**values)
        if settings.request_timeout >= settings.graceful_timeout:
            raise SettingsError(
                f"REQUEST_TIMEOUT={settings.request_timeout:g} is not allowed: it must be smaller than "
                f"GRACEFUL_TIMEOUT={settings.graceful_timeout:g}, or a shutdown would cut requests off"
            )
        return settings

    @property
    def model_paths(self) -> tuple[str, ...]:
        """Where models are served, as in a request: "/predict"."""
        return tuple(f"/{spec.path}" for spec in self.models)

    @classmethod
    def variables(cls) -> list[tuple[str, str, str]]:
        """Every variable with its default and its meaning."""
        return [(s.name.upper(), s.metadata["default"], s.metadata["meaning"]) for s in fields(cls)]

    def effective(self) -> dict[str, Any]:
        """Every variable with the value in force, fit for a log line: secrets masked."""
        shown = {setting.name.upper(): getattr(self, setting.name) for setting in fields(self)}
        shown["THREADS"] = self.threads or ""
        shown["MODELS"] = ",".join(map(str, self.models))
        shown["API_KEYS"] = MASK if self.api_keys else ""
        return shown


def read_settings() -> Settings:
    """The settings of this process: its environment, and below it a `.env` file in the working folder.

    Raises SettingsError for a bad value.
    """
    folder, environ = _surroundings()
    return Settings.from_environ({**_from_file(folder / ".env"), **environ})


@functools.cache
def _surroundings() -> tuple[Path, dict[str, str]]:
    """The working folder and the environment at the start: models may change both before a reload."""
    return Path.cwd(), dict(os.environ)


def _from_file(path: Path) -> dict[str, str]:
    try:
        if not path.is_file():
            return {}
        with path.open(encoding="utf-8") as file:
            bindings = list(parse_stream(file))
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f".env cannot be read: {exc}") from exc
    for binding in bindings:  # `dotenv_values` would leave out what is wrong: keys with a quote too few, for example
        if binding.error or (binding.key and binding.value is None):
            text = binding.original.string
            line = binding.original.line + text[: -len(text.lstrip())].count("\n")  # the blank ones before it are in it
            raise SettingsError(f".env: line {line} is not allowed: it must be KEY=value")
    return {binding.key: binding.value or "" for binding in bindings if binding.key}


in_force: ContextVar[Settings | None] = ContextVar("in_force", default=None)
"""At a reload, what has been rehearsed: gunicorn.conf.py, executed anew, reads nothing else."""


def settings_or_exit() -> Settings:
    """The same for a start: a bad value ends the process with one line on stderr."""
    try:
        return in_force.get() or read_settings()
    except SettingsError as exc:
        sys.exit(f"inference_api: {exc}")
