"""Handwritten digits as digits.py reads them, by ONNX Runtime, which needs no scikit-learn and is far faster."""

import os
from pathlib import Path
from typing import Annotated, TypedDict

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at import: without it, usage data goes to its maker
import numpy as np
from msgspec import Meta
from onnxruntime import InferenceSession, SessionOptions

WEIGHTS = Path(__file__).parent / "weights" / "digits.onnx"

Pixel = Annotated[int, Meta(ge=0, le=16)]
Pixels = Annotated[list[Pixel], Meta(min_length=64, max_length=64)]


class Digit(TypedDict):
    label: int
    probabilities: list[float]


class DigitsOnnxModel:
    name, version = "digits-onnx", "1.0.0"

    def load(self) -> None:
        path = Path(os.environ.get("DIGITS_ONNX", WEIGHTS))
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: make it with python -m examples.export_digits_onnx")
        options = SessionOptions()
        # No threads of its own: WEB_CONCURRENCY and THREADS say how much is run at once, and a fork is safe.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(self, pixels: Pixels) -> Digit:
        return self.predict_batch([pixels])[0]

    def predict_batch(self, inputs: list[list[int]]) -> list[Digit]:
        labels, rows = self._session.run(None, {"pixels": np.array(inputs, dtype=np.float32)})
        rows = rows.astype(np.float64).round(6)
        return [{"label": int(n), "probabilities": row.tolist()} for n, row in zip(labels, rows, strict=True)]
