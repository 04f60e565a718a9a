"""Which rows a request holds out, and what is on each side."""

# N rows · K rows of one side · I in_features
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.errors import IgnoredField, InvalidCombination, MissingField, OutOfRange, WrongType
from adapters.training.gradient.sampling import Sampler
from adapters.training.planning.split import By, Split
from adapters.training.settings import TrainingSpec
from app.training.rows import Codes, Rows
from app.training.schemas import SplitBody, TrainRequest

_HELD_OUT = {1: 1, 0: 0, "validation": 1, "train": 0}
_TOP_CLASSES = 100


def read_split(request: TrainRequest, rows: Rows) -> tuple[Split | None, Codes | None]:
    """How rows are held out, and the key that decides; both None where nothing is, or a data set of its own is.

    Raises the `InvalidInput` that names the field.
    """
    body, fraction = request.split, request.training.validation_fraction
    if body is None:
        return (Split(fraction=fraction), None) if fraction > 0 else (None, None)
    if fraction > 0:
        raise InvalidCombination(
            "split and training.validation_fraction both hold rows out: give one of them",
            field="split",
            expected="split, or training.validation_fraction",
        )
    _check_fields(body)
    if body.by is None:
        return None, None
    by = By(body.by)
    split = Split(by=by, fraction=body.fraction, stratify=body.stratify)
    if body.stratify and (by is not By.ROWS or rows.classes_N is None):
        raise InvalidCombination(
            "split.stratify needs one class a row, and a split by rows",
            field="split.stratify",
            given=True,
            expected="cross_entropy with a split by rows",
        )
    if by is By.ROWS:
        return split, None
    if by is By.GROUP:
        if rows.groups is None:
            raise MissingField(
                "a split by group needs to know each row's group: give data.group (of a data set) or data.groups",
                field="data.group",
                expected="groups",
            )
        return split, rows.groups.codes_N
    return split, _column_key(rows, body, by)


def describe_sides(
    rows: Rows, held: Rows | None, spec: TrainingSpec, key_N: Codes | None, *, column: str | None
) -> dict[str, Any] | None:
    """How rows are held out, and what is on each side: rows, groups, classes, and what is on both. None where nothing
    is held out.

    Raises `OutOfRange` where a side would be empty.
    """
    warnings: list[str] = []
    if held is not None:
        told = {name: held.shown[name] for name in ("dataset", "dataset_digest")}
        told |= {"train": _side(rows, None), "held_out": _side(held, None)}
        twice = _on_both(_hashes(rows), _hashes(held))
    elif spec.split is not None:
        classes_N = None if rows.classes_N is None else torch.from_numpy(rows.classes_N)
        key = None if key_N is None else torch.from_numpy(key_N)
        draws = Sampler(spec, rows.count, key_N=key, classes_N=classes_N)
        assert draws.held_K is not None
        training_K, held_K = draws.training_K.numpy(), draws.held_K.numpy()
        _check_weight(rows, training_K, "to train on")
        _check_weight(rows, held_K, "to validate on")
        told = {**_how(spec.split, column), "train": _side(rows, training_K), "held_out": _side(rows, held_K)}
        hashes_N = _hashes(rows)
        twice = _on_both(hashes_N[training_K], hashes_N[held_K])
        warnings += _about_groups(rows, spec.split, training_K, held_K)
    else:
        return None
    if twice:
        warnings.append(f"{twice} held-out rows have the inputs of a row that is trained on")
    return told | {"warnings": warnings}


def _about_groups(rows: Rows, split: Split, training_K: NDArray[np.int64], held_K: NDArray[np.int64]) -> list[str]:
    if rows.groups is None:
        return []
    if split.by is By.GROUP:
        wanted = split.held_out_rows(rows.count)
        if 2 * abs(len(held_K) - wanted) <= wanted:
            return []
        return [
            f"{len(held_K)} rows are held out, where {wanted} were asked for: the groups are too large to come nearer"
        ]
    codes_N = rows.groups.codes_N
    both = len(np.intersect1d(codes_N[training_K], codes_N[held_K]))
    return [f"{both} groups have rows on both sides: a split by group would keep them apart"] if both else []


def describe_sides_of_fleet(
    rows: Rows, sizes: Sequence[int], spec: TrainingSpec, key_N: Codes | None, *, column: str | None
) -> dict[str, Any] | None:
    """As `describe_sides`, for groups that are split one by one: about how many rows are on each side of all of them.

    Raises `OutOfRange` where that leaves none on a side.
    """
    if spec.split is None:
        return None
    if spec.split.by is By.COLUMN and key_N is not None:
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
    how = _how(spec.split, column)
    return {**how, "train": {"rows": rows.count - held_out}, "held_out": {"rows": held_out}}


