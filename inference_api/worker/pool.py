"""Application threads: how requests come to them, and how answers come back to the I/O thread."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from inference_api.worker.wsgi import Exchange

QUICK_SECONDS = 0.0003
"""Requests expected to take less are run one after the other by one thread: waking a second one would cost more."""
REST_SECONDS = 0.001


def is_quick(exchange: Exchange) -> bool:
    """Whether it is known to take next to no time."""
    return 0.0 < exchange.cost < QUICK_SECONDS


class Outbox:
    """Pieces of answers on their way to the I/O thread, which is woken for them where it sleeps."""

    def __init__(self, jobs: deque[Exchange], wake_fd: int) -> None:
        self.closing = False  # answers say `Connection: close`
        self.pieces: deque[tuple[Exchange, bytes | None, bool]] = deque()
        self.is_asleep = False  # the I/O thread, in its selector
        self._is_awaiting = False  # the I/O thread, a thread's coming to rest
        self._rest = threading.Lock()
        self._rest.acquire()
        self._jobs = jobs
        self._wake_fd = wake_fd

    # For application threads.

    def deliver(self, exchange: Exchange, data: bytes | None, is_last: bool) -> None:
        """Hand a piece of an answer to the I/O thread."""
        if is_last:
            exchange.ended = time.monotonic()
        self.pieces.append((exchange, data, is_last))
        # Answers of quick requests are collected together, in `flush`.
        if self.is_asleep and not (self._jobs and is_quick(exchange)):
            self.is_asleep = False
            self.wake()

    def flush(self) -> None:
        """Called by a thread that comes to rest, or to a request that takes its time."""
        if self._is_awaiting:
            self._is_awaiting = False
            with suppress(RuntimeError):  # two threads came to rest at once
                self._rest.release()
        elif self.pieces and self.is_asleep:
            self.is_asleep = False
            self.wake()

    def wake(self) -> None:
        """End the I/O thread's sleep."""
        with suppress(BlockingIOError):  # the pipe is full of reasons to wake
            os.write(self._wake_fd, b".")

    # For the I/O thread.

    def hand_over(self, pool: "Pool") -> None:
        """Let a thread begin with what has been submitted, and wait a moment for it where that is quick.

        While it runs, the I/O thread could only compete with it for the interpreter, at the price of two context
        switches for each system call.
        """
        try:
            self._is_awaiting = is_quick(pool.jobs[-1])
        except IndexError:  # there is nothing, or a busy thread has just taken it
            return
        if pool.wake() and self._is_awaiting and not self._rest.acquire(timeout=REST_SECONDS):
            pool.wake()  # it is not as quick as it was thought to be
        self._is_awaiting = False


class Pool:
    """Threads that run requests, in the order in which they came.

    A thread that has nothing to do waits for a lock of its own, so that exactly as many are woken as are of use. The
    I/O thread alone calls the methods, but for `wake`.
    """

    def __init__(
        self, name: str, jobs: deque[Exchange], run: Callable[[Exchange], None], flush: Callable[[], None]
    ) -> None:
        self.name = name
        self.size = 0
        self.jobs = jobs
        self.taken = 0  # exchanges that wait or run
        self.overdue: set[Exchange] = set()  # of those, the ones that run past their deadline
        self._idle: list[threading.Lock] = []
        self._run = run
        self._flush = flush

    def grow(self, size: int) -> None:
        """Have at least `size` threads."""
        while self.size < size:
            self.size += 1
            threading.Thread(target=self._serve, name=f"{self.name}-{self.size}", daemon=True).start()

    @property
    def useful_threads(self) -> int:
        """How many threads can be counted on."""
        return self.size - len(self.overdue)

    def submit(self, exchange: Exchange) -> None:
        """Queue a request; `wake` lets it be run, and its last piece must be followed by `take_back`."""
        self.taken += 1
        self.jobs.append(exchange)

    def withdraw(self, exchange: Exchange) -> bool:
        """Take a request that nobody waits for out of the queue; False where a thread has got it already."""
        try:
            self.jobs.remove(exchange)
        except ValueError:
            return False
        self.taken -= 1
        return True

    def take_back(self, exchange: Exchange) -> None:
        """A thread is done with a request."""
        self.taken -= 1
        self.overdue.discard(exchange)

    def wake(self) -> bool:
        """Wake one idle thread, if there is work; returns whether there was both."""
        if self.jobs:
            try:
                self._idle.pop().release()
            except IndexError:
                return False
            return True
        return False

    def _serve(self) -> None:
        jobs, idle, monotonic = self.jobs, self._idle, time.monotonic
        lock = threading.Lock()
        lock.acquire()
        while True:
            try:
                exchange = jobs.popleft()
            except IndexError:
                idle.append(lock)
                if jobs and self._is_still_idle(lock):
                    continue
                self._flush()
                lock.acquire()
                continue
            exchange.started = monotonic()
            if not is_quick(exchange):
                if jobs:
                    self.wake()
                self._flush()
            self._run(exchange)
            del exchange  # nothing of a request stays with an idle thread

    def _is_still_idle(self, lock: threading.Lock) -> bool:
        try:
            self._idle.remove(lock)
        except ValueError:  # somebody has taken the lock from the list, and releases it
            return False
        return True
