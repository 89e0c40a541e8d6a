"""PEP 3333 through the service's worker, by small WSGI applications of the tests' own."""

import json
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.service import (
    PROJECT,
    WAIT_SECONDS,
    Answer,
    Service,
    answers,
    is_problem,
    next_answer,
    read_to_end,
    running,
    wait_for,
)

GUNICORN = ("-m", "gunicorn", "-c", str(PROJECT / "gunicorn.conf.py"), "apps:app")
LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
MEBIBYTE = 1_048_576
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

APPS = '''
import json
import sys
from contextlib import suppress
from urllib.parse import unquote
from wsgiref.validate import validator

EVENTS = []
TEXT = [("Content-Type", "text/plain")]


class Body:
    """An iterable that tells when it is closed, and may fail."""

    def __init__(self, pieces, name, fails_in_close=False):
        self.pieces, self.name, self.fails_in_close = iter(pieces), name, fails_in_close

    def __iter__(self):
        return self

    def __next__(self):
        piece = next(self.pieces)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def close(self):
        EVENTS.append("closed " + self.name)
        if self.fails_in_close:
            raise RuntimeError("secret of close()")


def health(environ, start_response):
    start_response("200 OK", TEXT)
    return [b"ok"]


def events(environ, start_response):
    start_response("200 OK", TEXT)
    return [json.dumps(EVENTS).encode()]


def environ(environ, start_response):
    start_response("200 OK", TEXT)
    shown = {key: value for key, value in environ.items() if isinstance(value, (str, bool, tuple))}
    return [json.dumps(shown).encode()]


def echo(environ, start_response):
    file, how = environ["wsgi.input"], environ["QUERY_STRING"]
    if how == "read":
        found = [file.read()]
    elif how == "sizes":
        found = list(iter(lambda: file.read(3), b""))
    elif how == "readline":
        found = list(iter(file.readline, b""))
    elif how == "readline-size":
        found = list(iter(lambda: file.readline(4), b""))
    elif how == "readlines":
        found = file.readlines()
    elif how == "readlines-hint":
        found = file.readlines(1) + file.readlines(1)
    elif how == "iterate":
        found = list(file)
    elif how == "beyond":
        found = [file.read(10_000), file.read(), file.read(5), file.readline(), b"".join(file)]
    else:
        found = []
    start_response("200 OK", TEXT)
    return [json.dumps([piece.decode() for piece in found] + [environ.get("CONTENT_LENGTH")]).encode()]


def answer(environ, start_response):
    """As the query says: {"status", "headers", "pieces", "as", "exc_info", ...}."""
    wish = json.loads(unquote(environ["QUERY_STRING"]))
    pieces = [
        piece.encode() if isinstance(piece, str) else RuntimeError("secret") if piece is None else str(piece)
        for piece in wish.get("pieces", [])
    ]
    name = wish.get("name", "")
    headers = [tuple(field) for field in wish.get("headers", TEXT)]
    status = wish.get("status", "200 OK")
    how = wish.get("as", "list")
    if how == "none":
        return pieces
    if how == "late":
        def generator():
            start_response(status, headers)
            yield from pieces
        return generator()
    write = start_response(status, headers)
    if how == "write":
        for piece in pieces:
            write(piece)
        return []
    if how == "write-and-list":
        write(pieces[0])
        return pieces[1:]
    if how == "tuple":
        return tuple(pieces)
    if how == "generator":
        return (piece for piece in pieces)
    if how == "body":
        return Body(pieces, name)
    if how == "body-fails-in-close":
        return Body(pieces, name, fails_in_close=True)
    if how == "twice":
        start_response("201 Created", headers)
    if how == "exc_info":
        try:
            raise ValueError("secret of the first try")
        except ValueError:
            start_response("418 I am a teapot", [("Content-Type", "text/plain")], sys.exc_info())
    if how == "exc_info-too-late":
        write(pieces[0])
        try:
            raise ValueError("secret of the second try")
        except ValueError:
            start_response("500 Sorry", [("Content-Type", "text/plain")], sys.exc_info())
    if how == "goes-on-after-a-refusal":
        try:
            raise ValueError("secret of the third try")
        except ValueError:
            with suppress(ValueError):
                start_response("200 OK", [("A", "b\\r\\nSet-Cookie: c")], sys.exc_info())
    if how == "exits":
        raise SystemExit(1)
    return pieces


def endless(environ, start_response):
    def pieces():
        while True:
            yield b"x" * 65_536
    start_response("200 OK", TEXT)
    return Body(pieces(), environ["QUERY_STRING"])


def write_endlessly(environ, start_response):
    write = start_response("200 OK", TEXT)
    try:
        while True:
            write(b"x" * 65_536)
    finally:
        EVENTS.append("left " + environ["QUERY_STRING"])


def big(environ, start_response):
    start_response("200 OK", TEXT)
    return (b"x" * 65_536 for _ in range(2_048))


def until_told(environ, start_response):
    def pieces():
        while "told" not in EVENTS:
            yield b"x" * 100
    start_response("200 OK", TEXT)
    return pieces()


def tell(environ, start_response):
    EVENTS.append("told")
    start_response("200 OK", TEXT)
    return [b"ok"]


def meddle(environ, start_response):
    environ.update(dict.fromkeys(environ, b"no text"))
    start_response("200 OK", TEXT)
    return [b"ok"]


def simple(environ, start_response):
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    write = start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body) + 1))])
    write(b"<")
    return [body]


def streaming(environ, start_response):
    start_response("200 OK", TEXT)
    yield b"a"
    yield b"b"


APPS = (health, events, environ, echo, answer, endless, write_endlessly, big, until_told, tell, meddle)
routes = {f"/{app.__name__}": app for app in APPS}
routes["/validated"] = validator(simple)
routes["/validated_stream"] = validator(streaming)


def app(environ, start_response):
    return routes[environ["PATH_INFO"]](environ, start_response)
'''


