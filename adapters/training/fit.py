"""Fit of one adapter from its data file: split, choice of open settings, training, evaluation."""

# N rows · K rows of one side · C classes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.errors import Diverged
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form.solver import Factors, loss_of_factors, solve
from adapters.training.closed_form.statistics import Statistics, accumulate_data
from adapters.training.data_file import TrainingData
from adapters.training.evaluation import selection
from adapters.training.evaluation.evaluate import (
    ComparedFactors,
    Evaluation,
    base_matching,
    compare_on_held_out,
    evaluate_factors,
    match_labels,
    summarize_targets,
)
from adapters.training.evaluation.judgement import AdapterReport, LiveVersion
from adapters.training.evaluation.row_errors import guess_outputs, held_out_errors, replace_trained_errors, report_of
from adapters.training.gradient.losses import class_weights, document_ids, row_weights
from adapters.training.gradient.sampling import Sampler, StackEntry, initial_factors
from adapters.training.gradient.stack import History, ReportStep, TrainedFactors
from adapters.training.gradient.training_loop import CheckpointOptions, Epochs, HeldOut, run_training_loop
from adapters.training.settings import Loss, TrainingSpec

# Share of the base layer's loss above which the sums give a loss to about twelve digits.
_MIN_LOSS_SHARE = 1e-3


@dataclass(frozen=True, slots=True)
class Fit:
    """Result of a training."""

    adapter: Adapter
    evaluation: Evaluation
    history: History
    spec: TrainingSpec
    """The requested specification, with the settings that held-out rows have chosen."""
    statistics: Statistics | None = None
    """Statistics of the closed form, if they are to be kept."""
    report: AdapterReport | None = None
    """None if no rows are held out."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Return the evaluation as a job shows it."""
        return self.evaluation.to_json()


class Watcher(NamedTuple):
    """Callbacks of a training, and its checkpoints."""

    report: ReportStep = lambda _step, _loss, _history: None
    note: Callable[[str], None] = lambda _text: None
    """Takes a sentence about a choice, or about an early end."""
    checkpoint: CheckpointOptions | None = None
    epochs: Epochs | None = None
    """Records the times of epochs."""


class Side(NamedTuple):
    """Rows of one side of a split."""

    data: TrainingData
    """A table that has these rows, and the weights of rows and classes."""
    rows_K: Tensor | None
    """Indices of the rows; None means all."""
    own_weights_N: Tensor | None
    """Weights of the rows of the table without those of their classes."""


class Sides(NamedTuple):
    """Rows to train on and held-out rows; both may be rows of one table."""

    training: Side
    held: Side | None


def fit(
    base: BaseLayer,
    data: TrainingData,
    spec: TrainingSpec,
    *,
    feature_space: str | None = None,
    labels: Sequence[str | int] | None = None,
    live: LiveVersion | None = None,
    watcher: Watcher = Watcher(),  # noqa: B008 - immutable
) -> Fit:
    """Train one adapter. The same base, data, spec and thread count give the same adapter, bit for bit.

    labels: stored in the adapter. live: the live version, which is evaluated on the held-out rows too, its outputs
    matched to the classes by label. Raises `Diverged`, and `OutOfRange` if the split leaves a side empty.
    """
    sampler = _sampler(spec, data)
    sides = _split(base, data, spec, sampler)
    statistics = None
    history: History
    if spec.is_exact:
        statistics = accumulate_data(base, sides.training.data, sides.training.rows_K)
        prior_OI = data.prior
        spec = selection.choose_ridge_and_rank(base, sides, spec, statistics, prior_OI=prior_OI, note=watcher.note)
        factors = solve(
            statistics, rank=spec.rank, scaling=spec.scaling, ridge=spec.ridge, bias=spec.bias, prior_OI=prior_OI
        )
        history = []
    else:
        if sides.held is not None:
            spec = selection.choose_rate_and_rank(
                spec, lambda trial: _trial(base, data, sides, trial), note=watcher.note
            )
        # A new sampler, so that the trials do not change what follows.
        sampler = _sampler(spec, data)
        trained, history = _train(base, data, sides, spec, sampler, watcher)
        factors = trained.factors.map(Tensor.cpu)
        if trained.step != trained.steps or trained.steps < sampler.steps:
            watcher.note(f"took {trained.steps} of {sampler.steps} steps; the factors are those of step {trained.step}")
    present = None if live is None else live.adapter
    compared = compared_factors(base, spec, factors, present, labels)
    evaluation = evaluate_sides(base, sides, spec, compared, present, statistics)
    report = None if sides.held is None else _judge(base, sides, spec, compared, live, labels)
    if spec.is_exact:
        losses = evaluation.losses
        history = [(0, losses["base_train_loss"]), (1, losses["train_loss"])]  # type: ignore[list-item]  # no None here
        watcher.report(1, history[-1][1], history)
    names = None if labels is None else tuple(labels)
    adapter = Adapter(*factors, spec.alpha, spec.rslora, feature_space, names)
    return Fit(adapter, evaluation, history, spec, statistics if spec.keep_statistics else None, report)


