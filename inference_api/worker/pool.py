"""Application threads: how requests come to them, and how answers come back to the I/O thread."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from inference_api.worker.wsgi import Exchange

LARGE_BYTES = 262_144
"""Pieces of answers that are larger are sent in turns: sockets would take megabytes, and keep all others waiting."""
MAX_LARGE_ANSWERS = 1
"""So many of these may be on their way to the I/O thread: beyond it no thread takes a request, lest memory fill up."""
MAX_UNSENT_BYTES = 16 * 1_048_576
"""What those may hold that wait for their turn, behind the next one: the same goes for these."""

log = logging.getLogger("inference_api.worker")


class Outbox:
    """Pieces of answers on their way to the I/O thread, which is woken for them where it sleeps."""

    def __init__(self, wake_fd: int) -> None:
        self.closing = False  # answers say `Connection: close`
        self.pieces: deque[tuple[Exchange, bytes | None, bool]] = deque()
        self.resumed: deque[Exchange] = deque()  # that were deferred, and are to be run again
        self.is_asleep = False  # the I/O thread, in its selector
        self._wake_fd = wake_fd

    def deliver(self, exchange: Exchange, data: bytes | None, is_last: bool) -> None:
        """Hand a piece of an answer to the I/O thread, from any thread.

        None: the answer cannot be completed and is to be cut off, or the exchange was not run.
        """
        self.pieces.append((exchange, data, is_last))
        if self.is_asleep:
            self.wake()

    def deliver_whole(self, exchange: Exchange, head: bytes, body: bytes) -> None:
        """Hand a whole answer to the I/O thread. A large body is not copied to stand behind its head."""
        if len(body) > LARGE_BYTES and exchange.pool is not None:
            exchange.pool.large[exchange] = body
            self.deliver(exchange, head, True)
        else:
            self.deliver(exchange, head + body, True)

    def resume(self, exchange: Exchange) -> None:
        """Have the I/O thread run an exchange again; from any thread."""
        self.resumed.append(exchange)
        if self.is_asleep:
            self.wake()

    def wake(self) -> None:
        """End the I/O thread's sleep."""
        self.is_asleep = False
        with suppress(BlockingIOError):  # the pipe is full of reasons to wake
            os.write(self._wake_fd, b".")


class Pool:
    """Threads that run requests, in the order in which they came.

    A thread that has nothing to do waits for a lock of its own, so that exactly as many are woken as are of use. The
    I/O thread alone calls the methods, but for `wake` and `serve`.
    """

    def __init__(self, name: str, run: Callable[[Exchange], None]) -> None:
        self.name = name
        self.size = 0
        self.jobs: deque[Exchange] = deque()
        self.taken: dict[Exchange, None] = {}  # that wait or run, in the order in which they came
        self.overdue: set[Exchange] = set()  # of them, those that run past their deadline
        # Each lock is a thread that sleeps: to take it out is to have its place, to release it is to wake it.
        self.idle: list[threading.Lock] = []
        self.large: dict[Exchange, bytes] = {}  # of those taken, which ended with a large answer: its body
        self.unsent_bytes = 0  # of answers that wait for their turn, but for the next one
        self._duties: dict[threading.Lock, Callable[[], None]] = {}  # by the lock of whose it is
        self.run = run

    def grow(self, size: int) -> None:
        """Have at least `size` threads, or as many as can be had."""
        while self.size < size:
            try:
                threading.Thread(target=self.serve, name=f"{self.name}-{self.size + 1}", daemon=True).start()
            except RuntimeError as exc:
                log.error("only %d of %d threads serve: %s", self.size, size, exc)
                break
            self.size += 1

    @property
    def is_full(self) -> bool:
        """Whether large answers are made faster than they are sent."""
        return len(self.large) > MAX_LARGE_ANSWERS or self.unsent_bytes > MAX_UNSENT_BYTES

    @property
    def useful_threads(self) -> int:
        """How many threads can be counted on."""
        return self.size - len(self.overdue)

    def submit(self, exchange: Exchange) -> None:
        """Queue a request; `wake` lets it be run, and its last piece must be followed by `take_back`."""
        exchange.pool = self
        self.taken[exchange] = None
        self.jobs.append(exchange)

    def withdraw(self, exchange: Exchange) -> bool:
        """Take a request that nobody waits for out of the queue; False where a thread has got it already."""
        try:
            self.jobs.remove(exchange)
        except ValueError:
            return False
        del self.taken[exchange]
        return True

    def reserve(self) -> "threading.Lock | None":
        """Keep an idle thread idle, whose place the caller has until it puts that back into `idle`, or into `swap`.

        None if all are busy.
        """
        try:
            return self.idle.pop()
        except IndexError:
            return None

    def swap(self, place: threading.Lock, duty: Callable[[], None]) -> None:
        """Have the thread whose place was reserved do this first: another one is to `serve` in its place."""
        self._duties[place] = duty
        place.release()

    def take_back(self, exchange: Exchange) -> bytes | None:
        """A thread is done with a request; returns the body of its answer, if that is large and still to be sent."""
        del self.taken[exchange]
        self.overdue.discard(exchange)
        return self.large.pop(exchange, None)

    def wake(self) -> None:
        """Wake one idle thread, if there is work for it."""
        if self.jobs and (place := self.reserve()) is not None:
            place.release()

    def serve(self) -> None:
        """Be one of the pool's threads."""
        jobs, idle, duties, monotonic = self.jobs, self.idle, self._duties, time.monotonic
        lock = threading.Lock()
        lock.acquire()
        while True:
            try:
                exchange = None if self.is_full else jobs.popleft()
            except IndexError:
                exchange = None
            if exchange is None:
                idle.append(lock)
                if jobs and not self.is_full:  # they came just now
                    self.wake()
                lock.acquire()
                if lock in duties:
                    duties.pop(lock)()
                continue
            exchange.started = monotonic()
            if jobs:
                self.wake()
            self.run(exchange)
            del exchange  # nothing of a request stays with an idle thread