def start(folder: Path, **variables: str) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "apps.py").write_text(APPS)
    return running(folder, command=GUNICORN, **variables)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Gunicorn with the service's configuration and these applications; nothing ever goes to stderr."""
    with start(tmp_path_factory.mktemp("wsgi"), REQUEST_TIMEOUT="25", API_KEYS="") as service:
        yield service
        assert not service.stderr
        assert "secret" in service.stdout  # of the exceptions, which only the log tells


def path_of(**wish: Any) -> str:
    return "/answer?" + urllib.parse.quote(json.dumps(wish))


def request(service: Service, path: str, version: str = "1.1", method: str = "GET") -> Answer:
    """The answer to one request, and nothing else before the server closes."""
    data = f"{method} {path} HTTP/{version}\r\nHost: x\r\nConnection: close\r\n\r\n"
    (answer,) = answers(service.raw(data.encode()), method)
    return answer


def events(service: Service) -> list[str]:
    names: list[str] = service.get("/events").json
    return names


def wait_for_event(service: Service, name: str) -> None:
    wait_for(lambda: name in events(service), WAIT_SECONDS, lambda: events(service))
    assert events(service).count(name) == 1


# The environ.


def test_environ(service: Service) -> None:
    """The application is told what PEP 3333 and CGI say, as native strings."""
    environ = service.request("GET", "/environ?a=%20b", headers={"X-A": "1", "Host": "example.org:1"}).json
    assert {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/environ",
        "QUERY_STRING": "a=%20b",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": str(service.port),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": "example.org:1",
        "HTTP_X_A": "1",
        "wsgi.version": [1, 0],
        "wsgi.url_scheme": "http",
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
    }.items() <= environ.items()
    assert not {"CONTENT_LENGTH", "HTTP_CONTENT_LENGTH", "HTTP_CONTENT_TYPE"} & set(environ)


