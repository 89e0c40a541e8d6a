"""The contract, as far as the application decides it: exact answers, errors, headers and methods."""

import json
from typing import Any

import pytest

from inference_api.model import DummyModel
from tests import fakes
from tests.app.client import JSON, PROBLEM, Client, call, problem

NOT_JSON = "The body is not JSON text in UTF-8."
NOT_FIT = "The body does not fit the schema."
NOTHING = "There is nothing at this path."
WRONG_METHOD = "The path does not answer this method."
UNSUPPORTED = "The content type must be application/json."
GETS = ["/health", "/health/live", "/openapi.json", "/docs", "/docs/", "/metrics"]
ASSETS = ["/docs/start.js", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js"]


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        ("/predict", b'{"text": "Hello"}', b'{"input":"Hello","prediction":"predicted(Hello)"}'),
        ("/square_numbers", b'{"numbers": [1, 2, 3]}', b'{"input":[1,2,3],"prediction":[1,4,9]}'),
        ("/square_numbers", b'{"numbers": [-0.0, 0.5, -2]}', b'{"input":[-0.0,0.5,-2],"prediction":[0.0,0.25,4]}'),
        ("/square_numbers", b'{"numbers": [3037000499]}', b'{"input":[3037000499],"prediction":[9223372030926249001]}'),
        ("/predict", b"[]", b"[]"),
        ("/predict", b'[{"text": "a"}]', b'[{"input":"a","prediction":"predicted(a)"}]'),
        (
            "/square_numbers",
            b'[{"numbers": [2]}, {"numbers": [1]}]',
            b'[{"input":[2],"prediction":[4]},{"input":[1],"prediction":[1]}]',
        ),
    ],
)
def test_a_prediction(client: Client, path: str, body: bytes, answer: bytes) -> None:
    """The body, byte for byte, and the headers."""
    response = client.post(path, body, Content_Type=JSON)
    assert (response.status, response.body) == ("200 OK", answer)
    assert response.headers["Content-Type"] == JSON
    assert response.headers["X-Model"] == ("dummy/1.0.0" if path == "/predict" else "square_numbers/1.0.0")
    assert response.headers["Content-Length"] == str(len(answer))


def test_a_thousand_inputs_come_back_in_order(client: Client) -> None:
    """That many fit one request."""
    answer = client.post("/square_numbers", [{"numbers": [n]} for n in range(1000)])
    assert answer.json == [{"input": [n], "prediction": [n * n]} for n in range(1000)]


def test_a_thousand_and_one_inputs_are_too_many(client: Client) -> None:
    """The request fails as a whole."""
    answer = client.post("/predict", [{"text": "a"}] * 1001)
    detail = "Expected `array` of length <= 1000"
    problem(answer, 422, "Unprocessable Content", NOT_FIT, [{"pointer": "", "detail": detail}])


def test_one_bad_input_fails_the_request(client: Client) -> None:
    """The pointer tells which; the model's name is told all the same."""
    answer = client.post("/predict", [{"text": "a"}, {"text": "b"}, {"text": ""}])
    errors = [{"pointer": "/2/text", "detail": "Expected `str` of length >= 1"}]
    problem(answer, 422, "Unprocessable Content", NOT_FIT, errors)
    assert answer.headers["X-Model"] == "dummy/1.0.0"


