"""The contract of /predict in BentoML; its batches come as arrays, so there a request is an array of one."""

import bentoml

from benchmarks.peers.models import BatchModel


@bentoml.service(workers=1, logging={"access": {"enabled": False}}, metrics={"enabled": False})
class Plain:
    @bentoml.api
    async def predict(self, text: str) -> dict[str, str]:
        return {"input": text, "prediction": f"predicted({text})"}


@bentoml.service(workers=1, logging={"access": {"enabled": False}}, metrics={"enabled": False}, traffic={"timeout": 60})
class Batching:
    def __init__(self) -> None:
        self.model = BatchModel()

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=10_000)
    def predict(self, texts: list[str]) -> list[str]:
        return self.model.predict_batch(texts)
