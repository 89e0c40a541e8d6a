"""The I/O thread's role by itself: who runs what is quick, and what becomes of what is not."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import cast

import pytest

from inference_api.worker import role
from inference_api.worker.admission import Admission
from inference_api.worker.loop import Loop
from inference_api.worker.pool import MAX_UNSENT_BYTES, Outbox, Pool
from inference_api.worker.role import Role
from inference_api.worker.wsgi import Exchange
from tests.unit.exchanges import LIMIT_SECONDS, exchange, refuse_thread, wait_for

NO_FD = -1  # nobody sleeps
QUICK, ALSO_QUICK, SLOW, LATER = "/quick", "/also-quick", "/slow", "/later"


class Later:
    """An answer that is there when a test says so."""

    def __init__(self) -> None:
        self.tell: Callable[[], None] | None = None

    def when_ready(self, tell: Callable[[], None]) -> None:
        self.tell = tell

    def __iter__(self) -> Iterator[bytes]:
        raise NotImplementedError


class Worker:
    """A role, a pool of two threads, and a loop that a test scripts turn by turn."""

    def __init__(self) -> None:
        self.outbox = Outbox(NO_FD)
        self.pool = Pool("role", self.run)
        self.admission = Admission(self.pool, 100, 60.0)
        self.admission.observe(exchange(QUICK), 0.0001)
        self.admission.observe(exchange(ALSO_QUICK), 0.0001)
        self.admission.observe(exchange(SLOW), 1.0)
        self.admission.observe(exchange(LATER), 0.0001)
        self.role = Role(cast(Loop, self), self.pool, self.outbox.resumed, self.admission)
        self.ran_by: dict[Exchange, threading.Thread] = {}
        self.ended: list[Exchange] = []
        self.laters: dict[Exchange, Later] = {}
        self.gates: dict[Exchange, threading.Event] = {}
        self.naps: dict[Exchange, float] = {}
        self.receives: list[Callable[[], None]] = []
        self.responds: list[Callable[[], None]] = []
        self.waits: list[bool] = []
        self.io_threads: list[threading.Thread] = []
        self.is_ended = False

    def run(self, exchange: Exchange) -> None:
        self.ran_by[exchange] = threading.current_thread()
        if exchange in self.gates:
            assert self.gates[exchange].wait(LIMIT_SECONDS)
        time.sleep(self.naps.get(exchange, 0.0))
        if exchange.path == LATER and exchange not in self.laters:
            self.laters[exchange] = exchange.later = Later()
            exchange._outbox = self.outbox
            return
        exchange.later = None
        self.ended.append(exchange)

    def add(self, path: str, *, is_gated: bool = False, seconds: float = 0.0) -> Exchange:
        """A request that has come; one that is gated runs until its gate is opened."""
        new = exchange(path)
        self.naps[new] = seconds
        if is_gated:
            self.gates[new] = threading.Event()
        assert self.admission.enter(new) is None
        self.pool.submit(new)
        return new

    def add_quick(self) -> None:
        self.add(QUICK)

    # The loop.

    def is_over(self) -> bool:
        return self.is_ended

    def receive(self, *, may_wait: bool) -> None:
        self.waits.append(may_wait)
        self.io_threads.append(threading.current_thread())
        if self.receives:
            self.receives.pop(0)()

    def respond(self) -> None:
        if self.responds:
            self.responds.pop(0)()
        time.sleep(0.001)

    def serve(self) -> threading.Thread:
        thread = threading.Thread(target=self.role.serve)
        thread.start()
        return thread


@pytest.fixture
def worker() -> Iterator[Worker]:
    """It serves, its threads are idle, and it has seen quick requests of late."""
    worker = Worker()
    worker.pool.grow(2)
    thread = worker.serve()
    worker.receives.append(worker.add_quick)
    wait_for(lambda: worker.role._is_watched and len(worker.pool.idle) == 2)
    yield worker
    for gate in worker.gates.values():
        gate.set()
    worker.is_ended = True
    thread.join(LIMIT_SECONDS)
    assert not thread.is_alive()


def test_who_has_the_role_runs_what_is_quick_and_nothing_else(worker: Worker) -> None:
    """The rest goes to the threads of the pool."""
    added: list[Exchange] = []
    has_role: list[threading.Thread] = []

    def receive() -> None:
        has_role.append(threading.current_thread())
        added.extend(worker.add(path) for path in (QUICK, SLOW))

    worker.receives.append(receive)
    wait_for(lambda: bool(added) and set(added) <= set(worker.ended))
    assert [worker.ran_by[each] in has_role for each in added] == [True, False]


def test_what_was_left_for_being_quick_is_not_forgotten_when_it_no_longer_is(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the selector is waited for, the pool is woken for it."""
    monkeypatch.setattr(role, "TURN_SECONDS", 0.0)
    added: list[Exchange] = []
    seen: list[tuple[int, list[bool]]] = []

    def look() -> None:
        wait_for(lambda: len(set(added) & set(worker.ended)) == 3)
        seen.append((len(worker.pool.jobs), worker.waits[-1:]))

    worker.responds.append(lambda: worker.admission.observe_slow(exchange(QUICK), 1.0))
    worker.receives.extend([lambda: added.extend(worker.add(QUICK) for _ in range(3)), look])
    wait_for(lambda: bool(seen))
    assert seen == [(0, [True])]


