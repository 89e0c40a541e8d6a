"""The contract of /predict in MLServer, by its custom handlers."""

from mlserver import MLModel
from mlserver.handlers import custom_handler
from pydantic import BaseModel


class Input(BaseModel):
    text: str


class Output(BaseModel):
    input: str
    prediction: str


class Dummy(MLModel):
    async def load(self) -> bool:
        return True

    @custom_handler(rest_path="/predict")
    async def answer(self, body: Input) -> Output:
        return Output(input=body.text, prediction=f"predicted({body.text})")
