"""One training from data to adapter: split, fit, measure."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapters.adapter import Adapter, scaling_of
from adapters.base_layer import BaseLayer
from adapters.errors import Diverged
from adapters.training.closed_form import fit_closed_form
from adapters.training.data import TrainingData
from adapters.training.gradient import History, Report, fit_gradient
from adapters.training.losses import evaluate
from adapters.training.spec import Method, TrainingSpec


@dataclass(frozen=True, slots=True)
class Fit:
    """What a training ends in."""

    adapter: Adapter
    metrics: Mapping[str, float | None]
    history: History


def fit(base: BaseLayer, data: TrainingData, spec: TrainingSpec, *, feature_space: str | None, report: Report) -> Fit:
    """Train as `spec` says. The same base, data, spec and thread count give the same adapter, bit for bit.

    One CPU generator is drawn from in this order: the split, the start, a permutation an epoch.
    Raises `Diverged`.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    training, held_out = data.to(base.device).split(spec.validation_rows(data.rows), generator)
    scaling = scaling_of(spec.alpha, spec.rank, rslora=spec.rslora)
    history: History = []
    if spec.method is Method.CLOSED_FORM:
        a_OR, b_RI = fit_closed_form(base, training, rank=spec.rank, scaling=scaling, ridge=spec.ridge)
    else:
        a_OR, b_RI, history = fit_gradient(base, training, spec, scaling, generator=generator, report=report)
    metrics: dict[str, float | None] = {}
    for part, rows in (("train", training), ("validation", held_out)):
        for who, factor in (("", scaling), ("base_", 0.0)):
            reached = {} if rows is None else evaluate(base, rows, spec.loss, a_OR=a_OR, b_RI=b_RI, scaling=factor)
            for measure in ("loss", "accuracy") if "accuracy" in reached else ("loss",):
                metrics[f"{who}{part}_{measure}"] = reached.get(measure)
    if any(value is not None and not abs(value) < float("inf") for value in metrics.values()):
        raise Diverged("the trained layer's loss is not finite", step=spec.steps(data.rows))
    if spec.method is Method.CLOSED_FORM:
        history = [(0, metrics["base_train_loss"] or 0.0), (1, metrics["train_loss"] or 0.0)]
        report(1, history[-1][1], history)
    adapter = Adapter(a_OR.cpu(), b_RI.cpu(), None, spec.alpha, spec.rslora, feature_space)
    return Fit(adapter, metrics, history)
