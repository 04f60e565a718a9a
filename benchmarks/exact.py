"""Exact minimum of the squared error beside 20 epochs of AdamW (the service's, and plain torch): loss and time.

All run in this process, on one thread.
"""

# N rows · I in_features · O out_features
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import TrainingData
from adapters.training.fit import fit
from adapters.training.settings import Method, TrainingSpec
from benchmarks.plain_torch import train_alone
from benchmarks.plan import RANK, WIDE, Plan
from benchmarks.progress import say
from benchmarks.stores import load_base

SHAPE = WIDE
ROWS, EPOCHS = 5_000, 20
BATCH = 64
RATES = (0.0003, 0.001, 0.003, 0.01)
"""AdamW gets the best of these by its loss, and is charged for the one run."""
ADAMW = {"adamw": "AdamW of the service", "plain": "AdamW in plain torch"}
_TRUE_RANK = 32
EXACT = TrainingSpec(rank=RANK, alpha=RANK, method=Method.CLOSED_FORM)
DESCENT = TrainingSpec(rank=RANK, alpha=RANK, method=Method.ADAMW, epochs=EPOCHS, batch_size=BATCH)


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
        for name, run in (("adamw", _run_own), ("plain", _run_plain)):
            rates = RATES if number == 0 else [best_run(rounds[0], name)["rate"]]
            found[name] = [{"rate": rate} | run(base, data, rate) for rate in rates]
        rounds.append(found)
        said = [
            f"{name} {best_run(found, name)['loss']:.4f} in {best_run(found, name)['seconds']:.2f} s" for name in ADAMW
        ]
        say(f"fits: closed_form {found['loss']:.4f} in {found['seconds']:.2f} s, {', '.join(said)}")
    return {"layer": str(SHAPE), "rows": ROWS, "epochs": EPOCHS, "rank": RANK, "rounds": rounds}


def best_run(found: Mapping[str, Any], name: str) -> Any:
    """Of one AdamW in a round: that with the lowest loss."""
    return min(found[name], key=lambda run: run["loss"])


def _run_own(base: BaseLayer, data: TrainingData, rate: float) -> dict[str, float]:
    begin = time.perf_counter()
    done = fit(base, data, replace(DESCENT, learning_rate=rate))
    return {"seconds": time.perf_counter() - begin, "loss": done.metrics["train_loss"]}


def _run_plain(base: BaseLayer, data: TrainingData, rate: float) -> dict[str, float]:
    """Return the time without the losses on all rows, which the service computes with every fit."""
    begin = time.perf_counter()
    a_OR, b_RI = train_alone(
        base.weight_OI, data.inputs_NI, data.targets, rank=RANK, epochs=EPOCHS, batch_size=BATCH, learning_rate=rate
    )
    seconds = time.perf_counter() - begin
    outputs_NO = data.inputs_NI.double() @ (base.weight_OI.double() + a_OR.double() @ b_RI.double()).T
    return {"seconds": seconds, "loss": float((outputs_NO - data.targets.double()).square().mean())}


def _data() -> TrainingData:
    """Targets of a layer that differs from the base by more ranks than the adapter has, and noise."""
    generator = torch.Generator().manual_seed(11)
    I, O = SHAPE.in_features, SHAPE.out_features
    x_NI = torch.randn(ROWS, I, generator=generator)
    change_OI = torch.randn(O, _TRUE_RANK, generator=generator) @ torch.randn(_TRUE_RANK, I, generator=generator)
    targets_NO = x_NI @ (load_base(SHAPE).weight_OI + change_OI / I).T
    return TrainingData(x_NI, targets_NO + 0.5 * torch.randn(ROWS, O, generator=generator))
