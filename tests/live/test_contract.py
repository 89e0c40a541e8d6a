"""The contract over HTTP, on the service's own worker and on gthread: what is answered, and what the log has of it."""

import contextlib
import gzip
import http.client
import json
import re
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.live.service import WAIT_SECONDS, Answer, Service, answers, running, wait_for

OWN, GTHREAD = "inference_api.worker.Worker", "gthread"
PAYLOAD = "zebra"
"""Stands in most bodies sent here and must not stand in the log."""

MODELS = """
import math, sys
from typing import Literal

class Raises:
    name, version = "raises", "0.1"
    def predict(self, text: str) -> str:
        if text == "unfit":
            raise ValueError("The text is unfit.")
        if text == "exit":
            sys.exit(0)
        if text == "interrupt":
            raise KeyboardInterrupt
        if text == "recurse":
            return self.predict(text)
        raise RuntimeError("words of the model")

class Returns:
    name, version = "returns", "0.1"
    outputs = {"object": object(), "set of objects": {object()}, "integer": 1, "none": None, "surrogate": "\\ud800",
               "fine": "fine"}
    def predict(self, text: str) -> str:
        return self.outputs[text]

class Numbers:
    name, version = "numbers", "0.1"
    outputs = {"nan": math.nan, "infinity": -math.inf, "deep": [{"a": math.nan}], "fine": None}
    def predict(self, text: str) -> float | int | None | list[dict[str, float | None]]:
        return self.outputs[text]

class Batches:
    name, version = "batches", "0.1"
    def predict(self, text: str) -> str:
        return 7 if text in ("few", "many", "string", "nothing", "wrong") else text.upper()
    def predict_batch(self, inputs: list) -> list:
        if "few" in inputs:
            return inputs[1:]
        if "many" in inputs:
            return inputs + inputs
        if "string" in inputs:
            return "x" * len(inputs)
        if "nothing" in inputs:
            return None
        return [7 if text == "wrong" else text.upper() for text in inputs]

class Chooses:
    name, version = "chooses", "0.1"
    def predict(self, text: str) -> Literal["fine"]:
        return text

class Several:
    name, version = "several", "0.1"
    def predict(self, text: str, times: int = 2, *, loud: bool = False) -> str:
        return (text.upper() if loud else text) * times
"""
SERVED = {
    "predict": "inference_api.model:DummyModel",
    "square_numbers": "inference_api.model:SquareNumbersModel",
    **{
        name: f"models:{name.capitalize()}"
        for name in ("raises", "returns", "numbers", "batches", "chooses", "several")
    },
}
BUILT_IN = ("/predict", "/square_numbers")

NOT_JSON = "The body is not JSON text in UTF-8."
NOT_FIT = "The body does not fit the schema."
MODEL_FAILED = "The model failed."
NOTHING_THERE = "There is nothing at this path."
NOT_ANSWERED = "The path does not answer this method."
WRONG_TYPE = "The content type must be application/json."
NO_KEY = "A valid key is needed: Authorization: Bearer …, or X-API-Key."

TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


