"""Rows that a training request holds out, and the report on both sides of the split, before anything is trained."""

# N rows · K rows of one side · I in_features
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.errors import InvalidCombination, MissingField, OutOfRange, WrongShape, WrongType
from adapters.lora.base_layer import BaseLayer
from adapters.training.gradient.sampling import Sampler
from adapters.training.planning.request import DatasetColumns, SplitRequest, TrainingRequest
from adapters.training.planning.row_keys import keys_of_groups, keys_of_rows
from adapters.training.planning.rows import OpenTable, Rows, read_rows
from adapters.training.planning.split import FOLDS, Split, SplitBy
from adapters.training.planning.targets import Codes
from adapters.training.settings import Loss, TrainingSpec, no_effect

_HELD_OUT_VALUES = {1: 1, 0: 0, "validation": 1, "train": 0}
_MAX_CLASSES_SHOWN = 100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Holdout:
    """Rows that are not trained on: a part of the training rows, or a data set of its own."""

    split: Split | None = None
    key_N: Codes | None = None
    """Values that decide the split, see `Split.sides`: groups, times, a column or hashes."""
    column: str | None = None
    """Column of the data set that the key was read from."""
    rows: Rows | None = None
    """Rows of a data set of its own, all held out."""

    @property
    def holds_rows_out(self) -> bool:
        """Return whether rows are held out; few rows of one adapter are cross-validated instead."""
        key_N = None if self.key_N is None else torch.from_numpy(self.key_N)
        return self.split is None or self.split.holds_out(0 if key_N is None else len(key_N), key_N)


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
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitReport:
    """Report on a split: its rule, and the rows that are trained on and held out."""

    train: SideReport
    held_out: SideReport = SideReport(rows=0)
    rule: Mapping[str, Any] | None = None
    """How rows are held out, as in the JSON of a job and a version; None if none are."""
    cross_validated: Mapping[str, int] | None = None
    """Numbers of adapters and rows that are cross-validated, of a fleet with large and small groups."""
    warnings: tuple[str, ...] = ()
    """Reasons for which held-out metrics may be too good, or the split differs from the request."""

    def to_json(self) -> dict[str, Any]:
        """Return the split as a job shows it, without the warnings; empty if no rows are held out."""
        if self.rule is None:
            return {}
        shown: dict[str, Any] = {**self.rule, "train": self.train.to_json()}
        if self.held_out.rows:
            shown["held_out"] = self.held_out.to_json()
        return shown if self.cross_validated is None else {**shown, "cross_validated": self.cross_validated}


def read_holdout(request: TrainingRequest, rows: Rows, *, open_table: OpenTable, base: BaseLayer) -> Holdout | None:
    """Read the rows that a request holds out; None if none. Raises the `InvalidInput` that names the field."""
    requested, fraction = request.split, request.settings.validation_fraction
    if requested is None:
        return Holdout(split=Split(fraction=fraction)) if fraction > 0 else None
    if not isinstance(requested, SplitRequest):
        return Holdout(split=Split(by=SplitBy.HASH), key_N=_hash_key(request, rows))
    if fraction > 0:
        detail = "split and training.validation_fraction both hold rows out: give one of them"
        raise InvalidCombination(detail, field="split", expected="split, or training.validation_fraction")
    _check_fields(requested)
    if requested.by is None:
        return Holdout(rows=_held_out_data_set(request, rows, open_table=open_table, base=base))
    if requested.stratify and (requested.by is not SplitBy.ROWS or rows.targets.classes_N is None):
        detail = "split.stratify needs one class a row, and a split by rows"
        expected = "cross_entropy with a split by rows"
        raise InvalidCombination(detail, field="split.stratify", given=True, expected=expected)
    key_N = None
    if requested.by is SplitBy.GROUP:
        if rows.groups is None:
            detail = "a split by group needs each row's group: give data.group (of a data set) or data.groups"
            raise MissingField(detail, field="data.group", expected="groups")
        key_N = rows.groups.codes_N
    elif requested.column is not None:
        key_N = _column_key(rows, requested.column, requested.by)
    split = Split(by=requested.by, fraction=requested.fraction, stratify=requested.stratify)
    return Holdout(split=split, key_N=key_N, column=requested.column)