TEXTS = [
    "שלום עולם",
    "e\u0301\u0323",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "a\tb\nc\rd\x00e\x1b[31m",
    "\"quoted\" 'text' \\ / <script>",
    "%0d%0aSet-Cookie: a=b",
    "a\x85b\u2028c\u2029d",
    "\ufeff\ufffe\uffff\U0010ffff",
    "\x7f\x80\x9f",
    "null",
    "x" * 10_000,
    "😀" * 10_000,
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("ascii_only", [True, False])
def test_text_of_every_kind_is_echoed_exactly(client: Client, text: str, ascii_only: bool) -> None:
    """Whether the client escapes it or not."""
    answer = client.post("/predict", json.dumps({"text": text}, ensure_ascii=ascii_only).encode())
    assert (answer.status_int, answer.json) == (200, {"input": text, "prediction": f"predicted({text})"})


BAD_JSON = [
    b"",
    b" ",
    b'{"text": "a"',
    b'{"text": "a"} x',
    b'{"text": "a"} {"text": "a"}',
    b"{text: 1}",
    b'{"text": "a"} // why',
    b'{"text": "a",}',
    b'{"text": NaN}',
    b'{"text": -Infinity}',
    b'{"text": 1e400}',
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b'\xef\xbb\xbf{"text": "a"}',
    '{"text": "a"}'.encode("utf-16"),
    b"[" * 100_000 + b"]" * 100_000,
    b'{"text":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"text": "a", "unknown": 1e400}',
    b'{"text": "a", "unknown": "\\ud800"}',
    b'{"text": "a", "unknown": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"text": 1, "more": NaN}',
    b'[{"text": 1}, {"text": "\xff"}]',
    b'{"text": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("body", BAD_JSON, ids=lambda body: body[:24])
@pytest.mark.parametrize("path", ["/predict", "/square_numbers"])
def test_what_is_not_json_is_a_bad_request(client: Client, path: str, body: bytes) -> None:
    """400, wherever in the body it stands."""
    answer = client.post(path, body)
    problem(answer, 400, "Bad Request", NOT_JSON)


def test_integers_of_hundreds_of_digits(client: Client, fake_client: Client) -> None:
    """Too large for the bounds is 422; without bounds it is echoed digit for digit."""
    digits = b"9" * 400
    answer = client.post("/square_numbers", b'{"numbers": [%b]}' % digits)
    errors = [{"pointer": "/numbers/0", "detail": "Expected `int` <= 3037000499"}]
    problem(answer, 422, "Unprocessable Content", NOT_FIT, errors)
    answer = fake_client.post("/echo", b'{"value": %b}' % digits)
    assert answer.body == b'{"input":%b,"prediction":%b}' % (digits, digits)


@pytest.mark.parametrize(
    ("levels", "status"), [(199, 200), (200, 200), (201, 400), (450, 400), (900, 400), (950, 400), (985, 400)]
)
def test_what_may_nest_at_will_may_nest_two_hundred_levels(fake_client: Client, levels: int, status: int) -> None:
    """The object around it is one of them; never is there a depth that fails on the way back."""
    value = b"[" * (levels - 1) + b"null" + b"]" * (levels - 1)
    answer = fake_client.post("/echo", b'{"value": %b}' % value)
    assert answer.status_int == status
    if status == 200:
        assert answer.body == b'{"input":%b,"prediction":%b}' % (value, value)


def test_a_number_whose_square_overflows_is_refused(client: Client) -> None:
    """The bound stands in the schema."""
    answer = client.post("/square_numbers", b'{"numbers": [1e200]}')
    errors = [{"pointer": "/numbers/0", "detail": "Expected `float` <= 3037000499.0"}]
    problem(answer, 422, "Unprocessable Content", NOT_FIT, errors)


def test_a_problem_byte_for_byte(client: Client) -> None:
    """What a client of the contract parses."""
    answer = client.post("/square_numbers", b'{"numbers": [1, true]}', X_Request_ID="abc")
    assert answer.body == (
        b'{"type":"about:blank","title":"Unprocessable Content","status":422,'
        b'"detail":"The body does not fit the schema.","request_id":"abc",'
        b'"errors":[{"pointer":"/numbers/1","detail":"Expected `int | float`, got `bool`"}]}'
    )


@pytest.mark.parametrize("secret", ["s3cret", "s3cret` - at `$.s3cret", "<script>s3cret</script>"])
def test_errors_never_quote_the_client(client: Client, fake_client: Client, secret: str) -> None:
    """Neither keys nor values, neither paths nor types, come back in an error."""
    answers = [
        client.post("/predict", {"text": "a", secret: 1}),
        client.post("/predict", {secret: "a"}),
        client.post("/predict", secret),
        client.post("/predict", secret.encode()),
        client.post("/predict", {"text": [secret]}),
        client.post("/predict", {"text": "a"}, Content_Type=secret),
        client.post("/square_numbers", {"numbers": [secret]}),
        fake_client.post("/zoo", {"animals": [], "mode": secret}),
        fake_client.post("/zoo", {"animals": [{"name": "a", "ears": {"left-length": 1}, "friends": {secret: 1}}]}),
    ]
    for answer in answers:
        assert answer.status_int in (400, 415, 422)
        assert b"s3cret" not in answer.body


@pytest.mark.parametrize(
    "content_type",
    [
        JSON,
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
        "application/json ; a=b",
        "",
    ],
)
def test_json_in_every_spelling_is_taken(client: Client, content_type: str) -> None:
    """Parameters and case do not matter, and no type at all means JSON."""
    assert client.post("/predict", {"text": "a"}, Content_Type=content_type).status_int == 200


def test_no_content_type_is_taken_for_json(client: Client) -> None:
    """A client that names none sends JSON."""
    body = b'{"text": "a"}'
    status, _, answer = call(
        client, REQUEST_METHOD="POST", PATH_INFO="/predict", CONTENT_LENGTH=str(len(body)), **{"wsgi.input": Body(body)}
    )
    assert (status, answer) == ("200 OK", b'{"input":"a","prediction":"predicted(a)"}')


class Body:
    """A wsgi.input that says how it is read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.read_bytes = 0

    def read(self, size: int) -> bytes:
        data, self.data = self.data[:size], self.data[size:]
        self.read_bytes += len(data)
        return data


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "text/json",
        "application/jsonx",
        "application/xjson",
        "application/problem+json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json, text/plain",
        "x; application/json",
        "json",
    ],
)
def test_other_content_types_are_unsupported(client: Client, content_type: str) -> None:
    """Whatever the body is."""
    answer = client.post("/predict", {"text": "a"}, Content_Type=content_type)
    problem(answer, 415, "Unsupported Media Type", UNSUPPORTED)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nothing",
        "/predict/",
        "/predict/x",
        "/Predict",
        "/predict//",
        "/health/",
        "/health/dead",
        "/healthy",
        "/metricsfoo",
        "/metrics/",
        "/metrics\n",
        "/openapi.jsonx",
        "/openapi_json",
        "/docs/../health",
        "/docs/%2e%2e/",
        "/docs/..",
        "/docs/../",
        "/docs//",
        "/docs/swagger-ui.css/",
        "/docs/swagger-uiXcss",
        "/docs/swagger_style.css",
        "/docs/__init__.py",
        "/docs/%00",
        "/docsx",
        "/docs\n",
        "/\xff\xfe",
        "/docs/start.js/../../../etc/passwd",
        "*",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_unknown_path_is_not_found(client: Client, method: str, path: str) -> None:
    """Paths are exact, and no file but the page's own can be asked for."""
    status, headers, body = call(client, REQUEST_METHOD=method, PATH_INFO=path)
    assert status == "404 Not Found"
    assert headers["content-type"] == PROBLEM
    request_id = headers["x-request-id"]
    assert json.loads(body) == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": NOTHING,
        "request_id": request_id,
    }


def test_more_than_one_slash_at_the_beginning_counts_as_one(client: Client) -> None:
    """The router's way; it opens nothing that is not open anyway."""
    assert call(client, PATH_INFO="//health")[0] == "200 OK"
    assert call(client, PATH_INFO="//docs")[0] == "404 Not Found"


@pytest.mark.parametrize("path", ["/docs/../health", "/docs/%2e%2e/", "/docs/%2e%2e%2fhealth"])
def test_encoded_dots_lead_nowhere(client: Client, path: str) -> None:
    """The same through a client that encodes and decodes paths."""
    problem(client.get(path), 404, "Not Found", NOTHING)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        *[
            (method, path, "POST, OPTIONS")
            for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH")
            for path in ("/predict", "/square_numbers")
        ],
        *[
            (method, path, "GET, HEAD, OPTIONS")
            for method in ("POST", "PUT", "DELETE", "PATCH")
            for path in ("/health", "/health/live")
        ],
        *[
            (method, path, "GET, HEAD")
            for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH")
            for path in (*GETS[2:], *ASSETS)
        ],
    ],
)
def test_a_wrong_method_is_told_the_right_ones(client: Client, method: str, path: str, allow: str) -> None:
    """405 with Allow on every route."""
    answer = client.request(method, path, b"{}" if method in ("POST", "PUT", "PATCH") else None)
    assert answer.headers["Allow"] == allow
    if method == "HEAD":
        assert (answer.status_int, answer.body) == (405, b"")
    else:
        problem(answer, 405, "Method Not Allowed", WRONG_METHOD)


