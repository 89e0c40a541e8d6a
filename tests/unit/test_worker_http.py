"""From bytes to requests, without a socket: the parser, the bodies, and the connection that holds them together."""

import socket
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference_api.worker.connection import Connection
from inference_api.worker.http import LINES_AT_ONCE, MAX_HEAD_BYTES, ChunkedBody, Refusal, RequestParser, SizedBody
from inference_api.worker.wsgi import Exchange

MAX_BODY_BYTES = 1_000
BASE = {"SCRIPT_NAME": "", "wsgi.url_scheme": "http"}
PARSER = RequestParser(max_line_bytes=200, max_fields=10, max_field_bytes=300, max_body_bytes=MAX_BODY_BYTES)
HOST = b"Host: x\r\n"


def connection(scheme_fields: tuple[tuple[str, str], ...] = ()) -> Connection:
    return Connection(socket.socket.__new__(socket.socket), PARSER, dict(BASE), scheme_fields)


def body_of(exchange: Exchange) -> bytes:
    body: bytes = exchange.environ["wsgi.input"].read()
    return body


def told(exchange: Exchange) -> dict[str, Any]:
    """What the application is told, apart from what differs from request to request anyway."""
    environ = {key: value for key, value in exchange.environ.items() if isinstance(value, str)}
    del environ["inference_api.request_id"]
    return environ | {"body": body_of(exchange), "keep_alive": exchange.keep_alive}


def exchanges(conn: Connection, data: bytes) -> Iterator[Exchange]:
    """The requests that are complete with this, asked for as the loop does."""
    exchange = conn.next_request(data)
    while exchange is not None or conn.has_more:
        if exchange is not None:
            yield exchange
        exchange = conn.next_request(b"")


def requests(data: bytes, pieces: list[int] | None = None) -> list[dict[str, Any]]:
    """All requests in what comes, cut at these places."""
    conn = connection()
    cuts = [0, *sorted(pieces or []), len(data)]
    return [told(exchange) for start, end in pairwise(cuts) for exchange in exchanges(conn, data[start:end])]


def one(data: bytes) -> dict[str, Any]:
    (request,) = requests(data)
    return request


def get(fields: bytes = b"", line: bytes = b"GET / HTTP/1.1") -> dict[str, Any]:
    return one(line + b"\r\n" + HOST + fields + b"\r\n")


# The head.


def test_environ() -> None:
    """A request becomes exactly these variables of the WSGI environ."""
    assert one(
        b"POST /a%20b?c=%20d HTTP/1.1\r\nHost: x:80\r\nContent-Type: t\r\nContent-Length: 2\r\nA-b: \t c \r\n\r\nhi"
    ) == {
        "SCRIPT_NAME": "",
        "wsgi.url_scheme": "http",
        "REQUEST_METHOD": "POST",
        "RAW_URI": "/a%20b?c=%20d",
        "PATH_INFO": "/a b",
        "QUERY_STRING": "c=%20d",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "x:80",
        "CONTENT_TYPE": "t",
        "CONTENT_LENGTH": "2",
        "HTTP_A_B": "c",
        "body": b"hi",
        "keep_alive": True,
    }


@pytest.mark.parametrize(
    ("target", "path", "query", "host"),
    [
        (b"/", "/", "", "x"),
        (b"//a//b", "//a//b", "", "x"),
        (b"/a/../b/.", "/a/../b/.", "", "x"),
        (b"/a%2Fb%2e%00", "/a/b.\x00", "", "x"),
        (b"/%zz%", "/%zz%", "", "x"),
        (b"/%c3%a9", "/\xc3\xa9", "", "x"),
        (b"/a?b?c=/http://d", "/a", "b?c=/http://d", "x"),
        (b"/?", "/", "", "x"),
        (b"http://y:1/a?b", "/a", "b", "y:1"),
        (b"HTTPS://y", "/", "", "y"),
        (b"http://y?a/b", "/", "a/b", "y"),
        (b"http://[::1]:80/", "/", "", "[::1]:80"),
    ],
)
def test_target(target: bytes, path: str, query: str, host: str) -> None:
    """A target in origin-form or absolute-form is resolved as WSGI says; its authority stands above Host."""
    environ = get(line=b"GET %b HTTP/1.1" % target)
    assert (environ["PATH_INFO"], environ["QUERY_STRING"], environ["HTTP_HOST"]) == (path, query, host)


