"""Direct, Gathering and Batcher: with a clock made by hand, and models that stop where a test wants them to."""

import gc
import logging
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_api.batching import MAX_GATHER_SECONDS, Batcher, Caller, Direct, Gathering
from inference_api.logs import serving
from inference_api.model import AbandonedError, InferenceError, UnfitInputError
from tests.unit.exchanges import refuse_thread

LIMIT_SECONDS = 60.0
STRESS_INPUTS = 100_000
STRESS_THREADS = 32


class Clock:
    """Stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Planned(Gathering):
    """Begins each batch when as many inputs are there as the test has planned for it."""

    def __init__(self, max_batch_size: int, sizes: Sequence[int] = ()) -> None:
        super().__init__(max_batch_size, Clock())
        self.sizes = list(sizes)

    def plan(self, waiting: int) -> tuple[int, float]:
        enough = self.sizes.pop(0) if self.sizes else 0
        return enough, 0.0 if waiting >= enough else LIMIT_SECONDS

    def waited(self, awaited: int, came: int) -> None:
        assert came >= awaited


class Gated:
    """Answers an input with its negative; each batch stops in it until the test lets it go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.let_go = threading.Semaphore(0)

    def predict_batch(self, inputs: list[int]) -> list[int]:
        self.batches.append(list(inputs))
        self.entered.release()
        assert self.let_go.acquire(timeout=LIMIT_SECONDS)
        return [-value for value in inputs]

    def predict(self, value: int) -> int:
        raise AssertionError("no batch has failed")

    def wait_until_entered(self) -> None:
        assert self.entered.acquire(timeout=LIMIT_SECONDS)


@dataclass(frozen=True)
class Poison:
    """An input that makes a model raise."""

    kind: type[BaseException]


class Poisoned:
    """Answers an input with its negative, raises what a Poison says, and is called by one thread at a time."""

    def __init__(self, spoil: Callable[[list[Any]], Any] = list) -> None:
        self.alone: list[Any] = []
        self.sizes: list[int] = []
        self._spoil = spoil
        self._is_called = threading.Lock()

    def predict_batch(self, inputs: list[Any]) -> Any:
        assert self._is_called.acquire(blocking=False), "called by two threads at once"
        try:
            self.sizes.append(len(inputs))
            return self._spoil([self._answer(value) for value in inputs])
        finally:
            self._is_called.release()

    def predict(self, value: Any) -> Any:
        assert self._is_called.acquire(blocking=False), "called by two threads at once"
        try:
            self.alone.append(value)
            return self._answer(value)
        finally:
            self._is_called.release()

    def _answer(self, value: Any) -> Any:
        if isinstance(value, Poison):
            raise value.kind("poison")
        return -value


class Asked(Caller):
    """A request that is abandoned once its turn has been looked at as often as `answers` says."""

    def __init__(self, *answers: bool) -> None:
        self._answers = list(answers)

    @property
    def abandoned(self) -> bool:
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]

    @abandoned.setter
    def abandoned(self, value: bool) -> None:
        self._answers = [value]


never = Asked(False)
always = Asked(True)


def batcher_of(
    model: Gated | Poisoned, gathering: Gathering, observe: Callable[[int], None] = lambda _size: None
) -> Batcher:
    return Batcher(model.predict_batch, model.predict, gathering, observe)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """As many as a test needs at once."""
    with ThreadPoolExecutor(64) as executor:
        yield executor


# Gathering.


def test_gathering_begins_the_first_batch_at_once() -> None:
    """Nothing is known yet, so nothing is awaited."""
    assert Gathering(64, Clock()).plan(1)[1] == 0.0


