"""Metrics: exact over threads, processes and their ends; bounded labels; Prometheus' text format."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from inference_api.metrics import BATCH_SIZES, CONTENT_TYPE, SECONDS, SLOTS, Metrics, shared_metrics

PATHS = ("/predict", "/square_numbers")
MODELS = {"/predict": ("dummy", "1.0.0"), "/square_numbers": ("square_numbers", "2.1.0")}
PROCESS_SECONDS = 60
PROJECT = Path(__file__).parents[2]


def samples(metrics: Metrics, models: dict[str, tuple[str, str]] = MODELS) -> dict[str, float]:
    """Every line of the rendered text: name and labels → value."""
    lines = metrics.render(models).decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    found = {name.removeprefix("inference_api_"): float(value) for name, value in pairs}
    assert len(found) == len(pairs)
    return found


def test_who_asked_before_a_text_was_begun_is_given_that() -> None:
    """Many who ask at once cost no more than one; who has asked since, or tells not when, finds all that has been."""
    metrics = Metrics(PATHS)
    asked = time.monotonic()
    first = metrics.render(MODELS, asked)
    metrics.record("/predict", "POST", 200, 0.25, None)
    assert metrics.render(MODELS, asked) is first
    second = metrics.render(MODELS, time.monotonic())
    metrics.record("/predict", "POST", 200, 0.25, None)
    third = metrics.render(MODELS)
    requests = [
        text.count(b'duration_seconds_count{route="/predict"} %d.0' % count)
        for count, text in enumerate((first, second, third))
    ]
    assert requests == [1, 1, 1]


def above_zero(metrics: Metrics, name: str) -> dict[str, float]:
    return {key: value for key, value in samples(metrics).items() if key.startswith(name) and value}


def test_the_text_of_a_small_example_is_exact() -> None:
    """What is scraped is this, line by line; the buckets are left out here."""
    metrics = Metrics(["/predict"])
    metrics.attach(metrics.take_slot())
    metrics.record("/predict", "POST", 200, 0.25, 0.125)
    metrics.record("/health", "GET", 200, 0.5, None)
    metrics.predicted("/predict", 3)
    metrics.batched("/predict", 3)
    metrics.shed("deadline")
    metrics.count("requests_timed_out")
    metrics.count("requests_gone")
    metrics.count("log_lines_dropped", 7)
    metrics.gauges(in_flight=4, pending=5, connections=6, threads_stuck=1)
    text = metrics.render({"/predict": ("dummy", "1.0.0")}).decode()
    assert text.endswith("\n")
    assert [line for line in text.splitlines() if "_bucket{" not in line] == textwrap.dedent("""\
        # HELP inference_api_requests_total Requests answered.
        # TYPE inference_api_requests_total counter
        inference_api_requests_total{method="POST",model="dummy",route="/predict",status="200"} 1.0
        inference_api_requests_total{method="POST",model="dummy",route="/predict",status="500"} 0.0
        inference_api_requests_total{method="POST",model="dummy",route="/predict",status="503"} 0.0
        inference_api_requests_total{method="POST",model="dummy",route="/predict",status="504"} 0.0
        inference_api_requests_total{method="GET",model="",route="/health",status="200"} 1.0
        # HELP inference_api_request_duration_seconds From the last byte of a request to its answer.
        # TYPE inference_api_request_duration_seconds histogram
        inference_api_request_duration_seconds_count{route="/predict"} 1.0
        inference_api_request_duration_seconds_sum{route="/predict"} 0.25
        inference_api_request_duration_seconds_count{route="/health"} 1.0
        inference_api_request_duration_seconds_sum{route="/health"} 0.5
        # HELP inference_api_queue_wait_seconds From the last byte of a request to its thread.
        # TYPE inference_api_queue_wait_seconds histogram
        inference_api_queue_wait_seconds_count 1.0
        inference_api_queue_wait_seconds_sum 0.125
        # HELP inference_api_predictions_total Inputs predicted.
        # TYPE inference_api_predictions_total counter
        inference_api_predictions_total{model="dummy"} 3.0
        # HELP inference_api_batch_size Inputs in one call of a model.
        # TYPE inference_api_batch_size histogram
        inference_api_batch_size_count{model="dummy"} 1.0
        inference_api_batch_size_sum{model="dummy"} 3.0
        # HELP inference_api_requests_shed_total Requests refused to prevent overload.
        # TYPE inference_api_requests_shed_total counter
        inference_api_requests_shed_total{reason="pending"} 0.0
        inference_api_requests_shed_total{reason="deadline"} 1.0
        inference_api_requests_shed_total{reason="stuck"} 0.0
        # HELP inference_api_worker_starts_total Worker processes started.
        # TYPE inference_api_worker_starts_total counter
        inference_api_worker_starts_total 1.0
        # HELP inference_api_requests_timed_out_total Requests whose deadline passed before their answer (504).
        # TYPE inference_api_requests_timed_out_total counter
        inference_api_requests_timed_out_total 1.0
        # HELP inference_api_requests_gone_total Requests whose client left before their answer.
        # TYPE inference_api_requests_gone_total counter
        inference_api_requests_gone_total 1.0
        # HELP inference_api_log_lines_dropped_total Log lines dropped because they were not read in time.
        # TYPE inference_api_log_lines_dropped_total counter
        inference_api_log_lines_dropped_total 7.0
        # HELP inference_api_workers Worker processes.
        # TYPE inference_api_workers gauge
        inference_api_workers 1.0
        # HELP inference_api_requests_in_flight Requests in the application's threads.
        # TYPE inference_api_requests_in_flight gauge
        inference_api_requests_in_flight 4.0
        # HELP inference_api_requests_pending Requests waiting for a thread.
        # TYPE inference_api_requests_pending gauge
        inference_api_requests_pending 5.0
        # HELP inference_api_connections Open connections.
        # TYPE inference_api_connections gauge
        inference_api_connections 6.0
        # HELP inference_api_threads_stuck Threads whose request is past its deadline.
        # TYPE inference_api_threads_stuck gauge
        inference_api_threads_stuck 1.0
        # HELP inference_api_model_info The models that are served.
        # TYPE inference_api_model_info gauge
        inference_api_model_info{model="dummy",route="/predict",version="1.0.0"} 1.0
        # HELP inference_api_build_info The service.
        # TYPE inference_api_build_info gauge
        inference_api_build_info{version="1.0.0"} 1.0
        """).splitlines()


def test_the_content_type_is_the_text_format() -> None:
    """Prometheus 3 refuses a scrape whose content type it does not know."""
    assert CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"


def test_promtool_finds_nothing_to_complain_of() -> None:
    """Names, units and help texts follow Prometheus' conventions, by its own checker."""
    promtool = shutil.which("promtool")
    if promtool is None:
        if "CI" in os.environ:
            pytest.fail("promtool is not installed (Debian's package prometheus)")
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    metrics = Metrics(PATHS)
    for path in (*PATHS, "/health", "/nowhere"):
        metrics.record(path, "POST", 200, 0.01, 0.001)
    metrics.batched("/predict", 2)
    done = subprocess.run(
        [promtool, "check", "metrics"],
        input=metrics.render(MODELS),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PROCESS_SECONDS,
    )
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize(
    ("seconds", "smallest_bound"),
    [
        (0.0, "0.0005"),
        (0.0005, "0.0005"),
        (0.0005000001, "0.001"),
        (0.001, "0.001"),
        (0.3, "0.5"),
        (30.0, "30.0"),
        (30.1, "+Inf"),
        (1e9, "+Inf"),
    ],
)
def test_a_bucket_includes_its_bound(seconds: float, smallest_bound: str) -> None:
    """A value is in every bucket whose bound is not smaller; +Inf is the count."""
    metrics = Metrics(PATHS)
    metrics.record("/predict", "POST", 200, seconds, seconds)
    found = samples(metrics)
    bounds = [*map(str, SECONDS), "+Inf"]
    expected = [float(place >= bounds.index(smallest_bound)) for place in range(len(bounds))]
    assert [found[f'request_duration_seconds_bucket{{le="{le}",route="/predict"}}'] for le in bounds] == expected
    assert [found[f'queue_wait_seconds_bucket{{le="{le}"}}'] for le in bounds] == expected
    assert found["queue_wait_seconds_count"] == found['queue_wait_seconds_bucket{le="+Inf"}'] == 1
    assert found["queue_wait_seconds_sum"] == seconds


