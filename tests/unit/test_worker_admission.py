"""Admission by itself: what it lets in, refuses and gives up, by the service times it has seen."""

import math
from typing import cast

import pytest

from inference_api.worker.admission import FORGET_SECONDS, MAX_PATHS, QUICK_SECONDS, Admission
from inference_api.worker.pool import Pool
from inference_api.worker.wsgi import Exchange
from tests.unit import exchanges

TIMEOUT_SECONDS = 10.0
MAX_PENDING = 5


class FakePool:
    """Threads that only count."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken: dict[Exchange, None] = {}
        self.jobs: list[Exchange] = []
        self.overdue: set[Exchange] = set()

    @property
    def useful_threads(self) -> int:
        return self.size - len(self.overdue)


class Queue:
    """Admission over such threads, which run the first requests to come and never end them."""

    def __init__(self, threads: int = 2, known_seconds: float | None = None) -> None:
        self.pool = FakePool(threads)
        self.admission = Admission(cast(Pool, self.pool), MAX_PENDING, TIMEOUT_SECONDS)
        if known_seconds is not None:
            self.admission.observe(exchange(), known_seconds)

    def add(self, path: str = "/predict", arrived: float = 0.0) -> Exchange | str:
        """The request, if it was let in, else why not."""
        new = exchange(path, arrived)
        reason = self.admission.enter(new)
        if reason is not None:
            return reason
        self.pool.taken[new] = None
        if len(self.pool.taken) > self.pool.size:
            self.pool.jobs.append(new)
        else:
            new.started = arrived or 0.001
        return new

    def add_many(self, count: int) -> list[Exchange]:
        added = [self.add() for _ in range(count)]
        assert not [reason for reason in added if isinstance(reason, str)]
        return cast(list[Exchange], added)


def exchange(path: str = "/predict", arrived: float = 0.0) -> Exchange:
    made = exchanges.exchange(path)
    made.arrived = arrived
    made.deadline = arrived + TIMEOUT_SECONDS
    return made


def test_as_many_wait_as_may() -> None:
    """Requests of which nothing is known are refused by their number alone."""
    queue = Queue()
    queue.add_many(2 + MAX_PENDING)
    assert queue.add() == "pending"


def test_no_more_wait_than_can_be_answered_in_time() -> None:
    """With 3.5 s a request, two threads and a deadline of 10 s: two run, two wait, and a fifth would come too late."""
    queue = Queue(known_seconds=3.5)
    queue.add_many(4)
    assert queue.add() == "deadline"


def test_where_a_thread_is_free_nothing_is_too_late() -> None:
    """A service time beyond the deadline is tried again: it may have come down."""
    queue = Queue(known_seconds=TIMEOUT_SECONDS * 2)
    queue.add_many(2)
    assert queue.add() == "deadline"


def test_threads_that_are_stuck_do_not_count() -> None:
    """One of two is stuck: half as much can wait; both are: nothing is let in."""
    queue = Queue(known_seconds=3.5)
    first, second = queue.add_many(2)
    queue.pool.overdue.add(first)
    queue.admission.leave(first)
    queue.add_many(1)
    assert queue.add() == "deadline"
    queue.pool.overdue.add(second)
    assert queue.add() == "stuck"


def test_what_leaves_makes_room() -> None:
    """Work that is done or given up is no longer waited for, however often that is said."""
    queue = Queue(known_seconds=3.5)
    first, *_ = queue.add_many(4)
    for _ in range(3):
        queue.admission.leave(first)
    assert isinstance(queue.add(), Exchange)
    assert queue.add() == "deadline"


def test_paths_are_told_apart() -> None:
    """A slow path's queue holds up a quick one; the costs of each are its own."""
    queue = Queue(known_seconds=3.5)
    queue.admission.observe(exchange("/quick"), 0.1)
    queue.add_many(4)
    assert queue.add() == "deadline"
    assert isinstance(queue.add("/quick"), Exchange)


def test_a_service_time_is_averaged() -> None:
    """One slow request does not change what is expected of the next; many do."""
    queue = Queue(known_seconds=0.1)
    queue.admission.observe(exchange(), 60.0)
    queue.add_many(3)
    queue = Queue(known_seconds=0.1)
    for _ in range(100):
        queue.admission.observe(exchange(), 8.0)
    queue.add_many(2)
    assert queue.add() == "deadline"


def test_after_a_lull_what_was_slow_is_not_taken_for_slow_any_more() -> None:
    """It may have been one large array. Not so while something runs, and what is quick stays so."""
    queue = Queue(threads=1, known_seconds=8.0)
    queue.admission.observe(exchange("/quick"), QUICK_SECONDS / 2)
    (running,) = queue.add_many(1)
    queue.admission.forget(100.0)
    assert queue.add() == "deadline"
    queue.pool.taken.clear()
    queue.admission.leave(running)
    queue.admission.forget(100.0 + FORGET_SECONDS)
    queue.add_many(1)
    assert queue.add() == "deadline"
    queue.pool.taken.clear()
    queue.admission.forget(100.1 + FORGET_SECONDS)
    queue.add_many(2)
    assert queue.admission.is_quick(exchange("/quick"))


