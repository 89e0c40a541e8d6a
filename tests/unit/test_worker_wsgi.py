"""Exchanges by themselves: answers that come later, rather than make a thread wait, and what comes too late."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from inference_api.worker.pool import Outbox
from inference_api.worker.wsgi import MAX_STREAM_BYTES, PIECE_BYTES
from tests.unit.exchanges import exchange, wait_for

NO_FD = -1  # nobody sleeps


class Later:
    """Becomes ready when a test calls `tell`; must not be iterated over before, and must be closed."""

    def __init__(self) -> None:
        self.tell: Callable[[], None] | None = None
        self.is_closed = False

    def when_ready(self, tell: Callable[[], None]) -> None:
        self.tell = tell

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[bytes]:
        yield b"Hello"

    def close(self) -> None:
        self.is_closed = True


class Application:
    """Returns one Later, and may be called once."""

    def __init__(self) -> None:
        self.later = Later()
        self.calls = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self.calls += 1
        start_response("200 OK", [("content-type", "text/plain")])
        return self.later


def is_hello(outbox: Outbox) -> bool:
    ((_, data, is_last),) = outbox.pieces
    assert data is not None
    return is_last and data.startswith(b"HTTP/1.1 200 OK\r\n") and data.endswith(b"Content-Length: 5\r\n\r\nHello")


def test_an_answer_is_sent_when_it_has_come() -> None:
    """The application is called once, and its iterable closed at the end."""
    application, outbox, request = Application(), Outbox(NO_FD), exchange()
    request.place = threading.Lock()
    request.run(application, request.environ, outbox)
    assert request.later is application.later
    request.begin()
    assert application.later.tell is not None
    application.later.tell()
    assert list(outbox.resumed) == [request]
    assert not outbox.pieces and not application.later.is_closed
    request.run(application, request.environ, outbox)
    assert is_hello(outbox)
    assert request.later is None and application.later.is_closed
    assert application.calls == 1
    assert request.waited_seconds > 0


def test_a_thread_of_the_pool_waits_itself() -> None:
    """There the iterable is one like any other."""
    application, outbox, request = Application(), Outbox(NO_FD), exchange()
    request.run(application, request.environ, outbox)
    assert is_hello(outbox)
    assert application.later.tell is None and application.later.is_closed


@pytest.mark.parametrize("is_deferred", [False, True])
def test_an_answer_may_become_another_as_long_as_nothing_has_been_sent(is_deferred: bool) -> None:
    """By start_response() with exc_info, as PEP 3333 says."""

    class Failing(Later):
        def __iter__(self) -> Iterator[bytes]:
            request.start_response("500 Internal Server Error", [("x-failed", "yes")], (OSError, OSError(), None))
            yield b"sorry"

    application, outbox, request = Application(), Outbox(NO_FD), exchange()
    application.later = Failing()
    if is_deferred:
        request.place = threading.Lock()
        request.run(application, request.environ, outbox)
    request.run(application, request.environ, outbox)
    ((_, data, is_last),) = outbox.pieces
    assert data is not None and is_last
    assert data.startswith(b"HTTP/1.1 500 ") and b"x-failed: yes" in data and data.endswith(b"\r\n\r\nsorry")
    assert b"content-type" not in data


def test_nothing_is_sent_after_the_end() -> None:
    """Not even by the application's close(): the connection may be on another request by then."""

    class Writing(Later):
        def close(self) -> None:
            super().close()
            request.write(b"more")

    application, outbox, request = Application(), Outbox(NO_FD), exchange()
    application.later = Writing()
    request.run(application, request.environ, outbox)
    assert is_hello(outbox)
    assert application.later.is_closed


def test_the_end_of_a_run_is_noted() -> None:
    """With its last piece: that is how long the request kept its thread."""

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("content-type", "text/plain")])
        yield b"Hello"
        assert outbox.pieces and not request.ended

    outbox, request, before = Outbox(NO_FD), exchange(), time.monotonic()
    request.run(application, request.environ, outbox)
    assert outbox.pieces[-1] == (request, b"0\r\n\r\n", True)
    assert request.ended >= before


@pytest.mark.parametrize("piece", [b"a", b"a" * 65_536], ids=["small", "large"])
def test_no_more_of_a_stream_is_made_than_waits_to_be_sent(piece: bytes) -> None:
    """Pieces are bounded, not only their bytes: nobody else would have a turn until the socket has taken them all."""
    in_all = 2 * MAX_STREAM_BYTES // PIECE_BYTES
    made: list[bytes] = []

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("content-type", "text/plain")])
        while len(made) < in_all:
            made.append(piece)
            yield piece

    outbox, request = Outbox(NO_FD), exchange()
    running = threading.Thread(target=request.run, args=(application, request.environ, outbox), daemon=True)
    running.start()
    fits = MAX_STREAM_BYTES // (len(piece) + PIECE_BYTES)
    sent = 0
    while running.is_alive():
        wait_for(lambda: len(outbox.pieces) >= fits or not running.is_alive())
        assert len(outbox.pieces) <= fits + 1
        _, data, _ = outbox.pieces.popleft()
        assert data is not None
        request.was_sent(len(data), is_whole=True)
        sent += 1
    assert len(outbox.pieces) <= fits + 2  # its end does not wait
    assert sent + len(outbox.pieces) == in_all + 1
