"""Who is measured: how each server is started, what it is asked, and what it must answer."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.environments import PROJECT, WORK, program

START_SECONDS = 60
STOP_SECONDS = 20
POLL_SECONDS = 0.002
CPUS = sorted(os.sched_getaffinity(0))
SERVER_CPU, LOAD_CPU = CPUS[-1], CPUS[0]

HELLO: Any = {"text": "Hello"}
HELLO_ANSWER: Any = {"input": "Hello", "prediction": "predicted(Hello)"}
NGINX = """
worker_processes {workers}; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 2048; }}
http {{
    access_log off; keepalive_requests 1000000000;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} backlog=2048; default_type application/json;
        add_header X-Request-ID 0f8fad5bd9cb469fa16570867728950e; add_header X-Model dummy/1.0.0;
        location = /predict {{ return 200 '{answer}'; }}
        location = /health {{ return 200 '{{"status":"healthy"}}'; }}
    }}
}}
"""


@dataclass(frozen=True)
class Start:
    """What a server's command needs to know."""

    port: int
    workers: int
    folder: Path


@dataclass(frozen=True)
class Server:
    name: str
    title: str
    environment: str  # the virtual environment; empty for nginx
    command: Callable[[Start], list[str]]
    variables: dict[str, str] = field(default_factory=dict)
    path: str = "/predict"
    health: str = "/health"
    body: Any = field(default_factory=lambda: HELLO)
    answer: Any = field(default_factory=lambda: HELLO_ANSWER)  # None: any JSON


