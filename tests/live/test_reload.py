"""SIGHUP and MAX_REQUESTS while clients send all the time: new weights, new settings, refusals, and nothing lost."""

import contextlib
import http.client
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.service import WAIT_SECONDS, Service, memory, running, wait_for

MIB = 1_048_576
KEEP_ALIVE_CLIENTS = NEW_CONNECTION_CLIENTS = 16
RELOADS = 10
RECYCLED_REQUESTS, RECYCLED_WORKERS = 10_000, 10

MODELS = r"""
import multiprocessing, os, pathlib, threading, time

def note(name, pid):
    with pathlib.Path(__file__).with_name(name).open("a") as file:
        file.write(f"{pid}\n")

class Weights:
    name, version = "weights", "1.0.0"

    def load(self):
        self.weights = pathlib.Path(__file__).with_name("weights").read_text()
        if self.weights == "aborts":
            os.abort()
        if self.weights == "never loaded":
            threading.Event().wait()
        if self.weights == "loaded once":
            try:  # the rehearsal's, but not the master's
                pathlib.Path(__file__).with_name("rehearsed").touch(exist_ok=False)
            except FileExistsError:
                pathlib.Path(__file__).with_name("loading").touch()
                threading.Event().wait()
        if self.weights == "forks" and os.fork() == 0:
            note("forked", os.getpid())
        if self.weights == "damaged":
            raise ValueError("the weights are damaged")
        if self.weights == "exits":
            raise SystemExit(3)
        if self.weights == "threads":
            thread = threading.Thread(target=threading.Event().wait, args=(3,), daemon=True)
            thread.start()
        self.much = bytearray(b"1" * 20 * 2**20)

    def warm_up(self):
        if pathlib.Path(__file__).with_name("freezing").exists():
            raise ValueError("it is too cold")
        if self.weights == "waits":
            note("waiting", os.getpid())
        while self.weights == "waits" and not pathlib.Path(__file__).with_name("may go on").exists():
            time.sleep(0.01)
        if self.weights.startswith("starts processes"):
            context = multiprocessing.get_context(self.weights.split()[-1])
            self.process = context.Process(target=time.sleep, args=(1_000,), daemon=True)
            self.process.start()
            note("started", self.process.pid)
        if self.weights == "cold":
            raise ValueError("it stays cold")
        if self.weights == "crashes":
            os.abort()
        if self.weights.startswith("slow"):
            try:  # the rehearsal is not slow
                pathlib.Path(__file__).with_name(f"{self.weights} rehearsed").touch(exist_ok=False)
            except FileExistsError:
                while not pathlib.Path(__file__).with_name(f"{self.weights} may go on").exists():
                    time.sleep(0.01)
        if self.weights == "unlucky":
            try:
                pathlib.Path(__file__).with_name("unlucky rehearsed").touch(exist_ok=False)
            except FileExistsError:
                if not pathlib.Path(__file__).with_name("lucky").exists():
                    raise ValueError("no luck")
        if self.weights == "hangs":
            pathlib.Path(__file__).with_name("hanging").touch()
            threading.Event().wait()
        note("warm", os.getpid())

    def predict(self, text: str) -> str:
        return self.weights
"""


class Traffic:
    """Clients that send all the time, half of them on a new connection each time; whatever is not a 200 is lost."""

    def __init__(self, service: Service) -> None:
        self.answered = 0
        self.lost: list[str] = []
        self._service = service
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(number < KEEP_ALIVE_CLIENTS,))
            for number in range(KEEP_ALIVE_CLIENTS + NEW_CONNECTION_CLIENTS)
        ]

    def _run(self, keeps_alive: bool) -> None:
        headers = {"Content-Type": "application/json"} | ({} if keeps_alive else {"Connection": "close"})
        connection = http.client.HTTPConnection("127.0.0.1", self._service.port, timeout=WAIT_SECONDS)
        with contextlib.closing(connection):  # which connects anew after an answer with Connection: close
            while not self._is_over.is_set():
                try:
                    connection.request("POST", "/predict", b'{"text": "Hello"}', headers)
                    response = connection.getresponse()
                    body = response.read()
                    problem = "" if response.status == 200 else f"{response.status} {body!r}"
                except (OSError, http.client.HTTPException) as exc:
                    problem = repr(exc)
                    connection.close()
                with self._lock:
                    self.answered += not problem
                    if problem:
                        self.lost.append(problem)

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def goes_on(self) -> None:
        """Waits until each client may have had some more answers."""
        enough = self.answered + 2 * len(self._threads)
        wait_for(lambda: self.answered >= enough or bool(self.lost), WAIT_SECONDS)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    (tmp_path / "weights").write_text("first")
    with running(tmp_path, MODELS, MODELS="predict=models:Weights", WEB_CONCURRENCY="2", ACCESS_LOG="off") as service:
        wait_until_all_serve(service, 2)
        yield service


