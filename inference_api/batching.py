"""From the concurrent calls of many threads to the calls of one model: one input at a time, or in batches."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import pairwise
from typing import Any, Protocol

from inference_api.model import AbandonedError, InferenceError, UnfitInputError

MAX_GATHER_SECONDS = 0.002
"""The longest that a batch waits for more inputs."""
LEAST_TRUST = 0.25
TRUST_SMOOTHING = 1 / 4
DISTRUSTED_TRIES = 16
"""Of so many batches one waits, where waits have brought too little, to see whether that has changed."""

_NO_LIST = (str, bytes, Mapping, Set)
"""What has a length, too, but whose items are not outputs, or not in the order of the inputs."""

log = logging.getLogger("inference_api")


class Caller(Protocol):
    """The request that a call is made for; the worker's Exchange is one."""

    abandoned: bool  # nobody waits for its answer any more: set by the server
    is_waiting: bool  # for a batch to begin, and not worth running if its client leaves: for the server


class Direct:
    """Calls a model's `predict` for each input; that of a model which is not thread-safe, in one thread at a time."""

    def __init__(self, predict: Callable[[Any], Any], *, thread_safe: bool = True) -> None:
        self._predict = predict
        self._lock = None if thread_safe else threading.Lock()

    def predict(self, inputs: Sequence[Any], caller: Caller) -> list[Any]:
        """One output for each input, in order; raises UnfitInputError, InferenceError or AbandonedError."""
        outputs = []
        for index, value in enumerate(inputs):
            if self._lock is None:
                outputs.append(_predict_one(self._predict, value, index, caller))
            else:
                with self._lock:
                    outputs.append(_predict_one(self._predict, value, index, caller))
        return outputs


def _predict_one(predict: Callable[[Any], Any], value: Any, index: int, caller: Caller) -> Any:
    if caller.abandoned:
        raise AbandonedError
    try:
        return predict(value)
    except ValueError as exc:  # by contract: the input is unfit, in words for the client
        raise UnfitInputError(str(exc), index) from exc
    except BaseException as exc:  # a model that calls sys.exit() must not take a thread with it
        raise InferenceError(f"the model raised {type(exc).__name__}") from exc