@pytest.mark.parametrize(
    ("path", "allow"), [("/predict", "POST"), ("/square_numbers", "POST"), ("/health", "GET, HEAD")]
)
def test_options_says_what_there_is(client: Client, path: str, allow: str) -> None:
    """RFC 9110 §9.3.7: 200 with Allow and no body."""
    answer = client.request("OPTIONS", path)
    assert (answer.status_int, answer.body, answer.headers["Allow"]) == (200, b"", allow)


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "BREW", "get", "post", "WEBSOCKET", "PRI", "GET\n", ""])
@pytest.mark.parametrize("path", ["/predict", "/health", "/metrics", "/docs"])
def test_a_method_that_nobody_answers_is_refused(client: Client, method: str, path: str) -> None:
    """400 or 405, as a problem with its id."""
    status, headers, body = call(client, REQUEST_METHOD=method, PATH_INFO=path)
    assert status in ("400 Bad Request", "405 Method Not Allowed")
    assert headers["content-type"] == PROBLEM
    assert json.loads(body)["request_id"] == headers["x-request-id"]


@pytest.mark.parametrize("path", [*GETS, *ASSETS])
def test_head_is_get_without_a_body(client: Client, path: str) -> None:
    """The same status and headers on every GET."""
    got = client.get(path, X_Request_ID="same")
    head = client.request("HEAD", path, X_Request_ID="same")
    assert got.status_int == head.status_int == 200
    assert got.body
    assert head.body == b""
    assert dict(head.headers) == dict(got.headers)


