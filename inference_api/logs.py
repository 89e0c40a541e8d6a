"""JSON lines on stdout: one format for the application's, Gunicorn's and the access lines; nobody waits for a write."""

import functools
import json
import logging
import math
import os
import re
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from gunicorn import glogging

from inference_api import problems
from inference_api.metrics import Metrics

MAX_LINE_BYTES = select.PIPE_BUF
"""Writes of up to PIPE_BUF bytes to a pipe are atomic (POSIX), so that lines of several workers never mix."""
MAX_WRITE_BYTES = 65_536
MAX_QUEUED_LINES = 16_384
LINES_AT_ONCE = 1_024
MAX_METHOD_CHARACTERS = 32
MAX_PATH_CHARACTERS = 480
MAX_MODEL_CHARACTERS = 129
"""Of an access line: with every one of them escaped, it still has less than MAX_LINE_BYTES."""
SHORT_TEXT_CHARACTERS = 64
MEMO_TEXTS = 128
GATHER_SECONDS = 0.02
FLUSH_SECONDS = 1.0
PROGRESS_SECONDS = 5.0

_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_TRACEPARENT = re.compile(  # of version 00 nothing follows the flags, and there is no version ff
    r"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?"
)


class _Serving(threading.local):
    environ: dict[str, Any] | None = None


serving = _Serving()
"""Its `environ` is the WSGI environ of the request that this thread serves, whose ids stand in every line it logs."""


def trace_id(traceparent: str | None) -> str | None:
    """The trace id of a valid traceparent header (W3C Trace Context §3.2), else None."""
    match = _TRACEPARENT.fullmatch(traceparent or "")
    return match[1] if match else None


def timestamp(seconds: float) -> str:
    """ISO 8601 in UTC with microseconds, of seconds since the epoch."""
    return f"{_second(int(seconds))}.{int(seconds % 1 * 1e6):06d}Z"


@functools.lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def access_line(
    stamp: str,
    request_id: str,
    method: str,
    path: str,
    status: int,
    duration_seconds: float,
    wait_seconds: float | None,
    model: str | None,
    trace: str | None,
) -> str:
    """One request's access line; what is None or empty is left out.

    By hand, of pieces that recur, and with "%", which takes two thirds of the time of a format in braces: an encoder
    costs half as much as the request.
    """
    what = _what(method[:MAX_METHOD_CHARACTERS], path[:MAX_PATH_CHARACTERS], status, model)
    wait = f',"queue_ms":{"%.3f" % (wait_seconds * 1e3)}' if wait_seconds is not None else ""
    trace = f',"trace_id":"{trace}"' if trace is not None else ""
    return f"{_begin(stamp)}{request_id}{what}{'%.3f' % (duration_seconds * 1e3)}{wait}{trace}}}\n"


@functools.lru_cache(maxsize=1)
def _begin(stamp: str) -> str:
    return f'{{"time":"{stamp}","level":"INFO","logger":"inference_api.access","message":"request","request_id":"'


@functools.lru_cache(MEMO_TEXTS)
def _what(method: str, path: str, status: int, model: str | None) -> str:
    where = f',"method":"{method}","path":{quoted(path)}' if method else ""
    by = f',"model":{quoted(model[:MAX_MODEL_CHARACTERS])}' if model is not None else ""
    return f'"{where},"status":{status}{by},"duration_ms":'


