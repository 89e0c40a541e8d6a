"""HTTP as it comes over the socket: framing, limits, persistence and nonsense, each answered once and in order.

Rows 10 to 18 and 23 to 25 of the list of faults that the service is built to survive.
"""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.live.service import (
    HEALTHY,
    Answer,
    Service,
    answers,
    is_problem,
    next_answer,
    read_to_end,
    running,
)

BODY = b'{"text": "Hello"}'
PREDICTION = b'{"input":"Hello","prediction":"predicted(Hello)"}'
HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
POST = HEAD + b"Content-Length: 17\r\n\r\n" + BODY
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
MEBIBYTE = 1_048_576


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests; whatever they send, its log tells of no failure."""
    with running(tmp_path_factory.mktemp("http")) as service:
        yield service
        assert not [line for line in service.log() if line["level"] not in ("INFO", "WARNING") or "exception" in line]
        assert not service.stderr


@contextlib.contextmanager
def logged(service: Service, found: list[Answer]) -> Iterator[None]:
    """What is answered meanwhile has one access line each; the next request is answered as ever."""
    before = f"before-{time.monotonic_ns()}"
    service.request("GET", "/health", headers={"X-Request-ID": before})
    yield
    lines = [line for line in service.settled_log() if line["logger"] == "inference_api.access"]
    ids = [line["request_id"] for line in lines]
    assert [line["status"] for line in lines[ids.index(before) + 1 :]] == [answer.status for answer in found]


def ask(service: Service, data: bytes, *methods: str, half_close: bool = False) -> list[Answer]:
    """All answers to these bytes until the server closes; each has its access line, each refusal is a problem."""
    found: list[Answer] = []
    with logged(service, found):
        found += answers(service.raw(data, half_close=half_close), *methods)
    for answer in found:
        assert answer.status < 400 or "HEAD" in methods or is_problem(answer, answer.status)
    return found


def refused(service: Service, data: bytes, status: int, *methods: str) -> Answer:
    """These bytes get one answer, the server's own, and the end of the connection."""
    (answer,) = ask(service, data, *methods)
    assert (answer.status, answer.headers["connection"]) == (status, "close")
    return answer


# Bodies that are too large (rows 10 and 11).


@pytest.mark.parametrize("length", [MEBIBYTE + 1, 10**12, 10**40])
@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"])
def test_content_too_large(service: Service, length: int, expect: bytes) -> None:
    """A length above the bound is refused before the body comes, and without asking for it."""
    refused(service, HEAD + b"Content-Length: %d\r\n%b\r\n" % (length, expect), 413)


def test_content_as_large_as_allowed(service: Service) -> None:
    """A body exactly at the bound is read, by length and by chunks."""
    body = b'{"text": "%b"}' % (b" " * (MEBIBYTE - 12))
    chunks = b"".join(b"%x\r\n%b\r\n" % (MEBIBYTE // 2, body[at : at + MEBIBYTE // 2]) for at in (0, MEBIBYTE // 2))
    data = HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body) + CHUNKED + chunks + b"0\r\n\r\n" + LAST
    assert [answer.status for answer in ask(service, data)] == [422, 422, 200]  # longer than the model allows


def test_chunked_too_large(service: Service) -> None:
    """A chunked body is refused once the bound is passed."""
    chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    refused(service, CHUNKED + chunk * 17, 413)
    refused(service, CHUNKED + b"100001\r\n", 413)
    refused(service, CHUNKED + b"ffffffffffffffff\r\n", 413)


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 10000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n989680\r\n"]
)
def test_refusal_is_readable_after_sending_all(service: Service, framing: bytes) -> None:
    """A client that first sends its 10 MB and then reads still finds the refusal (RFC 9112 §9.6)."""
    with service.connect() as client:
        client.sendall(HEAD + framing)
        for _ in range(100):
            client.sendall(b" " * 100_000)
        (answer,) = answers(read_to_end(client))
    assert is_problem(answer, 413)


def test_refusal_is_readable_after_sending_slowly(service: Service) -> None:
    """The same holds for a client that takes its time to send all."""
    with service.connect() as client:
        client.sendall(HEAD + b"Content-Length: 10000000\r\n\r\n")
        for _ in range(8):
            time.sleep(0.2)
            client.sendall(b" " * 1_000)
        (answer,) = answers(read_to_end(client))
    assert is_problem(answer, 413)