@pytest.mark.parametrize(
    ("size", "waiting_after", "seconds", "waiting", "expected"),
    [
        (64, 0, 0.005, 1, (64, MAX_GATHER_SECONDS)),
        (64, 0, 0.001, 1, (64, 0.0005)),  # never longer than half a batch
        (32, 32, 0.005, 32, (64, MAX_GATHER_SECONDS)),  # those that ran, and those that waited meanwhile
        (60, 40, 0.005, 63, (64, MAX_GATHER_SECONDS)),  # never more than fit in
        (60, 40, 0.005, 64, (64, 0.0)),
        (16, 0, 0.005, 16, (16, 0.0)),
        (1, 0, 0.005, 1, (1, 0.0)),  # a lone client does not wait
        (16, 0, 0.0, 1, (16, 0.0)),  # nothing is gained with a model that takes no time
    ],
)
def test_gathering_waits_for_the_clients_of_the_last_batch(
    size: int, waiting_after: int, seconds: float, waiting: int, expected: tuple[int, float]
) -> None:
    """As many inputs are awaited as clients were there, for no longer than half of what a batch takes."""
    clock = Clock()
    gathering = Gathering(64, clock)
    started = clock.now
    clock.now += seconds
    gathering.ran(size, waiting_after, started)
    enough, longest = gathering.plan(waiting)
    assert enough == expected[0]
    assert longest == pytest.approx(expected[1])


def test_gathering_does_not_wait_after_a_pause() -> None:
    """Clients that have not come back by now are not about to."""
    clock = Clock()
    gathering = Gathering(64, clock)
    clock.now += 0.005
    gathering.ran(64, 0, clock.now - 0.005)
    clock.now += 0.0021
    assert gathering.plan(1) == (64, 0.0)


def test_gathering_stops_waiting_where_nobody_comes_and_tries_again_later() -> None:
    """Waits in vain become rare: about one in twenty batches; one that pays brings them back."""
    clock = Clock()
    gathering = Gathering(64, clock)

    def waits() -> bool:
        clock.now += 0.005
        gathering.ran(2, 0, clock.now - 0.005)
        return gathering.plan(1)[1] > 0

    vain = 0
    for _ in range(1000):
        if waits():
            vain += 1
            gathering.waited(1, 0)
    assert 5 < vain < 100
    while not waits():
        pass
    gathering.waited(1, 1)
    assert waits()


@given(
    st.integers(1, 100),
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 100), st.floats(0, 10), st.floats(0, 10))),
)
def test_gathering_waits_only_for_what_can_come(
    max_batch_size: int, steps: list[tuple[int, int, float, float]]
) -> None:
    """Whatever happens: for at most MAX_GATHER_SECONDS, for what fits in a batch and is not there yet."""
    clock = Clock()
    gathering = Gathering(max_batch_size, clock)
    for waiting, others, took, pause in steps:
        enough, seconds = gathering.plan(waiting)
        assert 0.0 <= seconds <= MAX_GATHER_SECONDS
        assert enough <= max_batch_size
        if seconds:
            assert waiting < enough
            gathering.waited(enough - waiting, others)
        clock.now += took
        gathering.ran(min(waiting, max_batch_size), others, clock.now - took)
        clock.now += pause


# Batcher: who is in which batch.


def test_what_comes_while_a_batch_runs_is_the_next_batch(threads: ThreadPoolExecutor) -> None:
    """The first input runs alone, the ten that come meanwhile run together, and each gets its own answer."""
    model = Gated()
    sizes: list[int] = []
    batcher = batcher_of(model, Planned(64, [1, 10]), sizes.append)
    first = threads.submit(batcher.predict, [0], never)
    model.wait_until_entered()
    others = [threads.submit(batcher.predict, [number], never) for number in range(1, 11)]
    model.let_go.release(2)
    assert first.result(LIMIT_SECONDS) == [0]
    assert [other.result(LIMIT_SECONDS) for other in others] == [[-number] for number in range(1, 11)]
    assert [sorted(batch) for batch in model.batches] == [[0], list(range(1, 11))]
    assert sizes == [1, 10]


def test_a_batch_holds_no_more_than_max_batch_size(threads: ThreadPoolExecutor) -> None:
    """Ten single inputs and batches of four: three batches."""
    model = Gated()
    batcher = batcher_of(model, Planned(4, [10]))
    model.let_go.release(3)
    calls = [threads.submit(batcher.predict, [number], never) for number in range(10)]
    assert [call.result(LIMIT_SECONDS) for call in calls] == [[-number] for number in range(10)]
    assert [len(batch) for batch in model.batches] == [4, 4, 2]