@pytest.fixture(scope="module", params=[OWN, GTHREAD])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Both workers; in the end the log has had each request once, and nothing that was in a body."""
    models = ",".join(f"{path}={target}" for path, target in SERVED.items())
    with running(tmp_path_factory.mktemp("service"), MODELS, MODELS=models, WORKER_CLASS=request.param) as service:
        yield service
    ids = [line["request_id"] for line in service.access_lines() if len(line["request_id"]) == 32]
    assert len(ids) == len(set(ids)) > 100
    assert PAYLOAD not in service.stdout + service.stderr
    assert not service.stderr


def is_gthread(service: Service) -> bool:
    return service.variables["WORKER_CLASS"] == GTHREAD


def send(
    service: Service,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    expected: dict[str, Any] | None = None,
) -> Answer:
    """One request; its answer and its one access line have the same id, and the line has every field it must have."""
    request_id = uuid.uuid4().hex
    answer = service.request(method, path, body, {"X-Request-ID": request_id, **(headers or {})})
    assert answer.headers["x-request-id"] == request_id
    (line,) = lines_of(service, request_id, "inference_api.access")
    fields: dict[str, Any] = {
        "level": "INFO",
        "logger": "inference_api.access",
        "message": "request",
        "request_id": request_id,
    }
    fields |= {"method": method, "path": path.partition("?")[0], "status": answer.status, **(expected or {})}
    if model := answer.headers.get("x-model"):
        fields["model"] = model
    assert TIME.fullmatch(line.pop("time"))
    assert 0 <= line.pop("duration_ms") < 1000 * WAIT_SECONDS
    assert 0 <= line.pop("queue_ms", 0) < 1000 * WAIT_SECONDS
    assert line == fields
    return answer


def lines_of(service: Service, request_id: str, logger: str) -> list[dict[str, Any]]:
    """What the log says of a request, once its access line is there, which comes last."""

    def found() -> list[dict[str, Any]]:
        return [json.loads(line) for line in service.lines() if request_id in line]

    wait_for(lambda: any(line["logger"] == "inference_api.access" for line in found()), WAIT_SECONDS)
    return [line for line in found() if line["logger"] == logger]


def assert_problem(answer: Answer, status: int, detail: str, *errors: tuple[str, str]) -> None:
    """The answer is this problem (RFC 9457), with nothing added and nothing left out."""
    expected = {
        "type": "about:blank",
        "title": TITLES.get(status, HTTPStatus(status).phrase),
        "status": status,
        "detail": detail,
        "request_id": answer.headers["x-request-id"],
    }
    if errors:
        expected["errors"] = [{"pointer": pointer, "detail": words} for pointer, words in errors]
    assert answer.json == expected
    assert answer.status == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["content-length"]) == len(answer.body)


def assert_json(answer: Answer, expected: Any) -> None:
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json == expected


def assert_gunicorns_page(answer: Answer, status: int) -> None:
    """gthread refuses some requests before the application sees them, with a page of its own."""
    assert (answer.status, answer.headers["content-type"]) == (status, "text/html")


def raw(service: Service, method: str, target: str, *fields: bytes) -> Answer:
    """One request with header fields as they are, on a connection that closes."""
    head = b"%b %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" % (method.encode(), target.encode())
    received = service.raw(head + b"".join(field + b"\r\n" for field in fields) + b"\r\n")
    (answer,) = answers(received, method)
    return answer


# What is served.


@pytest.mark.parametrize(
    ("path", "body"), [("/health", b'{"status":"healthy"}'), ("/health/live", b'{"status":"alive"}')]
)
def test_health(service: Service, path: str, body: bytes) -> None:
    """Both say in one word what a balancer or a probe has to know, and nobody may keep it."""
    answer = send(service, "GET", path)
    assert (answer.status, answer.body) == (200, body)
    assert (answer.headers["content-type"], answer.headers["cache-control"]) == ("application/json", "no-store")


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/predict", {"text": "Hello"}, {"input": "Hello", "prediction": "predicted(Hello)"}),
        ("/square_numbers", {"numbers": [1, 2, 3]}, {"input": [1, 2, 3], "prediction": [1, 4, 9]}),
        ("/square_numbers", {"numbers": [0.5, -2]}, {"input": [0.5, -2], "prediction": [0.25, 4]}),
        (
            "/predict",
            [{"text": "a"}, {"text": "b"}],
            [{"input": "a", "prediction": "predicted(a)"}, {"input": "b", "prediction": "predicted(b)"}],
        ),
        ("/square_numbers", [{"numbers": [3]}], [{"input": [3], "prediction": [9]}]),
        ("/predict", [], []),
        ("/square_numbers", [], []),
        ("/several", {"text": "a"}, {"input": {"text": "a", "times": 2, "loud": False}, "prediction": "aa"}),
        (
            "/several",
            [{"loud": True, "text": "a", "times": 3}],
            [{"input": {"text": "a", "times": 3, "loud": True}, "prediction": "AAA"}],
        ),
        ("/batches", {"text": "a"}, {"input": "a", "prediction": "A"}),
        (
            "/batches",
            [{"text": "a"}, {"text": "b"}],
            [{"input": "a", "prediction": "A"}, {"input": "b", "prediction": "B"}],
        ),
        ("/numbers", {"text": "fine"}, {"input": "fine", "prediction": None}),
    ],
)
def test_predictions(service: Service, path: str, body: Any, expected: Any) -> None:
    """An input is answered with itself and its prediction, an array with an array in the same order."""
    answer = send(service, "POST", path, body)
    assert_json(answer, expected)
    assert answer.headers["x-model"] == {
        "/predict": "dummy/1.0.0",
        "/square_numbers": "square_numbers/1.0.0",
    }.get(path, f"{path[1:]}/0.1")


def test_bodies_are_compact_and_integers_stay_integers(service: Service) -> None:
    """The very bytes: no spaces, and what was sent as an integer or a float comes back as one."""
    answer = send(service, "POST", "/square_numbers", b' { "numbers" : [ 2 , 2.0 , -0 , 3037000499, 1E1 ] } ')
    assert answer.body == (b'{"input":[2,2.0,0,3037000499,10.0],"prediction":[4,4.0,0,9223372030926249001,100.0]}')


def test_a_thousand_inputs(service: Service) -> None:
    """The most that one request may hold are all answered, in their order."""
    texts = [str(number) for number in range(1000)]
    answer = send(service, "POST", "/predict", [{"text": text} for text in texts])
    assert_json(answer, [{"input": text, "prediction": f"predicted({text})"} for text in texts])


def test_the_document_is_of_what_is_served(service: Service) -> None:
    """Every path of the document is there, and every path that is there stands in the document."""
    answer = send(service, "GET", "/openapi.json")
    assert_json(answer, answer.json)
    assert answer.json["openapi"] == "3.1.0"
    pages = {"/health", "/health/live", "/metrics", "/openapi.json", "/docs"}
    assert set(answer.json["paths"]) == pages | {f"/{path}" for path in SERVED}
    for path, methods in answer.json["paths"].items():
        if path in pages:
            assert set(methods) == {"get", "head"}
            media_type = send(service, "GET", path).headers["content-type"].partition(";")[0]
            assert list(methods["get"]["responses"]["200"]["content"]) == [media_type]
        else:
            assert set(methods) == {"post"}


def test_metrics(service: Service) -> None:
    """Prometheus text, with what has been asked for so far."""
    assert send(service, "POST", "/several", {"text": "a"}).status == 200
    service.wait_for_metric(
        'predictions_total{model="batches"}', service.metrics()['predictions_total{model="batches"}']
    )
    assert service.metrics()['predictions_total{model="several"}'] >= 1
    assert send(service, "GET", "/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


# Rows 1 to 9 of the list of bad input.

MALFORMED = [
    b"",
    b" ",
    b"{",
    b'{"text": "zebra"',
    b'{"text": "zebra',
    b'{"text": ',
    b'{"text"}',
    b'{"text": "zebra"} x',
    b'{"text": "zebra"}}',
    b'{"text": "zebra"},',
    b'{"text": "zebra"}{"text": "zebra"}',
    b'{"text": "zebra"}\n{"text": "zebra"}',
    b'{"text": zebra}',
    b'{text: "zebra"}',
    b"{'text': 'zebra'}",
    b'{"text": "zebra",}',
    b'{"text": "zebra" "numbers": []}',
    b'[{"text": "zebra"},]',
    b'[{"text": "zebra"}',
    b'{"text": "zebra"} // comment',
    b'/* comment */ {"text": "zebra"}',
    b'{"text": "ze\nbra"}',
    b'{"text": "ze\x00bra"}',
    b'{"text": "\\x7a"}',
    b'{"text": "\\u12"}',
    b'{"text": "\\ud83d\\u"}',
    b'{"numbers": [01]}',
    b'{"numbers": [1.]}',
    b'{"numbers": [.5]}',
    b'{"numbers": [+1]}',
    b'{"numbers": [0x10]}',
    b'{"numbers": [1e]}',
    b'{"numbers": [1 2]}',
    b'{"numbers": [True]}',
    b"zebra",
    b"nul",
    b'"',
    b"\x00",
    b"\xa0{}",
    b"text=zebra",
    b"<text>zebra</text>",
]
NOT_UTF8 = [
    b'{"text": "\xff"}',
    b'{"text": "\x80"}',
    b'{"text": "z\xc3"}',
    b'{"text": "\xc0\xaf"}',  # overlong
    b'{"text": "\xed\xa0\x80"}',  # a surrogate
    b'{"text": "\xf4\x90\x80\x80"}',  # beyond Unicode
    '{"text": "zébra"}'.encode("latin-1"),
    '{"text": "zebra"}'.encode("utf-16"),
    '{"text": "zebra"}'.encode("utf-16-le"),
    '{"text": "zebra"}'.encode("utf-32"),
    b'\xef\xbb\xbf{"text": "zebra"}',
    b'{"text": "zebra", "\xff": 1}',
    b'{"text": "zebra"}\xff',
]
LONE_SURROGATES = [
    b'{"text": "\\ud800"}',
    b'{"text": "\\udc00"}',
    b'{"text": "\\udbff zebra"}',
    b'{"text": "\\udc00\\ud800"}',
    b'{"text": "\\ud800\\ud800"}',
    b'{"text": "\\ud800\\n"}',
    b'{"\\ud800": "zebra"}',
    b'[{"text": "zebra"}, {"text": "\\uDFFF"}]',
]
NOT_NUMBERS = [
    b'{"numbers": [NaN]}',
    b'{"numbers": [Infinity]}',
    b'{"numbers": [-Infinity]}',
    b'{"numbers": [1e400]}',
    b'{"numbers": [-1e400]}',
    b'{"numbers": [1, 1e999999999999]}',
    b'{"text": NaN}',
    b'{"text": 1e400}',
    b"NaN",
    b"1e400",
]
TOO_DEEP = [
    b"[" * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"numbers": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}",
]
BOTH_AT_ONCE = [
    b'{"text": 1, "numbers": 1, zebra}',
    b'{"text": 1} zebra',
    b'[1, {"text": "\xff"}]',
    b'{"other": "\\ud800", "text": "zebra", "numbers": [1]}',
    b'{"other": NaN, "text": "zebra", "numbers": [1]}',
    b'{"other": 1e400, "text": "zebra", "numbers": [1]}',
    b'{"other": 01}',
    b'{"other": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"other": "\xff"}',
    b'{"numbers": [true, NaN], "text": true, "other": Infinity}',
    b'{"numbers": [], "text": "", "last": }',
    b'[{"text": "zebra", "numbers": [1]}, {"text": 1, "numbers": 1}, {]',
]


@pytest.mark.parametrize("path", BUILT_IN)
@pytest.mark.parametrize(
    "body",
    MALFORMED + NOT_UTF8 + LONE_SURROGATES + NOT_NUMBERS + TOO_DEEP + BOTH_AT_ONCE,
    ids=lambda body: repr(body[:40]),
)
def test_what_is_not_json(service: Service, path: str, body: bytes) -> None:
    """It is 400 wherever in the body it stands, whatever else is wrong before it."""
    assert_problem(send(service, "POST", path, body), 400, NOT_JSON)


@pytest.mark.parametrize(
    ("digits", "status"), [(20, 422), (400, 422), (4_300, 422), (4_301, 400), (5_000, 400), (100_000, 400)]
)
@pytest.mark.parametrize("path", BUILT_IN)
def test_long_integers(service: Service, path: str, digits: int, status: int) -> None:
    """They are refused, never computed with."""
    number = b"1" * digits
    body = b'{"numbers": [%b]}' % number if path == "/square_numbers" else b'{"text": %b}' % number
    answer = send(service, "POST", path, body)
    if status == 400:
        assert_problem(answer, 400, NOT_JSON)
    elif path == "/predict":
        words = "Expected `str`, got `int`" if digits == 20 else "Number out of range"
        assert_problem(answer, 422, NOT_FIT, ("/text", words))
    else:
        assert_problem(answer, 422, NOT_FIT, ("/numbers/0", "Expected `int` <= 3037000499"))


A_STR, A_LIST, AN_OBJECT = "Expected `str`", "Expected `array`", "Expected `object | array`"
UNKNOWN = "Object contains an unknown field; known: "
WRONG_SHAPES: list[tuple[str, Any, str, str]] = [
    ("/predict", {}, "", "Object missing required field `text`"),
    ("/predict", {"text": PAYLOAD, "more": 1}, "", UNKNOWN + "`text`"),
    ("/predict", {"text": PAYLOAD, PAYLOAD: PAYLOAD}, "", UNKNOWN + "`text`"),
    ("/predict", {"Text": PAYLOAD}, "", UNKNOWN + "`text`"),
    ("/predict", {"text": 1}, "/text", f"{A_STR}, got `int`"),
    ("/predict", {"text": 1.5}, "/text", f"{A_STR}, got `float`"),
    ("/predict", {"text": None}, "/text", f"{A_STR}, got `null`"),
    ("/predict", {"text": True}, "/text", f"{A_STR}, got `bool`"),
    ("/predict", {"text": [PAYLOAD]}, "/text", f"{A_STR}, got `array`"),
    ("/predict", {"text": {PAYLOAD: 1}}, "/text", f"{A_STR}, got `object`"),
    ("/predict", {"text": ""}, "/text", f"{A_STR} of length >= 1"),
    ("/predict", {"text": "z" * 10_001}, "/text", f"{A_STR} of length <= 10000"),
    ("/predict", {"text": "🦓" * 10_001}, "/text", f"{A_STR} of length <= 10000"),
    ("/predict", PAYLOAD, "", f"{AN_OBJECT}, got `str`"),
    ("/predict", 1, "", f"{AN_OBJECT}, got `int`"),
    ("/predict", b"null", "", f"{AN_OBJECT}, got `null`"),
    ("/predict", True, "", f"{AN_OBJECT}, got `bool`"),
    ("/predict", [{"text": PAYLOAD}, {"text": 1}], "/1/text", f"{A_STR}, got `int`"),
    ("/predict", [{"text": PAYLOAD}, PAYLOAD], "/1", "Expected `object`, got `str`"),
    ("/predict", [[{"text": PAYLOAD}]], "/0", "Expected `object`, got `array`"),
    ("/predict", [{"text": PAYLOAD}, {}], "/1", "Object missing required field `text`"),
    ("/predict", [{"text": PAYLOAD}, {"text": PAYLOAD, "more": 1}], "/1", UNKNOWN + "`text`"),
    ("/predict", [{"text": PAYLOAD}] * 1_001, "", f"{A_LIST} of length <= 1000"),
    ("/predict", [{"text": PAYLOAD}] * 998 + [{"text": ""}, {"text": PAYLOAD}], "/998/text", f"{A_STR} of length >= 1"),
    ("/square_numbers", {}, "", "Object missing required field `numbers`"),
    ("/square_numbers", {"numbers": [1], "more": 1}, "", UNKNOWN + "`numbers`"),
    ("/square_numbers", {"numbers": 1}, "/numbers", f"{A_LIST}, got `int`"),
    ("/square_numbers", {"numbers": PAYLOAD}, "/numbers", f"{A_LIST}, got `str`"),
    ("/square_numbers", {"numbers": None}, "/numbers", f"{A_LIST}, got `null`"),
    ("/square_numbers", {"numbers": {"0": 1}}, "/numbers", f"{A_LIST}, got `object`"),
    ("/square_numbers", {"numbers": []}, "/numbers", f"{A_LIST} of length >= 1"),
    ("/square_numbers", {"numbers": [1] * 10_001}, "/numbers", f"{A_LIST} of length <= 10000"),
    ("/square_numbers", {"numbers": [1, True]}, "/numbers/1", "Expected `int | float`, got `bool`"),
    ("/square_numbers", {"numbers": [1, "2"]}, "/numbers/1", "Expected `int | float`, got `str`"),
    ("/square_numbers", {"numbers": [None]}, "/numbers/0", "Expected `int | float`, got `null`"),
    ("/square_numbers", {"numbers": [[1]]}, "/numbers/0", "Expected `int | float`, got `array`"),
    ("/square_numbers", {"numbers": [0, 3037000500]}, "/numbers/1", "Expected `int` <= 3037000499"),
    ("/square_numbers", {"numbers": [-3037000500]}, "/numbers/0", "Expected `int` >= -3037000499"),
    ("/square_numbers", {"numbers": [2**63]}, "/numbers/0", "Expected `int` <= 3037000499"),
    ("/square_numbers", {"numbers": [3037000499.5]}, "/numbers/0", "Expected `float` <= 3037000499.0"),
    ("/square_numbers", {"numbers": [1e200]}, "/numbers/0", "Expected `float` <= 3037000499.0"),
    ("/square_numbers", {"numbers": [-1e308]}, "/numbers/0", "Expected `float` >= -3037000499.0"),
    (
        "/square_numbers",
        [{"numbers": [1]}, {"numbers": [1, 2, True]}],
        "/1/numbers/2",
        "Expected `int | float`, got `bool`",
    ),
    ("/square_numbers", [[1]], "/0", "Expected `object`, got `array`"),
    ("/square_numbers", [1], "/0", "Expected `object`, got `int`"),
    ("/several", {"text": PAYLOAD, "times": "3"}, "/times", "Expected `int`, got `str`"),
    ("/several", {"text": PAYLOAD, "times": 1.5}, "/times", "Expected `int`, got `float`"),
    ("/several", {"text": PAYLOAD, "loud": 1}, "/loud", "Expected `bool`, got `int`"),
    ("/several", {"text": PAYLOAD, "quiet": 1}, "", UNKNOWN + "`text`, `times`, `loud`"),
]


@pytest.mark.parametrize(("path", "body", "pointer", "words"), WRONG_SHAPES, ids=lambda value: repr(value)[:40])
def test_wrong_shapes(service: Service, path: str, body: Any, pointer: str, words: str) -> None:
    """What is JSON and does not fit is 422, with a pointer to the place and words that do not repeat what was sent."""
    assert_problem(send(service, "POST", path, body), 422, NOT_FIT, (pointer, words))


TEXTS = [
    "Hello",
    " ",
    "\t",
    "שלום",
    "مرحبا\u202eabc\u202c",
    "e\u0301 Å ﬁ",
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈",
    "\x00",
    "".join(map(chr, range(1, 32))),
    "\x7f\x80\x85\x9b\x9f",
    "\u2028\u2029\ufeff\ufffe\uffff",
    "\U0010ffff",
    "\"quotes\" 'single' \\back\\slash",
    "%0d%0aSet-Cookie: a=b",
    "\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    '{"time": "now", "level": "ERROR"}',
    "\x1b[31mred\x1b[0m",
    "<script>alert(1)</script>",
    "${jndi:ldap://127.0.0.1/a}",
    "z" * 10_000,
    "🦓" * 10_000,
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[:30])
def test_text_of_every_kind(service: Service, text: str) -> None:
    """It is echoed exactly, raw or escaped, and the log stays lines of JSON."""
    expected = {"input": text, "prediction": f"predicted({text})"}
    assert_json(send(service, "POST", "/predict", {"text": text}), expected)
    raw_body = json.dumps({"text": text}, ensure_ascii=False).encode()
    assert_json(send(service, "POST", "/predict", raw_body), expected)


@pytest.mark.parametrize("text", [text for text in TEXTS if len(text) < 100], ids=lambda text: ascii(text)[:30])
def test_paths_of_every_kind(service: Service, text: str) -> None:
    """Whatever a path decodes to, its line in the log is one line, and the path stands in it as WSGI gives it."""
    quoted = "/" + "".join(f"%{byte:02X}" for byte in text.encode())
    expected = {"path": "/" + text.encode().decode("latin-1")}
    assert_problem(send(service, "GET", quoted, expected=expected), 404, NOTHING_THERE)


# Rows 19 to 22.


@pytest.mark.parametrize(
    "media_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON;charset=UTF-8",
        "application/json ; profile=x",
        "",
    ],
)
def test_content_types_that_are_json(service: Service, media_type: str) -> None:
    """Parameters and case do not matter, and an empty one is like none."""
    answer = send(service, "POST", "/predict", b'{"text": "Hello"}', {"Content-Type": media_type})
    assert_json(answer, {"input": "Hello", "prediction": "predicted(Hello)"})


def test_no_content_type(service: Service) -> None:
    """It is treated as JSON."""
    body = b'{"text": "Hello"}'
    received = service.raw(
        b"POST /predict HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    (answer,) = answers(received)
    assert_json(answer, {"input": "Hello", "prediction": "predicted(Hello)"})


@pytest.mark.parametrize(
    "media_type",
    [
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=application/json",
        "application/jsonx",
        "application/problem+json",
        "application/xml",
        "application/json, text/plain",
        "json",
        "*/*",
        "é",
    ],
)
def test_content_types_that_are_not(service: Service, media_type: str) -> None:
    """They are refused without a look at the body."""
    headers = {"Content-Type": media_type}
    assert_problem(send(service, "POST", "/predict", b'{"text": "zebra"}', headers), 415, WRONG_TYPE)


def test_a_compressed_body(service: Service) -> None:
    """It is not JSON, but the client shall learn why (RFC 9110 §15.5.16)."""
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = send(service, "POST", "/predict", gzip.compress(b'{"text": "zebra"}'), headers)
    assert_problem(answer, 415, "The body must have no content coding.")
    assert answer.headers["accept-encoding"] == "identity"


POSTED, GOT, SHOWN = "POST, OPTIONS", "GET, HEAD, OPTIONS", "GET, HEAD"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/predict", POSTED),
        ("/square_numbers", POSTED),
        ("/health", GOT),
        ("/health/live", GOT),
        ("/metrics", SHOWN),
        ("/openapi.json", SHOWN),
        ("/docs", SHOWN),
        ("/docs/swagger-ui.css", SHOWN),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "OPTIONS"])
def test_methods(service: Service, method: str, path: str, allowed: str) -> None:
    """A path answers its methods, and for all others says which these are."""
    answer = send(service, method, path)
    if method == "POST" and allowed == POSTED:
        assert_problem(answer, 400, NOT_JSON)
    elif method == "OPTIONS" and method in allowed:
        assert (answer.status, answer.body) == (200, b"")
        assert f"{answer.headers['allow']}, OPTIONS" == allowed
    elif method in allowed.split(", "):
        assert answer.status == 200
    else:
        assert (answer.status, answer.headers["allow"]) == (405, allowed)
        if method != "HEAD":
            assert_problem(answer, 405, NOT_ANSWERED)


@pytest.mark.parametrize(
    ("method", "target", "detail"),
    [
        ("FOO", "/predict", "The request is not valid."),
        ("post", "/predict", "The request is not valid."),
        ("get", "/health", "The request is not valid."),
        ("CONNECT", "/predict", None),
        ("CONNECT", "localhost:80", None),
        ("OPTIONS", "*", None),
    ],
)
def test_methods_that_are_none(service: Service, method: str, target: str, detail: str | None) -> None:
    """They get 400, and 501 from the own worker where they are meant for a proxy or for all of the server."""
    answer = raw(service, method, target)
    if is_gthread(service) and method.islower():
        assert_gunicorns_page(answer, 400)
    elif detail is not None:
        assert_problem(answer, 400, detail)
    elif is_gthread(service):
        assert_problem(answer, *((405, NOT_ANSWERED) if target == "/predict" else (404, NOTHING_THERE)))
    else:
        assert_problem(answer, 501, "The server is not a proxy and has no options of its own.")


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/nowhere",
        "/predict/",
        "/Predict",
        "/predict/more",
        "/health/",
        "/health/dead",
        "/metricsfoo",
        "/metrics/",
        "/metrics%0A",
        "/openapi.json%0a",
        "/openapi.json/",
        "/docs%0A",
        "/docs//",
        "/docs/../health",
        "/docs/..",
        "/docs/%2e%2e/",
        "/docs/%2e%2e/health",
        "/docs/..%2f..%2f..%2fetc%2fpasswd",
        "/docs/index.html",
        "/docs/__init__.py",
        "/docs/swagger-ui.css%00",
        "/docs/swagger-ui.css/",
        "/docs/swagger-ui-bundle.js.map",
        "/%ff",
        "/%",
        "/%zz",
        "/favicon.ico",
    ],
)
def test_paths_with_nothing_there(service: Service, target: str) -> None:
    """No path is matched by its beginning, and no file outside the page's own is given."""
    answer = raw(service, "GET", target)
    assert_problem(answer, 404, NOTHING_THERE)


