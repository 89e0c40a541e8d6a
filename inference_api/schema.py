"""A model's signature as its schema: what a request must look like, and what an answer does."""

import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from operator import attrgetter
from typing import Annotated, Any, get_args, get_origin

import msgspec

from inference_api.model import InferenceError, Model, ModelError, ModelSpec

MAX_INPUTS = 1000
"""The most inputs in one request's array."""

_LOCATION = re.compile(r"(?P<what>.*?)(?: - at `(?:key` in `)?\$(?P<path>[^`]*)`)?", re.DOTALL)
_STEP = re.compile(r"\.(?P<name>\w+)|\[(?P<index>\d+)\]")
_SAFE_MESSAGE = re.compile(r"(Expected |Object missing required field )")


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
        self.path = f"/{spec.path}"
        self.model = model
        try:
            parameters, returned = _signature(model)
            stem = "".join(part.capitalize() for part in re.split(r"[_-]+", spec.path))
            self.input_type: Any = msgspec.defstruct(f"{stem}Input", parameters, forbid_unknown_fields=True)
            self.names = tuple(name for name, *_ in parameters)
            echoed = parameters[0][1] if len(parameters) == 1 else self.input_type
            output_type: Any = msgspec.defstruct(f"{stem}Output", [("input", echoed), ("prediction", returned)])
            self.request_type = _one_or_many(self.input_type)
            self.answer_type = _one_or_many(output_type)
            self._decode = msgspec.json.Decoder(self.request_type).decode
            self._check_prediction = msgspec.json.Decoder(returned).decode
            msgspec.json.schema_components([self.request_type, self.answer_type])  # refuses what no document could say
        except (TypeError, ValueError, NameError) as exc:
            raise ModelError(f"MODELS: {spec}: the signature of predict() cannot be a schema: {exc}") from exc
        self._encode = msgspec.json.Encoder().encode
        self._value: Callable[[Any], Any] = attrgetter(self.names[0]) if len(self.names) == 1 else self._as_dict
        self.call: Callable[[Any], Any] = model.predict if len(self.names) == 1 else self._call_by_name

    def _as_dict(self, fields: Any) -> dict[str, Any]:
        return {name: getattr(fields, name) for name in self.names}

    def _call_by_name(self, arguments: dict[str, Any]) -> Any:
        return self.model.predict(**arguments)

    def decode(self, body: bytes) -> tuple[list[Any], bool]:
        """The inputs that a body holds, and whether it was an array.

        Raises MalformedError for what is not JSON, wherever it stands, and ShapeError for what is not the model's.
        """
        try:
            request = self._decode(body)
        except msgspec.ValidationError as exc:
            _require_json(body)
            raise self._shape_error(str(exc)) from exc
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise MalformedError from exc
        if isinstance(request, list):
            return [self._value(fields) for fields in request], True
        return [self._value(request)], False

    def encode_inputs(self, inputs: Sequence[Any]) -> list[bytes]:
        """Each input as JSON: taken before the model is called, which may change what it is given."""
        return [self._encode(value) for value in inputs]

    def encode_answer(self, echoes: Sequence[bytes], outputs: Sequence[Any], is_array: bool) -> bytes:
        """The answer's body; raises InferenceError where an output is not JSON or not of the promised type."""
        answers = [
            b'{"input":%b,"prediction":%b}' % (echo, self._encode_output(output))
            for echo, output in zip(echoes, outputs, strict=True)
        ]
        return b"[%b]" % b",".join(answers) if is_array else answers[0]

    def _encode_output(self, output: Any) -> bytes:
        try:
            encoded = self._encode(output)
            self._check_prediction(encoded)
        except Exception as exc:
            raise InferenceError(f"{self.model.name}: the output is not what predict() promises") from exc
        # msgspec writes NaN and the infinities as null, where the return annotation may allow null.
        if b"null" in encoded and not _is_finite(msgspec.to_builtins(output)):
            raise InferenceError(f"{self.model.name}: the output holds NaN or Infinity, which JSON has not")
        return encoded

    def _shape_error(self, message: str) -> ShapeError:
        match = _LOCATION.fullmatch(message)
        what, path = (match["what"], match["path"] or "") if match else ("", "")
        pointer = ""
        for step in _STEP.finditer(path.partition("[...]")[0]):
            pointer += f"/{step['name'] or step['index']}"
        if what.startswith("Object contains unknown field"):
            what = "Object contains an unknown field"
            if re.fullmatch(r"(/\d+)?", pointer):
                what += "; known: " + ", ".join(f"`{name}`" for name in self.names)
        elif not _SAFE_MESSAGE.match(what):  # other messages may quote what the client sent
            what = "Invalid value"
        return ShapeError(pointer, what)


def _one_or_many(struct: Any) -> Any:
    return struct | Annotated[list[struct], msgspec.Meta(max_length=MAX_INPUTS)]


def _require_json(body: bytes) -> None:
    # A typed decode stops at the first wrong shape; what follows may not be JSON at all.
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise MalformedError from exc


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(_is_finite(item) for item in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_finite(item) for item in value)
    return True


def _signature(model: Model) -> tuple[list[tuple[Any, ...]], Any]:
    hints = typing.get_type_hints(model.predict, include_extras=True)
    parameters: list[tuple[Any, ...]] = []
    for parameter in inspect.signature(model.predict).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"parameter {parameter.name} must be one that can be given by name")
        if parameter.name not in hints:
            raise TypeError(f"parameter {parameter.name} has no annotation")
        hint = hints[parameter.name]
        _check_metadata(parameter.name, hint, is_input=True)
        if parameter.default is parameter.empty:
            parameters.append((parameter.name, hint))
        else:
            msgspec.json.decode(msgspec.json.encode(parameter.default), type=hint)
            parameters.append((parameter.name, hint, parameter.default))
    if not parameters:
        raise TypeError("it has no parameter")
    if "return" not in hints:
        raise TypeError("it has no return annotation")
    _check_metadata("return", hints["return"], is_input=False)
    # Fields with default values may stand before those without in a keyword-only signature, not in a Struct.
    return sorted(parameters, key=len), hints["return"]


def _check_metadata(name: str, hint: Any, *, is_input: bool) -> None:
    """Refuse, at every depth, what msgspec would ignore without a word."""
    if get_origin(hint) is Annotated:
        hint, *metadata = get_args(hint)
        for item in metadata:
            if not isinstance(item, msgspec.Meta):
                raise TypeError(f"{name}: {item!r} would be ignored; constraints are msgspec.Meta(...)")
    if is_input and (is_dataclass(hint) or typing.is_typeddict(hint)):
        raise TypeError(
            f"{name}: {hint.__name__} would ignore unknown fields; use a msgspec.Struct with forbid_unknown_fields=True"
        )
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        if is_input and not hint.__struct_config__.forbid_unknown_fields:
            raise TypeError(f"{name}: {hint.__name__} needs forbid_unknown_fields=True")
        for inner_name, inner in typing.get_type_hints(hint, include_extras=True).items():
            if inner is not hint:
                _check_metadata(f"{name}.{inner_name}", inner, is_input=is_input)
    if isinstance(hint, types.GenericAlias | types.UnionType) or get_origin(hint) not in (None, typing.Literal):
        for inner in get_args(hint):
            if inner is not Ellipsis:
                _check_metadata(name, inner, is_input=is_input)
