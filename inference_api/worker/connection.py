"""One connection: from the bytes that come to the requests they are. Knows no socket call, no thread and no clock."""

import enum
import socket
from collections.abc import Iterable
from typing import Any, NamedTuple

from inference_api.worker.http import ChunkedBody, Refusal, RequestParser
from inference_api.worker.wsgi import Exchange

MAX_PIPELINED_BYTES = 65_536
"""Bytes of further requests read while one is being answered."""


MEMO_HEAD_BYTES = 2_048
"""The longest head that a connection remembers."""


class Head(NamedTuple):
    """What the head of a request says."""

    environ: dict[str, Any]
    length: int | None  # of the body; None: it is chunked
    is_http11: bool
    keep_alive: bool
    expects_continue: bool


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
        max_body_bytes: int,
        scheme_fields: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.sock = sock
        self.phase = Phase.IDLE
        self.since = 0.0  # when it became idle
        self.expires = 0.0  # when it has waited long enough in its phase
        self.events = 0  # what the selector watches it for
        self.exchange: Exchange | None = None
        self.output: list[memoryview] = []  # what the socket has not taken yet
        self.buffer = b""  # bytes read and not understood yet
        self.held_bytes = 0  # what it counts for among the bytes that the worker holds
        self.has_ended = False  # the client sends no more
        self.must_close = False  # after what is in `output`
        self.wants_continue = False
        self._parser = parser
        self._base = base
        self._max_body_bytes = max_body_bytes
        self._scheme_fields = scheme_fields  # by which a trusted proxy says that its client came by https
        self._head_bytes = b""  # of the last request, if its head is worth remembering: `_head` is what they mean
        self._head: Head
        self._environ: dict[str, Any] | None = None  # of a request that is not complete
        self._body_bytes = self._body_left = 0
        self._body_parts: list[bytes] = []
        self._chunked: ChunkedBody | None = None

    def next_request(self, data: bytes) -> Exchange | None:
        """Take bytes; returns the next request once it is complete, and keeps what follows in `buffer`.

        Raises Refusal for what is not a request.
        """
        if self._environ is None:
            if self.buffer:
                data = self.buffer + data
            end = data.find(b"\r\n\r\n")
            if end <= 0:
                while data.startswith(b"\r\n"):  # RFC 9112 §2.2: empty lines before a request are ignored
                    data = data[2:]
                end = data.find(b"\r\n\r\n")
                if end < 0:
                    self.buffer = data
                    if data and data != b"\r":
                        self._parser.check_partial(data)
                    return None
            head = data[:end]
            if head != self._head_bytes:  # most clients repeat themselves
                self._head_bytes = b""
                self._environ = self._base.copy()
                self._head = self._read_head(head, self._environ)
                if len(head) <= MEMO_HEAD_BYTES:
                    self._head_bytes = head
            environ, length, expects_continue = (
                self._head.environ.copy(),
                self._head.length,
                self._head.expects_continue,
            )
            data = data[end + 4 :]
            if length is not None and len(data) >= length:
                self._environ = None
                self.buffer = data[length:]
                return self._exchange(environ, data[:length])
            self._environ = environ
            self.buffer = b""
            self.wants_continue = expects_continue and not data
            if length is None:
                self._chunked = ChunkedBody(self._max_body_bytes)
            else:
                self._body_bytes = self._body_left = length
        return self._take_body(data)

    def _read_head(self, head: bytes, environ: dict[str, Any]) -> Head:
        is_http11 = self._parser.parse(head, environ)
        length = self._parser.framing(environ, is_http11)
        expectation = environ.get("HTTP_EXPECT")
        if expectation is not None and expectation.lower() != "100-continue":
            raise Refusal(417, "The only expectation is 100-continue.")
        options = {token.strip().lower() for token in environ.get("HTTP_CONNECTION", "").split(",")}
        keep_alive = "close" not in options and (is_http11 or "keep-alive" in options)
        schemes = [value == environ[key] for key, value in self._scheme_fields if key in environ]
        if schemes:
            if any(schemes) and not all(schemes):
                raise Refusal(400, "The forwarded scheme is contradictory.")
            if schemes[0]:
                environ["wsgi.url_scheme"] = "https"
        return Head(environ, length, is_http11, keep_alive, expectation is not None and is_http11)

    def _take_body(self, data: bytes) -> Exchange | None:
        environ = self._environ
        assert environ is not None  # noqa: S101 - for the type checker
        if self._chunked is not None:
            rest = self._chunked.feed(data)
            if rest is None:
                return None
            body = bytes(self._chunked.body)
            environ["CONTENT_LENGTH"] = str(len(body))
            del environ["HTTP_TRANSFER_ENCODING"]  # the application is given the decoded body
            self._chunked = None
        else:
            self._body_parts.append(data[: self._body_left])
            rest = data[self._body_left :]
            self._body_left -= len(self._body_parts[-1])
            if self._body_left:
                return None
            body = b"".join(self._body_parts)
            self._body_parts = []
        self._environ = None
        self.buffer = rest
        return self._exchange(environ, body)

    def _exchange(self, environ: dict[str, Any], body: bytes) -> Exchange:
        return Exchange(self, environ, body, self._head.is_http11, self._head.keep_alive)

    def refused(self) -> Exchange:
        """A stand-in for a request that could not be read, so that its refusal is answered and logged like others."""
        environ = self._environ or {}
        known = {"REQUEST_METHOD": "", "PATH_INFO": "", **environ}
        return Exchange(self, known, b"", is_http11=True, keep_alive=False)

    @property
    def is_within_request(self) -> bool:
        """Whether part of a request has come."""
        return bool(self.buffer) or self._environ is not None

    @property
    def unfinished_bytes(self) -> int:
        """How many bytes of requests that are not complete it holds."""
        if self._chunked is not None:
            return len(self._chunked.body) + len(self._chunked.buffer)
        return len(self.buffer) + (self._body_bytes - self._body_left if self._environ is not None else 0)
