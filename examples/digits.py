"""Handwritten digits, by a random forest of scikit-learn: 64 numbers in, a digit and ten probabilities out."""

import os
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np
from msgspec import Meta
from skops.io import load

WEIGHTS = Path(__file__).parent / "weights" / "digits.skops"
TRUSTED = ["sklearn.tree._tree.Tree"]
A_TWO = [0,0,11,16,15,3,0,0, 0,5,16,12,11,13,0,0, 0,3,13,1,5,15,0,0, 0,0,0,0,12,11,0,0]  # fmt: skip
A_TWO += [0,0,0,1,16,7,0,0, 0,0,0,10,15,0,0,0, 0,0,12,16,16,11,1,0, 0,0,13,13,8,13,16,8]  # fmt: skip

Pixel = Annotated[int, Meta(ge=0, le=16)]
Pixels = Annotated[list[Pixel], Meta(min_length=64, max_length=64, examples=[A_TWO])]


class Digit(TypedDict):
    label: int
    probabilities: list[float]


class DigitsModel:
    name, version = "digits", "1.0.0"
    thread_safe = False  # a forest changes Python's warning filters, which all threads share, for every tree

    def load(self) -> None:
        path = Path(os.environ.get("DIGITS_WEIGHTS", WEIGHTS))
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: make it with python -m examples.train_digits")
        # Unlike pickle and joblib, skops runs no code out of the file; a forged forest could still crash the process.
        self._classifier = load(path, trusted=TRUSTED)

    def predict(self, pixels: Pixels) -> Digit:
        return self.predict_batch([pixels])[0]

    def predict_batch(self, inputs: list[list[int]]) -> list[Digit]:
        rows = self._classifier.predict_proba(np.array(inputs)).round(6)
        return [{"label": int(row.argmax()), "probabilities": row.tolist()} for row in rows]
