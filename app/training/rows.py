"""The rows that a request brings, inline or from a data set: checked in full, read part by part."""

# N rows · I in_features · O out_features · M documents
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.arrays import Float32, is_finite, matrix, one_per_row, vector
from adapters.datasets.table import Table
from adapters.errors import BadRow, BadRows, IgnoredField, NotFinite, OutOfRange, WrongType
from adapters.training.data_file import Column, in_memory_column
from adapters.training.settings import Loss
from app.service import Service
from app.training.schemas import InlineData
from app.training.targets import inline_targets

Codes = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """An array that need never be in memory as a whole."""

    shape: tuple[int, ...]
    parts: Callable[[], Iterator[NDArray[Any]]]
    """Its rows in order, float32 or int64, as often as asked."""

    @classmethod
    def of(cls, array: NDArray[Any]) -> "Numbers":
        """One that is in memory."""
        return cls(array.shape, lambda: iter([array]))

    def column(self, kind: str = "F32") -> Column:
        """What a data file stores of it."""
        return Column(kind, self.shape, self.parts())


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Which rows belong together."""

    codes_N: Codes
    """(N,) int64: places in `values`."""
    values: Sequence[str | int]
    """Sorted, each there at least once."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Checked rows, not yet stored."""

    inputs: Numbers
    """(N, I) float32."""
    targets: Numbers
    """(N, O) or (N, C) float32, or (N,) int64."""
    weights_N: Float32 | None
    classes_N: Codes | None
    """The targets, where they are one class a row."""
    labels: tuple[str | int, ...] | None
    groups: Groups | None
    fleet: Groups | None
    corpus: Numbers | None
    """(M, O) float32."""
    table: Table | None
    """The data set that they are of."""
    shown: Mapping[str, Any]
    """How the job says what they are, but for `rows` and `digest`."""

    @property
    def count(self) -> int:
        """N."""
        return self.inputs.shape[0]

    def columns(self, prefix: str = "") -> dict[str, Column]:
        """What a data file stores of them, under names that begin with `prefix`."""
        found = {
            f"{prefix}inputs_NI": self.inputs.column(),
            f"{prefix}targets": self.targets.column("F32" if self.classes_N is None else "I64"),
        }
        return found if self.weights_N is None else found | {f"{prefix}weights_N": in_memory_column(self.weights_N)}


def rows_of_request(service: Service, body: InlineData, loss: Loss, *, field: str, labels: object) -> Rows:
    """Rows that stand in the request itself. Raises the `InvalidInput` that names field and row."""
    base = service.base
    inputs_NI = matrix(body.inputs, field=f"{field}.inputs", columns=base.in_features)
    rows = len(inputs_NI)
    targets = inline_targets(
        body.targets, loss, field=f"{field}.targets", rows=rows, outputs=base.out_features, labels=labels
    )
    weights_N = None
    if body.weights is not None:
        weights_N = check_weights(vector(body.weights, field=f"{field}.weights", length=rows), field=f"{field}.weights")
    groups = None if body.groups is None else _groups(body.groups, rows, field=f"{field}.groups")
    corpus = None
    if body.corpus is not None:
        check_corpus(loss, field=f"{field}.corpus")
        corpus = Numbers.of(matrix(body.corpus, field=f"{field}.corpus", columns=base.out_features))
    return Rows(
        inputs=Numbers.of(inputs_NI),
        targets=Numbers.of(targets.values),
        weights_N=weights_N,
        classes_N=targets.classes,
        labels=targets.labels,
        groups=groups,
        fleet=groups,
        corpus=corpus,
        table=None,
        shown={},
    )


def check_weights(weights_N: Float32, *, field: str) -> Float32:
    """Weights of rows; raises `BadRows` for those below 0, and `OutOfRange` where no row counts."""
    negative = np.flatnonzero(weights_N < 0)
    if len(negative):
        rows = [BadRow(int(row), None, f"the weight {weights_N[row]:g} is below 0") for row in negative[:20]]
        raise BadRows(f"{field}: {len(negative)} weights are below 0", rows=rows, field=field)
    if not weights_N.any():
        raise OutOfRange(f"{field}: every weight is 0", field=field, given=0, expected="a row that counts")
    return np.ascontiguousarray(weights_N)


def check_corpus(loss: Loss, *, field: str) -> None:
    """Raises `IgnoredField` where nothing is searched."""
    if loss is not Loss.MULTIPLE_NEGATIVES:
        raise IgnoredField(
            f"{field} has no effect with {loss}: documents are searched with multiple_negatives",
            field=field,
            expected="no corpus, or multiple_negatives",
        )


def _groups(value: object, rows: int, *, field: str) -> Groups:
    expected = "one string or whole number a row"
    groups = one_per_row(value, field=field, rows=rows, expected=expected)
    for row, group in enumerate(groups):
        if type(group) not in (str, int) or type(group) is not type(groups[0]):
            kind = NotFinite if type(group) is float and not is_finite(group) else WrongType
            raise kind(
                f"{field}, row {row}: not {expected}, all of one kind",
                field=field,
                row=row,
                given=group,
                expected=expected,
            )
    values = sorted(set(groups))
    place = {group: number for number, group in enumerate(values)}
    return Groups(np.array([place[group] for group in groups], np.int64), values)
