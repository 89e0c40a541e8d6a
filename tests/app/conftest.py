"""The application with the models that it comes with, and with fakes."""

import pytest

from inference_api.model import DummyModel, SquareNumbersModel
from tests import fakes
from tests.app.client import Client

FAKES = {
    "echo": fakes.Echo,
    "zoo": fakes.Zoo,
    "dots": fakes.Dots,
    "tree": fakes.Sum,
    "swap": fakes.Swap,
    "spoiler": fakes.Spoiler,
    "broken": fakes.Broken,
    "liar": fakes.Liar,
    "picky": fakes.Picky,
    "picky-batch": fakes.BatchOfPicky,
    "picky_batch": fakes.BatchOfPicky,
    "miscounting": fakes.Miscounting,
}


@pytest.fixture(scope="session")
def client() -> Client:
    """The service as it comes out of the box."""
    return Client({"predict": DummyModel, "square_numbers": SquareNumbersModel})


@pytest.fixture(scope="session")
def fake_client() -> Client:
    """The service with a model of every shape."""
    return Client(FAKES)
