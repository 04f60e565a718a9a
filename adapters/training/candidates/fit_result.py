"""Result of the fit of one adapter: the adapter, its evaluation, and the candidates that were compared."""

# K rows of one adapter · C outputs of the task
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from adapters.errors import LoraplexError
from adapters.lora.adapter import Adapter
from adapters.training.candidates.composed import Composed
from adapters.training.candidates.descent import Descent
from adapters.training.candidates.features import FeatureMap, Moments
from adapters.training.candidates.fleet_mean import CommonModel
from adapters.training.candidates.scores import Scores
from adapters.training.candidates.task import FitTask, Sides
from adapters.training.closed_form.solver import Factors
from adapters.training.evaluation.evaluate import evaluate_factors, measure_stack
from adapters.training.evaluation.judgement import AdapterReport, RowEvidence, judge, relative_gain, warnings_of
from adapters.training.fit import Side, compared_factors, evaluate_sides
from adapters.training.fit import Sides as EvaluatedSides
from adapters.training.gradient.losses import document_ids
from adapters.training.settings import Candidate, Loss, Method, TrainingSpec


class Tried(NamedTuple):
    """Candidates that were compared for one adapter."""

    scores: Scores
    by: str
    """Training rows that the losses are of: all, each left out in turn (`leave_one_out`), or a part (`held_out`)."""
    taken: Candidate
    reason: str
    figures: Mapping[Candidate, tuple[float, Mapping[str, Any]]]
    """Mean loss and settings of each candidate."""

    def to_json(self, rows: int) -> dict[str, Any]:
        """Return the member `auto` of a job. `rows`: the training rows."""
        candidates = [
            {"candidate": str(name), "figure": figure, "settings": dict(settings), "skipped": None}
            for name, (figure, settings) in self.figures.items()
        ]
        metric = "mse" if self.scores.is_regression else "log_loss"
        return {
            "metric": metric if self.scores.loss in (Loss.MSE, Loss.CROSS_ENTROPY) else "loss",
            "rows": rows,
            "by": self.by,
            "taken": str(self.taken),
            "reason": self.reason,
            "candidates": candidates,
        }


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AutoFit:
    """Result of the fit of one adapter: an adapter, or an error."""

    position: int
    spec: TrainingSpec
    """The specification with everything that was chosen."""
    adapter: Adapter | None = None
    """None if the fit failed."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    report: AdapterReport | None = None
    evidence: RowEvidence | None = None
    """Rows that it was trained on, and their errors, if it was cross-validated."""
    error: LoraplexError | None = None
    suspects: Sequence[Mapping[str, Any]] | None = None
    """Rows whose label the other rows contradict, worst first; only of one adapter, with classes."""


class GroupGain(NamedTuple):
    """Gain of a group's adapter over the live version or else the base layer, as it counts for the other groups."""

    total: float
    """Sum over its rows, in units."""
    weight: float
    """Of these rows."""
    unit: float


def gain_of(errors: Mapping[str, Tensor], scores: Scores) -> GroupGain:
    """Return the gain of an adapter over the live version or else the base layer."""
    weights_K, other_K = errors["weights"], errors.get("live", errors["base"])
    judged_K = torch.isfinite(other_K)
    if not bool(judged_K.any()):
        other_K, judged_K = errors["base"], torch.ones_like(judged_K)
    gains_K, weight = torch.where(judged_K, other_K - errors["adapter"], 0.0), float(weights_K[judged_K].sum())
    error = float(torch.where(judged_K, other_K, 0.0) @ weights_K) / max(weight, 1e-300)
    gain = float(gains_K @ weights_K) / max(weight, 1e-300)
    share, unit = relative_gain(gain, error, is_regression=scores.is_regression)
    return GroupGain(share * weight, weight, unit)