@pytest.mark.parametrize("target", ["/predict?x=1", "/predict?", "/predict?text=zebra"])
def test_a_query_changes_nothing(service: Service, target: str) -> None:
    """It is neither read nor logged."""
    answer = send(service, "POST", target, {"text": "Hello"})
    assert_json(answer, {"input": "Hello", "prediction": "predicted(Hello)"})


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/health/live",
        "/openapi.json",
        "/docs",
        "/docs/",
        "/docs/start.js",
        "/docs/swagger-ui.css",
        "/docs/swagger-ui-bundle.js",
        "/metrics",
        "/nowhere",
    ],
)
def test_head(service: Service, path: str) -> None:
    """It has the headers of GET and no body, so that the connection goes on."""
    request = b"%b %b HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: one\r\n%b\r\n"
    head = request % (b"HEAD", path.encode(), b"")
    get = request.replace(b"one", b"two") % (b"GET", path.encode(), b"Connection: close\r\n")
    of_head, of_get = answers(service.raw(head + get), "HEAD", "GET")
    assert of_head.status == of_get.status == (404 if path == "/nowhere" else 200)
    assert of_head.body == b""
    assert of_get.body
    varying = {"date", "connection", "x-request-id"} | ({"content-length"} if path == "/metrics" else set())
    shown = [{name: value for name, value in a.headers.items() if name not in varying} for a in (of_head, of_get)]
    assert shown[0] == shown[1]


