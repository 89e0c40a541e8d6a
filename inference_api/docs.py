"""What clients read: the OpenAPI document of exactly what is served, and Swagger UI from local files."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import falcon
import msgspec

from inference_api import __version__, problems
from inference_api.model import ModelError
from inference_api.schema import Schema

SCHEMAS = "#/components/schemas/"
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
)
ASSET_CACHE_CONTROL = "public, max-age=3600"

_ASSETS = {
    "swagger-ui-bundle.js": ("swagger_bundle.js", "text/javascript; charset=utf-8"),
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
    400: "Not JSON, or not a valid request.",
    401: "The key is missing or wrong.",
    413: "The body is too large.",
    415: "The content type is not application/json.",
    422: "The body does not fit the schema; `errors` says where.",
    500: "The model failed.",
    503: "Overloaded or starting; try again after `Retry-After`.",
    504: "The answer took too long.",
}


class _FieldError(msgspec.Struct):
    pointer: str
    detail: str


class Problem(msgspec.Struct):
    """Problem details (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[_FieldError] | msgspec.UnsetType = msgspec.UNSET


class Status(msgspec.Struct):
    """The state of the service."""

    status: str


def openapi(
    schemas: Sequence[Schema], *, with_keys: bool, with_metrics: bool, with_docs: bool = True
) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the service."""
    types = [Problem, Status, *(t for schema in schemas for t in (schema.request_type, schema.answer_type))]
    try:
        (problem, status, *model_types), components = msgspec.json.schema_components(
            types, ref_template=SCHEMAS + "{name}"
        )
    except (TypeError, ValueError) as exc:
        raise ModelError(f"MODELS: no OpenAPI document can be made: {exc}") from exc
    problem_content = {problems.MEDIA_TYPE: {"schema": problem}}

    def problem_answers(*codes: int) -> dict[str, Any]:
        answers = {str(code): {"description": _PROBLEMS[code], "content": problem_content} for code in codes}
        return answers | {"default": {"description": "Any other error.", "content": problem_content}}

    def get(operation: str, summary: str, media_type: str, schema: Any, **more: Any) -> dict[str, Any]:
        answer = {"description": summary, "content": {media_type: {"schema": schema}}}
        method = {"summary": summary, "responses": {"200": answer, **more, **problem_answers()}}
        bodiless = {code: {"description": more[code]["description"]} for code in more}
        head = {"summary": summary, "responses": {"200": {"description": summary}, **bodiless, **problem_answers()}}
        return {"get": {"operationId": operation, **method}, "head": {"operationId": f"{operation}_head", **head}}

    unhealthy = {"description": "starting, draining or stuck", "content": {"application/json": {"schema": status}}}
    text = {"type": "string"}
    paths: dict[str, Any] = {
        "/health": get("health", "Ready for requests.", "application/json", status, **{"503": unhealthy}),
        "/health/live": get("live", "The process works.", "application/json", status),
    }
    codes = [400, 401, 413, 415, 422, 500, 503, 504]
    if not with_keys:
        codes.remove(401)
    for schema, request, answer in zip(schemas, model_types[::2], model_types[1::2], strict=True):
        body: dict[str, Any] = {"schema": request}
        if (example := _example(schema)) is not None:
            body["example"] = example
        operation: dict[str, Any] = {
            "operationId": schema.path[1:],
            "summary": f"{schema.model.name} {schema.model.version}",
            "requestBody": {"required": True, "content": {"application/json": body}},
            "responses": {
                "200": {
                    "description": "The prediction, or an array of them in the order of the inputs.",
                    "headers": {
                        "X-Model": {"description": "The model's name and version.", "schema": text},
                        "X-Request-ID": {"description": "The request's id.", "schema": text},
                    },
                    "content": {"application/json": {"schema": answer}},
                },
                **problem_answers(*codes),
            },
        }
        if description := type(schema.model).__doc__:
            operation["description"] = description
        if with_keys:
            operation["security"] = [{"bearer": []}, {"api_key": []}]
        paths[schema.path] = {"post": operation}
    if with_metrics:
        paths["/metrics"] = get("metrics", "Metrics for Prometheus.", "text/plain", text)
    if with_docs:
        paths["/openapi.json"] = get("openapi", "This document.", "application/json", {"type": "object"})
        paths["/docs"] = get("docs", "This document as a page.", "text/html", text)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Inference API", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if with_keys:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
    return document


def _example(schema: Schema) -> dict[str, Any] | None:
    example: dict[str, Any] = {}
    for name, hint in schema.input_type.__annotations__.items():
        metas = [meta for meta in get_args(hint)[1:] if get_origin(hint) is Annotated and meta.examples]
        if not metas:
            return None
        example[name] = metas[0].examples[0]
    return example


def require_get(req: falcon.Request) -> None:
    """A sink answers every method: refuse those that a page or a document has no answer to."""
    if req.method not in ("GET", "HEAD"):
        raise falcon.HTTPMethodNotAllowed(["GET", "HEAD"])


def add_docs(app: "falcon.App[Any, Any]", document: dict[str, Any]) -> None:
    """Serve `/openapi.json`, `/docs` and the files of the page."""
    spec = importlib.util.find_spec("offapi")  # found, not imported: the package reads all of its files
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("offapi is not installed")
    folder = Path(spec.origin).parent
    encoded = msgspec.json.encode(document)

    def serve(media_type: str, content: Callable[[], bytes], cache_control: str) -> Callable[..., None]:
        def sink(req: falcon.Request, resp: falcon.Response, **_: Any) -> None:
            require_get(req)
            resp.content_type = media_type
            resp.data = content()
            resp.set_header("Cache-Control", cache_control)
            resp.set_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
            resp.set_header("X-Content-Type-Options", "nosniff")

        return sink

    javascript = "text/javascript; charset=utf-8"
    app.add_sink(serve("application/json", lambda: encoded, "no-cache"), r"/openapi\.json\Z")
    app.add_sink(serve("text/html; charset=utf-8", lambda: _PAGE, "no-cache"), r"/docs/?\Z")
    app.add_sink(serve(javascript, lambda: _START_SCRIPT, ASSET_CACHE_CONTROL), r"/docs/start\.js\Z")
    for name, (file_name, media_type) in _ASSETS.items():
        path = (folder / file_name).resolve(strict=True)
        app.add_sink(serve(media_type, path.read_bytes, ASSET_CACHE_CONTROL), rf"/docs/{name.replace('.', r'[.]')}\Z")