def _sampler(spec: TrainingSpec, data: TrainingData) -> Sampler:
    classes_N = data.targets if data.targets.dtype == torch.int64 else None
    return Sampler(spec, data.rows, key_N=data.key_N, classes_N=classes_N)


def _split(base: BaseLayer, data: TrainingData, spec: TrainingSpec, sampler: Sampler) -> Sides:
    """Return both sides with the weights of rows and classes, on the device of the base layer."""
    data, training_K, held_K = data.to(base.device), None, None
    if sampler.held_K is not None:
        training_K, held_K = sampler.training_K.to(base.device), sampler.held_K.to(base.device)
    held = data if held_K is not None else data.held_out
    weights_C = None
    # Not for the closed form: its ridge is added to sums of weights, so their size matters.
    if not spec.is_exact:
        selected = slice(None) if training_K is None else training_K
        weights_N = None if data.weights_N is None else data.weights_N[selected]
        weights_C = class_weights(spec, data.targets[selected], weights_N, base.out_features)

    def side(table: TrainingData, rows_K: Tensor | None) -> Side:
        weighted = table if spec.is_exact else table.weighted(row_weights(table, weights_C))
        return Side(weighted, rows_K, table.weights_N)

    return Sides(side(data, training_K), None if held is None else side(held, held_K))


def _train(
    base: BaseLayer, data: TrainingData, sides: Sides, spec: TrainingSpec, sampler: Sampler, watcher: Watcher
) -> tuple[TrainedFactors, History]:
    task = StackEntry(sampler, sampler.training_K, initial_factors(base, data, spec, sampler))
    held_out = None
    if spec.patience is not None and sides.held is not None:
        table, rows_K, _ = sides.held
        held_out = HeldOut(table, [torch.arange(table.rows) if rows_K is None else rows_K.cpu()])
    report = watcher.report
    if watcher.epochs is not None:
        report = watcher.epochs.timing(report, steps=sampler.steps, steps_an_epoch=sampler.steps_an_epoch)
    (trained,), history = run_training_loop(
        base, sides.training.data, spec, [task], report=report, held_out=held_out, checkpoint=watcher.checkpoint
    )
    if trained.error is not None:
        raise trained.error
    return trained, history


def _trial(base: BaseLayer, data: TrainingData, sides: Sides, trial: TrainingSpec) -> selection.TrialLoss:
    """Return the held-out loss of a short training; infinite if it diverges."""
    sampler = _sampler(trial, data)
    assert sides.held is not None
    try:
        trained, _ = _train(base, data, sides, trial, sampler, Watcher())
    except Diverged:
        return selection.TrialLoss(math.inf, 0.0)
    table, rows_K, _ = sides.held
    losses = evaluate_factors(base, table, rows_K, trial, trained.factors, document_ids(trial, table.targets))
    if not math.isfinite(losses["loss"]):
        return selection.TrialLoss(math.inf, 0.0)
    return selection.TrialLoss(losses["loss"], losses["error"])


def compared_factors(
    base: BaseLayer, spec: TrainingSpec, factors: Factors, present: Adapter | None, labels: Sequence[str | int] | None
) -> dict[str, ComparedFactors]:
    """Return what is compared on the held-out rows, with the outputs of each matched to the labels of the classes."""
    compared = {
        "adapter": ComparedFactors(factors, spec.scaling),
        "base": ComparedFactors(None, 1.0, base_matching(base, labels, spec)),
    }
    if present is not None:
        matching = match_labels(present.labels, labels, spec, outputs=base.out_features, base_labels=base.labels)
        live = Factors(present.a_OR, present.b_RI, present.bias_O)
        compared["live"] = ComparedFactors(live, present.scaling, matching)
    return compared


