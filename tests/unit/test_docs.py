"""The OpenAPI document: valid, complete, and with the bounds of the models in it."""

import json
from typing import Any

import msgspec
import openapi_spec_validator
import pytest
from jsonschema import Draft202012Validator

from inference_api.docs import openapi
from inference_api.model import DummyModel, SquareNumbersModel
from tests import fakes
from tests.fakes import schema_of

OWN = [schema_of(DummyModel, "predict"), schema_of(SquareNumbersModel, "square_numbers")]


class Problem(msgspec.Struct, forbid_unknown_fields=True):
    """Has the name of a type of the service's own."""

    x: int


class Clash(fakes.Fake):
    """Has a type whose name another has."""

    def predict(self, problem: Problem) -> Problem:
        return problem


EVERYTHING = [
    *OWN,
    schema_of(fakes.Zoo, "zoo"),
    schema_of(fakes.Dots, "dots"),
    schema_of(fakes.Sum, "tree"),
    schema_of(fakes.Swap, "a-b"),
    schema_of(fakes.Swap, "a_b"),
    schema_of(fakes.Echo, "A_B"),
    schema_of(Clash, "clash"),
]


@pytest.mark.parametrize("schemas", [[], OWN, EVERYTHING], ids=["none", "own", "everything"])
@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("with_metrics", [False, True])
def test_the_document_is_valid_openapi(schemas: Any, with_keys: bool, with_metrics: bool) -> None:
    """Version 3.1, by a validator of others, and its schemas by JSON Schema 2020-12."""
    document = openapi(schemas, with_keys=with_keys, with_metrics=with_metrics)
    assert document["openapi"] == "3.1.0"
    openapi_spec_validator.validate(document)
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    assert json.loads(msgspec.json.encode(document)) == document
    identifiers = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(set(identifiers)) == len(identifiers)


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_every_reference_leads_somewhere_and_nothing_is_left_over() -> None:
    """Models may share paths but for their case or a hyphen, and names of types."""
    document = openapi(EVERYTHING, with_keys=True, with_metrics=True)
    components = document["components"]
    found = {f"#/components/{kind}/{name}" for kind in ("schemas", "responses") for name in components[kind]}
    assert references(document) == found


def test_bounds_stand_in_the_document() -> None:
    """What a client must keep to is told before it is refused."""
    components = openapi(OWN, with_keys=False, with_metrics=True)["components"]["schemas"]
    assert components["predict_input"] == {
        "title": "predict_input",
        "type": "object",
        "properties": {"text": {"type": "string", "minLength": 1, "maxLength": 10_000, "examples": ["Hello"]}},
        "required": ["text"],
        "additionalProperties": False,
    }
    assert components["square_numbers_input"]["properties"]["numbers"] == {
        "type": "array",
        "minItems": 1,
        "maxItems": 10_000,
        "items": {
            "anyOf": [
                {"type": "integer", "minimum": -3_037_000_499, "maximum": 3_037_000_499},
                {"type": "number", "minimum": -3_037_000_499, "maximum": 3_037_000_499},
            ]
        },
        "examples": [[1, 2, 3]],
    }


def test_an_operation_is_described() -> None:
    """One input or an array of up to 1,000, an example to try out, and each problem by one description."""
    document = openapi(OWN, with_keys=False, with_metrics=True)
    post = document["paths"]["/predict"]["post"]
    reference = {"$ref": "#/components/schemas/predict_input"}
    assert post["summary"] == "dummy 1.0.0"
    assert post["description"] == DummyModel.__doc__
    assert post["requestBody"]["required"] is True
    assert post["requestBody"]["content"] == {
        "application/json": {
            "schema": {"anyOf": [{"type": "array", "items": reference, "maxItems": 1000}, reference]},
            "example": {"text": "Hello"},
        }
    }
    assert list(post["responses"]) == ["200", "400", "413", "415", "422", "500", "503", "504", "default"]
    assert post["responses"]["422"] == {"$ref": "#/components/responses/422"}
    assert set(post["responses"]["200"]["headers"]) == {"X-Model", "X-Request-ID"}
    assert set(document["components"]["responses"]["422"]["content"]) == {"application/problem+json"}


def test_an_example_needs_one_of_every_parameter() -> None:
    """A half example would be refused when tried out."""
    paths = openapi(EVERYTHING, with_keys=False, with_metrics=True)["paths"]
    assert "example" not in paths["/zoo"]["post"]["requestBody"]["content"]["application/json"]
