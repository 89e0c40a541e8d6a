"""What becomes of the log lines when their reader is slow, stops or has gone: the service serves on, no line breaks."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.service import Service, running, wait_for

LIMIT_SECONDS = 20
PIPE_BUF = 4_096
MAX_QUEUED_BYTES = 48 * 1_048_576


class Reader:
    """Reads a pipe when it is allowed to, in pieces of `size` bytes with a pause after each."""

    def __init__(self, fd: int, size: int = 65_536, pause_seconds: float = 0.0) -> None:
        self.may_read = threading.Event()
        self.received = b""
        self._fd = fd
        self._size = size
        self.pause_seconds = pause_seconds
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.may_read.wait()
        while data := os.read(self._fd, self._size):
            self.received += data
            time.sleep(self.pause_seconds)

    def said_dropped(self) -> int:
        """How many lines the log has said so far to be missing."""
        whole, _, _ = self.received.rpartition(b"\n")
        return sum(json.loads(line)["dropped"] for line in whole.splitlines() if b'"log lines dropped"' in line)

    def lines(self) -> list[dict[str, Any]]:
        """All that came, once the service has ended: each line must be one JSON object."""
        self._thread.join(LIMIT_SECONDS)
        assert not self._thread.is_alive()
        assert self.received.endswith(b"\n")
        return [json.loads(line) for line in self.received.decode("ascii").splitlines()]


@contextlib.contextmanager
def piped(folder: Path, reader_size: int = 65_536, pause_seconds: float = 0.0, **variables: str) -> Iterator[Any]:
    """A service whose stdout is a pipe, and its reader."""
    read_end, write_end = os.pipe()
    reader = Reader(read_end, reader_size, pause_seconds)
    try:
        with running(folder, stdout=write_end, **variables) as service:
            yield service, reader, write_end
            reader.pause_seconds = 0.0
            reader.may_read.set()
            service.terminate()
            os.close(write_end)
            write_end = -1
            reader.lines()
    finally:
        reader.may_read.set()
        if write_end >= 0:
            os.close(write_end)
        os.close(read_end)


def post_many(service: Service, count: int, path: str = "/predict") -> int:
    """So many requests over one connection; returns how many were answered 200."""
    body = b'{"text": "Hello"}'
    request = b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(body), body)
    answered = 0
    with service.connect() as client:
        for first in range(0, count, 100):
            batch = min(100, count - first)
            client.sendall(request * batch)
            received = b""
            while received.count(b'"predicted(Hello)"}') < batch:
                data = client.recv(65_536)
                assert data
                received += data
            answered += received.count(b"HTTP/1.1 200 ")
    return answered


def memory_bytes(pid: int) -> int:
    resident = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(resident) * os.sysconf("SC_PAGE_SIZE")


def test_an_unread_pipe_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    """Nobody reads stdout: every request is answered, memory is bounded, what is dropped is counted and logged."""
    requests = 20_000
    with piped(tmp_path) as (service, reader, write_end):
        post_many(service, 100)
        (worker,) = service.workers()
        before = memory_bytes(worker)
        assert post_many(service, requests) == requests
        assert service.get("/health").status == 200
        assert memory_bytes(worker) - before < MAX_QUEUED_BYTES
        assert os.get_blocking(write_end), "stdout is shared with others, who expect it to block"
        wait_for(lambda: service.metrics()["log_lines_dropped_total"] > 0, LIMIT_SECONDS)
        reader.may_read.set()
        # Its reader is back: so are the lines.
        wait_for(lambda: b'"log lines dropped"' in reader.received, LIMIT_SECONDS)
        assert service.post("/predict", {"text": "a"}, {"X-Request-ID": "the-last"}).status == 200
        wait_for(lambda: b'"the-last"' in reader.received, LIMIT_SECONDS)
        # The log and the metrics each say it a moment later.
        wait_for(lambda: service.metrics()["log_lines_dropped_total"] == reader.said_dropped(), LIMIT_SECONDS)
        dropped = service.metrics()["log_lines_dropped_total"]
    lines = reader.lines()
    assert sum(line["dropped"] for line in lines if line["message"] == "log lines dropped") == dropped
    access = [line for line in lines if line["logger"] == "inference_api.access" and line["path"] == "/predict"]
    assert len(access) + dropped >= requests + 101 > len(access)


def test_what_a_worker_could_not_write_before_it_ended_is_counted(tmp_path: Path) -> None:
    """Nobody reads stdout, and the worker is replaced: its lines that still wait are dropped, which the metric says."""
    requests = 3_000
    with piped(tmp_path) as (service, reader, _):
        (worker,) = service.workers()
        assert post_many(service, requests) == requests
        service.signal(signal.SIGHUP)
        wait_for(lambda: len(service.workers()) == 1 and worker not in service.workers(), LIMIT_SECONDS)
        dropped = service.metrics()["log_lines_dropped_total"]
        reader.may_read.set()
    lines = reader.lines()
    found = [line for line in lines if line.get("path") == "/predict"]
    assert requests <= len(found) + dropped <= requests + len(lines)  # others may be among the dropped, too
    assert len(found) < requests


def test_a_slow_pipe_shared_by_four_workers_breaks_no_line(tmp_path: Path) -> None:
    """Four workers write long lines into a full pipe that is read in small pieces: each line comes out whole."""
    path = "/" + "é%22" * 120  # as long as it may be in a line, and longer still when quoted
    with piped(tmp_path, reader_size=5_000, pause_seconds=0.002, WEB_CONCURRENCY="4") as (service, reader, _):
        reader.may_read.set()
        quoted = path.replace("é", "%C3%A9").encode()
        request = b"GET " + quoted + b" HTTP/1.1\r\nHost: h\r\nX-Request-ID: " + b"r" * 64 + b"\r\n\r\n"

        def get_many() -> None:
            with service.connect() as client:
                for _ in range(5):
                    client.sendall(request * 20)
                    received = b""
                    while received.count(b"HTTP/1.1 404 ") < 20:
                        received += client.recv(65_536)

        threads = [threading.Thread(target=get_many) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert service.get("/health").status == 200
    lines = reader.lines()
    dropped = sum(line.get("dropped", 0) for line in lines)
    found = [line for line in lines if line.get("request_id") == "r" * 64]
    assert len(found) + dropped >= 1_600
    assert len({line["path"] for line in found}) == 1
    assert max(map(len, reader.received.splitlines())) < PIPE_BUF


def test_a_method_of_any_length_leaves_one_short_line(tmp_path: Path) -> None:
    """A request line full of method is logged, cut, and the lines after it come as well."""
    with piped(tmp_path) as (service, reader, _):
        reader.may_read.set()
        head = b"A" * 4_070 + b" / HTTP/1.1\r\nHost: h\r\nX-Request-ID: long\r\nConnection: close\r\n\r\n"
        assert service.raw(head).startswith(b"HTTP/1.1 4")
        assert service.post("/predict", {"text": "a"}, {"X-Request-ID": "next"}).status == 200
        wait_for(lambda: b'"next"' in reader.received, LIMIT_SECONDS)
    (line,) = [line for line in reader.lines() if line.get("request_id") == "long"]
    assert line["method"] == "A" * 32


def test_a_reader_that_has_gone_does_not_matter(tmp_path: Path) -> None:
    """The other end of stdout is closed: the service serves on, and ends as usual."""
    read_end, write_end = os.pipe()
    with running(tmp_path, stdout=write_end) as service:
        os.close(write_end)
        os.close(read_end)
        assert post_many(service, 300) == 300
        wait_for(lambda: service.metrics()["log_lines_dropped_total"] >= 300, LIMIT_SECONDS)
        assert service.get("/health").status == 200
        assert service.terminate() == 0


def test_a_full_disk_does_not_matter(tmp_path: Path) -> None:
    """Every write to stdout fails for want of space: the service serves on and counts what is lost."""
    with Path("/dev/full").open("wb", buffering=0) as full, running(tmp_path, stdout=full.fileno()) as service:
        assert post_many(service, 300) == 300
        wait_for(lambda: service.metrics()["log_lines_dropped_total"] >= 300, LIMIT_SECONDS)
        assert service.terminate() == 0


@pytest.mark.parametrize("redirections", [">&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_do_not_matter(tmp_path: Path, redirections: str) -> None:
    """Started without them, the service serves, and no other file takes their place."""
    command = (
        "-c",
        f"import os; os.execv('/bin/sh', ['sh', '-c', 'exec {sys.executable} -m inference_api {redirections}'])",
    )
    with running(tmp_path, command=command) as service:
        assert post_many(service, 300) == 300
        for pid in (service.process.pid, *service.workers()):
            targets = {Path(f"/proc/{pid}/fd/{fd}").resolve() for fd in (0, 1)}
            assert targets <= {Path("/dev/null"), tmp_path / "stderr"}
        assert service.terminate() == 0


def test_what_a_model_prints_stands_apart(tmp_path: Path) -> None:
    """Python's, C's and a child's output to stdout goes to stderr: stdout holds JSON lines alone."""
    models = """
import os, subprocess
class Talking:
    name, version = "talking", "1"
    def predict(self, text: str) -> str:
        print("printed", text)
        os.write(1, b"written")
        subprocess.run(["echo", "echoed"], check=True)
        return text
"""
    with running(tmp_path, models, MODELS="talk=models:Talking") as service:
        assert service.post("/talk", {"text": "a"}).status == 200
        wait_for(lambda: len(service.access_lines()) >= 2, LIMIT_SECONDS)
    assert all(word in service.stderr for word in ("printed a", "written", "echoed"))
    assert service.log()