def test_an_array_longer_than_a_batch_is_cut_up_in_order(threads: ThreadPoolExecutor) -> None:
    """Its outputs come back whole and in order."""
    model = Gated()
    batcher = batcher_of(model, Planned(4))
    model.let_go.release(3)
    assert threads.submit(batcher.predict, range(10), never).result(LIMIT_SECONDS) == [-n for n in range(10)]
    assert model.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_arrays_share_batches(threads: ThreadPoolExecutor) -> None:
    """Two arrays of three fill a batch of four and one of two; none gets an output of the other."""
    model = Gated()
    batcher = batcher_of(model, Planned(4, [6]))
    model.let_go.release(2)
    calls = [threads.submit(batcher.predict, [number, number + 1, number + 2], never) for number in (10, 20)]
    assert [call.result(LIMIT_SECONDS) for call in calls] == [[-10, -11, -12], [-20, -21, -22]]
    assert [len(batch) for batch in model.batches] == [4, 2]


def test_no_inputs_give_no_outputs() -> None:
    """An empty array does not trouble the model."""
    model = Gated()
    assert batcher_of(model, Planned(4)).predict([], never) == []
    assert model.batches == []


# Batcher: calls and batches that do not begin or end together.


def test_a_call_ends_as_soon_as_its_own_outputs_are_there(threads: ThreadPoolExecutor) -> None:
    """Not with the last batch of a long array that came after it."""
    model = Gated()
    batcher = batcher_of(model, Planned(2))
    short = threads.submit(batcher.predict, [1], never)
    model.wait_until_entered()
    long = threads.submit(batcher.predict, range(10, 16), never)
    model.let_go.release()
    assert short.result(LIMIT_SECONDS) == [-1]
    assert not long.done()
    model.let_go.release(3)
    assert long.result(LIMIT_SECONDS) == [-n for n in range(10, 16)]
    assert model.batches == [[1], [10, 11], [12, 13], [14, 15]]


def test_what_shares_a_batch_with_the_end_of_a_long_array_is_answered_with_it(threads: ThreadPoolExecutor) -> None:
    """And what comes later has a batch of its own."""
    model = Gated()
    batcher = batcher_of(model, Planned(4, [6, 3, 1]))
    long = threads.submit(batcher.predict, range(10, 16), never)
    model.wait_until_entered()
    other = threads.submit(batcher.predict, [1], never)
    model.let_go.release()
    model.wait_until_entered()
    model.let_go.release()
    assert long.result(LIMIT_SECONDS) == [-n for n in range(10, 16)]
    assert other.result(LIMIT_SECONDS) == [-1]
    assert model.batches == [[10, 11, 12, 13], [14, 15, 1]]
    model.let_go.release()
    assert batcher.predict([2], never) == [-2]


def test_the_rest_of_an_array_that_has_failed_is_passed_over(threads: ThreadPoolExecutor) -> None:
    """It stands first in the queue, before what is still wanted."""
    model = Poisoned()
    batcher = batcher_of(model, Planned(2, [5]))
    failing = threads.submit(batcher.predict, [Poison(RuntimeError), 1, 2, 3], never)
    assert threads.submit(batcher.predict, [5], never).result(LIMIT_SECONDS) == [-5]
    with pytest.raises(InferenceError):
        failing.result(LIMIT_SECONDS)


def test_a_call_can_be_begun_without_waiting_for_it() -> None:
    """It tells, in another thread, when it has a result; who has begun it is free meanwhile."""
    model = Gated()
    call = batcher_of(model, Planned(2)).call([1, 2, 3], never)
    told: list[threading.Thread] = []
    has_told = threading.Event()

    def tell() -> None:
        told.append(threading.current_thread())
        has_told.set()

    call.begin(tell)
    model.wait_until_entered()
    assert not told
    model.let_go.release(2)
    assert has_told.wait(LIMIT_SECONDS)
    assert call.result() == [-1, -2, -3]
    assert told[0] is not threading.current_thread()
    assert len(told) == 1


