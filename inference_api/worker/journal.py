"""What is told of every request: one access line and one count."""

import logging
import time
from typing import Any

from inference_api.config import Settings
from inference_api.logs import LineWriter, access_line, timestamp, trace_id
from inference_api.metrics import Metrics
from inference_api.worker.wsgi import Exchange

MAX_ENTRIES = 256
"""So many requests are told of at once, whatever there is to do."""

log = logging.getLogger("inference_api.worker")

_NO_ENVIRON: dict[str, Any] = {}


class Journal:
    """Gathers the requests that have been answered, and tells of them together. For the I/O thread alone."""

    def __init__(self, settings: Settings, writer: LineWriter, metrics: Metrics) -> None:
        self._metrics = metrics if settings.metrics else None
        self._writer = writer
        self._has_lines = settings.access_log and logging.getLogger().isEnabledFor(logging.INFO)
        self.entries: list[tuple[Exchange, int, float]] = []  # still to be told of
        self._is_silent = self._metrics is None and not self._has_lines

    def record(self, exchange: Exchange, now: float) -> None:
        """Tell of a request, whatever has become of it."""
        exchange.environ = _NO_ENVIRON  # which refers back to the exchange, and holds the body
        if self._is_silent:
            return
        ended = exchange.ended  # it may have been run in this very turn
        # With its status of now: of one that is given up, the application may still set another.
        self.entries.append((exchange, exchange.status, (ended if ended > now else now) - exchange.arrived))

    def write_after_turn(self) -> None:
        """The same as `write`, but not yet after a batch: its clients ask again, and the next batch waits for that."""
        entries = self.entries
        if entries and (not entries[-1][0].waited_seconds or len(entries) >= MAX_ENTRIES):
            self.write()

    def write(self) -> None:
        """Count the requests, and hand their lines to the writer."""
        if self.entries:
            try:
                self._write()
            except Exception:
                log.exception("requests are missing in the access log and the metrics")
            self.entries.clear()

    def _write(self) -> None:
        stamp = timestamp(time.time())
        metrics = self._metrics
        lines: list[str] = []
        for exchange, status, seconds in self.entries:
            method, path, started = exchange.method, exchange.path, exchange.started
            wait_seconds = started - exchange.arrived if started else None
            if metrics is not None:
                metrics.record(path, method, status, seconds, wait_seconds)
            if self._has_lines:
                trace = trace_id(exchange.traceparent) if exchange.traceparent is not None else None
                lines.append(
                    access_line(
                        stamp, exchange.request_id, method, path, status, seconds, wait_seconds, exchange.model, trace
                    )
                )
        if lines:
            self._writer.write(lines)