@pytest.mark.parametrize("path", [*GETS, *ASSETS])
def test_a_query_changes_nothing(client: Client, path: str) -> None:
    """A balancer may append one, whatever it is."""
    for query in ("a=b", "%ff%00", "&&==;;", "a[]=1&a=2", "%"):
        status, _, _ = call(client, PATH_INFO=path, QUERY_STRING=query)
        assert status == "200 OK"


def test_health_is_exactly_this(client: Client) -> None:
    """What a balancer and a probe read, and no cache keeps."""
    for path, body in (("/health", b'{"status":"healthy"}'), ("/health/live", b'{"status":"alive"}')):
        answer = client.get(path)
        assert (answer.status, answer.body) == ("200 OK", body)
        assert answer.headers["Content-Type"] == JSON
        assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("state", ["draining", "stuck"])
def test_health_says_what_the_server_knows(client: Client, state: str) -> None:
    """503 sends a balancer elsewhere; the process is alive all the same."""
    environ = {"inference_api.state": state}
    status, _, body = call(client, PATH_INFO="/health", **environ)
    assert (status, json.loads(body)) == ("503 Service Unavailable", {"status": state})
    status, _, body = call(client, PATH_INFO="/health/live", **environ)
    assert (status, json.loads(body)) == ("200 OK", {"status": "alive"})