def test_head_while_nothing_else_is(service: Service) -> None:
    """A file of the page has the length that HEAD says."""
    length = send(service, "HEAD", "/docs/swagger-ui-bundle.js").headers["content-length"]
    assert len(send(service, "GET", "/docs/swagger-ui-bundle.js").body) == int(length) > 100_000


@pytest.mark.parametrize("sent", ["a", "A.b_C-9", "0" * 64, "..", "-"])
def test_request_ids_that_come_back(service: Service, sent: str) -> None:
    """What fits the pattern is echoed, in an answer and in an error."""
    for path in ("/health", "/nowhere"):
        assert raw(service, "GET", path, b"X-Request-ID: " + sent.encode()).headers["x-request-id"] == sent


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"0" * 65,
        b"0" * 4_000,
        b"a b",
        b"a,b",
        b"a;b",
        b'a"b',
        b"a/b",
        b"a\tb",
        b"a\x85b",
        b"a\x9b31mb",
        "é".encode(),
        "a\u2028b".encode(),
        b"a%0d%0ab",
        b"a\\nb",
    ],
    ids=lambda sent: repr(sent[:20]),
)
def test_request_ids_that_are_replaced(service: Service, sent: bytes) -> None:
    """Anything else gives a new one of the service's own."""
    answer = raw(service, "GET", "/health", b"X-Request-ID: " + sent)
    assert answer.status == 200
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    assert sent == b"" or sent not in (service.folder / "stdout").read_bytes()