def json_line(fields: dict[str, Any]) -> str:
    """`fields` as one line of JSON of at most MAX_LINE_BYTES, all ASCII: the longest text is cut until it fits.

    Where there is no long text, the last fields are left out.
    """
    try:
        line = json.dumps(fields, default=str, allow_nan=False)
    except (TypeError, ValueError):  # NaN, a name that is no text, a circle: what a model logs need not be JSON
        fields = _as_text(fields)
        line = json.dumps(fields)
    while len(line) >= MAX_LINE_BYTES:
        fields = _as_text(fields)
        longest = max(fields, key=lambda name: len(str(fields[name])))
        text = str(fields[longest])
        if len(text) <= SHORT_TEXT_CHARACTERS:
            fields.popitem()
        else:  # the end of a traceback says most, the beginning of any other text
            fields[longest] = "…" + text[-len(text) // 2 :] if longest == "exception" else text[: len(text) // 2] + "…"
        line = json.dumps(fields)
    return line + "\n"


def _as_text(fields: dict[Any, Any]) -> dict[str, Any]:
    """`fields` with nothing in them but texts and finite numbers."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))

    return {str(name): value if is_number(value) else str(value) for name, value in fields.items()}


def record_fields(record: logging.LogRecord) -> dict[str, Any]:
    """A record as a dict: the fixed fields first, then the request's, then those given as `extra`."""
    fields: dict[str, Any] = {
        "time": timestamp(record.created),
        "level": record.levelname,
        "logger": record.name,
        "message": record.getMessage(),
    }
    if (environ := serving.environ) is not None:
        fields["request_id"] = problems.request_id(environ)
        if trace := trace_id(environ.get("HTTP_TRACEPARENT")):
            fields["trace_id"] = trace
    fields.update((name, value) for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES)
    if record.exc_info:
        fields["exception"] = logging.Formatter().formatException(record.exc_info)
    return fields


class LineWriter:
    """Writes whole lines to a file descriptor and never makes a caller wait for it.

    In a worker, after `start()`, a thread of its own writes. Before, and in the master, which must not have a thread
    when it forks, a line is written only if there is room for it. Lines that find no room are dropped and counted.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.dropped = 0
        self._dropping = threading.RLock()  # a signal handler may log, too
        self._dropped_reported = self._dropped_taken = 0
        self._lines: deque[str] = deque()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._taken = 0  # how many more are being written
        self._is_closed = False
        self._flushed = threading.Event()  # set where nobody waits for it
        self._flushed.set()
        self._write_bytes = MAX_WRITE_BYTES if stat.S_ISREG(os.fstat(fd).st_mode) else MAX_LINE_BYTES

    def start(self) -> None:
        """Write in a thread from now on; called in a worker, after the fork."""
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write(self, lines: list[str]) -> None:
        """Take whole lines of ASCII, each at most MAX_LINE_BYTES long."""
        if self._thread is None:
            for line in lines:
                self._write_if_room(line)
        elif len(self._lines) < MAX_QUEUED_LINES:
            self._lines.extend(lines)
            if not self._wake.is_set():
                self._wake.set()
        else:
            self._drop(len(lines))

    def flush(self) -> bool:
        """Wait until what is there has been written, for at most FLUSH_SECONDS; returns whether it has."""
        if self._thread is None or not self._thread.is_alive():  # as in a process that a model forks
            return True
        self._flushed = flushed = threading.Event()
        self._wake.set()
        return flushed.wait(FLUSH_SECONDS)

    def close(self) -> None:
        """Called as the process ends: what `flush` cannot write is dropped, and counted."""
        if not self.flush():
            self._is_closed = True
            self._drop(self._taken + len(self._lines))

    def take_dropped(self) -> int:
        """How many lines were dropped since this was last called."""
        dropped = self.dropped  # once: it may grow at any moment
        before, self._dropped_taken = self._dropped_taken, dropped
        return dropped - before

    def _write_if_room(self, line: str) -> None:
        try:
            poller = select.poll()
            poller.register(self.fd, select.POLLOUT)
            if not any(events & select.POLLOUT for _, events in poller.poll(0)):
                raise BlockingIOError
            os.write(self.fd, line.encode("ascii"))
        except OSError:
            self._drop(1)

    def _drop(self, count: int) -> None:
        with self._dropping:
            self.dropped += count

    def _run(self) -> None:
        while True:
            self._wake.wait()
            if self._flushed.is_set():
                time.sleep(GATHER_SECONDS)  # a write for many lines, and few switches between threads
            self._wake.clear()
            flushed = self._flushed
            while self._lines and not self._is_closed:
                self._write_some()
            flushed.set()

    def _write_some(self) -> None:
        self._taken = min(len(self._lines), LINES_AT_ONCE)
        lines = [self._lines.popleft() for _ in range(self._taken)]
        data = "".join(lines).encode("ascii", "replace")
        begin, is_written = 0, False
        while begin < len(data) and not self._is_closed:
            end = data.rfind(b"\n", begin, begin + self._write_bytes) + 1
            if not end:  # a line that is too long is broken, if at all, alone
                end = data.index(b"\n", begin) + 1
            is_written = self._write_whole(data[begin:end])
            self._taken -= data.count(b"\n", begin, end)
            begin = end
        dropped = self.dropped
        if is_written and dropped != self._dropped_reported:
            before, self._dropped_reported = self._dropped_reported, dropped
            self._lines.append(
                json_line(
                    {
                        "time": timestamp(time.time()),
                        "level": "WARNING",
                        "logger": "inference_api.logs",
                        "message": "log lines dropped",
                        "dropped": dropped - before,
                    }
                )
            )

    def _write_whole(self, lines: bytes) -> bool:
        data = memoryview(lines)
        try:
            while data:
                data = data[os.write(self.fd, data) :]
        except OSError as exc:  # the reader has gone, or the disk is full
            if isinstance(exc, BlockingIOError):  # somebody else has made this pipe or terminal non-blocking
                time.sleep(GATHER_SECONDS)
            self._drop(bytes(data).count(b"\n"))
            return False
        return True


class _Handler(logging.Handler):
    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self.writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.writer.write([json_line(record_fields(record))])
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Called by `logging.shutdown()`, and where a model configures logging anew."""
        self.writer.flush()


class Logger(glogging.Logger):  # type: ignore[misc] # Gunicorn has no types
    """Gunicorn's logger class: sends every line of the process through one LineWriter.

    What a model, or a library below it, prints goes to stderr, so that it never stands between the lines.
    """

    def __init__(self, cfg: Any) -> None:
        _open_closed_descriptors()
        self.writer = LineWriter(os.dup(1))
        self.metrics: Metrics | None = None
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        super().__init__(cfg)

    def in_worker(self, metrics: Metrics | None) -> None:
        """Called in a worker, after the fork: lines are written by a thread from now on, requests counted."""
        self.metrics = metrics
        self.writer.start()

    def end(self) -> None:
        """Called in a worker, as it ends."""
        self.writer.close()
        if self.metrics is not None:
            self.metrics.count("log_lines_dropped", self.writer.take_dropped())

    def setup(self, cfg: Any) -> None:
        """Called by Gunicorn at the start and at every reload."""
        self.cfg = cfg
        root = logging.getLogger()
        root.handlers = [_Handler(self.writer)]
        root.setLevel(cfg.loglevel.upper())
        for logger in (self.error_log, self.access_log):
            logger.handlers = []
            logger.propagate = True
            logger.setLevel(logging.NOTSET)
        logging.captureWarnings(True)

    def access(self, resp: Any, req: Any, environ: dict[str, Any], request_time: timedelta) -> None:
        """One request served by a stock worker; the project's own worker writes its lines itself."""
        headers = {name.lower(): value for name, value in resp.headers}
        status = int(str(resp.status).split(None, 1)[0])
        seconds = request_time.total_seconds()
        if self.metrics is not None:
            self.metrics.record_threadsafe(environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"], status, seconds)
        if self.cfg.accesslog and logging.getLogger().isEnabledFor(logging.INFO):
            line = access_line(
                timestamp(time.time()),
                problems.request_id(environ),
                environ["REQUEST_METHOD"],
                environ.get("PATH_INFO", ""),
                status,
                seconds,
                None,
                headers.get("x-model"),
                trace_id(environ.get("HTTP_TRACEPARENT")),
            )
            self.writer.write([line])

    def reopen_files(self) -> None:
        """There are none: lines go to stdout."""


def _open_closed_descriptors() -> None:
    """Started without stdin, stdout or stderr, the next files to be opened would take their places."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor: this one


@contextmanager
def progress(message: str, **fields: str) -> Iterator[None]:
    """Log a line every PROGRESS_SECONDS while the block runs."""
    started = time.monotonic()
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(PROGRESS_SECONDS):
            seconds = round(time.monotonic() - started)
            logging.getLogger("inference_api").info(message, extra={**fields, "seconds": seconds})

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
