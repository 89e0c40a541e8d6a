"""The service as a process on a free port, and what live tests need to talk to it. Imports nothing of the package."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2]
START_SECONDS = 60
WAIT_SECONDS = 30
STOP_SECONDS = 60
HEALTHY = b'{"status":"healthy"}'


@dataclass(frozen=True)
class Answer:
    """One answer as it came over the socket."""

    status: int
    headers: dict[str, str]  # by lower-case name
    body: bytes
    version: str = "HTTP/1.1"

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Service:
    """The service in a folder of its own: `models.py` in it holds `models`, `stdout` and `stderr` what it writes."""

    def __init__(
        self,
        folder: Path,
        models: str = "",
        *,
        command: Sequence[str] = ("-m", "inference_api"),
        python: str | Path = sys.executable,
        stdout: int | None = None,
        **variables: str,
    ) -> None:
        folder.mkdir(exist_ok=True)
        if models:
            (folder / "models.py").write_text(models)
        self.folder = folder
        self.port = free_port()
        keep = {key: os.environ[key] for key in ("PATH", "LANG", "HOME") if key in os.environ}
        defaults = {"HOST": "127.0.0.1", "PORT": str(self.port), "WEB_CONCURRENCY": "1"}
        python_path = os.pathsep.join((str(folder), str(PROJECT)))
        self.variables = {**defaults, **variables}
        self.port = int(self.variables["PORT"])
        with (folder / "stdout").open("ab") as out, (folder / "stderr").open("ab") as err:
            self.process = subprocess.Popen(
                [python, *command],
                cwd=folder,
                env={**keep, "PYTHONPATH": python_path, **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=out if stdout is None else stdout,
                stderr=err,
            )

    def wait_until_ready(self) -> None:
        """Every worker is there, and /health says so."""
        workers = int(self.variables["WEB_CONCURRENCY"])

        def is_ready() -> bool:
            assert self.process.poll() is None, self.output
            with contextlib.suppress(OSError, http.client.HTTPException):
                return len(self.workers()) == workers and self.get("/health").status == 200
            return False

        wait_for(is_ready, START_SECONDS, lambda: self.output)

    def terminate(self, seconds: float = STOP_SECONDS) -> int:
        """Shut it down by SIGTERM; returns its exit code."""
        self.process.terminate()
        return self.process.wait(seconds)

    def kill(self) -> None:
        """Leave nothing of it behind."""
        with contextlib.suppress(OSError):
            for worker in self.workers():
                os.kill(worker, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def workers(self) -> list[int]:
        """The process ids of the workers."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        seconds: float = WAIT_SECONDS,
    ) -> Answer:
        """One request on a connection of its own; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        with contextlib.closing(connection):
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            named = {} if data is None else {"Content-Type": "application/json"}
            connection.request(method, path, data, named | (headers or {}))
            response = connection.getresponse()
            fields = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, fields, response.read())

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
        return self.request("POST", path, body, headers)

    def connect(self, seconds: float = WAIT_SECONDS) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), seconds)

    def raw(self, data: bytes, *, half_close: bool = False) -> bytes:
        """Send bytes on a new connection; returns all that comes until the server closes."""
        with self.connect() as client:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(data)
                if half_close:
                    client.shutdown(socket.SHUT_WR)
            return read_to_end(client)

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def output(self) -> str:
        """For the message of an assertion that failed."""
        return f"{self.stdout[-4000:]}\n{self.stderr[-4000:]}"

    def lines(self) -> list[str]:
        """The whole lines written to stdout so far, which must be ASCII: the next may be there in part."""
        whole, _, _ = (self.folder / "stdout").read_bytes().decode("ascii").rpartition("\n")
        return whole.splitlines()

    def log(self) -> list[dict[str, Any]]:
        """The lines written to stdout so far, each of which must be one JSON object."""
        lines = [json.loads(line) for line in self.lines()]
        assert all(isinstance(line, dict) for line in lines)
        return lines

    def access_lines(self) -> list[dict[str, Any]]:
        return [line for line in self.log() if line["logger"] == "inference_api.access"]

    def settled_log(self) -> list[dict[str, Any]]:
        """The lines of all that has been before: a worker's are in order, and here is but one, which is healthy."""
        last = f"last-{time.monotonic_ns()}"
        assert self.request("GET", "/health", headers={"X-Request-ID": last}).body == HEALTHY

        def ends() -> list[int]:
            return [at for at, line in enumerate(self.log()) if line.get("request_id") == last]

        wait_for(lambda: bool(ends()), WAIT_SECONDS, lambda: self.output)
        return self.log()[: ends()[0]]

    def metrics(self) -> dict[str, float]:
        """One scrape: name and labels → value, without the common prefix of the names."""
        answer = self.get("/metrics")
        assert answer.status == 200
        lines = [line for line in answer.body.decode().splitlines() if not line.startswith("#")]
        return {
            name.removeprefix("inference_api_"): float(value) for name, value in (ln.rsplit(" ", 1) for ln in lines)
        }

    def wait_for_metric(self, name: str, expected: float) -> None:
        """The gauges are published ten times a second, and an answer is counted just after it is sent."""
        wait_for(
            lambda: self.metrics().get(name, 0) == expected, WAIT_SECONDS, lambda: (name, expected, self.metrics())
        )


