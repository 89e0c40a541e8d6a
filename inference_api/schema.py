"""A model's signature as its schema: what a request must look like, and what an answer does."""

import inspect
import json
import re
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import is_dataclass
from operator import attrgetter
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec

from inference_api.model import InferenceError, Model, ModelError, ModelSpec

MAX_INPUTS = 1000
"""The most inputs in one request's array."""
MAX_NESTING = 200
"""The most levels of arrays and objects in a request, where the model's types set no bound themselves.

What can be decoded must leave room on the stack for the model, and for encoding what it makes of it.
"""

_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_STEP = re.compile(r"\.([^.\[`]+)|\[([0-9]+)\]")
# Others may quote what the client sent, which stands in no answer and in no log.
_SAFE_MESSAGES = ("Expected ", "Object missing required field ", "Number out of range")


class MalformedError(Exception):
    """The body is not JSON text (RFC 8259)."""


class ShapeError(Exception):
    """The body is JSON, but not what the model takes; `pointer` (RFC 6901) says where."""

    def __init__(self, pointer: str, detail: str) -> None:
        super().__init__(detail)
        self.pointer = pointer
        self.detail = detail


class Schema:
    """One model's requests and answers, in bytes and in Python.

    An input is the bare value where `predict` has one parameter, else a dict of all of them.
    Raises ModelError at construction where the signature cannot be a schema.
    """

    def __init__(self, spec: ModelSpec, model: Model) -> None:
        self.spec = spec
        self.path = f"/{spec.path}"
        self.model = model
        try:
            parameters, returned, self._is_bounded = _signature(model)
            self.input_type: Any = msgspec.defstruct(f"{spec.path}_input", parameters, forbid_unknown_fields=True)
            self.names = tuple(name for name, *_ in parameters)
            echoed = parameters[0][1] if len(parameters) == 1 else self.input_type
            output_type: Any = msgspec.defstruct(f"{spec.path}_output", [("input", echoed), ("prediction", returned)])
            self.request_type = _one_or_many(self.input_type)
            self.answer_type = _one_or_many(output_type)
            self._decode = msgspec.json.Decoder(self.request_type).decode
            self._check_prediction = msgspec.json.Decoder(returned).decode
            msgspec.json.schema_components([self.request_type, self.answer_type])  # refuses what no document could say
        except Exception as exc:  # annotations are anybody's code
            raise ModelError(f"MODELS: {spec}: the signature of predict() cannot be a schema: {exc}") from exc
        self._encode = msgspec.json.Encoder().encode
        self._value: Callable[[Any], Any]
        self.call: Callable[[Any], Any]
        if len(self.names) == 1:
            self._value, self.call = attrgetter(self.names[0]), model.predict
        else:
            self._value, self.call = msgspec.structs.asdict, lambda arguments: model.predict(**arguments)

    def decode(self, body: bytes) -> tuple[list[Any], bool]:
        """The inputs that a body holds, and whether it was an array.

        Raises MalformedError for what is not JSON, wherever it stands, and ShapeError for what is not the model's.
        """
        try:
            request = self._decode(body)
        except msgspec.ValidationError as exc:
            # A typed decode stops at the first wrong shape; what follows may not be JSON at all.
            raise self._shape_error(str(exc), _json(body)) from exc
        except _NOT_JSON as exc:
            raise MalformedError from exc
        if not self._is_bounded:
            _check_nesting(body)
        if isinstance(request, list):
            return [self._value(fields) for fields in request], True
        return [self._value(request)], False

    def encode_inputs(self, inputs: Sequence[Any]) -> list[bytes]:
        """Each input as JSON: taken before the model is called, which may change what it is given."""
        return list(map(self._encode, inputs))

    def encode_answer(self, echoes: Sequence[bytes], outputs: Sequence[Any], is_array: bool) -> bytes:
        """The answer's body; raises InferenceError where an output is not JSON or not of the promised type."""
        if not is_array:
            return b'{"input":%b,"prediction":%b}' % (echoes[0], self._encode_output(outputs[0]))
        pairs = zip(echoes, outputs, strict=True)
        return b"[%b]" % b",".join(
            [b'{"input":%b,"prediction":%b}' % (echo, self._encode_output(output)) for echo, output in pairs]
        )

    def _encode_output(self, output: Any) -> bytes:
        try:
            encoded = self._encode(output)
            self._check_prediction(encoded)
        except msgspec.ValidationError as exc:
            words = str(exc) if str(exc).startswith(_SAFE_MESSAGES) else "Invalid value"
            raise InferenceError(f"{self.model.name}: the output is not what predict() promises: {words}") from None
        except Exception as exc:
            raise InferenceError(f"{self.model.name}: the output is not what predict() promises") from exc
        # msgspec writes NaN and the infinities as null, where the return annotation may allow null.
        if encoded.find(b"null") >= 0 and not _is_finite(output):
            raise InferenceError(f"{self.model.name}: the output holds NaN or Infinity, which JSON has not")
        return encoded

    def _shape_error(self, message: str, request: Any) -> ShapeError:
        """From msgspec's words and the request as plain JSON; the client's own words are left out of it."""
        what, located, place = message.rpartition(" - at `")
        steps = place.partition("$")[2].partition("[...]")[0] if located else ""
        pointer = ""
        for step in _STEP.finditer(steps):
            name, index = step.groups("")
            try:
                request = request[name or int(index)]
            except (LookupError, TypeError, ValueError):  # the name of an unknown field may read like a place
                break
            pointer += "/" + (name.replace("~", "~0").replace("/", "~1") or index)
        what = what or message
        if what.startswith("Object contains unknown field"):
            what = "Object contains an unknown field"
            if re.fullmatch(r"(/[0-9]+)?", pointer):
                what += "; known: " + ", ".join(f"`{name}`" for name in self.names)
        elif not what.startswith(_SAFE_MESSAGES):
            what = "Invalid value"
        return ShapeError(pointer, what)


