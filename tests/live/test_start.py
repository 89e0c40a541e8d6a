"""Starts, seen from outside: what is said where one fails, what configures it, and what is ready when."""

import contextlib
import http.client
import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.service import (
    PROJECT,
    START_SECONDS,
    WAIT_SECONDS,
    Answer,
    Service,
    is_problem,
    needed,
    running,
    wait_for,
)

GUNICORN = ("-m", "gunicorn")
HELLO = {"text": "Hello"}

MODELS = """
import os, pathlib, sys, threading, time
from dataclasses import dataclass
from typing import Annotated
from msgspec import Meta, Struct

print("printed at import")

class Ge:
    def __repr__(self):
        return "Ge(ge=0)"

@dataclass
class Point:
    x: int

class Lenient(Struct):
    x: int

class Model:
    name, version = "model", "1.0.0"
    def predict(self, text: str) -> str:
        return text

class Waits(Model):
    def load(self):
        while not pathlib.Path("go").exists():
            time.sleep(0.01)

class Prints(Model):
    def load(self):
        print("printed by load")
        os.system("echo printed by a child")
    def warm_up(self):
        sys.stdout.write("printed by warm_up\\n")
    def predict(self, text: str) -> str:
        print("printed by predict", flush=True)
        os.write(1, b"written by predict\\n")
        return text

class NoPredict:
    name, version = "model", "1.0.0"

class NoName:
    version = "1.0.0"
    def predict(self, text: str) -> str: ...

class SpacedVersion(Model):
    version = "1 0"

class FailsToBeMade(Model):
    def __init__(self):
        raise OSError("no device")

class FailsToLoad(Model):
    def load(self):
        raise OSError("the weights\\nare not there")

class ExitsInLoad(Model):
    def load(self):
        sys.exit("no weights")

class FailsToWarmUp(Model):
    def warm_up(self):
        raise OSError("cold")

class Threaded(Model):
    def load(self):
        threading.Thread(target=threading.Event().wait, daemon=True).start()

class LoadIsNoMethod(Model):
    load = "weights"

class NoAnnotation(Model):
    def predict(self, text) -> str: ...

class NoReturn(Model):
    def predict(self, text: str): ...

class Arguments(Model):
    def predict(self, *texts: str) -> str: ...

class NotJSON(Model):
    def predict(self, text: threading.Thread) -> str: ...

class BadDefault(Model):
    def predict(self, text: str = 1) -> str: ...

class BadBound(Model):
    def predict(self, number: Annotated[int | float, Meta(ge=0)]) -> str: ...

class Ignored(Model):
    def predict(self, number: Annotated[int, Ge()]) -> str: ...

class IgnoredDeep(Model):
    def predict(self, numbers: list[dict[str, Annotated[int, "positive"]]]) -> str: ...

class TakesDataclass(Model):
    def predict(self, point: Point) -> str: ...

class TakesLenient(Model):
    def predict(self, lenient: list[Lenient]) -> str: ...

not_a_class = Model()
"""