def report_split(
    rows: Rows, holdout: Holdout | None, spec: TrainingSpec, *, group_sizes: Sequence[int] | None
) -> SplitReport:
    """Report both sides of a split.

    group_sizes: rows of each group of a fleet. Raises `OutOfRange` if a side would be empty.
    """
    if holdout is None:
        return SplitReport(train=SideReport(rows=rows.count))
    if holdout.rows is not None:
        rule = {name: holdout.rows.origin[name] for name in ("dataset", "dataset_digest")}
        warnings = _repeated_warning(_hashes(rows), _hashes(holdout.rows))
        return SplitReport(train=_side(rows), held_out=_side(holdout.rows), rule=rule, warnings=warnings)
    assert holdout.split is not None
    rule = _rule(holdout.split, holdout.column)
    if holdout.split.by is SplitBy.HASH and (group_sizes is not None or not holdout.holds_rows_out):
        return _report_hash(rows, holdout, is_fleet=group_sizes is not None)
    if group_sizes is not None:
        held_out = SideReport(rows=_held_out_of_fleet(rows, holdout.split, holdout.key_N, group_sizes))
        return SplitReport(train=SideReport(rows=rows.count - held_out.rows), held_out=held_out, rule=rule)
    arrays = (holdout.key_N, rows.targets.classes_N)
    key_N, classes_N = (None if array is None else torch.from_numpy(array) for array in arrays)
    sampler = Sampler(spec, rows.count, key_N=key_N, classes_N=classes_N)
    assert sampler.held_K is not None
    training_K, held_K = sampler.training_K.numpy(), sampler.held_K.numpy()
    for side_K, purpose in ((training_K, "to train on"), (held_K, "to validate on")):
        if rows.weights_N is not None and not rows.weights_N[side_K].any():
            detail = f"the split leaves no row that counts {purpose}: their weights are all 0"
            raise OutOfRange(detail, field="split", given=0, expected="a row of a weight above 0 on both sides")
    hashes_N = _hashes(rows)
    warnings = _group_warnings(rows, holdout.split, training_K, held_K)
    warnings += _repeated_warning(hashes_N[training_K], hashes_N[held_K])
    return SplitReport(train=_side(rows, training_K), held_out=_side(rows, held_K), rule=rule, warnings=warnings)


def _hash_key(request: TrainingRequest, rows: Rows) -> Codes:
    """Return (N,) the hash of each row, or of its group; the groups of a fleet in the request are its adapters."""
    if rows.groups is None or (request.is_fleet and rows.table is None):
        return keys_of_rows(rows.inputs)
    return keys_of_groups(rows.groups.codes_N, rows.groups.values)


def _report_hash(rows: Rows, holdout: Holdout, *, is_fleet: bool) -> SplitReport:
    """Report a split by hash of a fleet, or of few rows, which are cross-validated instead."""
    assert holdout.split is not None
    assert holdout.key_N is not None
    codes_N = rows.fleet.codes_N if is_fleet and rows.fleet is not None else np.zeros(rows.count, np.int64)
    order_N, sizes_G = np.argsort(codes_N, kind="stable"), np.bincount(codes_N)
    keys_of_G = torch.from_numpy(holdout.key_N[order_N]).split(sizes_G.tolist())
    held_out = cross_validated = cross_validated_rows = 0
    for keys_K in keys_of_G:
        if holdout.split.holds_out(len(keys_K), keys_K):
            held_out += int(holdout.split.held_by_hash(keys_K).sum())
        else:
            cross_validated += 1
            cross_validated_rows += len(keys_K)
    if not held_out:
        return SplitReport(train=_side(rows), rule={"by": "cross_validation", "folds": FOLDS})
    some = {"adapters": cross_validated, "rows": cross_validated_rows} if cross_validated else None
    rule = _rule(holdout.split, None)
    train, held = SideReport(rows=rows.count - held_out), SideReport(rows=held_out)
    return SplitReport(train=train, held_out=held, rule=rule, cross_validated=some)


def _held_out_of_fleet(rows: Rows, split: Split, key_N: Codes | None, group_sizes: Sequence[int]) -> int:
    """Return the held-out rows of a fleet, whose groups are split one by one in the fit."""
    if split.by is SplitBy.COLUMN and key_N is not None:
        held_out = int(key_N.sum())
    else:
        held_out = sum(map(split.held_out_rows, group_sizes))
    split.check_sides(rows.count - held_out, held_out)
    return held_out


def _held_out_data_set(request: TrainingRequest, rows: Rows, *, open_table: OpenTable, base: BaseLayer) -> Rows:
    """Return the data set that is held out whole, read by the columns of the training rows."""
    assert isinstance(request.split, SplitRequest)
    dataset = request.split.dataset
    if not isinstance(request.rows, DatasetColumns):
        detail = "split.dataset is read by the columns of the training data, which are in the request"
        expected = "training data from a data set too"
        raise InvalidCombination(detail, field="split.dataset", given=dataset, expected=expected)
    source = replace(request.rows, dataset=dataset, labels=rows.targets.labels, corpus=None, group_by=None)
    held_out = read_rows(source, Loss(request.settings.loss), open_table, base=base, field="split")
    widths = [part.targets.column.shape[1:] for part in (held_out, rows)]
    if widths[0] != widths[1]:
        given, expected = (f"{width[0]} targets" for width in widths)
        detail = f"split.dataset has {given} a row, the training data have {expected}"
        raise WrongShape(detail, field="split.dataset", given=given, expected=expected)
    return held_out