@pytest.mark.parametrize(
    ("headers", "scheme"),
    [
        ({}, "http"),
        ({"X-Forwarded-Proto": "https"}, "https"),
        ({"X-Forwarded-Proto": "http"}, "http"),
        ({"X-Forwarded-Protocol": "ssl", "X-Forwarded-Ssl": "on"}, "https"),
        ({"X_Forwarded_Proto": "https"}, "http"),
    ],
)
def test_forwarded(service: Service, headers: dict[str, str], scheme: str) -> None:
    """A trusted proxy, by default one on this host, says whether its client came by https."""
    environ = service.request("GET", "/environ", headers=headers).json
    assert environ["wsgi.url_scheme"] == scheme
    assert not [key for key in environ if "X_FORWARDED" in key and "_" in "".join(headers)]


def test_forwarded_contradictory(service: Service) -> None:
    """Forwarded schemes that contradict each other are refused."""
    answer = service.request("GET", "/environ", headers={"X-Forwarded-Proto": "https", "X-Forwarded-Ssl": "off"})
    assert is_problem(answer, 400)


@pytest.mark.parametrize(("peers", "scheme"), [("10.0.0.0/8,::1", "http"), ("127.0.0.0/8", "https"), ("*", "https")])
def test_forwarded_allow_ips(tmp_path: Path, peers: str, scheme: str) -> None:
    """Gunicorn's forwarded_allow_ips says by address and network who is trusted."""
    with start(tmp_path, FORWARDED_ALLOW_IPS=peers) as service:
        environ = service.request("GET", "/environ", headers={"X-Forwarded-Proto": "https"}).json
    assert environ["wsgi.url_scheme"] == scheme


# wsgi.input.

TEXT = "one\ntwo\n\nthree"
LINES = ["one\n", "two\n", "\n", "three"]


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("read", [TEXT]),
        ("sizes", ["one", "\ntw", "o\n\n", "thr", "ee"]),
        ("readline", LINES),
        ("readline-size", ["one\n", "two\n", "\n", "thre", "e"]),
        ("readlines", LINES),
        ("readlines-hint", ["one\n", "two\n"]),
        ("iterate", LINES),
        ("beyond", [TEXT, "", "", "", ""]),
        ("not", []),
    ],
)
def test_input(service: Service, how: str, found: list[str], is_chunked: bool) -> None:
    """wsgi.input is read in every way and ends, chunked or not; CONTENT_LENGTH is set. What is unread harms nobody."""
    body = TEXT.encode()
    framing = b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    if is_chunked:
        framing = b"Transfer-Encoding: chunked\r\n\r\n5\r\n%b\r\n9\r\n%b\r\n0\r\n\r\n" % (body[:5], body[5:])
    first, second = answers(service.raw(b"POST /echo?%b HTTP/1.1\r\nHost: x\r\n%b" % (how.encode(), framing) + LAST))
    assert first.json == [*found, str(len(body))]
    assert second.body == b"ok"


@pytest.mark.parametrize(
    ("framing", "length"),
    [("", None), ("Content-Length: 0\r\n", "0"), ("Transfer-Encoding: chunked\r\n\r\n0\r\n", "0")],
)
def test_empty_input(service: Service, framing: str, length: str | None) -> None:
    """An empty body is read as empty."""
    for how in ("read", "iterate", "readline"):
        data = f"POST /echo?{how} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{framing}\r\n"
        (answer,) = answers(service.raw(data.encode()))
        assert answer.json in ([length], ["", length])


