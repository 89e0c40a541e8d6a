"""Loading before the fork: weights that all workers share, what runs in each worker, and what cannot be forked."""

import contextlib
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.live.service import START_SECONDS, WAIT_SECONDS, Service, is_problem, memory, running, wait_for

MIB = 1_048_576
WEIGHTS_BYTES = 200 * 1_000_000

MODELS = r"""
import gc, os, pathlib, threading, time

HERE = pathlib.Path(__file__).parent

def note(name):
    with HERE.joinpath(name).open("a") as file:
        file.write(f"{os.getpid()} ")

class Large:
    name, version = "large", "1.0.0"

    def load(self):
        note("loaded")
        self.weights = bytearray(os.urandom(1000) * 200_000)

    def warm_up(self):
        note("warm")
        self.is_warm_in = os.getpid()

    def predict(self, place: int) -> dict[str, int | bool]:
        stride = sum(self.weights[::4096])  # reads every page
        return {
            "worker": os.getpid(),
            "weight": self.weights[place],
            "is_warm": self.is_warm_in == os.getpid(),
            "is_frozen": gc.get_freeze_count() > 1000,
            "stride": stride,
        }

class Lingering:
    name, version = "lingering", "1.0.0"

    def load(self):
        threading.Thread(target=threading.Event().wait).start()  # not a daemon: a normal end would wait for it

    def predict(self, text: str) -> str:
        return text

class Slow:
    name, version = "slow", "1.0.0"

    def load(self):
        while not HERE.joinpath("go-on").exists():
            time.sleep(0.01)

    warm_up = load

    def predict(self, text: str) -> str:
        return text

class SlowToWarmUp(Slow):
    load = None
"""
WORKERS = 4


def pss(service: Service) -> int:
    """The proportional set size of the master and its workers: what all of them together cost."""
    return sum(memory(pid)["Pss"] for pid in (service.process.pid, *service.workers()))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("large"), MODELS, MODELS="predict=models:Large") as service:
        yield service


def has_workers(service: Service, workers: int) -> bool:
    return len(service.workers()) == workers


def ask_all(service: Service, workers: int) -> list[dict[str, int | bool]]:
    """Predictions until every worker has made some."""
    found: list[dict[str, int | bool]] = []

    def has_all() -> bool:
        found.append(service.post("/predict", {"place": len(found)}).json["prediction"])
        return len(found) >= 10 * workers and len({one["worker"] for one in found}) == workers

    wait_for(has_all, WAIT_SECONDS)
    return found


def test_workers_share_the_weights(large: Service) -> None:
    """200 MB of weights: four workers need hardly more than one and what each has of its own, predictions included."""
    ask_all(large, 1)
    one = pss(large)
    assert one > WEIGHTS_BYTES
    for workers in range(2, WORKERS + 1):
        large.signal(signal.SIGTTIN)
        wait_for(partial(has_workers, large, workers), WAIT_SECONDS)
    found = ask_all(large, WORKERS)
    assert len({prediction["stride"] for prediction in found}) == 1
    own = [usage["Private_Dirty"] + usage["Private_Clean"] for usage in map(memory, large.workers())]
    assert max(own) < 40 * MIB
    assert pss(large) < 1.15 * (one + sum(sorted(own)[1:]))
    assert pss(large) < 1.5 * WEIGHTS_BYTES


def test_each_worker_is_warmed_up_after_the_fork_and_before_its_first_request(large: Service) -> None:
    """`load()` has run once, in the master; `warm_up()` once in each worker; what lived then is frozen in it."""
    assert all(prediction["is_warm"] and prediction["is_frozen"] for prediction in ask_all(large, len(large.workers())))
    assert (large.folder / "loaded").read_text().split() == [str(large.process.pid)]
    assert sorted(map(int, (large.folder / "warm").read_text().split())) == sorted(large.workers())


