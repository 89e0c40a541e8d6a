"""Which requests are let in: by how many wait, and by whether their answer would come in time."""

import math

MAX_PATHS = 64
MAX_RETRY_AFTER_SECONDS = 60
SMOOTHING = 1 / 16
"""The weight of the newest service time in the average."""


class Admission:
    """Keeps the service time of each path, and the backlog: the seconds of service that let-in requests still need.

    A queue bounded by count alone collapses under overload, because every answer comes after its deadline; what cannot
    be answered in time is refused at once instead.
    """

    def __init__(self, max_pending: int, request_timeout_seconds: float) -> None:
        self.max_pending = max_pending
        self.request_timeout_seconds = request_timeout_seconds
        self.backlog_seconds = 0.0
        self._service_seconds: dict[str, float] = {}

    def service_seconds(self, path: str) -> float:
        """How long a request for this path is expected to keep a thread; 0 while that is not known."""
        return self._service_seconds.get(path, 0.0)

    def observe(self, path: str, seconds: float) -> None:
        """Take into account how long a request kept its thread."""
        known = self._service_seconds.get(path)
        if known is not None:
            self._service_seconds[path] = known + SMOOTHING * (seconds - known)
        elif len(self._service_seconds) < MAX_PATHS:
            self._service_seconds[path] = seconds

    def at_least(self, path: str, seconds: float) -> None:
        """A request for a path not observed yet has already kept its thread this long."""
        if path not in self._service_seconds and len(self._service_seconds) < MAX_PATHS:
            self._service_seconds[path] = seconds

    def refusal(self, path: str, pending: int, threads: int, *, must_wait: bool) -> str | None:
        """Why a request is not let in now ("stuck", "pending" or "deadline"), or None where it is."""
        if threads <= 0:
            return "stuck"
        if pending >= self.max_pending:
            return "pending"
        expected_seconds = self.backlog_seconds / threads + self.service_seconds(path)
        # Where a thread is free there is nothing to wait for, and something to learn of a service time that has grown.
        if must_wait and expected_seconds > self.request_timeout_seconds:
            return "deadline"
        return None

    def retry_after_seconds(self, threads: int) -> int:
        """When the backlog of now will have been worked off: whole seconds, at least 1."""
        return max(1, min(MAX_RETRY_AFTER_SECONDS, math.ceil(self.backlog_seconds / max(1, threads))))
