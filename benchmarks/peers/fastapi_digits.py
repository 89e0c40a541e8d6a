"""examples/digits.py behind FastAPI, called once a request; a coroutine again, as the model is not thread-safe."""

from typing import Annotated

from fastapi import FastAPI
from pydantic import BaseModel, Field

from examples.digits import DigitsModel

app = FastAPI()
model = DigitsModel()
model.load()


class Input(BaseModel):
    pixels: list[Annotated[int, Field(ge=0, le=16)]] = Field(min_length=64, max_length=64)


class Digit(BaseModel):  # pydantic takes no typing.TypedDict before Python 3.12
    label: int
    probabilities: list[float]


class Output(BaseModel):
    input: list[int]
    prediction: Digit


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "healthy"}


@app.post("/digits")
async def digits(body: Input) -> Output:
    return Output(input=body.pixels, prediction=Digit(**model.predict(body.pixels)))
