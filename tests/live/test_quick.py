"""Requests that are quick are run by the thread that owns the sockets: one that is not, for once, must harm nobody."""

import http.client
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.service import WAIT_SECONDS, Answer, Service, is_problem, running, wait_for

MODEL = """
import os, pathlib, time

class Mostly:
    name, version = "mostly", "1.0.0"
    def predict(self, text: str) -> str:
        if text == "fork":
            os.fork()
        elif text:
            pathlib.Path(text + ".began").touch()
            while not pathlib.Path(text).exists():
                time.sleep(0.01)
        return text
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("quick")
    with running(folder, MODEL, MODELS="mostly=models:Mostly", THREADS="2", REQUEST_TIMEOUT="4") as service:
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

    def has_no_live_child() -> bool:
        children = Path(f"/proc/{worker}/task").glob("*/children")
        pids = [pid for file in children for pid in file.read_text().split()]
        return all(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z" for pid in pids)

    wait_for(has_no_live_child, WAIT_SECONDS)
    assert service.workers() == [worker]