@pytest.mark.parametrize(
    ("size", "smallest_bound"), [(1, "1.0"), (2, "2.0"), (3, "4.0"), (1024, "1024.0"), (1025, "+Inf")]
)
def test_batch_sizes_are_counted_by_powers_of_two(size: int, smallest_bound: str) -> None:
    """The buckets of batch sizes are 1, 2, 4 … 1,024, bounds included."""
    metrics = Metrics(PATHS)
    metrics.batched("/square_numbers", size)
    found = above_zero(metrics, "batch_size_")
    bounds = [*map(str, BATCH_SIZES), "+Inf"]
    expected = {
        f'batch_size_bucket{{le="{le}",model="square_numbers"}}': 1.0 for le in bounds[bounds.index(smallest_bound) :]
    }
    labels = '{model="square_numbers"}'
    assert found == {**expected, f"batch_size_count{labels}": 1.0, f"batch_size_sum{labels}": size}


@pytest.mark.parametrize(
    ("path", "method", "status", "labels"),
    [
        ("/predict", "POST", 422, 'method="POST",model="dummy",route="/predict",status="422"'),
        ("/predict", "GET", 405, 'method="GET",model="dummy",route="/predict",status="405"'),
        ("/health/live", "HEAD", 200, 'method="HEAD",model="",route="/health/live",status="200"'),
        ("/predict", "PURGE", 405, 'method="other",model="dummy",route="/predict",status="405"'),
        ("/predict", "post", 405, 'method="other",model="dummy",route="/predict",status="405"'),
        ("/predict", "POST", 299, 'method="POST",model="dummy",route="/predict",status="other"'),
        ("/docs", "GET", 200, 'method="GET",model="",route="/docs",status="200"'),
        ("/docs/swagger-ui.css", "GET", 200, 'method="GET",model="",route="/docs",status="200"'),
        ("/docsify", "GET", 404, 'method="GET",model="",route="other",status="404"'),
        ("/predict/", "POST", 404, 'method="POST",model="",route="other",status="404"'),
        ('/"\n}', "GET", 404, 'method="GET",model="",route="other",status="404"'),
        ("", "", 400, 'method="other",model="",route="other",status="400"'),
        ("*", "OPTIONS", 501, 'method="other",model="",route="other",status="501"'),
        ("other", "other", 0, 'method="other",model="",route="other",status="other"'),
    ],
)
def test_labels_come_from_tables(path: str, method: str, status: int, labels: str) -> None:
    """What a client makes up is counted under "other", never as a label of its own."""
    metrics = Metrics(PATHS)
    metrics.record(path, method, status, 0.001, None)
    assert above_zero(metrics, "requests_total") == {f"requests_total{{{labels}}}": 1.0}