@pytest.mark.parametrize("path", ["/predict", "/health", "/nothing"])
def test_a_fit_request_id_comes_back(client: Client, path: str) -> None:
    """On answers of every kind."""
    assert client.get(path, X_Request_ID="My.request-ID_0").headers["X-Request-ID"] == "My.request-ID_0"


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "x" * 8192, "a\x1b[31m", "a\x85b", "é", "a\r\nX-Evil: 1", "a\n"])
def test_an_unfit_request_id_is_replaced(client: Client, sent: str) -> None:
    """By a new one, the same in the header and in a problem's body."""
    _, headers, body = call(client, PATH_INFO="/nothing", HTTP_X_REQUEST_ID=sent)
    made = headers["x-request-id"]
    assert len(made) == 32
    assert int(made, 16) >= 0
    assert json.loads(body)["request_id"] == made


def test_the_servers_request_id_is_the_one(client: Client) -> None:
    """A server that has already given the request an id logs it under that one."""
    _, headers, _ = call(client, PATH_INFO="/health", HTTP_X_REQUEST_ID="sent", **{"inference_api.request_id": "given"})
    assert headers["x-request-id"] == "given"


MAX_BODY = 100


@pytest.fixture(scope="module")
def small_client() -> Client:
    """Takes bodies of up to 100 bytes."""
    return Client({"predict": DummyModel}, MAX_BODY_BYTES=str(MAX_BODY))


def test_a_body_may_be_as_long_as_the_bound(small_client: Client) -> None:
    """Not a byte longer."""
    body = b'{"text": "%b"}' % (b"x" * (MAX_BODY - len(b'{"text": ""}')))
    assert small_client.post("/predict", body).status_int == 200
    answer = small_client.post("/predict", body + b" ")
    problem(answer, 413, "Content Too Large", "The body may have at most 100 bytes.")


@pytest.mark.parametrize("length", ["101", "9" * 18, "9" * 19, "9" * 5000])
def test_a_body_that_is_announced_too_large_is_not_read(small_client: Client, length: str) -> None:
    """However many digits its length has."""
    body = Body(b'{"text": "a"}')
    status, headers, answer = call(
        small_client, REQUEST_METHOD="POST", PATH_INFO="/predict", CONTENT_LENGTH=length, **{"wsgi.input": body}
    )
    assert (status, headers["content-type"]) == ("413 Content Too Large", PROBLEM)
    assert json.loads(answer)["detail"] == "The body may have at most 100 bytes."
    assert body.read_bytes == 0


@pytest.mark.parametrize("length", ["-1", "+2", "1_0", " 1", "1.0", "x", "2,2", "²", "٣"])
def test_a_length_that_is_no_number_is_a_bad_request(client: Client, length: str) -> None:
    """Python's int() would take some of them."""
    status, _, _ = call(
        client, REQUEST_METHOD="POST", PATH_INFO="/predict", CONTENT_LENGTH=length, **{"wsgi.input": Body(b"{}")}
    )
    assert status == "400 Bad Request"


def test_a_body_shorter_than_its_length_is_a_bad_request(client: Client) -> None:
    """Even if what has come is JSON."""
    status, _, _ = call(
        client,
        REQUEST_METHOD="POST",
        PATH_INFO="/predict",
        CONTENT_LENGTH="30",
        **{"wsgi.input": Body(b'{"text": "a"}')},
    )
    assert status == "400 Bad Request"


@pytest.mark.parametrize(("size", "status"), [(13, "200 OK"), (100, "200 OK"), (101, "413 Content Too Large")])
def test_a_body_of_unknown_length_is_read_to_its_end(small_client: Client, size: int, status: str) -> None:
    """Where the server says that its input ends, as with a chunked body; the bound holds there, too."""
    body = Body(b'{"text": "a"}'.ljust(size))
    environ = {"wsgi.input": body, "wsgi.input_terminated": True}
    assert call(small_client, REQUEST_METHOD="POST", PATH_INFO="/predict", CONTENT_LENGTH="", **environ)[0] == status
    assert body.read_bytes <= MAX_BODY + 1