SWITCH = "one of 1, true, yes, on, 0, false, no, off"
WRONG_VALUES = [
    ("HOST", "local host", "a host name or an address to listen on"),
    ("PORT", "0", "a whole number from 1 to 65535"),
    ("WEB_CONCURRENCY", "many", "a whole number from 1 to 64"),
    ("THREADS", "0", "a whole number from 1 to 1024"),
    (
        "WORKER_CLASS",
        "uvicorn.workers.Nothing",
        "gthread, or the dotted name of a Gunicorn worker class that can be imported",
    ),
    ("MODELS", "predict:models.Model", "path=module:Class, several separated by commas"),
    ("MODELS", "predict/me=models:Model", "a path of letters, digits, _ and - for each model"),
    ("MODELS", "health=models:Model", "paths other than docs, health, metrics, openapi.json"),
    ("MODELS", "docs=models:Model", "paths other than docs, health, metrics, openapi.json"),
    ("MODELS", "a=models:Model,a=models:Waits", "each path once"),
    ("MAX_BATCH_SIZE", "-1", "a whole number from 1 to 1024"),
    ("MAX_PENDING", "0", "a whole number from 1 to 1000000"),
    ("MAX_CONNECTIONS", "1e3", "a whole number from 1 to 1000000"),
    ("REQUEST_TIMEOUT", "nan", "seconds from 0.01 to 86400"),
    ("READ_TIMEOUT", "10s", "seconds from 0.1 to 86400"),
    ("KEEP_ALIVE", "0", "seconds from 0.1 to 86400"),
    ("TIMEOUT", "0.5", "a whole number from 1 to 86400"),
    ("DRAIN_SECONDS", "-5", "seconds from 0 to 86400"),
    ("GRACEFUL_TIMEOUT", "inf", "seconds from 0.1 to 86400"),
    ("MAX_REQUESTS", "1000000000000", "a whole number from 0 to 2147483648"),
    ("MAX_REQUESTS_JITTER", "٣", "a whole number from 0 to 2147483648"),
    ("MAX_BODY_BYTES", "1MiB", "a whole number from 1 to 1073741824"),
    ("PRELOAD", "maybe", SWITCH),
    ("LOG_LEVEL", "LOUD", "one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),
    ("ACCESS_LOG", "-", SWITCH),
    ("DOCS", "2", SWITCH),
    ("METRICS", "disabled", SWITCH),
]

SIGNATURE = "the signature of predict() cannot be a schema: "
UNSERVABLE = [
    ("nowhere:Model", "cannot import nowhere: ModuleNotFoundError: No module named 'nowhere'"),
    ("broken:Model", "cannot import broken: SyntaxError: '(' was never closed (broken.py, line 1)"),
    ("raising:Model", "cannot import raising: ZeroDivisionError: division by zero"),
    ("exiting:Model", "cannot import exiting: SystemExit: 0"),
    ("models:Missing", "models has no class Missing"),
    ("models:not_a_class", "models has no class not_a_class"),
    ("models:NoPredict", "NoPredict has no method predict()"),
    ("models:NoName", "name must be a string of 1 to 64 printable ASCII characters, not None"),
    ("models:SpacedVersion", "version must be a string of 1 to 64 printable ASCII characters, not '1 0'"),
    ("models:FailsToBeMade", "FailsToBeMade() failed: OSError: no device"),
    ("models:FailsToLoad", "load() failed: OSError: the weights are not there"),
    ("models:ExitsInLoad", "load() failed: SystemExit: no weights"),
    ("models:FailsToWarmUp", "warm_up() failed: OSError: cold"),
    ("models:LoadIsNoMethod", "LoadIsNoMethod has no method load()"),
    ("models:NoAnnotation", SIGNATURE + "parameter text has no annotation"),
    ("models:NoReturn", SIGNATURE + "it has no return annotation"),
    ("models:Arguments", SIGNATURE + "parameter texts must be one that can be given by name"),
    ("models:BadDefault", SIGNATURE + "Expected `str`, got `int`"),
    ("models:Ignored", SIGNATURE + "number: Ge(ge=0) would be ignored; constraints are msgspec.Meta(...)"),
    ("models:IgnoredDeep", SIGNATURE + "numbers: 'positive' would be ignored; constraints are msgspec.Meta(...)"),
    (
        "models:TakesDataclass",
        SIGNATURE + "point: Point would ignore unknown fields; use a msgspec.Struct with forbid_unknown_fields=True",
    ),
    ("models:TakesLenient", SIGNATURE + "lenient: Lenient needs forbid_unknown_fields=True"),
]

STARTING = {"status": "starting"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where starts that fail leave nothing behind but their output."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "models.py").write_text(MODELS)
    (folder / "broken.py").write_text("f(\n")
    (folder / "raising.py").write_text("1 / 0\n")
    (folder / "exiting.py").write_text("import sys\nsys.exit(0)\n")
    return folder


def failed_start(folder: Path, **variables: Any) -> list[str]:
    """The lines on stderr of a start that fails: with an exit code, without a traceback, and never ready."""
    for name in ("stdout", "stderr"):
        (folder / name).unlink(missing_ok=True)
    service = Service(folder, **variables)
    statuses = []
    try:
        while service.process.poll() is None:
            with contextlib.suppress(OSError):
                statuses.append(service.request("GET", "/health", seconds=1).status)
            with contextlib.suppress(subprocess.TimeoutExpired):
                service.process.wait(0.02)
    finally:
        service.kill()
    assert service.process.returncode > 0, service.output
    assert 200 not in statuses
    assert "Traceback" not in service.output
    service.log()
    return [line.removeprefix("Error: ") for line in service.stderr.splitlines() if line]


@pytest.mark.parametrize(("variable", "value", "allowed"), WRONG_VALUES)
def test_a_wrong_value(folder: Path, variable: str, value: str, allowed: str) -> None:
    """One line names the variable, the value and what is allowed, and nothing else is written."""
    told = failed_start(folder, **{variable: value})
    assert told == [f"inference_api: {variable}={value!r} is not allowed: it must be {allowed}"]
    assert not (folder / "stdout").read_bytes()


@pytest.mark.parametrize("value", ["short", "long enough,schlüssel", "with space in it", "k" * 513])
def test_a_wrong_key(folder: Path, value: str) -> None:
    """Keys are secret: the line does not show the one that is wrong."""
    allowed = "keys of 8 to 512 printable ASCII characters, separated by commas"
    assert failed_start(folder, API_KEYS=value) == [f"inference_api: API_KEYS=*** is not allowed: it must be {allowed}"]


def test_a_request_that_may_outlive_the_shutdown(folder: Path) -> None:
    """The two variables that do not fit together are both named."""
    assert failed_start(folder, REQUEST_TIMEOUT="30", GRACEFUL_TIMEOUT="30") == [
        "inference_api: REQUEST_TIMEOUT=30 is not allowed: it must be smaller than GRACEFUL_TIMEOUT=30, "
        "or a shutdown would cut requests off"
    ]


@pytest.mark.parametrize("command", [("-m", "inference_api"), GUNICORN])
def test_a_wrong_value_however_it_is_started(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Plain gunicorn says the same, without its own lines about a configuration that cannot be read."""
    (tmp_path / "gunicorn.conf.py").symlink_to(PROJECT / "gunicorn.conf.py")
    assert failed_start(tmp_path, command=command, TIMEOUT="soon") == [
        "inference_api: TIMEOUT='soon' is not allowed: it must be a whole number from 1 to 86400"
    ]


def test_a_wrong_value_in_the_file(tmp_path: Path) -> None:
    """A value of .env is checked like one of the environment."""
    (tmp_path / ".env").write_text("THREADS=none\n")
    assert failed_start(tmp_path) == [
        "inference_api: THREADS='none' is not allowed: it must be a whole number from 1 to 1024"
    ]


@pytest.mark.parametrize(("target", "reason"), UNSERVABLE)
def test_what_is_not_a_model(folder: Path, target: str, reason: str) -> None:
    """One line names the variable, the model, and what is wrong with it."""
    told = failed_start(folder, MODELS=f"good=models:Model,bad={target}")
    assert [line for line in told if "printed" not in line] == [
        f"{'inference_api: ' if 'warm_up' in reason else ''}MODELS: bad={target}: {reason}"
    ]


@pytest.mark.parametrize("target", ["models:NotJSON", "models:BadBound"])
def test_an_annotation_that_no_schema_can_say(folder: Path, target: str) -> None:
    """What msgspec says of it, however long, is one line, too."""
    told = failed_start(folder, MODELS=f"bad={target}")
    assert told[-1].startswith(f"MODELS: bad={target}: {SIGNATURE}")
    assert told[:-1] == ["printed at import"]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("nowhere:Model", "cannot import nowhere: ModuleNotFoundError: No module named 'nowhere'"),
        ("models:FailsToLoad", "load() failed: OSError: the weights are not there"),
        ("models:FailsToWarmUp", "warm_up() failed: OSError: cold"),
    ],
)
def test_a_model_that_fails_in_its_worker(folder: Path, target: str, reason: str) -> None:
    """With PRELOAD=false the worker that cannot load ends the service, and the log says so as well."""
    told = failed_start(folder, PRELOAD="false", MODELS=f"bad={target}")
    assert [line for line in told if "printed" not in line] == [f"inference_api: MODELS: bad={target}: {reason}"]
    lines = map(json.loads, (folder / "stdout").read_text().splitlines())
    assert [line["message"] for line in lines if line["level"] == "CRITICAL"] == [
        f"cannot start: MODELS: bad={target}: {reason}"
    ]


def test_a_model_that_fails_in_several_workers(folder: Path) -> None:
    """Each says so; the failure of the second while the first one's ends the service is none of Gunicorn's own."""
    told = failed_start(folder, PRELOAD="false", WEB_CONCURRENCY="4", MODELS="bad=nowhere:Model")
    assert set(told) == {
        "inference_api: MODELS: bad=nowhere:Model: cannot import nowhere: "
        "ModuleNotFoundError: No module named 'nowhere'"
    }


def test_a_model_that_starts_threads(folder: Path) -> None:
    """Before a fork they are refused, and the line names what to set; where each worker loads, they are fine."""
    told = failed_start(folder, MODELS="predict=models:Threaded")
    assert told[-1].startswith("PRELOAD=true is not allowed: loading the models started threads (1), ")
    assert "set PRELOAD=false" in told[-1]
    with running(folder, MODELS="predict=models:Threaded", PRELOAD="false") as service:
        assert service.post("/predict", HELLO).status == 200


def test_an_address_in_use(folder: Path) -> None:
    """The address and the system's reason, at once."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert failed_start(folder, PORT=str(port)) == [
            f"HOST='127.0.0.1' with PORT={port} is not allowed: it must be a free address of this machine, "
            "but the system says: Address already in use"
        ]


def test_an_address_of_another_machine(folder: Path) -> None:
    """Likewise (192.0.2.0/24 is nobody's, RFC 5737)."""
    (told,) = failed_start(folder, HOST="192.0.2.1", PORT="8000")
    assert told.startswith("HOST='192.0.2.1' with PORT=8000 is not allowed: it must be a free address of this machine")


@pytest.mark.parametrize("certificate", [sys.executable, "/no/such/file.pem"])
def test_tls(folder: Path, certificate: str) -> None:
    """The service's own worker speaks no TLS, and names the one that does."""
    assert failed_start(folder, GUNICORN_CMD_ARGS=f"--certfile={certificate}") == [
        "TLS is a proxy's job, or Gunicorn's own workers': set WORKER_CLASS=gthread"
    ]


@pytest.mark.parametrize("worker_class", ["gthread", "gunicorn.workers.sync.SyncWorker"])
def test_tls_of_gunicorns_own_workers(folder: Path, worker_class: str) -> None:
    """They are let serve what the certificate is for; with one thread, or sync would be gthread, too."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *(needed("openssl", "openssl"), "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    arguments = f"--certfile={certificate} --keyfile={key}"
    service = Service(folder, WORKER_CLASS=worker_class, THREADS="1", GUNICORN_CMD_ARGS=arguments)
    context = ssl.create_default_context(cafile=certificate)

    def is_healthy() -> bool:
        connection = http.client.HTTPSConnection("localhost", service.port, timeout=WAIT_SECONDS, context=context)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    try:
        wait_for(is_healthy, START_SECONDS, lambda: service.output)
    finally:
        service.kill()


# The command line.


def run(folder: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "inference_api", *arguments],
        cwd=folder,
        env={"PYTHONPATH": f"{folder}:{PROJECT}", **variables},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    return done.returncode, done.stdout, done.stderr


def test_help_names_every_variable(folder: Path) -> None:
    """Those of .env.example, with the same defaults."""
    code, told, error = run(folder, "--help")
    assert (code, error) == (0, "")
    example = (PROJECT / ".env.example").read_text().splitlines()
    shown = [line.strip() for line in told.splitlines() if "=" in line and line.strip()[:4].isupper()]
    assert shown == [line for line in example if line and not line.startswith("#")]


def test_version(folder: Path) -> None:
    """The number that the document of the API has, too."""
    assert run(folder, "--version") == (0, "1.0.0\n", "")


def test_unknown_arguments_are_refused(folder: Path) -> None:
    """Everything is set by variables: what stands on the command line is not silently ignored."""
    code, told, error = run(folder, "--port=80")
    assert (code, told) == (2, "")
    assert "unrecognized arguments: --port=80" in error


def test_check(folder: Path) -> None:
    """It loads the models, says what would be served, and serves nothing."""
    code, told, error = run(folder, "--check", MODELS="a=models:Model,b=models:Model")
    assert (code, error) == (0, "")
    assert told == "printed at import\n/a: model/1.0.0\n/b: model/1.0.0\nok\n"


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"PORT": "x"}, "PORT='x' is not allowed: it must be a whole number from 1 to 65535"),
        (
            {"MODELS": "a=nowhere:A"},
            "MODELS: a=nowhere:A: cannot import nowhere: ModuleNotFoundError: No module named 'nowhere'",
        ),
        (
            {"MODELS": "a=models:FailsToWarmUp"},
            "MODELS: a=models:FailsToWarmUp: warm_up() failed: OSError: cold",
        ),
    ],
)
def test_a_check_that_fails(folder: Path, variables: dict[str, str], line: str) -> None:
    """It fails as the start would."""
    code, told, error = run(folder, "--check", **variables)
    assert (code, error) == (1, f"inference_api: {line}\n")
    assert "ok\n" not in told


# What is served in the end.


def test_every_way_to_start_is_the_same_service(tmp_path: Path) -> None:
    """python -m inference_api, and plain gunicorn in the project's folder: same settings, document and answers."""
    seen = []
    for name, command in (("module", ("-m", "inference_api")), ("gunicorn", GUNICORN)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "gunicorn.conf.py").symlink_to(PROJECT / "gunicorn.conf.py")
        with running(folder, command=command, WEB_CONCURRENCY="2") as service:
            answers = [service.get("/openapi.json"), service.post("/predict", HELLO), service.get("/nowhere")]
            (started,) = (line for line in service.log() if line["message"] == "starting")
        seen.append(([(answer.status, stable(answer)) for answer in answers], stable_settings(started)))
        assert not service.stderr
    assert seen[0] == seen[1]


def stable(answer: Answer) -> Any:
    return {name: value for name, value in answer.json.items() if name != "request_id"}


def stable_settings(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("time", "PORT")}


def test_the_effective_configuration_is_logged_once(tmp_path: Path) -> None:
    """Every variable, whatever the number of workers, and no key in what the service writes."""
    keys = "correct-horse,battery-staple"
    with running(tmp_path, API_KEYS=keys, WEB_CONCURRENCY="2", LOG_LEVEL="debug", DOCS="off") as service:
        assert service.post("/predict", HELLO).status == 401
    (line,) = (line for line in service.log() if line["message"] == "starting")
    variables = {line.partition("=")[0] for line in (PROJECT / ".env.example").read_text().splitlines() if "=" in line}
    variables = {name for name in variables if name.isupper()}
    assert {name for name in line if name.isupper()} == variables
    expected = {"API_KEYS": "***", "WEB_CONCURRENCY": 2, "THREADS": 2, "LOG_LEVEL": "DEBUG", "DOCS": False}
    assert {name: line[name] for name in expected} == expected
    assert (line["PORT"], line["logger"], line["version"]) == (service.port, "inference_api", "1.0.0")
    assert not any(key in service.stdout + service.stderr for key in keys.split(","))


def test_the_file_is_read_and_the_environment_is_stronger(tmp_path: Path) -> None:
    """.env sets what the environment of the process does not; quotes and comments are as in a shell."""
    (tmp_path / ".env").write_text(
        "# what this instance is\n"
        "METRICS=off\n"
        "DOCS=off\n"
        'MODELS="shout=models:Model"  # one\n'
        "export MAX_BODY_BYTES='20'\n"
        "THREADS=\n"
        "OTHER=ignored\n"
    )
    with running(tmp_path, MODELS, DOCS="on") as service:
        assert service.get("/metrics").status == 404
        assert service.get("/docs").status == 200
        assert service.post("/predict", HELLO).status == 404
        assert service.post("/shout", {"text": "a"}).json == {"input": "a", "prediction": "a"}
        assert is_problem(service.post("/shout", {"text": "longer than that may be"}), 413)


@pytest.mark.parametrize("worker_class", ["inference_api.worker.Worker", "gthread"])
def test_a_model_that_loads_after_the_fork(tmp_path: Path, worker_class: str) -> None:
    """With PRELOAD=false the service is alive and not ready while the model loads, and healthy after."""
    service = Service(tmp_path, MODELS, PRELOAD="false", MODELS="predict=models:Waits", WORKER_CLASS=worker_class)
    try:
        wait_for(lambda: is_alive(service), START_SECONDS, lambda: service.output)
        health = service.get("/health")
        assert (health.status, health.json) == (503, STARTING)
        head = service.request("HEAD", "/health")
        assert (head.status, head.body) == (503, b"")
        refused = service.post("/predict", HELLO)
        assert is_problem(refused, 503)
        assert refused.headers["retry-after"] == "1"
        assert refused.json["detail"] == "The models are being loaded."
        (tmp_path / "go").touch()
        wait_for(lambda: service.get("/health").status == 200, WAIT_SECONDS, lambda: service.output)
        assert service.get("/health").json == {"status": "healthy"}
        assert service.post("/predict", HELLO).json == {"input": "Hello", "prediction": "Hello"}
        assert service.terminate() == 0
    finally:
        service.kill()


def test_a_service_that_is_stopped_while_it_starts(tmp_path: Path) -> None:
    """A SIGTERM that comes before the worker has its signal handlers ends it all the same, long before its grace."""
    slow_fork = "import os, time\nos.register_at_fork(after_in_child=lambda: time.sleep(1))\n"
    service = Service(tmp_path, slow_fork + MODELS, MODELS="predict=models:Model")
    try:
        wait_for(lambda: len(service.workers()) == 1, START_SECONDS, lambda: service.output)
        assert service.terminate(seconds=20) == 0
    finally:
        service.kill()


def is_alive(service: Service) -> bool:
    with contextlib.suppress(OSError):
        return service.get("/health/live").body == b'{"status":"alive"}'
    return False


@pytest.fixture(params=["true", "false"])
def printing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    with running(tmp_path, MODELS, MODELS="predict=models:Prints", PRELOAD=request.param) as service:
        yield service


def test_what_a_model_prints_goes_to_stderr(printing: Service) -> None:
    """Whoever prints, and whenever: the lines of the log stay whole lines of JSON."""
    assert printing.post("/predict", HELLO).status == 200
    assert printing.terminate() == 0
    assert sorted(printing.stderr.splitlines()) == [
        "printed at import",
        "printed by a child",
        "printed by load",
        "printed by predict",
        "printed by warm_up",
        "written by predict",
    ]
    assert "printed" not in json.dumps(printing.log())
    assert [line["path"] for line in printing.access_lines() if line["path"] == "/predict"] == ["/predict"]
