"""Application threads, and the hand-over of requests to them."""

import threading
import time
from collections import deque
from collections.abc import Callable

from inference_api.worker.wsgi import Exchange

QUICK_SECONDS = 0.0003
"""Requests expected to take less are run one after the other by one thread: waking a second one would cost more."""
LATE_SECONDS = 0.01


class Pool:
    """Threads that run requests, in the order in which they came.

    A thread that has nothing to do waits for a lock of its own, so that exactly as many are woken as are of use. The
    I/O thread alone submits.
    """

    def __init__(
        self, name: str, run: Callable[[Exchange], None], skip: Callable[[Exchange], None], rested: Callable[[], None]
    ) -> None:
        self.name = name
        self.size = 0
        self.jobs: deque[Exchange] = deque()
        self._idle: list[threading.Lock] = []
        self._run = run
        self._skip = skip
        self._rested = rested

    def grow(self, size: int) -> None:
        """Have at least `size` threads."""
        while self.size < size:
            self.size += 1
            threading.Thread(target=self._serve, name=f"{self.name}-{self.size}", daemon=True).start()

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
                self._rested()
                lock.acquire()
                continue
            exchange.started = now = monotonic()
            if jobs and not is_quick(exchange):
                self.wake()
            # One that waited too long to be finished in time is not started.
            if exchange.abandoned or (
                now > exchange.arrived + LATE_SECONDS and now + exchange.cost > exchange.deadline
            ):
                self._skip(exchange)
            else:
                self._run(exchange)
            del exchange  # nothing of a request stays with an idle thread

    def _is_still_idle(self, lock: threading.Lock) -> bool:
        try:
            self._idle.remove(lock)
        except ValueError:  # somebody has taken the lock from the list, and releases it
            return False
        return True


def is_quick(exchange: Exchange) -> bool:
    """Whether it is known to take next to no time."""
    return 0.0 < exchange.cost < QUICK_SECONDS