def test_a_flood_of_paths_makes_no_series() -> None:
    """The text does not grow with what clients ask for."""
    metrics = Metrics(PATHS)
    metrics.record("/0", "M0", 404, 0.001, None)
    before = len(metrics.render(MODELS).splitlines())
    for number in range(1000):
        metrics.record(f"/{number}", f"M{number}", 404, 0.001, None)
    assert len(metrics.render(MODELS).splitlines()) == before


def test_two_paths_with_one_model_are_one_series() -> None:
    """A series labelled by model sums the paths that serve the model: a double one would fail the whole scrape."""
    metrics = Metrics(PATHS)
    for path, inputs in zip(PATHS, (2, 3), strict=True):
        metrics.predicted(path, inputs)
        metrics.batched(path, inputs)
    found = samples(metrics, {"/predict": ("same", "1"), "/square_numbers": ("same", "2")})
    assert {key: value for key, value in found.items() if key.startswith("predictions")} == {
        'predictions_total{model="same"}': 5.0
    }
    assert found['batch_size_count{model="same"}'] == 2
    assert found['batch_size_sum{model="same"}'] == 5
    assert found['model_info{model="same",route="/square_numbers",version="2"}'] == 1


@pytest.mark.parametrize("count", [999_999, 1_234_567, 123_456_789_012, 2**53 - 1])
def test_large_counts_are_exact(count: int) -> None:
    """Counters are doubles: whole numbers are exact up to 2**53, also as text."""
    metrics = Metrics(PATHS)
    metrics.predicted("/predict", count)
    assert samples(metrics)['predictions_total{model="dummy"}'] == count


