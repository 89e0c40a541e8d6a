"""The end of the service, of a worker, and of the master: in time, and with nothing lost that was let in."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.service import Service, answers, is_problem, post_request, read_to_end, running, wait_for

LIMIT_SECONDS = 30
SLACK_SECONDS = 3.0
"""Generous, for machines that are busy with other things."""
MODELS = """
import pathlib, time

class Waiting:
    name, version = "waiting", "1"
    def predict(self, name: str) -> str:
        with open("calls", "a") as calls:
            calls.write(name + "\\n")
        while not pathlib.Path(name).exists():
            time.sleep(0.01)
        return name

class Slow:
    name, version = "slow", "1"
    def predict(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds
"""
VARIABLES = {
    "MODELS": "predict=inference_api.model:DummyModel,wait=models:Waiting,slow=models:Slow",
    "REQUEST_TIMEOUT": "2",
    "GRACEFUL_TIMEOUT": "3",
    "WEB_CONCURRENCY": "2",
}


def wait_for_call(service: Service, name: str, count: int = 1) -> None:
    path = service.folder / "calls"
    wait_for(lambda: path.exists() and path.read_text().splitlines().count(name) == count, LIMIT_SECONDS)


def messages(service: Service) -> list[str]:
    return [line["message"] for line in service.log()]


class Load:
    """16 clients that keep their connection and 16 that open one for each request, sending all the time.

    A request counts as lost if it was sent on a connection that the service had let in and there was no answer, or a
    5xx. A connection that is refused, or that a kept-alive connection's close met, is not: a client tries again.
    """

    def __init__(self, service: Service) -> None:
        self.outcomes: Counter[str] = Counter()
        self._service = service
        self._ended = threading.Event()
        kinds = [self._keep_alive] * 16 + [self._anew] * 16
        self._threads = [threading.Thread(target=self._run, args=(kind,)) for kind in kinds]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(LIMIT_SECONDS)
            assert not thread.is_alive()

    @property
    def lost(self) -> dict[str, int]:
        return {outcome: count for outcome, count in self.outcomes.items() if outcome not in ("200", "refused")}

    def _run(self, kind: object) -> None:
        while not self._ended.is_set():
            try:
                client = self._service.connect(LIMIT_SECONDS)
            except OSError:
                self.outcomes["refused"] += 1
                return
            with client:
                kind(client)  # type: ignore[operator]

    def _anew(self, client: socket.socket) -> None:
        self._request(client, b"Connection: close")

    def _keep_alive(self, client: socket.socket) -> None:
        while not self._ended.is_set() and self._request(client):
            pass

    def _request(self, client: socket.socket, *fields: bytes) -> bool:
        """Returns whether the connection stays open."""
        received = b""
        try:
            client.sendall(post_request("/predict", b'{"text": "a"}', *fields))
            while not received.endswith(b'"predicted(a)"}'):
                data = client.recv(65_536)
                if not data:
                    break
                received += data
        except OSError as exc:
            self.outcomes[f"{exc!r} after {received!r}"] += 1
            return False
        for answer in answers(received):
            self.outcomes[str(answer.status)] += 1
            if answer.headers.get("connection") == "close":
                return False
        if not received:
            self.outcomes["closed without an answer"] += 1
        return bool(received)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_shutdown_under_load_loses_nothing(tmp_path: Path, workers: str) -> None:
    """SIGTERM without a balancer: whoever was let in, or stood in the backlog, is answered; exit code 0."""
    with running(tmp_path, MODELS, **VARIABLES | {"WEB_CONCURRENCY": workers}) as service, Load(service) as load:
        wait_for(lambda: load.outcomes["200"] > 500, LIMIT_SECONDS)
        assert service.terminate(LIMIT_SECONDS) == 0
        load.stop()
        assert load.lost == {}
        assert load.outcomes["200"] == sum(
            line["status"] == 200 and line["path"] == "/predict" for line in service.access_lines()
        )


def test_a_lame_duck_serves_on(tmp_path: Path) -> None:
    """For DRAIN_SECONDS after SIGTERM new connections are served, /health says 503, and every answer closes."""
    with running(tmp_path, MODELS, **VARIABLES, DRAIN_SECONDS="3") as service:
        kept = service.connect()
        kept.sendall(post_request("/predict", b'{"text": "a"}'))
        assert b"Connection: close" not in kept.recv(65_536)
        service.signal(signal.SIGTERM)
        started = time.monotonic()
        wait_for(lambda: service.get("/health").json == {"status": "draining"}, LIMIT_SECONDS)
        assert service.get("/health").status == 503
        assert service.get("/health/live").status == 200
        answer = service.post("/predict", {"text": "a"})
        assert answer.status == 200
        assert answer.headers["connection"] == "close"
        with contextlib.closing(kept):
            kept.sendall(post_request("/predict", b'{"text": "a"}'))
            (answer,) = answers(read_to_end(kept))
        assert answer.status == 200
        assert answer.headers["connection"] == "close"
        assert service.process.wait(LIMIT_SECONDS) == 0
        assert time.monotonic() - started >= 3


def test_a_lame_duck_does_not_leave_for_its_requests(tmp_path: Path) -> None:
    """More than MAX_REQUESTS of them while it drains: it serves on, and says nothing of leaving."""
    with running(tmp_path, MODELS, **VARIABLES, DRAIN_SECONDS="2", MAX_REQUESTS="40") as service:
        service.signal(signal.SIGTERM)
        wait_for(lambda: "draining" in messages(service), LIMIT_SECONDS)
        for _ in range(200):
            assert service.post("/predict", {"text": "a"}).status == 200
        assert service.process.wait(LIMIT_SECONDS) == 0
    assert not [message for message in messages(service) if "MAX_REQUESTS" in message]


def test_a_request_that_cannot_end_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """A thread is stuck: its client gets 504, the service exits within its drain and grace, saying what it lost."""
    variables = VARIABLES | {"REQUEST_TIMEOUT": "2.9", "DRAIN_SECONDS": "1", "WEB_CONCURRENCY": "1", "THREADS": "1"}
    with running(tmp_path, MODELS, **variables) as service:
        with service.connect() as stuck, service.connect() as late:
            stuck.sendall(post_request("/wait", b'{"name": "never"}'))
            wait_for_call(service, "never")
            service.signal(signal.SIGTERM)
            started = time.monotonic()
            wait_for(lambda: service.get("/health").status == 503, LIMIT_SECONDS)
            time.sleep(max(0.0, started + 1.3 - time.monotonic()))
            # In the grace period now: its deadline is after the end, and the only thread is stuck.
            late.sendall(post_request("/wait", b'{"name": "late"}'))
            (answer,) = answers(read_to_end(stuck))
            assert is_problem(answer, 504)
            assert all(is_problem(answer, 503) for answer in answers(read_to_end(late)))
        service.process.wait(LIMIT_SECONDS)
        assert time.monotonic() - started < 1 + 3 + 1 + SLACK_SECONDS


def test_what_is_lost_at_the_end_is_logged(tmp_path: Path) -> None:
    """The grace period is over and a client still waits: its connection is closed, and the log counts it."""
    variables = VARIABLES | {"REQUEST_TIMEOUT": "2.5", "DRAIN_SECONDS": "1", "WEB_CONCURRENCY": "1"}
    with running(tmp_path, MODELS, **variables) as service:
        service.signal(signal.SIGTERM)
        started = time.monotonic()
        wait_for(lambda: "draining" in messages(service), LIMIT_SECONDS)
        client = service.connect()
        # A request comes just before the grace period, which its body makes last longer than that.
        with client:
            client.sendall(post_request("/wait", b'{"name": "never"}')[:-2])
            time.sleep(max(0.0, started + 2.5 - time.monotonic()))
            client.sendall(b'"}')
            assert read_to_end(client) == b""
        service.process.wait(LIMIT_SECONDS)
        assert time.monotonic() - started < 1 + 3 + 1 + SLACK_SECONDS
        (line,) = [line for line in service.log() if line["message"] == "grace period over, requests lost"]
        assert line["lost"] == 1
        (access,) = [line for line in service.access_lines() if line["path"] == "/wait"]
        assert access["status"] == 499


def test_a_shutdown_right_after_a_reload(tmp_path: Path) -> None:
    """SIGHUP, then SIGTERM at once, with a request in the old worker: it is answered, and the exit in time."""
    with running(tmp_path, MODELS, **VARIABLES) as service, service.connect() as client:
        client.sendall(post_request("/wait", b'{"name": "go"}'))
        wait_for_call(service, "go")
        service.signal(signal.SIGHUP)
        service.signal(signal.SIGTERM)
        started = time.monotonic()
        time.sleep(0.5)
        (service.folder / "go").touch()
        (answer,) = answers(read_to_end(client))
        assert answer.status == 200
        assert service.process.wait(LIMIT_SECONDS) == 0
        assert time.monotonic() - started < 3 + 3 + SLACK_SECONDS


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGINT])
def test_a_quick_end(tmp_path: Path, number: int) -> None:
    """SIGQUIT and SIGINT end the service at once, whatever is in it."""
    with running(tmp_path, MODELS, **VARIABLES) as service, service.connect() as client:
        client.sendall(post_request("/wait", b'{"name": "never"}'))
        wait_for_call(service, "never")
        workers = service.workers()
        started = time.monotonic()
        service.signal(number)
        service.process.wait(LIMIT_SECONDS)
        assert time.monotonic() - started < SLACK_SECONDS
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@contextlib.contextmanager
def steady(service: Service) -> Iterator[Counter[int]]:
    """A client that sends one request after the other on new connections; yields the statuses it gets (0: none)."""
    statuses: Counter[int] = Counter()
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            try:
                statuses[service.post("/predict", {"text": "a"}).status] += 1
            except OSError:
                statuses[0] += 1

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield statuses
    finally:
        ended.set()
        thread.join(LIMIT_SECONDS)


def test_a_killed_worker_is_replaced_at_once(tmp_path: Path) -> None:
    """SIGKILL of a worker costs what was in it; the other serves meanwhile, and a new one soon does."""
    with running(tmp_path, MODELS, **VARIABLES) as service, service.connect() as client:
        client.sendall(post_request("/wait", b'{"name": "held"}'))
        wait_for_call(service, "held")
        before = service.workers()
        with steady(service) as statuses:
            wait_for(lambda: statuses[200] > 20, LIMIT_SECONDS)
            started = time.monotonic()
            os.kill(before[0], signal.SIGKILL)
            wait_for(lambda: service.metrics()["workers"] == 2 and before[0] not in service.workers(), LIMIT_SECONDS)
            assert time.monotonic() - started < 1 + SLACK_SECONDS
            count = statuses[200]
            wait_for(lambda: statuses[200] > count + 20, LIMIT_SECONDS)
        # What stood in the dead worker: at most the one request that was there, of the one client.
        assert statuses.total() - statuses[200] <= 1
        (service.folder / "held").touch()


def test_workers_do_not_outlive_their_master(tmp_path: Path) -> None:
    """The master is killed: its workers finish what they have, let nobody in any more, and leave by themselves."""
    with running(tmp_path, MODELS, **VARIABLES) as service, service.connect() as client:
        client.sendall(post_request("/wait", b'{"name": "go"}'))
        wait_for_call(service, "go")
        workers = service.workers()
        service.signal(signal.SIGKILL)
        service.process.wait(LIMIT_SECONDS)
        time.sleep(0.5)
        (service.folder / "go").touch()
        (answer,) = answers(read_to_end(client))
        assert answer.status == 200
        wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), LIMIT_SECONDS)
        with pytest.raises(ConnectionRefusedError):
            service.connect()
        assert messages(service).count("the master has gone") == len(workers)


def test_a_shutdown_with_all_connections_busy(tmp_path: Path) -> None:
    """MAX_CONNECTIONS are busy and others wait in the backlog when SIGTERM comes: all of them are answered."""
    variables = VARIABLES | {"MAX_CONNECTIONS": "4", "THREADS": "4", "WEB_CONCURRENCY": "1"}
    with running(tmp_path, MODELS, **variables) as service, contextlib.ExitStack() as stack:
        many = []
        for _ in range(10):
            many.append(stack.enter_context(service.connect()))
            many[-1].sendall(post_request("/wait", b'{"name": "go"}'))
        wait_for_call(service, "go", 4)
        service.signal(signal.SIGTERM)
        wait_for(lambda: "draining" in messages(service), LIMIT_SECONDS)
        time.sleep(0.7)  # more than the listener waits for those who knock last
        (service.folder / "go").touch()
        assert [answer.status for client in many for answer in answers(read_to_end(client))] == [200] * 10
        assert service.process.wait(LIMIT_SECONDS) == 0
