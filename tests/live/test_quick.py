"""Requests that are quick are run by the thread that owns the sockets: one that is not, for once, must harm nobody."""

import contextlib
import http.client
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.service import WAIT_SECONDS, Answer, Service, has_no_live_child, is_problem, running, wait_for

MODEL = """
import os, pathlib, time

class Mostly:
    name, version = "mostly", "1.0.0"
    def predict(self, text: str) -> str:
        if text == "fork":
            os.fork()
        elif text == "pause":
            time.sleep(0.003)
        elif text:
            pathlib.Path(text + ".began").touch()
            while not pathlib.Path(text).exists():
                time.sleep(0.01)
        return text

class Never(Mostly):
    def predict(self, text: str) -> str:
        time.sleep(0.01)
        return text
"""
MODELS = "mostly=models:Mostly,never=models:Never"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("quick")
    with running(folder, MODEL, MODELS=MODELS, THREADS="2", REQUEST_TIMEOUT="4") as service:
        yield service


def warm(service: Service) -> None:
    """Send until the service knows the model to be quick, and acts on it."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=WAIT_SECONDS)
    ends = time.monotonic() + 1
    while time.monotonic() < ends:
        connection.request("POST", "/mostly", b'{"text": ""}', {"Content-Type": "application/json"})
        assert connection.getresponse().read() == b'{"input":"","prediction":""}'
    connection.close()


def blocked(service: Service, path: Path) -> tuple[threading.Thread, list[Answer]]:
    """A request that is not answered before `path` exists, and that has been begun."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(service.post("/mostly", {"text": str(path)})))
    thread.start()
    wait_for(Path(f"{path}.began").exists, WAIT_SECONDS)
    return thread, answers


def seconds_behind(service: Service, ahead: list[str], stopped_seconds: float) -> float:
    """How long a request that needs a thread waits for its answer where these came just before it."""
    (worker,) = service.workers()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(service.connect()) for _ in (*ahead, "")]
        for client in clients:  # so that they have been let in
            client.sendall(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
            assert client.recv(65_536).startswith(b"HTTP/1.1 200")
        os.kill(worker, signal.SIGSTOP)  # they come at once
        for client, text in zip(clients, [*ahead, ""], strict=True):
            path, body = "never" if client is clients[-1] else "mostly", json.dumps({"text": text})
            client.sendall(f"POST /{path} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        time.sleep(stopped_seconds)
        os.kill(worker, signal.SIGCONT)
        started = time.monotonic()
        assert clients[-1].recv(65_536).startswith(b"HTTP/1.1 200")
        return time.monotonic() - started


def test_durations_are_known(service: Service) -> None:
    """Also of a request that began and ended while the same thread looked away from its sockets."""
    before = len(service.access_lines())
    warm(service)
    wait_for(lambda: len(service.access_lines()) > before + 10, WAIT_SECONDS)
    for line in service.access_lines()[before:]:
        assert line["duration_ms"] > line["queue_ms"] >= 0


def test_what_waits_behind_quick_ones_is_begun_at_once(service: Service) -> None:
    """Threads are woken for it although the turn of the quick ones has taken long."""
    assert service.post("/never", {"text": ""}).status == 200
    delays = []
    for _ in range(5):
        warm(service)
        delays.append(seconds_behind(service, ["pause", "pause"], 0.15))
    assert statistics.median(delays) < 0.05, delays


def test_what_waits_behind_one_that_is_not_quick_is_begun_at_once(service: Service) -> None:
    """Threads are woken for it as soon as another thread looks after the sockets."""
    assert service.post("/never", {"text": ""}).status == 200
    delays = []
    for turn in range(7):
        warm(service)
        path = service.folder / f"ahead{turn}"
        delays.append(seconds_behind(service, [str(path)], 0.01))
        path.touch()
    assert statistics.median(delays) < 0.04, delays


def test_many_that_never_end_are_not_borne_for_ever(tmp_path: Path) -> None:
    """As many of them as there are threads: the worker is replaced, whoever runs them."""
    variables = {"THREADS": "2", "REQUEST_TIMEOUT": "1", "TIMEOUT": "3", "GRACEFUL_TIMEOUT": "5"}
    with running(tmp_path, MODEL, MODELS="mostly=models:Mostly", **variables) as service:
        workers = service.workers()
        for turn in range(2):
            warm(service)
            thread, answers = blocked(service, tmp_path / f"never{turn}")
            thread.join(WAIT_SECONDS)
            assert is_problem(answers[0], 504)
        wait_for(lambda: len(service.workers()) == 1 and service.workers() != workers, WAIT_SECONDS)
        assert "all threads are stuck" in [line["message"] for line in service.log()]
        assert service.post("/mostly", {"text": ""}).status == 200


def test_one_that_takes_its_time_holds_nobody_up(service: Service) -> None:
    """While it runs, health and predictions are answered; then it gets its own answer, each time anew."""
    for turn in range(5):
        warm(service)
        path = service.folder / f"go{turn}"
        thread, answers = blocked(service, path)
        assert service.get("/health").status == 200
        for _ in range(50):
            assert service.post("/mostly", {"text": ""}).status == 200
        assert not answers
        path.touch()
        thread.join(WAIT_SECONDS)
        assert [answer.json["prediction"] for answer in answers] == [str(path)]


def test_one_that_never_ends_gets_504_and_costs_one_thread(service: Service) -> None:
    """Its client is answered at the deadline, the others before, and no thread more than one is lost."""
    warm(service)
    threads = len(list(Path(f"/proc/{service.workers()[0]}/task").iterdir()))
    path = service.folder / "never"
    thread, answers = blocked(service, path)
    for _ in range(50):
        assert service.post("/mostly", {"text": ""}).status == 200
    thread.join(WAIT_SECONDS)
    assert is_problem(answers[0], 504)
    assert service.get("/health").status == 200
    assert len(list(Path(f"/proc/{service.workers()[0]}/task").iterdir())) <= threads + 1
    path.touch()


def test_a_child_that_a_model_forks_serves_nobody(service: Service) -> None:
    """Where a model forks and goes on in both, there is one answer, and the child ends."""
    for _ in range(3):
        warm(service)
        assert service.post("/mostly", {"text": "fork"}).json == {"input": "fork", "prediction": "fork"}
    worker = service.workers()[0]
    assert service.post("/mostly", {"text": ""}).status == 200

    wait_for(lambda: has_no_live_child(worker), WAIT_SECONDS)
    assert service.workers() == [worker]