@pytest.fixture(params=["true", "false"], ids=["PRELOAD=true", "PRELOAD=false"])
def busy(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Service, Traffic]]:
    """Two workers while clients send all the time; in the end none of them has lost a request."""
    (tmp_path / "weights").write_text("first")
    variables = {"MODELS": "predict=models:Weights", "WEB_CONCURRENCY": "2", "ACCESS_LOG": "off"}
    with running(tmp_path, MODELS, **variables, PRELOAD=request.param) as service:
        wait_until_all_serve(service, 2)
        with Traffic(service) as traffic:
            yield service, traffic
            traffic.goes_on()
        assert traffic.lost == []


def wait_until_all_serve(service: Service, warmed_up: int) -> None:
    """So many workers have warmed up by now. While the first one serves, others may still answer that they start."""
    warm = service.folder / "warm"
    wait_for(lambda: len(warm.read_text().split()) >= warmed_up, WAIT_SECONDS)
    wait_for(lambda: {service.get("/health").status for _ in range(32)} == {200}, WAIT_SECONDS)


def served(service: Service) -> str:
    prediction: str = service.post("/predict", {"text": "Hello"}).json["prediction"]
    return prediction


def lines(service: Service, beginning: str) -> list[dict[str, Any]]:
    return [line for line in service.log() if line["message"].startswith(beginning)]


def reload(service: Service) -> None:
    """A reload that must succeed: it is over when all old workers are gone."""
    before, old = len(lines(service, "reloaded")), set(service.workers())
    service.signal(signal.SIGHUP)
    wait_for(
        lambda: len(lines(service, "reloaded")) == before + 1 and not old & set(service.workers()),
        WAIT_SECONDS,
        lambda: service.output,
    )


def refused_reload(service: Service) -> str:
    """A reload that must be refused; returns the log's words."""
    before, workers = len(lines(service, "reload refused")), service.workers()
    service.signal(signal.SIGHUP)
    wait_for(lambda: len(lines(service, "reload refused")) == before + 1, WAIT_SECONDS, lambda: service.output)
    assert service.workers() == workers
    line = lines(service, "reload refused")[-1]
    assert line["level"] == "ERROR" and "exception" not in line
    message: str = line["message"]
    return message.removeprefix("reload refused, the old workers serve on: ")


def test_reloads_under_load_lose_nothing(service: Service) -> None:
    """Ten SIGHUPs, each with new weights: served by all workers afterwards, no request lost, no memory kept."""
    sizes = []
    with Traffic(service) as traffic:
        for number in range(RELOADS):
            traffic.goes_on()
            (service.folder / "weights").write_text(f"weights {number}")
            reload(service)
            assert {served(service) for _ in range(8)} == {f"weights {number}"}
            sizes.append(memory(service.process.pid)["Rss"])
        traffic.goes_on()
    assert traffic.lost == []
    assert traffic.answered > 100 * RELOADS
    assert sizes[-1] < sizes[1] + 10 * MIB  # one copy of the weights has 20


def test_a_failed_reload_leaves_the_old_workers_serving(service: Service) -> None:
    """Bad weights, then bad settings: the log says why, the same workers serve on; once all is well it is served."""
    env = service.folder / ".env"
    spec = "MODELS: predict=models:Weights: load() failed: "
    with Traffic(service) as traffic:
        for weights, why in (("damaged", "ValueError: the weights are damaged"), ("exits", "SystemExit: 3")):
            (service.folder / "weights").write_text(weights)
            assert refused_reload(service) == spec + why
            assert served(service) == "first"
        (service.folder / "weights").write_text("second")
        for text, reason in (
            ("MAX_BATCH_SIZE=many", "MAX_BATCH_SIZE='many' is not allowed: it must be a whole number from 1 to 1024"),
            ("WORKER_CLASS=no.such.Worker", "WORKER_CLASS='no.such.Worker' is not allowed: "),
            ("REQUEST_TIMEOUT=60", "REQUEST_TIMEOUT=60 is not allowed: "),
            ("KEY=\xff", ".env cannot be read: "),
        ):
            env.write_text(text, encoding="latin-1")
            assert refused_reload(service).startswith(reason)
            assert served(service) == "first"
        env.write_text("MAX_BODY_BYTES=100\n")
        reload(service)
        assert served(service) == "second"
        assert lines(service, "reloaded")[-1]["THREADS"] == lines(service, "starting")[0]["THREADS"]
        traffic.goes_on()
    assert traffic.lost == []
    assert service.post("/predict", {"text": "x" * 100}).status == 413