REQUEST = st.tuples(
    st.sampled_from((*PATHS, "/health", "/docs", "/docs/x", "/elsewhere")),
    st.sampled_from(("GET", "POST", "BREW")),
    st.sampled_from((200, 422, 500, 599)),
    st.floats(0, 60),
    st.none() | st.floats(0, 60),
)


@given(st.lists(st.tuples(st.integers(0, 2), REQUEST), max_size=50))
def test_sums_are_those_of_a_naive_count(records: list[tuple[int, tuple[str, str, int, float, float | None]]]) -> None:
    """Whatever is recorded in whichever slot, the scrape, parsed by Prometheus' own client, is the plain count."""
    metrics = Metrics(PATHS)
    slots = [metrics.take_slot() for _ in range(3)]
    requests: Counter[tuple[str, str, str, str]] = Counter()
    durations: dict[str, list[float]] = {}
    waits = []
    for slot, (path, method, status, duration, wait) in records:
        metrics.attach(slots[slot])
        metrics.record(path, method, status, duration, wait)
        route = "/docs" if path == "/docs/x" else "other" if path == "/elsewhere" else path
        model = MODELS[path][0] if path in MODELS else ""
        shown_method = "other" if method == "BREW" else method
        requests[route, model, shown_method, "other" if status == 599 else str(status)] += 1
        durations.setdefault(route, []).append(duration)
        if wait is not None:
            waits.append(wait)
    families = {f.name: f for f in text_string_to_metric_families(metrics.render(MODELS).decode())}
    assert {
        tuple(sample.labels[label] for label in ("route", "model", "method", "status")): sample.value
        for sample in families["inference_api_requests"].samples
        if sample.value
    } == requests
    for sample in families["inference_api_request_duration_seconds"].samples:
        assert sample.value == pytest.approx(
            expected(sample.name, sample.labels, durations.get(sample.labels["route"]))
        )
    for sample in families["inference_api_queue_wait_seconds"].samples:
        assert sample.value == pytest.approx(expected(sample.name, sample.labels, waits))
    shown = {sample.labels["route"] for sample in families["inference_api_request_duration_seconds"].samples}
    assert shown == set(durations) | set(PATHS)


def expected(name: str, labels: dict[str, str], values: list[float] | None) -> float:
    values = values or []
    if name.endswith("_bucket"):
        return sum(value <= float(labels["le"]) for value in values)
    return sum(values) if name.endswith("_sum") else len(values)


class YieldingRow:
    """A row that lets other threads run between a read and the write that follows it."""

    def __init__(self, row: Any) -> None:
        self.row = row

    def __getitem__(self, cell: int) -> float:
        value: float = self.row[cell]
        time.sleep(1e-4)
        return value

    def __setitem__(self, cell: int, value: float) -> None:
        self.row[cell] = value


