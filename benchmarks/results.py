"""From raw rounds to the table: medians, ratios, and whether each goal is met."""

import operator
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.attacks import ATTACK_SECONDS, ATTACKS, PROBE_TIMEOUT_SECONDS
from benchmarks.measures import ideal
from benchmarks.overload import OVERLOADS
from benchmarks.servers import SERVERS

Results = dict[str, Any]  # what results.json holds
TITLES = {server.name: server.title for server in SERVERS}
Comparison = Callable[[float, float], bool]
AT_LEAST, AT_MOST, LESS = operator.ge, operator.le, operator.lt
SIGNS: dict[Any, str] = {AT_LEAST: "≥", AT_MOST: "≤", LESS: "<"}


@dataclass(frozen=True)
class Row:
    """One goal: what was measured, and what it comes to."""

    measure: str
    measured: str
    value: float
    unit: str
    comparison: Comparison
    goal: float

    @property
    def met(self) -> bool:
        return self.comparison(self.value, self.goal)

    def markdown(self) -> str:
        goal = f"{SIGNS[self.comparison]} {self.goal:g}{self.unit}"
        met = "yes" if self.met else "**no**"
        return f"| {self.measure} | {self.measured} | {self.value:.3g}{self.unit} | {goal} | {met} |"


class Medians:
    """The medians of one section of the results: server → connections → rounds."""

    def __init__(self, section: dict[str, Any]) -> None:
        self.section = section

    def __contains__(self, server: str) -> bool:
        return server in self.section

    def __call__(self, server: str, connections: int, figure: str = "rate") -> float:
        rounds: list[dict[str, float]] = self.section[server][str(connections)]
        return statistics.median(sample[figure] for sample in rounds)


def rows(results: Results) -> list[Row]:
    """The goals for which there are figures."""
    return [
        *_throughput_rows(Medians(results["hello"])),
        *_overload_rows(results.get("overload", {})),
        *_attack_rows(results.get("attacks", {})),
        *_batching_rows(Medians(results.get("batching", {}))),
        *_digits_rows(Medians(results.get("digits", {}))),
        *_lone_rows(Medians(results.get("lone", {}))),
        *_footprint_rows(results),
    ]


def _throughput_rows(hello: Medians) -> list[Row]:
    found = []
    for ours, peer, goal in (
        ("ours", "fastapi", 5.0),
        ("ours", "gthread", 6.0),
        ("ours-off", "granian", 1.0),
        ("ours", "litserve", 15.0),
        ("ours", "bentoml", 15.0),
        ("ours", "mlserver", 15.0),
        ("ours", "nginx", 0.35),
    ):
        if ours in hello and peer in hello:
            one, other = hello(ours, 16), hello(peer, 16)
            what = f"requests a second, 16 connections: {TITLES[ours]}; against {TITLES[peer]}"
            found.append(Row(what, f"{one:,.0f}; {other:,.0f}", one / other, "×", AT_LEAST, goal))
    if "ours" in hello and "fastapi" in hello:
        one, other = hello("ours", 1, "p50_ms"), hello("fastapi", 1, "p50_ms")
        what = "median latency, one connection; against FastAPI"
        found.append(Row(what, f"{one * 1000:.0f} µs; {other * 1000:.0f} µs", one / other, "×", AT_MOST, 0.6))
    if "ours" in hello:
        p50, p99 = hello("ours", 256, "p50_ms"), hello("ours", 256, "p99_ms")
        what = "99th percentile of latency at 256 connections; against the median"
        found.append(Row(what, f"{p99:.2f} ms; {p50:.2f} ms", p99 / p50, "×", LESS, 3.0))
    return found


