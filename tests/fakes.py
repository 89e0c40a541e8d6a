"""Models written for the tests: of every shape that a signature may have, and of every way to fail."""

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
from msgspec import Meta

from inference_api.model import ModelSpec
from inference_api.schema import Schema


def spec_of(model: type, path: str) -> ModelSpec:
    return ModelSpec(path, model.__module__, model.__qualname__)


def schema_of(model: type, path: str = "fake") -> Schema:
    return Schema(spec_of(model, path), model())


class Fake:
    """What all fakes share; a real model needs no base class."""

    name, version = "fake", "1.2.3"


class Echo(Fake):
    """Returns what it is given, whatever that is."""

    def predict(self, value: Any) -> Any:
        return value


class Ears(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    """A Struct whose fields have other names in JSON."""

    left_length: Annotated[float, Meta(gt=0)]
    right_length: Annotated[float, Meta(gt=0)] = 1.5


class Animal(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1, max_length=20)]
    ears: Ears
    friends: dict[str, Ears] = {}


class Verdict(TypedDict):
    label: str
    probabilities: dict[str, float]


class Zoo(Fake):
    """Takes several parameters, nested, optional and with defaults; answers with a TypedDict."""

    name = "zoo"

    def predict(
        self,
        animals: Annotated[list[Animal], Meta(max_length=3)],
        mode: Literal["fast", "exact"] = "fast",
        weight: Annotated[int, Meta(ge=0, le=10)] | None = None,
        *,
        scale: float = 1.0,
    ) -> Verdict:
        return {"label": mode, "probabilities": {animal.name: (weight or 1) * scale for animal in animals}}


@dataclasses.dataclass
class Point:
    x: int
    label: str | None = None


class Dots(Fake):
    """Answers with a dataclass."""

    def predict(self, x: int, label: str | None = None) -> Point:
        return Point(x, label)


class Tree(msgspec.Struct, forbid_unknown_fields=True):
    value: int
    children: list["Tree"] = []


class Sum(Fake):
    """Takes a type that contains itself."""

    def predict(self, tree: Tree) -> int:
        return tree.value + sum(self.predict(child) for child in tree.children)


class Pair(NamedTuple):
    first: int
    second: int


class Swap(Fake):
    """Takes and gives a NamedTuple: an array in JSON."""

    def predict(self, pair: Pair) -> Pair:
        return Pair(pair.second, pair.first)


class Spoiler(Fake):
    """Changes what it is given."""

    def predict(self, numbers: list[int]) -> int:
        total = sum(numbers)
        numbers.clear()
        return total


SECRET = "s3cret-payload"


class Broken(Fake):
    """Fails as its input says."""

    def predict(self, how: str) -> Any:
        match how:
            case "raise":
                raise RuntimeError(SECRET)
            case "exit":
                raise SystemExit(SECRET)
            case "nan":
                return float("nan")
            case "infinity":
                return {"deep": [{"er": float("-inf")}], "null": None}
            case "object":
                return object()
            case "too deep":
                deep: list[Any] = []
                for _ in range(100_000):
                    deep = [deep]
                return deep
            case "surrogate":
                return "\ud800"
            case "huge":
                return 10**5000
            case "cycle":
                cycle: list[Any] = []
                cycle.append(cycle)
                return cycle
        return how


class Liar(Fake):
    """Promises a number and gives text, or a NaN where null is allowed."""

    def predict(self, how: str) -> float | None:
        return float("nan") if how == "nan" else how  # type: ignore[return-value]


MESSAGES = {
    "plain": "the picture is too dark",
    "empty": "",
    "surrogate": "not text: \ud800!",
    "long": "é" * 100_000,
    "control": "a\r\nb\x00\x1b[31m\u2028",
}


class UnsayableError(ValueError):
    """Has words that fail."""

    def __str__(self) -> str:
        raise RuntimeError(SECRET)


class Picky(Fake):
    """Refuses its input in words of its own."""

    def predict(self, which: str) -> str:
        if which == "unsayable":
            raise UnsayableError
        if which in MESSAGES:
            raise ValueError(MESSAGES[which])
        return which


class BatchOfPicky(Picky):
    """The same in batches."""

    def predict_batch(self, inputs: list[str]) -> list[str]:
        return [self.predict(value) for value in inputs]


class Miscounting(Fake):
    """Returns one output too few for a batch, and fails on single inputs."""

    def predict(self, text: str) -> str:
        raise RuntimeError(SECRET)

    def predict_batch(self, inputs: list[str]) -> list[str]:
        return inputs[1:]


class Counting(Fake):
    """Remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def predict(self, text: str) -> str:
        self.calls.append(text)
        return text.upper()
