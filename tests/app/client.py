"""A client of the WSGI application: WebTest, with both sides checked, and every answer held against the document."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

from jsonschema import Draft202012Validator
from webtest import TestApp, TestResponse

from inference_api.app import create_app
from inference_api.config import Settings
from inference_api.docs import openapi
from inference_api.metrics import Metrics
from inference_api.schema import Schema
from tests.fakes import schema_of, spec_of

PROBLEM = "application/problem+json"
JSON = "application/json"


class Client:
    """Sends requests to the application that serves these models, by their paths, with these settings."""

    def __init__(self, models: Mapping[str, type], **variables: str) -> None:
        specs = ",".join(str(spec_of(model, path)) for path, model in models.items())
        self.settings = Settings.from_environ({"MODELS": specs, **variables})
        self.schemas = {path: schema_of(model, path) for path, model in models.items()}
        self.app = create_app(self.settings, [*self.schemas.values()], Metrics(self.settings.model_paths))
        self.document = openapi(
            [*self.schemas.values()],
            with_keys=bool(self.settings.api_keys),
            with_metrics=self.settings.metrics,
        )
        self._client = TestApp(validator(self.app))

    def schema(self, path: str) -> Schema:
        return self.schemas[path.removeprefix("/")]

    def get(self, path: str, **headers: str) -> TestResponse:
        return self.request("GET", path, None, **headers)

    def post(self, path: str, body: Any = b"", **headers: str) -> TestResponse:
        """What is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data, **headers)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> TestResponse:
        """Header names are written with underscores."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        more = {} if body is None else {"body": body}
        answer = self._client.request(path, method=method, headers=names, expect_errors=True, **more)
        self._check(method, path.partition("?")[0], answer)
        return answer

    def _check(self, method: str, path: str, answer: TestResponse) -> None:
        assert answer.headers.getall("X-Request-ID")[1:] == []
        if answer.status_int >= 400 and answer.content_type != JSON:
            assert answer.headers["Content-Type"] == PROBLEM
        operation = self.document["paths"].get(path, {}).get(method.lower())
        if operation is None or method == "HEAD":
            return
        documented = operation["responses"].get(str(answer.status_int)) or operation["responses"]["default"]
        if "$ref" in documented:
            documented = self.document["components"]["responses"][documented["$ref"].rpartition("/")[2]]
        content = documented["content"][answer.content_type]["schema"]
        if answer.content_type in (JSON, PROBLEM):
            self.validator(json.dumps(content)).validate(strict_json(answer.body))

    @functools.cache  # noqa: B019 - as many as there are schemas
    def validator(self, schema: str) -> Draft202012Validator:
        """Of a schema in the document, given as JSON."""
        whole = {**json.loads(schema), "components": self.document["components"]}
        Draft202012Validator.check_schema(whole)
        return Draft202012Validator(whole)

    def documented(self, path: str, side: str) -> Draft202012Validator:
        """Of what a model's path takes (`request`) or gives (`answer`)."""
        operation = self.document["paths"][path]["post"]
        body = operation["requestBody"] if side == "request" else operation["responses"]["200"]
        return self.validator(json.dumps(body["content"][JSON]["schema"]))


def strict_json(body: bytes) -> Any:
    """JSON as RFC 8259 has it: no NaN, no Infinity, no key twice."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} in {body!r}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), body
        return dict(pairs)

    value = json.loads(body.decode(), parse_constant=refuse, object_pairs_hook=unique)
    json.dumps(value, ensure_ascii=False).encode()  # no lone surrogate
    return value


def problem(
    answer: TestResponse, status: int, title: str, detail: str, errors: list[dict[str, str]] | None = None
) -> None:
    """The answer is exactly this problem, and its id is that of the header."""
    expected: dict[str, Any] = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        "request_id": answer.headers["X-Request-ID"],
    }
    if errors is not None:
        expected["errors"] = errors
    assert strict_json(answer.body) == expected
    assert list(strict_json(answer.body)) == list(expected)
    assert answer.status == f"{status} {title}"
    assert answer.headers["Content-Type"] == PROBLEM


def call(client: Client, **environ: Any) -> tuple[str, dict[str, str], bytes]:
    """An answer to an environ that WebTest would not send."""
    return call_app(client.app, environ)


def call_app(app: Callable[..., Iterable[bytes]], environ: dict[str, Any]) -> tuple[str, dict[str, str], bytes]:
    """The same of any WSGI application."""
    setup_testing_defaults(environ)
    begun: list[tuple[str, dict[str, str]]] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        begun.append((status, {name.lower(): value for name, value in headers}))

    body = b"".join(app(environ, start_response))
    return *begun[0], body
