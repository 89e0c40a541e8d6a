"""What is told of every request: one access line and one count."""

import logging
import time

from inference_api.config import Settings
from inference_api.logs import LineWriter, access_line, timestamp, trace_id
from inference_api.metrics import Metrics
from inference_api.worker.wsgi import Exchange


class Journal:
    """Counts requests at once, and gathers their lines for one write a turn. For the I/O thread alone."""

    def __init__(self, settings: Settings, writer: LineWriter, metrics: Metrics) -> None:
        self._metrics = metrics if settings.metrics else None
        self._writer = writer
        self._has_lines = settings.access_log and logging.getLogger().isEnabledFor(logging.INFO)
        self._lines: list[bytes] = []
        self._stamp = ""  # the time of day as log lines have it, made once for all lines of a turn

    def record(self, exchange: Exchange, now: float) -> None:
        """Tell of a request, whatever has become of it."""
        started = exchange.started
        seconds = max(now, exchange.ended) - exchange.arrived  # it may have been run in this very turn
        wait_seconds = started - exchange.arrived if started else None
        if self._metrics is not None:
            self._metrics.record(exchange.path, exchange.method, exchange.status, seconds, wait_seconds)
        if self._has_lines:
            self._stamp = self._stamp or timestamp(time.time())
            traceparent = exchange.environ.get("HTTP_TRACEPARENT")
            self._lines.append(
                access_line(
                    self._stamp,
                    exchange.request_id,
                    exchange.method or None,
                    exchange.path,
                    exchange.status,
                    seconds,
                    wait_seconds,
                    exchange.model,
                    trace_id(traceparent) if traceparent is not None else None,
                )
            )

    def write(self) -> None:
        """Hand the lines to the writer: a turn has ended."""
        if self._lines:
            self._writer.write(self._lines)
            self._lines.clear()
        self._stamp = ""
