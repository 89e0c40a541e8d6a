"""The application threads by themselves: every request is run once, by as many threads as are of use."""

import os
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from inference_api.worker.pool import LARGE_BYTES, MAX_LARGE_ANSWERS, MAX_UNSENT_BYTES, Outbox, Pool
from inference_api.worker.wsgi import Exchange
from tests.unit.exchanges import LIMIT_SECONDS, exchange, refuse_thread, wait_for

NO_FD = -1  # nobody sleeps


class Runs:
    """What the threads are given to run; waits while it is closed."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        self.started: Counter[Exchange] = Counter()
        self.ended: list[Exchange] = []

    def __call__(self, exchange: Exchange) -> None:
        self.started[exchange] += 1
        self.is_open.wait(LIMIT_SECONDS)
        self.ended.append(exchange)


@pytest.fixture
def runs() -> Iterator[Runs]:
    runs = Runs()
    yield runs
    runs.is_open.set()


def test_no_request_is_forgotten(runs: Runs) -> None:
    """Submitted at any moment, also while threads turn to sleep, each is run once and without another's help."""
    pool = Pool("test", runs)
    pool.grow(4)
    exchanges = [exchange() for _ in range(5_000)]
    for number, each in enumerate(exchanges):
        pool.submit(each)
        pool.wake()
        if number % 7 == 0:
            wait_for(lambda expected=number + 1: len(runs.ended) == expected)  # type: ignore[misc]
    wait_for(lambda: len(runs.ended) == len(exchanges))
    assert set(runs.started.values()) == {1}
    assert set(runs.ended) == set(exchanges)


def test_one_wake_starts_as_many_threads_as_there_is_work_for(runs: Runs) -> None:
    """A thread that takes a request wakes the next one, if there is another."""
    runs.is_open.clear()
    pool = Pool("test", runs)
    pool.grow(4)
    for _ in range(6):
        pool.submit(exchange())
    pool.wake()
    wait_for(lambda: len(runs.started) == 4)
    assert (len(pool.taken), len(pool.jobs)) == (6, 2)
    runs.is_open.set()
    wait_for(lambda: len(runs.ended) == 6)


def test_a_request_is_withdrawn_or_run(runs: Runs) -> None:
    """What still waits can be taken back, and is then never run; what a thread has cannot."""
    runs.is_open.clear()
    pool = Pool("test", runs)
    pool.grow(1)
    first, second, third = exchange(), exchange(), exchange()
    for each in (first, second, third):
        pool.submit(each)
    pool.wake()
    wait_for(lambda: bool(runs.started))
    assert not pool.withdraw(first)
    assert pool.withdraw(second)
    assert not pool.withdraw(second)
    assert list(pool.taken) == [first, third]
    runs.is_open.set()
    wait_for(lambda: runs.ended == [first, third])
    for each in (first, third):
        pool.take_back(each)
    assert not pool.taken


def test_overdue_threads_are_not_counted_on(runs: Runs) -> None:
    """Until the request comes back."""
    pool = Pool("test", runs)
    pool.grow(2)
    late = exchange()
    pool.submit(late)
    pool.overdue.add(late)
    assert pool.useful_threads == 1
    pool.take_back(late)
    assert pool.useful_threads == 2


def test_a_thread_changes_places_with_another(runs: Runs) -> None:
    """One that is idle does something else, another serves in its place, and as many requests run at once as before."""
    pool = Pool("swapped", runs)
    pool.grow(2)
    wait_for(lambda: bool(pool.idle))
    place = pool.reserve()
    assert place is not None
    is_over = threading.Event()
    busy: list[threading.Thread] = []

    def duty() -> None:
        busy.append(threading.current_thread())
        assert is_over.wait(LIMIT_SECONDS)

    pool.swap(place, duty)
    wait_for(lambda: bool(busy))
    assert busy[0].name.startswith("swapped-")
    runs.is_open.clear()
    threading.Thread(target=pool.serve, daemon=True).start()
    for _ in range(4):
        pool.submit(exchange())
        pool.wake()
    wait_for(lambda: len(runs.started) == 2)
    assert (len(pool.jobs), bool(pool.idle)) == (2, False)
    is_over.set()  # it serves again
    wait_for(lambda: len(runs.started) == 3)
    runs.is_open.set()
    wait_for(lambda: len(runs.ended) == 4)
    wait_for(lambda: len(pool.idle) == 3)


