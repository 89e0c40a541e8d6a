"""One connection: from the bytes that come to the requests they are. Knows no socket call, no thread and no clock."""

import enum
import re
import socket
from collections.abc import Sequence
from typing import Any

from inference_api.worker.http import MEMO_HEAD_BYTES, ChunkedBody, Head, RequestParser, SizedBody
from inference_api.worker.wsgi import Exchange

MAX_PIPELINED_BYTES = 65_536
"""Bytes of further requests read while one is being answered."""

_EMPTY_LINES = re.compile(rb"(?:\r\n)+")


class Phase(enum.Enum):
    """What a connection waits for."""

    IDLE = enum.auto()  # the first byte of a request
    READING = enum.auto()  # the rest of a request
    RUNNING = enum.auto()  # the application
    WRITING = enum.auto()  # the client to take its answer
    LINGERING = enum.auto()  # the client to close, after the last answer (RFC 9112 §9.6)


class Connection:
    """The state of one connection. The I/O thread alone touches it."""

    def __init__(
        self,
        sock: socket.socket,
        parser: RequestParser,
        base: dict[str, Any],
        scheme_fields: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.sock = sock
        self.phase = Phase.IDLE
        self.since = 0.0  # when it became idle, its request began, or it began to linger
        self.expires = 0.0  # when it has waited long enough in its phase
        self.events = 0  # what the selector watches it for
        self.exchange: Exchange | None = None  # while it is not answered: in phase RUNNING alone
        self.output: list[memoryview] = []  # what the socket has not taken yet
        self.buffer = b""  # bytes read and not understood yet
        self.held_bytes = 0  # what it counts for among the bytes that the worker holds
        self.was_paused = False  # for want of memory, within the request that is coming
        self.has_ended = False  # the client sends no more
        self.must_close = False  # after what is in `output`
        self.wants_continue = False
        self._parser = parser
        self._base = base
        self._scheme_fields = scheme_fields  # by which a trusted proxy says that its client came by https
        self._searched = 0  # bytes of `buffer` in which no end of a head begins
        self._known_head = b""  # with its empty line
        self._head = Head(False, False, 0, False)
        self._environ = base  # with what has been understood of the head that came last, if only in part
        self._body: SizedBody | ChunkedBody | None = None

    def next_request(self, data: bytes) -> Exchange | None:
        """Take bytes; returns the next request once it is complete, and keeps what follows in `buffer`.

        Raises Refusal for what is not a request.
        """
        if self._body is None:
            data = self.buffer + data
            end = len(self._known_head)
            if not end or not data.startswith(self._known_head):
                end = self._read_head(data)
                if not end:
                    return None
            length = self._head.body_bytes
            if length is not None and len(data) - end >= length:
                self.buffer = data[end + length :]
                return self._exchange(data[end : end + length])
            data = data[end:]
            self.buffer = b""
            self.wants_continue = self._head.expects_continue and not data
            self._body = ChunkedBody(self._parser.max_body_bytes) if length is None else SizedBody(length)
        rest = self._body.feed(data)
        if rest is None:
            return None
        self.buffer = rest
        return self._exchange(bytes(self._body.content))

    def _read_head(self, data: bytes) -> int:
        """Read the head of a request; returns where it ends, or 0 where that has not come."""
        self._environ, self._known_head = self._base.copy(), b""
        empty_lines = _EMPTY_LINES.match(data)  # RFC 9112 §2.2: they are ignored
        begin = empty_lines.end() if empty_lines else 0
        end = data.find(b"\r\n\r\n", max(begin, self._searched))
        if end < 0:
            self.buffer = data[begin:]
            self._parser.check_partial(self.buffer, max(0, self._searched - begin))
            self._searched = max(0, len(self.buffer) - 3)
            return 0
        self._searched = 0
        self._head = self._parser.parse(data[begin:end], self._environ, self._scheme_fields)
        if end - begin <= MEMO_HEAD_BYTES:
            self._known_head = data[begin : end + 4]
        return end + 4

    def _exchange(self, body: bytes) -> Exchange:
        head = self._head
        environ = self._environ.copy()
        if head.body_bytes is None:  # the application is given the decoded body
            environ["CONTENT_LENGTH"] = str(len(body))
            del environ["HTTP_TRANSFER_ENCODING"]
        self._body = None
        return Exchange(self, environ, body, head.is_http11, head.keep_alive)

    def refused(self, now: float) -> Exchange:
        """A stand-in for a request that could not be read, so that its refusal is answered and logged like others."""
        self._body = None  # the connection may linger: what has come of the body is not kept meanwhile
        known = {"REQUEST_METHOD": "", "PATH_INFO": "", **self._environ}
        exchange = Exchange(self, known, b"", is_http11=True, keep_alive=False)
        exchange.arrived = now
        return exchange

    def forget(self) -> None:
        """Let go of all that it holds, as it is closed: there may be references to it for a while."""
        self.exchange = None  # which refers back to it
        self.output.clear()
        self.buffer = b""
        self._body = None

    @property
    def is_new(self) -> bool:
        """Whether no head of a request has come yet."""
        return self._environ is self._base

    @property
    def is_within_request(self) -> bool:
        """Whether part of a request has come."""
        return bool(self.buffer) or self._body is not None

    @property
    def has_more(self) -> bool:
        """Whether it is to be asked for the next request once more, though nothing has come."""
        return self._body is not None and self._body.has_more

    @property
    def unfinished_bytes(self) -> int:
        """How many bytes of requests that are not complete it holds."""
        return len(self.buffer) if self._body is None else len(self._body.content)
