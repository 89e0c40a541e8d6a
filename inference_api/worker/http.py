"""HTTP/1.1 and 1.0 requests: from the bytes of a head to WSGI variables, and the framing of bodies (RFC 9112).

What is not well-formed is refused, not repaired: two readers that repair differently are how requests are smuggled.
Only empty lines before a request are skipped (RFC 9112 §2.2), and fields dropped whose names have an underscore.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

MAX_HEAD_BYTES = 65_536
MAX_CHUNK_LINE_BYTES = 256
MAX_TRAILER_BYTES = 8_192
LINES_AT_ONCE = 32
"""After so many lines of a chunked body it is the turn of others: chunks of a byte take as long to read as requests."""
MEMO_LINES = 1_024
MEMO_NAME_BYTES = 64
MEMO_HEAD_BYTES = 4_096
"""Lines recur between clients, and whole heads on a connection: what one of at most this size means is remembered."""

_NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # a token, RFC 9110 §5.6.2
_VALUE = r"[\t\x20-\x7e\x80-\xff]*"  # RFC 9110 §5.5
_REQUEST_LINE = re.compile(rf"({_NAME}) ([\x21\x22\x24-\x7e]+) HTTP/([0-9])\.([0-9])")  # no fragment: %x23
_FIELD_NAME = re.compile(_NAME)
_FIELD_VALUE = re.compile(_VALUE)
_FIRST_BYTE = re.compile(rf"{_NAME}|\r|\Z".encode())
_FIELD_BYTES = bytes(byte for byte in range(256) if _FIELD_VALUE.fullmatch(chr(byte)))
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[\t ]*(?:;%b)?\r\n" % _VALUE.encode())
_TRAILER_LINE = re.compile(rf"(?:{_NAME}:{_VALUE})?\r\n".encode())
_HOST = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=%]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_SINGLE_FIELDS = frozenset({"HTTP_HOST", "CONTENT_LENGTH", "CONTENT_TYPE"})


class Refusal(Exception):  # noqa: N818 - an answer, not an accident
    """A request that the server itself answers; the connection cannot be used after it."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Head(NamedTuple):
    """What the head of a request says."""

    is_http11: bool
    keep_alive: bool
    body_bytes: int | None  # None: chunked
    expects_continue: bool