def test_expect_continue(service: Service) -> None:
    """A client that waits for 100 gets it, then its answer; one that does not wait gets only its answer."""
    with service.connect() as client:
        client.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 17\r\n\r\n")
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(BODY + LAST)
        assert [answer.body for answer in answers(read_to_end(client))] == [PREDICTION, HEALTHY]
    data = HEAD + b"Expect: 100-continue\r\nContent-Length: 17\r\n\r\n" + BODY + LAST
    assert [answer.body for answer in ask(service, data)] == [PREDICTION, HEALTHY]
    assert b" 100 " not in service.raw(data)
    old = b"POST /predict HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 17\r\n\r\n" + BODY
    assert [answer.body for answer in ask(service, old)] == [PREDICTION]
    refused(service, HEAD + b"Expect: the unexpected\r\nContent-Length: 17\r\n\r\n" + BODY, 417)


# Chunked bodies and ambiguous framing (rows 12 to 15).


@pytest.mark.parametrize(
    "chunks",
    [
        b"11\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n",
        b'0011;a=b;c="d e";f\r\n' + BODY + b"\r\n000;g\r\n\r\n",
        b"8 \t; a\r\n" + BODY[:8] + b"\r\n9\r\n" + BODY[8:] + b"\r\n0\r\nA: b\r\nc:d\r\n\r\n",
        # Trailers named like fields are dropped.
        b"11\r\n%b\r\n0\r\nX-Request-ID: forged\r\nHost: y\r\nContent-Length: 5\r\nConnection: close\r\n\r\n" % BODY,
    ],
)
def test_chunked(service: Service, chunks: bytes) -> None:
    """A chunked body is served, whatever its chunks, extensions and trailers."""
    first, second = ask(service, CHUNKED + chunks + LAST)
    assert (first.status, first.body, second.body) == (200, PREDICTION, HEALTHY)
    assert first.headers["x-request-id"] != "forged"
    assert "connection" not in first.headers


