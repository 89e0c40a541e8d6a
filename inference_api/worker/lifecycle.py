"""The state of the worker: what /health says, and how serving comes to its end."""

import logging
import math
from collections.abc import Callable

from inference_api.config import Settings
from inference_api.worker.listener import Listener
from inference_api.worker.pool import Outbox

DECIDE_SECONDS = 0.2
"""A process group's SIGTERM may reach a worker before the master has said that it means the whole service."""

log = logging.getLogger("inference_api.worker")


class Lifecycle:
    """Serving, then perhaps the drain, in which new connections are still let in, then the grace for what was begun.

    A worker whose service is shut down goes through all three, and /health says so. One that is replaced leaves out the
    drain, and /health does not change, as others serve on.
    """

    def __init__(self, settings: Settings, listener: Listener, outbox: Outbox, is_shutdown: Callable[[], bool]) -> None:
        self.is_stuck = False
        self._settings = settings
        self._listener = listener
        self._outbox = outbox
        self._is_shutdown = is_shutdown
        self._leaves_at = self._drain_ends = math.inf
        self.grace_ends = math.inf  # when what has not been finished is lost

    @property
    def state(self) -> str:
        """What /health says: "healthy", "draining" or "stuck"."""
        return "stuck" if self.is_stuck else "draining" if self._drain_ends < math.inf else "healthy"

    @property
    def is_in_grace(self) -> bool:
        """Whether it is only finished what was begun."""
        return self.grace_ends < math.inf

    def stop(self, now: float) -> None:
        """A SIGTERM has come: this worker is to leave, unless it becomes known that the service is shut down."""
        self._leaves_at = min(self._leaves_at, now + DECIDE_SECONDS)  # the master says it again and again

    def advance(self, now: float) -> None:
        """Do what is due."""
        if self._is_shutdown():
            if self._drain_ends == math.inf:  # it may have left before it was known
                log.info("draining", extra={"seconds": self._settings.drain_seconds})
                self._outbox.closing = True
                self._listener.serve()
                self._drain_ends = now + self._settings.drain_seconds
                self.grace_ends = math.inf
        elif now >= self._leaves_at and not self._outbox.closing:
            self._outbox.closing = True
            self._listener.leave()
            self.grace_ends = now + self._settings.graceful_timeout
        if now >= self._drain_ends and not self.is_in_grace:
            self._listener.close(now)
            self.grace_ends = now + self._settings.graceful_timeout
