"""The loop by itself: turns taken one at a time, real sockets, and no thread."""

import os
import re
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from inference_api.config import Settings
from inference_api.logs import LineWriter
from inference_api.metrics import Metrics
from inference_api.worker.connection import MAX_PIPELINED_BYTES, Connection
from inference_api.worker.connections import MIN_BYTES_PER_SECOND
from inference_api.worker.http import RequestParser
from inference_api.worker.loop import READ_BYTES, Loop
from inference_api.worker.pool import LARGE_BYTES

ANSWER_BYTES = 10 * LARGE_BYTES
BODY_BYTES = 10_000
HEAD_BYTES = 200
STREAM_BYTES = 3 * LARGE_BYTES  # which does not make the application wait
REQUEST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
SMALL_REQUEST = REQUEST.replace(b" / ", b" /small ")


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    body = b"a" if environ["PATH_INFO"] == "/small" else b"a" * ANSWER_BYTES
    if environ["PATH_INFO"] == "/stream":
        start_response("200 OK", [])
        return iter([b"a" * STREAM_BYTES])
    start_response(environ.get("HTTP_STATUS", "200 OK"), [("Content-Length", str(len(body)))])
    return [body]


class Turns:
    """A loop, its clients, and how much of its answers has come to each of them."""

    def __init__(self, stack: ExitStack, clients: int) -> None:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.setblocking(False)
        readable, writable = os.pipe()
        stack.callback(os.close, readable)
        stack.callback(os.close, writable)
        parser = RequestParser(max_line_bytes=0, max_fields=100, max_field_bytes=0, max_body_bytes=BODY_BYTES)
        self.loop = Loop(
            listeners=[listener],
            application=application,
            connect=lambda sock, _address, _port: Connection(sock, parser, {}),
            settings=Settings.from_environ({}),
            max_requests=1_000,
            on_max_requests=lambda: None,
            wake_fds=(readable, writable),
            writer=LineWriter(os.open(os.devnull, os.O_WRONLY)),
            metrics=Metrics(["/"]),
            heartbeat=lambda: None,
            is_shutdown=lambda: False,
        )
        stack.callback(os.close, self.loop._writer.fd)
        stack.callback(self._close)
        self.clients = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(clients)]
        self.received = [0] * clients

    def _close(self) -> None:
        for connection in list(self.loop._connections):
            self.loop._connections.close(connection)

    def run(self) -> None:
        """What application threads do in a turn."""
        while self.loop._pool.jobs:
            self.loop._run(self.loop._pool.jobs.popleft())

    def take(self) -> list[int]:
        """One turn; returns how many bytes have come to each client in it."""
        self.loop.receive(may_wait=False)
        self.run()
        self.loop.respond()
        came = [0] * len(self.clients)
        for number, client in enumerate(self.clients):
            try:
                while piece := client.recv(ANSWER_BYTES, socket.MSG_DONTWAIT):
                    came[number] += len(piece)
            except BlockingIOError:
                pass
        self.received = [before + now for before, now in zip(self.received, came, strict=True)]
        return came

    @property
    def begun(self) -> int:
        """How many clients have got more than the head of an answer."""
        return sum(count > HEAD_BYTES for count in self.received)


@pytest.fixture
def turns() -> Iterator[Turns]:
    with ExitStack() as stack:
        yield Turns(stack, clients=3)


def test_large_answers_are_sent_in_turns(turns: Turns) -> None:
    """No client gets more than its share in a turn, and only one more of the answers is begun: others go on, too."""
    turns.loop._pool.size = 3  # nobody has to wait for a thread
    for client in turns.clients:
        client.sendall(REQUEST)
    while min(turns.received) < ANSWER_BYTES:
        begun = turns.begun
        assert max(turns.take()) <= 2 * LARGE_BYTES  # a turn may look at its sockets twice
        assert turns.begun <= begun + 1