@pytest.mark.parametrize(
    "chunks",
    [
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\n",
        b"0x11\r\n" + BODY + b"\r\n0\r\n\r\n",
        b" 11\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"1_1\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"11\n" + BODY + b"\n0\n\n",
        b"11\r\n" + BODY + b"0\r\n\r\n",
        b"11\r\n" + BODY + b"\n0\r\n\r\n",
        b"11\r\n" + BODY + b"xx",
        b"11;a\0\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"\r\n",
        b"00000000000000011\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"11;" + b"a" * 1_000,
        b"11\r\n" + BODY + b"\r\n0\r\nnot a field\r\n\r\n",
        b"11\r\n" + BODY + b"\r\n0\r\na: b\n\n",
        b"11\r\n" + BODY + b"\r\n0\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
    ],
)
def test_bad_chunks(service: Service, chunks: bytes) -> None:
    """Chunks that are not well-formed get one 400, and what follows is not read as a request."""
    refused(service, CHUNKED + chunks + SMUGGLED, 400)


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (400, b"Content-Length: 17\r\nTransfer-Encoding: chunked"),
        (400, b"Transfer-Encoding: chunked\r\nContent-Length: 17"),
        (400, b"Content-Length: 17\r\nContent-Length: 18"),
        (400, b"Content-Length: 17\r\nContent-Length: 17"),
        (400, b"Content-Length: 17, 17"),
        (400, b"Content-Length: +17"),
        (400, b"Content-Length: -17"),
        (400, b"Content-Length: 1_7"),
        (400, b"Content-Length: 0x11"),
        (400, b"Content-Length: seventeen"),
        (400, b"Content-Length:"),
        (400, b"Content-Length : 17"),
        (501, b"Transfer-Encoding: gzip, chunked"),
        (501, b"Transfer-Encoding: chunked, gzip"),
        (501, b"Transfer-Encoding: chunked, chunked"),
        (501, b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
        (501, b"Transfer-Encoding: identity"),
        (501, b"Transfer-Encoding: gzip"),
        (501, b"Transfer-Encoding: xchunked"),
        (501, b'Transfer-Encoding: "chunked"'),
        (501, b"Transfer-Encoding:"),
        (400, b"Transfer-Encoding:\x0bchunked"),
        (400, b"Transfer-Encoding : chunked"),
        (400, b"Transfer-Encoding\r\n : chunked"),
    ],
)
def test_ambiguous_framing(service: Service, status: int, fields: bytes) -> None:
    """Framing that two readers could understand differently gets one refusal and the end (RFC 9112 §6.3, §11.2)."""
    refused(service, HEAD + fields + b"\r\n\r\n11\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED, status)


def test_chunked_in_http10(service: Service) -> None:
    """HTTP/1.0 knows no chunks (RFC 9112 §6.1)."""
    data = b"POST /predict HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n11\r\n" + BODY + b"\r\n0\r\n\r\n"
    refused(service, data + SMUGGLED, 400)


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"TLS/1.0, HTTP/2.0"])
@pytest.mark.parametrize(
    "framing",
    [b"Content-Length: 17\r\n\r\n" + BODY, b"Transfer-Encoding: chunked\r\n\r\n11\r\n" + BODY + b"\r\n0\r\n\r\n"],
)
def test_upgrade(service: Service, protocol: bytes, framing: bytes) -> None:
    """An offer to upgrade is not taken: the request is served as HTTP/1.1, its body with it (row 14b)."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\nHTTP2-Settings: AAMAAABkAAQ\r\n" % protocol
    first, second = ask(service, HEAD + upgrade + framing + LAST)
    assert (first.body, second.body) == (PREDICTION, HEALTHY)


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 18\r\n\r\n" + BODY,
        HEAD + b"Content-Length: 18\r\n\r\n",
        HEAD,
        CHUNKED + b"12\r\n" + BODY,
        CHUNKED + b"11\r\n" + BODY + b"\r\n",
        CHUNKED + b"11\r\n" + BODY + b"\r\n0\r\n",
        b"P",
    ],
)
def test_incomplete(service: Service, data: bytes) -> None:
    """A request whose end never comes is not run: the client that half-closes is told (row 15)."""
    (answer,) = ask(service, data, half_close=True)
    assert is_problem(answer, 400)


def test_nothing(service: Service) -> None:
    """Who sends nothing gets nothing."""
    assert ask(service, b"", half_close=True) == []
    assert ask(service, b"\r\n\r\n", half_close=True) == []


# Heads that are not well-formed, or too long (rows 16 to 18).


@pytest.mark.parametrize(
    ("status", "head"),
    [
        (400, b"GET /health HTTP/1.1\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: x\r\nHost: x\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: x y\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: x/y\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n"),
        (400, b"GET /health HTTP/1.1\r\n Host: x\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: x\r\nA : b\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: x\r\nA\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: x\r\n: b\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: x\r\nA\xe9: b\r\n"),
        (400, b"GET /health HTTP/1.1\nHost: x\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: x\nA: b\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: x\rA: b\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: x\r\nA: b\0\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-ID: a\x1bb\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: x\r\nA: \x7f\r\n"),
        (400, b"GET /health HTTP/1.1 \r\nHost: x\r\n"),
        (400, b"GET  /health HTTP/1.1\r\nHost: x\r\n"),
        (400, b"GET /hea lth HTTP/1.1\r\nHost: x\r\n"),
        (400, b"GET /health\xff HTTP/1.1\r\nHost: x\r\n"),
        (400, b"GET health HTTP/1.1\r\nHost: x\r\n"),
        (400, b"GET /health#top HTTP/1.1\r\nHost: x\r\n"),
        (400, b"GET http://a@b/health HTTP/1.1\r\nHost: x\r\n"),
        (400, b"GET gopher://b/health HTTP/1.1\r\nHost: x\r\n"),
        (400, b"G@T /health HTTP/1.1\r\nHost: x\r\n"),
        (400, b"GET /health HTTPS/1.1\r\nHost: x\r\n"),
        (400, b"GET /health HTTP/1.10\r\nHost: x\r\n"),
        (400, b"GET /health\r\n"),
        (505, b"GET /health HTTP/0.9\r\n"),
        (505, b"GET /health HTTP/2.0\r\nHost: x\r\n"),
        (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n"),
        (501, b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n"),
        (501, b"OPTIONS * HTTP/1.1\r\nHost: x\r\n"),
        (414, b"GET /" + b"a" * 4_094 + b" HTTP/1.1\r\nHost: x\r\n"),
        (414, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n"),
        (431, b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 8_190 + b"\r\n"),
        (431, b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 100),
        (431, b"GET /health HTTP/1.1\r\nHost: x\r\n" + (b"A: " + b"a" * 8_000 + b"\r\n") * 9),
    ],
)
def test_bad_heads(service: Service, status: int, head: bytes) -> None:
    """A head that is not well-formed or too long gets one refusal, and what follows is not read as a request."""
    refused(service, head + b"\r\n" + SMUGGLED, status)


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (400, b"GET /health\r\n"),
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)),
        (414, b"A" * 100_000),
        (431, b"GET /health HTTP/1.1\r\nA: " + b"A" * 100_000),
        (400, b"SSH-2.0-OpenSSH_9.6\r\n"),
        (400, b"\0"),
        (400, b"\n"),
    ],
)
def test_nonsense(service: Service, status: int, data: bytes) -> None:
    """What cannot become a request is refused without waiting for the rest of it."""
    refused(service, data, status)


def test_random_bytes(service: Service) -> None:
    """Random bytes get one 400."""
    numbers = random.Random(1)
    for _ in range(10):
        refused(service, b"\xff" + numbers.randbytes(5_000), 400)


def test_refusal_of_head(service: Service) -> None:
    """The refusal of a HEAD request has no body either."""
    answer = refused(service, b"HEAD /health HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n", 400, "HEAD")
    assert int(answer.headers["content-length"]) > 0


def test_refusal_says_what_is_known(service: Service) -> None:
    """A refusal carries the id of its request, and its access line what was understood of it."""
    data = b"PUT /predict?a=b HTTP/1.1\r\nHost: x\r\nX-Request-ID: who-asks\r\nContent-Length: 9999999\r\n\r\n"
    answer = refused(service, data, 413)
    assert answer.headers["x-request-id"] == answer.json["request_id"] == "who-asks"
    (line,) = [line for line in service.access_lines() if line.get("request_id") == "who-asks"]
    assert (line["method"], line["path"], line["status"]) == ("PUT", "/predict", 413)


# Pipelines and persistence (rows 23 and 24).


def test_pipeline(service: Service) -> None:
    """Pipelined requests are answered in order, one each, also behind the application's errors."""
    bad = HEAD + b"Content-Length: 1\r\n\r\n{"
    missing = b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"
    wrong = HEAD + b"Content-Type: text/plain\r\nContent-Length: 17\r\n\r\n" + BODY
    head = GET.replace(b"GET", b"HEAD")
    data = POST + bad + GET + missing + head + wrong + CHUNKED + b"11\r\n" + BODY + b"\r\n0\r\n\r\n" + POST + LAST
    found = ask(service, data, "", "", "", "", "HEAD")
    assert [answer.status for answer in found] == [200, 400, 200, 404, 200, 415, 200, 200, 200]
    assert [found[at].body for at in (0, 2, 4, 6, 7, 8)] == [PREDICTION, HEALTHY, b"", PREDICTION, PREDICTION, HEALTHY]


