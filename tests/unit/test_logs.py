"""Log lines by themselves: whatever is logged, a line is one JSON object that fits an atomic write."""

import json
import math
from typing import Any

import pytest

from inference_api.logs import MAX_LINE_BYTES, json_line

FIXED = {"time": "2026-01-01T00:00:00.000000Z", "level": "INFO", "logger": "a", "message": "b"}
CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


def _no_constant(name: str) -> None:
    raise AssertionError(name)


@pytest.mark.parametrize(
    "more",
    [
        {"loss": math.nan},
        {"loss": [math.inf]},
        {"circle": CIRCLE},
        {"by_pair": {(1, 2): 3}},
        {1: 2},
        {f"feature_{number}": 0.5 for number in range(400)},
        {f"feature_{number}": math.nan for number in range(400)},
        {"n" * 5000: 1},
        {"text": "\U0001f600" * 5000, "exception": "x" * 5000},
    ],
    ids=str,
)
def test_whatever_is_logged_makes_one_line_of_json(more: dict[Any, Any]) -> None:
    """What does not fit is cut or left out, the fixed fields never."""
    line = json_line({**FIXED, **more})
    assert len(line) <= MAX_LINE_BYTES and line.count("\n") == 1
    assert FIXED.items() <= json.loads(line.encode("ascii"), parse_constant=_no_constant).items()
