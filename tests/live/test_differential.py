"""The service's worker against Gunicorn's own `sync` worker: the same requests get the same answers.

Where this worker is deliberately stricter, or says more, DIFFERENCES names the section of the RFC that it follows.
"""

import contextlib
import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.live.service import Answer, Service, answers, is_problem, read_to_end, running

LAST = b"GET /health/live HTTP/1.1\r\nHost: last\r\nConnection: close\r\n\r\n"
ALIVE = b'{"status":"alive"}'
HELLO = b'{"text": "Hello"}'
SUBSTANCE = (
    *("allow", "cache-control", "content-length", "content-type", "retry-after", "www-authenticate", "x-model"),
    *("x-request-id", "content-security-policy", "x-content-type-options", "transfer-encoding"),
)


def head(line: bytes, *fields: bytes) -> bytes:
    return b"\r\n".join((line, *fields)) + b"\r\n\r\n"


def post(body: bytes, *fields: bytes, path: bytes = b"/predict", version: bytes = b"1.1") -> bytes:
    length = b"Content-Length: %d" % len(body)
    return head(b"POST %b HTTP/%b" % (path, version), b"Host: x", b"X-Request-ID: me", length, *fields) + body


def chunked(chunks: bytes, *fields: bytes) -> bytes:
    return head(b"POST /predict HTTP/1.1", b"Host: x", b"Transfer-Encoding: chunked", *fields) + chunks


METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE", b"PURGE", b"M-SEARCH")
TARGETS = (
    *(b"/health", b"/health/live", b"/predict", b"/square_numbers", b"/openapi.json", b"/docs", b"/nowhere", b"/"),
    *(b"/metricsfoo", b"/health/", b"/docs/../health"),
)
MORE_TARGETS = (
    *(b"/health?", b"/health?a=b&c=%20", b"/health?a?b", b"/%68ealth", b"/health%2Flive", b"/health%3F", b"//health"),
    *(b"/health//live", b"/./health", b"/a/../health", b"/%00", b"/%ff", b"/%zz", b"/%", b"/health;a=b", b"/h\\ealth"),
    *(b"/docs/%2e%2e/x", b"/docs/start.js", b"http://x/health", b"http://y:80/health?a", b"http://x", b"http://x?a=b"),
    *(
        b"HTTP://x/health",
        b"https://[::1]/health",
        b"/" + b"a" * 3_000,
        b"/health/live/",
        b"/a:b",
        b"/:",
        b"/http://x/",
    ),
)
BODIES = (
    *(
        HELLO,
        b"",
        b" ",
        b"{",
        b"[]",
        b"[1]",
        b"null",
        b"[%b, %b]" % (HELLO, HELLO),
        b'{"text": 1}',
        b'{"text": "a", "b": 1}',
    ),
    *(b'{"text": "\xff"}', b'\xef\xbb\xbf{"text": ""}', b'{"text": "\\ud800"}', b'{"text": NaN}', b"[" * 10_000),
    *('{"text": "é\u2028🙂"}'.encode(), b'{"text": "' + b"a" * 5_000 + b'"}', b'{"text": "a"}' + b"\n" * 70_000),
    *(b'{"numbers": [1, 2.5, -3]}', b'{"numbers": [1e200]}', HELLO + HELLO, b'{"text": "' + b"a" * 1_048_600 + b'"}'),
)
FIELDS: tuple[tuple[bytes, ...], ...] = (
    (b"Content-Type: application/json",),
    (b"Content-Type: application/json; charset=utf-8",),
    (b"Content-Type: text/plain",),
    (b"content-TYPE:application/json",),
    (b"Content-Type:",),
    (b"A: b", b"A: c", b"A:"),
    (b"X-API-Key: a", b"X_API_Key: b", b"X-API-KEY: c"),
    (b"X-Request-Id: 8",),
    (b"Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",),
    (b"Cookie: a=b", b"Cookie: c=d"),
    (b"A: \xe9\t\xff",),
    (b"Accept: */*", b"Accept-Encoding: gzip", b"User-Agent: a (b)"),
    (b"Content_Length: 3", b"Transfer_Encoding: chunked"),
    (b"Expect: 100-continue",),
    (b"X-Forwarded-Proto: https",),
    (b"A: " + b"a" * 8_000,),
    tuple(b"A%d: b" % at for at in range(96)),
)
CONNECTIONS = (b"close", b"keep-alive", b"Close", b"a, close", b"upgrade", b"close, keep-alive", b"")
CHUNKS = (
    *(b"11\r\n%b\r\n0\r\n\r\n" % HELLO, b"0\r\n\r\n", b"1\r\n{\r\n10\r\n%b\r\n0\r\n\r\n" % HELLO[1:]),
    *(b"".join(b"1\r\n%c\r\n" % byte for byte in HELLO) + b"0\r\n\r\n", b"011;a=b\r\n%b\r\n0;c\r\n\r\n" % HELLO),
    *(b"11\r\n%b\r\n000\r\nA: b\r\nX-Request-ID: c\r\n\r\n" % HELLO, b"1\r\n{\r\n0\r\n\r\n"),
)
BAD_CHUNKS = (
    *(b"x\r\n", b"-1\r\n", b"+11\r\n%b\r\n0\r\n\r\n" % HELLO, b"0x11\r\n%b\r\n0\r\n\r\n" % HELLO, b"\r\n"),
    *(b"1_1\r\n%b\r\n0\r\n\r\n" % HELLO, b"11\n%b\n0\n\n" % HELLO, b"11\r\n%b0\r\n\r\n" % HELLO),
)
FRAMINGS: tuple[tuple[bytes, ...], ...] = (
    (b"Content-Length: 17", b"Transfer-Encoding: chunked"),
    (b"Content-Length: 17", b"Content-Length: 17"),
    (b"Content-Length: 17", b"Content-Length: 18"),
    (b"Content-Length: 17,17",),
    (b"Content-Length: +17",),
    (b"Content-Length: -17",),
    (b"Content-Length: 1_7",),
    (b"Content-Length: 0x11",),
    (b"Content-Length:",),
    (b"Content-Length: \xb2",),
    (b"Content-Length: 017",),
    (b"Content-Length : 17",),
    (b"Transfer-Encoding: identity",),
    (b"Transfer-Encoding: gzip",),
    (b"Transfer-Encoding: gzip, chunked",),
    (b"Transfer-Encoding: chunked, gzip",),
    (b"Transfer-Encoding: chunked, chunked",),
    (b"Transfer-Encoding: xchunked",),
    (b"Transfer-Encoding: CHUNKED",),
    (b"Transfer-Encoding: chunked, identity",),
    (b"Transfer-Encoding:\x0bchunked",),
    (b"Upgrade: h2c", b"Connection: Upgrade", b"Content-Length: 17"),
)
GET = b"GET /health HTTP/1.1"
HEADS = {
    "no host": head(GET),
    "no host in 1.0": head(b"GET /health HTTP/1.0"),
    "two hosts": head(GET, b"Host: x", b"Host: x"),
    "bad host": head(GET, b"Host: x y"),
    "host with path": head(GET, b"Host: x/y"),
    "empty host": head(GET, b"Host:"),
    "host of IPv6": head(GET, b"Host: [::1]:80"),
    "two types": head(GET, b"Host: x", b"Content-Type: a", b"Content-Type: a"),
    "folded": head(GET, b"Host: x", b"A: b", b" c"),
    "space before the colon": head(GET, b"Host: x", b"A : b"),
    "no colon": head(GET, b"Host: x", b"A"),
    "no name": head(GET, b"Host: x", b": b"),
    "name not a token": head(GET, b"Host: x", b"A@: b"),
    "NUL": head(GET, b"Host: x", b"A: b\0"),
    "ESC": head(GET, b"Host: x", b"A: \x1b"),
    "bare LF in a field": head(GET, b"Host: x", b"A: b\nB: c"),
    "bare CR in a field": head(GET, b"Host: x", b"A: b\rB: c"),
    "fragment": head(b"GET /health#a HTTP/1.1", b"Host: x"),
    "target not ASCII": head(b"GET /\xe9 HTTP/1.1", b"Host: x"),
    "target with a quote": head(b'GET /"<>^`{|} HTTP/1.1', b"Host: x"),
    "target without a slash": head(b"GET health HTTP/1.1", b"Host: x"),
    "target with userinfo": head(b"GET http://a@b/health HTTP/1.1", b"Host: x"),
    "target of another scheme": head(b"GET ftp://b/health HTTP/1.1", b"Host: x"),
    "asterisk": head(b"OPTIONS * HTTP/1.1", b"Host: x"),
    "CONNECT": head(b"CONNECT x:443 HTTP/1.1", b"Host: x:443"),
    "lower-case method": head(b"get /health HTTP/1.1", b"Host: x"),
    "method of two letters": head(b"GO /health HTTP/1.1", b"Host: x"),
    "method with a hash": head(b"G#T /health HTTP/1.1", b"Host: x"),
    "method not a token": head(b"G@T /health HTTP/1.1", b"Host: x"),
    "two spaces": head(b"GET  /health HTTP/1.1", b"Host: x"),
    "space at the end": head(b"GET /health HTTP/1.1 ", b"Host: x"),
    "HTTP/0.9": head(b"GET /health"),
    "HTTP/0.9 by name": head(b"GET /health HTTP/0.9"),
    "HTTP/1.2": head(b"GET /health HTTP/1.2", b"Host: x"),
    "HTTP/2": head(b"GET /health HTTP/2.0", b"Host: x"),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "lower-case protocol": head(b"GET /health http/1.1", b"Host: x"),
    "one empty line before": b"\r\n" + head(GET, b"Host: x"),
    "two empty lines before": b"\r\n\r\n" + head(GET, b"Host: x"),
    "unknown expectation": head(GET, b"Host: x", b"Expect: a"),
    "line too long": head(b"GET /" + b"a" * 5_000 + b" HTTP/1.1", b"Host: x"),
    "field too long": head(GET, b"Host: x", b"A: " + b"a" * 8_200),
    "too many fields": head(GET, b"Host: x", *[b"A: b"] * 100),
    "schemes contradict": head(GET, b"Host: x", b"X-Forwarded-Proto: https", b"X-Forwarded-Ssl: off"),
    "chunked in 1.0": head(b"POST /predict HTTP/1.0", b"Transfer-Encoding: chunked") + CHUNKS[0],
}