def test_a_reload_whose_workers_could_not_serve_is_refused(busy: tuple[Service, Traffic]) -> None:
    """What each worker does for itself is tried before the old workers go: warming up, and loading without PRELOAD."""
    service, traffic = busy
    reasons = {
        "damaged": "MODELS: predict=models:Weights: load() failed: ValueError: the weights are damaged",
        "cold": "MODELS: predict=models:Weights: warm_up() failed: ValueError: it stays cold",
        "crashes": "MODELS: the process that prepared them has died",
        "aborts": "MODELS: the process that prepared them has died",
    }
    for weights, reason in reasons.items():
        (service.folder / "weights").write_text(weights)
        assert refused_reload(service) == reason
        assert served(service) == "first"
    traffic.goes_on()
    (service.folder / "weights").write_text("second")
    reload(service)
    assert served(service) == "second"


def test_new_workers_that_fail_where_the_rehearsal_did_not_end_nothing(busy: tuple[Service, Traffic]) -> None:
    """The old ones serve on while new ones are tried again and again, until they can serve."""
    service, _ = busy
    old = set(service.workers())
    (service.folder / "weights").write_text("unlucky")
    service.signal(signal.SIGHUP)
    words = "a new worker cannot serve, the old ones serve on"
    wait_for(lambda: len(lines(service, words)) >= 3, WAIT_SECONDS, lambda: service.output)
    assert old <= set(service.workers())
    assert served(service) == "first"
    (service.folder / "lucky").touch()
    wait_for(lambda: len(lines(service, "reloaded")) == 1, WAIT_SECONDS, lambda: service.output)
    wait_for(lambda: not old & set(service.workers()), WAIT_SECONDS, lambda: service.output)
    assert {served(service) for _ in range(8)} == {"unlucky"}


def test_old_workers_serve_until_the_new_ones_are_ready(busy: tuple[Service, Traffic]) -> None:
    """However long those take to warm up, /health stays 200, and nobody waits for them."""
    service, traffic = busy
    (service.folder / "weights").write_text("slow")
    service.signal(signal.SIGHUP)
    wait_for(lambda: len(lines(service, "Booting worker")) == 4, WAIT_SECONDS, lambda: service.output)
    traffic.goes_on()
    assert {served(service) for _ in range(32)} == {"first"}
    assert {service.get("/health").status for _ in range(32)} == {200}
    assert len(service.workers()) == 4
    assert lines(service, "reloaded") == []
    (service.folder / "slow may go on").touch()
    wait_for(lambda: len(service.workers()) == 2, WAIT_SECONDS, lambda: service.output)
    assert {served(service) for _ in range(32)} == {"slow"}


@pytest.mark.parametrize(
    ("weights", "sign"), [("hangs", "hanging"), ("loaded once", "loading")], ids=["rehearsal", "master"]
)
def test_a_reload_that_hangs_does_not_hold_up_the_shutdown(service: Service, weights: str, sign: str) -> None:
    """SIGTERM ends what would warm up for ever, or what the master loads after its rehearsal, and then the service."""
    (service.folder / "weights").write_text(weights)
    service.signal(signal.SIGHUP)
    wait_for((service.folder / sign).exists, WAIT_SECONDS)
    assert served(service) == "first"
    service.signal(signal.SIGTERM)
    assert service.process.wait(WAIT_SECONDS) == 0
    assert lines(service, "reload") == []


@pytest.mark.parametrize("reloads", [1, 2])
def test_a_stop_right_after_a_reload_is_heard(service: Service, reloads: int) -> None:
    """Though what is to be loaded never is, and whichever signal is seen first."""
    (service.folder / "weights").write_text("never loaded")
    for number in [*[signal.SIGHUP] * reloads, signal.SIGTERM]:
        service.signal(number)
    assert service.process.wait(WAIT_SECONDS) == 0


