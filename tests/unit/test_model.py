"""The model contract: the two models that come with the service, and finding a model by name."""

import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from inference_api.model import (
    MAX_MAGNITUDE,
    DummyModel,
    ModelError,
    ModelSpec,
    SquareNumbersModel,
    find_model,
    prepare,
)

HERE = __name__
PROJECT = Path(__file__).parents[2]


class Good:
    name, version = "good", "1"

    def __init__(self) -> None:
        self.steps: list[str] = []

    def predict(self, text: str) -> str:
        return text

    def load(self) -> None:
        self.steps.append("load")


class FailsToStart(Good):
    def __init__(self) -> None:
        raise OSError("no\nweights")


class FailsToLoad(Good):
    def load(self) -> None:
        raise OSError("no\nweights")


class NoPredict:
    name, version = "none", "1"


class NoName:
    version = "1"

    def predict(self, text: str) -> str:
        return text


class SpaceInName(Good):
    name = "a b"


class NumberAsVersion(Good):
    version = 1  # type: ignore[assignment]


class LoadIsNoMethod(Good):
    load = True  # type: ignore[assignment]


class VagueAboutThreads(Good):
    thread_safe = "perhaps"


not_a_class = Good()


def test_the_dummy_says_what_it_was_given() -> None:
    """The model that stands in for a real one needs no more than a text."""
    assert DummyModel().predict("Hello") == "predicted(Hello)"


@pytest.mark.parametrize(
    ("numbers", "squares"),
    [
        ([1, 2, 3], [1, 4, 9]),
        ([-2, 0.5], [4, 0.25]),
        ([MAX_MAGNITUDE], [MAX_MAGNITUDE**2]),
        ([], []),
    ],
)
def test_numbers_are_squared(numbers: list[int | float], squares: list[int | float]) -> None:
    """Integers stay integers, and the largest square still fits 64 bits."""
    outputs = SquareNumbersModel().predict(numbers)
    assert outputs == squares
    assert [type(output) for output in outputs] == [type(square) for square in squares]
    assert all(abs(output) < 2**63 for output in outputs)


def test_a_model_is_found_by_its_name() -> None:
    """A path, a module and a class are all that it takes."""
    model = find_model(ModelSpec("here", HERE, "Good"))
    assert isinstance(model, Good)
    assert str(ModelSpec("here", HERE, "Good")) == f"here={HERE}:Good"


@pytest.mark.parametrize(
    ("module", "class_name", "why"),
    [
        (
            "no.such.module",
            "Good",
            "cannot import no.such.module: ModuleNotFoundError: No module named 'no'",
        ),
        (HERE, "Missing", f"{HERE} has no class Missing"),
        (HERE, "not_a_class", f"{HERE} has no class not_a_class"),
        (HERE, "FailsToStart", "FailsToStart() failed: OSError: no weights"),
        (HERE, "NoPredict", "NoPredict has no method predict()"),
        (HERE, "NoName", "name must be a string of 1 to 64 printable ASCII characters, not None"),
        (HERE, "SpaceInName", "name must be a string of 1 to 64 printable ASCII characters, not 'a b'"),
        (HERE, "NumberAsVersion", "version must be a string of 1 to 64 printable ASCII characters, not 1"),
        (HERE, "LoadIsNoMethod", "LoadIsNoMethod has no method load()"),
        (HERE, "VagueAboutThreads", "thread_safe must be True or False, not 'perhaps'"),
    ],
)
def test_what_is_not_a_model_is_refused_in_one_line(module: str, class_name: str, why: str) -> None:
    """The line names the variable, the model and what is wrong with it."""
    with pytest.raises(ModelError) as caught:
        find_model(ModelSpec("here", module, class_name))
    assert str(caught.value) == f"MODELS: here={module}:{class_name}: {why}"


def test_steps_that_a_model_does_not_have_are_left_out() -> None:
    """load() runs where it exists; warm_up() does not exist here."""
    model: Any = Good()
    for step in ("load", "warm_up"):
        prepare(ModelSpec("here", HERE, "Good"), model, step)
    assert model.steps == ["load"]


def test_a_step_that_fails_is_one_line_with_its_cause() -> None:
    """The line says which step failed and why; the traceback is kept for whoever asks for it."""
    model: Any = FailsToLoad()
    with pytest.raises(ModelError) as caught:
        prepare(ModelSpec("here", HERE, "FailsToLoad"), model, "load")
    assert str(caught.value) == f"MODELS: here={HERE}:FailsToLoad: load() failed: OSError: no weights"
    assert "in load" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("inference_api.model", ["falcon", "gunicorn", "http", "wsgiref"]),
        ("inference_api.app", ["offapi", "httptools", "gunicorn.arbiter", "inference_api.worker"]),
    ],
)
def test_dependence_runs_one_way(module: str, forbidden: list[str]) -> None:
    """The model module knows nothing of HTTP, and the application nothing of the server below it."""
    code = f"import sys, {module}; print([name for name in {forbidden!r} if name in sys.modules])"
    done: Any = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
