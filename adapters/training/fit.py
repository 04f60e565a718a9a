"""One training from data to adapter: split, choose, fit, measure."""

# N rows · K rows of one side · C classes
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.errors import Diverged
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors, loss_of_factors, solve
from adapters.training.closed_form.statistics import Statistics, accumulate
from adapters.training.data_file import TrainingData
from adapters.training.evaluation import selection as choice
from adapters.training.evaluation.evaluate import (
    ComparedFactors,
    compare_on_held_out,
    evaluate_factors,
    summarize_targets,
)
from adapters.training.evaluation.label_matching import match_labels
from adapters.training.gradient.epochs import Epochs
from adapters.training.gradient.losses import class_weights, document_ids, row_weights
from adapters.training.gradient.sampling import Sampler, initial_factors
from adapters.training.gradient.stack import History, ReportStep, StackEntry, TrainedFactors
from adapters.training.gradient.training_loop import CheckpointOptions, HeldOut, run_training_loop
from adapters.training.settings import Loss, TrainingSpec

ROWS_AT_ONCE = 8192
_LEAST_SHARE = 1e-3
"""Of the bare base's loss: from here on sums give a loss to some twelve digits."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What a training ends in."""

    adapter: Adapter
    metrics: Mapping[str, Any]
    history: History
    spec: TrainingSpec
    """As asked for, and with what the held-out rows decided."""
    statistics: Statistics | None = None
    """What the closed form came from, where it is to be kept."""


class Watcher(NamedTuple):
    """Who is told of a training on its way, and where it is kept."""

    report: ReportStep = lambda _step, _loss, _history: None
    note: Callable[[str], None] = lambda _text: None
    """Told in a sentence what was chosen, and why it ended early."""
    kept: CheckpointOptions | None = None
    epochs: Epochs | None = None
    """Takes the times of epochs, where somebody wants them."""


class Sides(NamedTuple):
    """The rows to train on and those held out; the two may be of one table."""

    training: TrainingData
    training_K: Tensor | None
    """Which of its rows; None means all."""
    held: TrainingData | None
    held_K: Tensor | None
    own_weights_N: Tensor | None
    """What the rows of `training` count of themselves, without their classes' weights."""
    held_own_weights_N: Tensor | None
    """And those of `held`."""


def fit(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    *,
    feature_space: str | None = None,
    labels: Sequence[str | int] | None = None,
    present: Adapter | None = None,
    watcher: Watcher = Watcher(),  # noqa: B008 - immutable
) -> Fit:
    """Train as `spec` says. The same base, data, spec and thread count give the same adapter, bit for bit.

    `labels` go into the adapter. `present` is the live version, which is measured on the held-out rows too, its outputs
    matched to the classes by label. Raises
    `Diverged`, and `OutOfRange` where the split leaves a side empty.
    """
    sampler = _sampler(spec, data)
    sides = sides_of(base, data.to(base.device), spec, sampler)
    statistics = None
    history: History
    if spec.is_exact:
        statistics = accumulate(base, _chunks(sides.training, sides.training_K))
        prior_OI = data.prior
        spec = choice.choose_ridge_and_rank(base, sides, spec, statistics, prior_OI=prior_OI, note=watcher.note)
        factors = solve(
            statistics, rank=spec.rank, scaling=spec.scaling, ridge=spec.ridge, bias=spec.bias, prior_OI=prior_OI
        )
        history = []
    else:
        spec = choice.choose_rate_and_rank(spec, lambda trial: _trial(base, data, sides, trial), note=watcher.note)
        # Drawn anew: the trials and the choice leave no trace in what follows.
        sampler = _sampler(spec, data)
        trained, history = _descend(base, data, sides, spec, sampler, watcher)
        factors = Factors(
            trained.a_OR.cpu(), trained.b_RI.cpu(), None if trained.bias_O is None else trained.bias_O.cpu()
        )
        if trained.step != trained.steps or trained.steps < sampler.steps:
            watcher.note(f"took {trained.steps} of {sampler.steps} steps; the factors are those of step {trained.step}")
    metrics = measure_sides(base, sides, spec, factors, present, statistics, labels=labels)
    if spec.is_exact:
        history = [(0, metrics["base_train_loss"]), (1, metrics["train_loss"])]
        watcher.report(1, history[-1][1], history)
    adapter = Adapter(
        factors.a_OR,
        factors.b_RI,
        factors.bias_O,
        spec.alpha,
        spec.rslora,
        feature_space,
        None if labels is None else tuple(labels),
    )
    return Fit(adapter, metrics, history, spec, statistics if spec.keep_statistics else None)


def _sampler(spec: TrainingSpec, data: TrainingData) -> Sampler:
    classes_N = data.targets if data.targets.dtype == torch.int64 else None
    return Sampler(spec, data.rows, key_N=data.key_N, classes_N=classes_N)


def sides_of(base: BaseLayer, data: TrainingData, spec: TrainingSpec, sampler: Sampler) -> Sides:
    """The two sides, their rows counting what they and their classes do; the data are on the base's device."""
    device = base.device
    training_K = None if sampler.held_K is None else sampler.training_K.to(device)
    held_K = None if sampler.held_K is None else sampler.held_K.to(device)
    held = data if held_K is not None else data.held_out
    own_weights_N, held_own_weights_N = data.weights_N, None if held is None else held.weights_N
    # Not for the closed form: there the ridge is beside sums of weights, and their size matters.
    if not spec.is_exact:
        some = slice(None) if training_K is None else training_K
        weights_N = None if data.weights_N is None else data.weights_N[some]
        weights_C = class_weights(spec, data.targets[some], weights_N, base.out_features)
        whole = held is data
        data = data.weighted(row_weights(data, weights_C))
        held = data if whole else None if held is None else held.weighted(row_weights(held, weights_C))
    return Sides(data, training_K, held, held_K, own_weights_N, held_own_weights_N)


