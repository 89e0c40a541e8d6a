"""GET /metrics of the running service: exact over workers, their recycling and their ends, as Prometheus reads it."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2]
START_SECONDS = 20
WAIT_SECONDS = 20
STOP_SECONDS = 40

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

PREDICTED = 'requests_total{method="POST",model="dummy",route="/predict",status="200"}'


class Service:
    """The service as a process on a free port, in a folder of its own."""

    def __init__(self, folder: Path, stdout: int | None = None, **variables: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        (folder / "models.py").write_text(MODELS)
        self.folder = folder
        self.log = folder / "log"
        keep = {key: os.environ[key] for key in ("PATH", "LANG", "HOME") if key in os.environ}
        temporary = folder / "tmp"
        temporary.mkdir()
        self.concurrency = int(variables.get("WEB_CONCURRENCY", "2"))
        defaults = {"HOST": "127.0.0.1", "PORT": str(self.port), "WEB_CONCURRENCY": "2", "PYTHONPATH": str(PROJECT)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "inference_api"],
                cwd=folder,
                env={**keep, **defaults, "TMPDIR": str(temporary), **variables},
                stdin=subprocess.DEVNULL,
                stdout=log if stdout is None else stdout,
                stderr=subprocess.STDOUT if stdout is None else log,
            )

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                return self.get("/health")[0] == 200
            return False

        wait_for(lambda: is_ready() and len(self.workers()) == self.concurrency, START_SECONDS)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def get(self, path: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        return self.request("GET", path)

    def predict(self, text: str = "Hello") -> int:
        return self.request("POST", "/predict", {"text": text})[0]

    def begin(self, text: str) -> socket.socket:
        """Send a prediction's request, and do not wait for its answer."""
        body = json.dumps({"text": text}).encode()
        client = socket.create_connection(("127.0.0.1", self.port), WAIT_SECONDS)
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        return client

    def metrics(self) -> dict[str, float]:
        """One scrape: name and labels → value."""
        status, _, body = self.get("/metrics")
        assert status == 200
        lines = [line for line in body.decode().splitlines() if not line.startswith("#")]
        return {
            name.removeprefix("inference_api_"): float(value) for name, value in (ln.rsplit(" ", 1) for ln in lines)
        }

    def wait_for_metric(self, name: str, expected: float) -> None:
        """The gauges are published ten times a second, and an answer is counted just after it is sent."""
        wait_for(
            lambda: self.metrics().get(name, 0) == expected, WAIT_SECONDS, lambda: (name, expected, self.metrics())
        )

    def workers(self) -> list[int]:
        """The process ids of the workers."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Callable[[], bool], seconds: float, describe: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.02)


@contextlib.contextmanager
def running(folder: Path, stdout: int | None = None, **variables: str) -> Iterator[Service]:
    service = Service(folder, stdout, **variables)
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.stop()


def in_threads(count: int, target: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=target) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def needed(program: str, package: str) -> str:
    """The path of a program that CI has; elsewhere the test that needs it is skipped."""
    path = shutil.which(program)
    if path is None:
        words = f"{program} is not installed (Debian's package {package})"
        if "CI" in os.environ:
            pytest.fail(words)
        pytest.skip(words)
    return path


def test_every_worker_tells_of_all(tmp_path: Path) -> None:
    """The counters are the requests sent, whichever worker answers the scrape."""
    with running(tmp_path, WEB_CONCURRENCY="3") as service:
        service.wait_for_metric("worker_starts_total", 3)
        for _ in range(60):
            assert service.predict() == 200
        assert service.request("POST", "/square_numbers", [{"numbers": [1]}, {"numbers": [2]}])[0] == 200
        assert service.request("POST", "/predict", {"text": 1})[0] == 422
        assert service.get("/elsewhere/a")[0] == service.get("/elsewhere/b")[0] == 404
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
            assert found["workers"] == found["worker_starts_total"] == 3
            assert not [name for name in found if "elsewhere" in name]
        assert 'model_info{model="dummy",route="/predict",version="1.0.0"}' in found


def test_the_scrape_is_a_text_that_promtool_accepts(tmp_path: Path) -> None:
    """Its type is the text format's, its names are as Prometheus wants them, HEAD is answered and POST is not."""
    promtool = needed("promtool", "prometheus")
    with running(tmp_path) as service:
        assert service.predict() == 200
        status, headers, body = service.get("/metrics")
        assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        done = subprocess.run([promtool, "check", "metrics"], input=body, capture_output=True, timeout=WAIT_SECONDS)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        status, headers, body = service.request("HEAD", "/metrics")
        assert (status, headers["Content-Type"], body) == (200, "text/plain; version=0.0.4; charset=utf-8", b"")
        assert service.request("POST", "/metrics", {})[0] == 405
        assert service.get("/metricsfoo")[0] == 404


