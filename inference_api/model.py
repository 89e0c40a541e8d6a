"""The model contract, the two models that come with the service, and finding models by name. Nothing here is HTTP."""

import importlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from msgspec import Meta

MAX_TEXT_CHARACTERS = 10_000
MAX_NUMBERS = 10_000
MAX_MAGNITUDE = 3_037_000_499
"""The largest integer whose square fits 64 bits, floor(sqrt(2**63 - 1)): clients in any language can read that."""

Text = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARACTERS, examples=["Hello"])]
Number = (
    Annotated[int, Meta(ge=-MAX_MAGNITUDE, le=MAX_MAGNITUDE)]
    | Annotated[float, Meta(ge=-MAX_MAGNITUDE, le=MAX_MAGNITUDE)]
)
Numbers = Annotated[list[Number], Meta(min_length=1, max_length=MAX_NUMBERS, examples=[[1, 2, 3]])]


class Model(Protocol):
    """What the service needs of a model; a model imports nothing from here, it only has to look like this.

    `load()`, `warm_up()`, `predict_batch(inputs)` and `thread_safe` are optional, see the README.
    """

    name: str
    version: str
    predict: Callable[..., Any]


class DummyModel:
    """Says what it was given: stands in for a model so that the service runs out of the box."""

    name, version = "dummy", "1.0.0"

    def predict(self, text: Text) -> str:
        """The text in words that show that it has been here."""
        return f"predicted({text})"


class SquareNumbersModel:
    """Squares numbers; integers stay integers."""

    name, version = "square_numbers", "1.0.0"

    def predict(self, numbers: Numbers) -> list[int | float]:
        """As many squares, in the same order."""
        return [number * number for number in numbers]


class ModelError(RuntimeError):
    """A model cannot be served: it does not exist, is not a model, or failed to load. The service must not start.

    The message is one line, whatever the exceptions that it quotes are.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class UnfitInputError(Exception):
    """A model refused one input, in words meant for the client.

    `index` is the input's position among those of its request.
    """

    def __init__(self, message: str, index: int = 0) -> None:
        super().__init__(message)
        self.index = index


class InferenceError(Exception):
    """A model failed: it raised, or its output is not what it promised. The client learns nothing more."""


class AbandonedError(Exception):
    """Nobody waits for this prediction any more: the client left or the deadline passed before the model was called."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Where a model is served and where its class is found: one `path=module:class` of MODELS."""

    path: str
    module: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.path}={self.module}:{self.class_name}"


_NAME = re.compile(r"[\x21-\x7e]{1,64}")


def find_model(spec: ModelSpec) -> Model:
    """Import a model's class and make an instance, without loading its weights.

    Raises ModelError, in one line that names the model, where that fails.
    """
    with _failing_as(spec, f"cannot import {spec.module}"):
        module = importlib.import_module(spec.module)
    cls = getattr(module, spec.class_name, None)
    if not isinstance(cls, type):
        raise ModelError(f"MODELS: {spec}: {spec.module} has no class {spec.class_name}")
    with _failing_as(spec, f"{spec.class_name}() failed"):
        model: Model = cls()
    for attribute in ("name", "version"):
        value = getattr(model, attribute, None)
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise ModelError(
                f"MODELS: {spec}: {attribute} must be a string of 1 to 64 printable ASCII characters, not {value!r:.80}"
            )
    for method, required in (("predict", True), ("predict_batch", False), ("load", False), ("warm_up", False)):
        present = getattr(model, method, None)
        if not callable(present) and (required or present is not None):
            raise ModelError(f"MODELS: {spec}: {spec.class_name} has no method {method}()")
    if not isinstance(thread_safe := getattr(model, "thread_safe", True), bool):
        raise ModelError(f"MODELS: {spec}: thread_safe must be True or False, not {thread_safe!r:.80}")
    return model


def prepare(spec: ModelSpec, model: Model, step: str) -> None:
    """Run the model's `load` or `warm_up`, where it has one; raises ModelError where that fails."""
    method, pid = getattr(model, step, None), os.getpid()
    if method is not None:
        with _failing_as(spec, f"{step}() failed"):
            method()
    if os.getpid() != pid:  # the model has forked: the child must not go on as another service
        os._exit(0)


@contextmanager
def _failing_as(spec: ModelSpec, what: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as exc:
        raise ModelError(f"MODELS: {spec}: {what}: {type(exc).__name__}: {exc}") from exc