@pytest.mark.parametrize(
    ("count", "series", "value"),
    [
        (
            lambda metrics: metrics.record_threadsafe("/predict", "POST", 200, 0.25),
            'requests_total{method="POST",model="dummy",route="/predict",status="200"}',
            200,
        ),
        (
            lambda metrics: metrics.record_threadsafe("/predict", "POST", 200, 0.25),
            'request_duration_seconds_sum{route="/predict"}',
            50,
        ),
        (lambda metrics: metrics.predicted("/predict", 2), 'predictions_total{model="dummy"}', 400),
        (lambda metrics: metrics.batched("/predict", 2), 'batch_size_count{model="dummy"}', 200),
        (lambda metrics: metrics.batched("/predict", 2), 'batch_size_sum{model="dummy"}', 400),
    ],
)
def test_threads_lose_no_count(count: Callable[[Metrics], None], series: str, value: float) -> None:
    """What application threads, and all threads under gthread, count is exact although addition is not atomic."""
    metrics = Metrics(PATHS)
    cast(Any, metrics)._row = YieldingRow(cast(Any, metrics)._row)

    def run() -> None:
        for _ in range(50):
            count(metrics)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert samples(metrics)[series] == value


def test_a_slot_is_the_lowest_free_one() -> None:
    """No two living workers share a slot, and slots are used again, so that memory does not grow with restarts."""
    metrics = Metrics(PATHS)
    assert [metrics.take_slot() for _ in range(4)] == [0, 1, 2, 3]
    metrics.free_slot(2)
    metrics.free_slot(1)
    assert [metrics.take_slot() for _ in range(3)] == [1, 2, 4]


def test_a_slot_that_is_not_taken_again_is_still_summed() -> None:
    """Counters never fall when there are fewer workers than before."""
    metrics = Metrics(PATHS)
    for slot in (0, 1, 2):
        metrics.attach(metrics.take_slot())
        metrics.predicted("/predict", 10**slot)
    for slot in (0, 1, 2):
        metrics.free_slot(slot)
    metrics.attach(metrics.take_slot())
    found = samples(metrics)
    assert found['predictions_total{model="dummy"}'] == 111
    assert found["worker_starts_total"] == 4
    assert found["workers"] == 1


def test_a_starting_worker_keeps_its_slot() -> None:
    """At no moment of a worker's start does its slot look free: the master may be looking for another worker's."""
    metrics = Metrics(PATHS)
    slot = metrics.take_slot()
    rows = cast(Any, metrics)._rows
    looks = []

    class Watched(YieldingRow):
        def __setitem__(self, cell: int, value: float) -> None:
            super().__setitem__(cell, value)
            rows[slot] = self.row
            looks.append(metrics.take_slot())
            rows[slot] = self

    rows[slot] = Watched(rows[slot])
    metrics.attach(slot)
    assert looks == list(range(1, len(looks) + 1))
    assert looks


def test_running_out_of_slots_is_a_clear_error() -> None:
    """The bound on worker processes is said, not run over; a freed slot can be taken."""
    metrics = Metrics(PATHS)
    for slot in range(SLOTS):
        assert metrics.take_slot() == slot
    with pytest.raises(RuntimeError, match=re.escape("more than 256 worker processes at once")):
        metrics.take_slot()
    metrics.free_slot(200)
    assert metrics.take_slot() == 200


def test_a_successor_adds_to_the_counters_of_its_slot() -> None:
    """Counters never fall when workers are replaced; the gauges of one that has gone do not stay."""
    metrics = Metrics(PATHS)
    for generation in range(1, 4):
        slot = metrics.take_slot()
        assert slot == 0
        metrics.attach(slot)
        metrics.record("/predict", "POST", 200, 0.25, None)
        metrics.gauges(in_flight=1, pending=2, connections=3, threads_stuck=4)
        found = samples(metrics)
        metrics.free_slot(slot)
        after = samples(metrics)
        for now in (found, after):
            assert now["worker_starts_total"] == generation
            assert now['request_duration_seconds_count{route="/predict"}'] == generation
        gauges = ("workers", "requests_in_flight", "requests_pending", "connections", "threads_stuck")
        assert [found[name] for name in gauges] == [1, 1, 2, 3, 4]
        assert [after[name] for name in gauges] == [0, 0, 0, 0, 0]