def test_where_no_thread_can_be_started_a_call_fails_and_the_next_one_tries_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing of the failed call stays behind."""
    model = Poisoned()
    batcher = batcher_of(model, Planned(4))

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_thread)
        with pytest.raises(InferenceError, match="can't start new thread"):
            batcher.predict([1], never)
    assert batcher.predict([2], never) == [-2]
    assert model.sizes == [1]


def test_what_goes_wrong_around_a_batch_fails_it_and_ends_nothing() -> None:
    """Nobody waits for ever, and the next call is answered."""
    model = Poisoned()
    failures = [MemoryError()]

    def observe(_size: int) -> None:
        if failures:
            raise failures.pop()

    batcher = batcher_of(model, Planned(4), observe)
    with pytest.raises(InferenceError, match="MemoryError"):
        batcher.predict([1, 2], never)
    assert batcher.predict([2], never) == [-2]


def test_what_a_model_logs_is_known_by_its_request_where_there_is_one(threads: ThreadPoolExecutor) -> None:
    """A line of a batch of several requests belongs to none of them; of those predicted alone each does."""
    seen: list[tuple[Any, Any]] = []

    def look(value: int) -> int:
        seen.append((value, serving.environ))
        return -value

    def predict_batch(inputs: list[int]) -> list[int]:
        look(0)
        if len(inputs) == 1:
            return [look(value) for value in inputs]
        raise RuntimeError

    def serve(value: int) -> list[int]:
        serving.environ = {"of": value}
        return batcher.predict([value], never)

    batcher = Batcher(predict_batch, look, Planned(4, [1, 2]), lambda _size: None)
    assert threads.submit(serve, 7).result(LIMIT_SECONDS) == [-7]
    assert seen == [(0, {"of": 7}), (7, {"of": 7})]
    del seen[:]
    answers = [threads.submit(serve, value) for value in (1, 2)]
    assert [answer.result(LIMIT_SECONDS) for answer in answers] == [[-1], [-2]]
    assert seen[0] == (0, None)
    assert sorted(seen[1:]) == [(1, {"of": 1}), (2, {"of": 2})]


# Batcher: failures.


def test_a_poisonous_input_fails_alone(threads: ThreadPoolExecutor) -> None:
    """What shares its batch is answered; the failure is its own, with its place in its own array."""
    model = Poisoned()
    batcher = batcher_of(model, Planned(64, [6]))
    good = [threads.submit(batcher.predict, [number], never) for number in (1, 2)]
    unfit = threads.submit(batcher.predict, [3, Poison(ValueError)], never)
    broken = threads.submit(batcher.predict, [Poison(ZeroDivisionError), 4], never)
    assert [call.result(LIMIT_SECONDS) for call in good] == [[-1], [-2]]
    with pytest.raises(UnfitInputError, match=r"^poison$") as refused:
        unfit.result(LIMIT_SECONDS)
    assert refused.value.index == 1
    with pytest.raises(InferenceError, match=r"^the model raised ZeroDivisionError$") as failed:
        broken.result(LIMIT_SECONDS)
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
    assert model.sizes == [6]


def test_one_failure_fails_its_array_without_running_the_rest() -> None:
    """Neither the rest of the batch nor the rest of the array is predicted for a call that has failed."""
    model = Poisoned()
    batcher = batcher_of(model, Planned(4))
    with pytest.raises(UnfitInputError) as refused:
        batcher.predict([1, Poison(ValueError), *range(100)], never)
    assert refused.value.index == 1
    assert model.sizes == [4]
    assert model.alone == [1, Poison(ValueError)]
    assert batcher.predict([5], never) == [-5]


def _generator(outputs: list[Any]) -> Iterator[Any]:
    yield from outputs


class _RaisesHalfway(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield self[0]
        raise RuntimeError


class _Table(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ("a column", "another")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda outputs: outputs[:-1],
        lambda outputs: [*outputs, 0],
        lambda outputs: [],
        lambda outputs: None,
        lambda outputs: set(outputs),
        lambda outputs: dict.fromkeys(outputs),
        lambda outputs: "x" * len(outputs),
        lambda outputs: b"x" * len(outputs),
        _generator,
        _RaisesHalfway,
        _Table,
    ],
)
@pytest.mark.parametrize("size", [1, 5])
def test_outputs_that_are_not_as_promised_are_predicted_one_by_one(spoil: Callable[[Any], Any], size: int) -> None:
    """Too few, too many, without order, not a list: then nobody knows whose they are, and `predict` has the word."""
    model = Poisoned(spoil)
    assert batcher_of(model, Planned(64)).predict(range(1, size + 1), never) == [-n for n in range(1, size + 1)]
    assert model.alone == list(range(1, size + 1))


def test_a_tuple_of_outputs_is_as_good_as_a_list() -> None:
    """Nothing is predicted twice because of it."""
    model = Poisoned(tuple)
    assert batcher_of(model, Planned(64)).predict([1, 2], never) == [-1, -2]
    assert model.alone == []


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, MemoryError])
def test_no_exception_ends_a_thread_or_the_batcher(kind: type[BaseException], threads: ThreadPoolExecutor) -> None:
    """A model that calls sys.exit() has failed, no more."""
    batcher = batcher_of(Poisoned(), Planned(64, [2]))
    bad = threads.submit(batcher.predict, [Poison(kind)], never)
    good = threads.submit(batcher.predict, [1], never)
    assert good.result(LIMIT_SECONDS) == [-1]
    with pytest.raises(InferenceError, match=kind.__name__):
        bad.result(LIMIT_SECONDS)
    assert batcher.predict([2], never) == [-2]


def test_a_refusal_without_words_fails_its_own_call_only(threads: ThreadPoolExecutor) -> None:
    """A ValueError whose text cannot be had is a failure of the model like others."""

    class WordlessError(ValueError):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    batcher = batcher_of(Poisoned(), Planned(64, [2]))
    bad = threads.submit(batcher.predict, [Poison(WordlessError)], never)
    good = threads.submit(batcher.predict, [1], never)
    assert good.result(LIMIT_SECONDS) == [-1]
    with pytest.raises(RuntimeError, match="no words"):
        bad.result(LIMIT_SECONDS)


@pytest.mark.parametrize(
    ("kind", "message", "level", "has_traceback"),
    [
        (RuntimeError, "a batch failed: its inputs are predicted one by one", logging.WARNING, True),
        (ValueError, "a batch was refused: its inputs are predicted one by one", logging.INFO, False),
    ],
)
def test_a_batch_that_fails_is_logged(
    kind: type[BaseException], message: str, level: int, has_traceback: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure with its traceback; a refusal, which any client can bring about, in one line."""
    caplog.set_level(logging.INFO)
    with pytest.raises((InferenceError, UnfitInputError)):
        batcher_of(Poisoned(), Planned(64)).predict([1, Poison(kind)], never)
    (record,) = caplog.records
    assert (record.message, record.levelno, bool(record.exc_info)) == (message, level, has_traceback)
    assert vars(record)["size"] == 2


