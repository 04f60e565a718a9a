"""Outcome of the fit of one adapter: the adapter, its judgement, the candidates tried, and suspect rows."""

# K rows of one adapter · C outputs of the task
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapters.errors import LoraplexError
from adapters.lora.adapter import Adapter
from adapters.training.candidates.descent import Descent
from adapters.training.candidates.features import FeatureMap, Moments
from adapters.training.candidates.fleet_mean import CommonModel
from adapters.training.candidates.scores import Scores
from adapters.training.candidates.small import Composed
from adapters.training.candidates.task import FitTask, Sides
from adapters.training.closed_form.solver import Factors
from adapters.training.evaluation.evaluate import evaluate_factors
from adapters.training.evaluation.judgement import AdapterReport, RowEvidence, judge, warnings_of
from adapters.training.fit import Side, compared_factors, evaluate_sides
from adapters.training.fit import Sides as EvaluatedSides
from adapters.training.gradient.losses import document_ids
from adapters.training.settings import Candidate, Loss, Method, TrainingSpec

# Most rows whose labels are doubted.
MAX_SUSPECTS = 200


class Tried(NamedTuple):
    """Candidates that were compared for one adapter."""

    scores: Scores
    by: str
    """Rows that chose: `leave_one_out` for each training row in turn, `held_out` for a part of them."""
    taken: Candidate
    reason: str
    figures: Mapping[Candidate, tuple[float, Mapping[str, Any]]]
    """Mean loss and settings of each candidate."""

    def to_json(self, rows: int) -> dict[str, Any]:
        """Return what a job shows as `auto`."""
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
    """Rows that it was trained on, if they are so few that all of them were."""
    error: LoraplexError | None = None
    suspects: Sequence[Mapping[str, Any]] | None = None
    """Rows whose label the other rows contradict, worst first; only of one adapter, with classes."""


def gain_of(errors: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return the summed gain of an adapter's rows over what answers now, and the weight of these rows."""
    weights_K, other_K = errors["weights"], errors.get("live", errors["base"])
    judged_K = torch.isfinite(other_K)
    if not bool(judged_K.any()):
        other_K, judged_K = errors["base"], torch.ones_like(judged_K)
    gains_K = torch.where(judged_K, other_K - errors["adapter"], 0.0)
    return float(gains_K @ weights_K), float(weights_K[judged_K].sum())


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
    suspects: Sequence[Mapping[str, Any]] | None = None,
) -> AutoFit:
    """Judge an adapter, and collect what its job says about it."""
    scores, rows_K = task.scores, sides.training_K
    evaluation, judgement, warnings = None, None, list[str]()
    if errors:
        evaluation, judgement = judge(
            {name: errors_K for name, errors_K in errors.items() if name != "weights"},
            by="held_out" if sides.held is not None else "cross_validation",
            metric=scores.metric,
            is_regression=scores.is_regression,
            weights_N=errors["weights"],
            others_gain=others_gain,
        )
        has_base = task.base.weight_norm > 0
        warnings = list(warnings_of(evaluation, task.live.get(position), has_base=has_base))
    evidence = None
    if sides.is_cross_validated and errors:
        evidence = RowEvidence(task.row_keys(rows_K), errors["adapter"].numpy().astype(np.float32))
    spec = task.spec if descent is None else descent.spec
    chosen = replace(spec, rank=adapter.rank, alpha=adapter.alpha, candidates=(), try_bias=False, try_ridges=False)
    method = Method.CLOSED_FORM if descent is None else Method.ADAMW
    chosen = replace(chosen, bias=adapter.bias_O is not None, method=method)
    report = AdapterReport(
        evaluation=evaluation, judgement=judgement, auto=tried.to_json(len(rows_K)), warnings=tuple(warnings)
    )
    return AutoFit(
        position=position,
        spec=chosen,
        adapter=adapter,
        metrics=_metrics(task, position, adapter, sides, chosen),
        report=report,
        evidence=evidence,
        suspects=suspects,
    )


def _metrics(task: FitTask, position: int, adapter: Adapter, sides: Sides, spec: TrainingSpec) -> dict[str, Any]:
    """Return the losses on both sides, and with classes the accuracies, of the adapter and of the base layer.

    One adapter alone has all metrics on its held-out rows too.
    """
    factors = Factors(adapter.a_OR, adapter.b_RI, adapter.bias_O)
    if sides.held is not None and task.data.groups_N is None:
        live = task.live.get(position)
        present = None if live is None else live.adapter
        training = Side(task.data, sides.training_K, task.data.weights_N)
        evaluated_sides = EvaluatedSides(training, Side(sides.held, None, sides.held.weights_N))
        compared = compared_factors(task.base, spec, factors, present, task.labels)
        return evaluate_sides(task.base, evaluated_sides, spec, compared, present).to_json()
    names = ("loss", "accuracy") if spec.loss is Loss.CROSS_ENTROPY else ("loss",)
    losses: dict[str, Any] = {}
    for prefix, evaluated in (("", factors), ("base_", None)):
        for side, table, rows_K in (("train", task.data, sides.training_K), ("validation", sides.held, None)):
            values: Mapping[str, float] = {}
            if table is not None:
                documents_N = document_ids(spec, table.targets)
                values = evaluate_factors(task.base, table, rows_K, spec, evaluated, documents_N)
            losses |= {f"{prefix}{side}_{name}": values.get(name) for name in names}
    return losses


def suspects_of(task: FitTask, rows_K: Tensor, outputs_KC: Tensor) -> list[dict[str, Any]]:
    """Return the rows whose label the other rows contradict, worst first, by -log p of the label.

    outputs_KC: logits of fits without the row.
    """
    classes_K = task.data.targets[rows_K]
    scores_K = -torch.log_softmax(outputs_KC, dim=1).gather(1, classes_K[:, None])[:, 0]
    others_KC = outputs_KC.scatter(1, classes_K[:, None], -torch.inf)
    suggested_K = others_KC.argmax(1)
    order_K = torch.argsort(scores_K, descending=True, stable=True)
    labels: Sequence[str | int] = range(task.outputs) if task.labels is None else task.labels
    return [
        {
            "row": int(rows_K[k]),
            "label": labels[int(classes_K[k])],
            "suggested": labels[int(suggested_K[k])],
            "score": float(scores_K[k]),
        }
        for k in order_K[:MAX_SUSPECTS].tolist()
    ]


def prior_fit(
    task: FitTask, features: FeatureMap, model: CommonModel, scale: float, moments: Moments, position: int
) -> AutoFit:
    """Return the adapter of what all groups have in common, for names without rows."""
    delta_CI, bias_C = features.update(model.step * model.theta_JC, None)
    composed = Composed(delta_CI / scale, None if bias_C is None else bias_C / scale)
    reduced, basis_CR = composed.reduced(moments.covariance_II, task.spec.rank)
    adapter = reduced.adapter(basis_CR, task.base.out_features, **task.names)
    spec = replace(task.spec, rank=adapter.rank, alpha=adapter.alpha, candidates=(), try_bias=False)
    return AutoFit(position=position, spec=spec, adapter=adapter, report=AdapterReport())
