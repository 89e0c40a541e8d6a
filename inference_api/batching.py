"""From the concurrent calls of many threads to the calls of one model: one input at a time, or in batches."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

from inference_api.model import AbandonedError, InferenceError, UnfitInputError

MAX_GATHER_SECONDS = 0.002
"""The longest that a batch waits for more inputs."""
LEAST_TRUST = 0.25
TRUST_SMOOTHING = 1 / 4
TRUST_REGAINED = 1 / 64
"""How soon a wait is tried again after waits that brought nothing: some 16 batches later."""

log = logging.getLogger("inference_api")


class Direct:
    """Calls a model's `predict` for each input; that of a model which is not thread-safe, in one thread at a time."""

    def __init__(self, predict: Callable[[Any], Any], *, thread_safe: bool = True) -> None:
        self._predict = predict
        self._lock: AbstractContextManager[Any] = nullcontext() if thread_safe else threading.Lock()

    def predict(self, inputs: Sequence[Any], abandoned: Callable[[], bool]) -> list[Any]:
        """One output for each input, in order; raises UnfitInputError, InferenceError or AbandonedError."""
        outputs = []
        for index, value in enumerate(inputs):
            with self._lock:
                if abandoned():
                    raise AbandonedError
                outputs.append(_predict_one(self._predict, value, index))
        return outputs


def _predict_one(predict: Callable[[Any], Any], value: Any, index: int) -> Any:
    try:
        return predict(value)
    except BaseException as exc:  # a model that calls sys.exit() must not take a thread with it
        raise _failure(exc, index) from exc


def _failure(exc: BaseException, index: int) -> UnfitInputError | InferenceError:
    """By contract a ValueError says that the input is unfit, in words for the client; all else is the model's fault."""
    if isinstance(exc, ValueError):
        return UnfitInputError(str(exc), index)
    return InferenceError(f"the model raised {type(exc).__name__}")


class Gathering:
    """Decides how long a batch waits for more inputs.

    The clients whose answers have just gone out are likely to send again at once. A batch begun with the first of them
    makes all others wait for the next one, which halves the throughput; so the batch waits until as many inputs are
    there as there are clients, where that has paid before, but never longer than half of what a batch takes.
    """

    def __init__(self, max_batch_size: int) -> None:
        self._max_batch_size = max_batch_size
        self._clients = 0  # how many inputs were in the model or waiting when the last batch ended
        self._ended = 0.0
        self._seconds = 0.0
        self._trust = 1.0  # the share of the awaited inputs that came

    def plan(self, waiting: int, now: float) -> tuple[int, float]:
        """How many inputs to wait for and for how many seconds at most: 0.0 where the batch should begin now."""
        enough = min(self._max_batch_size, self._clients)
        longest = min(MAX_GATHER_SECONDS, self._seconds / 2)
        if waiting >= enough or now - self._ended > longest:
            return enough, 0.0
        if self._trust < LEAST_TRUST:
            self._trust += TRUST_REGAINED
            return enough, 0.0
        return enough, longest

    def waited(self, awaited: int, came: int) -> None:
        """A wait for `awaited` more inputs has brought `came`."""
        self._trust += TRUST_SMOOTHING * (min(1.0, came / awaited) - self._trust)

    def ran(self, size: int, waiting: int, seconds: float, now: float) -> None:
        """A batch of `size` has taken `seconds`, and now there are `waiting` others."""
        self._clients = size + waiting
        self._seconds = seconds
        self._ended = now


class _Call:
    """One thread's call: its inputs, and its wait for their outputs."""

    __slots__ = ("_next", "_woken", "abandoned", "failure", "inputs", "is_leader", "left", "outputs")

    def __init__(self, inputs: Sequence[Any], abandoned: Callable[[], bool]) -> None:
        self.inputs = inputs
        self.abandoned = abandoned
        self.outputs: list[Any] = [None] * len(inputs)
        self.left = len(inputs)  # inputs without an output
        self.failure: Exception | None = None
        self.is_leader = False
        self._next: _Call | None = None
        self._woken = threading.Lock()
        self._woken.acquire()

    @property
    def is_settled(self) -> bool:
        return not self.left or self.failure is not None

    def wait(self) -> None:
        self._woken.acquire()
        if self._next is not None:
            self._next.wake()

    def wake(self) -> None:
        self._woken.release()

    @staticmethod
    def wake_all(calls: Sequence["_Call"]) -> None:
        """Wake one, which wakes the next: of many threads woken at once, all would compete for the interpreter."""
        for call, following in pairwise(calls):
            call._next = following
        if calls:
            calls[0].wake()


