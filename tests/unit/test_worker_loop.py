"""The loop by itself: turns taken one at a time, real sockets, and no thread."""

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from inference_api.config import Settings
from inference_api.logs import LineWriter
from inference_api.metrics import Metrics
from inference_api.worker.connection import Connection
from inference_api.worker.http import RequestParser
from inference_api.worker.loop import MIN_READ_BYTES_PER_SECOND, Loop
from inference_api.worker.pool import LARGE_BYTES

ANSWER_BYTES = 10 * LARGE_BYTES
REQUEST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
SMALL_REQUEST = REQUEST.replace(b" / ", b" /small ")


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    body = b"a" if environ["PATH_INFO"] == "/small" else b"a" * ANSWER_BYTES
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


class Turns:
    """A loop, its clients, and how much of its answers has come to each of them."""

    def __init__(self, stack: ExitStack, clients: int) -> None:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.setblocking(False)
        readable, writable = os.pipe()
        stack.callback(os.close, readable)
        stack.callback(os.close, writable)
        parser = RequestParser(max_line_bytes=0, max_fields=100, max_field_bytes=0, max_body_bytes=1)
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
            heartbeat=lambda: True,
            is_shutdown=lambda: False,
        )
        stack.callback(os.close, self.loop._writer.fd)
        stack.callback(self._close)
        self.clients = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(clients)]
        self.received = [0] * clients

    def _close(self) -> None:
        for connection in list(self.loop._connections):
            self.loop._connections.close(connection)

    def take(self) -> list[int]:
        """One turn; returns how many bytes have come to each client in it."""
        self.loop.receive(may_wait=False)
        while self.loop._pool.jobs:
            self.loop._run(self.loop._pool.jobs.popleft())
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
        begun = sum(map(bool, turns.received))
        assert max(turns.take()) <= 2 * LARGE_BYTES  # a turn may look at its sockets twice
        assert sum(map(bool, turns.received)) <= begun + 1


def test_large_answers_get_on_alike(turns: Turns) -> None:
    """Each has its turn after the others, and as long as several wait for theirs no more are made."""
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
    """By what is read, and never to more than READ_TIMEOUT from now."""
    read_timeout = turns.loop._settings.read_timeout
    turns.clients[0].sendall(REQUEST)
    while not turns.received[0]:
        turns.take()
    (connection,) = (each for each in turns.loop._connections if each.unread is not None)
    assert connection.expires == turns.loop._now + read_timeout
    connection.expires = turns.loop._now + 0.5
    before, received = connection.expires, turns.received[0]
    while turns.received[0] == received:
        turns.take()
    seconds = LARGE_BYTES / MIN_READ_BYTES_PER_SECOND
    assert before + seconds / 2 < connection.expires <= before + 2 * seconds < turns.loop._now + read_timeout
    while connection.unread is not None:
        turns.take()
    assert turns.received[0] > ANSWER_BYTES
