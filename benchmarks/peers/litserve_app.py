"""The contract of /predict in LitServe: python litserve_app.py PORT [batch]."""

import sys
from typing import Any

import litserve

from benchmarks.peers.models import BatchModel

MAX_BATCH_SIZE = 64
BATCH_TIMEOUT_SECONDS = 0.005


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = BatchModel()

    def decode_request(self, request: dict[str, Any]) -> str:
        return str(request["text"])

    def encode_response(self, output: tuple[str, str]) -> dict[str, str]:
        return {"input": output[0], "prediction": output[1]}


class Plain(Api):
    def predict(self, x: str) -> tuple[str, str]:
        return x, f"predicted({x})"


class Batching(Api):
    def predict(self, x: list[str]) -> list[tuple[str, str]]:
        return list(zip(x, self.model.predict_batch(x), strict=True))

    def batch(self, inputs: list[str]) -> list[str]:
        return inputs

    def unbatch(self, output: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return output


if __name__ == "__main__":
    if sys.argv[2:] == ["batch"]:
        api: Api = Batching(max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_TIMEOUT_SECONDS)
    else:
        api = Plain()
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )
