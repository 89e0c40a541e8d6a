"""Log lines by themselves: whatever is logged, a line is one JSON object that fits an atomic write."""

import errno
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from inference_api.logs import MAX_LINE_BYTES, LineWriter, access_line, json_line

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


@pytest.mark.parametrize("text", ["é", "\x7f", '"', "a"])
def test_an_access_line_is_never_too_long(text: str) -> None:
    """Whatever its parts are: not all of them are made by the service."""
    line = access_line(
        "2026-11-28T22:22:22.123456Z", "f" * 64, "M" * 99, text * 9_999, 599, 9e9, 9e9, text * 9_999, "0" * 32
    )
    assert len(line) <= MAX_LINE_BYTES
    assert json.loads(line.encode("ascii"))["status"] == 599


def test_each_line_that_is_dropped_is_counted() -> None:
    """By whichever thread, and whenever somebody asks."""
    writer = LineWriter(os.open("/dev/full", os.O_WRONLY))
    writer.start()
    threads, lists, lines, taken = 8, 1_000, ["a\n"] * 2_000, 0

    def write() -> None:
        for number in range(lists):
            writer.write(lines)
            if number % 5 == 0:
                time.sleep(0.001)  # so that the queue is not full all of the time

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            writing = [pool.submit(write) for _ in range(threads)]
            while not all(each.done() for each in writing):
                taken += writer.take_dropped()
    finally:
        sys.setswitchinterval(before)
    writer.flush()
    os.close(writer.fd)
    assert taken + writer.take_dropped() == threads * lists * len(lines)


def test_of_a_write_that_breaks_off_the_rest_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been written is not counted; the line in the middle of which it breaks off is."""
    written: list[bytes] = []

    def write(_: int, data: memoryview) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(bytes(data[:7]))
        return 7

    writer = LineWriter(os.open(os.devnull, os.O_WRONLY))
    writer.start()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        writer.write(["a\n"] * 10)
        writer.flush()
    os.close(writer.fd)
    assert written == [b"a\na\na\na"]
    assert writer.take_dropped() == 7


def test_lines_are_written_whole() -> None:
    """All of them once and in their order; one that is too long costs no other."""
    lines = [f"{number:04}{'a' * (number % 500)}\n" for number in range(1_000)]
    lines[7] = "b" * 2 * MAX_LINE_BYTES + "\n"
    readable, writable = os.pipe()
    writer = LineWriter(writable)
    writer.start()
    writer.write(lines)
    received = b""
    while received.count(b"\n") < len(lines):
        received += os.read(readable, MAX_LINE_BYTES)
    writer.flush()
    os.close(readable)
    os.close(writable)
    assert received == "".join(lines).encode()
    assert writer.take_dropped() == 0


def test_lines_that_cannot_be_written_are_counted_at_the_end() -> None:
    """Nobody reads the pipe: what is not in it by then, and only that, is dropped."""
    readable, writable = os.pipe()
    writer = LineWriter(writable)
    writer.start()
    writer.write(["a" * 999 + "\n"] * 400)
    writer.close()
    dropped = writer.take_dropped()
    received = os.read(readable, 1_000_000)
    assert received.count(b"\n") + dropped == 400
    writer.flush()
    received += os.read(readable, 1_000_000)  # the one write that was under way
    assert 400 < received.count(b"\n") + dropped <= 400 + MAX_LINE_BYTES // 1_000
    os.close(readable)
    os.close(writable)


def test_what_is_logged_at_exit_is_written() -> None:
    """The worker has ended, and then a function that a model has registered logs a line."""
    readable, writable = os.pipe()
    writer = LineWriter(writable)
    writer.start()
    writer.write(["a\n"])
    writer.close()
    writer.write(["b\n"])
    writer.flush()
    assert os.read(readable, MAX_LINE_BYTES) == b"a\nb\n"
    assert writer.take_dropped() == 0
    os.close(readable)
    os.close(writable)


def test_lines_are_written_after_a_flush() -> None:
    """A model that configures logging anew has all handlers flushed and closed."""
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    writer = LineWriter(writable)
    writer.start()
    for line in (b"a\n", b"b\n"):
        writer.write([line.decode()])
        writer.flush()
        assert os.read(readable, MAX_LINE_BYTES) == line
    os.close(readable)
    os.close(writable)
