"""The service against its own OpenAPI document: schemathesis makes requests by it, good and bad, and finds nothing."""

import os
import subprocess
import sys
from pathlib import Path

from tests.live.service import running

RUN_SECONDS = 300
EXAMPLES = 40
SEED = 1

MODELS = """
from typing import Annotated, Literal, TypedDict
from msgspec import Meta, Struct

class Box(Struct, forbid_unknown_fields=True):
    width: Annotated[float, Meta(ge=0, le=100)]
    height: Annotated[float, Meta(gt=0, lt=1)]
    label: str | None = None

class Found(TypedDict):
    area: float
    kind: Literal["small", "large"]

class Boxes:
    '''Several parameters, nested, with bounds and defaults.'''
    name, version = "boxes", "1.0.0"
    def predict(
        self,
        boxes: Annotated[list[Box], Meta(min_length=1, max_length=5)],
        strict: bool = False,
        kind: Literal["any", "small"] = "any",
        weights: dict[str, Annotated[float, Meta(ge=0)]] | None = None,
    ) -> Found:
        area = sum(box.width * box.height for box in boxes)
        return {"area": area, "kind": "small" if area < 10 else "large"}
    def predict_batch(self, inputs: list) -> list:
        return [self.predict(**each) for each in inputs]
"""
SERVED = (
    "predict=inference_api.model:DummyModel,square_numbers=inference_api.model:SquareNumbersModel,boxes=models:Boxes"
)
# By its document a request may be this large: the bound of bytes is not the schema's.
MAX_BODY_BYTES = "67108864"


def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    """Every answer fits the document; what fits it is accepted, what does not is refused, and nothing is a 5xx."""
    with running(tmp_path, MODELS, MODELS=SERVED, MAX_BODY_BYTES=MAX_BODY_BYTES) as service:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", "--no-color", "--generation-database=none"),
                *("--checks=all", "--phases=examples,coverage,fuzzing", f"--max-examples={EXAMPLES}", f"--seed={SEED}"),
                f"http://127.0.0.1:{service.port}/openapi.json",
            ],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
        )
        assert done.returncode == 0, "\n".join(line[:500] for line in (done.stdout + done.stderr).splitlines())
        assert "No issues found" in done.stdout
        assert not [line for line in service.log() if line["level"] in ("ERROR", "CRITICAL")]
        assert not service.stderr
