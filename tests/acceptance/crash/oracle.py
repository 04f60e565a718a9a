"""What an answer must be, worked out without the code under test: dense float64, and the contract's bytes."""

# N rows · I in_features · O out_features · R rank
import hashlib
import json
import random
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

Floats: TypeAlias = NDArray[np.float64]
IN, OUT = 16, 8
BASE = f"random:{IN},{OUT},3"
_ROWS = 40


@cache
def base_weight() -> Floats:
    """W of `BASE`, by the recipe that the settings' table gives."""
    torch.manual_seed(3)
    return torch.randn(OUT, IN).numpy().astype(np.float64)


def inputs_of(rows: int) -> Floats:
    """Rows to ask with."""
    return np.random.default_rng(rows).normal(size=(rows, IN)).astype(np.float32).astype(np.float64)


def answer(x_I: Floats, delta_OI: Floats | None) -> Floats:
    """y = (W + ΔW)·x; the base has a zero bias."""
    weight_OI = base_weight() if delta_OI is None else base_weight() + delta_OI
    return weight_OI @ x_I


@dataclass(frozen=True, eq=False)
class Upload:
    """Factors on their way to the service."""

    a_OR: NDArray[np.float32]
    b_RI: NDArray[np.float32]
    alpha: float
    digest: str

    @property
    def delta(self) -> Floats:
        """s·A·B."""
        scaled_OR: Floats = self.a_OR.astype(np.float64) * (self.alpha / self.b_RI.shape[0])
        return np.asarray(scaled_OR @ self.b_RI.astype(np.float64))

    def body(self) -> dict[str, object]:
        """As JSON."""
        return {"A": self.a_OR.tolist(), "B": self.b_RI.tolist(), "alpha": self.alpha}


def make_upload(draw: random.Random) -> Upload:
    """Another adapter each time; its digest is of the canonical bytes that the contract describes."""
    generator = np.random.default_rng(draw.getrandbits(64))
    rank = draw.choice((1, 2, 3, 200))
    a_OR = generator.normal(size=(OUT, rank)).astype(np.float32)
    b_RI = generator.normal(size=(rank, IN)).astype(np.float32)
    alpha = float(draw.randint(1, 4))
    about = json.dumps({"alpha": alpha, "format": 1, "rslora": False}, separators=(",", ":"), sort_keys=True)
    content = save({"A": a_OR, "B": b_RI}, metadata={"loraplex": about})
    return Upload(a_OR, b_RI, alpha, f"sha256:{hashlib.sha256(content).hexdigest()}")


@dataclass(frozen=True, eq=False)
class Recipe:
    """A training, and the ΔW that it must end in."""

    body: dict[str, Any]
    delta: Floats


@cache
def recipes() -> dict[str, Recipe]:
    """An exact one, a short descent and one that takes longer."""
    generator = np.random.default_rng(11)
    x_NI = generator.normal(size=(_ROWS, IN)).astype(np.float32).astype(np.float64)
    y_NO = generator.normal(size=(_ROWS, OUT)).astype(np.float32).astype(np.float64)
    data = {"inputs": x_NI.tolist(), "targets": y_NO.tolist()}
    exact_IO = np.linalg.lstsq(x_NI, y_NO - x_NI @ base_weight().T, rcond=None)[0].astype(np.float64)
    made = {"exact": Recipe({"rank": OUT, "data": data, "training": {"method": "closed_form"}}, exact_IO.T)}
    a_OR = generator.normal(size=(OUT, 2)).astype(np.float32)
    b_RI = generator.normal(size=(2, IN)).astype(np.float32)
    for name, epochs in (("short", 100), ("slow", 700)):
        training = {"method": "sgd", "epochs": epochs, "learning_rate": 0.01, "batch_size": None}
        training["init"] = {"A": a_OR.tolist(), "B": b_RI.tolist()}
        delta_OI = _descend(x_NI, y_NO, a_OR.astype(np.float64), b_RI.astype(np.float64), epochs, 0.01)
        made[name] = Recipe({"rank": 2, "data": data, "training": training}, delta_OI)
    return made


def _descend(x_NI: Floats, y_NO: Floats, a_OR: Floats, b_RI: Floats, steps: int, rate: float) -> Floats:
    """Full-batch gradient descent on the mean squared error, by hand."""
    for _ in range(steps):
        error_NO = x_NI @ (base_weight() + a_OR @ b_RI).T - y_NO
        gradient_OI = 2 / error_NO.size * error_NO.T @ x_NI
        a_OR, b_RI = a_OR - rate * gradient_OI @ b_RI.T, b_RI - rate * a_OR.T @ gradient_OI
    return a_OR @ b_RI
