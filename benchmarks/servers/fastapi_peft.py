"""The same with PEFT: every adapter loaded, the request names one, `adapter_names=` selects it."""

import torch
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.peft_layer import PeftLayer
from benchmarks.servers.layer import arguments, make_linear, run
from benchmarks.tenants import factors


class Question(BaseModel):
    """What is sent."""

    adapter: str
    inputs: list[list[float]]


class Answer(BaseModel):
    """What is answered."""

    outputs: list[list[float]]


def make_app(layer: PeftLayer) -> FastAPI:
    """Return the application for one layer and its adapters."""
    app = FastAPI()

    @app.post("/predict")
    async def predict(question: Question) -> Answer:
        with torch.inference_mode():
            outputs = layer(torch.tensor(question.inputs), [question.adapter] * len(question.inputs))
        return Answer(outputs=outputs.tolist())

    return app


if __name__ == "__main__":
    given = arguments()
    shape = (given.in_features, given.out_features)
    tenants = (factors(number, *shape, given.rank) for number in range(given.adapters))
    run(make_app(PeftLayer(make_linear(*shape), tenants)), given.port)