class Gathering:
    """Decides how long a batch waits for more inputs.

    The clients whose answers have just gone out are likely to send again at once. A batch begun with the first of them
    makes all others wait for the next one, which halves the throughput; so the batch waits until as many inputs are
    there as there are clients, where that has paid before, but never longer than half of what a batch takes.
    """

    def __init__(self, max_batch_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_batch_size = max_batch_size
        self.clock = clock
        self._clients = 0  # how many inputs were in the model or waiting when the last batch ended
        self._ended = self._seconds = 0.0  # of the last batch: when, and how long it took
        self._trust = 1.0  # the share of the awaited inputs that came
        self._tries = 0

    def plan(self, waiting: int) -> tuple[int, float]:
        """How many inputs to wait for and for how many seconds at most: 0.0 where the batch should begin now."""
        enough = min(self.max_batch_size, self._clients)
        longest = min(MAX_GATHER_SECONDS, self._seconds / 2)
        if waiting >= enough or self.clock() - self._ended > longest:
            return enough, 0.0
        if self._trust < LEAST_TRUST:
            self._tries += 1
            if self._tries % DISTRUSTED_TRIES:
                return enough, 0.0
        return enough, longest

    def waited(self, awaited: int, came: int) -> None:
        """A wait for `awaited` more inputs has brought `came`."""
        self._trust += TRUST_SMOOTHING * (min(1.0, came / awaited) - self._trust)

    def ran(self, size: int, waiting: int, started: float) -> None:
        """A batch of `size`, begun when the clock said `started`, has ended, and now there are `waiting` others."""
        self._clients = size + waiting
        self._ended = self.clock()
        self._seconds = self._ended - started


class _Call:
    """One thread's call: its inputs, and its wait for their outputs."""

    __slots__ = ("_next", "_woken", "caller", "failure", "inputs", "is_leader", "left", "outputs")

    def __init__(self, inputs: Sequence[Any], caller: Caller) -> None:
        self.inputs = inputs
        self.caller = caller
        self.outputs: list[Any] = [None] * len(inputs)
        self.left = len(inputs)  # inputs that an output is still to come for
        self.failure: Exception | None = None
        self.is_leader = False
        self._next: _Call | None = None
        self._woken = threading.Lock()
        self._woken.acquire()

    @property
    def is_settled(self) -> bool:
        return not self.left

    def fail(self, failure: Exception) -> None:
        """The first input that fails fails the others of its array, too."""
        self.failure = failure
        self.left = 0

    def put(self, index: int, output: Any) -> None:
        self.outputs[index] = output
        self.left -= 1

    def wait(self) -> None:
        """Until it is settled or leads."""
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
        predict_batch: Callable[[list[Any]], Sequence[Any]],
        predict: Callable[[Any], Any],
        gathering: Gathering,
        observe: Callable[[int], None],
    ) -> None:
        self._predict_batch = predict_batch
        self._predict = predict
        self._gathering = gathering
        self._observe = observe
        self._lock = threading.Lock()  # holds for what follows
        self._waiting: deque[tuple[_Call, int]] = deque()  # inputs by their call and their place in it
        self._has_leader = False
        self._enough = 0  # how many inputs the leader waits for; 0 where it does not
        self._gathered = threading.Event()

    def predict(self, inputs: Sequence[Any], caller: Caller) -> list[Any]:
        """One output for each input, in order; raises UnfitInputError, InferenceError or AbandonedError."""
        if not inputs:
            return []
        call = _Call(inputs, caller)
        caller.is_waiting = True
        with self._lock:
            self._waiting.extend([(call, index) for index in range(len(inputs))])
            if not self._has_leader:
                self._has_leader = call.is_leader = True
            elif 0 < self._enough <= len(self._waiting):
                self._enough = 0
                self._gathered.set()
        if not call.is_leader:
            call.wait()
        if call.is_leader:
            self._lead(call)
        failure, call.failure = call.failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # which refers to this frame: referring to each other, both would live on, with the request
        return call.outputs

    def _lead(self, own: _Call) -> None:
        gathering = self._gathering
        try:
            while not own.is_settled:
                self._gather()
                batch, gone = self._take()
                if batch:
                    started = gathering.clock()
                    self._run(batch)
                    gathering.ran(len(batch), len(self._waiting), started)
                settled = gone + [call for call in dict.fromkeys(call for call, _ in batch) if call.is_settled]
                _Call.wake_all([call for call in settled if call is not own])
        finally:
            self._leave_lead()

    def _gather(self) -> None:
        with self._lock:
            before = len(self._waiting)
            enough, seconds = self._gathering.plan(before)
            if not seconds:
                return
            self._enough = enough
            self._gathered.clear()
        self._gathered.wait(seconds)
        with self._lock:
            self._enough = 0
            came = len(self._waiting) - before
        self._gathering.waited(enough - before, came)

    def _take(self) -> tuple[list[tuple[_Call, int]], list[_Call]]:
        """The next batch, and the calls that nobody waits for any more."""
        batch: list[tuple[_Call, int]] = []
        gone: list[_Call] = []
        last: _Call | None = None
        with self._lock:
            while self._waiting and len(batch) < self._gathering.max_batch_size:
                call, index = self._waiting.popleft()
                if call is not last and not call.is_settled:
                    call.caller.is_waiting = False
                    if call.caller.abandoned:
                        call.fail(AbandonedError())
                        gone.append(call)
                last = call
                if not call.is_settled:
                    batch.append((call, index))
        return batch, gone

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

    def _run(self, batch: list[tuple[_Call, int]]) -> None:
        """Predict a batch; where that fails, one by one, so that an answer never depends on who else was there."""
        self._observe(len(batch))
        try:
            outputs = self._predict_batch([call.inputs[index] for call, index in batch])
            # What has as many rows need not have as many items: those of a pandas table are its columns.
            if isinstance(outputs, _NO_LIST) or not len(batch) == len(outputs) == len(outputs := list(outputs)):
                raise TypeError(f"predict_batch() must return a list of as many outputs as inputs, here {len(batch)}")
        except BaseException as exc:  # see _predict_one
            if isinstance(exc, ValueError):
                log.info("a batch was refused: its inputs are predicted one by one", extra={"size": len(batch)})
            else:
                log.warning(
                    "a batch failed: its inputs are predicted one by one", exc_info=exc, extra={"size": len(batch)}
                )
            for call, index in batch:
                self._run_alone(call, index)
        else:
            for (call, index), output in zip(batch, outputs, strict=True):
                call.put(index, output)

    def _run_alone(self, call: _Call, index: int) -> None:
        if call.is_settled:
            return
        try:
            call.put(index, _predict_one(self._predict, call.inputs[index], index, call.caller))
        except Exception as exc:
            call.fail(exc)