def test_a_body_of_unknown_length_that_may_not_end_is_not_read(client: Client) -> None:
    """A server that does not say so would make the read wait for ever."""
    body = Body(b'{"text": "a"}')
    status, _, _ = call(client, REQUEST_METHOD="POST", PATH_INFO="/predict", CONTENT_LENGTH="", **{"wsgi.input": body})
    assert (status, body.read_bytes) == ("400 Bad Request", 0)


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        (
            "/zoo",
            {"animals": [{"name": "hare", "ears": {"left-length": 2}}], "weight": 3, "scale": 0.5},
            {
                "input": {
                    "animals": [
                        {"name": "hare", "ears": {"left-length": 2.0, "right-length": 1.5}, "friends": {}},
                    ],
                    "mode": "fast",
                    "weight": 3,
                    "scale": 0.5,
                },
                "prediction": {"label": "fast", "probabilities": {"hare": 1.5}},
            },
        ),
        (
            "/zoo",
            {"animals": [], "mode": "exact", "weight": None},
            {
                "input": {"animals": [], "mode": "exact", "weight": None, "scale": 1.0},
                "prediction": {"label": "exact", "probabilities": {}},
            },
        ),
        ("/dots", {"x": 1, "label": "é"}, {"input": {"x": 1, "label": "é"}, "prediction": {"x": 1, "label": "é"}}),
        ("/swap", {"pair": [1, 2]}, {"input": [1, 2], "prediction": [2, 1]}),
        (
            "/tree",
            {"tree": {"value": 1, "children": [{"value": 2}]}},
            {"input": {"value": 1, "children": [{"value": 2, "children": []}]}, "prediction": 3},
        ),
        ("/echo", {"value": {"any": [1, None]}}, {"input": {"any": [1, None]}, "prediction": {"any": [1, None]}}),
        ("/spoiler", {"numbers": [1, 2]}, {"input": [1, 2], "prediction": 3}),
    ],
)
def test_models_of_other_shapes(fake_client: Client, path: str, body: Any, answer: Any) -> None:
    """Several parameters, defaults, nested types, structured outputs, and a model that changes its input."""
    response = fake_client.post(path, body)
    assert (response.status_int, response.json) == (200, answer)
    assert fake_client.post(path, [body, body]).json == [answer, answer]


def test_the_model_is_called_once_for_each_input_in_order() -> None:
    """And not at all for a request that is refused."""
    client = Client({"count": fakes.Counting})
    model: Any = client.schema("/count").model
    client.post("/count", [{"text": "a"}, {"text": ""}, {"text": "a"}])
    client.post("/count", [{"text": "b"}, {"text": 1}])
    client.post("/count", b'{"text": "c"')
    client.post("/count", {"text": "d"}, Content_Type="text/plain")
    client.get("/count")
    assert model.calls == ["a", "", "a"]


def test_what_is_switched_off_is_not_there() -> None:
    """DOCS and METRICS."""
    client = Client({"predict": DummyModel}, DOCS="off", METRICS="off")
    for path in [*GETS[2:], *ASSETS]:
        assert client.get(path).status_int == 404
    assert client.get("/health").status_int == 200


def test_predictions_are_counted(client: Client) -> None:
    """The metrics know how many inputs each model has predicted."""
    client = Client({"predict": DummyModel})
    client.post("/predict", [{"text": "a"}] * 3)
    client.post("/predict", {"text": "a"})
    client.post("/predict", {"text": 1})
    answer = client.get("/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'inference_api_predictions_total{model="dummy"} 4.0' in answer.text.splitlines()