class Batcher:
    """Makes concurrent calls cost a model as little as one: what has come while a batch ran is the next batch.

    It has no thread of its own. The first thread that calls leads: it runs batches, its own inputs and the others',
    until it has its outputs, and then leaves the lead to a thread that waits. The model runs in one thread at a time.
    """

    def __init__(
        self,
        predict_batch: Callable[[list[Any]], Iterable[Any]],
        predict: Callable[[Any], Any],
        max_batch_size: int,
        observe: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._predict_batch = predict_batch
        self._predict = predict
        self._max_batch_size = max_batch_size
        self._observe = observe
        self._clock = clock
        self._gathering = Gathering(max_batch_size)
        self._lock = threading.Lock()  # holds for what follows
        self._waiting: deque[tuple[_Call, int]] = deque()  # inputs by their call and their place in it
        self._has_leader = False
        self._enough = 0  # how many inputs the leader waits for; 0 where it does not
        self._gathered = threading.Lock()
        self._gathered.acquire()

    def predict(self, inputs: Sequence[Any], abandoned: Callable[[], bool]) -> list[Any]:
        """One output for each input, in order; raises UnfitInputError, InferenceError or AbandonedError."""
        if not inputs:
            return []
        call = _Call(inputs, abandoned)
        with self._lock:
            self._waiting.extend([(call, index) for index in range(len(inputs))])
            if not self._has_leader:
                self._has_leader = call.is_leader = True
            elif 0 < self._enough <= len(self._waiting):
                self._enough = 0
                self._gathered.release()
        if not call.is_leader:
            call.wait()
        if call.is_leader:
            self._lead(call)
        if call.failure is not None:
            raise call.failure
        return call.outputs

    def _lead(self, own: _Call) -> None:
        while not own.is_settled:
            self._gather()
            batch, settled = self._take()
            if batch:
                started = self._clock()
                settled += self._run(batch)
                ended = self._clock()
                self._gathering.ran(len(batch), len(self._waiting), ended - started, ended)
            if own.is_settled:
                self._leave_lead()
            _Call.wake_all([call for call in settled if call is not own])

    def _gather(self) -> None:
        with self._lock:
            before = len(self._waiting)
            enough, seconds = self._gathering.plan(before, self._clock())
            if not seconds:
                return
            self._enough = enough
        if not self._gathered.acquire(timeout=seconds):
            with self._lock:
                if self._enough:
                    self._enough = 0
                else:  # enough came in the moment in which the time was up
                    self._gathered.acquire()
        self._gathering.waited(enough - before, len(self._waiting) - before)

    def _take(self) -> tuple[list[tuple[_Call, int]], list[_Call]]:
        """The next batch, and the calls that are settled because nobody waits for them any more."""
        batch: list[tuple[_Call, int]] = []
        settled: list[_Call] = []
        with self._lock:
            while self._waiting and len(batch) < self._max_batch_size:
                call, index = self._waiting.popleft()
                if call.is_settled:
                    continue
                if call.abandoned():
                    call.failure = AbandonedError()
                    settled.append(call)
                else:
                    batch.append((call, index))
        # An array may have been given up between two of its inputs.
        return [(call, index) for call, index in batch if call.failure is None], settled

    def _leave_lead(self) -> None:
        with self._lock:
            while self._waiting and self._waiting[0][0].is_settled:
                self._waiting.popleft()
            if self._waiting:
                leader = self._waiting[0][0]
                leader.is_leader = True
                leader.wake()
            else:
                self._has_leader = False

    def _run(self, batch: list[tuple[_Call, int]]) -> list[_Call]:
        """Predict a batch; returns the calls that are settled by it. Never raises."""
        settled = []
        for (call, index), output in zip(batch, self._outputs(batch), strict=True):
            if call.failure is not None:
                continue
            if isinstance(output, _Failed):
                call.failure = output.failure
            else:
                call.outputs[index] = output
                call.left -= 1
            if call.is_settled:
                settled.append(call)
        return settled

    def _outputs(self, batch: list[tuple[_Call, int]]) -> list[Any]:
        inputs = [call.inputs[index] for call, index in batch]
        try:
            self._observe(len(inputs))
            outputs = list(self._predict_batch(inputs))
            if len(outputs) != len(inputs):
                raise _WrongNumberError(f"predict_batch() returned {len(outputs)} outputs for {len(inputs)} inputs")
        except BaseException as exc:
            if len(batch) == 1:
                failure = _failure(exc, batch[0][1])
                failure.__cause__ = exc
                return [_Failed(failure)]
            log.warning(
                "a batch failed, its inputs are predicted one by one", exc_info=exc, extra={"size": len(inputs)}
            )
            return [self._alone(call, index) for call, index in batch]
        return outputs

    def _alone(self, call: _Call, index: int) -> Any:
        if call.abandoned():
            return _Failed(AbandonedError())
        try:
            return _predict_one(self._predict, call.inputs[index], index)
        except (UnfitInputError, InferenceError) as exc:
            return _Failed(exc)


class _WrongNumberError(RuntimeError):
    pass


class _Failed:
    """Stands among outputs for an input that has none."""

    __slots__ = ("failure",)

    def __init__(self, failure: Exception) -> None:
        self.failure = failure
