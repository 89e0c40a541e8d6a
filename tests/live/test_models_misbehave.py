"""Models that hang, crash, or meddle with the process: what they cost is bounded, and others are served."""

import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.live.service import (
    Answer,
    Service,
    answers,
    has_ended,
    is_problem,
    next_answer,
    post_request,
    read_to_end,
    running,
    wait_for,
)

REQUEST_TIMEOUT = 1
TIMEOUT = 3
LIMIT_SECONDS = 30
SLACK_SECONDS = 5.0
"""Generous, for machines that are busy with other things."""
MODELS = """
import locale, os, pathlib, signal, sys, time

class Unruly:
    name, version = "unruly", "1"

    def predict(self, does: str, until: str = "") -> str:
        with open("calls", "a") as calls:
            calls.write(does + "\\n")
        match does:
            case "hang":
                while not pathlib.Path(until).exists():
                    time.sleep(0.01)
            case "abort":
                os.abort()
            case "be killed":
                os.kill(os.getpid(), 9)
            case "end with 3" | "end with 4":  # as Gunicorn's workers do that cannot serve
                os._exit(int(does[-1]))
            case "exit":
                sys.exit(3)
            case "interrupt":
                raise KeyboardInterrupt
            case "run out of memory":
                raise MemoryError
            case "recurse":
                return self.predict(does)
            case "fork":
                pid = os.fork()
                if not pid:
                    os._exit(0)
                os.waitpid(pid, 0)
            case "print":
                print("printed" * 10_000)
            case "set locale":
                for name in ("C", "C.UTF-8"):
                    locale.setlocale(locale.LC_ALL, name)
            case "handle signals":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            case "change folder":
                os.chdir("/")
        return str(os.getpid())

class Meddling(Unruly):
    def load(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGQUIT, signal.SIGABRT):
            signal.signal(number, signal.SIG_IGN)
        locale.setlocale(locale.LC_ALL, "C.UTF-8")
        os.chdir("/")
        os.environ["API_KEYS"] = "the-model-s-own"
        print("loading")
"""
VARIABLES = {
    "MODELS": "predict=inference_api.model:DummyModel,unruly=models:Unruly",
    "REQUEST_TIMEOUT": str(REQUEST_TIMEOUT),
    "TIMEOUT": str(TIMEOUT),
    "GRACEFUL_TIMEOUT": "5",
    "THREADS": "2",
    "WEB_CONCURRENCY": "2",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("unruly"), MODELS, **VARIABLES) as service:
        yield service


