"""Restarts behind a real balancer, configured by the files in deploy/: no request is lost, counted at the client."""

import contextlib
import http.client
import itertools
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.service import PROJECT, WAIT_SECONDS, Answer, Service, free_port, needed, wait_for

CLIENTS = 16
"""Of each kind: those that keep their connection, and those that take a new one for each request."""
PAUSE_SECONDS = 0.005
SOME_REQUESTS = 50
ADDRESSES = ("10.0.0.11:8000", "10.0.0.12:8000")
SERVED = 'requests_total{method="POST",model="dummy",route="/predict",status="200"}'


class Pair:
    """Two instances of the service, each of which can be replaced by a new one at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folders = [folder / "one", folder / "two"]
        self.instances = [self.start(place, free_port()) for place in (0, 1)]

    def start(self, place: int, port: int) -> Service:
        service = Service(self.folders[place], WEB_CONCURRENCY="2", DRAIN_SECONDS="2", PORT=str(port))
        service.wait_until_ready()
        return service

    def restart(self, place: int) -> None:
        """SIGTERM; once it has ended, start a new one, and wait until the balancer gives it work."""
        old = self.instances[place]
        assert old.terminate() == 0, old.output
        self.instances[place] = self.start(place, old.port)
        self.wait_until_at_work(place)

    def reload(self, place: int) -> None:
        """SIGHUP; wait until all workers are new ones."""
        instance = self.instances[place]
        old = set(instance.workers())
        instance.signal(signal.SIGHUP)
        wait_for(
            lambda: len(instance.workers()) == len(old) and old.isdisjoint(instance.workers()),
            WAIT_SECONDS,
            lambda: instance.output,
        )
        self.wait_until_at_work(place)

    def wait_until_at_work(self, place: int) -> None:
        instance = self.instances[place]
        before = instance.metrics()[SERVED]
        wait_for(lambda: instance.metrics()[SERVED] >= before + SOME_REQUESTS, WAIT_SECONDS, lambda: instance.metrics())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    try:
        for instance in pair.instances:
            instance.process.terminate()
        assert [instance.process.wait(WAIT_SECONDS) for instance in pair.instances] == [0, 0]
    finally:
        for instance in pair.instances:
            instance.kill()


def _haproxy(configuration: str, folder: Path) -> list[str]:
    path = folder / "haproxy.cfg"
    path.write_text(configuration)
    return [needed("haproxy", "haproxy"), "-f", str(path)]


def _nginx(configuration: str, folder: Path) -> list[str]:
    # Where whoever runs the tests may write; the package's own places belong to root.
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {folder};" for kind in kinds)
    path = folder / "nginx.conf"
    path.write_text(configuration.replace("http {", f"http {{ {places}", 1))
    program = [needed("nginx", "nginx-light"), "-c", str(path), "-p", str(folder), "-e", "stderr"]
    return [*program, "-g", f"pid {folder}/pid; daemon off;"]


BALANCERS = {"haproxy.cfg": _haproxy, "nginx.conf": _nginx}


@pytest.fixture(scope="module", params=BALANCERS)
def balancer(request: pytest.FixtureRequest, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a balancer in front of the pair."""
    folder = tmp_path_factory.mktemp("balancer")
    port = free_port()
    configuration = (PROJECT / "deploy" / request.param).read_text()
    places = {
        address: f"127.0.0.1:{instance.port}" for address, instance in zip(ADDRESSES, pair.instances, strict=True)
    }
    for old, new in {
        **places,
        "bind :8080": f"bind 127.0.0.1:{port}",
        "listen 8080": f"listen 127.0.0.1:{port}",
    }.items():
        configuration = configuration.replace(old, new)
    command = BALANCERS[request.param](configuration, folder)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:

        def is_ready() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(OSError):
                return get(port, "/health").status == 200
            return False

        wait_for(is_ready, WAIT_SECONDS, (folder / "log").read_text)
        yield port
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)


def get(port: int, path: str, **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


class Load:
    """Clients that send all the time, each request with a text of its own, and note what was not answered rightly."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answered: list[int] = []
        self.lost: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(f"{kind}-{number}", kind == "new"))
            for kind in ("kept", "new")
            for number in range(CLIENTS)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, name: str, takes_new: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        answered = 0
        for number in itertools.count():
            if self._stop.wait(PAUSE_SECONDS):
                break
            text = f"{name}-{number}"
            body = f'{{"text":"{text}"}}'
            try:
                connection.request("POST", "/predict", body, {"Connection": "close"} if takes_new else {})
                response = connection.getresponse()
                found = (response.status, response.read())
            except (OSError, http.client.HTTPException) as exc:
                self.lost.append(f"{text}: {exc!r}")
                connection.close()
                continue
            if found == (200, f'{{"input":"{text}","prediction":"predicted({text})"}}'.encode()):
                answered += 1
            else:
                self.lost.append(f"{text}: {found}")
        connection.close()
        self.answered.append(answered)


def test_instances_restarted_in_turn_lose_nothing(balancer: int, pair: Pair) -> None:
    """SIGTERM and a new start of one instance after the other: every request is answered, by 200."""
    with Load(balancer) as load:
        for place in (0, 1):
            pair.wait_until_at_work(place)
            pair.restart(place)
    assert load.lost == []
    assert min(load.answered) > 0
    assert len(load.answered) == 2 * CLIENTS


def test_instances_reloaded_in_turn_lose_nothing(balancer: int, pair: Pair) -> None:
    """SIGHUP of one instance after the other: every request is answered, by 200."""
    with Load(balancer) as load:
        for place in (0, 1):
            pair.wait_until_at_work(place)
            pair.reload(place)
    assert load.lost == []
    assert min(load.answered) > 0
    assert len(load.answered) == 2 * CLIENTS


@pytest.mark.parametrize(
    "path",
    ["/metrics", "/docs", "/docs/", "/docs/start.js", "/openapi.json", "/%6detrics", "/metrics?a=b", "/%2e/metrics"],
)
def test_the_public_does_not_see_what_is_internal(balancer: int, path: str) -> None:
    """Neither plain nor encoded is a path of operators and developers answered through the balancer."""
    assert get(balancer, path).status == 404


def test_one_id_goes_all_the_way(balancer: int, pair: Pair) -> None:
    """The client's X-Request-ID comes back and stands in the service's log; without one, a new one does."""
    ids = ["of-the-client.1", get(balancer, "/health").headers["x-request-id"]]
    assert get(balancer, "/health", X_Request_ID=ids[0]).headers["x-request-id"] == ids[0]

    def are_logged() -> bool:
        logged = {line["request_id"] for instance in pair.instances for line in instance.access_lines()}
        return set(ids) <= logged

    wait_for(are_logged, WAIT_SECONDS)