# Batcher: calls that nobody waits for.


def test_an_abandoned_call_is_not_put_into_a_batch(threads: ThreadPoolExecutor) -> None:
    """Its client has gone, or its deadline has passed, while it waited: the model never sees it."""
    model = Gated()
    batcher = batcher_of(model, Planned(64, [1, 3]))
    gone = Asked(False)
    first = threads.submit(batcher.predict, [0], never)
    model.wait_until_entered()
    abandoned = threads.submit(batcher.predict, [7, 8], gone)
    gone.abandoned = True
    other = threads.submit(batcher.predict, [1], never)
    model.let_go.release(2)
    assert first.result(LIMIT_SECONDS) == [0]
    assert other.result(LIMIT_SECONDS) == [-1]
    with pytest.raises(AbandonedError):
        abandoned.result(LIMIT_SECONDS)
    assert model.batches == [[0], [1]]


def test_an_abandoned_call_that_is_alone_makes_no_batch() -> None:
    """And those behind it are answered."""
    model = Poisoned()
    batcher = batcher_of(model, Planned(64, [1]))
    with pytest.raises(AbandonedError):
        batcher.predict([1], always)
    assert model.sizes == []
    assert batcher.predict([2], never) == [-2]


def test_a_request_is_waiting_until_its_batch_begins(threads: ThreadPoolExecutor) -> None:
    """Its server may give it up until then; afterwards its client may have closed its half only, and is answered."""
    model = Gated()
    batcher = batcher_of(model, Planned(64, [1, 1]))
    runs, waits = Asked(False), Asked(False)
    first = threads.submit(batcher.predict, [1], runs)
    model.wait_until_entered()
    second = threads.submit(batcher.predict, [2, 3], waits)
    model.let_go.release()
    assert first.result(LIMIT_SECONDS) == [-1]
    model.wait_until_entered()
    assert not runs.is_waiting and not waits.is_waiting
    model.let_go.release()
    assert second.result(LIMIT_SECONDS) == [-2, -3]


