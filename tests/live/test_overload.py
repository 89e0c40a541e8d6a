"""More load than can be served: as much is answered in time as at the peak, the rest refused at once."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.live.service import Answer, Service, is_problem, next_answer, running, wait_for

SERVICE_SECONDS = 0.05
THREADS = 2
CAPACITY = THREADS / SERVICE_SECONDS
LOAD_SECONDS = 3.0
LEAST_GOODPUT = 0.7
"""Of what the model could do at best: generous, for machines that are busy with other things."""
PROMPT_SECONDS = 1.5
LIMIT_SECONDS = 30
MODELS = f"""
import pathlib, time

class Steady:
    name, version = "steady", "1"
    def predict(self, text: str) -> str:
        time.sleep({SERVICE_SECONDS})
        return text

class Slow:
    name, version = "slow", "1"
    def predict(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

class Holding(Steady):
    name = "holding"
    def predict(self, text: str) -> str:
        while not pathlib.Path(text).exists():
            time.sleep(0.01)
        return text

class Selfish(Steady):
    name = "selfish"
    def predict(self, text: str) -> str:
        end = time.perf_counter() + {SERVICE_SECONDS}
        while time.perf_counter() < end:
            pass
        return text
"""
VARIABLES = {
    "MODELS": "steady=models:Steady,slow=models:Slow,hold=models:Holding,selfish=models:Selfish",
    "THREADS": str(THREADS),
    "REQUEST_TIMEOUT": "2",
    "MAX_PENDING": "1000",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("overload"), MODELS, **VARIABLES) as service:
        yield service


class Client:
    """One connection at a time, kept alive; sends `body` whenever it is due."""

    def __init__(self, service: Service, path: str, body: bytes) -> None:
        self._service = service
        self._request = b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (
            path.encode(),
            len(body),
            body,
        )
        self._sock: socket.socket | None = None

    def ask(self) -> tuple[Answer, float]:
        """An answer, and the seconds that it took."""
        started = time.monotonic()
        if self._sock is None:
            self._sock = self._service.connect()
        self._sock.sendall(self._request)
        received = b""
        while True:
            data = self._sock.recv(65_536)
            assert data, received
            received += data
            with contextlib.suppress(AssertionError):
                answer, rest = next_answer(received)
                assert not rest
                return answer, time.monotonic() - started

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()


class OpenLoad:
    """Requests that come at a rate, whether or not those before have been answered."""

    def __init__(self, service: Service, path: str, body: bytes, rate: float) -> None:
        self.answers: list[tuple[Answer, float]] = []
        self._free: list[Client] = []
        self._make = partial(Client, service, path, body)
        self._rate = rate

    def run(self) -> None:
        threads: list[threading.Thread] = []
        started = time.monotonic()
        while (elapsed := time.monotonic() - started) < LOAD_SECONDS:
            while len(threads) < elapsed * self._rate:
                threads.append(threading.Thread(target=self._ask))
                threads[-1].start()
            time.sleep(0.005)
        for thread in threads:
            thread.join(LIMIT_SECONDS)
        for client in self._free:
            client.close()
        assert len(self.answers) == len(threads)

    def _ask(self) -> None:
        try:
            client = self._free.pop()
        except IndexError:
            client = self._make()
        self.answers.append(client.ask())
        self._free.append(client)


@contextlib.contextmanager
def watching_health(service: Service) -> Iterator[list[float]]:
    """A balancer that polls /health; yields the seconds that it took each time."""
    seconds: list[float] = []
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(0.02):
            started = time.monotonic()
            assert service.get("/health").json == {"status": "healthy"}
            seconds.append(time.monotonic() - started)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield seconds
    finally:
        ended.set()
        thread.join(LIMIT_SECONDS)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


@pytest.mark.parametrize("factor", [2, 10])
def test_under_overload_as_much_is_served_as_ever(service: Service, factor: int) -> None:
    """At twice and ten times the capacity: goodput stays, the rest is refused at once, nothing comes too late."""
    load = OpenLoad(service, "/steady", b'{"text": "a"}', factor * CAPACITY)
    with watching_health(service) as health_seconds:
        load.run()
    good = [seconds for answer, seconds in load.answers if answer.status == 200]
    refused = [(answer, seconds) for answer, seconds in load.answers if answer.status != 200]
    assert len(good) >= LEAST_GOODPUT * CAPACITY * LOAD_SECONDS
    assert max(good) < 2 + PROMPT_SECONDS
    assert refused
    for answer, _ in refused:
        assert is_problem(answer, 503)
        assert int(answer.headers["retry-after"]) >= 1
    assert quantile([seconds for _, seconds in refused], 0.9) < PROMPT_SECONDS / 2
    assert len(health_seconds) > 10
    assert quantile(health_seconds, 0.9) < PROMPT_SECONDS / 2
    assert max(health_seconds) < PROMPT_SECONDS


def test_a_model_that_keeps_the_interpreter_does_not_keep_health(service: Service) -> None:
    """Both threads compute in Python all the time: /health is answered between."""
    load = OpenLoad(service, "/selfish", b'{"text": "a"}', 2 / SERVICE_SECONDS)
    with watching_health(service) as health_seconds:
        load.run()
    assert {answer.status for answer, _ in load.answers} <= {200, 503}
    assert quantile(health_seconds, 0.9) < PROMPT_SECONDS / 2


def collect(client: Client, results: list[tuple[Answer, float]]) -> None:
    results.append(client.ask())


def ask_at_once(service: Service, path: str, body: bytes, count: int) -> list[tuple[Answer, float]]:
    results: list[tuple[Answer, float]] = []
    clients = [Client(service, path, body) for _ in range(count)]
    threads = [threading.Thread(target=collect, args=(client, results)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
    for client in clients:
        client.close()
    return results


def test_what_would_come_too_late_is_refused_at_once(service: Service) -> None:
    """A model known to take 0.4 s, a deadline of 2 s, two threads: of 40 requests those who can be answered wait."""
    body = b'{"seconds": 0.4}'
    for _ in range(2):
        assert service.request("POST", "/slow", body).status == 200
    results = ask_at_once(service, "/slow", body, 40)
    good = [seconds for answer, seconds in results if answer.status == 200]
    refused = [(answer, seconds) for answer, seconds in results if answer.status == 503]
    assert len(good) + len(refused) == 40
    assert 4 <= len(good) <= 10
    assert quantile([seconds for _, seconds in refused], 0.9) < PROMPT_SECONDS
    assert all(answer.json["detail"] == "The answer would come too late." for answer, _ in refused)
    assert all(1 <= int(answer.headers["retry-after"]) <= 3 for answer, _ in refused)


def test_a_burst_that_takes_longer_than_expected(service: Service) -> None:
    """The service time grows while requests wait: those that it is now too late for are refused, and not run."""
    before = service.metrics()['requests_shed_total{reason="deadline"}']
    results = ask_at_once(service, "/slow", b'{"seconds": 0.7}', 30)
    statuses = sorted(answer.status for answer, _ in results)
    assert set(statuses) <= {200, 503, 504}
    assert statuses.count(200) >= 4
    assert max(seconds for _, seconds in results) < 2 + PROMPT_SECONDS
    assert service.metrics()['requests_shed_total{reason="deadline"}'] > before


def test_more_than_max_pending_are_refused_by_count(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One runs, MAX_PENDING wait, and the next is refused at once; once there is room, it is served."""
    variables = VARIABLES | {"THREADS": "1", "MAX_PENDING": "3", "REQUEST_TIMEOUT": "100", "GRACEFUL_TIMEOUT": "110"}
    with running(tmp_path_factory.mktemp("pending"), MODELS, **variables) as service:
        body = b'{"text": "go"}'
        clients = [Client(service, "/hold", body) for _ in range(4)]
        results: list[tuple[Answer, float]] = []
        threads = [threading.Thread(target=collect, args=(client, results)) for client in clients]
        for thread in threads:
            thread.start()
        service.wait_for_metric("requests_pending", 3)
        assert service.metrics()["requests_in_flight"] == 1
        started = time.monotonic()
        answer = service.request("POST", "/hold", body)
        assert time.monotonic() - started < PROMPT_SECONDS
        assert is_problem(answer, 503)
        assert answer.json["detail"] == "Too many requests are waiting."
        assert answer.headers["retry-after"] == "1"
        assert service.get("/health").status == 200
        assert service.metrics()['requests_shed_total{reason="pending"}'] == 1
        (service.folder / "go").touch()
        for thread in threads:
            thread.join(LIMIT_SECONDS)
        assert [answer.status for answer, _ in results] == [200] * 4
        assert service.request("POST", "/hold", body).status == 200
        for client in clients:
            client.close()


def test_many_balancers_may_ask_at_once(tmp_path: Path) -> None:
    """MAX_PENDING is for predictions: /health is answered to all that ask, however many."""
    with running(tmp_path, MODELS, **(VARIABLES | {"MAX_PENDING": "1"})) as service, contextlib.ExitStack() as stack:
        balancers = [http.client.HTTPConnection("127.0.0.1", service.port, timeout=LIMIT_SECONDS) for _ in range(64)]
        for balancer in balancers:
            stack.callback(balancer.close)
        for _ in range(10):
            for balancer in balancers:
                balancer.request("GET", "/health")
            responses = [balancer.getresponse() for balancer in balancers]
            assert {(response.status, response.read()) for response in responses} == {(200, b'{"status":"healthy"}')}


def test_a_queue_leaves_connections_for_health(tmp_path_factory: pytest.TempPathFactory) -> None:
    """MAX_PENDING is larger than MAX_CONNECTIONS: requests are refused before every connection is taken by one."""
    variables = VARIABLES | {"MAX_CONNECTIONS": "40", "REQUEST_TIMEOUT": "100", "GRACEFUL_TIMEOUT": "110"}
    with (
        running(tmp_path_factory.mktemp("connections"), MODELS, **variables) as service,
        contextlib.ExitStack() as stack,
    ):
        held = []
        for _ in range(37):
            held.append(stack.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port))))
            held[-1].request("POST", "/hold", '{"text": "go"}')
        service.wait_for_metric("requests_pending", 35)
        answer = service.request("POST", "/hold", b'{"text": "go"}')
        assert is_problem(answer, 503)
        assert service.get("/health").status == 200
        (service.folder / "go").touch()
        assert [connection.getresponse().status for connection in held] == [200] * 37
        wait_for(lambda: service.metrics()["requests_pending"] == 0, LIMIT_SECONDS)
