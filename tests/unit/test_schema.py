"""A model's signature as its schema: what is decoded, what is refused and where, and what is encoded."""

import dataclasses
import json
from collections.abc import Callable
from typing import Annotated, Any, Generic, NamedTuple, NewType, TypedDict, TypeVar

import msgspec
import pytest
from msgspec import Meta

from inference_api.model import DummyModel, InferenceError, ModelError, SquareNumbersModel
from inference_api.schema import MAX_INPUTS, MAX_NESTING, MalformedError, Schema, ShapeError
from tests.fakes import Dots, Echo, Fake, Liar, Sum, Swap, Zoo, schema_of

TEXT = schema_of(DummyModel)
NUMBERS = schema_of(SquareNumbersModel)
ZOO = schema_of(Zoo)
EARS = {"left-length": 1.0, "right-length": 1.5}


def refusal(schema: Schema, body: Any) -> tuple[str, str]:
    with pytest.raises(ShapeError) as caught:
        schema.decode(body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value.pointer, caught.value.detail


def answer(schema: Schema, body: Any) -> Any:
    """The answer to a body from the schema's own model."""
    inputs, is_array = schema.decode(json.dumps(body).encode())
    echoes = schema.encode_inputs(inputs)
    return json.loads(schema.encode_answer(echoes, [schema.call(value) for value in inputs], is_array))


def test_one_parameter_is_the_bare_value() -> None:
    """What the model gets and what is echoed is the value itself."""
    assert TEXT.decode(b'{"text": "Hello"}') == (["Hello"], False)
    assert TEXT.decode(b'[{"text": "a"}, {"text": "b"}]') == (["a", "b"], True)
    assert TEXT.decode(b"[]") == ([], True)
    assert answer(TEXT, {"text": "Hello"}) == {"input": "Hello", "prediction": "predicted(Hello)"}
    assert answer(TEXT, []) == []


def test_several_parameters_are_a_dict() -> None:
    """All of them stand in it, with the values that were used, defaults included."""
    body = {"animals": [{"name": "hare", "ears": {"left-length": 1}}], "weight": 2}
    inputs, is_array = ZOO.decode(json.dumps(body).encode())
    assert not is_array
    assert list(inputs[0]) == ["animals", "mode", "weight", "scale"]
    assert answer(ZOO, body) == {
        "input": {
            "animals": [{"name": "hare", "ears": EARS, "friends": {}}],
            "mode": "fast",
            "weight": 2,
            "scale": 1.0,
        },
        "prediction": {"label": "fast", "probabilities": {"hare": 2.0}},
    }


def test_structured_outputs_are_objects_or_arrays() -> None:
    """A dataclass is an object, a NamedTuple an array."""
    assert answer(schema_of(Dots), {"x": 1}) == {
        "input": {"x": 1, "label": None},
        "prediction": {"x": 1, "label": None},
    }
    assert answer(schema_of(Swap), {"pair": [1, 2]}) == {"input": [1, 2], "prediction": [2, 1]}


def test_a_type_may_contain_itself() -> None:
    """A tree is a type like any other."""
    tree = {"value": 1, "children": [{"value": 2, "children": []}]}
    assert answer(schema_of(Sum), {"tree": tree})["prediction"] == 3


@pytest.mark.parametrize(
    ("body", "pointer", "detail"),
    [
        ({}, "", "Object missing required field `text`"),
        ({"text": 1}, "/text", "Expected `str`, got `int`"),
        ({"text": True}, "/text", "Expected `str`, got `bool`"),
        ({"text": None}, "/text", "Expected `str`, got `null`"),
        ({"text": ["a"]}, "/text", "Expected `str`, got `array`"),
        ({"text": ""}, "/text", "Expected `str` of length >= 1"),
        ({"text": "x" * 10_001}, "/text", "Expected `str` of length <= 10000"),
        ({"text": "a", "x": 1}, "", "Object contains an unknown field; known: `text`"),
        ({"text": "a", "": 1}, "", "Object contains an unknown field; known: `text`"),
        ({"text": "a", "x` - at `$.evil": 1}, "", "Object contains an unknown field; known: `text`"),
        ({"text": "a", f"x` - at `$[{'1' * 5_000}]": 1}, "", "Object contains an unknown field; known: `text`"),
        ({"text": "a", f"x` - at `${'.a' * 500_000}": 1}, "", "Object contains an unknown field; known: `text`"),
        ([{"text": "a", "x` - at `$[9].e": 1}], "/0", "Object contains an unknown field; known: `text`"),
        ({"Text": "a"}, "", "Object contains an unknown field; known: `text`"),
        ("a", "", "Expected `object | array`, got `str`"),
        (1, "", "Expected `object | array`, got `int`"),
        (None, "", "Expected `object | array`, got `null`"),
        ([1], "/0", "Expected `object`, got `int`"),
        ([[]], "/0", "Expected `object`, got `array`"),
        ([{"text": "a"}, {"text": "b"}, {"text": 1}], "/2/text", "Expected `str`, got `int`"),
        ([{"text": "a"}, {}], "/1", "Object missing required field `text`"),
        ([{"text": "a"}] * (MAX_INPUTS + 1), "", "Expected `array` of length <= 1000"),
    ],
)
def test_a_text_of_the_wrong_shape(body: Any, pointer: str, detail: str) -> None:
    """The pointer says where, the words say what, and neither quotes the client."""
    assert refusal(TEXT, body) == (pointer, detail)


@pytest.mark.parametrize(
    ("body", "pointer", "detail"),
    [
        (b'{"numbers": []}', "/numbers", "Expected `array` of length >= 1"),
        (b'{"numbers": {}}', "/numbers", "Expected `array`, got `object`"),
        (b'{"numbers": [1, true]}', "/numbers/1", "Expected `int | float`, got `bool`"),
        (b'{"numbers": [1, "2"]}', "/numbers/1", "Expected `int | float`, got `str`"),
        (b'{"numbers": [1, [2]]}', "/numbers/1", "Expected `int | float`, got `array`"),
        (b'{"numbers": [null]}', "/numbers/0", "Expected `int | float`, got `null`"),
        (b'{"numbers": [1e200]}', "/numbers/0", "Expected `float` <= 3037000499.0"),
        (b'{"numbers": [-1e200]}', "/numbers/0", "Expected `float` >= -3037000499.0"),
        (b'{"numbers": [3037000500]}', "/numbers/0", "Expected `int` <= 3037000499"),
        (b'{"numbers": [-3037000500]}', "/numbers/0", "Expected `int` >= -3037000499"),
        (b'{"numbers": [18446744073709551616]}', "/numbers/0", "Expected `int` <= 3037000499"),
        (b'{"numbers": [%b]}' % (b"9" * 400), "/numbers/0", "Expected `int` <= 3037000499"),
        (b'{"numbers": [%b]}' % (b"9" * 4300), "/numbers/0", "Expected `int` <= 3037000499"),
        (b'{"numbers": [%b]}' % b",".join([b"1"] * 10_001), "/numbers", "Expected `array` of length <= 10000"),
        (b'[{"numbers": [1]}, {"numbers": [2, 3, ""]}]', "/1/numbers/2", "Expected `int | float`, got `str`"),
    ],
)
def test_numbers_of_the_wrong_shape(body: bytes, pointer: str, detail: str) -> None:
    """The bounds of the schema keep every square in bounds."""
    assert refusal(NUMBERS, body) == (pointer, detail)


@pytest.mark.parametrize(
    ("body", "pointer", "detail"),
    [
        ({}, "", "Object missing required field `animals`"),
        ({"animals": [], "mode": "SECRET"}, "/mode", "Invalid value"),
        ({"animals": [], "mode": 1}, "/mode", "Expected `str`, got `int`"),
        ({"animals": [], "weight": 11}, "/weight", "Expected `int` <= 10"),
        ({"animals": [], "weight": "1"}, "/weight", "Expected `int | null`, got `str`"),
        ({"animals": [{}]}, "/animals/0", "Object missing required field `name`"),
        ({"animals": [{"name": "a", "ears": {}}]}, "/animals/0/ears", "Object missing required field `left-length`"),
        (
            {"animals": [{"name": "a", "ears": {"left-length": 0}}]},
            "/animals/0/ears/left-length",
            "Expected `float` > 0.0",
        ),
        (
            {"animals": [{"name": "a", "ears": {"left_length": 1}}]},
            "/animals/0/ears",
            "Object contains an unknown field",
        ),
        (
            {"animals": [{"name": "a", "ears": EARS, "friends": {"SECRET": 1}}]},
            "/animals/0/friends",
            "Expected `object`, got `int`",
        ),
        (
            {"animals": [{"name": "a", "ears": EARS, "SECRET` - at `$.animals[7]": 1}]},
            "/animals/0",
            "Object contains an unknown field",
        ),
        (
            {"animals": [], "extra": 1},
            "",
            "Object contains an unknown field; known: `animals`, `mode`, `weight`, `scale`",
        ),
        ([{"animals": []}, {"animals": 1}], "/1/animals", "Expected `array`, got `int`"),
    ],
)
def test_nested_input_of_the_wrong_shape(body: Any, pointer: str, detail: str) -> None:
    """Pointers lead through renamed fields, and stop where the client's own names begin."""
    assert refusal(ZOO, body) == (pointer, detail)


def test_a_pointer_escapes_what_rfc_6901_asks_for() -> None:
    """~ and / in a field's name become ~0 and ~1."""

    class Odd(msgspec.Struct, forbid_unknown_fields=True, rename={"value": "a/b~c"}):
        value: int

    class Model(Fake):
        def predict(self, odd: Odd) -> int:
            return odd.value

    assert refusal(schema_of(Model), {"odd": {"a/b~c": ""}}) == ("/odd/a~1b~0c", "Expected `int`, got `str`")


JSON_OR_NOT: list[tuple[bytes, bool]] = [
    (b"", False),
    (b" ", False),
    (b"nul", False),
    (b"{", False),
    (b'{"text": "a"', False),
    (b'{"text": "a"} x', False),
    (b'{"text": "a"}{"text": "a"}', False),
    (b'{"text": "a"}\x00', False),
    (b"{text: 1}", False),
    (b"{'text': 'a'}", False),
    (b'{"text": "a",}', False),
    (b'[{"text": "a"},]', False),
    (b'{"text": "a"} // why', False),
    (b'{"text": /* why */ "a"}', False),
    (b'{"text": "a\nb"}', False),
    (b'{"text": "\\x"}', False),
    (b'{"text": "\\u12"}', False),
    (b'{"text": 01}', False),
    (b'{"text": 1.}', False),
    (b'{"text": .5}', False),
    (b'{"text": +1}', False),
    (b'{"text": 0x1}', False),
    (b'{"text": 1e}', False),
    (b'{"text": NaN}', False),
    (b'{"text": Infinity}', False),
    (b'{"text": -Infinity}', False),
    (b'{"text": 1e400}', False),
    (b'{"text": -1e400}', False),
    (b'{"text": %b}' % (b"9" * 5000), False),
    (b'{"text": "\xff"}', False),
    (b'{"text": "\xc0\xaf"}', False),
    (b'{"text": "\xed\xa0\x80"}', False),
    (b'{"text": "\xf4\x90\x80\x80"}', False),
    (b'{"\xff": 1}', False),
    (b'{"text": "\\ud800"}', False),
    (b'{"text": "\\ude00\\ud83d"}', False),
    (b'\xef\xbb\xbf{"text": "a"}', False),
    ('{"text": "a"}'.encode("utf-16"), False),
    ('{"text": "a"}'.encode("utf-16-le"), False),
    ('{"text": "a"}'.encode("utf-32"), False),
    (b"[" * 100_000, False),
    (b'{"text":' * 100_000, False),
    (b"[" * 100_000 + b"]" * 100_000, False),
    (b'{"text":' * 100_000 + b"1" + b"}" * 100_000, False),
    (b'\t\r\n {"text"\n:\t"a"}\r\n', True),
    (b'{"te\\u0078t": "\\ud83d\\ude00"}', True),
]


@pytest.mark.parametrize("body", [body for body, is_json in JSON_OR_NOT if not is_json], ids=lambda body: body[:24])
def test_what_is_not_json_is_malformed(body: bytes) -> None:
    """Every class of it, whether its beginning has the right shape or not."""
    for schema in (TEXT, NUMBERS, ZOO, schema_of(Echo)):
        with pytest.raises(MalformedError):
            schema.decode(body)


@pytest.mark.parametrize("body", [body for body, is_json in JSON_OR_NOT if is_json], ids=lambda body: body[:24])
def test_unusual_json_is_json(body: bytes) -> None:
    """White space and escapes are the client's to choose."""
    assert len(TEXT.decode(body)[0]) == 1


@pytest.mark.parametrize(
    "bad",
    [b"NaN", b"1e400", b'"\xff"', b'"\\ud800"', b"9" * 5000, b"[" * 100_000 + b"]" * 100_000, b"01", b"{,}", b'"\n"'],
    ids=lambda bad: bad[:10],
)
@pytest.mark.parametrize(
    "frame",
    [
        b'{"text": "a", "unknown": %b}',
        b'{"text": "a", "unknown": {"deep": [1, %b]}}',
        b'{"text": 1, "more": %b}',
        b'[{"text": 1}, %b]',
        b'{"text": true} %b',
    ],
)
def test_what_is_not_json_is_malformed_wherever_it_stands(frame: bytes, bad: bytes) -> None:
    """After a wrong shape, and inside an unknown field: not JSON is not JSON."""
    with pytest.raises(MalformedError):
        TEXT.decode(frame % bad)


def test_of_two_equal_keys_the_last_one_counts() -> None:
    """RFC 8259 leaves it open; the echo shows which one was used, and both are checked."""
    assert TEXT.decode(b'{"text": "a", "text": "b"}') == (["b"], False)
    assert refusal(TEXT, b'{"text": 1, "text": "b"}') == ("/text", "Expected `str`, got `int`")


def test_numbers_are_taken_exactly() -> None:
    """Integers stay integers, of any length; a negative zero keeps its sign; what is too small becomes zero."""
    echo = schema_of(Echo)
    long = b"9" * 4000
    for sent, echoed in [(b"-0.0", b"-0.0"), (b"1.0", b"1.0"), (b"1e2", b"100.0"), (b"1e-400", b"0.0"), (long, long)]:
        inputs, _ = echo.decode(b'{"value": %b}' % sent)
        assert echo.encode_inputs(inputs) == [echoed]


@pytest.mark.parametrize("levels", [1, 100, MAX_NESTING - 1, MAX_NESTING, 400, 900, 970, 980, 985, 990, 995])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting_is_bounded_where_the_types_do_not_bound_it(levels: int, opening: bytes, closing: bytes) -> None:
    """What is let in can also be encoded again, echoed by the model and searched for NaN: it cannot make a 500."""
    echo = schema_of(Echo)
    body = b'{"value": ' + opening * (levels - 1) + b"null" + closing * (levels - 1) + b"}"
    if levels > MAX_NESTING:
        with pytest.raises(MalformedError):
            echo.decode(body)
    else:
        inputs, _ = echo.decode(body)
        echo.encode_answer(echo.encode_inputs(inputs), [[[[inputs[0]]]]], False)


def test_many_shallow_values_are_not_deep() -> None:
    """The bound is on levels, not on brackets."""
    echo = schema_of(Echo)
    value = [{"a": [1], "[[[": "{{{"}] * 1000
    assert echo.decode(json.dumps([{"value": value}] * 2).encode()) == ([value, value], True)


def test_a_type_that_contains_itself_is_bounded() -> None:
    """A tree can nest without end, so it may not."""
    tree = schema_of(Sum)
    deep = b'{"tree": ' + b'{"value": 1, "children": [' * 150 + b"]}" * 150 + b"}"
    with pytest.raises(MalformedError):
        tree.decode(deep)
    assert len(tree.decode(b'{"tree": ' + b'{"value": 1, "children": [' * 90 + b"]}" * 90 + b"}")[0]) == 1


def nan_and_infinities() -> list[Any]:
    nan, infinity = float("nan"), float("inf")
    return [nan, infinity, -infinity, [1.0, nan], {"a": {"b": (infinity,)}}, Some(nan), [None, {1: nan}], {nan}]


class Some(msgspec.Struct):
    value: float


@pytest.mark.parametrize("output", nan_and_infinities(), ids=repr)
def test_nan_and_infinity_never_become_null(output: Any) -> None:
    """msgspec would write null: such an output is the model's failure."""
    with pytest.raises(InferenceError, match="NaN or Infinity"):
        schema_of(Echo).encode_answer([b"1"], [output], False)


@pytest.mark.parametrize("how", ["nan", "text"])
def test_an_output_is_of_the_promised_type(how: str) -> None:
    """Text for a number, and NaN where null is allowed, are the model's failure."""
    schema = schema_of(Liar)
    with pytest.raises(InferenceError):
        schema.encode_answer([b"1"], [schema.call(how)], False)


@pytest.mark.parametrize("output", [object(), "\ud800", 10**5000, {1j: 1}, lambda: 1], ids=lambda o: type(o).__name__)
def test_an_output_is_json(output: Any) -> None:
    """What cannot be encoded is the model's failure."""
    with pytest.raises(InferenceError):
        schema_of(Echo).encode_answer([b"1"], [output], False)


def test_null_and_the_word_null_are_fine() -> None:
    """Only numbers that are none are refused."""
    outputs = [None, "null", {"null": [None, 1.5, "NaN"]}, {"a": (None, {1})}]
    body = schema_of(Echo).encode_answer([b"1"] * 4, outputs, True)
    assert [item["prediction"] for item in json.loads(body)] == [
        None,
        "null",
        {"null": [None, 1.5, "NaN"]},
        {"a": [None, [1]]},
    ]


class Ge:
    """A constraint that msgspec does not know."""

    def __repr__(self) -> str:
        return "Ge"


@dataclasses.dataclass
class Data:
    value: Annotated[int, Ge()]


class Typed(TypedDict):
    value: Annotated[int, Ge()]


class Named(NamedTuple):
    value: Annotated[int, Ge()]


class Loose(msgspec.Struct):
    value: int


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    loose: Loose


class Attrs:
    """What a class of the attrs library looks like."""

    __attrs_attrs__ = ()


T = TypeVar("T")


class LooseBox(msgspec.Struct, Generic[T]):
    value: T


class Box(msgspec.Struct, Generic[T], forbid_unknown_fields=True):
    value: T
    more: Annotated[int, Ge()] = 1


Renamed = NewType("Renamed", Annotated[str, Ge()])
IGNORED = "Ge would be ignored; constraints are msgspec.Meta(...)"


def _signatures() -> list[tuple[Callable[..., Any], str]]:
    def no_parameter(self: Any) -> Any: ...
    def no_annotation(self: Any, x) -> Any: ...  # type: ignore[no-untyped-def]
    def no_return(self: Any, x: int): ...  # type: ignore[no-untyped-def]
    def many(self: Any, *x: int) -> Any: ...
    def named(self: Any, **x: int) -> Any: ...
    def by_place(self: Any, x: int, /) -> Any: ...
    def by_name(self: Any, *, x: int) -> Any: ...
    async def later(self: Any, x: int) -> Any: ...
    def unknown(self: Any, x: "Missing") -> Any: ...  # type: ignore[name-defined] # noqa: F821
    def broken(self: Any, x: "1+") -> Any: ...  # type: ignore[valid-type] # noqa: F722
    def default(self: Any, x: int = "1") -> Any: ...  # type: ignore[assignment]
    def not_a_number(self: Any, x: float = float("nan")) -> Any: ...
    def ignored(self: Any, x: Annotated[int, Ge()]) -> Any: ...
    def deeply_ignored(self: Any, x: list[dict[str, Annotated[int, Ge()] | None]]) -> Any: ...
    def renamed(self: Any, x: Renamed) -> Any: ...
    def returned(self: Any, x: int) -> list[Annotated[int, Ge()]]:
        raise NotImplementedError

    def data_out(self: Any, x: int) -> Data:
        raise NotImplementedError

    def typed_out(self: Any, x: int) -> Typed:
        raise NotImplementedError

    def named_out(self: Any, x: int) -> Named:
        raise NotImplementedError

    def boxed(self: Any, x: Box[int]) -> Any: ...
    def data_in(self: Any, x: Data) -> Any: ...
    def typed_in(self: Any, x: list[Typed]) -> Any: ...
    def attrs_in(self: Any, x: Attrs) -> Any: ...
    def loose(self: Any, x: Loose) -> Any: ...
    def deep_loose(self: Any, x: Strict | None) -> Any: ...
    def loose_box(self: Any, x: LooseBox[int]) -> Any: ...
    def raw(self: Any, x: msgspec.Raw) -> Any: ...
    def misplaced(self: Any, x: Annotated[int, Meta(min_length=1)]) -> Any: ...

    def unfit(cls: str) -> str:
        return f"x: {cls} would ignore unknown fields; use a msgspec.Struct with forbid_unknown_fields=True"

    return [
        (no_parameter, "it has no parameter"),
        (no_annotation, "parameter x has no annotation"),
        (no_return, "it has no return annotation"),
        (many, "parameter x must be one that can be given by name"),
        (named, "parameter x must be one that can be given by name"),
        (by_place, "parameter x must be one that can be given by name"),
        (by_name, "parameter x, being the only one, must be one that can be given by position"),
        (later, "it must not be async"),
        (unknown, "name 'Missing' is not defined"),
        (broken, "Forward reference must be an expression -- got '1+'"),
        (default, "Expected `int`, got `str`"),
        (not_a_number, "Expected `float`, got `null`"),
        (ignored, f"x: {IGNORED}"),
        (deeply_ignored, f"x: {IGNORED}"),
        (renamed, f"x: {IGNORED}"),
        (returned, f"return: {IGNORED}"),
        (data_out, f"return.value: {IGNORED}"),
        (typed_out, f"return.value: {IGNORED}"),
        (named_out, f"return.value: {IGNORED}"),
        (boxed, f"x.more: {IGNORED}"),
        (data_in, unfit("Data")),
        (typed_in, unfit("Typed")),
        (attrs_in, unfit("Attrs")),
        (loose, "x: Loose needs forbid_unknown_fields=True"),
        (deep_loose, "x.loose: Loose needs forbid_unknown_fields=True"),
        (loose_box, "x: LooseBox needs forbid_unknown_fields=True"),
        (raw, "x: msgspec.Raw would not be checked to be JSON; use Any"),
        (
            misplaced,
            "Can only set `min_length` on a str, bytes, or collection type - type "
            "`typing.Annotated[int, msgspec.Meta(min_length=1)]` is invalid",
        ),
    ]


@pytest.mark.parametrize(("predict", "why"), _signatures(), ids=lambda value: getattr(value, "__name__", None))
def test_a_signature_that_cannot_be_a_schema_stops_the_start(predict: Callable[..., Any], why: str) -> None:
    """The line says which model, which parameter and what is wrong; nothing is ignored without a word."""
    model = type("Model", (Fake,), {"predict": predict})
    with pytest.raises(ModelError) as caught:
        schema_of(model)
    assert str(caught.value) == f"MODELS: fake={__name__}:Model: the signature of predict() cannot be a schema: {why}"


def test_what_no_document_could_say_stops_the_start_in_one_line() -> None:
    """msgspec's own message has several."""

    class Model(Fake):
        def predict(self, x: complex) -> int:
            return 1

    with pytest.raises(ModelError) as caught:
        schema_of(Model)
    assert "complex" in str(caught.value)
    assert str(caught.value).isprintable()