@contextlib.contextmanager
def running(folder: Path, models: str = "", **options: Any) -> Iterator[Service]:
    """A service that is ready; at the end it is shut down, and must end in time."""
    service = Service(folder, models, **options)
    try:
        service.wait_until_ready()
        yield service
        if service.process.poll() is None:
            service.terminate()
    finally:
        service.kill()


def post_request(path: str, body: bytes, *fields: bytes) -> bytes:
    """The bytes of a POST, with these further header fields."""
    lines = [b"POST %b HTTP/1.1" % path.encode(), b"Host: h", b"Content-Length: %d" % len(body), *fields]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def wait_for(condition: Callable[[], bool], seconds: float, describe: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.02)


def memory(pid: int) -> dict[str, int]:
    """A process's memory in bytes, by the names of smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in lines)}


def read_to_end(client: socket.socket) -> bytes:
    """All that comes until the server closes; a reset counts as its close."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(65_536):
            received += data
    return received


def answers(received: bytes, *methods: str) -> list[Answer]:
    """Cut what was received into answers, to requests with these methods (GET where not given); nothing may be left."""
    found: list[Answer] = []
    while received:
        method = methods[len(found)] if len(found) < len(methods) else "GET"
        answer, received = next_answer(received, method)
        if answer.status != 100:
            found.append(answer)
    return found


def next_answer(received: bytes, method: str = "GET") -> tuple[Answer, bytes]:
    """The first answer in what was received, which must be whole, and the rest."""
    received = received.replace(b"\r\n\n<html>", b"\r\n\r\n<html>", 1)  # Gunicorn's own page, on Python 3.14
    head, end, rest = received.partition(b"\r\n\r\n")
    assert end, received
    status_line, *lines = head.decode("latin-1").split("\r\n")
    version, status, _ = status_line.split(" ", 2)
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(": ")
        assert colon and name.lower() not in headers, head
        headers[name.lower()] = value
    if method == "HEAD" or status in ("100", "204", "304"):
        body = b""
    elif headers.get("transfer-encoding") == "chunked":
        body, rest = _chunked(rest)
    elif "content-length" in headers:
        length = int(headers["content-length"])
        assert len(rest) >= length, received
        body, rest = rest[:length], rest[length:]
    else:
        assert headers.get("connection") == "close", head
        body, rest = rest, b""
    return Answer(int(status), headers, body, version), rest


def _chunked(data: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size_line, end, data = data.partition(b"\r\n")
        assert end, data
        size = int(size_line, 16)
        chunk, crlf, data = data[:size], data[size : size + 2], data[size + 2 :]
        assert len(chunk) == size and crlf == b"\r\n"
        if not size:
            return body, data
        body += chunk


def has_no_live_child(worker: int) -> bool:
    """Whether all processes that this worker has forked have ended, reaped or not."""
    children = Path(f"/proc/{worker}/task").glob("*/children")
    pids = [pid for file in children for pid in file.read_text().split()]
    return all(map(has_ended, pids))


def has_ended(pid: int | str) -> bool:
    """Whether this process has, though nobody has asked for its exit code yet."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def is_problem(answer: Answer, status: int) -> bool:
    """Whether it is a whole problem+json (RFC 9457) of this status that tells nothing of the server's inside."""
    problem = answer.json
    return (
        answer.status == problem["status"] == status
        and answer.headers["content-type"] == "application/problem+json"
        and {"type", "title", "status", "detail", "request_id"} <= set(problem)
        and b"Traceback" not in answer.body
    )


def needed(program: str, package: str) -> str:
    """The path of a program that CI has; elsewhere the test that needs it is skipped."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        words = f"{program} is not installed (Debian's package {package})"
        if "CI" in os.environ:
            pytest.fail(words)
        pytest.skip(words)
    return path