def test_two_request_ids(service: Service) -> None:
    """Two are no valid one."""
    answer = raw(service, "GET", "/health", b"X-Request-ID: one-id", b"X-Request-ID: other-id")
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.mark.parametrize("sent", [b"a\rb", b"a\r\n\tb", b"a\x1b[31mb", b"a\x00b", b"a\x7fb", b"a\x08b", b"0" * 8192])
def test_request_ids_that_no_header_may_hold(service: Service, sent: bytes) -> None:
    """Bytes that are illegal in a header, or too many of them, are refused as such."""
    status = 431 if len(sent) > 1000 else 400
    answer = raw(service, "GET", "/health", b"X-Request-ID: " + sent)
    if is_gthread(service):
        assert_gunicorns_page(answer, status)
    else:
        detail = {400: "A header field is not valid.", 431: "A header field may have at most 8190 bytes."}[status]
        assert_problem(answer, status, detail)


def test_a_body_that_is_too_large(service: Service) -> None:
    """It is refused before it is read."""
    answer = raw(service, "POST", "/predict", b"Content-Length: 1048577")
    assert_problem(answer, 413, "The body may have at most 1048576 bytes.")
    body = b'{"text": "Hello"}'.ljust(1_048_576)
    assert_json(send(service, "POST", "/predict", body), {"input": "Hello", "prediction": "predicted(Hello)"})


