"""Clients that misbehave: idle, slow, greedy, gone. Each costs a socket and a buffer; others are served meanwhile."""

import contextlib
import os
import resource
import selectors
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.live.service import (
    Answer,
    Service,
    answers,
    is_problem,
    next_answer,
    post_request,
    read_to_end,
    running,
    wait_for,
)

READ_TIMEOUT = 3
KEEP_ALIVE = 2
MAX_CONNECTIONS = 300
PROMPT_SECONDS = 2.0
"""Generous, for machines that are busy with other things; well below what an attack that works would cost."""
LIMIT_SECONDS = 30
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

class Holding:
    name, version = "holding", "1"
    def predict(self, name: str) -> str:
        while not pathlib.Path(name).exists():
            time.sleep(0.01)
        return name

class Large:
    name, version = "large", "1"
    def predict(self, size: int) -> str:
        return "x" * size
"""
VARIABLES = {
    "MODELS": "predict=inference_api.model:DummyModel,wait=models:Waiting,hold=models:Holding,large=models:Large",
    "READ_TIMEOUT": str(READ_TIMEOUT),
    "KEEP_ALIVE": str(KEEP_ALIVE),
    "MAX_CONNECTIONS": str(MAX_CONNECTIONS),
    "REQUEST_TIMEOUT": "20",
}
LARGE_BYTES = 8_000_000
HEALTH = b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("clients"), MODELS, **VARIABLES) as service:
        yield service


@pytest.fixture
def service(shared: Service) -> Iterator[Service]:
    """The service, which after each test serves, holds nothing of the test, and has logged no failure."""
    log_length, workers = len(shared.log()), shared.workers()
    yield shared
    serves_promptly(shared)
    shared.wait_for_metric("connections", 0)  # as of a moment between two scrapes
    shared.wait_for_metric("requests_in_flight", 0)
    shared.wait_for_metric("requests_pending", 0)
    assert shared.workers() == workers
    log = shared.log()[log_length:]
    assert not [line for line in log if line["level"] in ("ERROR", "CRITICAL") or line.get("status") == 500]
    assert "Traceback" not in shared.output


def serves_promptly(service: Service) -> None:
    started = time.monotonic()
    assert service.get("/health").status == 200
    assert service.post("/predict", {"text": "a"}).json == {"input": "a", "prediction": "predicted(a)"}
    assert time.monotonic() - started < PROMPT_SECONDS


@contextlib.contextmanager
def clients(service: Service, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(service.connect()) for _ in range(count)]


def is_open(client: socket.socket) -> bool:
    """Whether the server has left the connection open without a word."""
    client.setblocking(False)
    try:
        data = client.recv(65_536)
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    finally:
        client.setblocking(True)
    assert data == b"", data
    return False


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def calls(service: Service) -> list[str]:
    path = service.folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def release(service: Service, name: str) -> None:
    (service.folder / name).touch()


@contextlib.contextmanager
def busy(service: Service, name: str) -> Iterator[list[socket.socket]]:
    """Both application threads are in the model, until the end."""
    with clients(service, 2) as held:
        before = len(calls(service))
        for client in held:
            client.sendall(post_request("/wait", b'{"name": "%b"}' % name.encode()))
        wait_for(lambda: len(calls(service)) == before + 2, LIMIT_SECONDS)
        try:
            yield held
        finally:
            release(service, name)
        for client in held:
            assert answer_of(client).status == 200


def answer_of(client: socket.socket, received: bytes = b"") -> Answer:
    """The next answer, of which nothing else has come."""
    while b"\r\n\r\n" not in received or not _is_whole(received):
        data = client.recv(65_536)
        assert data, received
        received += data
    answer, rest = next_answer(received)
    assert rest == b""
    return answer


def _is_whole(received: bytes) -> bool:
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return len(body) >= int(length.split(b":")[1])


@pytest.mark.parametrize("count", [6, MAX_CONNECTIONS + 100])
def test_idle_connections_hold_nothing_up(service: Service, count: int) -> None:
    """However many connections say nothing, others are served; above the bound the longest idle ones are closed."""
    with clients(service, count) as idle:
        serves_promptly(service)
        if count > MAX_CONNECTIONS:
            # Those accepted in one turn of the loop are as old as each other.
            assert not any(is_open(client) for client in idle[: count - MAX_CONNECTIONS - 40])
            assert sum(is_open(client) for client in idle) < MAX_CONNECTIONS
        # Nothing is said to them when their time is up, either.
        wait_for(lambda: not any(is_open(client) for client in idle), LIMIT_SECONDS)


def test_the_longest_idle_connection_makes_room(service: Service) -> None:
    """At the bound, a connection that was used lately stays, one that was not goes."""
    with clients(service, MAX_CONNECTIONS) as idle:
        idle[0].sendall(HEALTH)
        assert answer_of(idle[0]).status == 200
        with clients(service, 5) as new:
            for client in new:
                client.sendall(HEALTH)
                assert answer_of(client).status == 200
            assert is_open(idle[0])
            closed = [index for index, client in enumerate(idle) if not is_open(client)]
            assert 5 <= len(closed) <= 7  # there may have been connections of the tests before
            assert max(closed) < 40  # those accepted together are as old as each other


DRIPS: Sequence[Callable[[int], bytes]] = (
    lambda n: b"A",
    lambda n: (b"GET /health HTTP/1.1\r\nHost: h\r\n" + b"X: y\r\n" * 1_000)[n : n + 1],
    lambda n: post_request("/predict", b'{"text": "' + b"a" * 1_000)[: 80 + n][0 if n == 0 else -1 :],
    lambda n: b"POST /predict HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" if n == 0 else b"1\r\n \r\n",
)
"""What a client sends at each step: its request line, its headers, its body, its chunks."""


def test_requests_that_drip_are_cut_off(service: Service) -> None:
    """200 clients send a little now and then: each gets one 408 by READ_TIMEOUT, and others are served meanwhile."""
    before = len(service.access_lines())
    with clients(service, 200) as dripping:

        def drip(step: int) -> None:
            for index, client in enumerate(dripping):
                client.sendall(DRIPS[index % len(DRIPS)](step))

        started = time.monotonic()
        step = 0
        while time.monotonic() - started < READ_TIMEOUT - PROMPT_SECONDS / 2:
            drip(step)
            step += 1
            serves_promptly(service)
            time.sleep(0.2)
        with contextlib.suppress(OSError):
            drip(step)
        for client in dripping:
            (answer,) = answers(read_to_end(client))
            assert is_problem(answer, 408)
            assert answer.headers["connection"] == "close"
        assert READ_TIMEOUT - 1 < time.monotonic() - started < READ_TIMEOUT + PROMPT_SECONDS
    wait_for(lambda: len([x for x in service.access_lines()[before:] if x["status"] == 408]) == 200, LIMIT_SECONDS)


def test_an_answer_that_is_not_read_is_cut_off(service: Service) -> None:
    """Clients that take their large answer a little at a time are closed by the write deadline, others served."""
    body = b'{"size": %d}' % LARGE_BYTES
    with contextlib.ExitStack() as stack:
        slow = []
        for _ in range(8):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            client.connect(("127.0.0.1", service.port))
            client.sendall(post_request("/large", body))
            slow.append(client)
        started = time.monotonic()
        received = [0] * len(slow)
        while time.monotonic() - started < READ_TIMEOUT:
            for index, client in enumerate(slow):
                client.settimeout(LIMIT_SECONDS)
                received[index] += len(client.recv(100))
            serves_promptly(service)
            time.sleep(0.3)
        assert all(received)
        # What is read now is what the kernels hold; the rest does not come.
        service.wait_for_metric("connections", 0)
        cut_off = [line for line in service.settled_log() if line["message"] == "an answer was not read in time"]
        assert [line["path"] for line in cut_off] == ["/large"] * len(slow)
        for client in slow:
            assert read_on(client) < LARGE_BYTES
        with service.connect() as reader:
            reader.sendall(post_request("/large", body, b"Connection: close"))
            (answer,) = answers(read_to_end(reader))
        assert len(answer.json["prediction"]) == LARGE_BYTES


def test_an_answer_that_is_read_steadily_comes_whole(service: Service) -> None:
    """However long it takes: the write deadline is for clients that do not go on."""
    seconds = 2.5 * READ_TIMEOUT
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        client.connect(("127.0.0.1", service.port))
        client.sendall(post_request("/large", b'{"size": %d}' % LARGE_BYTES, b"Connection: close"))
        came = b""
        started = time.monotonic()
        while data := client.recv(65_536):
            came += data
            time.sleep(max(0.0, started + seconds * len(came) / LARGE_BYTES - time.monotonic()))
    (answer,) = answers(came)
    assert len(answer.json["prediction"]) == LARGE_BYTES


def test_large_answers_come_whole_to_many_who_read_them(service: Service) -> None:
    """Together they are more than a worker may hold; none is given up, and /health is answered meanwhile."""
    body = b'{"size": %d}' % LARGE_BYTES
    with clients(service, 40) as readers:
        came = [0] * len(readers)

        def read(number: int) -> None:
            came[number] = read_on(readers[number])

        for reader in readers:
            reader.sendall(post_request("/large", body, b"Connection: close"))
        reading = [threading.Thread(target=read, args=(number,)) for number in range(len(readers))]
        for thread in reading:
            thread.start()
        while any(thread.is_alive() for thread in reading):
            started = time.monotonic()
            assert service.get("/health").status == 200
            assert time.monotonic() - started < PROMPT_SECONDS
    assert min(came) > LARGE_BYTES
    assert len(set(came)) == 1


def read_on(client: socket.socket) -> int:
    """How many bytes still come."""
    count = 0
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(1_048_576):
            count += len(data)
    return count


def test_clients_that_never_close_are_not_waited_for(service: Service) -> None:
    """50 clients ask for the connection to be closed and keep their end open: nobody else notices."""
    with clients(service, 50) as open_ended:
        for client in open_ended:
            client.sendall(post_request("/predict", b'{"text": "a"}', b"Connection: close"))
            serves_promptly(service)
        for client in open_ended:
            (answer,) = answers(read_to_end(client))
            assert answer.status == 200
        service.wait_for_metric("connections", 0)


@pytest.mark.parametrize("leave", [reset, socket.socket.close], ids=["reset", "close"])
def test_clients_that_leave_at_any_moment(service: Service, leave: Callable[[socket.socket], None]) -> None:
    """They leave before, during and after their requests: nothing fails, and what they held is free again."""
    name = f"leave-{leave.__name__}"
    requests = [
        b"",
        b"POST",
        post_request("/predict", b'{"text": "a"}')[:-3],
        post_request("/predict", b'{"text": "a"}'),
        HEALTH,
    ]
    for request in requests * 20:
        client = service.connect()
        client.sendall(request)
        leave(client)
    for request in requests[3:] * 20:  # after the answer
        client = service.connect()
        client.sendall(request)
        assert answer_of(client).status == 200
        leave(client)
    # While the model runs: its thread comes back when the model does.
    before = len(calls(service))
    running_clients = [service.connect() for _ in range(2)]
    for client in running_clients:
        client.sendall(post_request("/wait", b'{"name": "%b"}' % name.encode(), b"X-Request-ID: " + name.encode()))
    wait_for(lambda: len(calls(service)) == before + 2, LIMIT_SECONDS)
    for client in running_clients:
        leave(client)
    release(service, name)
    wait_for(lambda: len([x for x in service.access_lines() if x["request_id"] == name]) == 2, LIMIT_SECONDS)


@pytest.mark.parametrize("leave", [reset, socket.socket.close], ids=["reset", "close"])
def test_the_model_is_not_called_for_those_who_left(service: Service, leave: Callable[[socket.socket], None]) -> None:
    """A client that leaves while its request waits for a thread: the model never sees it, the log says 499 once."""
    name = f"left-{leave.__name__}"
    gone = service.metrics().get("requests_gone_total", 0)
    with busy(service, name):
        waiting = [service.connect() for _ in range(20)]
        for client in waiting:
            client.sendall(post_request("/wait", b'{"name": "unwanted"}', b"X-Request-ID: " + name.encode()))
        service.wait_for_metric("requests_pending", 20)
        for client in waiting:
            leave(client)
        service.wait_for_metric("requests_pending", 0)
        assert service.metrics()["requests_gone_total"] == gone + 20
    assert "unwanted" not in calls(service)
    lines = [line for line in service.settled_log() if line.get("request_id") == name]
    assert [line["status"] for line in lines] == [499] * 20


@pytest.mark.parametrize("leave", [reset, socket.socket.close], ids=["reset", "close"])
def test_the_model_is_not_called_for_what_stands_behind(
    service: Service, leave: Callable[[socket.socket], None]
) -> None:
    """Nor for the second of two requests that were sent at once, by a client that leaves while the first one runs."""
    name = f"behind-{leave.__name__}"
    first, second = (
        post_request("/wait", b'{"name": "%b"}' % each.encode(), b"X-Request-ID: " + each.encode())
        for each in (name, f"{name}-2")
    )
    client = service.connect()
    client.sendall(first + second)
    wait_for(lambda: name in calls(service), LIMIT_SECONDS)
    leave(client)
    release(service, name)
    wait_for(lambda: any(line["request_id"] == name for line in service.access_lines()), LIMIT_SECONDS)
    assert service.post("/predict", {"text": "a"}).status == 200
    lines = [line["status"] for line in service.settled_log() if line.get("request_id") == f"{name}-2"]
    assert lines == ([499] if leave is socket.socket.close else [])  # behind a reset it has not been looked at
    assert f"{name}-2" not in calls(service)


def test_the_model_is_not_called_for_what_waits_behind(service: Service) -> None:
    """Nor where the client has only closed its half, and leaves while the second one waits for a thread."""
    first, second = (
        post_request("/wait", b'{"name": "%b"}' % name, b"X-Request-ID: " + name) for name in (b"half", b"half-2")
    )
    with service.connect() as client, clients(service, 2) as others:
        client.sendall(first + second)
        wait_for(lambda: "half" in calls(service), LIMIT_SECONDS)
        for other in others:  # one of them takes the other thread, and one the thread of the first
            other.sendall(post_request("/wait", b'{"name": "others"}'))
        service.wait_for_metric("requests_pending", 1)
        client.shutdown(socket.SHUT_WR)
        release(service, "half")
        assert answer_of(client).status == 200
        wait_for(lambda: calls(service).count("others") == 2, LIMIT_SECONDS)
        service.wait_for_metric("requests_pending", 1)
        reset(client)
        service.wait_for_metric("requests_pending", 0)
        release(service, "others")
        assert [answer_of(other).status for other in others] == [200] * 2
    lines = [line["status"] for line in service.settled_log() if line.get("request_id") == "half-2"]
    assert lines == [499]
    assert "half-2" not in calls(service)


def test_half_closed_clients_get_their_answers(service: Service) -> None:
    """A client may close its sending half after the request: where a thread is free, it is answered."""
    for request in (post_request("/predict", b'{"text": "a"}'), HEALTH):
        (answer,) = answers(service.raw(request, half_close=True))
        assert answer.status == 200


def memory_bytes(service: Service) -> int:
    (worker,) = service.workers()
    return int(Path(f"/proc/{worker}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_large_bodies_that_never_end_fill_no_memory(service: Service) -> None:
    """250 clients send 1 MiB but for the last byte: no more than a bounded part is taken in, others are served.

    Whoever was not read on is told to come again, rather than that it was slow.
    """
    size = 1_048_576
    request = post_request("/predict", b" " * size)[:-1]
    before = memory_bytes(service)
    with clients(service, 250) as greedy, selectors.DefaultSelector() as selector:
        left = {client: memoryview(request) for client in greedy}
        for client in greedy:
            client.setblocking(False)
            left[client] = left[client][client.send(request[:100]) :]
            selector.register(client, selectors.EVENT_WRITE, client)
        started, most = time.monotonic(), 0
        while time.monotonic() - started < READ_TIMEOUT - PROMPT_SECONDS:
            for key, _ in selector.select(0.1):
                with contextlib.suppress(BlockingIOError):
                    left[key.data] = left[key.data][key.data.send(left[key.data]) :]
                if not left[key.data]:
                    selector.unregister(key.data)
            most = max(most, memory_bytes(service))
        assert most - before < 160 * size
        serves_promptly(service)
        statuses = set()
        for client in greedy:
            client.setblocking(True)
            (answer,) = answers(read_to_end(client))
            statuses.add(answer.status)
            assert is_problem(answer, 503 if "retry-after" in answer.headers else 408)  # 503: for want of memory
        assert 503 in statuses


def test_a_pipeline_fills_no_memory_and_holds_nobody_up(tmp_path: Path) -> None:
    """Ten thousand requests, sent as fast as they are taken: each is answered, and few of them are read ahead."""
    count, body = 10_000, b'{"text": "%b"}' % (b"x" * 2_000)
    requests = post_request("/predict", body) * (count - 1) + post_request("/predict", body, b"Connection: close")
    with running(tmp_path, ACCESS_LOG="off") as service, service.connect() as client:
        before = most = memory_bytes(service)
        sender = threading.Thread(target=client.sendall, args=(requests,))
        sender.start()
        received, deadline = bytearray(), time.monotonic() + LIMIT_SECONDS
        while data := client.recv(65_536):
            received += data
            most = max(most, memory_bytes(service))
            assert time.monotonic() < deadline
        sender.join()
        assert received.count(b"HTTP/1.1 200 OK\r\n") == received.count(b'"prediction":"predicted(') == count
        assert most - before < 8 * 1_048_576


def test_chunks_of_a_byte_hold_nobody_up(service: Service) -> None:
    """16 clients send bodies of 400,000 chunks: all are read, refused in the end, and others served meanwhile."""
    body = b"1\r\n \r\n" * 400_000 + b"0\r\n\r\n"
    request = b"POST /predict HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + body
    with clients(service, 16) as many:
        threads = [threading.Thread(target=client.sendall, args=(request,)) for client in many]
        for thread in threads:
            thread.start()
        for _ in range(20):
            serves_promptly(service)
        for client in many:
            (answer,) = answers(read_to_end(client))
            assert is_problem(answer, 400) or is_problem(answer, 408)
        for thread in threads:
            thread.join()


def test_refused_bodies_are_not_kept(service: Service) -> None:
    """Nearly 1 MiB of a chunked body and then nonsense, 200 times: no memory is held while the connections linger."""
    size = 1_000_000
    request = b"POST /predict HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % size + b" " * size
    before = memory_bytes(service)
    with clients(service, 200) as many:
        for client in many:
            client.sendall(request + b"nonsense")
            (answer,) = answers(read_to_end(client))
            assert is_problem(answer, 400)
        assert memory_bytes(service) - before < 50 * size


def test_many_large_bodies_at_once_all_arrive(service: Service) -> None:
    """Bodies that together are larger than the bound are read a few at a time, and all are answered."""
    text = b"a" * 900_000
    request = post_request("/predict", b'{"text": "%b"}' % text)
    statuses = []

    def send(client: socket.socket) -> None:
        client.sendall(request)
        statuses.append(answer_of(client).status)

    with clients(service, 100) as many:
        threads = [threading.Thread(target=send, args=(client,)) for client in many]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses == [422] * 100  # longer than the model takes: read as a whole, and refused


def test_a_refusal_that_nobody_reads_is_logged(service: Service) -> None:
    """The client has gone while its first request was answered; what it sent after it gets its line all the same."""

    def lines() -> list[int]:
        """The statuses of all lines so far, those of other tests after their last one."""
        told = service.access_lines()
        first = next((at for at, line in enumerate(told) if line["request_id"] == "nobody-reads"), len(told))
        return [line["status"] for line in told[first:]]

    service.request("GET", "/health", headers={"X-Request-ID": "nobody-reads"})
    for _ in range(5):
        with service.connect() as client:
            client.sendall(HEALTH + b"nonsense\r\n\r\n")
    wait_for(lambda: len(lines()) == 11, LIMIT_SECONDS)
    assert sorted(lines()) == [200] * 6 + [400] * 5


def test_a_request_at_the_moment_of_the_idle_close(service: Service) -> None:
    """It is answered as a whole, or the connection closed before any byte of an answer."""
    request = post_request("/predict", b'{"text": "a"}', b"X-Request-ID: at-the-close", b"Connection: close")
    outcomes = []
    with clients(service, 120) as idle:
        started = time.monotonic()
        for index, client in enumerate(idle):
            due = started + KEEP_ALIVE - 0.15 + 0.3 * index / len(idle)
            time.sleep(max(0.0, due - time.monotonic()))
            received = b""
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(request)
                received = read_to_end(client)
            outcomes.append([answer.status for answer in answers(received)])
    answered = outcomes.count([200])
    assert answered + outcomes.count([]) == 120
    lines = [line for line in service.settled_log() if line.get("request_id") == "at-the-close"]
    assert len(lines) == answered


def test_more_busy_connections_than_allowed_wait_for_their_turn(tmp_path: Path) -> None:
    """At MAX_CONNECTIONS busy ones accepting pauses; those who knocked meanwhile are served afterwards."""
    variables = VARIABLES | {"MAX_CONNECTIONS": "10", "THREADS": "10"}
    with running(tmp_path, MODELS, **variables) as service:
        results = knock(service, 25, "wait", lambda: len(calls(service)) == 10)
        assert results == [200] * 25
        assert service.get("/health").status == 200


def test_pipelined_requests_are_not_cut_off_for_room(tmp_path: Path) -> None:
    """Between two of them a connection is not idle: who knocks meanwhile has to wait until it is."""
    count = 900
    with running(tmp_path, MODELS, **VARIABLES | {"MAX_CONNECTIONS": "1"}) as service, service.connect() as client:
        ends = time.monotonic() + 0.5
        while time.monotonic() < ends:  # then the service knows the model to be quick
            client.sendall(post_request("/predict", b'{"text": "a"}'))
            assert answer_of(client).status == 200
        client.sendall(post_request("/predict", b'{"text": "a"}') * count)
        with service.connect() as other:
            other.sendall(HEALTH)
            assert [answer.status for answer in answers(read_to_end(client))] == [200] * count
            assert answer_of(other).status == 200


def test_a_newcomer_takes_the_place_of_one(tmp_path: Path) -> None:
    """At MAX_CONNECTIONS no more idle connections are closed than others are let in."""
    with running(tmp_path, MAX_CONNECTIONS="10") as service, clients(service, 10) as many:
        for client in many:
            client.sendall(HEALTH)
            assert answer_of(client).status == 200
        with clients(service, 3) as newcomers:
            for newcomer in newcomers:
                newcomer.sendall(HEALTH)
                assert answer_of(newcomer).status == 200
            assert [is_open(client) for client in many] == [False] * 3 + [True] * 7


@pytest.mark.parametrize(
    "beginning", [b"POST /predict HTTP/1.1\r\nHost: h\r\n", post_request("/predict", b" " * 1_000_000)[:900]]
)
def test_requests_that_do_not_come_make_room(tmp_path: Path, beginning: bytes) -> None:
    """Beginnings of requests take all connections, and ever more of them come: the oldest make room for others."""
    with (
        running(tmp_path, MAX_CONNECTIONS="50", READ_TIMEOUT="100") as service,
        clients(service, 50) as many,
        contextlib.ExitStack() as stack,
    ):
        for client in many:
            client.sendall(beginning)
        deadline = time.monotonic() + LIMIT_SECONDS
        while not any(line["status"] == 408 for line in service.access_lines()):
            stack.enter_context(service.connect()).sendall(beginning)
            assert service.get("/health").status == 200
            assert service.post("/predict", {"text": "a"}).status == 200
            assert time.monotonic() < deadline


def test_answers_that_are_not_read_make_room(tmp_path: Path) -> None:
    """Nor can clients that read nothing keep others out by taking all connections."""
    variables = VARIABLES | {"MAX_CONNECTIONS": "10", "READ_TIMEOUT": "100"}
    with running(tmp_path, MODELS, **variables) as service, clients(service, 10) as many:
        for client in many:
            client.sendall(post_request("/large", b'{"size": %d}' % LARGE_BYTES))
        wait_for(lambda: len(service.access_lines()) >= 10, LIMIT_SECONDS)
        for _ in range(3):
            with service.connect() as newcomer:
                newcomer.sendall(HEALTH)
                assert answer_of(newcomer).status == 200
        given_up = [line for line in service.settled_log() if line["message"].startswith("an answer is given up")]
        assert [line["path"] for line in given_up] == ["/large"] * len(given_up)
        assert 0 < len(given_up) < 10


def test_running_out_of_descriptors_does_not_end_the_worker(tmp_path: Path) -> None:
    """With 40 descriptors: idle connections make room, busy ones make accepting pause, and nobody is turned away."""
    with running(tmp_path, MODELS, **VARIABLES, THREADS="60") as service:
        (worker,) = service.workers()
        before = descriptors(worker)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (40, 40))
        with clients(service, 100):
            serves_promptly(service)
            assert descriptors(worker) <= 40
        assert knock(service, 60, "hold", lambda: descriptors(worker) == 40) == [200] * 60
        assert service.get("/health").status == 200
        assert service.workers() == [worker]
        assert len([line for line in service.settled_log() if line["message"].startswith("accepting pauses")]) == 1
        wait_for(lambda: descriptors(worker) <= before, LIMIT_SECONDS)


def descriptors(worker: int) -> int:
    return len(list(Path(f"/proc/{worker}/fd").iterdir()))


def with_descriptors(service: Service, limits: tuple[int, int]) -> int:
    """Have a new worker start with these soft and hard limits; returns its process id."""
    resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE, limits)
    (before,) = service.workers()
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: service.workers() not in ([before], []), LIMIT_SECONDS)
    service.wait_until_ready()
    return service.workers()[0]


@pytest.mark.parametrize(("hard", "warnings"), [(4_096, 0), (80, 1)])
def test_as_many_descriptors_may_be_open_as_are_needed(tmp_path: Path, hard: int, warnings: int) -> None:
    """The limit is raised for MAX_CONNECTIONS as far as it may be; the log says where that is not enough."""
    with running(tmp_path, PRELOAD="false", MAX_CONNECTIONS="100") as service:
        with_descriptors(service, (50, hard))
        with clients(service, 100 if not warnings else 40) as many:
            for client in many:
                client.sendall(HEALTH)
                assert answer_of(client).status == 200
            assert all(map(is_open, many))
        lines = [line for line in service.settled_log() if line["message"].startswith("too few files")]
        assert [(line["limit"], line["needed"]) for line in lines] == [(hard, 124)] * warnings


def test_connections_leave_descriptors_to_the_model(tmp_path: Path) -> None:
    """Where fewer files may be open than MAX_CONNECTIONS needs, fewer are let in, and the model may open its own."""
    with running(tmp_path, MODELS, **(VARIABLES | {"PRELOAD": "false"})) as service:
        worker = with_descriptors(service, (60, 60))

        def is_full() -> bool:
            refused = [x for x in service.access_lines() if x["path"] == "/wait" and x["status"] == 503]
            return bool(refused) or descriptors(worker) == 60

        statuses = knock(service, 60, "wait", is_full)
    assert set(statuses) == {200, 503}  # 500 where it finds none left


def knock(service: Service, count: int, model: str, is_full: Callable[[], bool]) -> Sequence[int]:
    """So many clients wait in the model at once, until nobody more gets in; returns their statuses once released."""
    with contextlib.ExitStack() as stack:
        many = []
        for _ in range(count):
            many.append(stack.enter_context(service.connect()))
            many[-1].sendall(post_request(f"/{model}", b'{"name": "released"}', b"Connection: close"))
        wait_for(is_full, LIMIT_SECONDS)
        release(service, "released")
        return [answer.status for client in many for answer in answers(read_to_end(client))]
