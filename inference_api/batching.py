"""From the concurrent calls of many threads to the calls of one model: one input at a time, or in batches."""

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from inference_api.logs import serving
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


class Caller:
    """The request that a call is made for. The worker's Exchange stands in; other servers do not tell of theirs."""

    abandoned = False  # nobody waits for its answer any more: set by the server
    is_waiting = False  # for a batch to begin, and not worth running if its client leaves: for the server
    batch_began = math.inf  # by the monotonic clock, the batch that it is in: for the server


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


class Call:
    """What one request asks of a model that batches: its inputs, and in time their outputs."""

    __slots__ = ("_failure", "_outputs", "_submit", "caller", "environ", "inputs", "missing", "tell")

    def __init__(self, inputs: Sequence[Any], caller: Caller, submit: "Callable[[Call], None]") -> None:
        self.inputs = inputs
        self.caller = caller
        self.environ = serving.environ  # of the request, for lines that its model logs
        self._submit = submit
        self._outputs: list[Any] = [None] * len(inputs)
        self.missing = len(inputs)  # outputs that are still to come
        self._failure: Exception | None = None

    def begin(self, tell: Callable[[], None]) -> None:
        """Have the model called; `tell` is called, in another thread, once there is a result."""
        self.tell = tell
        try:
            self._submit(self)
        except RuntimeError as exc:  # no more threads can be started
            self.fail(InferenceError(str(exc)))
            tell()

    def result(self) -> list[Any]:
        """One output for each input, in order; to be called once. Where the call has not begun, this waits for it.

        Raises UnfitInputError, InferenceError or AbandonedError.
        """
        if self.missing:
            settled = threading.Lock()
            settled.acquire()
            self.begin(settled.release)
            settled.acquire()
        failure, self._failure = self._failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # which refers to this frame: referring to each other, both would live on, with the request
        return self._outputs

    # What follows is for the batcher.

    def put(self, index: int, output: Any) -> None:
        """The output of one of its inputs."""
        self._outputs[index] = output
        self.missing -= 1

    def fail(self, failure: Exception) -> None:
        """The first input that fails fails the others of its array, too."""
        self._failure = failure
        self.missing = 0


class Batcher:
    """Makes concurrent calls cost a model as little as one: what has come while a batch ran is the next batch.

    The model is called in a thread of the batcher's own, which starts with the first call, so after a fork.
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
        self._waiting: deque[tuple[Call, int]] = deque()  # inputs by their call and their place in it
        self._lock = threading.Lock()  # holds for what follows, and while the queue grows
        self._has_thread = False
        self._enough = 0  # how many inputs the thread waits for; 0 where it does not
        self._gathered = threading.Condition(self._lock)

    def call(self, inputs: Sequence[Any], caller: Caller) -> Call:
        """A call that is yet to begin; to `begin` it, `inputs` must have at least one."""
        return Call(inputs, caller, self._submit)

    def predict(self, inputs: Sequence[Any], caller: Caller) -> list[Any]:
        """One output for each input, in order; raises UnfitInputError, InferenceError or AbandonedError."""
        return self.call(inputs, caller).result()

    def _submit(self, call: Call) -> None:
        with self._lock:
            if not self._has_thread:
                threading.Thread(target=self._serve, name="batcher", daemon=True).start()
                self._has_thread = True
            call.caller.is_waiting = True
            self._waiting.extend([(call, index) for index in range(len(call.inputs))])
            if 0 < self._enough <= len(self._waiting):
                self._enough = 0
                self._gathered.notify()

    def _serve(self) -> None:
        while True:
            try:
                self._gather()
                self._work()
            except Exception:
                log.exception("the batcher failed")

    def _gather(self) -> None:
        """Wait until a batch should begin."""
        self._wait(1, None)
        before = len(self._waiting)
        enough, seconds = self._gathering.plan(before)
        if seconds:
            self._wait(enough, seconds)
            self._gathering.waited(enough - before, len(self._waiting) - before)

    def _wait(self, enough: int, seconds: float | None) -> None:
        with self._lock:
            self._enough = enough
            self._gathered.wait_for(lambda: len(self._waiting) >= enough, seconds)
            self._enough = 0

    def _work(self) -> None:
        """Run a batch, and let those go on that it was the last one for."""
        batch = self._take()
        if not batch:
            return
        calls = dict.fromkeys(call for call, _ in batch)
        try:
            started, pid = self._gathering.clock(), os.getpid()
            for call in calls:
                call.caller.batch_began = started
            serving.environ = next(iter(calls)).environ if len(calls) == 1 else None
            self._run(batch)
            if os.getpid() != pid:  # the model has forked: the child must not answer for its parent
                os._exit(0)
            self._gathering.ran(len(batch), len(self._waiting), started)
        except Exception as exc:
            for call in calls:
                call.fail(InferenceError(f"the batch failed: {type(exc).__name__}"))
            raise
        finally:
            serving.environ = None
            for call in calls:
                if not call.missing:
                    call.tell()

    def _take(self) -> list[tuple[Call, int]]:
        """The next batch, without the calls that nobody waits for any more."""
        batch: list[tuple[Call, int]] = []
        last: Call | None = None
        while self._waiting and len(batch) < self._gathering.max_batch_size:
            call, index = self._waiting.popleft()
            if not call.missing:  # it has failed
                continue
            if call is not last:
                last = call
                call.caller.is_waiting = False
                if call.caller.abandoned:
                    call.fail(AbandonedError())
                    call.tell()
                    continue
            batch.append((call, index))
        return batch

    def _run(self, batch: list[tuple[Call, int]]) -> None:
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

    def _run_alone(self, call: Call, index: int) -> None:
        if not call.missing:  # it has failed
            return
        serving.environ = call.environ
        try:
            call.put(index, _predict_one(self._predict, call.inputs[index], index, call.caller))
        except Exception as exc:
            call.fail(exc)