def test_without_preload_each_worker_loads_for_itself(tmp_path: Path) -> None:
    """And warms up for itself, before it is ready."""
    with running(tmp_path, MODELS, MODELS="predict=models:Large", PRELOAD="false", WEB_CONCURRENCY="2") as service:
        wait_for(lambda: len((tmp_path / "warm").read_text().split()) == 2, WAIT_SECONDS)
        wait_for(lambda: service.post("/predict", {"place": 1}).status == 200, WAIT_SECONDS)
        workers = sorted(service.workers())
        assert sorted(map(int, (tmp_path / "loaded").read_text().split())) == workers
        assert sorted(map(int, (tmp_path / "warm").read_text().split())) == workers


def test_a_thread_that_outlives_loading_stops_the_start(tmp_path: Path) -> None:
    """The start fails at once, though nobody ever ends that thread, and says what to set; with that it works."""
    service = Service(tmp_path, MODELS, MODELS="predict=models:Lingering")
    try:
        assert service.process.wait(START_SECONDS) == 1
        assert "set PRELOAD=false" in service.stderr.splitlines()[-1]
    finally:
        service.kill()
    with running(tmp_path, MODELS="predict=models:Lingering", PRELOAD="false") as service:
        assert service.post("/predict", {"text": "Hello"}).json["prediction"] == "Hello"
    assert service.process.returncode == 0


def test_slow_steps_show_that_they_go_on(tmp_path: Path) -> None:
    """A line every five seconds, of the master that loads and of the worker that loads, until it is ready."""
    folders = {preload: tmp_path / preload for preload in ("true", "false")}
    services = {
        preload: Service(folder, MODELS, MODELS="predict=models:Slow", PRELOAD=preload)
        for preload, folder in folders.items()
    }
    with contextlib.ExitStack() as stack:
        for service in services.values():
            stack.callback(service.kill)
        for service in services.values():
            wait_for(partial(shows_progress, service), START_SECONDS)
            (line,) = {(line["message"], line["model"]) for line in progress(service)}
            assert line == ("loading model", "predict=models:Slow")
            (service.folder / "go-on").touch()
            service.wait_until_ready()
            assert service.post("/predict", {"text": "Hello"}).status == 200
            assert service.terminate() == 0


def shows_progress(service: Service) -> bool:
    return bool(progress(service))


def progress(service: Service) -> list[dict[str, object]]:
    return [line for line in service.log() if "seconds" in line and "model" in line]


@pytest.mark.parametrize(("model", "preload"), [("Slow", "false"), ("SlowToWarmUp", "true")])
def test_the_first_workers_say_that_they_start(tmp_path: Path, model: str, preload: str) -> None:
    """While there is nobody else to serve: 503 on /health and for predictions, 200 on /health/live."""
    service = Service(tmp_path, MODELS, MODELS=f"predict=models:{model}", PRELOAD=preload)
    try:
        wait_for(lambda: "Booting worker" in service.stdout, START_SECONDS, lambda: service.output)
        health, live = service.get("/health"), service.get("/health/live")
        assert (health.status, health.json, live.status) == (503, {"status": "starting"}, 200)
        assert is_problem(service.post("/predict", {"text": "Hello"}), 503)
        (tmp_path / "go-on").touch()
        service.wait_until_ready()
        assert service.post("/predict", {"text": "Hello"}).status == 200
        assert service.terminate() == 0
    finally:
        service.kill()


@pytest.mark.parametrize(("model", "preload"), [("Slow", "false"), ("SlowToWarmUp", "true")])
def test_a_worker_is_stopped_while_it_loads_or_warms_up(tmp_path: Path, model: str, preload: str) -> None:
    """A shutdown does not wait for a step that may take minutes."""
    service = Service(tmp_path, MODELS, MODELS=f"predict=models:{model}", PRELOAD=preload)
    try:
        wait_for(lambda: "Booting worker" in service.stdout, START_SECONDS, lambda: service.output)
        assert service.terminate(15) == 0
    finally:
        service.kill()