class Client:
    """One kept-alive connection, and the worker at its other end."""

    def __init__(self, service: Service) -> None:
        self._sock = service.connect()
        self.worker = int(self.ask("say").json["prediction"])

    def send(self, does: str, until: str = "") -> None:
        body = f'{{"does": "{does}", "until": "{until}"}}'.encode()
        self._sock.sendall(b"POST /unruly HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    def get(self, path: str) -> Answer:
        self._sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        return self.answer()

    def answer(self) -> Answer:
        received = b""
        while True:
            data = self._sock.recv(65_536)
            assert data, "closed without an answer"
            received += data
            with contextlib.suppress(AssertionError, StopIteration):
                answer, rest = next_answer(received)
                assert rest == b""
                return answer

    def ask(self, does: str, until: str = "") -> Answer:
        self.send(does, until)
        return self.answer()

    def end(self) -> list[Answer]:
        return answers(read_to_end(self._sock))

    def close(self) -> None:
        self._sock.close()

    def reset(self) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()


@contextlib.contextmanager
def clients_of_both(service: Service, count: int) -> Iterator[tuple[list[Client], list[Client]]]:
    """So many connections to each of two workers."""
    found: dict[int, list[Client]] = {}
    extra: list[Client] = []
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while sorted(map(len, found.values())) != [count, count]:
            assert time.monotonic() < deadline
            client = Client(service)
            mine = found.setdefault(client.worker, [])
            (mine if len(mine) < count else extra).append(client)
        ones, others = found.values()
        yield ones, others
    finally:
        for client in (*(c for cs in found.values() for c in cs), *extra):
            client.close()


def test_a_prediction_past_its_deadline_is_answered_504(service: Service) -> None:
    """The answer comes at the deadline; the other thread works on; the stuck one is accounted for until it returns."""
    client = Client(service)
    started = time.monotonic()
    answer = client.ask("hang", "released")
    assert REQUEST_TIMEOUT <= time.monotonic() - started < REQUEST_TIMEOUT + SLACK_SECONDS
    assert is_problem(answer, 504)
    assert client.worker == int(client.ask("say").json["prediction"])
    service.wait_for_metric("threads_stuck", 1)
    assert client.get("/health").json == {"status": "healthy"}
    (service.folder / "released").touch()
    service.wait_for_metric("threads_stuck", 0)
    client.close()
    request_id = answer.json["request_id"]

    def statuses() -> list[int]:
        return [line["status"] for line in service.access_lines() if line["request_id"] == request_id]

    wait_for(lambda: bool(statuses()), LIMIT_SECONDS)
    assert statuses() == [504]
    assert service.metrics()["requests_timed_out_total"] == 1


def test_a_request_whose_deadline_passes_while_it_waits_is_not_run(service: Service) -> None:
    """Both threads are busy until after its deadline: the model is not called for it."""
    with clients_of_both(service, 3) as ((first, second, third), _):
        first.send("hang", "later")
        second.send("hang", "later")
        third.send("never")
        assert {first.answer().status, second.answer().status} == {504}
        assert third.answer().status in (503, 504)
        (service.folder / "later").touch()
        service.wait_for_metric("threads_stuck", 0)
        assert third.ask("say").status == 200
    assert "never" not in (service.folder / "calls").read_text().splitlines()


FICKLE = """
import pathlib, time

class Fickle:
    name, version = "fickle", "1"

    def predict(self, does: str) -> str:
        while does == "hang" and not pathlib.Path("end").exists():
            time.sleep(0.01)
        return does
"""


def test_a_model_that_is_suddenly_slow_gets_no_more_threads_than_it_may(tmp_path: Path) -> None:
    """After many quick predictions one hangs: with one thread it is the only one that runs, and the next one waits."""
    options = {"MODELS": "predict=models:Fickle", "THREADS": "1", "WEB_CONCURRENCY": "1", "REQUEST_TIMEOUT": "20"}
    with running(tmp_path, FICKLE, **options) as service:
        slow, quick = service.connect(), service.connect()
        for _ in range(200):
            quick.sendall(post_request("/predict", b'{"does": "say"}'))
            assert next_answer(quick.recv(65_536))[0].status == 200
        slow.sendall(post_request("/predict", b'{"does": "hang"}'))
        service.wait_for_metric("requests_in_flight", 1)
        quick.sendall(post_request("/predict", b'{"does": "say"}'))
        service.wait_for_metric("requests_pending", 1)
        assert service.metrics()["requests_in_flight"] == 1
        (service.folder / "end").touch()
        for sock in (slow, quick):
            assert next_answer(sock.recv(65_536))[0].status == 200
            sock.close()


def test_a_worker_that_is_stuck_is_replaced(service: Service) -> None:
    """All of its threads hang: it says so, lets nobody in, and is replaced in time; the other serves on."""
    workers = set(service.workers())
    with clients_of_both(service, 3) as ((first, second, third), (other, *_)):
        started = time.monotonic()
        first.send("hang", "never")
        second.send("hang", "never")
        assert {first.answer().status, second.answer().status} == {504}
        wait_for(lambda: third.get("/health").json == {"status": "stuck"}, LIMIT_SECONDS)
        assert third.get("/health/live").json == {"status": "alive"}
        refused = third.ask("say")
        assert is_problem(refused, 503)
        assert int(refused.headers["retry-after"]) >= 1
        while third.worker in service.workers():
            assert other.ask("say").status == 200
            assert service.get("/health").status == 200
            time.sleep(0.05)
        assert time.monotonic() - started < REQUEST_TIMEOUT + TIMEOUT + 2 + SLACK_SECONDS
        wait_for(lambda: len(service.workers()) == 2, LIMIT_SECONDS)
        assert set(service.workers()) & workers == {other.worker}


def test_a_worker_is_stuck_even_if_its_clients_have_left(service: Service) -> None:
    """All of its threads hang for clients that reset their connections before the deadline: it is replaced, too."""
    with clients_of_both(service, 3) as ((first, second, third), _):
        for client in (first, second):
            client.send("hang", "never again")
        service.wait_for_metric("requests_in_flight", 2)
        first.reset()
        second.reset()
        wait_for(lambda: third.get("/health").json == {"status": "stuck"}, LIMIT_SECONDS)
        wait_for(partial(is_replaced, service, third.worker), LIMIT_SECONDS)


@pytest.mark.parametrize("does", ["abort", "be killed"])
def test_a_crash_costs_what_was_in_the_worker(service: Service, does: str) -> None:
    """The process dies under the model: what was in it is lost, nothing else, and a new worker serves."""
    until = f"after {does}"
    with clients_of_both(service, 2) as ((crashing, beside), (other, *_)):
        beside.send("hang", until)
        other.send("hang", until)
        crashing.send(does)
        assert crashing.end() == beside.end() == []
        (service.folder / until).touch()
        assert other.answer().status == 200
        wait_for(partial(is_replaced, service, crashing.worker), LIMIT_SECONDS)
        assert other.worker in service.workers()
        assert service.post("/predict", {"text": "a"}).status == 200


@pytest.mark.parametrize("does", ["abort", "be killed", "end with 3", "end with 4"])
def test_a_crash_of_the_only_worker(tmp_path: Path, does: str) -> None:
    """However it has ended, a new one serves."""
    with running(tmp_path, MODELS, **(VARIABLES | {"WEB_CONCURRENCY": "1"})) as service:
        crashing = Client(service)
        crashing.send(does)
        assert crashing.end() == []
        crashing.close()
        wait_for(partial(is_replaced, service, crashing.worker), LIMIT_SECONDS)
        service.wait_until_ready()
        assert service.post("/predict", {"text": "a"}).status == 200
        assert not [line for line in service.log() if "cannot serve" in line["message"]]


HALF_READY = """
import os, pathlib, threading, time

class Model:
    name, version = "model", "1"

    def warm_up(self) -> None:
        try:
            pathlib.Path("slow").touch(exist_ok=False)
        except FileExistsError:
            threading.Thread(target=self.wait_for_the_end, daemon=True).start()
        else:
            pathlib.Path("slow").write_text(str(os.getpid()))
            time.sleep(3_600)

    def wait_for_the_end(self) -> None:
        while not pathlib.Path("end").exists():
            time.sleep(0.001)
        pathlib.Path("end").unlink()
        os._exit(3)

    def predict(self, text: str) -> str:
        return text
"""


def test_a_crash_beside_one_that_is_not_ready(tmp_path: Path) -> None:
    """Two have ended by the time the master looks: one had not become ready, the other one had served; it goes on."""
    service = Service(tmp_path, HALF_READY, MODELS="predict=models:Model", WEB_CONCURRENCY="2")

    def is_served() -> bool:
        with contextlib.suppress(OSError):
            return service.get("/health").status == 200
        return False

    try:
        wait_for(lambda: is_served() and bool((tmp_path / "slow").read_text()), LIMIT_SECONDS)
        before = service.workers()
        service.signal(signal.SIGSTOP)
        os.kill(int((tmp_path / "slow").read_text()), signal.SIGKILL)
        (tmp_path / "end").touch()
        wait_for(lambda: all(map(has_ended, before)), LIMIT_SECONDS)
        service.signal(signal.SIGCONT)
        service.wait_until_ready()
    finally:
        service.kill()


@pytest.mark.parametrize("does", ["exit", "interrupt", "run out of memory", "recurse"])
def test_what_a_model_raises_ends_its_request_alone(service: Service, does: str) -> None:
    """Also an exit or an interrupt: 500 without a word of why, and the same thread and worker serve on."""
    workers = service.workers()
    client = Client(service)
    for _ in range(4):
        answer = client.ask(does)
        assert is_problem(answer, 500)
        assert client.ask("say").status == 200
    client.close()
    assert service.workers() == workers
    request_id = answer.json["request_id"]
    wait_for(
        lambda: any(x.get("exception") and x.get("request_id") == request_id for x in service.log()), LIMIT_SECONDS
    )


@pytest.mark.parametrize("does", ["fork", "print", "set locale", "handle signals", "change folder"])
def test_a_model_that_meddles_with_its_process(service: Service, does: str) -> None:
    """Serving goes on as before, in the same worker, with dates in English."""
    client = Client(service)
    folder = service.folder
    answer = client.ask(does)
    if does == "handle signals":  # Python lets only a main thread do that, and says so by a ValueError
        assert is_problem(answer, 422)
    else:
        assert answer.status == 200
    answer = client.get("/health")
    assert answer.json == {"status": "healthy"}
    time.strptime(answer.headers["date"], "%a, %d %b %Y %H:%M:%S GMT")
    if does == "change folder":
        # The worker is one that nobody needs any more.
        client.send("abort")
        assert client.end() == []
        wait_for(partial(is_replaced, service, client.worker), LIMIT_SECONDS)
    client.close()
    assert (folder / "stdout").exists()
    assert service.log()


def is_replaced(service: Service, worker: int) -> bool:
    now = service.workers()
    return len(now) == int(service.variables["WEB_CONCURRENCY"]) and worker not in now


def test_a_model_that_meddles_while_loading(tmp_path: Path) -> None:
    """Handlers of signals, folder, environment: the service still reloads, replaces a killed worker and shuts down.

    Each time it reads its settings from where they were, and nobody gets in without a key.
    """
    variables: dict[str, Any] = VARIABLES | {"MODELS": "unruly=models:Meddling", "WEB_CONCURRENCY": "1"}
    (tmp_path / ".env").write_text("API_KEYS=the-first-key")
    with running(tmp_path, MODELS, **variables) as service:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGKILL):
            (worker,) = service.workers()
            if number == signal.SIGHUP:
                (tmp_path / ".env").write_text(f"API_KEYS=the-key-after-{worker}")
                key = f"the-key-after-{worker}"
            os.kill(worker if number == signal.SIGKILL else service.process.pid, number)
            wait_for(partial(is_replaced, service, worker), LIMIT_SECONDS, lambda: service.output)
            for given, status in ((key, 200), ("the-first-key", 401), ("the-model-s-own", 401)):
                headers = {"X-API-Key": given}
                assert service.request("POST", "/unruly", {"does": "say"}, headers).status == status
        assert service.terminate(LIMIT_SECONDS) == 0