def test_what_is_remembered_is_bounded() -> None:
    """Of more paths than an application has, the first are known."""
    queue = Queue()
    for number in range(MAX_PATHS + 10):
        queue.admission.observe(exchange(f"/{number}"), 4.0)
    known, unknown = queue.add("/0"), queue.add(f"/{MAX_PATHS}")
    assert isinstance(known, Exchange)
    assert isinstance(unknown, Exchange)
    assert (known.cost, unknown.cost) == (4.0, 0.0)


def test_a_path_of_many_slashes_is_no_other() -> None:
    """Applications serve //predict as /predict: it costs as much, and takes no place from those that exist."""
    queue = Queue(threads=4, known_seconds=3.5)
    for count in range(2, MAX_PATHS + 10):
        queue.admission.observe(exchange(f"{'/' * count}predict"), 0.1)
    queue.admission.observe(exchange("/other"), 4.0)
    for path, expected in (("/predict", 3.5), ("//predict", 3.5), ("///predict", 3.5), ("/other", 4.0)):
        new = queue.add(path)
        assert isinstance(new, Exchange)
        assert new.cost == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0.001, 1), (3.5, 7), (9.0, 9), (1_000.0, 60)])
def test_when_to_come_again(seconds: float, expected: int) -> None:
    """Retry-After is when the backlog of now will have been worked off, within bounds."""
    queue = Queue(known_seconds=seconds)
    queue.add_many(4 if seconds == 3.5 else 2)
    assert queue.admission.retry_after_seconds() == expected


def test_what_has_become_hopeless_is_found() -> None:
    """Five wait when it turns out that each takes 4 s: those that cannot be answered in time are given up."""
    queue = Queue()
    exchanges = queue.add_many(2 + MAX_PENDING)
    assert queue.admission.hopeless(4.0) == exchanges[4:]
    for given_up in exchanges[4:]:
        given_up.abandoned = True
    assert queue.admission.hopeless(4.0) == []
    assert queue.add() == "pending"


def test_a_guess_is_forgotten_once_it_is_known_better() -> None:
    """Until a request ends, its path takes as long as one runs by now; then, exactly as long as that one took."""
    queue = Queue(threads=1)
    running, waiting = queue.add_many(2)
    for now, cost in ((0.5, 0.5), (1.5, 1.5), (1.0, 1.5)):
        assert queue.admission.hopeless(now) == []
        assert waiting.cost == pytest.approx(cost, abs=0.01)
    queue.admission.observe(running, 4.0)
    known = queue.add()
    assert isinstance(known, Exchange)
    assert known.cost == 4.0


def test_the_first_in_the_queue_has_its_chance() -> None:
    """However long a request is expected to take, the next to be run is not given up before."""
    queue = Queue(threads=1)
    running, _ = queue.add_many(2)
    queue.admission.observe(running, 50.0)
    assert queue.admission.hopeless(5.0) == []


def test_nothing_is_hopeless_where_all_threads_are_stuck() -> None:
    """They may come back; whoever waits is answered at the deadline."""
    queue = Queue(threads=1)
    first, _ = queue.add_many(2)
    queue.pool.overdue.add(first)
    assert queue.admission.hopeless(9.0) == []


def served(waited_seconds: float) -> Exchange:
    """A request that has waited so long for what its model makes."""
    request = exchanges.exchange()
    request.waited_seconds = waited_seconds
    return request


@pytest.mark.parametrize(
    ("observed", "seconds", "expected"),
    [
        ([], 0.0, False),
        ([served(0.0)], 0.0001, True),
        ([served(0.0)], 0.001, False),
        ([served(0.9999)], 1.0, True),
        ([served(0.9)], 1.0, False),
        ([served(math.inf)], 1.0, True),
        ([served(0.9)] + [served(math.inf)] * 100, 1.0, True),
        ([served(0.9999)] + [served(0.0)] * 100, 1.0, False),
    ],
    ids=["unknown", "quick", "slow", "waits", "slow-and-waits", "waits-in-a-thread", "slow-once", "waits-or-not"],
)
def test_quick_is_what_is_known_to_keep_a_thread_busy_for_next_to_no_time(
    observed: list[Exchange], seconds: float, expected: bool
) -> None:
    """What it waits for does not count; of one that a thread of the pool ran nothing else is known."""
    queue = Queue(threads=9)
    for request in observed:
        queue.admission.observe(request, seconds)
    assert queue.admission.is_quick(exchanges.exchange()) is expected


def test_what_waits_and_turns_out_to_be_slow_takes_as_long_as_before() -> None:
    """What was seen of it is the time that it has kept a thread busy, not that of its batch."""
    queue = Queue(threads=9)
    queue.admission.observe(served(3.9999), 4.0)
    queue.admission.observe_slow(exchanges.exchange(), 0.005)
    assert not queue.admission.is_quick(exchanges.exchange())
    added = queue.add("/")
    assert isinstance(added, Exchange)
    assert added.cost == 4.0


def test_quick_is_not_what_has_turned_out_to_be_slow() -> None:
    """Requests that were let in as quick ones wait for threads like any others then."""
    queue = Queue(threads=9, known_seconds=0.0001)
    quick = queue.add_many(1)[0]
    queue.admission.observe_slow(quick, 0.005)
    assert not queue.admission.is_quick(quick)