def test_nothing_quick_is_run_while_answers_are_made_too_fast(worker: Worker) -> None:
    """It waits like the others until there is room for its answer."""
    worker.pool.unsent_bytes = MAX_UNSENT_BYTES + 1
    added: list[Exchange] = []
    worker.receives.append(lambda: added.append(worker.add(QUICK)))
    wait_for(lambda: bool(added))
    turns = len(worker.waits)
    wait_for(lambda: len(worker.waits) > turns + 3)
    assert not worker.ran_by.keys() & set(added)
    worker.pool.unsent_bytes = 0
    wait_for(lambda: added[0] in worker.ended)


def test_no_more_run_at_once_than_there_are_threads_when_one_is_not_quick(worker: Worker) -> None:
    """The thread whose place was taken stays idle while the quick one runs, and ends when it turns out slow."""
    first: list[Exchange] = []
    worker.receives.append(lambda: first.append(worker.add(QUICK, is_gated=True)))
    wait_for(lambda: bool(first) and first[0] in worker.ran_by)
    others = [worker.add(SLOW, is_gated=True) for _ in range(3)]
    worker.pool.wake()
    turns = len(worker.waits)
    wait_for(lambda: len(worker.waits) > turns + 3)  # another thread has the role
    assert worker.io_threads[-1] is not worker.ran_by[first[0]]
    assert [each in worker.ran_by for each in others] == [True, False, False]
    for gate in worker.gates.values():
        gate.set()
    wait_for(lambda: set(others) <= set(worker.ended))
    assert first[0] in worker.ended