def table() -> dict[str, bytes]:
    """All requests by name, each whole."""
    found = dict(HEADS)
    for method in METHODS:
        for target in TARGETS:
            found[f"{method.decode()} {target.decode()}"] = head(b"%b %b HTTP/1.1" % (method, target), b"Host: x")
    for at, target in enumerate(MORE_TARGETS):
        found[f"target {at} {target[:20]!r}"] = head(b"GET %b HTTP/1.1" % target, b"Host: x")
    for at, body in enumerate(BODIES):
        found[f"body {at} {body[:20]!r}"] = post(body)
        found[f"squares of body {at} {body[:20]!r}"] = post(body, path=b"/square_numbers")
        found[f"chunked body {at} {body[:20]!r}"] = chunked(
            (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
        )
    for at, fields in enumerate(FIELDS):
        found[f"fields {at} {fields[0][:20]!r}"] = post(HELLO, *fields)
    for value in CONNECTIONS:
        for version in (b"1.0", b"1.1"):
            name = f"connection {value.decode()!r} in {version.decode()}"
            found[name] = post(HELLO, b"Connection: " + value, version=version)
    found["no connection in 1.0"] = post(HELLO, version=b"1.0")
    for at, chunks in enumerate(CHUNKS):
        found[f"chunks {at}"] = chunked(chunks, b"X-Request-ID: me")
    for at, chunks in enumerate(BAD_CHUNKS):
        found[f"bad chunks {at} {chunks[:8]!r}"] = chunked(chunks)
    for fields in FRAMINGS:
        body = CHUNKS[0] if b"chunked" in fields[0].lower() else HELLO
        name = f"framing {b', '.join(fields).decode('latin-1')!r}"
        found[name] = head(b"POST /predict HTTP/1.1", b"Host: x", *fields) + body
    return found


CASES = table()
BAD = [name for name in CASES if name.startswith("bad chunks")]

# Where this worker deliberately answers otherwise: why, its status, and that of the sync worker (0: no answer).
BAD_CHUNK = (
    "RFC 9112 §7.1: chunks that are not well-formed are the client's fault, and found before the application runs"
)
HOST = "RFC 9112 §3.2: a request without a valid Host is refused"
TARGET = "RFC 9112 §3.2, RFC 9110 §4.2.4: no fragment, no userinfo, no other scheme stands in a target"
CODING = "RFC 9112 §6.1: a transfer coding that is not understood is 501"
VERSION = "RFC 9110 §15.6.6: a major version that is not spoken is 505"
DIFFERENCES = {
    "no host": (HOST, 400, 200),
    "bad host": (HOST, 400, 200),
    "host with path": (HOST, 400, 200),
    "fragment": (TARGET, 400, 200),
    "target with userinfo": (TARGET, 400, 200),
    "target of another scheme": (TARGET, 400, 200),
    "asterisk": ("RFC 9110 §9.3.7: the server as a whole has no options, and `*` is no path", 501, 404),
    "CONNECT": ("RFC 9110 §9.3.6: this is not a proxy", 501, 404),
    "HTTP/0.9 by name": (VERSION, 505, 400),
    "HTTP/2": (VERSION, 505, 400),
    "HTTP/2 preface": (VERSION, 505, 400),
    "two empty lines before": ("RFC 9112 §2.2: at least one empty line is ignored", 200, 400),
    **dict.fromkeys(BAD, (BAD_CHUNK, 400, 500)),
    "framing 'Transfer-Encoding: gzip, chunked'": (CODING, 501, 200),
    **{
        f"framing 'Transfer-Encoding: {codings}'": (CODING, 501, 400)
        for codings in ("identity", "gzip", "chunked, gzip", "chunked, chunked", "chunked, identity")
    },
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service on its own worker."""
    with running(tmp_path_factory.mktemp("own")) as service:
        yield service
        assert not service.stderr


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The same on Gunicorn's sync worker, which Gunicorn replaces by another where there are threads."""
    worker = "gunicorn.workers.sync.SyncWorker"
    with running(tmp_path_factory.mktemp("sync"), WORKER_CLASS=worker, THREADS="1") as service:
        assert f"Using worker: {worker}" in service.stdout
        yield service


def method_of(data: bytes) -> str:
    return data.lstrip().split(b" ")[0].decode()


def substance(answer: Answer, other: Answer) -> dict[str, Any]:
    """What must be the same: where the server below the application refuses, the status alone."""
    types = {each.headers.get("content-type", "") for each in (answer, other)}
    if (answer.status >= 400 and "text/html" in types) or answer.status == 413:
        return {"status": answer.status}
    found: dict[str, Any] = {name: answer.headers[name] for name in SUBSTANCE if name in answer.headers}
    if found.get("x-request-id") != "me":  # made up by the server
        found.pop("x-request-id", None)
    body: Any = answer.body
    if found.get("content-type") == "application/problem+json" and body:
        body = json.loads(body)
        if body["request_id"] != "me":
            del body["request_id"]
    return {"status": answer.status, "body": body, **found}


def persists(data: bytes) -> bool:
    """Whether RFC 9112 §9.3 keeps the connection after this request; the sync worker never does."""
    lines = data.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    options = b",".join(line.partition(b":")[2] for line in lines if line.startswith(b"connection:"))
    tokens = {token.strip() for token in options.split(b",")}
    return b"close" not in tokens and (not lines[0].endswith(b"http/1.0") or b"keep-alive" in tokens)


def ask(service: Service, data: bytes, *methods: str, cut: int = 0) -> list[Answer]:
    """The answers to these bytes, cut in two, and whatever the server says before it closes."""
    with service.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, OSError):
            client.sendall(data[:cut])
            client.sendall(data[cut:])
            client.shutdown(socket.SHUT_WR)
        return answers(read_to_end(client), *methods)


@pytest.mark.parametrize("name", CASES)
def test_same_answer(service: Service, reference: Service, name: str) -> None:
    """Status, body, fields of substance and the end of the connection are the same, or differ as listed."""
    data = CASES[name]
    cut = random.Random(name).randrange(len(data))
    own, *after = ask(service, data + LAST, method_of(data), cut=cut)
    theirs = ask(reference, data, method_of(data), cut=cut)
    reason, own_status, their_status = DIFFERENCES.get(name, ("", 0, 0))
    if reason:
        assert (own.status, theirs[0].status if theirs else 0) == (own_status, their_status), reason
    else:
        (their,) = theirs
        assert substance(own, their) == substance(their, own)
    is_refused = own.status >= 400 and own.headers.get("connection") == "close" and "x-model" not in own.headers
    assert own.status < 400 or method_of(data) == "HEAD" or is_problem(own, own.status)
    if persists(data) and not (is_refused and after == []):
        assert [answer.body for answer in after] == [ALIVE]
    else:
        assert (own.headers["connection"], after) == ("close", [])


CUT_EVERYWHERE = {
    "a body of known length": post(HELLO),
    "chunks, an extension and a trailer": chunked(b'5;a=b\r\n{"tex\r\nc\r\nt": "Hello"}\r\n0\r\nX-A: b\r\n\r\n'),
    "no body, and the target of a proxy": head(b"HEAD http://x/health?a=b HTTP/1.1", b"Host: x"),
    "what the model refuses": post(b'{"text": ""}', b"Connection: keep-alive", version=b"1.0"),
}


@pytest.mark.parametrize("name", CUT_EVERYWHERE)
def test_same_answer_wherever_it_is_cut(service: Service, reference: Service, name: str) -> None:
    """Split at every byte boundary, a request gets the same answer."""
    data = CUT_EVERYWHERE[name]
    for cut in range(1, len(data)):
        (own,), (their,) = (ask(each, data, method_of(data), cut=cut) for each in (service, reference))
        assert substance(own, their) == substance(their, own)


def test_same_answers_in_pipelines(service: Service) -> None:
    """Pipelined in any order and cut anywhere, requests get the answers that they get alone."""
    numbers = random.Random(1)
    alone = {name: ask(service, data, method_of(data))[0] for name, data in CASES.items() if len(data) < 10_000}
    names = [name for name in alone if persists(CASES[name]) and alone[name].headers.get("connection") != "close"]
    assert len(names) > 200
    numbers.shuffle(names)
    for at in range(0, len(names), 8):
        pipeline = names[at : at + 8]
        methods = [method_of(CASES[name]) for name in pipeline]
        data = b"".join(CASES[name] for name in pipeline)
        found = ask(service, data + LAST, *methods, cut=numbers.randrange(len(data)))
        assert found.pop().body == ALIVE
        for name, answer in zip(pipeline, found, strict=True):
            assert substance(answer, alone[name]) == substance(alone[name], answer)