def _overload_rows(overload: dict[str, list[dict[str, float]]]) -> list[Row]:
    if not overload:
        return []
    yielding = [_medians(overload[case.name]) for case in OVERLOADS if case.yields]
    computing = [_medians(overload[case.name]) for case in OVERLOADS if not case.yields]
    worst = min(yielding, key=lambda case: case["goodput"] / case["peak"])
    good, peak = worst["goodput"], worst["peak"]
    refused = max(case["refused_p99_ms"] for case in yielding)
    health = max(case["health_p99_ms"] for case in yielding)
    locked = max(case["health_p99_ms"] for case in computing)
    what = "goodput under overload, the worst of the cases below that yield the lock; against the peak"
    computes = "99th percentile of `/health` under overload, a model of 5 ms that keeps the interpreter lock"
    return [
        Row(what, f"{good:,.1f}; {peak:,.1f}", good / peak, "×", AT_LEAST, 0.95),
        Row("99th percentile of what a refusal takes then", f"{refused:.2f} ms", refused, " ms", LESS, 10.0),
        Row("99th percentile of `/health` then", f"{health:.2f} ms", health, " ms", LESS, 10.0),
        Row(computes, f"{locked:.2f} ms", locked, " ms", LESS, 50.0),
    ]


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {figure: statistics.median(one[figure] for one in rounds) for figure in rounds[0]}


def _attack_rows(attacks: dict[str, dict[str, dict[str, float]]]) -> list[Row]:
    if not attacks:
        return []
    worst = max(figures["health_p99_ms"] for figures in attacks["ours"].values())
    what = "99th percentile of `/health` under the worst of the attacks below"
    return [Row(what, f"{worst:.2f} ms", worst, " ms", LESS, 50.0)]


def _batching_rows(batching: Medians) -> list[Row]:
    if "ours" not in batching:
        return []
    found = []
    for clients in (64,):
        one = batching("ours", clients)
        what = f"a model of 5 ms a call, {clients} clients, batches of up to 64; against the ideal"
        found.append(Row(what, f"{one:,.0f}; {ideal(clients):,.0f}", one / ideal(clients), "×", AT_LEAST, 0.7))
        for peer in ("litserve", "bentoml"):
            if peer in batching:
                other = batching(peer, clients)
                what = f"the same, {clients} clients; against {TITLES[peer].removesuffix(', log off')} with batching on"
                found.append(Row(what, f"{one:,.0f}; {other:,.0f}", one / other, "×", AT_LEAST, 4.0))
    return found


def _digits_rows(digits: Medians) -> list[Row]:
    if "ours" not in digits:
        return []
    ours, alone = digits("ours", 64), digits("unbatched", 64)
    late, late_alone = digits("ours", 64, "p99_ms"), digits("unbatched", 64, "p99_ms")
    what = "the digits example (scikit-learn), 64 clients: requests a second, batched; against unbatched"
    return [
        Row(what, f"{ours:,.0f}; {alone:,.0f}", ours / alone, "×", AT_LEAST, 5.0),
        Row(
            "its 99th percentile of latency; against unbatched",
            f"{late:,.0f} ms; {late_alone:,.0f} ms",
            late / late_alone,
            "×",
            AT_MOST,
            1.0,
        ),
    ]


def _lone_rows(lone: Medians) -> list[Row]:
    found = []
    for model, title in (("sleeping", "a model of 5 ms"), ("instant", "a model that costs nothing")):
        if f"{model}-64" in lone:
            on, off = lone(f"{model}-64", 1, "p50_ms"), lone(f"{model}-1", 1, "p50_ms")
            what = f"median latency that batching adds for a lone client, {title}"
            found.append(Row(what, f"{on:.3f} ms; {off:.3f} ms", on - off, " ms", AT_MOST, 0.2))
    return found


def _footprint_rows(results: Results) -> list[Row]:
    found = []
    for section, what, unit, goal in (
        ("start", "start to the first 200 on `/health`, two workers", " s", 0.3),
        ("memory", "memory (PSS), master and two workers, after load", " MB", 50.0),
    ):
        if section in results:
            medians = {name: statistics.median(figures) for name, figures in results[section].items()}
            others = "".join(f"; {TITLES[n].split(' on ')[0]} {v:.3g}{unit}" for n, v in medians.items() if n != "ours")
            ours = medians["ours"]
            found.append(Row(what, f"{ours:.3g}{unit}{others}", ours, unit, AT_MOST, goal))
    return found


