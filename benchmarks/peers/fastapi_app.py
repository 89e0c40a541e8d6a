"""The contract of /predict in FastAPI; the handler is a coroutine, FastAPI's fastest way for a model this cheap."""

from fastapi import FastAPI
from pydantic import BaseModel, Field

from benchmarks.peers.models import LARGE_CHARACTERS

app = FastAPI()


class Input(BaseModel):
    text: str = Field(min_length=1, max_length=10_000)


class Output(BaseModel):
    input: str
    prediction: str


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "healthy"}


@app.post("/predict")
async def predict(body: Input) -> Output:
    return Output(input=body.text, prediction=f"predicted({body.text})")


@app.post("/large")
async def large(body: Input) -> Output:
    return Output(input=body.text, prediction="a" * LARGE_CHARACTERS)