class RequestParser:
    """Reads heads of requests within these bounds; those of Gunicorn may be 0, which is its word for none."""

    def __init__(self, *, max_line_bytes: int, max_fields: int, max_field_bytes: int, max_body_bytes: int) -> None:
        self.max_body_bytes = max_body_bytes
        self._max_line_bytes = max_line_bytes or MAX_HEAD_BYTES
        self._max_fields = max_fields
        self._max_field_bytes = max_field_bytes or MAX_HEAD_BYTES
        self._short_bytes = min(self._max_line_bytes, self._max_field_bytes, MEMO_HEAD_BYTES)

    def check_partial(self, head: bytes, start: int) -> None:
        """Refuse a head that is not complete but already wrong, so that nobody waits for the rest of it.

        What stands before `start` has been checked.
        """
        if head[start - 1 : start] == b"\r":  # whose LF, if any, comes after
            start -= 1
        lines = head[start:].removesuffix(b"\r").replace(b"\r\n", b"")
        if lines.translate(None, _FIELD_BYTES) or not _FIRST_BYTE.match(head, 0, 1):
            raise Refusal(400, "The request is not HTTP/1.1.")
        line, crlf, _ = head.partition(b"\r\n")
        self._check_sizes(len(head), len(line.removesuffix(b"\r")))
        if crlf and start < len(line) + len(crlf):
            _request_line.__wrapped__(line.decode("latin-1"))

    def parse(self, head: bytes, environ: dict[str, Any], scheme_fields: Sequence[tuple[str, str]] = ()) -> Head:
        """Read a whole head, without its empty line; `environ` is given what is understood, also if it is refused.

        `scheme_fields` are those by which a trusted proxy says that its client came by https.
        """
        fields = head.decode("latin-1").split("\r\n")
        line = fields.pop(0)
        is_short = len(head) <= self._short_bytes
        if not is_short:
            self._check_sizes(len(head), len(line), max(map(len, fields), default=0))
        variables, is_http11, authority = (_request_line if is_short else _request_line.__wrapped__)(line)
        environ.update(variables)
        if len(fields) > self._max_fields:
            raise Refusal(431, f"A request may have at most {self._max_fields} header fields.")
        for key, value in map(_field if is_short else _field.__wrapped__, fields):
            if key in environ and key:
                if key in _SINGLE_FIELDS:
                    raise Refusal(400, "A header field that may stand once stands twice.")
                value = f"{environ[key]}{'; ' if key == 'HTTP_COOKIE' else ','}{value}"
            environ[key] = value
        environ.pop("", None)  # where dropped fields went
        if is_http11 and "HTTP_HOST" not in environ:
            raise Refusal(400, "The header field Host is missing.")
        if authority:
            environ["HTTP_HOST"] = authority
        if scheme_fields:
            schemes = {environ[key] == value for key, value in scheme_fields if key in environ}
            if len(schemes) > 1:
                raise Refusal(400, "The forwarded scheme is contradictory.")
            if True in schemes:
                environ["wsgi.url_scheme"] = "https"
        body_bytes = self._body_bytes(environ, is_http11)
        expectation = environ.get("HTTP_EXPECT")
        if expectation is not None and expectation.lower() != "100-continue":
            raise Refusal(417, "The only expectation is 100-continue.")
        options = environ.get("HTTP_CONNECTION")
        keep_alive = is_http11
        if options is not None:
            tokens = {token.strip("\t ") for token in set(options.lower().split(","))}
            keep_alive = "close" not in tokens and (is_http11 or "keep-alive" in tokens)
        return Head(is_http11, keep_alive, body_bytes, is_http11 and expectation is not None)

    def _check_sizes(self, head_bytes: int, line_bytes: int, field_bytes: int = 0) -> None:
        """Refuse a head whose request line, or whose longest field, is too long, or all of it."""
        if line_bytes > self._max_line_bytes:
            raise Refusal(414, f"The request line may have at most {self._max_line_bytes} bytes.")
        if head_bytes > MAX_HEAD_BYTES:
            raise Refusal(431, f"The header section may have at most {MAX_HEAD_BYTES} bytes.")
        if field_bytes > self._max_field_bytes:
            raise Refusal(431, f"A header field may have at most {self._max_field_bytes} bytes.")

    def _body_bytes(self, environ: dict[str, Any], is_http11: bool) -> int | None:
        """RFC 9112 §6.3."""
        coding: str | None = environ.get("HTTP_TRANSFER_ENCODING")
        length: str | None = environ.get("CONTENT_LENGTH")
        if coding is not None:
            if length is not None or not is_http11:
                raise Refusal(400, "The request's framing is ambiguous.")
            if coding.lower() != "chunked":
                raise Refusal(501, "The only transfer coding is chunked.")
            return None
        if length is None:
            return 0
        if not (length.isascii() and length.isdigit()):
            raise Refusal(400, "The header field Content-Length is not valid.")
        if len(length) > 18 or int(length) > self.max_body_bytes:
            raise _body_too_large(self.max_body_bytes)
        return int(length)


@lru_cache(MEMO_LINES)
def _request_line(line: str) -> tuple[dict[str, str], bool, str]:
    """The variables of a request line, whether it is of HTTP/1.1, and the authority that a target may name."""
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise Refusal(400, "The request line is not valid.")
    method, target, major, minor = match.groups()
    if major != "1":
        raise Refusal(505, "The server speaks HTTP/1.1 and HTTP/1.0.")
    if method == "CONNECT" or target == "*":
        raise Refusal(501, "The server is not a proxy and has no options of its own.")
    before_query, _, query = target.partition("?")
    authority, path = "", before_query
    if not target.startswith("/"):  # absolute-form, RFC 9112 §3.2.2: its authority counts, not the Host field's
        scheme, _, rest = before_query.partition("://")
        authority, _, path = rest.partition("/")
        path = f"/{path}"
        if scheme.lower() not in ("http", "https") or not authority or not _HOST.fullmatch(authority):
            raise Refusal(400, "The request target is not valid.")
    variables = {
        "REQUEST_METHOD": method,
        "RAW_URI": target,
        "SERVER_PROTOCOL": f"HTTP/1.{minor}",
        "QUERY_STRING": query,
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1") if "%" in path else path,
    }
    return variables, minor != "0", authority


