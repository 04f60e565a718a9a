"""Publish policy of a training: when live moves to the new version."""

from collections.abc import Mapping

from adapters.errors import IgnoredField, InvalidCombination, MissingField
from adapters.training.evaluation.evaluate import TASKS
from adapters.training.evaluation.gate import Gate
from adapters.training.evaluation.metrics import Task
from adapters.training.planning.request import PublishRequest
from adapters.training.settings import Loss

# Metrics that a gate may compare, by the task of the loss.
GATE_METRICS: Mapping[Task, tuple[str, ...]] = {
    Task.CLASSIFICATION: ("loss", "accuracy", "macro_f1", "calibration_error"),
    Task.MULTILABEL: ("loss", "exact_match", "macro_f1", "micro_f1", "calibration_error"),
    Task.REGRESSION: ("loss", "r2_mean", "mae_mean", "rmse", "cosine"),
    Task.RETRIEVAL: ("loss", "recall_at_1", "recall_at_5", "recall_at_10", "mrr"),
}


def make_gate(request: PublishRequest, loss: Loss, *, holds_out: bool, is_fleet: bool) -> Gate:
    """Return the gate of a training.

    Raises `IgnoredField`, `InvalidCombination` or `MissingField`.
    """
    gate = Gate(when=request.when, metric=request.metric, margin=request.margin, min_rows=request.min_rows)
    if not gate.compares:
        for name in ("metric", "margin", "min_rows"):
            if name in request.given:
                raise IgnoredField(
                    f"publish.{name} has no effect with {request.when}: leave it out",
                    field=f"publish.{name}",
                    given=getattr(request, name),
                    expected=f"{name} with if_better",
                )
        return gate
    if is_fleet:
        raise InvalidCombination(
            "publish if_better compares one adapter, and a fleet trains many",
            field="publish.when",
            given=request.when,
            expected="always or never for a fleet",
        )
    if not holds_out:
        raise MissingField(
            "publish if_better compares on held-out rows, and none are held out",
            field="split",
            expected="a split, or training.validation_fraction",
        )
    metrics = GATE_METRICS[TASKS[loss]]
    if gate.metric not in metrics:
        raise InvalidCombination(
            f"publish.metric: {gate.metric} is no metric of {loss}",
            field="publish.metric",
            given=gate.metric,
            expected=f"one of {', '.join(metrics)}",
        )
    return gate