def _check_fields(requested: SplitRequest) -> None:
    needs_column = requested.by in (SplitBy.TIME, SplitBy.COLUMN)
    if (requested.by is None) == (requested.dataset is None):
        detail = "split says how rows are drawn (by), or which data set is held out (dataset): one of them"
        raise InvalidCombination(detail, field="split", expected='{"by": …} or {"dataset": reference}')
    ignored = {
        "column": not needs_column,
        "fraction": requested.by in (SplitBy.COLUMN, None),
        "stratify": requested.by is None,
    }
    for name, is_ignored in ignored.items():
        if is_ignored and name in requested.given:
            context = "with split.dataset" if requested.by is None else f"by {requested.by}"
            raise no_effect(f"split.{name}", context, given=getattr(requested, name))
    if needs_column and requested.column is None:
        detail = f"a split by {requested.by} needs a column"
        raise MissingField(detail, field="split.column", expected="a column's name")


def _column_key(rows: Rows, column: str, by: SplitBy) -> Codes:
    """Return (N,) the position in time of each row, or 1 for the rows that the column holds out."""
    field = "split.column"
    if rows.table is None:
        detail = f"a split by {by} reads a column of a data set, and these rows are in the request"
        expected = "a data set, or a split by rows or group"
        raise InvalidCombination(detail, field=field, given=column, expected=expected)
    if by is SplitBy.TIME and rows.table.type_of(column, field=field).startswith("float"):
        return rows.table.order(column, field=field)
    codes_N, values = rows.table.codes(column, field=field)
    if by is SplitBy.TIME:
        return codes_N
    others = [value for value in values if value not in _HELD_OUT_VALUES]
    if others:
        detail = f"{field}: {column} has other values than a column that says which rows are held out"
        expected = "0 and 1, true and false, or train and validation"
        raise WrongType(detail, field=field, given=others[0], expected=expected)
    if len(values) < 2:
        detail = f"{field}: {column} puts every row on one side"
        raise OutOfRange(detail, field=field, given=values[0], expected="both of its values")
    return np.array([_HELD_OUT_VALUES[value] for value in values], np.int64)[codes_N]


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


def _side(rows: Rows, rows_K: NDArray[np.int64] | None = None) -> SideReport:
    targets, class_counts = rows.targets, None
    selected = slice(None) if rows_K is None else rows_K
    if targets.classes_N is not None:
        classes, counts = np.unique(targets.classes_N[selected], return_counts=True)
        names = [targets.labels[index] if targets.labels else int(index) for index in classes[:_MAX_CLASSES_SHOWN]]
        class_counts = {str(name): int(count) for name, count in zip(names, counts, strict=False)}
    return SideReport(
        rows=rows.count if rows_K is None else len(rows_K),
        groups=None if rows.groups is None else len(np.unique(rows.groups.codes_N[selected])),
        classes=class_counts,
    )


def _group_warnings(
    rows: Rows, split: Split, training_K: NDArray[np.int64], held_K: NDArray[np.int64]
) -> tuple[str, ...]:
    if rows.groups is None:
        return ()
    if split.by is SplitBy.GROUP:
        held, target = len(held_K), split.held_out_rows(rows.count)
        if 2 * abs(held - target) <= target:
            return ()
        return (f"{held} rows are held out instead of {target}, because whole groups are held out and they are large",)
    codes_N = rows.groups.codes_N
    shared = len(np.intersect1d(codes_N[training_K], codes_N[held_K]))
    return (f"{shared} groups have rows on both sides: a split by group would keep them apart",) if shared else ()


def _repeated_warning(training_K: NDArray[np.uint64], held_K: NDArray[np.uint64]) -> tuple[str, ...]:
    """Return a warning if rows of both sides, given by their hashes, have the same inputs."""
    repeated = int(np.isin(held_K, training_K).sum())
    return (f"{repeated} held-out rows have the inputs of a row that is trained on",) if repeated else ()


def _hashes(rows: Rows) -> NDArray[np.uint64]:
    """Return (N,) hashes: equal for rows of equal inputs; others collide with a probability of at most 2⁻³².

    Multilinear hashing (Lemire & Kaser 2014, section 3) of the numbers' bits, with fixed random odd factors.
    """
    factors_I = np.random.default_rng(0).integers(2**63, size=rows.inputs.shape[1], dtype=np.uint64) * 2 + 1
    # 0 and -0 are the same number.
    parts = ((part_NI + np.float32(0)).view(np.uint32).astype(np.uint64) @ factors_I for part_NI in rows.inputs.parts())
    return np.concatenate(list(parts))