def evaluate_sides(
    base: BaseLayer,
    sides: Sides,
    spec: TrainingSpec,
    compared: Mapping[str, ComparedFactors],
    present: Adapter | None,
    statistics: Statistics | None = None,
) -> Evaluation:
    """Evaluate factors, as they are stored, and the base layer on both sides, and all metrics on the held-out side.

    present: the live version, if it is compared. statistics: those of the training side. Raises `Diverged` if a loss is
    not finite.
    """
    losses = _losses_of_sides(base, sides, spec, compared, statistics)
    if any(value is not None and not math.isfinite(value) for value in losses.values()):
        raise Diverged("the trained layer's loss is not finite", step=1)
    if sides.held is None:
        return Evaluation(losses=losses)
    table, rows_K, own_weights_N = sides.held
    training, training_K, training_weights_N = sides.training
    summary = summarize_targets(training.weighted(training_weights_N), training_K, spec, base.out_features)
    held_out = compare_on_held_out(
        base, table, rows_K, spec, compared, weights_N=own_weights_N, summary=summary, corpus_MO=training.corpus_MO
    )
    held_out["adapter"]["loss"] = losses["validation_loss"]
    held_out["base"]["loss"] = losses["base_validation_loss"]
    if present is not None:
        factors, _, matching = compared["live"]
        documents_N = document_ids(spec, table.targets)
        live_spec = replace(spec, alpha=present.alpha, rank=present.rank, rslora=present.rslora)
        live_losses = evaluate_factors(base, table, rows_K, live_spec, factors, documents_N, matching=matching)
        held_out["live"]["loss"] = live_losses["loss"]
    return Evaluation(losses=losses, held_out=held_out)


def _judge(
    base: BaseLayer,
    sides: Sides,
    spec: TrainingSpec,
    compared: Mapping[str, ComparedFactors],
    live: LiveVersion | None,
    labels: Sequence[str | int] | None,
) -> AdapterReport:
    """Judge an adapter on the held-out rows."""
    assert sides.held is not None
    table, rows_K, own_weights_N = sides.held
    training, training_K, training_weights_N = sides.training
    guess_C = guess_outputs(training.weighted(training_weights_N), training_K, spec, base.out_features)
    is_judged = live is None or live.unjudged is None
    judged = {name: entry for name, entry in compared.items() if name != "live" or is_judged}
    errors = held_out_errors(base, table, rows_K, spec, judged, guess_C=guess_C)
    errors = replace_trained_errors(errors, live, table, rows_K, labels)
    weights_N = own_weights_N if own_weights_N is None or rows_K is None else own_weights_N[rows_K]
    return report_of(
        errors, spec.loss, None if weights_N is None else weights_N.cpu(), live=live, has_base=base.weight_norm > 0
    )


def _losses_of_sides(
    base: BaseLayer,
    sides: Sides,
    spec: TrainingSpec,
    compared: Mapping[str, ComparedFactors],
    statistics: Statistics | None,
) -> dict[str, float | None]:
    """Return the job's losses, and with classes the accuracies, of the factors and of the base layer on both sides."""
    losses: dict[str, float | None] = {}
    figures = ("loss", "accuracy") if spec.loss is Loss.CROSS_ENTROPY else ("loss",)
    for side_name, side in {"train": sides.training, "validation": sides.held}.items():
        sums = statistics if side is sides.training else None
        documents_N = None if side is None else document_ids(spec, side.data.targets)
        for prefix, name in (("", "adapter"), ("base_", "base")):
            evaluated, _, matching = compared[name]
            loss = None if sums is None else _loss_from_sums(sums, spec, evaluated)
            values: Mapping[str, float] = {} if loss is None else {"loss": loss}
            if loss is None and side is not None:
                table, rows_K, own_weights_N = side
                values = evaluate_factors(base, table, rows_K, spec, evaluated, documents_N, own_weights_N, matching)
            losses |= {f"{prefix}{side_name}_{figure}": values.get(figure) for figure in figures}
    return losses


def _loss_from_sums(statistics: Statistics, spec: TrainingSpec, factors: Factors | None) -> float | None:
    """Return the squared error over all rows without reading them; None if the rounding of the sums would show."""
    base_loss = statistics.square / (statistics.weight * statistics.out_features)
    if factors is None:
        return base_loss
    loss = loss_of_factors(statistics, factors, scaling=spec.scaling)
    return loss if loss > _MIN_LOSS_SHARE * base_loss else None