def test_a_reserved_place_stays_idle_until_it_is_free(runs: Runs) -> None:
    """Whose it is runs something meanwhile, and counts for the thread."""
    pool = Pool("reserved", runs)
    pool.grow(1)
    wait_for(lambda: bool(pool.idle))
    place = pool.reserve()
    assert place is not None
    assert (bool(pool.idle), pool.reserve()) == (False, None)
    pool.submit(exchange())
    pool.wake()
    assert not runs.started
    pool.idle.append(place)
    pool.wake()
    wait_for(lambda: len(runs.ended) == 1)


@pytest.mark.parametrize("is_taken", [False, True], ids=["delivered", "taken"])
def test_nothing_is_begun_while_answers_are_made_too_fast(runs: Runs, is_taken: bool) -> None:
    """As long as too many wait to be sent, with the I/O thread or on their way to it, requests wait, too."""
    outbox = Outbox(NO_FD)
    pool, other = Pool("full", runs), Pool("other", runs)
    for _ in range(MAX_LARGE_ANSWERS + 1):
        answered = exchange()
        answered.pool = pool
        outbox.deliver_whole(answered, b"head", b"a" * (LARGE_BYTES + 1))
    if is_taken:
        pool.unsent_bytes = MAX_UNSENT_BYTES + 1
        pool.large.clear()
    assert (pool.is_full, other.is_full) == (True, False)
    pool.submit(exchange())
    pool.grow(1)
    wait_for(lambda: bool(pool.idle))
    pool.wake()
    wait_for(lambda: bool(pool.idle))
    assert not runs.started
    if is_taken:
        pool.unsent_bytes -= 1
    else:
        pool.large.popitem()
    pool.wake()
    wait_for(lambda: len(runs.ended) == 1)


def test_a_pool_grows_and_never_shrinks(runs: Runs) -> None:
    """The models decide how many threads are of use, once they are loaded."""
    pool = Pool("growing", runs)
    for size, expected in ((1, 1), (3, 3), (2, 3)):
        pool.grow(size)
        assert pool.size == expected
        assert sum(thread.name.startswith("growing-") for thread in threading.enumerate()) == expected


def test_a_pool_that_cannot_grow_serves_with_the_threads_it_has(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so, and grows when it is asked to once more."""
    pool = Pool("growing", runs)
    pool.grow(1)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_thread)
        pool.grow(3)
    assert pool.size == 1
    assert [record.getMessage() for record in caplog.records] == ["only 1 of 3 threads serve: can't start new thread"]
    pool.grow(3)
    assert pool.size == 3
    assert len(caplog.records) == 1


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    yield ends
    for end in ends:
        os.close(end)


def test_the_io_thread_is_woken_where_it_sleeps(pipe: tuple[int, int]) -> None:
    """Once for all that is delivered meanwhile, and not at all while it is awake."""
    outbox = Outbox(pipe[1])
    outbox.deliver(exchange(), b"a", False)
    with pytest.raises(BlockingIOError):
        os.read(pipe[0], 10)
    outbox.is_asleep = True
    for _ in range(3):
        outbox.deliver(exchange(), b"b", False)
    assert os.read(pipe[0], 10) == b"."
    assert [data for _, data, _ in outbox.pieces] == [b"a", b"b", b"b", b"b"]


def test_a_full_pipe_of_reasons_to_wake_is_no_failure(pipe: tuple[int, int]) -> None:
    """The I/O thread has more than enough of them."""
    with pytest.raises(BlockingIOError):
        while True:
            os.write(pipe[1], b"." * 65_536)
    outbox = Outbox(pipe[1])
    outbox.is_asleep = True
    outbox.deliver(exchange(), b"a", False)
    assert not outbox.is_asleep