def test_an_array_abandoned_between_its_batches_is_not_finished() -> None:
    """What has been predicted is thrown away, the rest is not predicted."""
    model = Poisoned()
    answers = Asked(False, True)
    with pytest.raises(AbandonedError):
        batcher_of(model, Planned(2)).predict(range(6), answers)
    assert model.sizes == [2]


def test_an_abandoned_call_is_not_predicted_alone_either() -> None:
    """Its batch has failed, and nobody waits for it any more."""
    model = Poisoned()
    answers = Asked(False, False, True)
    with pytest.raises(AbandonedError):
        batcher_of(model, Planned(3)).predict([1, 2, Poison(RuntimeError)], answers)
    assert model.alone == [1]


# All of it at once.


POISONS = st.sampled_from([ValueError, UnicodeError, RuntimeError, SystemExit, MemoryError]).map(Poison)
INPUTS = st.lists(st.integers(1, 1_000_000) | POISONS, max_size=7) | st.lists(st.integers(1, 1_000_000), max_size=7)
SPOILS: list[Callable[[list[Any]], Any]] = [list, list, tuple, set, _generator, lambda outputs: outputs[1:]]


def outcome(function: Callable[[], Any]) -> Any:
    """What a call came to, fit to be compared."""
    try:
        return function()
    except UnfitInputError as exc:
        return UnfitInputError, str(exc), exc.index
    except (InferenceError, AbandonedError) as exc:
        return type(exc), str(exc)


def expected(inputs: Sequence[Any], is_abandoned: bool) -> Any:
    """What a call must come to, whoever shares its batches."""
    if inputs and is_abandoned:
        return AbandonedError, ""
    for index, value in enumerate(inputs):
        if isinstance(value, Poison):
            if issubclass(value.kind, ValueError):
                return UnfitInputError, "poison", index
            return InferenceError, f"the model raised {value.kind.__name__}"
    return [-value for value in inputs]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(INPUTS, st.sampled_from([False, False, False, True])), min_size=1, max_size=8),
    st.integers(1, 9),
    st.sampled_from(SPOILS),
    st.integers(0, 30),
)
def test_every_answer_is_its_own(
    calls: list[tuple[list[Any], bool]], max_batch_size: int, spoil: Callable[[list[Any]], Any], awaited: int
) -> None:
    """Whatever the sizes, arrays, failures and departures: what a call comes to depends on its own inputs only."""
    model = Poisoned(spoil)
    sizes: list[int] = []
    total = sum(len(inputs) for inputs, _ in calls)
    batcher = batcher_of(model, Planned(max_batch_size, [min(awaited, total)]), sizes.append)
    start = threading.Barrier(len(calls))

    def call(inputs: list[Any], is_abandoned: bool) -> Any:
        start.wait(LIMIT_SECONDS)
        return outcome(lambda: batcher.predict(inputs, always if is_abandoned else never))

    with ThreadPoolExecutor(len(calls)) as executor:
        found = [executor.submit(call, *arguments) for arguments in calls]
        assert [future.result(LIMIT_SECONDS) for future in found] == [expected(*arguments) for arguments in calls]
    assert all(size <= max_batch_size for size in sizes)
    assert batcher.predict([5], never) == [-5]


def test_a_hundred_thousand_inputs_of_many_threads_are_each_answered_right() -> None:
    """Arrays of all lengths from 32 threads, one input in 200 poisonous, one call in 50 given up: no wrong answer."""
    model = Poisoned()
    batcher = batcher_of(model, Gathering(64))
    kinds = [ValueError, RuntimeError, SystemExit]

    def client(seed: int) -> tuple[int, list[Any]]:
        chance = random.Random(seed)
        done, wrong = 0, []
        while done < STRESS_INPUTS // STRESS_THREADS:
            size = chance.choice([1, 1, 1, 1, 1, 1, 1, 1, 2, 5, 20])
            inputs: list[Any] = [
                Poison(chance.choice(kinds)) if chance.random() < 1 / 200 else chance.randrange(1, 2**53)
                for _ in range(size)
            ]
            is_abandoned = chance.random() < 1 / 50
            call = outcome(lambda: batcher.predict(inputs, always if is_abandoned else never))  # noqa: B023 - called now
            if call != expected(inputs, is_abandoned):
                wrong.append((inputs, call))
            done += size
        return done, wrong

    logging.disable(logging.WARNING)  # a line for each batch that fails, of which there are thousands
    try:
        with ThreadPoolExecutor(STRESS_THREADS) as executor:
            results = list(executor.map(client, range(STRESS_THREADS)))
    finally:
        logging.disable(logging.NOTSET)
    assert [wrong for _, wrong in results if wrong] == []
    assert sum(done for done, _ in results) >= STRESS_INPUTS
    assert max(model.sizes) > 1