# The log.

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize(
    "traceparent",
    [f"00-{TRACE}-b7ad6b7169203331-01", f"00-{TRACE}-b7ad6b7169203331-ff", f"cc-{TRACE}-b7ad6b7169203331-01-more"],
)
def test_a_trace_is_carried_into_the_log(service: Service, traceparent: str) -> None:
    """The access line and the line of a failure have the trace id (W3C Trace Context)."""
    headers = {"traceparent": traceparent}
    assert send(service, "POST", "/predict", {"text": "a"}, headers, {"trace_id": TRACE}).status == 200
    answer = send(service, "POST", "/raises", {"text": "a"}, headers, {"trace_id": TRACE})
    (line,) = lines_of(service, answer.headers["x-request-id"], "inference_api")
    assert line["trace_id"] == TRACE


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        TRACE,
        f"00-{TRACE}-b7ad6b7169203331",
        f"00-{TRACE.upper()}-b7ad6b7169203331-01",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-b7ad6b7169203331-01",
        f"00-{TRACE}-b7ad6b7169203331-01-more",
        f"00-{TRACE}-b7ad6b7169203331-01,00-{TRACE}-b7ad6b7169203331-01",
        f'00-{TRACE[:-1]}"-b7ad6b7169203331-01',
    ],
)
def test_what_is_no_trace_is_ignored(service: Service, traceparent: str) -> None:
    """An invalid traceparent leaves no trace."""
    assert send(service, "GET", "/health", headers={"traceparent": traceparent}).status == 200