def test_what_is_edited_during_a_reload_is_not_read(busy: tuple[Service, Traffic]) -> None:
    """What has been rehearsed is served, whatever the file says meanwhile: it counts from the next SIGHUP on."""
    service, _ = busy
    old = set(service.workers())
    (service.folder / "weights").write_text("waits")
    service.signal(signal.SIGHUP)
    wait_for((service.folder / "waiting").exists, WAIT_SECONDS)
    (service.folder / ".env").write_text("LOG_LEVEL=NONSENSE")
    (service.folder / "may go on").touch()
    wait_for(lambda: len(lines(service, "reloaded")) == 1, WAIT_SECONDS, lambda: service.output)
    wait_for(lambda: not old & set(service.workers()), WAIT_SECONDS, lambda: service.output)
    assert refused_reload(service).startswith("LOG_LEVEL='NONSENSE' is not allowed: ")
    assert served(service) == "waits"


@pytest.mark.parametrize("preload", ["true", "false"])
def test_one_that_cannot_be_replaced_is_missed_by_nobody(tmp_path: Path, preload: str) -> None:
    """Where a worker has ended and its successor cannot warm up, it is tried again while the other serves."""
    (tmp_path / "weights").write_text("first")
    variables = {"MODELS": "predict=models:Weights", "WEB_CONCURRENCY": "2", "PRELOAD": preload}
    with running(tmp_path, MODELS, **variables) as service:
        wait_until_all_serve(service, 2)
        (tmp_path / "freezing").touch()
        os.kill(service.workers()[0], signal.SIGKILL)
        words = "a new worker cannot serve, the old ones serve on"
        wait_for(lambda: len(lines(service, words)) >= 2, WAIT_SECONDS, lambda: service.output)
        assert served(service) == "first"
        (tmp_path / "freezing").unlink()
        wait_for(lambda: len((tmp_path / "warm").read_text().split()) == 3, WAIT_SECONDS)
        assert served(service) == "first"


@pytest.mark.parametrize("preload", ["true", "false"])
def test_settings_are_read_at_the_start_and_at_sighup_alone(tmp_path: Path, preload: str) -> None:
    """A worker that is started later serves with those of the others, whatever stands in .env now."""
    (tmp_path / "weights").write_text("first")
    variables = {"WEB_CONCURRENCY": "2", "PRELOAD": preload}
    (tmp_path / ".env").write_text("MODELS=predict=models:Weights")
    with running(tmp_path, MODELS, **variables) as service:
        wait_until_all_serve(service, 2)
        (tmp_path / ".env").write_text("MODELS=other=models:Weights")
        for worker in service.workers():
            os.kill(worker, signal.SIGKILL)
        wait_until_all_serve(service, 4)
        assert {served(service) for _ in range(16)} == {"first"}


@pytest.mark.parametrize("preload", ["true", "false"])
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_processes_of_models_end_with_their_workers(tmp_path: Path, preload: str, method: str) -> None:
    """Those of the rehearsal, too; and none of them keeps a worker from ending, or the address from being free."""
    (tmp_path / "weights").write_text(f"starts processes by {method}")
    variables = {"MODELS": "predict=models:Weights", "WEB_CONCURRENCY": "2", "PRELOAD": preload}
    with running(tmp_path, MODELS, **variables) as service:
        reload(service)
        assert service.terminate(WAIT_SECONDS) == 0
    started = (tmp_path / "started").read_text().split()
    assert len(started) == 5
    wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in started), WAIT_SECONDS)


@pytest.mark.parametrize("preload", ["true", "false"])
def test_a_model_that_forks_while_it_is_loaded_is_served_once(tmp_path: Path, preload: str) -> None:
    """The child, which comes back from load() like its parent, is not another master or worker."""
    (tmp_path / "weights").write_text("forks")
    variables = {"MODELS": "predict=models:Weights", "WEB_CONCURRENCY": "2", "PRELOAD": preload}
    with running(tmp_path, MODELS, **variables) as service:
        reload(service)
        assert served(service) == "forks"
        assert len(service.workers()) == 2
        forked = (tmp_path / "forked").read_text().split()
        wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in forked), WAIT_SECONDS)


