"""Metrics for Prometheus: counted by each worker in memory that all of them share, summed when scraped."""

import functools
import math
import mmap
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, takewhile

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from inference_api import __version__

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
SLOTS = 256
"""Worker processes at once, those that a reload replaces included."""

PREFIX = "inference_api_"
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH_SIZES = tuple(float(2**power) for power in range(11))

# These tables bound the labels: what stands in none of them is counted as "other".
OTHER, OTHER_STATUS = "other", 0
ROUTES = ("/health", "/health/live", "/metrics", "/openapi.json", "/docs")
METHODS = ("GET", "HEAD", "POST")
STATUSES = (
    *(200, 204, 206, 301, 302, 304, 307, 308),
    *(400, 401, 403, 404, 405, 406, 408, 411, 413, 414, 415, 416, 417, 422, 429, 431, 499),
    *(500, 501, 502, 503, 504, 505),
)
REASONS = ("pending", "deadline", "stuck")
# For the models' routes these are shown from 0: Prometheus sees no increase in a series that begins with its burst.
STATUSES_FROM_ZERO = (200, 500, 503, 504)
GAUGES = {
    "workers": "Worker processes.",
    "requests_in_flight": "Requests in the application's threads.",
    "requests_pending": "Requests waiting for a thread.",
    "connections": "Open connections.",
    "threads_stuck": "Threads whose request is past its deadline.",
}
COUNTERS = {
    "worker_starts": "Worker processes started.",
    "requests_timed_out": "Requests whose deadline passed before their answer (504).",
    "requests_gone": "Requests whose client left before their answer.",
    "log_lines_dropped": "Log lines dropped because they were not read in time.",
}

# The cells of a slot, in this order: gauges, counters, the wait, each model's, each route's. A histogram has a cell for
# each bucket (not cumulative), one for what is above the last bound, and one for the sum.
_WORKERS, _IN_FLIGHT, _PENDING, _CONNECTIONS, _THREADS_STUCK = range(len(GAUGES))
_STARTS = len(GAUGES)
_COUNTER_CELLS = {counter: cell for cell, counter in enumerate(COUNTERS, _STARTS)}
_SHED = _STARTS + len(COUNTERS)
_WAIT = _SHED + len(REASONS)
_SECONDS_SUM = len(SECONDS) + 1
_MODELS = _WAIT + _SECONDS_SUM + 1
_BATCH_SUM = len(BATCH_SIZES) + 1
_MODEL_CELLS = 1 + _BATCH_SUM + 1  # predictions, batch sizes