def finish(
    task: FitTask,
    position: int,
    adapter: Adapter,
    sides: Sides,
    tried: Tried,
    errors: Mapping[str, Tensor],
    *,
    others_gain: float | None,
    descent: Descent | None,
    metrics: Mapping[str, Any] | None = None,
    suspects: Sequence[Mapping[str, Any]] | None = None,
) -> AutoFit:
    """Judge an adapter by `errors`, and return it with its report; without errors, nothing is evaluated.

    metrics: what `stack_metrics` returned for it.
    """
    scores, rows_K = task.scores, sides.training_K
    evaluation, judgement, warnings = None, None, list[str]()
    if errors:
        evaluation, judgement = judge(
            {name: errors_K for name, errors_K in errors.items() if name != "weights"},
            by="held_out" if sides.read_held is not None else "cross_validation",
            metric=scores.metric,
            is_regression=scores.is_regression,
            weights_N=errors["weights"],
            others_gain=others_gain,
        )
        has_base = task.base.weight_norm > 0
        warnings = list(warnings_of(evaluation, task.live.get(position), has_base=has_base))
    evidence = None
    if sides.is_cross_validated and errors:
        largest = float(np.finfo(np.float32).max)
        errors_K = errors["adapter"].clamp(max=largest).numpy().astype(np.float32)
        evidence = RowEvidence(task.evidence_keys(rows_K), errors_K)
    spec = task.spec if descent is None else descent.spec
    chosen = replace(
        spec, method=Method.CLOSED_FORM if descent is None else Method.ADAMW, rank=adapter.rank, alpha=adapter.alpha,
        bias=adapter.bias_O is not None, candidates=(), try_bias=False, try_ridges=False,
    )  # fmt: skip
    report = AdapterReport(
        evaluation=evaluation, judgement=judgement, auto=tried.to_json(len(rows_K)), warnings=tuple(warnings)
    )
    return AutoFit(
        position=position,
        spec=chosen,
        adapter=adapter,
        metrics=_metrics(task, position, adapter, sides, chosen) if metrics is None else metrics,
        report=report,
        evidence=evidence,
        suspects=suspects,
    )


def stack_metrics(task: FitTask, adapters: Sequence[Adapter], rows: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Return what a job shows as metrics of adapters without held-out rows, by the rows that each was trained on.

    The scaling of all adapters is 1.
    """
    rank = max(adapter.rank for adapter in adapters)
    padding = [rank - adapter.rank for adapter in adapters]
    a_GOR = torch.stack([pad(own.a_OR, (0, more)) for own, more in zip(adapters, padding, strict=True)])
    b_GRI = torch.stack([pad(own.b_RI, (0, 0, 0, more)) for own, more in zip(adapters, padding, strict=True)])
    bias_GO = torch.zeros(a_GOR.shape[:2])
    for index, adapter in enumerate(adapters):
        if adapter.bias_O is not None:
            bias_GO[index] = adapter.bias_O
    spec = replace(task.spec, rank=rank, alpha=float(rank), rslora=False)
    data = task.data.take(torch.cat([*rows]))
    sides = {"train": torch.arange(data.rows).split([*map(len, rows)]), "validation": ()}
    return measure_stack(task.base, data, spec, sides, Factors(a_GOR, b_GRI, bias_GO), data.weights_N)


def _metrics(task: FitTask, position: int, adapter: Adapter, sides: Sides, spec: TrainingSpec) -> dict[str, Any]:
    """Return the losses on both sides, and with classes the accuracies, of the adapter and of the base layer.

    One adapter alone has all metrics on its held-out rows too.
    """
    factors = Factors(adapter.a_OR, adapter.b_RI, adapter.bias_O)
    held = sides.held
    if held is not None and task.data.groups_N is None:
        live = task.live.get(position)
        present = None if live is None else live.adapter
        training = Side(task.data, sides.training_K, task.data.weights_N)
        evaluated_sides = EvaluatedSides(training, Side(held, None, held.weights_N))
        compared = compared_factors(task.base, spec, factors, present, task.labels)
        return evaluate_sides(task.base, evaluated_sides, spec, compared, present).to_json()
    names = ("loss", "accuracy") if spec.loss is Loss.CROSS_ENTROPY else ("loss",)
    losses: dict[str, Any] = {}
    for prefix, evaluated in (("", factors), ("base_", None)):
        for side, table, rows_K in (("train", task.data, sides.training_K), ("validation", held, None)):
            values: Mapping[str, float] = {}
            if table is not None:
                documents_N = document_ids(spec, table.targets)
                values = evaluate_factors(task.base, table, rows_K, spec, evaluated, documents_N)
            losses |= {f"{prefix}{side}_{name}": values.get(name) for name in names}
    return losses


def prior_fit(
    task: FitTask, features: FeatureMap, model: CommonModel, scale: float, moments: Moments, position: int
) -> AutoFit:
    """Return the adapter of what all groups have in common, for names without rows."""
    delta_CI, bias_C = features.update(model.step * model.theta_JC, None)
    composed = Composed(delta_CI / scale, None if bias_C is None else bias_C / scale)
    adapter = composed.adapter(moments.covariance_II, task.spec.rank, task.base.out_features, **task.names)
    spec = replace(task.spec, rank=adapter.rank, alpha=adapter.alpha, candidates=(), try_bias=False)
    return AutoFit(position=position, spec=spec, adapter=adapter, report=AdapterReport())
