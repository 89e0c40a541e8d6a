"""GET /metrics of the running service: exact over workers, their recycling and their ends, as Prometheus reads it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.live.service import WAIT_SECONDS, Service, needed, running, wait_for

MODELS = """
import pathlib, time

class Slow:
    name, version = "slow", "1.2.3"
    def predict(self, text: str) -> str:
        while not pathlib.Path(text).exists():
            time.sleep(0.01)
        return text

class Batching:
    name, version = "batching", "4.5.6"
    def predict(self, text: str) -> str:
        return text
    def predict_batch(self, inputs: list) -> list:
        time.sleep(0.02)
        return inputs
"""
SERVED = (
    "predict=inference_api.model:DummyModel,square_numbers=inference_api.model:SquareNumbersModel,"
    "batching=models:Batching"
)
WORKERS = 3
PREDICTED = 'requests_total{method="POST",model="dummy",route="/predict",status="200"}'
TOGETHER = 100
"""Requests sent at once."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One for all tests that can tell their requests from the others'."""
    with running(
        tmp_path_factory.mktemp("service"), MODELS, MODELS=SERVED, WEB_CONCURRENCY=str(WORKERS), THREADS="4"
    ) as service:
        yield service


class Load:
    """Clients that predict all the time, each request on a connection of its own."""

    def __init__(self, service: Service, clients: int) -> None:
        self.statuses: list[int] = []
        self._service = service
        self._stop = threading.Event()
        self._threads = in_threads(clients, self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.statuses.append(predict(self._service))

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def in_threads(count: int, target: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=target) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def predict(service: Service, text: str = "Hello") -> int:
    return service.post("/predict", {"text": text}).status


def begin(service: Service, text: str) -> socket.socket:
    """Send a prediction's request, and do not wait for its answer."""
    body = json.dumps({"text": text}).encode()
    client = service.connect()
    client.sendall(b"POST /predict HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    return client


def test_every_worker_tells_of_all(service: Service) -> None:
    """The counters are the requests sent, whichever worker answers the scrape."""
    service.wait_for_metric("worker_starts_total", WORKERS)
    assert {predict(service) for _ in range(60)} == {200}
    assert service.post("/square_numbers", [{"numbers": [1]}, {"numbers": [2]}]).status == 200
    assert service.post("/predict", {"text": 1}).status == 422
    assert service.get("/elsewhere/a").status == service.get("/elsewhere/b").status == 404
    service.wait_for_metric('requests_total{method="GET",model="",route="other",status="404"}', 2)
    for _ in range(20):
        found = service.metrics()
        assert found[PREDICTED] == 60
        assert found['requests_total{method="POST",model="dummy",route="/predict",status="422"}'] == 1
        assert found['predictions_total{model="dummy"}'] == 60
        assert found['predictions_total{model="square_numbers"}'] == 2
        assert found['request_duration_seconds_count{route="/predict"}'] == 61
        assert found['request_duration_seconds_bucket{le="30.0",route="/predict"}'] == 61
        assert 0 < found['request_duration_seconds_sum{route="/predict"}'] < WAIT_SECONDS
        assert found["workers"] == found["worker_starts_total"] == WORKERS
        assert not [name for name in found if "elsewhere" in name]
    assert 'model_info{model="dummy",route="/predict",version="1.0.0"}' in found
    assert 'model_info{model="batching",route="/batching",version="4.5.6"}' in found


def test_the_scrape_is_a_text_that_promtool_accepts(service: Service) -> None:
    """Its type is the text format's, its names are as Prometheus wants them, HEAD is answered and POST is not."""
    promtool = needed("promtool", "prometheus")
    assert predict(service) == 200
    scrape, head = service.get("/metrics"), service.request("HEAD", "/metrics")
    assert scrape.status == head.status == 200
    assert (head.headers["content-type"], head.body) == (scrape.headers["content-type"], b"")
    assert scrape.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    done = subprocess.run([promtool, "check", "metrics"], input=scrape.body, capture_output=True, timeout=WAIT_SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert service.post("/metrics", {}).status == 405
    assert service.get("/metricsfoo").status == 404


def test_batches_are_counted(service: Service) -> None:
    """The sum of the batch sizes is the inputs sent; they were put together into fewer calls."""
    statuses: list[int] = []

    def send() -> None:
        statuses.extend(service.post("/batching", {"text": "Hello"}).status for _ in range(20))

    for thread in in_threads(8, send):
        thread.join()
    assert statuses == [200] * 160
    service.wait_for_metric('predictions_total{model="batching"}', 160)
    found = service.metrics()
    assert found['batch_size_sum{model="batching"}'] == 160
    assert 5 <= found['batch_size_count{model="batching"}'] < 160


def test_there_are_as_many_counts_as_access_lines(service: Service) -> None:
    """Whatever becomes of a request, it is counted once, as it is logged once."""
    for method, path in (("GET", "/health"), ("GET", "/x"), ("PUT", "/predict"), ("GET", "/docs")):
        service.request(method, path)
    assert b" 400 " in service.raw(b"nonsense\r\n\r\n")

    def counted_and_logged() -> tuple[float, int]:
        # Scrapes apart, which change what they count.
        found = {name: value for name, value in service.metrics().items() if name.startswith("requests_total{")}
        counted = sum(value for name, value in found.items() if 'route="/metrics"' not in name)
        return counted, len([line for line in service.access_lines() if line.get("path") != "/metrics"])

    def agree() -> bool:
        counted, logged = counted_and_logged()
        return counted == logged

    wait_for(agree, WAIT_SECONDS, counted_and_logged)


def test_a_killed_worker_takes_no_count_with_it(service: Service) -> None:
    """SIGKILL of every worker: the counters stay, and the gauges are those of the successors."""
    found = service.metrics()
    predicted, starts = found[PREDICTED], found["worker_starts_total"]
    assert {predict(service) for _ in range(30)} == {200}
    service.wait_for_metric(PREDICTED, predicted + 30)
    old = set(service.workers())
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(service.workers()) == WORKERS and old.isdisjoint(service.workers()), WAIT_SECONDS)
    service.wait_until_ready()
    service.wait_for_metric("worker_starts_total", starts + WORKERS)
    assert predict(service) == 200
    service.wait_for_metric(PREDICTED, predicted + 31)
    service.wait_for_metric("workers", WORKERS)


def test_a_reload_goes_on_counting(service: Service) -> None:
    """SIGHUP, twice, under load: no count falls, and the sum is exact."""
    found = service.metrics()
    predicted, starts = found[PREDICTED], found["worker_starts_total"]
    seen = [predicted]

    def have_started(workers: int) -> Callable[[], bool]:
        def look() -> bool:
            found = service.metrics()
            seen.append(found[PREDICTED])
            return found["worker_starts_total"] == starts + workers

        return look

    with Load(service, 2) as load:
        for workers in (WORKERS, 2 * WORKERS):
            service.signal(signal.SIGHUP)
            wait_for(have_started(workers), WAIT_SECONDS, lambda: service.output)
    assert set(load.statuses) == {200}
    service.wait_for_metric(PREDICTED, predicted + len(load.statuses))
    assert seen == sorted(seen)
    service.wait_for_metric("workers", WORKERS)


def test_metrics_can_be_turned_off(tmp_path: Path) -> None:
    """With METRICS=off there is nothing at the path, and predictions go on."""
    with running(tmp_path, METRICS="off") as service:
        assert service.get("/metrics").status == 404
        assert predict(service) == 200


@pytest.mark.parametrize("worker_class", ["inference_api.worker.Worker", "gthread"])
def test_recycling_workers_loses_no_count(tmp_path: Path, worker_class: str) -> None:
    """With MAX_REQUESTS=50 the counter is the requests sent, never falls on the way, and no file stays."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    variables = {"MAX_REQUESTS": "50", "WORKER_CLASS": worker_class, "TMPDIR": str(temporary)}
    with running(tmp_path, WEB_CONCURRENCY="2", **variables) as service:
        seen = [0.0]
        slots = 0.0

        def have_been_recycled() -> bool:
            nonlocal slots
            found = service.metrics()
            seen.append(found[PREDICTED])
            slots = max(slots, found["workers"])
            return found["worker_starts_total"] >= 20

        with Load(service, 4) as load:
            wait_for(have_been_recycled, 2 * WAIT_SECONDS, lambda: service.output)
        assert set(load.statuses) == {200}
        assert seen == sorted(seen)
        service.wait_for_metric(PREDICTED, len(load.statuses))
        found = service.metrics()
        assert found['request_duration_seconds_count{route="/predict"}'] == len(load.statuses) >= 500
        assert found['predictions_total{model="dummy"}'] == len(load.statuses)
        assert slots <= 4  # as many more while they leave
        assert {path.name for path in tmp_path.iterdir()} == {"stdout", "stderr", "tmp"}
        assert list(temporary.iterdir()) == []


def test_what_runs_and_what_waits_is_seen(tmp_path: Path) -> None:
    """In flight, pending, shed and gone are counted where they happen, and the gauges end with their requests."""
    with (
        running(tmp_path, MODELS, MODELS="predict=models:Slow", THREADS="1", MAX_PENDING="2") as service,
        contextlib.ExitStack() as stack,
    ):
        clients = []
        for pending in (0, 1, 2):
            clients.append(stack.enter_context(begin(service, "go")))
            service.wait_for_metric("requests_in_flight", 1)
            service.wait_for_metric("requests_pending", pending)
        assert service.metrics()["connections"] >= 3
        assert predict(service, "go") == 503
        service.wait_for_metric('requests_shed_total{reason="pending"}', 1)
        clients[2].close()
        service.wait_for_metric("requests_gone_total", 1)
        service.wait_for_metric("requests_pending", 1)
        (tmp_path / "go").touch()
        assert [client.recv(12) for client in clients[:2]] == [b"HTTP/1.1 200"] * 2
        for client in clients[:2]:
            client.close()
        service.wait_for_metric("requests_in_flight", 0)
        service.wait_for_metric("requests_pending", 0)
        wait_for(lambda: service.metrics()["connections"] <= 1, WAIT_SECONDS)  # at most that of a scrape
        assert answered(service) == {"200": 2, "499": 1, "500": 0, "503": 1, "504": 0}
        found = service.metrics()
        assert found['predictions_total{model="slow"}'] == 2
        assert found["queue_wait_seconds_count"] >= 2


def test_a_deadline_that_passes_is_seen(tmp_path: Path) -> None:
    """It counts as timed out and as 504, and its thread as stuck until the model returns."""
    with running(tmp_path, MODELS, MODELS="predict=models:Slow", REQUEST_TIMEOUT="0.5") as service:
        assert predict(service, "go") == 504
        service.wait_for_metric("requests_timed_out_total", 1)
        service.wait_for_metric("threads_stuck", 1)
        (tmp_path / "go").touch()
        service.wait_for_metric("threads_stuck", 0)
        assert answered(service) == {"200": 0, "500": 0, "503": 0, "504": 1}


def answered(service: Service) -> dict[str, float]:
    """The predictions of the slow model by status."""
    start = 'requests_total{method="POST",model="slow",route="/predict",status="'
    found = sorted(service.metrics().items())
    return {name[len(start) : -2]: value for name, value in found if name.startswith(start)}


def test_lines_that_nobody_reads_are_counted(tmp_path: Path) -> None:
    """Requests are answered while stdout is a full pipe; the metric is the lines that were dropped."""
    reader, writer = os.pipe()
    try:
        with running(tmp_path, stdout=writer) as service:
            body = b"Host: h\r\nContent-Length: 16\r\n%b\r\n" + b'{"text":"Hello"}'
            several = (b"POST /predict HTTP/1.1\r\n" + body % b"") * (TOGETHER - 1)
            last = b"POST /predict HTTP/1.1\r\n" + body % b"Connection: close\r\n"

            def are_dropped() -> bool:
                for _ in range(20):
                    assert service.raw(several + last).count(b"HTTP/1.1 200 OK\r\n") == TOGETHER
                return service.metrics()["log_lines_dropped_total"] >= TOGETHER

            wait_for(are_dropped, 2 * WAIT_SECONDS, service.metrics)
            assert predict(service) == 200
    finally:
        os.close(reader)
        os.close(writer)
