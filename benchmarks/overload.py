"""More load than can be served, with the default bounds (row 77 of the faults)."""

import statistics
from dataclasses import dataclass, replace

from benchmarks.load import at_rate, wrk
from benchmarks.peers.models import ComputingModel, SleepingModel, SlowestModel, SlowModel
from benchmarks.servers import OURS, running

PEAK_CONNECTIONS = 16
PEAK_CALLS = 50
"""For how many calls of the model, one after the other, its peak is measured; but for PEAK_SECONDS at least."""
PEAK_SECONDS = 3
SHORT_SECONDS = 20


@dataclass(frozen=True)
class Overload:
    """A model that is asked `factor` times as often as it can answer."""

    title: str
    model: type[SleepingModel]
    factor: int
    settles_seconds: int  # until as many wait as are let wait
    seconds: int

    @property
    def name(self) -> str:
        return f"{self.model.name}-{self.factor}"

    @property
    def yields(self) -> bool:
        """Whether the model lets others have the interpreter lock."""
        return self.model is not ComputingModel

    @property
    def is_short(self) -> bool:
        return self.settles_seconds + self.seconds < SHORT_SECONDS

    def measure(self) -> dict[str, float]:
        """Requests a second at the peak and of good answers, how many are refused, how long that and /health take."""
        models = {"MODELS": f"predict=benchmarks.peers.models:{self.model.__name__}"}
        with running(replace(OURS, name=self.name, variables=models)) as target:
            peak_seconds = max(PEAK_SECONDS, round(PEAK_CALLS * self.model.call_seconds))
            peak = wrk(target, PEAK_CONNECTIONS, peak_seconds).rate
            whole = self.settles_seconds + self.seconds
            seen = at_rate(target, peak * self.factor, whole)
        return {
            "peak": peak,
            "goodput": sum(self.settles_seconds < at <= whole for at in seen.good_at) / self.seconds,
            "refused": len(seen.refused_ms),
            "refused_p99_ms": statistics.quantiles(seen.refused_ms, n=100)[98],
            "failed": seen.failed,
            "health_p99_ms": statistics.quantiles(seen.health_ms, n=100)[98],
        }


OVERLOADS = (
    Overload("5 ms", SleepingModel, factor=2, settles_seconds=5, seconds=10),
    Overload("5 ms", SleepingModel, factor=10, settles_seconds=5, seconds=10),
    Overload("0.3 s", SlowModel, factor=2, settles_seconds=30, seconds=30),
    Overload("0.3 s", SlowModel, factor=10, settles_seconds=10, seconds=30),
    Overload("1 s", SlowestModel, factor=2, settles_seconds=30, seconds=60),
    Overload("1 s", SlowestModel, factor=10, settles_seconds=10, seconds=60),
    Overload("5 ms, computing in Python", ComputingModel, factor=2, settles_seconds=5, seconds=10),
)
