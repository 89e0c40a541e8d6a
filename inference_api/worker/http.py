"""HTTP/1.1 and 1.0 requests, from bytes to a WSGI environ, and the framing of their bodies (RFC 9112).

What is not well-formed is refused, never repaired: two readers that repair differently are how requests are smuggled.
"""

import re
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

MAX_HEAD_BYTES = 65_536
MAX_CHUNK_LINE_BYTES = 256
MAX_TRAILER_BYTES = 8_192
MEMO_ENTRIES = 1_024
MEMO_LINE_CHARACTERS = 256

_T = TypeVar("_T")

_REQUEST_LINE = re.compile(
    r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([\x21\x22\x24-\x7e\x80-\xff]+) HTTP/([0-9])\.([0-9])"  # no fragment: %x23
)
_FIELD_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[\t ]*([\t\x20-\x7e\x80-\xff]*)")
_ILL_BEGUN = re.compile(rb"\A[^!#$%&'*+\-.^_`|~0-9A-Za-z\r]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[\t ]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")
_HOST = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=%]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_SINGLE_FIELDS = frozenset({"HTTP_HOST", "CONTENT_LENGTH", "CONTENT_TYPE"})


class Refusal(Exception):  # noqa: N818 - an answer, not an accident
    """A request that the server itself answers; the connection cannot be used after it."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class RequestParser:
    """Reads the head of a request into a WSGI environ.

    Lines recur from request to request on a connection, and between clients: those that were found well-formed are
    remembered, in a bounded number, with what they mean.
    """

    def __init__(self, *, max_line_bytes: int, max_fields: int, max_field_bytes: int, max_body_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._max_fields = max_fields
        self._max_field_bytes = max_field_bytes
        self._max_body_bytes = max_body_bytes
        self._request_lines: dict[str, tuple[dict[str, str], bool]] = {}
        self._field_lines: dict[str, tuple[str, str]] = {}

    def check_partial(self, head: bytes) -> None:
        """Refuse a head that is not complete but already wrong, so that nobody waits for the rest of it."""
        if _ILL_BEGUN.search(head):
            raise Refusal(400, "The request is not HTTP/1.1.")
        end = head.find(b"\r\n")
        if end > self._max_line_bytes or (end < 0 and len(head) > self._max_line_bytes):
            raise Refusal(414, f"The request line may have at most {self._max_line_bytes} bytes.")
        if end >= 0:
            self._request_line(head[:end].decode("latin-1"))
        if len(head) > MAX_HEAD_BYTES:
            raise Refusal(431, f"The header section may have at most {MAX_HEAD_BYTES} bytes.")

    def parse(self, head: bytes, environ: dict[str, Any]) -> bool:
        """Put a whole head, without its empty line, into `environ`; returns whether it is of HTTP/1.1."""
        if len(head) > MAX_HEAD_BYTES:
            raise Refusal(431, f"The header section may have at most {MAX_HEAD_BYTES} bytes.")
        lines = head.decode("latin-1").split("\r\n")
        variables, is_http11 = self._request_lines.get(lines[0]) or self._request_line(lines[0])
        environ.update(variables)
        if len(lines) - 1 > self._max_fields:
            raise Refusal(431, f"A request may have at most {self._max_fields} header fields.")
        memo = self._field_lines
        for i in range(1, len(lines)):
            line = lines[i]
            key, value = memo.get(line) or self._field_line(line)
            if key in environ:
                if not key:
                    continue
                if key in _SINGLE_FIELDS:
                    raise Refusal(400, "A header field that may stand once stands twice.")
                value = f"{environ[key]}{';' if key == 'HTTP_COOKIE' else ','}{value}"
            environ[key] = value
        environ.pop("", None)  # where dropped fields went
        if is_http11 and "HTTP_HOST" not in environ:
            raise Refusal(400, "The header field Host is missing.")
        if "" in variables:  # the authority of a target in absolute-form stands above Host
            environ["HTTP_HOST"] = variables[""]
        return is_http11

    def _request_line(self, line: str) -> tuple[dict[str, str], bool]:
        if len(line) > self._max_line_bytes:
            raise Refusal(414, f"The request line may have at most {self._max_line_bytes} bytes.")
        match = _REQUEST_LINE.fullmatch(line)
        if match is None:
            raise Refusal(400, "The request line is not valid.")
        method, target, major, minor = match.groups()
        if major != "1":
            raise Refusal(505, "The server speaks HTTP/1.1 and HTTP/1.0.")
        variables = {"REQUEST_METHOD": method, "RAW_URI": target, "SERVER_PROTOCOL": f"HTTP/1.{minor}"}
        if method == "CONNECT" or target == "*":
            raise Refusal(501, "The server is not a proxy and has no options of its own.")
        path = target
        if not path.startswith("/"):  # absolute-form, RFC 9112 §3.2.2: its authority counts, not the Host field's
            scheme, separator, rest = target.partition("://")
            authority, slash, path = rest.partition("/")
            authority, question, query = authority.partition("?")
            if scheme.lower() not in ("http", "https") or not separator or not _is_host(authority) or not authority:
                raise Refusal(400, "The request target is not valid.")
            variables[""] = authority
            path = f"/{question}{query}" if not slash else f"/{question}{query}{path}" if question else f"/{path}"
        path, _, variables["QUERY_STRING"] = path.partition("?")
        variables["PATH_INFO"] = unquote_to_bytes(path.encode("latin-1")).decode("latin-1") if "%" in path else path
        return _remember(self._request_lines, line, (variables, minor != "0"))

    def _field_line(self, line: str) -> tuple[str, str]:
        if len(line) > self._max_field_bytes:
            raise Refusal(431, f"A header field may have at most {self._max_field_bytes} bytes.")
        match = _FIELD_LINE.fullmatch(line)
        if match is None:
            raise Refusal(400, "A header field is not valid.")
        name, value = match[1].upper(), match[2].rstrip("\t ")
        if "_" in name:
            # X_API_Key and X-API-Key would be the same variable: a proxy may have checked only one of them.
            return _remember(self._field_lines, line, ("", ""))
        if name == "HOST" and not _is_host(value):
            raise Refusal(400, "The header field Host is not valid.")
        key = name.replace("-", "_")
        if key not in ("CONTENT_LENGTH", "CONTENT_TYPE"):
            key = f"HTTP_{key}"
        return _remember(self._field_lines, line, (key, value))

    def framing(self, environ: dict[str, Any], is_http11: bool) -> int | None:
        """The length of the body in bytes, or None for chunked (RFC 9112 §6.3)."""
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
        if len(length) > 18 or int(length) > self._max_body_bytes:
            raise Refusal(413, f"The body may have at most {self._max_body_bytes} bytes.")
        return int(length)


def _is_host(text: str) -> bool:
    return _HOST.fullmatch(text) is not None


def _remember(memo: dict[str, _T], line: str, meaning: _T) -> _T:
    if len(line) <= MEMO_LINE_CHARACTERS:
        if len(memo) >= MEMO_ENTRIES:
            memo.clear()
        memo[line] = meaning
    return meaning


class ChunkedBody:
    """Decodes a chunked body (RFC 9112 §7.1) fed in pieces; chunk extensions and trailers are dropped."""

    def __init__(self, max_body_bytes: int) -> None:
        self.body = bytearray()
        self._max_body_bytes = max_body_bytes
        self.buffer = bytearray()
        self._chunk_left = 0  # bytes of the current chunk still to come, its CRLF included
        self._trailer_bytes: int | None = None

    def feed(self, data: bytes) -> bytes | None:
        """Take more bytes; returns those after the end of the body, or None where it has not come."""
        self.buffer += data
        while True:
            if self._chunk_left:
                if not self._take_data():
                    return None
            else:
                line = self._take_line()
                if line is None:
                    return None
                if self._trailer_bytes is not None:
                    if not line:
                        return bytes(self.buffer)
                    self._check_trailer(line)
                else:
                    self._begin_chunk(line)

    def _take_data(self) -> bool:
        data_left = self._chunk_left - 2
        if data_left > 0:
            piece = self.buffer[:data_left]
            del self.buffer[:data_left]
            self.body += piece
            self._chunk_left -= len(piece)
        if self._chunk_left > 2 or len(self.buffer) < self._chunk_left:
            if self._chunk_left == 2 and self.buffer and self.buffer[0] != 13:
                raise Refusal(400, "A chunk does not end where it says.")
            return False
        if self.buffer[:2] != b"\r\n":
            raise Refusal(400, "A chunk does not end where it says.")
        del self.buffer[:2]
        self._chunk_left = 0
        return True

    def _take_line(self) -> bytes | None:
        end = self.buffer.find(b"\n")
        limit = MAX_CHUNK_LINE_BYTES if self._trailer_bytes is None else MAX_TRAILER_BYTES
        if end > limit or (end < 0 and len(self.buffer) > limit):
            raise Refusal(400, "A line of the chunked body is too long.")
        if end < 0:
            return None
        line = bytes(self.buffer[: end + 1])
        del self.buffer[: end + 1]
        if not line.endswith(b"\r\n"):
            raise Refusal(400, "A line of the chunked body does not end in CRLF.")
        return line[:-2]

    def _begin_chunk(self, line: bytes) -> None:
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise Refusal(400, "A chunk size is not valid.")
        size = int(match[1], 16)
        if size == 0:
            self._trailer_bytes = 0
        elif len(self.body) + size > self._max_body_bytes:
            raise Refusal(413, f"The body may have at most {self._max_body_bytes} bytes.")
        else:
            self._chunk_left = size + 2

    def _check_trailer(self, line: bytes) -> None:
        assert self._trailer_bytes is not None  # noqa: S101 - for the type checker
        self._trailer_bytes += len(line)
        if self._trailer_bytes > MAX_TRAILER_BYTES or not _TRAILER_LINE.fullmatch(line):
            raise Refusal(400, "A trailer field is not valid.")