def test_long_pipeline(service: Service) -> None:
    """A pipeline longer than any buffer is answered whole, while its client is still sending."""
    count = 1_000
    with service.connect() as client:
        sender = threading.Thread(target=client.sendall, args=((POST + GET) * count + LAST,))
        sender.start()
        found = answers(read_to_end(client))
        sender.join()
    assert [answer.body for answer in found] == [PREDICTION, HEALTHY] * count + [HEALTHY]


def test_pipeline_then_half_close(service: Service) -> None:
    """Who has sent all and closes that half still gets every answer."""
    assert [answer.body for answer in ask(service, GET * 3, half_close=True)] == [HEALTHY] * 3
    for _ in range(50):  # the end may come at any time
        assert [answer.body for answer in answers(service.raw(POST * 3, half_close=True))] == [PREDICTION] * 3


def test_nothing_behind_refusal_or_close(service: Service) -> None:
    """Behind a refusal, and behind `Connection: close`, nothing is read."""
    assert [answer.status for answer in ask(service, GET + b"nonsense\r\n\r\n" + SMUGGLED)] == [200, 400]
    assert [answer.status for answer in ask(service, LAST + SMUGGLED)] == [200]


def test_splits(service: Service) -> None:
    """A pipeline gets the same answers wherever it is cut."""
    data = POST + CHUNKED + b"11\r\n" + BODY + b"\r\n0\r\n\r\n" + LAST
    for cut in range(1, len(data)):
        with service.connect() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sendall(data[:cut])
            client.sendall(data[cut:])
            assert [answer.body for answer in answers(read_to_end(client))] == [PREDICTION, PREDICTION, HEALTHY]