# Direct.


def test_direct_answers_arrays_in_order() -> None:
    """One call of `predict` for each input."""
    assert Direct(Poisoned().predict).predict([3, 1, 2], never) == [-3, -1, -2]


@pytest.mark.parametrize(
    ("kind", "failure", "message"),
    [
        (ValueError, UnfitInputError, "poison"),
        (UnicodeError, UnfitInputError, "poison"),
        (KeyError, InferenceError, "the model raised KeyError"),
        (SystemExit, InferenceError, "the model raised SystemExit"),
        (KeyboardInterrupt, InferenceError, "the model raised KeyboardInterrupt"),
    ],
)
def test_direct_tells_unfit_inputs_from_failures(
    kind: type[BaseException], failure: type[Exception], message: str
) -> None:
    """A ValueError is the input's fault and keeps its words; all else is the model's."""
    model = Poisoned()
    with pytest.raises(failure, match=f"^{message}$") as raised:
        Direct(model.predict).predict([1, Poison(kind), 2], never)
    assert isinstance(raised.value.__cause__, kind)
    assert getattr(raised.value, "index", 1) == 1
    assert model.alone == [1, Poison(kind)]


def test_direct_stops_between_inputs_when_nobody_waits() -> None:
    """The rest of an array is not predicted for a client that has left."""
    model = Poisoned()
    answers = Asked(False, False, True)
    with pytest.raises(AbandonedError):
        Direct(model.predict).predict([1, 2, 3, 4], answers)
    assert model.alone == [1, 2]


def test_direct_calls_a_thread_safe_model_from_several_threads(threads: ThreadPoolExecutor) -> None:
    """Two predictions meet inside the model."""
    both = threading.Barrier(2)
    direct = Direct(lambda value: (both.wait(LIMIT_SECONDS), value)[1])
    calls = [threads.submit(direct.predict, [number], never) for number in (1, 2)]
    assert [call.result(LIMIT_SECONDS) for call in calls] == [[1], [2]]


def test_direct_calls_a_model_that_is_not_thread_safe_from_one_thread_at_a_time(threads: ThreadPoolExecutor) -> None:
    """Sixteen threads with arrays: `Poisoned` fails if two meet in it, and each gets its own answers."""
    model = Poisoned()
    direct = Direct(model.predict, thread_safe=False)
    start = threading.Barrier(16)

    def call(number: int) -> list[Any]:
        start.wait(LIMIT_SECONDS)
        return direct.predict(range(number, number + 50), never)

    assert list(threads.map(call, range(16))) == [[-n for n in range(m, m + 50)] for m in range(16)]


def test_direct_asks_whether_anybody_waits_only_when_it_is_its_turn(threads: ThreadPoolExecutor) -> None:
    """A call that is given up while another thread has the model is not run afterwards."""
    model = Gated()
    direct = Direct(lambda value: model.predict_batch([value])[0], thread_safe=False)
    first = threads.submit(direct.predict, [1], never)
    model.wait_until_entered()
    gone = Asked(False)
    second = threads.submit(direct.predict, [2], gone)
    gone.abandoned = True
    model.let_go.release(2)
    assert first.result(LIMIT_SECONDS) == [-1]
    with pytest.raises(AbandonedError):
        second.result(LIMIT_SECONDS)
    assert model.batches == [[1]]


def test_a_failure_does_not_keep_its_request_alive() -> None:
    """What an exception and its frames refer to is freed with it, not when the garbage is collected some day."""

    def refuse(_inputs: Any) -> Any:
        raise ValueError("unfit")

    batcher = Batcher(refuse, refuse, Gathering(8, Clock()), lambda _size: None)
    caller = Asked(False)
    kept = weakref.ref(caller)
    gc.disable()
    try:
        with suppress(UnfitInputError):
            batcher.predict(["input"], caller)
        del caller
        assert kept() is None
    finally:
        gc.enable()
