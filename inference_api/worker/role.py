"""The I/O thread is a role: one thread has it at a time, and runs quick requests itself."""

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from inference_api.worker.admission import Admission
from inference_api.worker.pool import Pool
from inference_api.worker.wsgi import Exchange

if TYPE_CHECKING:
    from inference_api.worker.loop import Loop

TURN_SECONDS = 0.002
"""How long the I/O thread runs quick requests before it looks after its sockets again."""
TAKE_OVER_SECONDS = 0.005
"""How long a request that was thought to be quick keeps the I/O thread before another one takes its place."""
WATCH_SECONDS = 0.1
LULL_SECONDS = 1.0


class Role:
    """Gives the loop, which is the I/O thread's duty, to one thread at a time.

    To hand a quick request to another thread, which would compete with this one for the interpreter, costs more than
    the request: whoever has the role runs it. Should one not be quick for once, the role goes to a thread of the pool
    that is idle, and the one that is busy with it becomes a thread of the pool in its place.

    A quick request whose answer comes later, with its batch, is run up to there, and run on when it has come: it keeps
    its place in the pool meanwhile, but no thread.
    """

    def __init__(self, loop: "Loop", pool: Pool, resumed: deque[Exchange], admission: Admission) -> None:
        self._loop = loop
        self._pool = pool
        self._resumed = resumed
        self._admission = admission
        # Held by the thread that has the role, but while it runs `_quick`: if it is taken then, the role is gone. Each
        # has one of its own, so that the thread that had the role before never finds its own free again.
        self._lock = threading.Lock()
        self._quick: Exchange | None = None
        self._deferred: list[Exchange] = []  # that have been run up to where they have to wait for their answer
        self._last_quick = 0.0  # when the last request that is quick began, or would have if it had been watched
        self._is_watched = False  # often enough for quick requests to be run by the thread that has the role
        self._serving = threading.Lock()  # held until the loop is over: cheaper to wait for than an Event
        self._failure: BaseException | None = None

    def serve(self) -> None:
        """Have the loop run until it is over; raises what it raises.

        The calling thread only watches, so that signal handlers always run at once.
        """
        self._serving.acquire()
        threading.Thread(target=self._start, name="io", daemon=True).start()
        while not self._serving.acquire(timeout=TAKE_OVER_SECONDS if self._is_watched else WATCH_SECONDS):
            seconds = time.monotonic() - self._last_quick
            self._is_watched = seconds < LULL_SECONDS
            if self._quick is not None and seconds > TAKE_OVER_SECONDS and self._lock.acquire(blocking=False):
                self._hand_over()
        if self._failure is not None:
            raise self._failure

    def _start(self) -> None:
        self._live()
        self._pool.serve()

    def _hand_over(self) -> None:
        """Let the busy thread and the idle one whose place it has change places; meanwhile nobody else has the role."""
        slow = self._quick
        assert slow is not None and slow.place is not None  # noqa: S101 - for the type checker
        # Not slow yet, where the one that was found so has ended, and this one begun.
        self._admission.observe_slow(slow, time.monotonic() - self._last_quick)
        self._quick = None
        place, slow.place = slow.place, None
        self._pool.swap(place, self._live)

    def _live(self) -> None:
        """Have the role: run the loop until it is over, or the role has gone."""
        self._lock = threading.Lock()
        self._lock.acquire()
        try:
            self._begin_deferred()  # of the thread that had the role before
            while not self._loop.is_over():
                has_quick = self._has_quick()
                if not has_quick:
                    self._pool.wake()  # also for what this thread has left to itself, and what is not quick any more
                self._loop.receive(may_wait=not has_quick)
                if (self._pool.jobs or self._resumed) and not self._pool.is_full and not self._work():
                    return
                self._loop.respond()
        except BaseException as exc:
            self._failure = exc
        self._serving.release()

    def _begin_deferred(self) -> None:
        """All at once, so that they are likely to be in the same batch."""
        deferred, self._deferred = self._deferred, []
        for exchange in deferred:
            exchange.begin()

    def _work(self) -> bool:
        """Run what is quick of what has been submitted, and wake others for the rest; False: the role has gone."""
        ends = time.monotonic() + TURN_SECONDS
        pool, jobs, resumed, run = self._pool, self._pool.jobs, self._resumed, self._pool.run
        lock, is_quick, monotonic = self._lock, self._admission.is_quick, time.monotonic
        # In the pool, for what is run here, one after the other: it is one of THREADS. What is deferred takes it along.
        place: threading.Lock | None = None
        while self._last_quick < ends:
            if resumed:
                if place is not None:
                    pool.idle.append(place)
                exchange = resumed.popleft()
                place = exchange.place
                self._last_quick = monotonic()
            else:
                if not self._is_watched or (place is None and (place := pool.reserve()) is None):
                    break
                try:
                    exchange = jobs.popleft()
                except IndexError:  # an application thread may have taken it
                    break
                if not is_quick(exchange):
                    jobs.appendleft(exchange)
                    break
                exchange.place = place
                self._last_quick = exchange.started = monotonic()
            self._quick = exchange
            lock.release()
            run(exchange)
            if not lock.acquire(False):  # this is a thread of the pool now, in that place
                if exchange.later is not None:
                    run(exchange)
                return False
            self._quick = None
            if exchange.later is not None:  # it keeps its place
                self._deferred.append(exchange)
                place = None
        if place is not None:
            pool.idle.append(place)
        self._begin_deferred()
        if not self._has_quick():
            pool.wake()
        return True

    def _has_quick(self) -> bool:
        """Whether the next request is one to be run by the thread that has the role; asks for the watch where it is."""
        try:
            is_quick = bool(self._pool.idle) and self._admission.is_quick(self._pool.jobs[0])
        except IndexError:
            return False
        if is_quick and not self._is_watched:
            self._last_quick = time.monotonic()
        return is_quick and self._is_watched