def test_a_worker_starts_with_its_gauges_at_zero() -> None:
    """What was left in the slot by a worker whose end the master has not seen is not shown as the new one's."""
    metrics = Metrics(PATHS)
    slot = metrics.take_slot()
    metrics.attach(slot)
    metrics.gauges(in_flight=1, pending=2, connections=3, threads_stuck=4)
    metrics.attach(slot)
    found = samples(metrics)
    gauges = ("workers", "requests_in_flight", "requests_pending", "connections", "threads_stuck")
    assert [found[name] for name in gauges] == [1, 0, 0, 0, 0]


def test_a_process_without_workers_counts_too() -> None:
    """Without Gunicorn, nobody takes slots."""
    metrics = Metrics(PATHS)
    metrics.predicted("/predict", 1)
    assert samples(metrics)['predictions_total{model="dummy"}'] == 1


def test_the_same_paths_have_the_same_metrics() -> None:
    """A reload that does not change the model paths goes on counting where it was."""
    assert shared_metrics(PATHS) is shared_metrics(("/predict", "/square_numbers"))
    assert shared_metrics(PATHS) is not shared_metrics(("/predict",))


FORKING = """
import os, signal
from inference_api.metrics import Metrics

RECORDS, WORKERS = 2000, 8
MODELS = {"/predict": ("dummy", "1.0.0")}
REQUESTS = b'requests_total{method="POST",model="dummy",route="/predict",status="200"} '

metrics = Metrics(["/predict"])
alive = {}

def total():
    return float(metrics.render(MODELS).partition(REQUESTS)[2].split()[0])

def fork(slot):
    ready, done = os.pipe()
    pid = os.fork()
    if not pid:
        metrics.attach(slot)
        metrics.gauges(in_flight=1, pending=0, connections=slot, threads_stuck=0)
        for _ in range(RECORDS):
            metrics.record("/predict", "POST", 200, 0.25, 0.125)
        os.write(done, b".")
        signal.pause()
    os.close(done)
    alive[pid] = slot
    return ready

def kill_all():
    while alive:
        pid, slot = alive.popitem()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        metrics.free_slot(slot)

def serve(generation):
    pipes = []
    for number in range(WORKERS):
        slot = metrics.take_slot()
        assert slot == number, slot
        pipes.append(fork(slot))
    seen = 0.0
    for pipe in pipes:
        assert os.read(pipe, 1) == b"."
        os.close(pipe)
        before, seen = seen, total()
        assert before <= seen <= RECORDS * WORKERS * generation, (before, seen)
    print(generation, "alive", total())
    pid = os.fork()
    if not pid:
        print(generation, "seen by another process", total(), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)

for generation in (1, 2):
    try:
        serve(generation)
    finally:
        kill_all()
    print(generation, "killed", total())
for line in metrics.render(MODELS).decode().splitlines():
    if "_sum" in line or "_worker" in line:
        print(line)
"""


def test_processes_that_are_killed_lose_nothing() -> None:
    """Eight workers count at once and are killed, twice: the sums are exact, in every process, at every moment."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-u", "-c", FORKING],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=PROCESS_SECONDS,
    )
    assert done.stderr == ""
    moments = itertools.product((1, 2), ("alive", "seen by another process", "killed"))
    assert done.stdout.splitlines() == [
        *(f"{generation} {moment} {16_000.0 * generation}" for generation, moment in moments),
        'inference_api_request_duration_seconds_sum{route="/predict"} 8000.0',
        "inference_api_queue_wait_seconds_sum 4000.0",
        "# HELP inference_api_worker_starts_total Worker processes started.",
        "# TYPE inference_api_worker_starts_total counter",
        "inference_api_worker_starts_total 16.0",
        "# HELP inference_api_workers Worker processes.",
        "# TYPE inference_api_workers gauge",
        "inference_api_workers 0.0",
    ]
