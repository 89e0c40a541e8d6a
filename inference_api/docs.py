"""What clients read: the OpenAPI document of exactly what is served, and Swagger UI from local files."""

import functools
import importlib.util
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import falcon
import msgspec

from inference_api import __version__, problems
from inference_api.schema import Schema

REFERENCE = "#/components/schemas/{name}"
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
)
ASSET_CACHE_CONTROL = "public, max-age=3600"

_SECURITY_HEADERS = (("Content-Security-Policy", CONTENT_SECURITY_POLICY), ("X-Content-Type-Options", "nosniff"))
_JAVASCRIPT = "text/javascript; charset=utf-8"
_ASSETS = {
    "swagger-ui-bundle.js": ("swagger_bundle.js", _JAVASCRIPT),
    "swagger-ui.css": ("swagger_style.css", "text/css; charset=utf-8"),
}

_PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Inference API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_START_SCRIPT = b"""window.ui = SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  presets: [SwaggerUIBundle.presets.apis],
  validatorUrl: null,
});
"""

_PROBLEMS = {
    "400": "Not JSON, or not a valid request.",
    "401": "The key is missing or wrong.",
    "413": "The body is too large.",
    "415": "The content type is not application/json.",
    "422": "The body does not fit the schema; `errors` says where.",
    "500": "The model failed.",
    "503": "Overloaded or starting; try again after `Retry-After`.",
    "504": "The answer took too long.",
    "default": "Any other error.",
}
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_TEXT = {"type": "string"}
_HEADERS = {
    "X-Model": {"description": "The model's name and version.", "schema": _TEXT},
    "X-Request-ID": {"description": "The request's id.", "schema": _TEXT},
}


class Status(msgspec.Struct):
    """The state of the service."""

    status: str


def openapi(schemas: Sequence[Schema], *, with_keys: bool, with_metrics: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the service."""
    types = [problems.Problem, Status, *(t for schema in schemas for t in (schema.request_type, schema.answer_type))]
    (problem, status, *model_types), components = msgspec.json.schema_components(types, ref_template=REFERENCE)
    paths = {
        "/health": _get("health", "Ready for requests.", "application/json", status),
        "/health/live": _get("live", "The process works.", "application/json", status),
    }
    unhealthy = "Starting, draining or stuck."
    paths["/health"]["get"]["responses"]["503"] = _content(unhealthy, "application/json", status)
    paths["/health"]["head"]["responses"]["503"] = {"description": unhealthy}
    for schema, request, answer in zip(schemas, model_types[::2], model_types[1::2], strict=True):
        paths[schema.path] = {"post": _post(schema, request, answer, with_keys)}
    if with_metrics:
        paths["/metrics"] = _get("metrics", "Metrics for Prometheus.", "text/plain", _TEXT)
    paths["/openapi.json"] = _get("openapi", "This document.", "application/json", {"type": "object"})
    paths["/docs"] = _get("docs", "This document as a page.", "text/html", _TEXT)
    answers = {code: _content(words, problems.MEDIA_TYPE, problem) for code, words in _PROBLEMS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Inference API", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": answers,
            **({"securitySchemes": _SECURITY_SCHEMES} if with_keys else {}),  # an empty one has a button on the page
        },
    }


def _content(description: str, media_type: str, schema: Any) -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _problems(*codes: str) -> dict[str, Any]:
    return {code: {"$ref": f"#/components/responses/{code}"} for code in (*codes, "default")}


def _get(operation: str, summary: str, media_type: str, schema: Any) -> dict[str, Any]:
    def method(name: str, answer: dict[str, Any]) -> dict[str, Any]:
        return {"operationId": name, "summary": summary, "responses": {"200": answer, **_problems()}}

    return {
        "get": method(operation, _content(summary, media_type, schema)),
        "head": method(f"{operation}_head", {"description": summary}),
    }


def _post(schema: Schema, request: Any, answer: Any, with_keys: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"schema": request}
    if example := _example(schema):
        body["example"] = example
    success = _content("The prediction, or an array of them in the order of the inputs.", "application/json", answer)
    codes = [code for code in _PROBLEMS if code != "401" or with_keys]
    operation: dict[str, Any] = {
        "operationId": schema.path[1:],
        "summary": f"{schema.model.name} {schema.model.version}",
        "description": inspect.getdoc(type(schema.model)) or "",
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {"200": success | {"headers": _HEADERS}, **_problems(*codes)},
    }
    if with_keys:
        operation["security"] = [{name: []} for name in _SECURITY_SCHEMES]
    return operation


def _example(schema: Schema) -> dict[str, Any]:
    """An input made of the examples in the parameters' Meta; empty where one has none."""
    example = {}
    for name, hint in schema.input_type.__annotations__.items():
        metas = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        if not (examples := [meta.examples[0] for meta in metas if meta.examples]):
            return {}
        example[name] = examples[0]
    return example


def add_get(
    app: "falcon.App[Any, Any]", path: str, media_type: str, content: Callable[[], bytes], *headers: tuple[str, str]
) -> None:
    """Serve what `content` returns at this path, to GET and HEAD."""

    def sink(req: falcon.Request, resp: falcon.Response, **_: Any) -> None:  # which gets requests of every method
        if req.method not in ("GET", "HEAD"):
            raise falcon.HTTPMethodNotAllowed(["GET", "HEAD"])
        resp.content_type = media_type
        resp.data = content()
        resp.set_headers(headers)

    app.add_sink(sink, re.escape(path) + r"\Z")


def add_docs(app: "falcon.App[Any, Any]", document: dict[str, Any]) -> None:
    """Serve `/openapi.json`, `/docs` and the files of the page."""
    spec = importlib.util.find_spec("offapi")  # found, not imported: the package reads all of its files
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("offapi is not installed")
    folder = Path(spec.origin).parent
    encoded = msgspec.json.encode(document)

    def add(path: str, media_type: str, content: Callable[[], bytes], cache_control: str) -> None:
        add_get(app, path, media_type, content, ("Cache-Control", cache_control), *_SECURITY_HEADERS)

    add("/openapi.json", "application/json", lambda: encoded, "no-cache")
    for path in ("/docs", "/docs/"):
        add(path, "text/html; charset=utf-8", lambda: _PAGE, "no-cache")
    add("/docs/start.js", _JAVASCRIPT, lambda: _START_SCRIPT, ASSET_CACHE_CONTROL)
    for name, (file_name, media_type) in _ASSETS.items():
        read = functools.cache((folder / file_name).resolve(strict=True).read_bytes)
        add(f"/docs/{name}", media_type, read, ASSET_CACHE_CONTROL)
