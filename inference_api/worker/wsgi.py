"""The WSGI side (PEP 3333): one request's passage through the application, in an application thread."""

import functools
import io
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Sized
from email.utils import formatdate
from types import TracebackType
from typing import TYPE_CHECKING, Any
from wsgiref.util import is_hop_by_hop

from inference_api import problems

if TYPE_CHECKING:
    from inference_api.worker.connection import Connection
    from inference_api.worker.pool import Outbox, Pool

SERVER = "inference-api"
MAX_STREAM_BYTES = 1_048_576
"""Bytes of a streamed answer that may wait for the client before the application is made to wait."""
PIECE_BYTES = 4_096
"""What each of its pieces counts for besides: millions of small ones would keep all others waiting."""
MEMO_STATUSES = 32
MEMO_NAMES = 64

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]
Headers = list[tuple[str, str]]
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

log = logging.getLogger("inference_api.worker")

_STATUS = re.compile(r"[2-9][0-9]{2} [\t\x20-\x7e]*")
_FIELD_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}")
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_BODILESS = (204, 304)
_SERVERS_OWN = frozenset({"date", "server"})


class GoneError(Exception):
    """Nobody waits for the rest of a streamed answer: the client has gone, or the deadline has passed."""


class Exchange:
    """One request and its answer, checked (PEP 3333) and framed (RFC 9112 §6).

    The I/O thread makes it, an application thread runs it, and the I/O thread alone decides what becomes of the
    answer; `abandoned` tells the application thread that nobody waits for it any more.
    """

    __slots__ = (
        "_headers", "_is_bodiless", "_left", "_outbox", "_status_line", "_waiting_since", "abandoned",
        "arrived", "batch_began", "body_bytes", "connection", "cost", "deadline", "ended", "environ", "is_http11",
        "is_waiting", "keep_alive", "later", "method", "model", "path", "place", "pool", "produced_bytes",
        "request_id", "room", "sent_bytes", "started", "status", "traceparent", "waited_seconds",
    )  # fmt: skip

    def __init__(
        self, connection: "Connection", environ: dict[str, Any], body: bytes, is_http11: bool, keep_alive: bool
    ) -> None:
        self.connection = connection
        self.environ = environ
        self.method = environ["REQUEST_METHOD"]
        self.path = environ["PATH_INFO"]
        self.request_id = problems.request_id(environ)
        self.traceparent: str | None = environ.get("HTTP_TRACEPARENT")
        self.body_bytes = len(body)
        self.is_http11 = is_http11
        self.keep_alive = keep_alive
        self.is_waiting = False  # for a batch to begin, see batching.py
        self.batch_began = math.inf
        self.pool: Pool | None = None  # whose threads run it
        self.place: threading.Lock | None = None  # reserved in the pool, for one that the I/O thread runs
        self.abandoned = False
        self.status = 0
        self.model: str | None = None
        self.arrived = self.deadline = self.started = self.cost = self.waited_seconds = 0.0
        self.ended = 0.0  # when the last piece of the answer was handed to the I/O thread
        self.room: threading.Event | None = None  # for more of an answer that is sent in pieces, once it has begun
        self._status_line: str | None = None
        self.later: Any = None  # the answer, while it is yet to come and no thread waits for it
        environ["wsgi.input"] = io.BytesIO(body)
        environ["inference_api.caller"] = self

    @property
    def log_fields(self) -> dict[str, str]:
        """What a log line about this exchange has to say which one it was."""
        return {"request_id": self.request_id, "method": self.method, "path": self.path}

    def run(self, application: Application, environ: dict[str, Any], outbox: "Outbox") -> None:
        """Call the application and send what it gives; its close() is always called. Never raises.

        An application may return an iterable that has `when_ready` and whose items are still to come. Where the I/O
        thread runs this, it returns before: `begin` then has them made, and this is to be called again to send them.
        """
        self._outbox = outbox
        try:
            result = self.later
            if result is None:
                result = application(environ, self.start_response)
                if type(result) is list and self.room is None:  # nearly always; it has no close()
                    self._send_whole(b"".join(result))
                    return
                if hasattr(result, "when_ready"):
                    # Not known, if its thread waits: all of its time, for what admission learns of it.
                    self.waited_seconds = math.inf
                    if self.place is not None:  # no thread is to wait for it
                        self.later, self._waiting_since = result, time.monotonic()
                        return
            elif self.place is not None:
                self.waited_seconds = time.monotonic() - self._waiting_since
            try:
                self._finish(result)
            finally:
                self.later = None
                if close := getattr(result, "close", None):
                    close()
        except GoneError:
            self._give_up()
        except BaseException:
            log.exception("the application failed", extra=self.log_fields)
            self._give_up()

    def begin(self) -> None:
        """Have made what is to come later; the I/O thread is told, by any thread, once to iterate no longer waits."""
        self.later.when_ready(lambda: self._outbox.resume(self))

    def start_response(self, status: str, headers: Headers, exc_info: ExcInfo | None = None) -> Callable[[bytes], None]:
        """PEP 3333's start_response; raises AssertionError or ValueError for what an application may not do."""
        if exc_info is not None:
            try:
                if self.ended or self.room is not None:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # breaks the reference cycle, as PEP 3333 asks
        elif self._status_line is not None:
            raise AssertionError("start_response() was called twice without exc_info")
        self._status_line = None  # what is refused is not sent, should the application go on all the same
        self.status = _code(status)
        self._check(headers)
        self._status_line = status
        return self.write

    def _check(self, headers: Headers) -> None:
        """Refuse fields that an application may not send (PEP 3333).

        Date and Server are the server's own (RFC 9110 §6.6.1, §10.2.4): the application's are left out.
        """
        names, values = zip(*headers, strict=True) if headers else ((), ())
        length_at, model_at, sent = _places(names)
        text = "".join(values)
        if not (text.isprintable() and text.isascii()) and not _FIELD_VALUE.fullmatch(text):
            name = next(name for name, value in headers if not _FIELD_VALUE.fullmatch(value))
            raise ValueError(f"the value of the header field {name} is not valid")
        self._left: int | None = None  # bytes of the declared length that have not come yet
        if length_at is not None:
            length = values[length_at]
            if not (length.isdigit() and length.isascii()):
                raise ValueError(f"the Content-Length is not a whole number: {length!r}")
            self._left = int(length)
        if model_at is not None:
            self.model = values[model_at]
        self._headers = headers if sent is None else [headers[place] for place in sent]

    def write(self, data: bytes) -> None:
        """Send a piece of the body now; waits where the client does not keep up. PEP 3333's write()."""
        if self.abandoned:
            raise GoneError
        if self.ended:
            raise AssertionError("write() was called after the end of the answer")
        if not isinstance(data, bytes):
            raise TypeError("a piece of the body is not bytes")
        if not data:
            return
        piece, excess, room = b"", b"", self.room
        if room is None:
            piece = self._open(None)
            self.produced_bytes = self.sent_bytes = 0
            room = self.room = threading.Event()
        if self._is_bodiless:
            data = b""
        elif self._left is not None:
            data, excess = data[: self._left], data[self._left :]
            self._left -= len(data)
        elif self.is_http11:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        piece += data
        self.produced_bytes += len(piece) + PIECE_BYTES
        self._outbox.deliver(self, piece, False)
        if excess:
            raise ValueError("the body is longer than its Content-Length")
        while self.produced_bytes - self.sent_bytes > MAX_STREAM_BYTES:
            if self.abandoned:
                raise GoneError
            room.wait()  # which also ends once it is abandoned
            room.clear()

    def was_sent(self, count: int, *, is_whole: bool) -> None:
        """So many bytes of a piece are with the socket, its last ones or not; called by the I/O thread."""
        if self.room is not None:
            self.sent_bytes += count + PIECE_BYTES if is_whole else count
            self.room.set()

    def _finish(self, result: Iterable[bytes]) -> None:
        """Send all of what the application returned."""
        if self.room is None and isinstance(result, Sized) and len(result) == 1:
            self._send_whole(b"".join(result))  # that is all of it
            return
        for data in result:
            self.write(data)
        if self.room is None:
            self._send_whole(b"")
        elif self._is_bodiless or self._left == 0:
            self._end(b"")
        elif self._left is None:
            self._end(b"0\r\n\r\n" if self.is_http11 else b"")
        else:
            raise ValueError("the body is shorter than its Content-Length")

    def _give_up(self) -> None:
        """End the answer after a failure: with a problem where nothing has been sent, else cut off."""
        if self.ended:
            return
        if self.room is None:
            self.status = 500
            self._end(problem_answer(self, 500, "The service failed."))
        else:
            self._end(b"" if self._left == 0 else None)  # all that was promised has come, or not

    def _send_whole(self, body: bytes) -> None:
        """The usual case: the head, and all of the body with it."""
        opening = self._open(body)
        self.ended = time.monotonic()
        self._outbox.deliver_whole(self, opening, b"" if self._is_bodiless else body)

    def _open(self, body: bytes | None) -> bytes:
        """The head of the answer: before all of its body or, where that is None, before pieces of it."""
        status = self._status_line
        if status is None:
            raise AssertionError("the application did not call start_response() before its first piece of body")
        headers = self._headers
        self._is_bodiless = self.method == "HEAD" or self.status in _BODILESS
        if self._outbox.closing:
            self.keep_alive = False
        if self._left is not None:
            if self.status == 204:  # RFC 9110 §8.6
                headers = [field for field in headers if field[0].lower() != "content-length"]
            elif body is not None and len(body) != self._left and not self._is_bodiless:
                raise ValueError("the body is not as long as its Content-Length")
        elif body is not None:
            if self.status not in _BODILESS and (body or self.method != "HEAD"):
                headers = [*headers, ("Content-Length", str(len(body)))]
        elif self.is_http11 and not self._is_bodiless:
            headers = [*headers, ("Transfer-Encoding", "chunked")]
        elif not self._is_bodiless:
            self.keep_alive = False  # which tells where the body ends
        return head(status, headers, self)

    def _end(self, data: bytes | None) -> None:
        self.ended = time.monotonic()
        self._outbox.deliver(self, data, True)