@dataclass
class Running:
    """A server that is ready and has answered right."""

    server: Server
    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    start_seconds: float

    def processes(self) -> list[int]:
        """The process ids of the server and of all below it."""
        found = [self.process.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found.extend(int(child) for child in (task / "children").read_text().split())
        return found

    def pss_mb(self) -> float:
        """Memory of all processes, shared pages shared out; in MB of 10**6 bytes."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total * 1024 / 1e6

    def descriptors(self) -> int:
        return sum(sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()) for pid in self.processes())


def service(name: str, title: str, environment: str = "service", **variables: str) -> Server:
    """This project's service with these variables."""
    return Server(name, title, environment, lambda _: [program(environment), "-m", "inference_api"], variables)


def _fastapi(environment: str, module: str) -> Callable[[Start], list[str]]:
    return lambda start: [
        *(program(environment, "uvicorn"), f"benchmarks.peers.{module}:app", "--port", str(start.port)),
        *("--workers", str(start.workers), "--loop", "uvloop", "--http", "httptools"),
        *("--no-access-log", "--log-level", "warning"),
    ]


def _granian(start: Start) -> list[str]:
    return [
        *(program("granian", "granian"), "--interface", "wsgi", "--factory", "inference_api.app:get_app"),
        *("--host", "127.0.0.1", "--port", str(start.port), "--workers", str(start.workers)),
        *("--no-access-log", "--log-level", "warning"),
    ]


def _litserve(*mode: str) -> Callable[[Start], list[str]]:
    return lambda start: [program("litserve"), "-m", "benchmarks.peers.litserve_app", str(start.port), *mode]


def _bentoml(name: str) -> Callable[[Start], list[str]]:
    return lambda start: [
        *(program("bentoml"), "-m", "bentoml", "serve", f"benchmarks.peers.bentoml_app:{name}"),
        *("--host", "127.0.0.1", "--port", str(start.port)),
    ]


def _mlserver(start: Start) -> list[str]:
    metrics, grpc = free_port(), free_port()
    settings = {"host": "127.0.0.1", "http_port": start.port, "grpc_port": grpc, "metrics_port": metrics}
    settings |= {"parallel_workers": 0, "debug": False, "metrics_endpoint": None}
    model = {"name": "dummy", "implementation": "benchmarks.peers.mlserver_model.Dummy"}
    (start.folder / "settings.json").write_text(json.dumps(settings))
    (start.folder / "model-settings.json").write_text(json.dumps(model))
    return [program("mlserver", "mlserver"), "start", str(start.folder)]


def _nginx(start: Start) -> list[str]:
    answer = json.dumps(HELLO_ANSWER, separators=(",", ":"))
    file = start.folder / "nginx.conf"
    file.write_text(NGINX.format(workers=start.workers, port=start.port, folder=start.folder, answer=answer))
    return [shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin") or "nginx", "-c", str(file)]


BENTOML_VARIABLES = {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(WORK / "bentoml-home")}
OURS = service("ours", "this service, log and metrics on")
SERVERS = [
    OURS,
    service("ours-off", "this service, log and metrics off", ACCESS_LOG="off", METRICS="off"),
    Server("fastapi", "FastAPI on uvicorn, log off", "fastapi", _fastapi("fastapi", "fastapi_app")),
    service("gthread", "the same app on gthread, log and metrics on", WORKER_CLASS="gthread"),
    Server("granian", "the same app on Granian, log off", "granian", _granian, {"ACCESS_LOG": "off", "METRICS": "off"}),
    Server("litserve", "LitServe, log off", "litserve", _litserve()),
    Server("bentoml", "BentoML, log off", "bentoml", _bentoml("Plain"), BENTOML_VARIABLES, health="/healthz"),
    Server("mlserver", "MLServer", "mlserver", _mlserver, health="/v2/health/ready"),
    Server("nginx", "nginx, from its configuration", "", _nginx),
]


def batching_servers() -> list[Server]:
    """The model of 5 ms a call, however many inputs."""
    ours = service("ours", "this service", MODELS="predict=benchmarks.peers.models:BatchModel", MAX_BATCH_SIZE="64")
    bentoml = Server("bentoml", "BentoML", "bentoml", _bentoml("Batching"), BENTOML_VARIABLES, health="/healthz")
    return [
        ours,
        Server("litserve", "LitServe", "litserve", _litserve("batch")),
        Server(**{**vars(bentoml), "body": {"texts": ["Hello"]}, "answer": ["predicted(Hello)"]}),
    ]


def digits_servers() -> list[Server]:
    weights = {"DIGITS_WEIGHTS": str(WORK / "digits.skops"), "MODELS": "digits=examples.digits:DigitsModel"}
    common: dict[str, Any] = {"path": "/digits", "body": {"pixels": [0, 8] * 32}, "answer": None}
    ours = [
        service("ours", "this service", "digits", MAX_BATCH_SIZE="64", **weights),
        service("unbatched", "this service, unbatched", "digits", MAX_BATCH_SIZE="1", **weights),
    ]
    return [
        *(Server(**{**vars(server), **common}) for server in ours),
        Server(
            "fastapi", "FastAPI, a call a request", "digits", _fastapi("digits", "fastapi_digits"), weights, **common
        ),
    ]


def attacked_servers() -> list[Server]:
    """Those of SERVERS that answer /large too."""
    models = {"MODELS": "predict=inference_api.model:DummyModel,large=benchmarks.peers.models:LargeModel"}
    named = {server.name: server for server in SERVERS}
    return [
        *(replace(named[name], variables=named[name].variables | models) for name in ("ours", "gthread")),
        named["fastapi"],
    ]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {} if data is None else {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


@contextlib.contextmanager
def running(server: Server, *, workers: int = 1, pinned: bool = True) -> Iterator[Running]:
    """The server on one core, or on all, once it has answered right; ends it afterwards."""
    WORK.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{server.name}-", dir=WORK))
    port = free_port()
    command = server.command(Start(port, workers, folder))
    if pinned:
        command = ["taskset", "--cpu-list", str(SERVER_CPU), *command]
    keep = {key: os.environ[key] for key in ("PATH", "LANG", "HOME") if key in os.environ}
    variables = {"HOST": "127.0.0.1", "PORT": str(port), "WEB_CONCURRENCY": str(workers), "PYTHONPATH": str(PROJECT)}
    started = time.perf_counter()
    with (folder / "output.log").open("wb") as log:  # also where the access lines go
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=keep | variables | server.variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait(server, process, port, folder)
        ready = Running(server, process, port, folder, time.perf_counter() - started)
        _verify(server, port)
        yield ready
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(server: Server, process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if ask(port, "GET", server.health)[0] == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            output = (folder / "output.log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{server.name} does not start:\n{output}")
        time.sleep(POLL_SECONDS)


def _verify(server: Server, port: int) -> None:
    status, answer = ask(port, "POST", server.path, server.body)
    if status != 200 or (server.answer is not None and json.loads(answer) != server.answer):
        raise RuntimeError(f"{server.name} answers wrong: {status} {answer[:500]!r}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing of it is left behind
    process.wait()
