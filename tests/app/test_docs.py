"""The document and the page as they are served: of exactly what there is, from local files."""

import re

import pytest

from inference_api.model import DummyModel, SquareNumbersModel
from tests.app.client import Client


@pytest.mark.parametrize("variables", [{}, {"METRICS": "off"}, {"API_KEYS": "12345678"}])
def test_the_document_is_of_exactly_what_is_served(variables: dict[str, str]) -> None:
    """Every operation in it is answered, and every path that is served stands in it."""
    client = Client({"predict": DummyModel, "square_numbers": SquareNumbersModel}, **variables)
    document = client.get("/openapi.json").json
    assert document == client.document
    paths = {"/health", "/health/live", "/predict", "/square_numbers", "/openapi.json", "/docs", "/metrics"}
    assert set(document["paths"]) == paths - ({"/metrics"} if "METRICS" in variables else set())
    for path, item in document["paths"].items():
        for method in item:
            answer = client.request(method.upper(), path, b"{}" if method == "post" else None)
            assert answer.status_int in (200, 401, 422)
            assert str(answer.status_int) in item[method]["responses"]


def test_the_page_asks_no_other_host(client: Client) -> None:
    """Scripts and styles are its own, and the policy lets no other in."""
    page = client.get("/docs")
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Content-Security-Policy"].startswith("default-src 'self';")
    linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert linked == ["data:,", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js", "/docs/start.js"]
    for path, media_type in [
        ("/docs/swagger-ui.css", "text/css; charset=utf-8"),
        ("/docs/swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
        ("/docs/start.js", "text/javascript; charset=utf-8"),
    ]:
        asset = client.get(path)
        assert asset.headers["Content-Type"] == media_type
        assert asset.headers["Cache-Control"] == "public, max-age=3600"
        assert b"://unpkg" not in asset.body
        assert b"://cdn" not in asset.body
    assert '"/openapi.json"' in client.get("/docs/start.js").text
    assert client.get("/openapi.json").headers["Cache-Control"] == "no-cache"


def test_the_page_is_swagger_ui_5(client: Client) -> None:
    """OpenAPI 3.1 needs it."""
    assert re.search(rb'PACKAGE_VERSION:"5\.\d+\.\d+"', client.get("/docs/swagger-ui-bundle.js").body)