def test_large_answers_get_on_alike(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its turn after the others, and as long as several wait for theirs no more are made."""
    monkeypatch.setattr("inference_api.worker.pool.MAX_UNSENT_BYTES", ANSWER_BYTES // 2)
    pool = turns.loop._pool
    pool.size = 3
    for client in turns.clients:
        client.sendall(REQUEST)
    was_full = []
    while min(turns.received) < ANSWER_BYTES:
        turns.take()
        assert max(turns.received) - min(turns.received) <= 4 * LARGE_BYTES
        was_full.append(pool.is_full)
    assert sum(was_full) > ANSWER_BYTES // LARGE_BYTES
    turns.take()
    assert not pool.is_full


def test_small_answers_do_not_wait_for_large_ones(turns: Turns) -> None:
    """They go out in the turn in which they are made."""
    turns.loop._pool.size = 3
    for client, request in zip(turns.clients, (REQUEST, REQUEST, SMALL_REQUEST), strict=True):
        client.sendall(request)
    while turns.loop._requests < len(turns.clients):
        turns.take()
    assert turns.received[2]
    assert max(turns.received) < ANSWER_BYTES


def test_reading_on_puts_the_deadline_off(turns: Turns) -> None:
    """Only what is read fast enough, and what waits for its turn, is not given up where its time is over."""
    loop = turns.loop
    read_timeout = loop._settings.read_timeout
    turns.clients[0].sendall(REQUEST)
    while turns.received[0] < 2 * MIN_BYTES_PER_SECOND * read_timeout:
        turns.take()
    (connection,) = loop._connections.unread
    assert loop._now < connection.expires <= loop._now + read_timeout

    def expire() -> None:
        loop._now += read_timeout
        connection.expires = loop._next_tick = 0.0
        loop.respond()

    expire()  # it has been read
    assert connection.expires == loop._now + read_timeout
    loop._connections.writable[connection] = None
    expire()  # it has not, but that is not the client's fault
    assert connection.expires == loop._now + read_timeout
    loop._connections.writable.clear()
    expire()
    assert connection not in loop._connections


def test_an_answer_ends_the_wait_for_its_client(turns: Turns) -> None:
    """Nothing of it is kept once it has been read, and the connection serves on."""
    for _ in range(2):
        turns.clients[0].sendall(REQUEST)
        begun = turns.received[0]
        while turns.received[0] - begun < ANSWER_BYTES or turns.loop._connections.unread:
            turns.take()
    assert turns.loop._pool.unsent_bytes == 0


def test_a_body_is_not_held_while_its_answer_is_read(turns: Turns) -> None:
    """It is gone by then, and would keep other bodies from being read."""
    body = b"a" * BODY_BYTES
    turns.clients[0].sendall(REQUEST.replace(b"Length: 0", b"Length: %d" % len(body)) + body)
    while not turns.received[0]:
        turns.take()
    assert turns.loop._connections.unread
    assert turns.loop._connections._held_bytes == 0


def test_the_last_of_a_stream_waits_like_other_answers(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nobody in the application waits for it any more."""
    monkeypatch.setattr("inference_api.worker.pool.MAX_UNSENT_BYTES", STREAM_BYTES // 2)
    pool = turns.loop._pool
    pool.size = 3
    for client in turns.clients:
        client.sendall(REQUEST.replace(b" / ", b" /stream "))
    was_full = []
    while min(turns.received) < STREAM_BYTES or turns.loop._connections.unread:
        turns.take()
        was_full.append(pool.is_full)
    assert any(was_full)
    assert not pool.is_full


def test_what_is_still_being_read_at_the_end_is_lost_audibly(turns: Turns, caplog: pytest.LogCaptureFixture) -> None:
    """Of the clients that have been answered, those that have not got all of it count, too."""
    turns.clients[0].sendall(REQUEST)
    turns.clients[1].sendall(SMALL_REQUEST)
    while not all(turns.received[:2]):
        turns.take()
    turns.loop._lifecycle.grace_ends = 0.0
    turns.loop._advance_end()
    assert not turns.loop._connections
    assert [record.__dict__["lost"] for record in caplog.records] == [1]


def test_a_client_that_resets_as_it_is_answered_is_closed(
    turns: Turns, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its answer is small or waits for its turn: its line tells, and it is nobody's fault."""
    statuses: list[int] = []
    monkeypatch.setattr(turns.loop._journal, "record", lambda exchange, _: statuses.append(exchange.status))
    turns.loop._pool.size = 3
    *leaving, staying = turns.clients
    while len(turns.loop._connections) < len(turns.clients):
        turns.take()
    for client, request in zip(leaving, (SMALL_REQUEST, REQUEST), strict=True):
        client.sendall(request)
    while turns.loop._requests < len(leaving):
        turns.loop.receive(may_wait=False)
    for client in leaving:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    turns.run()
    turns.loop.respond()
    turns.clients, turns.received = [staying], [0]
    for _ in range(3):
        turns.take()
    assert len(turns.loop._connections) == 1
    assert not turns.loop._pool.taken
    assert statuses == [499, 499]
    staying.sendall(SMALL_REQUEST)
    while not turns.received[0]:
        turns.take()
    assert not caplog.records


def test_who_sends_no_more_is_answered_all_that_has_come(turns: Turns) -> None:
    """What is complete as what it is, and the beginning of a request as such; then the connection ends."""
    client = turns.clients[0]
    client.sendall(SMALL_REQUEST * 2 + b"POST")
    client.shutdown(socket.SHUT_WR)
    turns.clients, turns.received = turns.clients[1:], [0, 0]
    while turns.loop._requests < 2 or len(turns.loop._connections) > len(turns.clients):
        turns.take()
    answers = b"".join(iter(lambda: client.recv(ANSWER_BYTES), b""))
    assert re.findall(rb"HTTP/1.1 ([0-9]+)", answers) == [b"200", b"200", b"400"]


def test_an_abandoned_application_ends_no_connection(turns: Turns) -> None:
    """Whether a connection is kept has been promised with the answer; its application may still go on."""
    client = turns.clients[0]
    client.sendall(REQUEST)
    while not turns.loop._connections.unread:
        turns.take()
    (answer,) = turns.loop._connections.unread.values()
    answer.exchange.keep_alive = False
    while turns.loop._connections.unread:
        turns.take()
    client.sendall(SMALL_REQUEST)
    while not turns.take()[0] or turns.loop._requests < 2:
        assert len(turns.loop._connections) == len(turns.clients)


@pytest.mark.parametrize(("status", "teaches"), [(200, True), (401, False), (404, False), (422, True), (503, False)])
def test_what_was_not_served_teaches_nothing(turns: Turns, status: int, teaches: bool) -> None:
    """Nobody without a key can fill the places for service times, or have them look shorter."""
    turns.clients[0].sendall(SMALL_REQUEST.replace(b"Host", b"Status: %d A\r\nHost" % status))
    while not turns.received[0]:
        turns.take()
    assert bool(turns.loop._admission._seconds) is teaches


def test_little_is_read_ahead(turns: Turns) -> None:
    """Of a pipeline, however long: what has been sent before is answered first."""
    client = turns.clients[0]
    client.setblocking(False)
    pipeline = SMALL_REQUEST * 20_000
    sent = 0
    while turns.loop._requests < 500:
        with suppress(BlockingIOError):
            sent += client.send(pipeline[sent : sent + READ_BYTES])
        turns.take()
        assert all(len(connection.buffer) <= 2 * MAX_PIPELINED_BYTES for connection in turns.loop._connections)
    assert sent > 2 * MAX_PIPELINED_BYTES