# What applications answer.


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize(
    ("how", "pieces", "framing"),
    [
        ("list", ["Hello"], "content-length"),
        ("list", ["Hel", "", "lo"], "content-length"),
        ("list", [], "content-length"),
        ("list", [""], "content-length"),
        ("tuple", ["Hello"], "content-length"),
        ("tuple", ["Hel", "lo"], "transfer-encoding"),
        ("generator", ["Hel", "lo"], "transfer-encoding"),
        ("generator", ["", "Hello", ""], "transfer-encoding"),
        ("generator", [], "content-length"),
        ("generator", ["", ""], "content-length"),
        ("late", ["Hel", "lo"], "transfer-encoding"),
        ("late", [], "content-length"),
        ("body", ["Hel", "lo"], "transfer-encoding"),
        ("write", ["Hel", "", "lo"], "transfer-encoding"),
        ("write", ["", ""], "content-length"),
        ("write-and-list", ["Hel", "l", "o"], "transfer-encoding"),
    ],
)
def test_bodies(service: Service, version: str, how: str, pieces: list[str], framing: str) -> None:
    """Every way to give a body works; without its length it is chunked in HTTP/1.1 and ends the connection in 1.0."""
    answer = request(service, path_of(pieces=pieces, **{"as": how}), version)
    assert (answer.status, answer.body) == (200, "".join(pieces).encode())
    assert [name for name in ("content-length", "transfer-encoding") if name in answer.headers] == (
        [] if version == "1.0" and framing == "transfer-encoding" else [framing]
    )
    assert answer.headers["content-type"] == "text/plain"
    declared = path_of(pieces=pieces, headers=[["Content-Length", str(len("".join(pieces)))]], **{"as": how})
    assert request(service, declared, version).body == answer.body
    assert request(service, declared, version).headers["content-length"] == str(len(answer.body))


def test_kept_alive(service: Service) -> None:
    """After a chunked answer the connection serves on, in HTTP/1.0 after one with a length."""
    for wish, version in ((path_of(pieces=["a"], **{"as": "generator"}), "1.1"), (path_of(pieces=["a"]), "1.0")):
        head = f"GET {wish} HTTP/{version}\r\nHost: x\r\n"
        data = (head + "Connection: keep-alive\r\n\r\n") * 2 + head + "Connection: close\r\n\r\n"
        assert [answer.body for answer in answers(service.raw(data.encode()))] == [b"a"] * 3


@pytest.mark.parametrize("how", ["list", "generator", "write"])
@pytest.mark.parametrize("length", [None, "5"])
@pytest.mark.parametrize(
    ("status", "method"), [("204 No Content", "GET"), ("304 Not Modified", "GET"), ("200 OK", "HEAD")]
)
def test_bodiless(service: Service, status: str, method: str, length: str | None, how: str) -> None:
    """204, 304 and answers to HEAD have no body, whatever the application gives (RFC 9112 §6.3)."""
    headers = [["Content-Length", length]] if length else []
    path = path_of(status=status, headers=headers, pieces=["Hel", "lo"], **{"as": how})
    first, second = answers(service.raw(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() + LAST), method)
    assert (first.status, first.body, second.body) == (int(status[:3]), b"", b"ok")
    assert "transfer-encoding" not in first.headers
    if status.startswith("204"):
        assert "content-length" not in first.headers
    elif length:
        assert first.headers["content-length"] == length