@pytest.mark.parametrize(
    ("version", "fields", "connection"),
    [
        (b"1.0", b"", "close"),
        (b"1.0", b"Connection: close\r\n", "close"),
        (b"1.0", b"Connection: keep-alive\r\n", "keep-alive"),
        (b"1.0", b"Connection: Keep-Alive, a\r\n", "keep-alive"),
        (b"1.0", b"Connection: keep-alive\r\nConnection: close\r\n", "close"),
        (b"1.1", b"", None),
        (b"1.1", b"Connection: keep-alive\r\n", None),
        (b"1.1", b"Connection: a,CLOSE\r\n", "close"),
        (b"1.9", b"", None),
    ],
)
def test_persistence(service: Service, version: bytes, fields: bytes, connection: str | None) -> None:
    """A connection is kept or closed as RFC 9112 §9.3 says, and the answer says which where it is not the default."""
    data = b"POST /predict HTTP/%b\r\nHost: x\r\nContent-Length: 17\r\n%b\r\n%b" % (version, fields, BODY)
    first, *more = ask(service, data + LAST)
    assert (first.body, first.headers.get("connection")) == (PREDICTION, connection)
    assert [answer.body for answer in more] == ([] if connection == "close" else [HEALTHY])


def test_http10_without_host(service: Service) -> None:
    """HTTP/1.0 asks for no Host."""
    (answer,) = ask(service, b"GET /health HTTP/1.0\r\n\r\n")
    assert (answer.status, answer.body, answer.version) == (200, HEALTHY, "HTTP/1.1")


def test_fields_of_answers(service: Service) -> None:
    """Every answer has a Date of now and one Server, the server's own answers included (RFC 9110 §6.6.1)."""
    for answer in ask(service, GET + POST + b"nonsense\r\n\r\n"):
        sent = time.strptime(answer.headers["date"], "%a, %d %b %Y %H:%M:%S GMT")
        assert abs(time.mktime(sent) - time.mktime(time.gmtime())) < 60
        assert answer.headers["server"] == "inference-api"


# Targets (row 25).


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://x/health", 200),
        (b"HTTP://other:80/health?a=b", 200),
        (b"https://x/health", 200),
        (b"http://x", 404),
        (b"/health?a=%zz&b", 200),
        (b"/health?", 200),
        (b"/%68ealth", 200),
        (b"/health%2Flive", 200),
        (b"/health%3Fa", 404),
        (b"//health", 200),
        (b"/health//live", 404),
        (b"/./health", 404),
        (b"/a/../health", 404),
        (b"/docs/../health", 404),
        (b"/docs/%2e%2e/%2e%2e/etc/passwd", 404),
        (b"/%00", 404),
        (b"/%ff%fe", 404),
        (b"/%0d%0aA:%20b", 404),
        (b"/%", 404),
        (b"/" + b"a/" * 1_000, 404),
    ],
)
def test_targets(service: Service, target: bytes, status: int) -> None:
    """Every form of target is resolved as WSGI says: unescaped once, not normalised, and no failure."""
    assert [answer.status for answer in ask(service, b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target + LAST)] == [
        status,
        200,
    ]


# Whatever comes.

FRAGMENTS = st.sampled_from(
    [
        *(
            GET,
            POST,
            LAST,
            HEAD,
            CHUNKED,
            BODY,
            b"11\r\n" + BODY + b"\r\n",
            b"0\r\n\r\n",
            b"0\r\n",
            b"\r\n\r\n",
            b"\r\n",
        ),
        *(b"\n", b"\r", b"\0", b"GET", b" / HTTP/1.1", b"GET / HTTP/1.0\r\n", b"Host: x\r\n", b"Content-Length: 5\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"A: b\r\n", b"A:"),
    ]
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(st.one_of(FRAGMENTS, st.binary(max_size=20)), min_size=1, max_size=10), st.lists(st.integers(0, 900)))
def test_any_bytes(service: Service, fragments: list[bytes], cuts: list[int]) -> None:
    """Whatever bytes come in whatever pieces: whole answers, never more than requests, never a hang nor a failure."""
    data = b"".join(fragments)
    places = [0, *sorted({min(cut, len(data)) for cut in cuts}), len(data)]
    with service.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for start, end in pairwise(places):
                client.sendall(data[start:end])
            client.shutdown(socket.SHUT_WR)
        rest = read_to_end(client)
    found: list[Answer] = []
    while rest:
        answer, rest = next_answer(rest)
        found += [answer] if answer.status != 100 else []
    # Each request but the last has an empty line; the last may be refused before it has one.
    assert len(found) <= data.count(b"\r\n\r\n") + 1
    assert all(answer.status < 500 or answer.status in (501, 505) for answer in found)
    assert all(answer.status not in (413, 414, 417, 431, 501, 505) for answer in found[:-1])
