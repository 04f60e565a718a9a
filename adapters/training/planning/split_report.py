"""Split of a request's rows: the key that decides, and a report of both sides before anything is trained."""

# N rows · K rows of one side · I in_features
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.errors import IgnoredField, InvalidCombination, MissingField, OutOfRange, WrongType
from adapters.training.gradient.sampling import Sampler
from adapters.training.planning.request import SplitRequest, TrainingRequest
from adapters.training.planning.rows import Codes, Rows
from adapters.training.planning.split import Split, SplitBy
from adapters.training.settings import TrainingSpec

_HELD_OUT_VALUES = {1: 1, 0: 0, "validation": 1, "train": 0}
_MAX_CLASSES_SHOWN = 100
_TRAIN, _HELD_OUT = "to train on", "to validate on"


@dataclass(frozen=True, slots=True, kw_only=True)
class SideReport:
    """Rows of one side of a split."""

    rows: int
    groups: int | None = None
    """Distinct groups; None if the rows have none."""
    classes: Mapping[str, int] | None = None
    """Rows per class, the first 100 classes; None if the targets are not classes."""

    def to_json(self) -> dict[str, Any]:
        """Return the side as a job shows it."""
        members = {"rows": self.rows, "groups": self.groups, "classes": self.classes}
        return {name: value for name, value in members.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitReport:
    """How rows are held out, and the rows on each side."""

    rule: Mapping[str, Any]
    """How rows are held out, as a job and a version show it."""
    train: SideReport
    held_out: SideReport
    warnings: tuple[str, ...] = ()
    """Reasons why held-out metrics may be too good, or the split not as requested."""

    def to_json(self) -> dict[str, Any]:
        """Return the split as a job shows it, without the warnings."""
        return {**self.rule, "train": self.train.to_json(), "held_out": self.held_out.to_json()}


def read_split(request: TrainingRequest, rows: Rows) -> tuple[Split | None, Codes | None]:
    """Return how rows are held out, and (N,) the key that decides.

    Both are None if nothing is held out, or if a data set of its own is. Raises the `InvalidInput` that names the
    field.
    """
    requested, fraction = request.split, request.settings.validation_fraction
    if requested is None:
        return (Split(fraction=fraction), None) if fraction > 0 else (None, None)
    if fraction > 0:
        raise InvalidCombination(
            "split and training.validation_fraction both hold rows out: give one of them",
            field="split",
            expected="split, or training.validation_fraction",
        )
    _check_fields(requested)
    if requested.by is None:
        return None, None
    split = Split(by=requested.by, fraction=requested.fraction, stratify=requested.stratify)
    if requested.stratify and (requested.by is not SplitBy.ROWS or rows.classes_N is None):
        raise InvalidCombination(
            "split.stratify needs one class a row, and a split by rows",
            field="split.stratify",
            given=True,
            expected="cross_entropy with a split by rows",
        )
    if requested.by is SplitBy.ROWS:
        return split, None
    if requested.by is SplitBy.GROUP:
        if rows.groups is None:
            raise MissingField(
                "a split by group needs to know each row's group: give data.group (of a data set) or data.groups",
                field="data.group",
                expected="groups",
            )
        return split, rows.groups.codes_N
    assert requested.column is not None
    return split, _column_key(rows, requested.column, requested.by)


def report_split(
    rows: Rows, held_rows: Rows | None, spec: TrainingSpec, key_N: Codes | None, *, column: str | None
) -> SplitReport | None:
    """Report both sides of a split; None if no rows are held out.

    held_rows: a data set that is held out whole. Raises `OutOfRange` if a side would be empty.
    """
    if held_rows is not None:
        repeated = _count_repeated(_hashes(rows), _hashes(held_rows))
        return SplitReport(
            rule={name: held_rows.origin[name] for name in ("dataset", "dataset_digest")},
            train=_side(rows, None),
            held_out=_side(held_rows, None),
            warnings=tuple(_repeated_warning(repeated)),
        )
    if spec.split is None:
        return None
    classes_N = None if rows.classes_N is None else torch.from_numpy(rows.classes_N)
    key = None if key_N is None else torch.from_numpy(key_N)
    draws = Sampler(spec, rows.count, key_N=key, classes_N=classes_N)
    assert draws.held_K is not None
    training_K, held_K = draws.training_K.numpy(), draws.held_K.numpy()
    _check_weight(rows, training_K, _TRAIN)
    _check_weight(rows, held_K, _HELD_OUT)
    hashes_N = _hashes(rows)
    repeated = _count_repeated(hashes_N[training_K], hashes_N[held_K])
    return SplitReport(
        rule=_rule(spec.split, column),
        train=_side(rows, training_K),
        held_out=_side(rows, held_K),
        warnings=(*_group_warnings(rows, spec.split, training_K, held_K), *_repeated_warning(repeated)),
    )


def report_fleet_split(
    rows: Rows, sizes: Sequence[int], spec: TrainingSpec, key_N: Codes | None, *, column: str | None
) -> SplitReport | None:
    """Report the sum over groups that are split one by one in the fit; None if no rows are held out.

    sizes: the rows of each group. Raises `OutOfRange` if that leaves no rows on a side.
    """
    if spec.split is None:
        return None
    if spec.split.by is SplitBy.COLUMN and key_N is not None:
        held_out = int(key_N.sum())
    else:
        held_out = sum(map(spec.split.held_out_rows, sizes))
    if not 0 < held_out < rows.count:
        raise OutOfRange(
            f"the split of each group by itself holds out {held_out} of {rows.count} rows; neither side may be empty",
            field="split",
            given=f"{spec.split.fraction:g} by {spec.split.by}",
            expected="a split that leaves rows on both sides of a group",
        )
    return SplitReport(
        rule=_rule(spec.split, column), train=SideReport(rows=rows.count - held_out), held_out=SideReport(rows=held_out)
    )


def _check_fields(requested: SplitRequest) -> None:
    needs_column = requested.by in (SplitBy.TIME, SplitBy.COLUMN)
    if (requested.by is None) == (requested.dataset is None):
        raise InvalidCombination(
            "split says how rows are drawn (by), or which data set is held out (dataset): one of them",
            field="split",
            expected='{"by": …} or {"dataset": reference}',
        )
    ignored = {
        "column": not needs_column,
        "fraction": requested.by in (SplitBy.COLUMN, None),
        "stratify": requested.by is None,
    }
    for name, is_ignored in ignored.items():
        if is_ignored and name in requested.given:
            context = "with split.dataset" if requested.by is None else f"by {requested.by}"
            raise IgnoredField(
                f"split.{name} has no effect {context}: leave it out",
                field=f"split.{name}",
                given=getattr(requested, name),
                expected=f"{name} left out",
            )
    if needs_column and requested.column is None:
        raise MissingField(
            f"a split by {requested.by} needs a column", field="split.column", expected="a column's name"
        )


def _column_key(rows: Rows, column: str, by: SplitBy) -> Codes:
    """Return (N,) the position in time of each row, or 1 for the rows that the column holds out."""
    field = "split.column"
    if rows.table is None:
        raise InvalidCombination(
            f"a split by {by} reads a column of a data set, and these rows are in the request",
            field=field,
            given=column,
            expected="a data set, or a split by rows or group",
        )
    if by is SplitBy.TIME and rows.table.type_of(column, field=field).startswith("float"):
        return rows.table.order(column, field=field)
    codes_N, values = rows.table.codes(column, field=field)
    if by is SplitBy.TIME:
        return codes_N
    if not set(values) <= _HELD_OUT_VALUES.keys():
        raise WrongType(
            f"{field}: {column} has other values than a column that says which rows are held out",
            field=field,
            given=next(value for value in values if value not in _HELD_OUT_VALUES),
            expected="0 and 1, true and false, or train and validation",
        )
    if len(values) < 2:
        raise OutOfRange(
            f"{field}: {column} puts every row on one side", field=field, given=values[0], expected="both of its values"
        )
    return np.array([_HELD_OUT_VALUES[value] for value in values], np.int64)[codes_N]


def _check_weight(rows: Rows, rows_K: NDArray[np.int64], purpose: str) -> None:
    if rows.weights_N is not None and not rows.weights_N[rows_K].any():
        raise OutOfRange(
            f"the split leaves no row that counts {purpose}: their weights are all 0",
            field="split",
            given=0,
            expected="a row of a weight above 0 on both sides",
        )


def _rule(split: Split, column: str | None) -> dict[str, Any]:
    """Return a split as a job shows it, without the members that have no effect on it."""
    rule: dict[str, Any] = {"by": str(split.by)}
    if column is not None:
        rule["column"] = column
    if split.by is not SplitBy.COLUMN:
        rule["fraction"] = split.fraction
    if split.by is SplitBy.ROWS:
        rule["stratify"] = split.stratify
    return rule


def _side(rows: Rows, rows_K: NDArray[np.int64] | None) -> SideReport:
    selected: Any = slice(None) if rows_K is None else rows_K
    class_counts = None
    if rows.classes_N is not None:
        classes, counts = np.unique(rows.classes_N[selected], return_counts=True)
        names = [rows.labels[index] if rows.labels else int(index) for index in classes[:_MAX_CLASSES_SHOWN]]
        class_counts = {str(name): int(count) for name, count in zip(names, counts, strict=False)}
    return SideReport(
        rows=rows.count if rows_K is None else len(rows_K),
        groups=None if rows.groups is None else len(np.unique(rows.groups.codes_N[selected])),
        classes=class_counts,
    )


def _group_warnings(rows: Rows, split: Split, training_K: NDArray[np.int64], held_K: NDArray[np.int64]) -> list[str]:
    if rows.groups is None:
        return []
    if split.by is SplitBy.GROUP:
        target = split.held_out_rows(rows.count)
        if 2 * abs(len(held_K) - target) <= target:
            return []
        return [
            f"{len(held_K)} rows are held out, where {target} were asked for: the groups are too large to come nearer"
        ]
    codes_N = rows.groups.codes_N
    shared = len(np.intersect1d(codes_N[training_K], codes_N[held_K]))
    return [f"{shared} groups have rows on both sides: a split by group would keep them apart"] if shared else []


def _repeated_warning(repeated: int) -> list[str]:
    return [f"{repeated} held-out rows have the inputs of a row that is trained on"] if repeated else []


def _hashes(rows: Rows) -> NDArray[np.uint64]:
    """Return (N,) hashes: equal for rows of equal inputs; others collide with a probability of at most 2⁻³².

    Multilinear hashing (Lemire & Kaser 2014, section 3) of the numbers' bits, with fixed random odd factors.
    """
    factors_I = np.random.default_rng(0).integers(2**63, size=rows.inputs.shape[1], dtype=np.uint64) * 2 + 1

    def parts() -> Iterator[NDArray[np.uint64]]:
        for part_NI in rows.inputs.parts():
            # 0 and -0 are the same number.
            bits_NI = (part_NI + np.float32(0)).view(np.uint32).astype(np.uint64)
            yield bits_NI @ factors_I

    return np.concatenate(list(parts()))


def _count_repeated(training_K: NDArray[np.uint64], held_K: NDArray[np.uint64]) -> int:
    return int(np.isin(held_K, training_K).sum())