def test_fields_repeated() -> None:
    """Repeated fields are joined into one list, cookies by their own separator."""
    environ = get(b"A: 1\r\nCookie: a=1\r\nA: 2\r\ncookie: b=2\r\n")
    assert (environ["HTTP_A"], environ["HTTP_COOKIE"]) == ("1,2", "a=1; b=2")


def test_underscores_dropped() -> None:
    """A field whose name has an underscore cannot pass for one that a proxy has checked."""
    environ = get(
        b"X_API_Key: forged\r\nX-API-Key: true\r\nContent_Length: 5\r\nTransfer_Encoding: chunked\r\n_: a\r\n_: b\r\n"
    )
    assert environ["HTTP_X_API_KEY"] == "true"
    assert not {"", "CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING", "HTTP__"} & set(environ)


def test_obs_text() -> None:
    """Bytes above ASCII pass in field values, as latin-1 (PEP 3333, RFC 9110 §5.5)."""
    assert get(b"A: \xe9\t\xff\r\n")["HTTP_A"] == "\xe9\t\xff"


def test_empty_lines_before() -> None:
    """Empty lines before a request are ignored (RFC 9112 §2.2), wherever they are cut."""
    data = b"\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n\r\nGET /b HTTP/1.1\r\nHost: x\r\n\r\n\r\n"
    for cut in range(len(data)):
        assert [request["PATH_INFO"] for request in requests(data, [cut])] == ["/", "/b"]


@pytest.mark.parametrize(
    ("line", "fields", "keep_alive"),
    [
        (b"GET / HTTP/1.1", b"", True),
        (b"GET / HTTP/1.1", b"Connection: close\r\n", False),
        (b"GET / HTTP/1.1", b"Connection: a, Close\r\n", False),
        (b"GET / HTTP/1.1", b"Connection: keep-alive\r\nConnection: close\r\n", False),
        (b"GET / HTTP/1.1", b"Connection: closed\r\n", True),
        (b"GET / HTTP/1.2", b"", True),
        (b"GET / HTTP/1.0", b"", False),
        (b"GET / HTTP/1.0", b"Connection: keep-alive\r\n", True),
        (b"GET / HTTP/1.0", b"Connection: keep-alive, close\r\n", False),
    ],
)
def test_keep_alive(line: bytes, fields: bytes, keep_alive: bool) -> None:
    """HTTP/1.1 keeps a connection, HTTP/1.0 does by wish; `close` has the last word (RFC 9112 §9.3)."""
    assert get(fields, line)["keep_alive"] is keep_alive


@pytest.mark.parametrize(
    ("fields", "scheme"),
    [
        (b"", "http"),
        (b"X-Forwarded-Proto: https\r\n", "https"),
        (b"X-Forwarded-Proto: http\r\n", "http"),
        (b"X-Forwarded-Proto: https\r\nX-Forwarded-Ssl: on\r\n", "https"),
        (b"X_Forwarded_Proto: https\r\n", "http"),
    ],
)
def test_forwarded_scheme(fields: bytes, scheme: str) -> None:
    """A trusted proxy says by its fields that its client came by https."""
    trusting = connection((("HTTP_X_FORWARDED_PROTO", "https"), ("HTTP_X_FORWARDED_SSL", "on")))
    exchange = trusting.next_request(b"GET / HTTP/1.1\r\n" + HOST + fields + b"\r\n")
    assert exchange is not None
    assert exchange.environ["wsgi.url_scheme"] == scheme
    assert get(fields)["wsgi.url_scheme"] == "http"  # of anybody else


def test_forwarded_scheme_contradictory() -> None:
    """Scheme fields that contradict each other are refused."""
    trusting = connection((("HTTP_X_FORWARDED_PROTO", "https"), ("HTTP_X_FORWARDED_SSL", "on")))
    with pytest.raises(Refusal) as refused:
        trusting.next_request(b"GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off\r\n\r\n")
    assert refused.value.status == 400


