"""Models that the service and its peers serve in the benchmarks. Nothing but the standard library."""

import time

CALL_SECONDS = 0.005
LARGE_CHARACTERS = 4_000_000
"""More than the buffers of two sockets take."""


class SleepingModel:
    """Costs 5 ms a call, during which it yields the interpreter lock, and cannot batch."""

    name, version = "sleeping", "1.0.0"
    call_seconds = CALL_SECONDS

    def predict(self, text: str) -> str:
        time.sleep(self.call_seconds)
        return f"predicted({text})"


class SlowModel(SleepingModel):
    """Costs 0.3 s a call."""

    name, call_seconds = "slow", 0.3


class SlowestModel(SleepingModel):
    """Costs 1 s a call."""

    name, call_seconds = "slowest", 1.0


class ComputingModel(SleepingModel):
    """Costs 5 ms a call, and keeps the interpreter lock: it computes in Python."""

    name = "computing"

    def predict(self, text: str) -> str:
        ends = time.thread_time() + self.call_seconds
        while time.thread_time() < ends:
            pass
        return f"predicted({text})"


class LargeModel:
    """Has much to say."""

    name, version = "large", "1.0.0"

    def predict(self, text: str) -> str:
        return "a" * LARGE_CHARACTERS


class BatchModel(SleepingModel):
    """Costs 5 ms a call, however many inputs it gets."""

    name = "batch"

    def predict_batch(self, inputs: list[str]) -> list[str]:
        time.sleep(CALL_SECONDS)
        return [f"predicted({text})" for text in inputs]


class InstantBatchModel:
    """Costs nothing, so that what is measured is the batching itself."""

    name, version = "instant", "1.0.0"

    def predict(self, text: str) -> str:
        return f"predicted({text})"

    def predict_batch(self, inputs: list[str]) -> list[str]:
        return [f"predicted({text})" for text in inputs]