@pytest.mark.parametrize(
    "wish",
    [
        {"headers": [["Connection", "close"]]},
        {"headers": [["keep-alive", "5"]]},
        {"headers": [["Transfer-Encoding", "chunked"]]},
        {"headers": [["Upgrade", "h2c"]]},
        {"headers": [["TE", "trailers"]]},
        {"headers": [["Proxy-Authenticate", "Basic"]]},
        {"headers": [["A", "b\r\nSet-Cookie: c"]]},
        {"headers": [["A", "b\nc"]]},
        {"headers": [["A", "b\x00"]]},
        {"headers": [["A", "b", "c\r\nSet-Cookie: d"]]},
        {"headers": [["A", "\u20ac"]]},
        {"headers": [["A", 1]]},
        {"headers": [["A", None]]},
        {"headers": [["A"]]},
        {"headers": [["A b", "c"]]},
        {"headers": [["A:", "c"]]},
        {"headers": [["", "c"]]},
        {"headers": [["\u00e9", "c"]]},
        {"headers": [["A\r\nB", "c"]]},
        {"headers": [["Content-Length", "5"], ["content-length", "5"]]},
        {"headers": [["Content-Length", "+5"]]},
        {"headers": [["Content-Length", "-1"]]},
        {"headers": [["Content-Length", "five"]]},
        {"headers": [["Content-Length", ""]]},
        {"headers": [["Content-Length", "4"]]},
        {"headers": [["Content-Length", "6"]]},
        {"headers": [["Content-Length", "6"]], "pieces": [], "as": "generator"},
        {"status": "200"},
        {"status": "OK"},
        {"status": 200},
        {"status": "100 Continue"},
        {"status": "1000 Much"},
        {"status": "200 OK\r\nA: b"},
        {"as": "twice"},
        {"as": "none"},
        {"as": "exits"},
        {"as": "goes-on-after-a-refusal"},
        {"pieces": [1]},
        {"pieces": [1], "as": "generator"},
        {"pieces": [1], "as": "write"},
        {"pieces": [None], "as": "body"},
        {"pieces": ["", None], "as": "body"},
    ],
)
def test_failures(service: Service, wish: dict[str, Any]) -> None:
    """What an application may not do, and what it raises, is a 500 that tells nothing; the connection serves on."""
    wish = {"pieces": ["Hello"]} | wish
    data = (
        f"GET {path_of(**wish)} HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    first, second = answers(service.raw(data.encode()))
    assert is_problem(first, 500)
    assert b"secret" not in first.body
    assert second.body == b"ok"


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize(
    ("headers", "pieces", "how"),
    [
        ([], ["Hel", None], "body"),
        ([], ["Hel", 1], "generator"),
        ([["Content-Length", "5"]], ["Hel", 12], "generator"),
        ([["Content-Length", "5"]], ["Hel", None], "body"),
        ([["Content-Length", "5"]], ["Hel"], "generator"),
        ([["Content-Length", "5"]], ["Hel"], "write"),
        ([], ["Hel"], "exc_info-too-late"),
    ],
)
def test_cut_off(service: Service, headers: list[Any], pieces: list[Any], how: str, version: str) -> None:
    """An answer that fails half-way is cut off, and nothing that could pass for its end or another answer is sent."""
    path = path_of(headers=headers, pieces=pieces, **{"as": how})
    received = service.raw(f"GET {path} HTTP/{version}\r\nHost: x\r\n\r\n".encode() * 2)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert body == (b"3\r\nHel\r\n" if b"Transfer-Encoding" in head else b"Hel")
    if version == "1.1":
        with pytest.raises(AssertionError):
            next_answer(received)


@pytest.mark.parametrize("how", ["generator", "write"])
def test_too_long(service: Service, how: str) -> None:
    """A streamed body longer than its Content-Length is cut there, and the connection ends with it."""
    path = path_of(headers=[["Content-Length", "5"]], pieces=["Hel", "lo, world", "!"], **{"as": how})
    (answer,) = answers(service.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()))
    assert (answer.status, answer.body) == (200, b"Hello")


def test_exc_info(service: Service) -> None:
    """Before anything is sent, exc_info lets an application answer anew."""
    answer = request(service, path_of(pieces=["short"], headers=[["A", "b"]], **{"as": "exc_info"}))
    assert (answer.status, answer.body) == (418, b"short")
    assert "a" not in answer.headers


def test_what_an_application_does_to_its_environ_is_its_own_affair(service: Service) -> None:
    """The access line tells of the request as it came."""
    sent = b"GET /meddle HTTP/1.1\r\nHost: x\r\nX-Request-ID: meddled\r\nTraceparent: %b\r\nConnection: close\r\n\r\n"
    (answer,) = answers(service.raw(sent % TRACEPARENT.encode()))
    assert answer.body == b"ok"
    wait_for(lambda: any(ln["request_id"] == "meddled" for ln in service.access_lines()), WAIT_SECONDS)
    (line,) = [ln for ln in service.access_lines() if ln["request_id"] == "meddled"]
    assert (line["method"], line["path"], line["trace_id"]) == ("GET", "/meddle", TRACEPARENT[3:35])


