"""Training request as values: what the delivery layer has parsed, and the planner has not checked yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from adapters.errors import InvalidCombination, MissingField
from adapters.training.evaluation.evaluate import TASKS
from adapters.training.evaluation.gate import Gate, When
from adapters.training.evaluation.metrics import Task
from adapters.training.planning.split import Split, SplitBy
from adapters.training.settings import AUTO, Auto, Loss, RequestedSettings, Setting, no_effect

# Metrics that a gate may compare, by the task of the loss.
GATE_METRICS: Mapping[Task, tuple[str, ...]] = {
    Task.CLASSIFICATION: ("loss", "accuracy", "macro_f1", "calibration_error"),
    Task.MULTILABEL: ("loss", "exact_match", "macro_f1", "micro_f1", "calibration_error"),
    Task.REGRESSION: ("loss", "r2_mean", "mae_mean", "rmse", "cosine"),
    Task.RETRIEVAL: ("loss", "recall_at_1", "recall_at_5", "recall_at_10", "mrr"),
}
_SPLIT, _GATE = Split(), Gate()


@dataclass(frozen=True, slots=True, kw_only=True)
class InlineRows:
    """Rows in the request itself."""

    inputs: object
    targets: object
    weights: object = None
    groups: object = None
    labels: object = None
    corpus: object = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusColumns:
    """Columns of a data set that hold the documents to search."""

    dataset: object
    documents: object


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetColumns:
    """Columns of a stored data set that hold the rows."""

    dataset: object
    inputs: object
    targets: object
    weight: str | None = None
    group: str | None = None
    group_by: str | None = None
    labels: object = None
    corpus: CorpusColumns | None = None


RowSource = InlineRows | DatasetColumns


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRequest:
    """Rows to hold out: a share of the training rows, or a data set of their own."""

    by: SplitBy | None = None
    column: str | None = None
    fraction: Annotated[float, Setting(gt=0, lt=1)] = _SPLIT.fraction
    stratify: Annotated[bool, Setting(description="Split each class by itself in this fraction.")] = _SPLIT.stratify
    dataset: object = None
    given: frozenset[str] = frozenset()
    """Fields that the client sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishRequest:
    """When live moves to the new version."""

    when: Annotated[When, Setting()] = When.IF_NOT_WORSE
    metric: str = _GATE.metric
    margin: Annotated[float, Setting(ge=0, le=1e30)] = _GATE.margin
    min_rows: Annotated[int, Setting(ge=1, le=10**9)] = _GATE.min_rows
    given: frozenset[str] = frozenset()
    """Fields that the client sent."""
    as_sent: object = When.IF_NOT_WORSE.value
    """JSON value that the job shows."""

    def make_gate(self, loss: Loss, *, holds_out: bool, is_fleet: bool) -> Gate:
        """Return the gate of a training with this loss.

        Raises `IgnoredField`, `InvalidCombination` or `MissingField`.
        """
        gate = Gate(when=self.when, metric=self.metric, margin=self.margin, min_rows=self.min_rows)
        if gate.when is not When.IF_BETTER:
            for name in ("metric", "margin", "min_rows"):
                if name in self.given:
                    raise no_effect(f"publish.{name}", f"with {self.when}", given=getattr(self, name))
            return gate
        if is_fleet:
            detail, expected = "publish if_better compares one adapter, and a fleet trains many", "if_not_worse"
            raise InvalidCombination(detail, field="publish.when", given=self.when, expected=expected)
        if not holds_out:
            raise nothing_held_out("publish if_better compares on held-out rows")
        metrics = GATE_METRICS[TASKS[loss]]
        if gate.metric not in metrics:
            detail, expected = f"publish.metric: {gate.metric} is no metric of {loss}", f"one of {', '.join(metrics)}"
            raise InvalidCombination(detail, field="publish.metric", given=gate.metric, expected=expected)
        return gate


def nothing_held_out(need: str) -> MissingField:
    """Return the error for a part of a request that needs held-out rows."""
    detail = f"{need}, and none are held out"
    return MissingField(detail, field="split", expected="a split, or training.validation_fraction")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRequest:
    """Request for a training of one adapter, or of a fleet."""

    name: object
    """Name of the adapter, or the template of a fleet's names."""
    rows: RowSource
    split: Annotated[SplitRequest | Auto | None, Setting()] = AUTO
    """`auto` holds rows out by their hash, and cross-validates few rows; None holds nothing out."""
    settings: RequestedSettings
    publish: PublishRequest = field(default_factory=PublishRequest)
    fleet_prior: object = None
    """Name of the adapter with the mean of a fleet."""
    body: Mapping[str, Any] | None = None
    """The request as it was sent."""

    @property
    def is_fleet(self) -> bool:
        """Return whether the name is a template."""
        return isinstance(self.name, str) and "{" in self.name

    def complete(self, loss: Loss, *, max_rank: int) -> "TrainingRequest":
        """Return the request with complete settings for targets of this loss, and with the split that they imply.

        A method that is named is not evaluated, and neither is anything with a `validation_fraction` of 0, unless a
        split is given.
        """
        given, split = self.settings.given, self.split
        if split == AUTO and (
            "validation_fraction" in given or (self.settings.method != AUTO and "split" not in given)
        ):
            split = None
        settings = self.settings.complete(loss, is_fleet=self.is_fleet, max_rank=max_rank)
        return replace(self, settings=settings, split=split)


def _always() -> PublishRequest:
    return PublishRequest(when=When.ALWAYS, as_sent=When.ALWAYS.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRequest:
    """Request to add rows to a closed form, and to forget rows of it."""

    rows: Mapping[str, RowSource]
    """By field: `add`, `forget`."""
    publish: PublishRequest = field(default_factory=_always)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """Request to compare adapters on labelled rows."""

    adapters: Sequence[object]
    """References, and None for the base layer."""
    rows: RowSource
