"""Which requests are let in: by how many wait, and by whether their answer would come in time."""

import math

from inference_api.worker.pool import Pool
from inference_api.worker.wsgi import Exchange

MAX_PATHS = 64
MAX_RETRY_AFTER_SECONDS = 60
QUICK_SECONDS = 0.0003
"""Requests expected to take less are cheaper to run than to hand to a thread."""
MARGIN = 0.1
"""The part of the deadline left for what is not foreseen: what is let in should hardly ever be refused later."""
FORGET_SECONDS = 10.0
"""After such a lull what was slow is not taken for slow any more: the model, or its inputs, may have changed."""
SMOOTHING = 1 / 16
"""The weight of the newest service time in the average."""


class Admission:
    """Keeps the service time of each path, and the backlog: the seconds of service that let-in requests still need.

    A queue bounded by count alone collapses under overload, because every answer comes after its deadline; what cannot
    be answered in time is refused at once instead.
    """

    def __init__(self, pool: Pool, max_pending: int, request_timeout_seconds: float) -> None:
        self._pool = pool
        self._max_pending = max_pending
        self._longest_seconds = (1 - MARGIN) * request_timeout_seconds
        self._backlog_seconds = 0.0
        self._busy_at = 0.0
        # By path, how long its requests take: an average, or as long as none has ended, what one has taken by now.
        self._seconds: dict[str, float] = {}
        # The average alone, less what they wait for a batch. It falls while threads of the pool run them, which may
        # wait all of the time, for all that is known: so they are tried as quick ones again now and then.
        self._busy_seconds: dict[str, float] = {}

    def enter(self, exchange: Exchange) -> str | None:
        """Let a request in, or say why not: "stuck", "pending" or "deadline".

        Its cost is the service time expected, 0 while nothing is known of its path.
        """
        pool = self._pool
        cost = self._expected_seconds(exchange.path)
        # Where a thread is free there is nothing to wait for, and something to learn of a service time that has grown.
        waiting = len(pool.taken) - pool.size  # not the queue's length: a thread may be about to take from it
        if waiting >= 0:
            threads = pool.useful_threads
            if threads <= 0:
                return "stuck"
            if waiting >= self._max_pending:
                return "pending"
            if self._backlog_seconds / threads + cost > self._longest_seconds:
                return "deadline"
        exchange.cost = cost
        self._backlog_seconds += cost
        return None

    def is_quick(self, exchange: Exchange) -> bool:
        """Whether a request is known to keep a thread busy for next to no time."""
        # By what is known now: of many that wait when the first turns out not to be quick, none is taken for it.
        return self._busy_seconds.get(exchange.path, math.inf) < QUICK_SECONDS

    def leave(self, exchange: Exchange) -> None:
        """A request is no longer among the work to be done; to say so again changes nothing."""
        self._backlog_seconds -= exchange.cost
        exchange.cost = 0.0

    def observe(self, exchange: Exchange, seconds: float) -> None:
        """Take into account how long a request has kept its thread, or its place."""
        waited_seconds = exchange.waited_seconds
        busy_seconds = max(0.0, seconds - waited_seconds) if waited_seconds else seconds
        path = exchange.path
        known = self._busy_seconds.get(path)
        if known is not None:
            self._seconds[path] += SMOOTHING * (seconds - self._seconds[path])
            self._busy_seconds[path] = known + SMOOTHING * (busy_seconds - known)
        elif self._has_place(path):
            self._seconds[path], self._busy_seconds[path] = seconds, busy_seconds

    def observe_slow(self, exchange: Exchange, seconds: float) -> None:
        """A request that was known to be quick has kept its thread busy for so long, and still does."""
        self._busy_seconds[exchange.path] = max(self._busy_seconds[exchange.path], seconds)

    def hopeless(self, now: float) -> list[Exchange]:
        """Those of the requests let in that, by what has been learnt since, cannot be answered in time."""
        threads = self._pool.useful_threads
        if threads <= 0:
            return []
        found = []
        wait_seconds = 0.0
        for exchange in self._pool.taken:
            if exchange.abandoned:
                continue
            path = exchange.path
            cost = self._expected_seconds(path)
            if exchange.started:
                seconds = now - exchange.started
                if path not in self._busy_seconds and seconds > max(cost, QUICK_SECONDS) and self._has_place(path):
                    self._seconds[path] = seconds
            elif wait_seconds and now + wait_seconds + cost > exchange.deadline:
                self.leave(exchange)
                found.append(exchange)
            else:
                self._backlog_seconds += cost - exchange.cost
                exchange.cost = cost
                wait_seconds += cost / threads
        return found

    def forget(self, now: float) -> None:
        """Called now and then: after a lull, and at first, forget which paths are slow."""
        if self._pool.taken:
            self._busy_at = now
        elif now - self._busy_at > FORGET_SECONDS:
            for path, seconds in list(self._seconds.items()):
                if max(seconds, self._busy_seconds.get(path, 0.0)) > QUICK_SECONDS:
                    del self._seconds[path]
                    self._busy_seconds.pop(path, None)

    def _expected_seconds(self, path: str) -> float:
        seconds = self._seconds.get(path)
        # Applications serve //predict as /predict.
        return seconds if seconds is not None else self._seconds.get(f"/{path.lstrip('/')}", 0.0)

    def _has_place(self, path: str) -> bool:
        return path in self._seconds or (len(self._seconds) < MAX_PATHS and not path.startswith("//"))

    def retry_after_seconds(self) -> int:
        """When the backlog of now will have been worked off: whole seconds, at least 1."""
        seconds = self._backlog_seconds / max(1, self._pool.useful_threads)
        return max(1, min(MAX_RETRY_AFTER_SECONDS, math.ceil(seconds)))
