"""The base layer alone behind FastAPI, as its tutorial writes it: pydantic models in and out."""

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from torch import nn

from benchmarks.servers.layer import arguments, make_linear, run


class Question(BaseModel):
    """What is sent."""

    inputs: list[list[float]]


class Answer(BaseModel):
    """What is answered."""

    outputs: list[list[float]]


def make_app(linear: nn.Linear) -> FastAPI:
    """Return the application for one layer."""
    app = FastAPI()

    # async: on this little work the thread that a plain def runs in would cost more than it gives.
    @app.post("/predict")
    async def predict(question: Question) -> Answer:
        with torch.inference_mode():
            outputs = linear(torch.tensor(question.inputs))
        return Answer(outputs=outputs.tolist())

    return app


if __name__ == "__main__":
    given = arguments()
    run(make_app(make_linear(given.in_features, given.out_features)), given.port)