def test_workers_hear_what_is_meant_for_them(service: Service) -> None:
    """SIGHUP is the master's, and SIGTERM, said again and again, does not put the end off."""
    first, second = service.workers()
    os.kill(first, signal.SIGHUP)

    def has_left() -> bool:
        if second in service.workers():
            os.kill(second, signal.SIGTERM)
        return second not in service.workers()

    wait_for(has_left, WAIT_SECONDS)
    assert first in service.workers()
    assert served(service) == "first"


def test_a_reload_that_starts_threads_is_refused(service: Service) -> None:
    """They would not exist in the new workers; when they have ended, a reload works again."""
    (service.folder / "weights").write_text("threads")
    assert "set PRELOAD=false" in refused_reload(service)
    assert served(service) == "first"
    (service.folder / "weights").write_text("second")
    wait_for(lambda: len(list(Path(f"/proc/{service.process.pid}/task").iterdir())) == 1, WAIT_SECONDS)
    reload(service)
    assert served(service) == "second"


def test_recycled_workers_lose_nothing(tmp_path: Path) -> None:
    """MAX_REQUESTS=200, ten thousand requests: many workers come and go, each in time, and nobody notices."""
    with (
        running(
            tmp_path, WEB_CONCURRENCY="2", MAX_REQUESTS="200", MAX_REQUESTS_JITTER="20", ACCESS_LOG="off"
        ) as service,
        Traffic(service) as traffic,
    ):

        def worn_out() -> list[int]:  # as many as the machine can start: each serves on until its successor is ready
            return [line["requests"] for line in lines(service, "worn out by MAX_REQUESTS")]

        def has_seen_enough() -> bool:
            return traffic.answered >= RECYCLED_REQUESTS and len(worn_out()) >= RECYCLED_WORKERS

        wait_for(lambda: has_seen_enough() or bool(traffic.lost), 3 * WAIT_SECONDS, lambda: service.output)
    assert traffic.lost == []
    assert max(worn_out()) <= 220 + KEEP_ALIVE_CLIENTS + NEW_CONNECTION_CLIENTS  # all that one turn may bring


def test_recycling_never_comes_to_a_halt(tmp_path: Path) -> None:
    """Though workers are worn out before their siblings have come, others follow, and a reload replaces them all."""
    (tmp_path / "weights").write_text("first")
    variables = {"MODELS": "predict=models:Weights", "WEB_CONCURRENCY": "4", "MAX_REQUESTS": "10", "ACCESS_LOG": "off"}
    with running(tmp_path, MODELS, **variables) as service:

        def worn_out() -> int:
            return len(lines(service, "worn out by MAX_REQUESTS"))

        wait_until_all_serve(service, 4)
        with Traffic(service) as traffic:
            wait_for(lambda: worn_out() >= 24, WAIT_SECONDS, lambda: service.output)
            (tmp_path / "weights").write_text("second")
            reload(service)  # others than those that it waits for may have come and leave now
            wait_for(lambda: {served(service) for _ in range(32)} == {"second"}, WAIT_SECONDS, lambda: service.output)
            wait_for(lambda: worn_out() >= 60, WAIT_SECONDS, lambda: service.output)
    assert traffic.lost == []


@pytest.mark.parametrize("preload", ["true", "false"])
def test_a_worker_serves_until_its_successor_can(tmp_path: Path, preload: str) -> None:
    """Even the only one, and however long the other takes to load and to warm up: nobody gets 503 or has to wait."""
    (tmp_path / "weights").write_text("slow")
    (tmp_path / "slow rehearsed").touch()
    (tmp_path / "slow may go on").touch()
    variables = {"MODELS": "predict=models:Weights", "WEB_CONCURRENCY": "1", "MAX_REQUESTS": "100", "PRELOAD": preload}
    with running(tmp_path, MODELS, **variables) as service:
        (old,) = service.workers()
        (tmp_path / "slow may go on").unlink()
        with Traffic(service) as traffic:
            wait_for(lambda: len(service.workers()) == 2, WAIT_SECONDS, lambda: service.output)
            traffic.goes_on()
            assert old in service.workers()
            (tmp_path / "slow may go on").touch()
            wait_for(lambda: old not in service.workers(), WAIT_SECONDS, lambda: service.output)
            traffic.goes_on()
        assert traffic.lost == []
