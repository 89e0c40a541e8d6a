"""API keys: what opens the model paths, what does not, and what is open anyway."""

import hmac
from collections.abc import Callable

import pytest

from inference_api.batching import Direct
from inference_api.model import DummyModel
from inference_api.resources import Prediction
from tests.app.client import Client, call, problem
from tests.fakes import schema_of

KEYS = ("first-key-0123", "second-key~!@#")
BODY = {"text": "a"}
NEEDED = "A valid key is needed: Authorization: Bearer …, or X-API-Key."


@pytest.fixture(scope="module")
def keyed() -> Client:
    """The service with two keys."""
    return Client({"predict": DummyModel}, API_KEYS=",".join(KEYS))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "headers",
    [
        lambda key: {"Authorization": f"Bearer {key}"},
        lambda key: {"Authorization": f"bearer  {key} "},
        lambda key: {"X_API_Key": key},
        lambda key: {"X_API_Key": key, "Authorization": "Basic dTpw"},
    ],
    ids=["bearer", "spaces", "x-api-key", "both"],
)
def test_each_key_opens(keyed: Client, key: str, headers: Callable[[str], dict[str, str]]) -> None:
    """In either header."""
    assert keyed.post("/predict", BODY, **headers(key)).json == {"input": "a", "prediction": "predicted(a)"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": KEYS[0]},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": f"Bearer{KEYS[0]}"},
        {"Authorization": f"Bearer {KEYS[0]}x"},
        {"Authorization": f"Bearer {KEYS[0][:-1]}"},
        {"Authorization": f"Bearer {KEYS[0].upper()}"},
        {"Authorization": f"Bearer {KEYS[0]},{KEYS[1]}"},
        {"X_API_Key": ""},
        {"X_API_Key": "wrong"},
        {"X_API_Key": f"Bearer {KEYS[0]}"},
        {"X_API_Key": "wrong", "Authorization": f"Bearer {KEYS[0]}"},
        {"X_API_Key": "\xff\xfe-key"},
        {"X_API_Key": "schlüssel"},
        {"Authorization": "Bearer \xe9\x80"},
        {"Cookie": f"key={KEYS[0]}"},
    ],
    ids=repr,
)
def test_nothing_else_opens(keyed: Client, headers: dict[str, str]) -> None:
    """401 with WWW-Authenticate, whatever the bytes; what was sent is not told."""
    answer = keyed.post("/predict", BODY, **headers)
    problem(answer, 401, "Unauthorized", NEEDED)
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="inference-api"'


def test_a_key_in_the_query_does_not_open(keyed: Client) -> None:
    """Queries end up in logs."""
    assert keyed.post(f"/predict?api_key={KEYS[0]}&key={KEYS[0]}", BODY).status_int == 401


@pytest.mark.parametrize(
    ("body", "headers"),
    [(b"not JSON", {}), (b"{}", {}), (b'{"text": "a"}', {"Content_Type": "text/plain"}), (b"x" * 2_000_000, {})],
    ids=["malformed", "wrong shape", "wrong type", "too large"],
)
def test_without_a_key_nothing_else_is_looked_at(keyed: Client, body: bytes, headers: dict[str, str]) -> None:
    """Who has no key learns nothing about the model."""
    assert keyed.post("/predict", body, **headers).status_int == 401


@pytest.mark.parametrize("path", ["/health", "/health/live", "/metrics", "/docs", "/openapi.json", "/docs/start.js"])
def test_health_metrics_and_docs_stay_open(keyed: Client, path: str) -> None:
    """Balancers, probes and Prometheus have no keys."""
    assert keyed.get(path).status_int == 200
    assert keyed.request("HEAD", path).status_int == 200


def test_without_keys_everything_is_open(client: Client) -> None:
    """API_KEYS is empty by default, and a key that is sent all the same does no harm."""
    assert client.post("/predict", BODY, X_API_Key="any").status_int == 200


def test_the_document_says_that_keys_are_needed(keyed: Client, client: Client) -> None:
    """And says nothing of them where they are not."""
    operation = keyed.document["paths"]["/predict"]["post"]
    assert operation["security"] == [{"bearer": []}, {"api_key": []}]
    assert "401" in operation["responses"]
    assert set(keyed.document["components"]["securitySchemes"]) == {"bearer", "api_key"}
    assert "security" not in client.document["paths"]["/predict"]["post"]
    assert "401" not in client.document["paths"]["/predict"]["post"]["responses"]


class Key(bytes):
    """A key that may only be compared in constant time."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("a key was compared in a time that tells how much of it is right")

    def __hash__(self) -> int:
        raise AssertionError("a key was looked up")

    startswith = __eq__  # type: ignore[assignment]


@pytest.mark.parametrize(("sent", "status"), [(KEYS[0], 200), (KEYS[1], 200), ("wrong", 401), ("\xff", 401)])
def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, sent: str, status: int) -> None:
    """Every key goes through hmac.compare_digest, the right one's followers too, and no key through anything else."""
    compared: list[tuple[bytes, bytes]] = []

    def compare_digest(key: bytes, given: bytes) -> bool:
        compared.append((bytes(key), given))
        return compare(key, given)

    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    client = Client({"predict": DummyModel})
    client.app.add_route(
        "/predict",
        Prediction(
            schema_of(DummyModel),
            Direct(lambda _text: "predicted"),
            api_keys=tuple(Key(key.encode()) for key in KEYS),
            max_body_bytes=100,
            predicted=lambda path, inputs: None,
        ),
    )
    body = b'{"text": "a"}'
    answer, _, _ = call(
        client,
        REQUEST_METHOD="POST",
        PATH_INFO="/predict",
        CONTENT_LENGTH=str(len(body)),
        HTTP_X_API_KEY=sent,
        **{"wsgi.input": Input(body)},
    )
    assert int(answer[:3]) == status
    assert compared == [(key.encode(), sent.encode("latin-1")) for key in KEYS]


class Input:
    """A wsgi.input that holds these bytes."""

    def __init__(self, data: bytes) -> None:
        self.read = lambda size: data[:size]