def test_a_stream_that_never_ends_starves_nobody(service: Service) -> None:
    """It makes its pieces as fast as they are sent; others are read from and answered meanwhile."""
    with service.connect() as client:
        client.sendall(b"POST /until_told HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(read_to_end(client)))
        reader.start()
        assert service.get("/health").body == b"ok"
        assert service.get("/tell").body == b"ok"
        reader.join(WAIT_SECONDS)
    (answer,) = answers(received[0])
    assert answer.body == b"x" * len(answer.body) != b""


def test_servers_own_fields(service: Service) -> None:
    """Date and Server are the server's own, once each."""
    answer = request(service, path_of(headers=[["Date", "today"], ["SERVER", "mine"], ["B", "\u00e9"]]))
    assert answer.headers["server"] == "inference-api"
    assert answer.headers["date"].endswith(" GMT")
    assert answer.headers["b"] == "\u00e9"


# close().


@pytest.mark.parametrize(
    ("name", "wish", "method"),
    [
        ("whole", {"pieces": ["a", "b"]}, "GET"),
        ("empty", {}, "GET"),
        ("head", {"pieces": ["a", "b"]}, "HEAD"),
        ("nothing", {"pieces": ["a"], "status": "204 No Content"}, "GET"),
        ("raises", {"pieces": [None]}, "GET"),
        ("raises-later", {"pieces": ["a", None]}, "GET"),
        ("not-bytes", {"pieces": [1]}, "GET"),
        ("too-short", {"pieces": ["a"], "headers": [["Content-Length", "2"]]}, "GET"),
        ("too-long", {"pieces": ["abc"], "headers": [["Content-Length", "2"]]}, "GET"),
        ("close-raises", {"pieces": ["a"], "as": "body-fails-in-close"}, "GET"),
    ],
)
def test_close(service: Service, name: str, wish: dict[str, Any], method: str) -> None:
    """close() is called once, whatever becomes of the answer; an exception in it harms no answer."""
    path = path_of(**{"as": "body", "name": name} | wish)
    received = service.raw(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert received
    wait_for_event(service, f"closed {name}")
    if name == "close-raises":
        assert [answer.body for answer in answers(received)] == [b"a"]


@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize(("path", "event"), [("/endless", "closed"), ("/write_endlessly", "left")])
def test_close_when_the_client_leaves(service: Service, path: str, event: str, is_reset: bool) -> None:
    """An application whose client leaves is stopped at its next piece and closed; the log calls it no error."""
    name = f"{path[1:]}-{is_reset}"
    with service.connect() as client:
        client.sendall(f"POST {path}?{name} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
        if is_reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wait_for_event(service, f"{event} {name}")
    assert not [line for line in service.log() if line["level"] == "ERROR" and line.get("path") == path]


def test_slow_reader(service: Service) -> None:
    """A stream of 128 MiB to a client that does not keep up waits for it: memory stays bounded, others are served."""
    (worker,) = service.workers()

    def peak_bytes() -> int:
        status = Path(f"/proc/{worker}/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])

    before = peak_bytes()
    with service.connect() as client:
        client.sendall(b"POST /big HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
        assert service.get("/health").body == b"ok"
        count = 0
        while data := client.recv(65_536):
            count += len(data)
            if count % 20 == 0:
                assert service.get("/health").body == b"ok"
    assert count > 128 * MEBIBYTE
    assert peak_bytes() - before < 32 * MEBIBYTE


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_validator(service: Service, method: str) -> None:
    """wsgiref.validate has nothing to say about this server."""
    data = b"" if method != "POST" else b"Hello"
    head = f"{method} /validated?a=b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    (answer,) = answers(service.raw(head.encode() + data), method)
    assert (answer.status, answer.body) == (200, b"" if method == "HEAD" else b"<" + data)
    if method != "POST":
        answer = request(service, "/validated_stream", method=method)
        assert (answer.status, answer.body) == (200, b"" if method == "HEAD" else b"ab")


def test_long_pipeline_of_streams(service: Service) -> None:
    """Streamed answers to pipelined requests stand in order, each whole."""
    paths = [path_of(pieces=[str(at), "x" * at], **{"as": "generator"}) for at in range(1, 100)]
    data = "".join(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n" for path in paths)
    with service.connect() as client:
        client.sendall(data.encode())
        client.shutdown(socket.SHUT_WR)
        found = answers(read_to_end(client))
    assert [answer.body for answer in found] == [f"{at}{'x' * at}".encode() for at in range(1, 100)]