def markdown(results: Results) -> str:
    """The whole of RESULTS.md."""
    machine, run = results["machine"], results["run"]
    lines = [
        "# Measured",
        "",
        f"{run['date']}, {machine['cpu']}, {machine['cpus']} cores, Linux {machine['kernel']}, "
        f"Python {machine['python']}. "
        f"Each server is one worker process pinned to one core, the load generator (wrk, keep-alive) to another; "
        f"medians of {run['rounds']} round(s) of {run['seconds']} s, the servers taking turns. The request is "
        '`POST /predict {"text": "Hello"}`. Every figure of every round is in `results.json`; '
        "`make bench` measures anew.",
        "",
        "| measure | measured | comes to | goal | met |",
        "|---|---|---|---|---|",
        *(row.markdown() for row in rows(results)),
        "",
        "## Requests a second, and latency",
        "",
        "| server | connections | requests a second | median | 99th percentile |",
        "|---|---|---|---|---|",
        *_samples(results["hello"], TITLES),
    ]
    for section, title in (
        ("batching", "A model of 5 ms a call whatever the batch"),
        ("digits", "The digits example, a random forest of scikit-learn"),
    ):
        if section in results:
            lines += ["", f"## {title}", "", "| server | clients | requests a second | median | 99th percentile |"]
            names = {"ours": "this service, batching", "unbatched": "this service, unbatched"}
            names |= {"litserve": "LitServe, batching", "bentoml": "BentoML, batching"}
            lines += [
                "|---|---|---|---|---|",
                *_samples(results[section], names | {"fastapi": "FastAPI, a call a request"}),
            ]
    if "overload" in results:
        lines += _overload_lines(results["overload"])
    if "attacks" in results:
        lines += _attack_lines(results["attacks"])
    lines += ["", "## Versions", ""]
    for name, versions in results["versions"].items():
        lines.append(f"- {name}: " + ", ".join(f"{package} {version}" for package, version in versions.items()))
    for name, reason in results["left_out"].items():
        lines.append(f"- {name} was left out: {reason}")
    return "\n".join(lines) + "\n"


def _overload_lines(overload: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = [
        *("", "## More than it can serve", ""),
        "Requests come at a multiple of the rate that two threads can serve, answered or not. All bounds are the "
        "default ones. The good answers are those of the time when as many wait as are let wait, the rest is of the "
        "whole run; one run where a call takes 0.3 s or 1 s.",
        "",
        "| a call | load | peak a second | good a second | refused (99 % within) | failed | `/health` (99 % within) |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in OVERLOADS:
        of = _medians(overload[case.name])
        lines.append(
            f"| {case.title} | {case.factor} × | {of['peak']:,.1f} "
            f"| {of['goodput']:,.1f} ({of['goodput'] / of['peak']:.2f} ×) "
            f"| {of['refused']:,.0f}, {of['refused_p99_ms']:.1f} ms | {of['failed']:,.0f} "
            f"| {of['health_p99_ms']:.1f} ms |"
        )
    return lines


def _attack_lines(attacks: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    lines = [
        *("", "## Clients that misbehave", ""),
        f"How long `/health` takes, on a new connection each time, from the moment when so many clients come that "
        f"misbehave (median, 99th percentile, longest; what takes {PROBE_TIMEOUT_SECONDS:g} s is given up), and how "
        f"many connections are held after {ATTACK_SECONDS} s.",
        "",
        "| clients | " + " | ".join(TITLES[server] for server in attacks) + " |",
        "|---" * (1 + len(attacks)) + "|",
    ]
    for name, attack in ATTACKS.items():
        cells = [
            f"{of[name]['health_p50_ms']:,.1f}, {of[name]['health_p99_ms']:,.1f}, {of[name]['health_longest_ms']:,.1f} "
            f"ms; {of[name]['held']:,.0f} held"
            for of in attacks.values()
        ]
        lines.append(f"| {attack.attackers:,} {attack.title} | " + " | ".join(cells) + " |")
    return lines


def _samples(section: dict[str, Any], titles: dict[str, str]) -> list[str]:
    medians = Medians(section)
    return [
        f"| {titles[server]} | {connections} | {medians(server, int(connections)):,.0f} "
        f"| {medians(server, int(connections), 'p50_ms'):.3f} ms "
        f"| {medians(server, int(connections), 'p99_ms'):.3f} ms |"
        for server, by_connections in section.items()
        for connections in by_connections
    ]