def test_who_had_the_role_does_not_take_it_back(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow one ends just while the next who has the role runs a quick one: the role stays where it is."""
    added: list[Exchange] = []
    worker.receives.append(lambda: added.append(worker.add(QUICK, is_gated=True)))
    wait_for(lambda: bool(added) and added[0] in worker.ran_by)
    turns = len(worker.waits)
    wait_for(lambda: len(worker.waits) > turns + 3)  # another thread has the role
    monkeypatch.setattr(role, "TAKE_OVER_SECONDS", 2 * LIMIT_SECONDS)  # and keeps it
    worker.receives.append(lambda: added.append(worker.add(ALSO_QUICK, is_gated=True)))
    wait_for(lambda: len(added) == 2 and added[1] in worker.ran_by)
    worker.gates[added[0]].set()
    wait_for(lambda: added[0] in worker.ended and len(worker.pool.idle) == 1)
    worker.gates[added[1]].set()
    wait_for(lambda: added[1] in worker.ended and len(worker.pool.idle) == 2)
    turns = len(worker.waits)
    wait_for(lambda: len(worker.waits) > turns + 3)
    assert set(worker.io_threads[turns:]) == {worker.ran_by[added[1]]}
    others = [worker.add(SLOW, is_gated=True) for _ in range(2)]
    worker.pool.wake()
    wait_for(lambda: set(others) <= set(worker.ran_by))  # there are two threads, both of which can be woken


def test_the_role_needs_no_thread_to_be_started(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where none is to be had, it still goes on from who is busy, again and again."""
    monkeypatch.setattr(threading.Thread, "start", refuse_thread)

    def be_slow(path: str) -> None:
        added: list[Exchange] = []
        worker.receives.append(lambda: added.append(worker.add(path, is_gated=True)))
        wait_for(lambda: bool(added) and added[0] in worker.ran_by)
        turns = len(worker.waits)
        wait_for(lambda: len(worker.waits) > turns + 3)
        assert worker.io_threads[-1] is not worker.ran_by[added[0]]
        worker.gates[added[0]].set()
        wait_for(lambda: added[0] in worker.ended and len(worker.pool.idle) == 2)

    be_slow(QUICK)
    be_slow(ALSO_QUICK)
    assert not caplog.records


def test_no_place_is_lost_while_the_role_goes_round(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many are taken for quick and are not, and end at any moment: each ends once, and two threads are idle again."""
    monkeypatch.setattr(role, "TAKE_OVER_SECONDS", 0.002)
    monkeypatch.setattr(worker.admission, "observe_slow", lambda *_: None)  # or they were not tried again
    chosen = random.Random(1)
    added: list[Exchange] = []

    def receive() -> None:
        for each in worker.pool.taken.keys() & set(worker.ended):
            worker.pool.take_back(each)
            worker.admission.leave(each)
        if len(worker.pool.taken) < 3:
            path, seconds = chosen.choice((QUICK, QUICK, SLOW)), chosen.choice((0.0, 0.0, 0.001, 0.003, 0.007))
            added.append(worker.add(path, seconds=seconds))

    worker.receives.extend([receive] * 500)
    wait_for(lambda: not worker.receives and set(added) <= set(worker.ended))
    changes = sum(before is not after for before, after in pairwise(worker.io_threads))
    assert len(added) > 100 and changes > 3
    assert len(worker.ended) == len(set(worker.ended))
    wait_for(lambda: len(worker.pool.idle) == 2)


def test_who_waits_for_an_answer_keeps_a_place_but_no_thread(worker: Worker) -> None:
    """Two threads: a third request waits until one of two answers has come, and all are run by who has the role."""
    added: list[Exchange] = []
    worker.receives.append(lambda: added.extend(worker.add(LATER) for _ in range(3)))
    wait_for(lambda: len(worker.laters) == 2 and all(later.tell for later in worker.laters.values()))
    turns = len(worker.waits)
    wait_for(lambda: len(worker.waits) > turns + 3)
    assert list(worker.laters) == added[:2] and not worker.pool.idle
    for count, each in enumerate(added, 1):
        wait_for(lambda each=each: each in worker.laters and worker.laters[each].tell is not None)  # type: ignore[misc]
        tell = worker.laters[each].tell
        assert tell is not None
        tell()
        wait_for(lambda count=count: worker.ended.count(added[count - 1]) == 1)  # type: ignore[misc]
    wait_for(lambda: len(worker.pool.idle) == 2)
    assert {worker.ran_by[each] for each in added} <= set(worker.io_threads)


def test_what_waits_is_begun_although_the_next_request_is_slow(worker: Worker) -> None:
    """Whoever takes the role over begins it; the slow one is of another path, and may never end."""
    added: list[Exchange] = []
    worker.receives.append(lambda: added.extend([worker.add(LATER), worker.add(QUICK, is_gated=True)]))
    wait_for(lambda: len(added) == 2 and worker.laters.get(added[0]) is not None)
    wait_for(lambda: worker.laters[added[0]].tell is not None)
    tell = worker.laters[added[0]].tell
    assert tell is not None
    assert added[1] not in worker.ended
    tell()
    wait_for(lambda: added[0] in worker.ended)
    assert added[1] not in worker.ended


def test_what_is_slow_before_it_has_to_wait_waits_in_its_thread(worker: Worker) -> None:
    """That has become one of the pool's, in its place; nothing is begun that nobody could end."""
    added: list[Exchange] = []
    worker.receives.append(lambda: added.append(worker.add(LATER, is_gated=True)))
    wait_for(lambda: bool(added) and added[0] in worker.ran_by)
    turns = len(worker.waits)
    wait_for(lambda: len(worker.waits) > turns + 3)  # another thread has the role
    worker.gates[added[0]].set()
    wait_for(lambda: added[0] in worker.ended)
    assert worker.laters[added[0]].tell is None
    wait_for(lambda: len(worker.pool.idle) == 2)