def test_metrics_can_be_turned_off(tmp_path: Path) -> None:
    """With METRICS=off there is nothing at the path, and predictions go on."""
    with running(tmp_path, METRICS="off") as service:
        assert service.get("/metrics")[0] == 404
        assert service.predict() == 200


@pytest.mark.parametrize("worker_class", ["inference_api.worker.Worker", "gthread"])
def test_recycling_workers_loses_no_count(tmp_path: Path, worker_class: str) -> None:
    """With MAX_REQUESTS=50 the counter is the requests sent, never falls on the way, and no file stays."""
    with running(tmp_path, MAX_REQUESTS="50", WORKER_CLASS=worker_class) as service:
        stop = threading.Event()
        statuses: list[int] = []

        def send() -> None:
            while not stop.is_set():
                statuses.append(service.predict())

        threads = in_threads(4, send)
        seen = [0.0]
        slots = 0.0

        def have_been_recycled() -> bool:
            nonlocal slots
            found = service.metrics()
            seen.append(found[PREDICTED])
            slots = max(slots, found["workers"])
            return found["worker_starts_total"] >= 20

        try:
            wait_for(have_been_recycled, WAIT_SECONDS, service.metrics)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert set(statuses) == {200}
        assert seen == sorted(seen)
        service.wait_for_metric(PREDICTED, len(statuses))
        found = service.metrics()
        assert found['request_duration_seconds_count{route="/predict"}'] == len(statuses) >= 500
        assert found['predictions_total{model="dummy"}'] == len(statuses)
        assert slots <= 2
        names = {path.name for path in tmp_path.iterdir()}
        assert names - {"__pycache__"} == {"log", "models.py", "tmp"}
        assert list((tmp_path / "tmp").iterdir()) == []


def test_a_killed_worker_takes_no_count_with_it(tmp_path: Path) -> None:
    """SIGKILL of every worker: the counters stay, and the gauges are those of the successors."""
    with running(tmp_path) as service:
        for _ in range(30):
            assert service.predict() == 200
        service.wait_for_metric(PREDICTED, 30)
        old = service.workers()
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: len(service.workers()) == 2 and not set(old) & set(service.workers()), WAIT_SECONDS)
        service.wait_until_ready()
        service.wait_for_metric("worker_starts_total", 4)
        assert service.predict() == 200
        service.wait_for_metric(PREDICTED, 31)
        service.wait_for_metric("workers", 2)


def test_a_reload_goes_on_counting(tmp_path: Path) -> None:
    """SIGHUP, three times, under load: no count falls, and the sum is exact."""
    with running(tmp_path) as service:
        stop = threading.Event()
        statuses: list[int] = []

        def send() -> None:
            while not stop.is_set():
                statuses.append(service.predict())

        threads = in_threads(2, send)
        seen = [0.0]

        def have_started(workers: int) -> bool:
            found = service.metrics()
            seen.append(found[PREDICTED])
            return found["worker_starts_total"] == workers

        try:
            for workers in (4, 6, 8):
                service.process.send_signal(signal.SIGHUP)
                wait_for(partial(have_started, workers), WAIT_SECONDS)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert set(statuses) == {200}
        service.wait_for_metric(PREDICTED, len(statuses))
        assert seen == sorted(seen)
        service.wait_for_metric("workers", 2)


def test_what_runs_and_what_waits_is_seen(tmp_path: Path) -> None:
    """In flight, pending, shed and gone are counted where they happen, and the gauges end with their requests."""
    with (
        running(tmp_path, MODELS="predict=models:Slow", WEB_CONCURRENCY="1", THREADS="1", MAX_PENDING="2") as service,
        contextlib.ExitStack() as stack,
    ):
        clients = []
        for pending in (0, 1, 2):
            clients.append(stack.enter_context(service.begin("go")))
            service.wait_for_metric("requests_in_flight", 1)
            service.wait_for_metric("requests_pending", pending)
        assert service.metrics()["connections"] >= 3
        assert service.predict("go") == 503
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
        found = service.metrics()
        assert answered(found) == {"200": 2, "499": 1, "500": 0, "503": 1, "504": 0}
        assert found['predictions_total{model="slow"}'] == 2
        assert found["queue_wait_seconds_count"] >= 2


def test_a_deadline_that_passes_is_seen(tmp_path: Path) -> None:
    """It counts as timed out and as 504, and its thread as stuck until the model returns."""
    with running(
        tmp_path,
        MODELS="predict=models:Slow",
        WEB_CONCURRENCY="1",
        THREADS="2",
        REQUEST_TIMEOUT="0.5",
    ) as service:
        assert service.predict("go") == 504
        service.wait_for_metric("requests_timed_out_total", 1)
        service.wait_for_metric("threads_stuck", 1)
        (tmp_path / "go").touch()
        service.wait_for_metric("threads_stuck", 0)
        assert answered(service.metrics()) == {"200": 0, "500": 0, "503": 0, "504": 1}


