"""Writes the classifier of digits.py, trained before, as ONNX: python -m examples.export_digits_onnx"""

import os
from pathlib import Path

from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from skops.io import load

from examples.digits import TRUSTED
from examples.digits import WEIGHTS as TRAINED

WEIGHTS = TRAINED.with_suffix(".onnx")


def main() -> None:
    """Read $DIGITS_WEIGHTS and write $DIGITS_ONNX, by default digits.skops and digits.onnx in examples/weights."""
    classifier = load(Path(os.environ.get("DIGITS_WEIGHTS", TRAINED)), trusted=TRUSTED)
    inputs = [("pixels", FloatTensorType([None, classifier.n_features_in_]))]
    model = to_onnx(classifier, initial_types=inputs, options={"zipmap": False})
    path = Path(os.environ.get("DIGITS_ONNX", WEIGHTS))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".new")
    whole.write_bytes(model.SerializeToString())
    whole.replace(path)
    print(path)  # noqa: T201 - a program for users


if __name__ == "__main__":
    main()