class Metrics:
    """What is counted, in an anonymous shared mapping that must be made before the workers are forked.

    Each worker has a slot of its own and adds to it in place, without a system call: a worker that is killed loses
    nothing, and its successor in the slot adds on. Before `attach`, a process counts in the first slot.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._models = {path: _MODELS + place * _MODEL_CELLS for place, path in enumerate(paths)}
        # (route, method, status) → its cell, and the first cell of the route's durations
        self._index: dict[tuple[str, str, int], tuple[int, int]] = {}
        end = _MODELS + len(paths) * _MODEL_CELLS
        for route in (*paths, *ROUTES, OTHER):
            durations, end = end, end + _SECONDS_SUM + 1
            for method in (*METHODS, OTHER):
                for status in (*STATUSES, OTHER_STATUS):
                    self._index[route, method, status] = end, durations
                    end += 1
        memory = memoryview(mmap.mmap(-1, 8 * SLOTS * end)).cast("d")  # zeros; a page costs nothing until touched
        self._rows = [memory[slot * end : (slot + 1) * end] for slot in range(SLOTS)]
        self._row = self._rows[0]
        self._lock = threading.Lock()
        self._last_text = -math.inf, b""  # when it was begun

    def take_slot(self) -> int:
        """In the master before a fork: the lowest slot that no worker has; raises RuntimeError if there is none."""
        for slot, row in enumerate(self._rows):
            if not row[_WORKERS]:
                row[_WORKERS] = 1
                row[_STARTS] += 1
                return slot
        raise RuntimeError(f"more than {SLOTS} worker processes at once")

    def free_slot(self, slot: int) -> None:
        """In the master once the worker has been reaped: its gauges end, its counters stay."""
        self._rows[slot][_WORKERS] = 0
        self._zero_gauges(slot)

    def attach(self, slot: int) -> None:
        """In the worker after the fork: count in this slot, which `take_slot` gave, from now on."""
        self._zero_gauges(slot)
        self._row = self._rows[slot]

    def _zero_gauges(self, slot: int) -> None:
        # Not _WORKERS, which is the master's: were it 0 for a moment, the master might give the slot away again.
        for gauge in (_IN_FLIGHT, _PENDING, _CONNECTIONS, _THREADS_STUCK):
            self._rows[slot][gauge] = 0

    def record(self, path: str, method: str, status: int, duration_seconds: float, wait_seconds: float | None) -> None:
        """Count a request that has been answered; without a lock, so always from the same thread."""
        row = self._row
        try:
            cell, durations = self._index[path, method, status]
        except KeyError:
            cell, durations = self._other(path, method, status)
        row[cell] += 1
        row[durations + bisect_left(SECONDS, duration_seconds)] += 1
        row[durations + _SECONDS_SUM] += duration_seconds
        if wait_seconds is not None:
            row[_WAIT + bisect_left(SECONDS, wait_seconds)] += 1
            row[_WAIT + _SECONDS_SUM] += wait_seconds

    def _other(self, path: str, method: str, status: int) -> tuple[int, int]:
        if (path, OTHER, OTHER_STATUS) not in self._index:
            path = "/docs" if path.startswith("/docs/") else OTHER
        status = status if status in STATUSES else OTHER_STATUS
        return self._index[path, method if method in METHODS else OTHER, status]

    def record_threadsafe(self, path: str, method: str, status: int, duration_seconds: float) -> None:
        """The same from any thread, provided that all use this one, under a server that does not tell of waits."""
        with self._lock:
            self.record(path, method, status, duration_seconds, None)

    def predicted(self, path: str, inputs: int) -> None:
        """Count the inputs of a request that the model has predicted; from any thread."""
        with self._lock:
            self._row[self._models[path]] += inputs

    def batched(self, path: str, size: int) -> None:
        """Count one call of the model's predict_batch; from any thread."""
        sizes = self._models[path] + 1
        with self._lock:
            self._row[sizes + bisect_left(BATCH_SIZES, size)] += 1
            self._row[sizes + _BATCH_SUM] += size

    # The next three are for the thread of `record` alone.

    def shed(self, reason: str) -> None:
        """Count a request refused for one of REASONS."""
        self._row[_SHED + REASONS.index(reason)] += 1

    def count(self, counter: str, amount: int = 1) -> None:
        """Add to one of COUNTERS."""
        self._row[_COUNTER_CELLS[counter]] += amount

    def gauges(self, *, in_flight: int, pending: int, connections: int, threads_stuck: int) -> None:
        """Say how things stand in this worker now."""
        row = self._row
        row[_IN_FLIGHT], row[_PENDING] = in_flight, pending
        row[_CONNECTIONS], row[_THREADS_STUCK] = connections, threads_stuck

    def render(self, models: Mapping[str, tuple[str, str]], asked: float = math.inf) -> bytes:
        """The metrics of all workers as CONTENT_TYPE; `models` gives each path's model, its name and version.

        Who has `asked` before the last text was begun, by the monotonic clock, is given that: many who ask at once
        cost no more than one. The worker's `inference_api.asked` in the WSGI environ says when.
        """
        began, text = self._last_text
        if began <= asked:
            began = time.monotonic()
            text = self._render(models)
            self._last_text = began, text
        return text

    def _render(self, models: Mapping[str, tuple[str, str]]) -> bytes:
        # Slots are taken lowest first: the first that never started a worker ends those in use.
        used = (self._rows[0], *takewhile(lambda row: row[_STARTS], self._rows[1:]))
        cells = [sum(column) for column in zip(*(row.tolist() for row in used), strict=True)]
        return prometheus_client.generate_latest(_Families(self._families(cells, models)))

    def _families(
        self, cells: Sequence[float], models: Mapping[str, tuple[str, str]]
    ) -> Iterable[prometheus_client.Metric]:
        requests = CounterMetricFamily(
            PREFIX + "requests", "Requests answered.", labels=("route", "model", "method", "status")
        )
        durations = HistogramMetricFamily(
            PREFIX + "request_duration_seconds", "From the last byte of a request to its answer.", labels=("route",)
        )
        for (route, method, status), (cell, first) in self._index.items():
            # With the first cell of a route: its durations, once.
            if cell == first + _SECONDS_SUM + 1 and (route in models or any(cells[first:cell])):
                durations.add_metric((route,), *_histogram(SECONDS, cells[first:cell]))
            if cells[cell] or (route in models and method == "POST" and status in STATUSES_FROM_ZERO):
                name = models[route][0] if route in models else ""
                requests.add_metric((route, name, method, str(status or OTHER)), cells[cell])
        wait = HistogramMetricFamily(
            PREFIX + "queue_wait_seconds",
            "From the last byte of a request to its thread.",
            *_histogram(SECONDS, cells[_WAIT:_MODELS]),
        )
        yield from (requests, durations, wait)

        by_name: dict[str, list[float]] = {}  # two paths may serve the same model
        for path, (name, _) in models.items():
            more = cells[self._models[path] : self._models[path] + _MODEL_CELLS]
            by_name[name] = [a + b for a, b in zip(by_name.get(name, [0.0] * _MODEL_CELLS), more, strict=True)]
        predictions = CounterMetricFamily(PREFIX + "predictions", "Inputs predicted.", labels=("model",))
        batches = HistogramMetricFamily(PREFIX + "batch_size", "Inputs in one call of a model.", labels=("model",))
        for name, (predicted, *sizes) in by_name.items():
            predictions.add_metric((name,), predicted)
            if any(sizes):
                batches.add_metric((name,), *_histogram(BATCH_SIZES, sizes))
        shed = CounterMetricFamily(
            PREFIX + "requests_shed", "Requests refused to prevent overload.", labels=("reason",)
        )
        for reason, value in zip(REASONS, cells[_SHED:_WAIT], strict=True):
            shed.add_metric((reason,), value)
        yield from (predictions, batches, shed)

        for (name, text), value in zip(COUNTERS.items(), cells[_STARTS:_SHED], strict=True):
            yield CounterMetricFamily(PREFIX + name, text, value)
        for (name, text), value in zip(GAUGES.items(), cells[:_STARTS], strict=True):
            yield GaugeMetricFamily(PREFIX + name, text, value)
        info = InfoMetricFamily(PREFIX + "model", "The models that are served.", labels=("route",))
        for path, (name, version) in models.items():
            info.add_metric((path,), {"model": name, "version": version})
        yield from (info, InfoMetricFamily(PREFIX + "build", "The service.", {"version": __version__}))


@functools.cache
def shared_metrics(paths: tuple[str, ...]) -> Metrics:
    """The metrics of a service with these model paths: one object for this process and all that it forks later."""
    return Metrics(paths)


class _Families(Collector):
    def __init__(self, families: Iterable[prometheus_client.Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[prometheus_client.Metric]:
        return self._families


def _histogram(bounds: Sequence[float], cells: Sequence[float]) -> tuple[list[tuple[str, float]], float]:
    """Cumulative buckets by their upper bounds, and the sum of the values."""
    *counts, total = cells
    names = (*map(floatToGoString, bounds), "+Inf")
    return list(zip(names, accumulate(counts), strict=True)), total