def _chunks(data: TrainingData, rows_K: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    for part in data.parts(rows_K, ROWS_AT_ONCE):
        yield part.inputs_NI, part.targets, part.weights_N


def _descend(
    base: BaseLayer, data: TrainingData, sides: Sides, spec: TrainingSpec, sampler: Sampler, watcher: Watcher
) -> tuple[TrainedFactors, History]:
    task = StackEntry(sampler, sampler.training_K, initial_factors(base, data, spec, sampler))
    held_out = None
    if spec.patience is not None and sides.held is not None:
        rows_K = torch.arange(sides.held.rows) if sides.held_K is None else sides.held_K.cpu()
        held_out = HeldOut(sides.held, [rows_K])
    report = watcher.report
    if watcher.epochs is not None:
        report = watcher.epochs.timing(report, steps=sampler.steps, steps_an_epoch=sampler.steps_an_epoch)
    (trained,), history = run_training_loop(
        base, sides.training, spec, [task], report=report, held_out=held_out, checkpoint=watcher.kept
    )
    if trained.error is not None:
        raise trained.error
    return trained, history


def _trial(base: BaseLayer, data: TrainingData, sides: Sides, trial: TrainingSpec) -> choice.TrialLoss:
    """What a short training reaches on the held-out rows; an infinite loss where it diverges."""
    sampler = _sampler(trial, data)
    assert sides.held is not None
    try:
        trained, _ = _descend(base, data, sides, trial, sampler, Watcher())
    except Diverged:
        return choice.TrialLoss(math.inf, 0.0)
    factors = Factors(trained.a_OR, trained.b_RI, trained.bias_O)
    documents_N = document_ids(sides.held.targets) if trial.loss is Loss.MULTIPLE_NEGATIVES else None
    found = evaluate_factors(base, sides.held, sides.held_K, trial, factors, documents_N)
    return (
        choice.TrialLoss(found["loss"], found["error"])
        if math.isfinite(found["loss"])
        else choice.TrialLoss(math.inf, 0.0)
    )


def _from_sums(statistics: Statistics, spec: TrainingSpec, factors: Factors | None) -> float | None:
    """The squared error over all rows without going through them; None where the sums' rounding would show in it."""
    bare = statistics.square / (statistics.weight * statistics.out_features)
    if factors is None:
        return bare
    loss = loss_of_factors(statistics, factors, scaling=spec.scaling)
    return loss if loss > _LEAST_SHARE * bare else None


def measure_sides(
    base: BaseLayer,
    sides: Sides,
    spec: TrainingSpec,
    factors: Factors,
    present: Adapter | None,
    statistics: Statistics | None = None,
    *,
    labels: Sequence[str | int] | None = None,
) -> dict[str, Any]:
    """The job's losses on both sides, with the factors as they are stored and without; and what people read of the
    held-out side. `statistics` are those of the training side, `labels` those of the classes. Raises `Diverged` where a
    loss is not finite."""
    metrics: dict[str, Any] = {}
    negatives = spec.loss is Loss.MULTIPLE_NEGATIVES
    sides_by_name = {
        "train": (sides.training, sides.training_K, sides.own_weights_N),
        "validation": (sides.held, sides.held_K, sides.held_own_weights_N),
    }
    for part, (rows, rows_K, own_weights_N) in sides_by_name.items():
        documents_N = document_ids(rows.targets) if negatives and rows is not None else None
        for who, some in (("", factors), ("base_", None)):
            known = None if part != "train" or statistics is None else _from_sums(statistics, spec, some)
            if known is not None:
                found = {"loss": known}
            else:
                found = (
                    {} if rows is None else evaluate_factors(base, rows, rows_K, spec, some, documents_N, own_weights_N)
                )
            for measure in ("loss", "accuracy") if spec.loss is Loss.CROSS_ENTROPY else ("loss",):
                metrics[f"{who}{part}_{measure}"] = found.get(measure)
    if any(value is not None and not math.isfinite(value) for value in metrics.values()):
        raise Diverged("the trained layer's loss is not finite", step=1)
    if sides.held is not None:
        contenders = {"adapter": ComparedFactors(factors, spec.scaling), "base": ComparedFactors(None, 1.0)}
        if present is not None:
            live = Factors(present.a_OR, present.b_RI, present.bias_O)
            matching = match_labels(present.labels, labels, spec, outputs=base.out_features)
            contenders["live"] = ComparedFactors(live, present.scaling, matching)
        held_out = compare_on_held_out(
            base,
            sides.held,
            sides.held_K,
            spec,
            contenders,
            weights_N=sides.held_own_weights_N,
            summary=summarize_targets(
                sides.training.weighted(sides.own_weights_N), sides.training_K, spec, base.out_features
            ),
            corpus_MO=sides.training.corpus_MO,
        )
        held_out["adapter"]["loss"], held_out["base"]["loss"] = (
            metrics["validation_loss"],
            metrics["base_validation_loss"],
        )
        if present is not None:
            documents_N = document_ids(sides.held.targets) if negatives else None
            with_scaling = replace(spec, alpha=present.alpha, rank=present.rank, rslora=present.rslora)
            of_live = evaluate_factors(
                base, sides.held, sides.held_K, with_scaling, live, documents_N, matching=matching
            )
            held_out["live"]["loss"] = of_live["loss"]
        metrics["held_out"] = held_out
    return metrics
