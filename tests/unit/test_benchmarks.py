"""The table and the chart of the benchmarks, drawn from results made by hand."""

from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.attacks import ATTACKS
from benchmarks.chart import svg
from benchmarks.overload import OVERLOADS
from benchmarks.results import markdown, rows


def sample(rate: float, p50_ms: float = 1.0, p99_ms: float = 2.0) -> dict[str, float]:
    return {"rate": rate, "p50_ms": p50_ms, "p99_ms": p99_ms}


@pytest.fixture
def results() -> dict[str, Any]:
    ours = {"1": [sample(900, 0.05)], "16": [sample(49_000), sample(50_000), sample(99_000)], "256": [sample(50_000)]}
    fastapi = {"1": [sample(900, 0.2)], "16": [sample(10_000)], "256": [sample(9_000)]}
    return {
        "run": {"date": "2026-01-02", "rounds": 3, "seconds": 1},
        "machine": {"cpu": "A CPU <of 2>", "cpus": 2, "kernel": "6.1", "python": "3.11.7"},
        "versions": {"fastapi": {"fastapi": "1.2.3"}},
        "left_out": {"bentoml": "no wheel"},
        "hello": {"ours": ours, "fastapi": fastapi, "nginx": {"16": [sample(200_000)]}},
        "memory": {"ours": [60.0], "fastapi": [97.0]},
    }


def test_ratios_are_of_medians(results: dict[str, Any]) -> None:
    """A goal is compared with the ratio of two medians over the rounds."""
    against_fastapi = rows(results)[0]
    assert (against_fastapi.value, against_fastapi.goal, against_fastapi.met) == (5.0, 5.0, True)


def test_a_goal_that_is_missed_says_so(results: dict[str, Any]) -> None:
    """The table shows what was measured, the goal, and in bold where it is missed."""
    table = markdown(results)
    assert "| 50,000; 200,000 | 0.25× | ≥ 0.35× | **no** |" in table
    assert "| 60 MB; FastAPI 97 MB | 60 MB | ≤ 50 MB | **no** |" in table
    assert "bentoml was left out: no wheel" in table


def test_the_worst_attack_counts(results: dict[str, Any]) -> None:
    """Each attack has its line, and the goal is for the one under which /health took longest."""
    results["attacks"] = {
        server: {
            name: {"health_p50_ms": 1.0, "health_p99_ms": p99, "health_longest_ms": 9000.0, "held": 7.0}
            for name in ATTACKS
        }
        for server, p99 in (("ours", 40.0), ("gthread", 5000.0))
    }
    results["attacks"]["ours"]["idle"]["health_p99_ms"] = 60.0
    table = markdown(results)
    assert "| 60.00 ms | 60 ms | < 50 ms | **no** |" in table
    assert "| 2,000 that send nothing | 1.0, 60.0, 9,000.0 ms; 7 held | 1.0, 5,000.0, 9,000.0 ms; 7 held |" in table


def test_the_worst_overload_counts(results: dict[str, Any]) -> None:
    """Each case has its line; the goals are for the worst of those that yield the lock, and for the other."""
    case = {"peak": 400.0, "goodput": 396.0, "refused": 9.0, "refused_p99_ms": 2.0, "failed": 0.0, "health_p99_ms": 3.0}
    results["overload"] = {overloaded.name: [case] for overloaded in OVERLOADS}
    results["overload"]["slow-10"] = [case | {"goodput": 200.0, "refused_p99_ms": 11.0, "failed": 1.0}]
    results["overload"]["computing-2"] = [case | {"goodput": 0.0, "health_p99_ms": 49.0}]
    table = markdown(results)
    assert "| 200.0; 400.0 | 0.5× | ≥ 0.95× | **no** |" in table
    assert "| 11.00 ms | 11 ms | < 10 ms | **no** |" in table
    assert "| 3.00 ms | 3 ms | < 10 ms | yes |" in table
    assert "| 49.00 ms | 49 ms | < 50 ms | yes |" in table
    assert "| 0.3 s | 10 × | 400.0 | 200.0 (0.50 ×) | 9, 11.0 ms | 1 | 3.0 ms |" in table


def test_the_chart_is_one_bar_a_server(results: dict[str, Any]) -> None:
    """The chart is well-formed XML with one bar a server, the longest first."""
    bars = ElementTree.fromstring(svg(results)).findall("{http://www.w3.org/2000/svg}rect")
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert [bar.attrib["class"] for bar in bars] == ["peer", "ours", "peer"]
    assert widths == sorted(widths, reverse=True)
