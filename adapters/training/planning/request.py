"""Training request as values: what the delivery layer has parsed, and the planner has not checked yet."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from adapters.training.evaluation.gate import Gate, When
from adapters.training.planning.split import Split, SplitBy
from adapters.training.settings import Auto, RequestedSettings, Setting

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

    when: When = When.ALWAYS
    metric: str = _GATE.metric
    margin: Annotated[float, Setting(ge=0, le=1e30)] = _GATE.margin
    min_rows: Annotated[int, Setting(ge=1, le=10**9)] = _GATE.min_rows
    given: frozenset[str] = frozenset()
    """Fields that the client sent."""
    as_sent: object = When.ALWAYS.value
    """JSON value that the job shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRequest:
    """Request for a training of one adapter, or of a fleet."""

    name: object
    """Name of the adapter, or the template of a fleet's names."""
    rank: int | Auto
    alpha: float | Auto | None = None
    """None means the rank."""
    rows: RowSource
    split: SplitRequest | None = None
    settings: RequestedSettings = field(default_factory=RequestedSettings)
    publish: PublishRequest = field(default_factory=PublishRequest)

    @property
    def is_fleet(self) -> bool:
        """Return whether the name is a template."""
        return isinstance(self.name, str) and "{" in self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRequest:
    """Request to add rows to a closed form, and to forget rows of it."""

    rows: Mapping[str, RowSource]
    """By field: `add`, `forget`."""
    publish: PublishRequest = field(default_factory=PublishRequest)