LINES = [  # whole lines, before which "GET / HTTP/1.1" and Host stand
    (400, b"A : b"),
    (400, b" A: b"),
    (400, b"A: b\r\n c"),
    (400, b"A: b\r\n\tc"),
    (400, b"A"),
    (400, b": b"),
    (400, b"A\xe9: b"),
    (400, b"A(: b"),
    (400, b"A: b\0"),
    (400, b"A: \x1b"),
    (400, b"A: \x7f"),
    (400, b"A: b\nB: c"),
    (400, b"A: b\rB: c"),
    (400, b"A: b\r\r\nB: c"),
    (400, b"Host: y"),
    (400, b"host: x"),
    (400, b"Content-Type: a\r\nContent-Type: a"),
    (400, b"Content-Length: 2\r\nContent-Length: 2"),
    (400, b"Content-Length: 2\r\nContent-Length: 3"),
    (400, b"Content-Length: +2"),
    (400, b"Content-Length: -2"),
    (400, b"Content-Length: 2,2"),
    (400, b"Content-Length: 2 2"),
    (400, b"Content-Length: 0x2"),
    (400, b"Content-Length: 2_0"),
    (400, b"Content-Length: \xb2"),
    (400, b"Content-Length:"),
    (400, b"Content-Length: 2\r\nTransfer-Encoding: chunked"),
    (501, b"Transfer-Encoding: gzip, chunked"),
    (501, b"Transfer-Encoding: chunked, gzip"),
    (501, b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
    (501, b"Transfer-Encoding: identity"),
    (501, b"Transfer-Encoding: xchunked"),
    (501, b"Transfer-Encoding: chunked;q=1"),
    (501, b"Transfer-Encoding:"),
    (417, b"Expect: a cheque"),
    (413, b"Content-Length: 1001"),
    (413, b"Content-Length: " + b"9" * 200),
    (431, b"A: " + b"b" * 298),
    (431, b"A: b\r\n" * 9 + b"A: b"),
]
HEADS = [
    (400, b"GET / HTTP/1.1\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nA: b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n"),
    (400, b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (400, b"GET /\r\n\r\n"),
    (400, b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n"),
    (400, b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n"),
    (400, b"GET\t/ HTTP/1.1\r\nHost: x\r\n\r\n"),
    (400, b"GET / HTTP/11\r\nHost: x\r\n\r\n"),
    (400, b"GET / http/1.1\r\nHost: x\r\n\r\n"),
    (400, b"GET / HTTP/1.1x\r\nHost: x\r\n\r\n"),
    (400, b"GET /a#b HTTP/1.1\r\nHost: x\r\n\r\n"),
    (400, b"GET /\xe9 HTTP/1.1\r\nHost: x\r\n\r\n"),
    (400, b"GET a HTTP/1.1\r\nHost: x\r\n\r\n"),
    (400, b"GET http:/// HTTP/1.1\r\nHost: x\r\n\r\n"),
    (400, b"GET http://a@b/ HTTP/1.1\r\nHost: x\r\n\r\n"),
    (400, b"GET ftp://a/ HTTP/1.1\r\nHost: x\r\n\r\n"),
    (400, b"G(T / HTTP/1.1\r\nHost: x\r\n\r\n"),
    (501, b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n"),
    (501, b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"),
    (505, b"GET / HTTP/2.0\r\nHost: x\r\n\r\n"),
    (505, b"GET / HTTP/0.9\r\n\r\n"),
    (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    (414, b"GET /" + b"a" * 200 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    *[(status, b"POST / HTTP/1.1\r\nHost: x\r\n" + line + b"\r\n\r\n") for status, line in LINES],
]


@pytest.mark.parametrize(("status", "data"), HEADS)
def test_refused_heads(status: int, data: bytes) -> None:
    """What is not well-formed, ambiguous, or beyond the bounds is refused, whole or in two pieces."""
    for cut in range(0, len(data), max(1, len(data) // 50)):
        with pytest.raises(Refusal) as refused:
            requests(data, [cut])
        assert refused.value.status == status


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),  # a TLS hello
        (400, b"GET / HTTP/1.1\n"),
        (400, b"GET /\r\n"),
        (400, b"GET / HTTP/1.1\r\nA\x00"),
        (400, b"\nGET"),
        (400, b"\r\n\nGET"),
        (400, b"\rG"),
        (400, b" GET"),
        (505, b"GET / HTTP/3.0\r\n"),
        (414, b"G" * 202),
        (414, b"GET /" + b"a" * 200 + b" HTTP/1.1\r\n"),
        (431, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * (MAX_HEAD_BYTES // 6)),
    ],
)
def test_refused_early(status: int, data: bytes) -> None:
    """What is wrong already is refused before the rest has come, whole or byte by byte."""
    for cuts in (list[int](), list(range(min(300, len(data))))):
        with pytest.raises(Refusal) as refused:
            requests(data, cuts)
        assert refused.value.status == status


def test_within_bounds() -> None:
    """What is exactly at the bounds passes."""
    line = b"GET /" + b"a" * 186 + b" HTTP/1.1"
    assert len(line) == 200
    assert len(get(b"A: " + b"b" * 297 + b"\r\n" + b"C: d\r\n" * 8, line)["HTTP_A"]) == 297
    assert one(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b"a" * 1000)["body"] == b"a" * 1000


def test_no_bounds() -> None:
    """A bound of 0 is Gunicorn's word for none: the head as a whole is still bounded."""
    parser = RequestParser(max_line_bytes=0, max_fields=100, max_field_bytes=0, max_body_bytes=0)
    parser.parse(b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 20_000, {})
    with pytest.raises(Refusal) as refused:
        parser.parse(b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * MAX_HEAD_BYTES, {})
    assert refused.value.status == 431


def test_refused_keeps_what_is_known() -> None:
    """The stand-in for a refused request knows its method, path and id, and ends the connection."""
    conn = connection()
    with pytest.raises(Refusal):
        conn.next_request(b"PUT /a HTTP/1.1\r\nHost: x\r\nX-Request-ID: me\r\nContent-Length: 9999\r\n\r\n")
    exchange = conn.refused(1.0)
    assert (exchange.method, exchange.path, exchange.request_id) == ("PUT", "/a", "me")
    assert not exchange.keep_alive
    assert connection().refused(1.0).method == ""


def test_remembered_head_is_not_shared() -> None:
    """A head that comes again gives an environ of its own."""
    conn = connection()
    data = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n%b\r\n0\r\n\r\n"
    first = conn.next_request(data % b"a")
    assert first is not None
    first.environ.clear()
    second = conn.next_request(data % b"b")
    assert second is not None
    assert told(second) == one(data % b"b")
    with pytest.raises(Refusal):
        conn.next_request(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nX\r\n")
    assert conn.refused(1.0).method == "POST"


@pytest.mark.parametrize(
    ("fields", "body", "wants"),
    [
        (b"Expect: 100-continue\r\nContent-Length: 1\r\n", b"", True),
        (b"Expect: 100-Continue\r\nTransfer-Encoding: chunked\r\n", b"", True),
        (b"Expect: 100-continue\r\nContent-Length: 2\r\n", b"a", False),
        (b"Content-Length: 1\r\n", b"", False),
    ],
)
def test_expect(fields: bytes, body: bytes, wants: bool) -> None:
    """A client that expects 100 is to get it, unless its body comes already (RFC 9110 §10.1.1)."""
    conn = connection()
    assert conn.next_request(b"POST / HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n" + body) is None
    assert conn.wants_continue is wants
    conn = connection()
    assert conn.next_request(b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n") is None
    assert not conn.wants_continue


# Bodies.


def fed(body: ChunkedBody, data: bytes) -> bytes | None:
    rest = body.feed(data)
    while rest is None and body.has_more:
        rest = body.feed(b"")
    return rest


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (b"0\r\n\r\n", b""),
        (b"5\r\nHello\r\n0\r\n\r\n", b"Hello"),
        (b"1\r\na\r\n0000a\r\n0123456789\r\n00\r\n\r\n", b"a0123456789"),
        (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
        (b'2;a=b;c="d"\r\n\r\n\r\n0;e\r\n\r\n', b"\r\n"),
        (b"2 \t;\xe9\r\nab\r\n0\r\n\r\n", b"ab"),
        (b"2\r\nab\r\n0\r\nX-API-Key: forged\r\nHost: y\r\nContent-Length: 5\r\n\r\n", b"ab"),
        (b"1\r\na\r\n" * 1000 + b"0\r\n\r\n", b"a" * 1000),
    ],
)
def test_chunked(data: bytes, body: bytes) -> None:
    """A chunked body is the same however it is cut, and what follows is left alone; extensions and trailers go."""
    for cut in range(0, len(data) + 1, max(1, len(data) // 100)):
        chunked = ChunkedBody(MAX_BODY_BYTES)
        rest = fed(chunked, data[:cut])
        if rest is None:
            assert fed(chunked, data[cut:] + b"GET") == b"GET"
        assert bytes(chunked.content) == body
    request = one(b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n" + data)
    assert (request["body"], request["CONTENT_LENGTH"]) == (body, str(len(body)))
    assert not {"HTTP_TRANSFER_ENCODING", "HTTP_X_API_KEY"} & set(request)
    assert request["HTTP_HOST"] == "x"


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (400, b"g\r\n"),
        (400, b"\r\n"),
        (400, b"\n"),
        (400, b"-1\r\n"),
        (400, b"+1\r\n"),
        (400, b"0x1\r\n"),
        (400, b"1_0\r\n"),
        (400, b" 1\r\n"),
        (400, b"1 1\r\n"),
        (400, b"\xb2\r\n"),
        (400, b"1\na\r\n"),
        (400, b"1\r\naa"),
        (400, b"1\r\na\n"),
        (400, b"1\r\na\r\r"),
        (400, b"5\r\nHello0\r\n\r\n"),
        (400, b"1;a\0\r\n"),
        (400, b"1;a\rb\r\n"),
        (400, b"0" * 17 + b"\r\n"),
        (400, b"1;" + b"a" * 300),
        (400, b"0\r\na\r\n"),
        (400, b"0\r\na b: c\r\n"),
        (400, b"0\r\n a: b\r\n"),
        (400, b"0\r\na: \0\r\n"),
        (400, b"0\r\na: b\n"),
        (400, b"0\r\n" + b"a: b\r\n" * 3000),
        (400, b"0\r\na: " + b"b" * 9000),
        (413, b"3e9\r\n"),
        (413, b"ffffffffffffffff\r\n"),
        (413, b"1\r\na\r\n3e8\r\n"),
    ],
)
def test_chunked_refused(status: int, data: bytes) -> None:
    """A chunked body that is not well-formed, or too long, is refused as soon as that can be seen."""
    for cuts in (list[int](), list(range(min(100, len(data))))):
        with pytest.raises(Refusal) as refused:
            requests(
                b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + data, [cut + 57 for cut in cuts]
            )
        assert refused.value.status == status


def test_a_chunked_body_is_read_in_turns() -> None:
    """However many chunks come at once; what comes meanwhile is read after them, and the next request is its own."""
    conn, count = connection(), 10 * LINES_AT_ONCE
    head = b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = head + b"1\r\na\r\n" * count + b"0\r\n\r\n"
    turns, exchange = 1, conn.next_request(data[:-3])
    while exchange is None:
        assert conn.has_more
        assert conn.is_within_request
        turns, exchange = turns + 1, conn.next_request((data[-3:] + data) if turns == 1 else b"")
    assert body_of(exchange) == b"a" * count
    assert turns > count // LINES_AT_ONCE
    assert not conn.has_more
    assert conn.buffer == data


def test_sized() -> None:
    """A body of known length ends where it says."""
    body = SizedBody(5)
    assert body.feed(b"") is None
    assert body.feed(b"Hell") is None
    assert body.feed(b"o, world") == b", world"
    assert body.content == b"Hello"


def test_bytes_held() -> None:
    """A connection says how much of an incomplete request it holds, and whether it is within one."""
    conn = connection()
    assert (conn.is_within_request, conn.unfinished_bytes) == (False, 0)
    conn.next_request(b"PUT / HTTP/1.1\r\n")
    assert (conn.is_within_request, conn.unfinished_bytes) == (True, 16)
    conn.next_request(b"Host: x\r\nContent-Length: 10\r\n\r\n")
    assert (conn.is_within_request, conn.unfinished_bytes) == (True, 0)
    conn.next_request(b"abc")
    assert (conn.is_within_request, conn.unfinished_bytes) == (True, 3)
    assert conn.next_request(b"defghij") is not None
    assert (conn.is_within_request, conn.unfinished_bytes) == (False, 0)


# Properties.

NAMES = st.sampled_from([b"A", b"X-Request-ID", b"Accept", b"a_b", b"Cookie", b"Connection", b"Upgrade"])
VALUES = st.sampled_from([b"", b"b", b"close", b"keep-alive", b"h2c", b"\xe9", b"a, b", b"\t x \t"])


@st.composite
def valid(draw: st.DrawFn) -> bytes:
    """A request that is well-formed."""
    method = draw(st.sampled_from([b"GET", b"POST", b"HEAD", b"x"]))
    target = draw(st.sampled_from([b"/", b"/a%20b?c=d", b"//", b"http://y/z", b"/?"]))
    fields = draw(st.lists(st.tuples(NAMES, VALUES), max_size=5))
    body = draw(st.binary(max_size=40))
    framing = draw(st.sampled_from(["none", "length", "chunked"]))
    if framing == "none":
        body = b""
    elif framing == "length":
        fields.append((b"Content-Length", b"%d" % len(body)))
    else:
        fields.insert(0, (b"transfer-encoding", b"chunked"))
        size = draw(st.integers(1, 41))
        chunks = [body[at : at + size] for at in range(0, len(body), size)]
        body = b"".join(b"%x;e\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\nHost: z\r\n\r\n"
    lines = [b"%b %b HTTP/1.1" % (method, target), b"Host: x", *(b"%b:%b" % field for field in fields), b"", body]
    return b"\r\n".join(lines)


@settings(deadline=None)
@given(st.lists(valid(), min_size=1, max_size=4), st.lists(st.integers(0, 800), max_size=12), st.booleans())
def test_splits(pipeline: list[bytes], cuts: list[int], byte_by_byte: bool) -> None:
    """Requests are the same however the bytes of their pipeline are cut."""
    data = b"".join(pipeline)
    whole = requests(data)
    assert len(whole) == len(pipeline)
    cuts = list(range(len(data))) if byte_by_byte else [min(cut, len(data)) for cut in cuts]
    assert requests(data, cuts) == whole


FRAGMENTS = st.sampled_from(
    [
        *(
            b"GET / HTTP/1.1\r\n",
            b"POST http://x/ HTTP/1.0\r\n",
            b"Host: x\r\n",
            b"\r\n",
            b"\n",
            b"\r",
            b":",
            b" ",
            b"\0",
        ),
        *(b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"3\r\nabc\r\n"),
        *(b"0\r\n", b"0\r\n\r\n", b"Host: x\r\n\r\n", b"HTTP/1.1", b"\xff", b"abc", b";", b"Connection: close\r\n"),
    ]
)


@settings(deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=30), FRAGMENTS, valid()), max_size=12))
@example([b"\r\n" * 20_000])
def test_any_bytes(pieces: list[bytes]) -> None:
    """Whatever comes, in whatever pieces, gives requests or one Refusal, and never more requests than heads."""

    def read(pieces: list[bytes]) -> tuple[list[dict[str, Any]], int]:
        conn = connection()
        found: list[dict[str, Any]] = []
        try:
            for piece in pieces:
                found.extend(map(told, exchanges(conn, piece)))  # also what comes before a refusal
        except Refusal as refusal:
            assert refusal.status in (400, 413, 414, 417, 431, 501, 505)
            assert not conn.refused(1.0).keep_alive
            return found, refusal.status
        return found, 0

    found, _ = read(pieces)
    assert len(found) <= b"".join(pieces).count(b"\r\n\r\n")
    # Cut otherwise, the same requests come; what is refused may be refused later, or as something else.
    assert read([b"".join(pieces)])[0] == found