def answered(found: dict[str, float]) -> dict[str, float]:
    """The predictions of the slow model by status."""
    start = 'requests_total{method="POST",model="slow",route="/predict",status="'
    return {name[len(start) : -2]: value for name, value in sorted(found.items()) if name.startswith(start)}


def test_batches_are_counted(tmp_path: Path) -> None:
    """The sum of the batch sizes is the inputs sent; they were put together into fewer calls."""
    with running(tmp_path, MODELS="predict=models:Batching", WEB_CONCURRENCY="2") as service:
        statuses: list[int] = []

        def send() -> None:
            statuses.extend(service.predict() for _ in range(20))

        for thread in in_threads(8, send):
            thread.join()
        assert statuses == [200] * 160
        service.wait_for_metric('predictions_total{model="batching"}', 160)
        found = service.metrics()
        assert found['batch_size_sum{model="batching"}'] == 160
        assert 5 <= found['batch_size_count{model="batching"}'] < 160


def test_lines_that_nobody_reads_are_counted(tmp_path: Path) -> None:
    """Requests are answered while stdout is a full pipe; the metric is the lines that were dropped."""
    reader, writer = os.pipe()
    try:
        with running(tmp_path, stdout=writer, WEB_CONCURRENCY="1") as service:
            connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=WAIT_SECONDS)
            with contextlib.closing(connection):
                deadline = time.monotonic() + 2 * WAIT_SECONDS
                while service.metrics()["log_lines_dropped_total"] < 100:
                    assert time.monotonic() < deadline
                    for _ in range(500):
                        connection.request("GET", "/health/live")
                        assert connection.getresponse().read() == b'{"status":"alive"}'
            assert service.predict() == 200
    finally:
        os.close(reader)
        os.close(writer)


def test_prometheus_shows_what_was_sent_to_two_instances(tmp_path: Path) -> None:
    """The real Prometheus, scraping two instances, has the sum of the requests that both have answered."""
    prometheus = needed("prometheus", "prometheus")
    folders = [tmp_path / name for name in ("one", "two", "prometheus")]
    for folder in folders:
        folder.mkdir()
    with contextlib.ExitStack() as stack:
        services = [stack.enter_context(running(folder)) for folder in folders[:2]]
        targets = ", ".join(f"'127.0.0.1:{service.port}'" for service in services)
        configuration = folders[2] / "prometheus.yml"
        configuration.write_text(
            "global: {scrape_interval: 1s}\n"
            f"scrape_configs: [{{job_name: inference, static_configs: [{{targets: [{targets}]}}]}}]\n"
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with (folders[2] / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    prometheus,
                    f"--config.file={configuration}",
                    f"--storage.tsdb.path={folders[2] / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        stack.callback(process.wait)
        stack.callback(process.terminate)

        def query(expression: str) -> list[float]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SECONDS)
            with contextlib.closing(connection), contextlib.suppress(OSError):
                connection.request("GET", "/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
                response = connection.getresponse()
                if response.status == 200:
                    return [float(result["value"][1]) for result in json.load(response)["data"]["result"]]
            return []

        wait_for(lambda: query("sum(up)") == [2.0], WAIT_SECONDS, (folders[2] / "log").read_text)
        for count, service in zip((70, 50), services, strict=True):
            for _ in range(count):
                assert service.predict() == 200
        answered = 'inference_api_requests_total{route="/predict",status="200"}'
        wait_for(lambda: query(f"sum({answered})") == [120.0], WAIT_SECONDS, lambda: query(answered))
        assert sorted(query(answered)) == [50.0, 70.0]
        assert query("sum(inference_api_request_duration_seconds_count{route='/predict'})") == [120.0]
        assert query("sum(inference_api_workers)") == [4.0]
        (slowest,) = query(
            "histogram_quantile(1, sum by (le) (inference_api_request_duration_seconds_bucket{route='/predict'}))"
        )
        assert 0 < slowest <= 30
        (increase,) = query(f"sum(increase({answered}[1m]))")
        assert increase > 0


def test_there_are_as_many_counts_as_access_lines(tmp_path: Path) -> None:
    """Whatever becomes of a request, it is counted once, as it is logged once."""
    with running(tmp_path, WEB_CONCURRENCY="1") as service:
        for method, path in (
            ("GET", "/health"),
            ("GET", "/x"),
            ("PUT", "/predict"),
            ("POST", "/predict"),
            ("GET", "/docs"),
        ):
            service.request(method, path, {"text": "Hello"} if method == "POST" else None)
        with socket.create_connection(("127.0.0.1", service.port), WAIT_SECONDS) as client:
            client.sendall(b"nonsense\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 400"
        counted = sum(value for name, value in service.metrics().items() if name.startswith("requests_total{"))
    lines = [json.loads(line) for line in service.log.read_text().splitlines()]
    logged = [line for line in lines if line["message"] == "request"]
    assert counted >= 7
    assert len(logged) == counted + 1  # the scrape itself is counted after it has been answered