def _check_weight(rows: Rows, rows_K: NDArray[np.int64], side: str) -> None:
    if rows.weights_N is not None and not rows.weights_N[rows_K].any():
        raise OutOfRange(
            f"the split leaves no row that counts {side}: their weights are all 0",
            field="split",
            given=0,
            expected="a row of a weight above 0 on both sides",
        )


def training_rows(rows: Rows, told: dict[str, Any] | None) -> int:
    """How many rows are trained on."""
    return rows.count if told is None else int(told["train"]["rows"])


def _check_fields(body: SplitBody) -> None:
    needs_column = body.by in ("time", "column")
    if (body.by is None) == (body.dataset is None):
        raise InvalidCombination(
            "split says how rows are drawn (by), or which data set is held out (dataset): one of them",
            field="split",
            expected='{"by": …} or {"dataset": reference}',
        )
    ignored = {
        "column": not needs_column,
        "fraction": body.by in ("column", None),
        "stratify": body.by is None,
    }
    for field, no_use in ignored.items():
        if no_use and body.gave(field):
            where = "with split.dataset" if body.by is None else f"by {body.by}"
            raise IgnoredField(
                f"split.{field} has no effect {where}: leave it out",
                field=f"split.{field}",
                given=getattr(body, field),
                expected=f"{field} left out",
            )
    if needs_column and body.column is None:
        raise MissingField(f"a split by {body.by} needs a column", field="split.column", expected="a column's name")


def _column_key(rows: Rows, body: SplitBody, by: By) -> Codes:
    field = "split.column"
    assert body.column is not None
    if rows.table is None:
        raise InvalidCombination(
            f"a split by {by} reads a column of a data set, and these rows are in the request",
            field=field,
            given=body.column,
            expected="a data set, or a split by rows or group",
        )
    if by is By.TIME and rows.table.type_of(body.column, field=field).startswith("float"):
        return rows.table.order(body.column, field=field)
    codes_N, values = rows.table.codes(body.column, field=field)
    if by is By.TIME:
        return codes_N
    if not set(values) <= _HELD_OUT.keys():
        raise WrongType(
            f"{field}: {body.column} has other values than a column that says which rows are held out",
            field=field,
            given=next(value for value in values if value not in _HELD_OUT),
            expected="0 and 1, true and false, or train and validation",
        )
    if len(values) < 2:
        raise OutOfRange(
            f"{field}: {body.column} puts every row on one side",
            field=field,
            given=values[0],
            expected="both of its values",
        )
    return np.array([_HELD_OUT[value] for value in values], np.int64)[codes_N]


def _how(split: Split, column: str | None) -> dict[str, Any]:
    """A split as a job shows it, without what has no effect on it."""
    how: dict[str, Any] = {"by": str(split.by)} | ({} if column is None else {"column": column})
    how |= {} if split.by is By.COLUMN else {"fraction": split.fraction}
    return how | ({"stratify": split.stratify} if split.by is By.ROWS else {})


def _side(rows: Rows, rows_K: NDArray[np.int64] | None) -> dict[str, Any]:
    some: Any = slice(None) if rows_K is None else rows_K
    told: dict[str, Any] = {"rows": rows.count if rows_K is None else len(rows_K)}
    if rows.groups is not None:
        told["groups"] = len(np.unique(rows.groups.codes_N[some]))
    if rows.classes_N is not None:
        classes, counts = np.unique(rows.classes_N[some], return_counts=True)
        names = [rows.labels[number] if rows.labels else int(number) for number in classes[:_TOP_CLASSES]]
        told["classes"] = {str(name): int(count) for name, count in zip(names, counts, strict=False)}
    return told


def _hashes(rows: Rows) -> NDArray[np.uint64]:
    """(N,): equal for rows of equal inputs, and for others by a chance of 2⁻³² or less.

    Multilinear hashing (Lemire & Kaser 2014, section 3) of the numbers' bits, with fixed random odd factors.
    """
    factors_I = np.random.default_rng(0).integers(2**63, size=rows.inputs.shape[1], dtype=np.uint64) * 2 + 1

    def parts() -> Iterator[NDArray[np.uint64]]:
        for part_NI in rows.inputs.parts():
            # 0 and -0 are the same number.
            bits_NI = (part_NI + np.float32(0)).view(np.uint32).astype(np.uint64)
            yield bits_NI @ factors_I

    return np.concatenate(list(parts()))


def _on_both(training_K: NDArray[np.uint64], held_K: NDArray[np.uint64]) -> int:
    return int(np.isin(held_K, training_K).sum())