def head(status: str, headers: Headers, exchange: Exchange) -> bytes:
    """The status line and fields of an answer, up to and with the empty line."""
    lines = [_first_lines(status, int(time.time())), *map(": ".join, headers)]
    if not exchange.keep_alive:
        lines.append("Connection: close")
    elif not exchange.is_http11:
        lines.append("Connection: keep-alive")
    lines.append("\r\n")
    return "\r\n".join(lines).encode("latin-1")


def problem_answer(exchange: Exchange, status: int, detail: str, *more: tuple[str, str]) -> bytes:
    """A whole answer made by the server itself."""
    body = problems.problem(status, detail, exchange.request_id)
    headers = [
        ("Content-Type", problems.MEDIA_TYPE),
        ("Content-Length", str(len(body))),
        ("X-Request-ID", exchange.request_id),
        *more,
    ]
    return head(f"{status} {problems.title(status)}", headers, exchange) + (b"" if exchange.method == "HEAD" else body)


@functools.lru_cache(MEMO_STATUSES)
def _first_lines(status: str, second: int) -> str:
    """The status line, and the Server and Date fields of this second since the epoch (RFC 9110 §6.6.1, §10.2.4)."""
    date = formatdate(second, usegmt=True)  # not strftime: a model may change the locale
    return f"HTTP/1.1 {status}\r\nServer: {SERVER}\r\nDate: {date}"


@functools.lru_cache(MEMO_NAMES)
def _places(names: tuple[str, ...]) -> tuple[int | None, int | None, list[int] | None]:
    """Where among fields of these names stand Content-Length, X-Model, and those to be sent, where not all are."""
    for name in names:
        if not _FIELD_NAME.fullmatch(name) or is_hop_by_hop(name):
            raise ValueError(f"the header field is not the application's to send: {name!r}")
    known = [name.lower() for name in names]
    if known.count("content-length") > 1:
        raise ValueError("the Content-Length stands twice")
    places = {name: place for place, name in enumerate(known)}
    sent = [place for place, name in enumerate(known) if name not in _SERVERS_OWN]
    return places.get("content-length"), places.get("x-model"), sent if len(sent) < len(names) else None


@functools.lru_cache(MEMO_STATUSES)
def _code(status: str) -> int:
    if not _STATUS.fullmatch(status):
        raise ValueError(f"the status is not valid: {status!r}")
    return int(status[:3])
