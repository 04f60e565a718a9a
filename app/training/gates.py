"""What a request says of publishing → a gate."""

from typing import Any

from adapters.errors import IgnoredField, InvalidCombination, MissingField, OutOfRange, WrongType
from adapters.training.evaluation.evaluate import task_of
from adapters.training.evaluation.gate import Gate, When
from adapters.training.evaluation.metrics import Task
from adapters.training.settings import TrainingSpec
from app.http.bodies import read_as
from app.training.schemas import GateBody

METRICS: dict[Task, tuple[str, ...]] = {
    Task.CLASSIFICATION: ("loss", "accuracy", "macro_f1", "calibration_error"),
    Task.MULTILABEL: ("loss", "exact_match", "macro_f1", "micro_f1", "calibration_error"),
    Task.REGRESSION: ("loss", "r2_mean", "mae_mean", "rmse", "cosine"),
    Task.RETRIEVAL: ("loss", "recall_at_1", "recall_at_5", "recall_at_10", "mrr"),
}


def read_gate(publish: object, spec: TrainingSpec, *, holds_out: bool, fleet: bool) -> Gate:
    """Raises the `InvalidInput` that names the field."""
    if isinstance(publish, str):
        if publish not in (When.ALWAYS, When.NEVER):
            raise OutOfRange(
                "publish is not a way to publish",
                field="publish",
                given=publish,
                expected='"always", "never" or {"when": "if_better", …}',
            )
        return Gate(when=When(publish))
    if not isinstance(publish, dict):
        raise WrongType(
            "publish must be a string or an object",
            field="publish",
            given=publish,
            expected='"always", "never" or {"when": "if_better", …}',
        )
    body = read_as(GateBody, publish, within="publish")
    gate = Gate(when=When(body.when), metric=body.metric, margin=body.margin, min_rows=body.min_rows)
    if not gate.compares:
        _refuse_ignored(body)
        return gate
    if fleet:
        raise InvalidCombination(
            "publish if_better compares one adapter, and a fleet trains many",
            field="publish.when",
            given=body.when,
            expected="always or never for a fleet",
        )
    if not holds_out:
        raise MissingField(
            "publish if_better compares on held-out rows, and none are held out",
            field="split",
            expected="a split, or training.validation_fraction",
        )
    known = METRICS[task_of(spec.loss)]
    if gate.metric not in known:
        raise InvalidCombination(
            f"publish.metric: {gate.metric} is no metric of {spec.loss}",
            field="publish.metric",
            given=gate.metric,
            expected=f"one of {', '.join(known)}",
        )
    return gate


def _refuse_ignored(body: GateBody) -> None:
    ignored: list[Any] = [name for name in ("metric", "margin", "min_rows") if body.gave(name)]
    if ignored:
        raise IgnoredField(
            f"publish.{ignored[0]} has no effect with {body.when}: leave it out",
            field=f"publish.{ignored[0]}",
            given=getattr(body, ignored[0]),
            expected=f"{ignored[0]} with if_better",
        )
