"""The exact minimum of squared error beside 20 epochs of AdamW: loss and time, in this process, on one thread."""

# N rows · I in_features · O out_features
import time
from dataclasses import replace
from typing import Any

import torch

from adapters.training.data import TrainingData
from adapters.training.fit import fit
from adapters.training.spec import Method, TrainingSpec
from benchmarks.plan import RANK, WIDE, Plan
from benchmarks.progress import say
from benchmarks.stores import load_base

SHAPE = WIDE
ROWS, EPOCHS = 5_000, 20
RATES = (0.0003, 0.001, 0.003, 0.01)
"""AdamW gets the best of these by its loss, and is charged for the one run."""
_TRUE_RANK = 32
EXACT = TrainingSpec(rank=RANK, alpha=RANK, method=Method.CLOSED_FORM)
DESCENT = TrainingSpec(rank=RANK, alpha=RANK, method=Method.ADAMW, epochs=EPOCHS, batch_size=64)


def measure_exact(plan: Plan) -> dict[str, Any]:
    """Seconds and training losses of a round each: `closed_form`, and AdamW by its learning rate."""
    torch.set_num_threads(1)
    base, data = load_base(SHAPE), _data()
    rounds: list[dict[str, Any]] = []
    for number in range(plan.fit_rounds):
        begin = time.perf_counter()
        exact = fit(base, data, EXACT)
        found: dict[str, Any] = {"seconds": time.perf_counter() - begin, "loss": exact.metrics["train_loss"]}
        found["base_loss"] = exact.metrics["base_train_loss"]
        found["adamw"] = []
        for rate in RATES if number == 0 else [best_run(rounds[0])["rate"]]:
            begin = time.perf_counter()
            descent = fit(base, data, replace(DESCENT, learning_rate=rate))
            seconds = time.perf_counter() - begin
            found["adamw"].append({"rate": rate, "seconds": seconds, "loss": descent.metrics["train_loss"]})
        rounds.append(found)
        best = best_run(found)
        say(
            f"fits: closed_form {found['loss']:.4f} in {found['seconds']:.2f} s, AdamW {best['loss']:.4f} in "
            f"{best['seconds']:.2f} s at {best['rate']:g}"
        )
    return {"layer": str(SHAPE), "rows": ROWS, "epochs": EPOCHS, "rank": RANK, "rounds": rounds}


def best_run(found: Any) -> Any:
    """AdamW's of a round, with the lowest loss."""
    return min(found["adamw"], key=lambda run: run["loss"])


def _data() -> TrainingData:
    """Targets of a layer that differs from the base by more ranks than the adapter has, and noise."""
    generator = torch.Generator().manual_seed(11)
    I, O = SHAPE.in_features, SHAPE.out_features
    x_NI = torch.randn(ROWS, I, generator=generator)
    change_OI = torch.randn(O, _TRUE_RANK, generator=generator) @ torch.randn(_TRUE_RANK, I, generator=generator)
    targets_NO = x_NI @ (load_base(SHAPE).weight_OI + change_OI / I).T
    return TrainingData(x_NI, targets_NO + 0.5 * torch.randn(ROWS, O, generator=generator))