# Rows 50 and 53: the model misbehaves.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("crash", "RuntimeError: words of the model"),
        ("exit", "SystemExit: 0"),
        ("interrupt", "KeyboardInterrupt"),
        ("recurse", "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_a_model_that_raises(service: Service, text: str, words: str) -> None:
    """The client learns that it failed, the log why, under the same id, and the service goes on."""
    for body in ({"text": text}, [{"text": text}]):
        answer = send(service, "POST", "/raises", body)
        assert_problem(answer, 500, MODEL_FAILED)
        assert answer.headers["x-model"] == "raises/0.1"
        (line,) = lines_of(service, answer.headers["x-request-id"], "inference_api")
        assert (line["level"], line["message"], line["path"]) == ("ERROR", "inference failed", "/raises")
        assert "Traceback (most recent call last)" in line["exception"] or line["exception"].startswith("…")
        assert words in line["exception"]
    assert send(service, "POST", "/predict", {"text": "a"}).status == 200


def test_a_model_that_refuses_its_input(service: Service) -> None:
    """A ValueError is the client's fault, in the model's words, at the input that it concerns."""
    refused = "The model refused the input.", ("", "The text is unfit.")
    assert_problem(send(service, "POST", "/raises", {"text": "unfit"}), 422, *refused)
    in_array = "The model refused the input.", ("/0", "The text is unfit.")
    assert_problem(send(service, "POST", "/raises", [{"text": "unfit"}, {"text": "crash"}]), 422, *in_array)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/returns", "object"),
        ("/returns", "set of objects"),
        ("/returns", "integer"),
        ("/returns", "none"),
        ("/returns", "surrogate"),
        ("/numbers", "nan"),
        ("/numbers", "infinity"),
        ("/numbers", "deep"),
        ("/chooses", PAYLOAD),
        ("/batches", "few"),
        ("/batches", "many"),
        ("/batches", "string"),
        ("/batches", "nothing"),
        ("/batches", "wrong"),
    ],
)
def test_an_output_that_is_none(service: Service, path: str, text: str) -> None:
    """The wrong number of outputs, and what is not JSON or not what was promised, is a failure of the model."""
    for body in ({"text": text}, [{"text": "fine"}, {"text": text}]):
        answer = send(service, "POST", path, body)
        assert_problem(answer, 500, MODEL_FAILED)
        lines = lines_of(service, answer.headers["x-request-id"], "inference_api")
        (line,) = (line for line in lines if line["level"] == "ERROR")
        assert (line["message"], line["path"]) == ("inference failed", path)
        assert "Traceback" in line["exception"]
    assert send(service, "POST", path, {"text": "fine"}).status == 200


