"""Whatever is sent to whatever path: never a 5xx; and of JSON the document says whether it is taken."""

import io
import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference_api.model import MAX_MAGNITUDE
from tests.app.client import JSON, PROBLEM, Client, call, strict_json

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
edges = st.sampled_from(
    [0, -0.0, 1e308, 5e-324, 2**63, 2**64, -(2**63), 10**400, MAX_MAGNITUDE, MAX_MAGNITUDE + 1, float(MAX_MAGNITUDE)]
)
scalars = st.none() | st.booleans() | numbers | edges | text
names = text | st.sampled_from(
    ["text", "numbers", "value", "animals", "name", "ears", "left-length", "mode", "tree", "children", "which", "how"]
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4))
inputs = st.fixed_dictionaries(
    {},
    optional={
        "text": text | values,
        "numbers": st.lists(numbers | edges, max_size=4) | values,
        "value": values,
        "animals": st.lists(st.fixed_dictionaries({"name": text, "ears": values}), max_size=2) | values,
        "which": text | values,
        "x": numbers | values,
        "pair": st.lists(st.integers(), min_size=1, max_size=3) | values,
        "tree": st.fixed_dictionaries({"value": st.integers()}, optional={"children": values}) | values,
    },
)
bodies = values | inputs | st.lists(inputs, max_size=3)
examples = settings(
    max_examples=200,
    derandomize=True,  # a run fails for what has changed, not by chance
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def resolve(pointer: str, value: Any) -> Any:
    """What an RFC 6901 pointer points to."""
    for step in pointer.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        value = value[int(name)] if isinstance(value, list) else value[name]
    return value


def check(client: Client, path: str, body: Any) -> Any:
    """200 with as many predictions as inputs, or 422 with a pointer that leads somewhere in the body."""
    answer = client.post(path, body)
    content = strict_json(answer.body)
    if answer.status_int == 200:
        assert isinstance(content, list) == isinstance(body, list)
        if isinstance(body, list):
            assert len(content) == len(body)
        assert answer.headers["Content-Type"] == JSON
    else:
        assert answer.status_int == 422
        assert content["request_id"] == answer.headers["X-Request-ID"]
        for error in content["errors"]:
            resolve(error["pointer"], body)
    return answer.status_int


@pytest.mark.parametrize("path", ["/predict", "/square_numbers"])
@examples
@given(body=bodies)
def test_the_document_tells_the_truth(client: Client, path: str, body: Any) -> None:
    """What fits the documented schema is answered, and what does not is refused: for any JSON value."""
    fits = client.documented(path, "request").is_valid(body)
    assert check(client, path, body) == (200 if fits else 422)


@examples
@given(path=st.sampled_from(["/echo", "/zoo", "/dots", "/tree", "/swap", "/picky", "/picky_batch"]), body=bodies)
def test_any_json_is_answered(fake_client: Client, path: str, body: Any) -> None:
    """200 or 422, by correct models of every shape, and 200 only for what fits the documented schema."""
    if check(fake_client, path, body) == 200:
        fake_client.documented(path, "request").validate(body)


@examples
@given(path=st.sampled_from(["/predict", "/square_numbers", "/echo", "/zoo"]), data=st.data())
def test_any_bytes_are_answered(client: Client, fake_client: Client, path: str, data: st.DataObject) -> None:
    """JSON cut off, changed or followed by more: 200 or 4xx, and 400 wherever it is not JSON."""
    chosen = client if path in client.document["paths"] else fake_client
    body = bytearray(json.dumps(data.draw(bodies), ensure_ascii=data.draw(st.booleans())).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(body)))
        body[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    answer = chosen.post(path, bytes(body))
    strict_json(answer.body)
    assert answer.status_int in (200, 400, 422)
    assert (answer.status_int == 400) == (not is_json(bytes(body)))


latin = st.text(st.characters(max_codepoint=0xFF), max_size=12)
paths = st.sampled_from(["/predict", "/square_numbers", "/health", "/metrics", "/docs", "/openapi.json"])
fields = st.sampled_from(
    ["X_REQUEST_ID", "TRACEPARENT", "AUTHORIZATION", "X_API_KEY", "HOST", "ACCEPT", "COOKIE", "RANGE", "IF_NONE_MATCH"]
)


@examples
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "OPTIONS", "TRACE"]) | latin,
    path=paths | st.builds("/{}".format, latin) | st.builds("{}{}".format, paths, latin),
    query=latin,
    headers=st.dictionaries(fields, latin),
    content_type=st.sampled_from(["", JSON, f"{JSON};charset=x"]) | latin,
    content_length=st.none() | st.integers(-1, 20).map(str) | latin,
    body=st.sampled_from([b'{"text": "a"}', b"[]"]) | st.binary(max_size=20),
)
def test_any_request_is_answered(client: Client, headers: dict[str, str], body: bytes, **environ: Any) -> None:
    """Whatever the target and the headers are: never a 5xx, and an error is a problem with the id of its header."""
    length = environ["content_length"]
    status, answered, content = call(
        client,
        REQUEST_METHOD=environ["method"],
        PATH_INFO=environ["path"],
        QUERY_STRING=environ["query"],
        CONTENT_TYPE=environ["content_type"],
        CONTENT_LENGTH=str(len(body)) if length is None else length,
        **{"wsgi.input": io.BytesIO(body)},
        **{f"HTTP_{name}": value for name, value in headers.items()},
    )
    assert status < "5"
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answered["x-request-id"])
    if status >= "4" and environ["method"] != "HEAD":
        assert answered["content-type"] == PROBLEM
        problem = strict_json(content)
        assert problem["request_id"] == answered["x-request-id"]
        assert status == f"{problem['status']} {problem['title']}"


def is_json(body: bytes) -> bool:
    """Whether Python's own decoder takes it, strictly, and every number is finite."""

    def finite(digits: str) -> float:
        number = float(digits)
        if number in (float("inf"), float("-inf")):
            raise ValueError
        return number

    def refuse(name: str) -> Any:
        raise ValueError(name)

    try:
        value = json.loads(body.decode(), parse_constant=refuse, parse_float=finite)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is not text
    except (ValueError, RecursionError):
        return False
    return True