def _one_or_many(struct: Any) -> Any:
    return struct | Annotated[list[struct], msgspec.Meta(max_length=MAX_INPUTS)]


def _json(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except _NOT_JSON as exc:
        raise MalformedError from exc


def _check_nesting(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_NESTING:
        return
    level = [_json(body)]
    for _ in range(MAX_NESTING + 1):
        level = [inner for value in level for inner in _contents(value)]
    if level:
        raise MalformedError


def _contents(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _is_finite(output: Any) -> bool:
    try:
        json.dumps(msgspec.to_builtins(output, str_keys=True), allow_nan=False)
    except ValueError:
        return False
    return True


def _signature(model: Model) -> tuple[list[tuple[Any, ...]], Any, bool]:
    """The fields for the parameters, the type returned, and whether the parameters' types bound their nesting."""
    if inspect.iscoroutinefunction(model.predict):
        raise TypeError("it must not be async")
    hints = typing.get_type_hints(model.predict, include_extras=True)
    signature = inspect.signature(model.predict)
    fields: list[tuple[Any, ...]] = []
    is_bounded = True
    for name, parameter in signature.parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"parameter {name} must be one that can be given by name")
        if parameter.kind == parameter.KEYWORD_ONLY and len(signature.parameters) == 1:
            raise TypeError(f"parameter {name}, being the only one, must be one that can be given by position")
        if name not in hints:
            raise TypeError(f"parameter {name} has no annotation")
        is_bounded &= _check(name, hints[name], is_input=True)
        if parameter.default is parameter.empty:
            fields.append((name, hints[name]))
        else:
            msgspec.json.decode(msgspec.json.encode(parameter.default), type=hints[name])
            fields.append((name, hints[name], parameter.default))
    if not fields:
        raise TypeError("it has no parameter")
    if "return" not in hints:
        raise TypeError("it has no return annotation")
    _check("return", hints["return"], is_input=False)
    # Fields with default values may stand before those without in a keyword-only signature, not in a Struct.
    return sorted(fields, key=len), hints["return"], is_bounded


def _check(name: str, hint: Any, *, is_input: bool, outer: tuple[Any, ...] = ()) -> bool:
    """Refuse, at every depth, what msgspec would ignore without a word; False where values can nest without bound."""
    hint = getattr(hint, "__supertype__", hint)  # of a NewType
    if get_origin(hint) is Annotated:
        hint, *metadata = get_args(hint)
        for item in metadata:
            if not isinstance(item, msgspec.Meta):
                raise TypeError(f"{name}: {item!r} would be ignored; constraints are msgspec.Meta(...)")
    if hint in outer:
        return False
    cls = get_origin(hint) or hint
    if cls is Literal:
        return True
    if cls is Any or isinstance(cls, TypeVar):
        return False
    fields: dict[str, Any] = {}
    if isinstance(cls, type):
        if is_input:
            _check_input_class(name, cls)
        fields = typing.get_type_hints(cls, include_extras=True)
    inner = [(f"{name}.{field}", field_hint) for field, field_hint in fields.items()]
    inner += [(name, argument) for argument in get_args(hint)]
    if not inner and isinstance(cls, type) and issubclass(cls, Collection):
        return issubclass(cls, str | bytes | bytearray | memoryview)
    is_bounded = True
    for inner_name, inner_hint in inner:
        is_bounded &= _check(inner_name, inner_hint, is_input=is_input, outer=(*outer, hint))
    return is_bounded


def _check_input_class(name: str, cls: type) -> None:
    if cls is msgspec.Raw:
        raise TypeError(f"{name}: msgspec.Raw would not be checked to be JSON; use Any")
    if is_dataclass(cls) or typing.is_typeddict(cls) or hasattr(cls, "__attrs_attrs__"):
        raise TypeError(
            f"{name}: {cls.__name__} would ignore unknown fields; use a msgspec.Struct with forbid_unknown_fields=True"
        )
    if issubclass(cls, msgspec.Struct) and not cls.__struct_config__.forbid_unknown_fields:
        raise TypeError(f"{name}: {cls.__name__} needs forbid_unknown_fields=True")