def test_a_bad_output_concerns_its_client_alone(service: Service) -> None:
    """Of many clients that a batch may put together, each gets its own answer, and only the one its 500."""
    texts = [f"text{number}" for number in range(63)] + ["wrong"]
    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(lambda text: service.post("/batches", {"text": text}), texts))
    assert_problem(found.pop(), 500, MODEL_FAILED)
    for text, answer in zip(texts, found, strict=False):
        assert_json(answer, {"input": text, "prediction": text.upper()})


# Whatever comes.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["text", "numbers"]) | st.text(), inner),
)
NEARLY = st.fixed_dictionaries({"text": st.text()}) | st.fixed_dictionaries(
    {"numbers": st.lists(st.integers() | st.floats())}
)


@pytest.mark.parametrize("path", BUILT_IN)
def test_no_body_is_answered_with_5xx(service: Service, path: str) -> None:
    """Any JSON, and any bytes, get 200 or 4xx and a body of JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=WAIT_SECONDS)

    @settings(deadline=None, max_examples=150, derandomize=True)
    @given(st.binary() | (JSON | NEARLY | st.lists(NEARLY)).map(lambda value: json.dumps(value).encode()))
    def check(body: bytes) -> None:
        connection.request("POST", path, body)
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status in (200, 400, 422)
        assert response.status == 200 or answer["status"] == response.status

    with contextlib.closing(connection):
        check()


# Keys.

KEYS = ("first-key-of-two", "second.key+of/two=")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("keyed"), API_KEYS=", ".join(KEYS)) as service:
        yield service
    assert not any(key in service.stdout + service.stderr for key in KEYS)


@pytest.mark.parametrize(
    "field",
    [
        f"Authorization: Bearer {KEYS[0]}",
        f"Authorization: bearer  {KEYS[1]}",
        f"X-API-Key: {KEYS[0]}",
        f"x-api-key:{KEYS[1]}",
    ],
)
@pytest.mark.parametrize("path", BUILT_IN)
def test_a_key_opens_every_model(keyed: Service, field: str, path: str) -> None:
    """Any of the keys, in either header."""
    name, _, value = field.partition(":")
    body = {"text": "a"} if path == "/predict" else {"numbers": [1]}
    assert send(keyed, "POST", path, body, {name: value.strip(" ") if name != "Authorization" else value}).status == 200


@pytest.mark.parametrize(
    "field",
    [
        b"X-Nothing: 1",
        b"X-API-Key: ",
        b"X-API-Key: wrong-key",
        b"X-API-Key: first-key-of-tw",
        b"X-API-Key: first-key-of-two2",
        b"X-API-Key: FIRST-KEY-OF-TWO",
        b"X-API-Key: first-key-of-two, second.key+of/two=",
        b"X-API-Key: Bearer first-key-of-two",
        b"X-API-Key: \xff\xfe\x80",
        "X-API-Key: schlüssel🔑".encode(),
        b"X_API_Key: first-key-of-two",
        b"Authorization: first-key-of-two",
        b"Authorization: Bearer",
        b"Authorization: Bearer wrong-key",
        b"Authorization: Basic first-key-of-two",
        b"Authorization: Bearer first-key-of-two first-key-of-two",
        b"Authorization: Bearer \xff",
    ],
    ids=repr,
)
@pytest.mark.parametrize("path", BUILT_IN)
def test_without_a_key_a_model_is_closed(keyed: Service, path: str, field: bytes) -> None:
    """401 says how to authenticate, before the body is looked at; no bytes in a header make it a 500."""
    answer = raw(keyed, "POST", path, field)
    assert_problem(answer, 401, NO_KEY)
    assert answer.headers["www-authenticate"] == 'Bearer realm="inference-api"'


@pytest.mark.parametrize("path", ["/health", "/health/live", "/metrics", "/docs", "/docs/start.js", "/openapi.json"])
def test_what_stays_open(keyed: Service, path: str) -> None:
    """Health, metrics and docs ask for no key."""
    assert send(keyed, "GET", path).status == 200


def test_the_document_says_that_a_key_is_needed(keyed: Service) -> None:
    """Both headers are security schemes of the model paths, and of no other."""
    document = keyed.get("/openapi.json").json
    assert set(document["components"]["securitySchemes"]) == {"bearer", "api_key"}
    secured = {path for path, methods in document["paths"].items() for m in methods.values() if "security" in m}
    assert secured == set(BUILT_IN)