@lru_cache(MEMO_LINES)
def _field(line: str) -> tuple[str, str]:
    """The variable and the value of a header field."""
    name, colon, value = line.partition(":")
    if not colon or not ((value.isascii() and value.isprintable()) or _FIELD_VALUE.fullmatch(value)):
        raise Refusal(400, "A header field is not valid.")
    key = (_field_key if len(name) <= MEMO_NAME_BYTES else _field_key.__wrapped__)(name)
    value = value.strip("\t ")
    if key == "HTTP_HOST" and not _HOST.fullmatch(value):
        raise Refusal(400, "The header field Host is not valid.")
    return key, value


@lru_cache(MEMO_LINES)
def _field_key(name: str) -> str:
    if not _FIELD_NAME.fullmatch(name):
        raise Refusal(400, "A header field is not valid.")
    if "_" in name:
        return ""  # X_API_Key and X-API-Key would be the same variable: a proxy may have checked only one of them
    key = name.upper().replace("-", "_")
    return key if key in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{key}"


def _body_too_large(max_body_bytes: int) -> Refusal:
    return Refusal(413, f"The body may have at most {max_body_bytes} bytes.")


class SizedBody:
    """A body whose length is known, fed in pieces."""

    has_more = False

    def __init__(self, length: int) -> None:
        self.content = bytearray()
        self._length = length

    def feed(self, data: bytes) -> bytes | None:
        """Take more bytes; returns those after the end of the body, or None where it has not come."""
        left = self._length - len(self.content)
        self.content += data[:left]
        return data[left:] if len(data) >= left else None


class ChunkedBody:
    """A chunked body (RFC 9112 §7.1), fed in pieces; chunk extensions and trailers are dropped."""

    def __init__(self, max_body_bytes: int) -> None:
        self.content = bytearray()
        self.has_more = False  # bytes that it has taken and not looked at: to be fed once more
        self._max_body_bytes = max_body_bytes
        self._left = 0  # bytes of the current chunk still to come, with its CRLF
        self._rest = b""  # the beginning of a line, or what it has not looked at
        self._pattern = _CHUNK_LINE  # of the next line
        self._max_line_bytes = MAX_CHUNK_LINE_BYTES

    def feed(self, data: bytes) -> bytes | None:
        """Take more bytes; returns those after the end of the body, or None where it has not come."""
        data, self._rest, self.has_more = self._rest + data, b"", False
        at = 0
        for _ in range(LINES_AT_ONCE):
            if self._left:
                piece = data[at : at + self._left]
                self.content += piece
                self._left -= len(piece)
                if self._left < 2 and not self.content.endswith(b"\r\n"[: 2 - self._left]):
                    raise Refusal(400, "A chunk does not end where it says.")
                if self._left:
                    return None
                del self.content[-2:]
                at += len(piece)
            line = self._pattern.match(data, at, at + self._max_line_bytes)
            if line is None:
                self._rest = data[at:]
                if b"\n" in self._rest or len(self._rest) >= self._max_line_bytes:
                    raise Refusal(400, "A line of the chunked body is not valid, or too long.")
                return None
            at = line.end()
            if self._pattern is _CHUNK_LINE:
                self._begin_chunk(int(line[1], 16))
            elif line[0] == b"\r\n":
                return data[at:]
            else:
                self._max_line_bytes -= len(line[0])  # trailers are bounded together
        self._rest, self.has_more = data[at:], True
        return None

    def _begin_chunk(self, size: int) -> None:
        if len(self.content) + size > self._max_body_bytes:
            raise _body_too_large(self._max_body_bytes)
        if size:
            self._left = size + 2
        else:
            self._pattern, self._max_line_bytes = _TRAILER_LINE, MAX_TRAILER_BYTES
