"""Calls that train, estimate and update. Large arrays are sent as a temporary data set."""

import secrets
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from loraplex import decode as reading
from loraplex.arrays import Encode, array, check_finite, lists_of_vectors, plain, read_rows
from loraplex.calls.builders import given, path, send_json
from loraplex.calls.datasets import delete_dataset, put_columns
from loraplex.effects import Operation, Repeat, ask
from loraplex.errors import InvalidCombination, LoraplexError, WrongType
from loraplex.results import JobFields

# Numbers of inputs, targets and the rest that are sent in the request: about 4 MiB of JSON.
INLINE_NUMBERS = 200_000
_TEMPORARY = "loraplex-client-"
_ARRAYS = ("inputs", "targets", "weights", "groups", "corpus")
# Time that the service may take to check the rows of a training.
_PLANNING_SECONDS = 120.0


class Sending:
    """Rows of one request in the form in which they are sent, with the temporary data sets that hold them."""

    def __init__(self, encode: Encode | None, *, timeout: float | None) -> None:
        self._encode = encode
        self._timeout = timeout
        self._made: list[str] = []

    def read(self, rows: Any, *, field: str, fleet: bool = False) -> Operation[Any]:
        """Return the `data` of a request from arrays; return a reference to a data set unchanged."""
        if not isinstance(rows, Mapping) or "dataset" in rows:
            return rows
        arrays: dict[str, Any] = {}
        for name, value in given(rows).items():
            if name == "inputs":
                arrays[name] = (yield from read_rows(value, self._encode, field=f"{field}.{name}")).x_NI
            else:
                arrays[name] = _values(value, f"{field}.{name}") if name in _ARRAYS else value
        large = sum(value.size for value in arrays.values() if isinstance(value, np.ndarray)) > INLINE_NUMBERS
        if not large:
            return {name: plain(value) if isinstance(value, np.ndarray) else value for name, value in arrays.items()}
        return (yield from self._as_dataset(arrays, fleet=fleet))

    def clear(self) -> Operation[None]:
        """Delete the temporary data sets; a job keeps its own copy of the rows."""
        for name in self._made:
            # The job is queued, and an error here must not hide it.
            with suppress(LoraplexError):
                yield from delete_dataset(name)

    def _as_dataset(self, arrays: dict[str, Any], *, fleet: bool) -> Operation[dict[str, Any]]:
        columns = {name: arrays[name] for name in arrays if name in _ARRAYS and name != "corpus"}
        data: dict[str, Any] = {name: value for name, value in arrays.items() if name not in _ARRAYS}
        data |= {
            "dataset": (yield from self._put(columns)),
            "inputs": {"column": "inputs"},
            "targets": {"column": "targets"},
        }
        if "weights" in columns:
            data["weight"] = "weights"
        if "groups" in columns:
            # The placeholder of a fleet is the name of its column, which is `{group}` for rows in the request.
            data["group_by" if fleet else "group"] = "group"
        if "corpus" in arrays:
            corpus = yield from self._put({"documents": arrays["corpus"]})
            data["corpus"] = {"dataset": corpus, "documents": {"column": "documents"}}
        return data

    def _put(self, columns: dict[str, Any]) -> Operation[str]:
        name = _TEMPORARY + secrets.token_hex(8)
        self._made.append(name)
        renamed = {{"groups": "group"}.get(column, column): value for column, value in columns.items()}
        yield from put_columns(name, renamed, timeout=self._timeout)
        return name


def train(
    name: str,
    rows: Mapping[str, Any],
    data: Any,
    body: Mapping[str, Any],
    *,
    encode: Encode | None,
    timeout: float | None,
    dry_run: bool,
) -> Operation[Any]:
    """Queue a training and return `JobFields`, or return its `Estimate`."""
    known = given(rows)
    if (data is None) == (not known):
        instead = "and not as both" if known else "and neither is given"
        raise InvalidCombination(
            f"rows come as inputs and targets, or as data, {instead}",
            field="data",
            expected='inputs=…, targets=…; or data={"dataset": …, "inputs": …, "targets": …}',
        )
    sending = Sending(encode, timeout=timeout)
    try:
        sent = yield from sending.read(known or data, field="data", fleet="{" in name)
        whole = {"name": name, **given(body), "data": sent}
        post = partial(send_json, "POST", "/adapters", whole, timeout=timeout, allowance=_PLANNING_SECONDS)
        if dry_run:
            return (yield from ask(post(reading.estimate, query={"dry_run": "true"}, repeats=Repeat.ALWAYS)))
        return (yield from ask(post(reading.job)))
    finally:
        yield from sending.clear()


def update(
    name: str, rows: Mapping[str, Any], body: Mapping[str, Any], *, encode: Encode | None, timeout: float | None
) -> Operation[JobFields]:
    """Queue an update with rows to add and rows to forget."""
    sending = Sending(encode, timeout=timeout)
    try:
        whole = given(body)
        for field, value in given(rows).items():
            whole[field] = yield from sending.read(value, field=field)
        where = path("adapters", name, "update")
        call = send_json("POST", where, whole, reading.job, timeout=timeout, allowance=_PLANNING_SECONDS)
        return (yield from ask(call))
    finally:
        yield from sending.clear()


def _values(value: Any, field: str) -> Any:
    """Return an array, with floats finite as float32; return a list of lists of labels unchanged.

    Raises `WrongType` for a list of several types, which an array would convert to one: ["cat", 1] to two texts.
    """
    value = lists_of_vectors(value, field=field)
    if isinstance(value, list | tuple) and all(isinstance(row, list | tuple) for row in value):
        named = any(isinstance(name, str) for row in value for name in row)
        if named or len({len(row) for row in value}) > 1:
            return [list(row) for row in value]
    elif isinstance(value, list | tuple):
        kinds = set(map(type, value))
        if len(set(map(_kind, kinds))) > 1:
            raise WrongType(
                f"{field} are of several kinds",
                field=field,
                given=", ".join(sorted(kind.__name__ for kind in kinds)),
                expected="numbers alone, text alone, or true and false alone",
            )
    found = array(value, field=field)
    if found.dtype.kind == "f":
        with np.errstate(over="ignore"):
            narrow = found.astype(np.float32)
        check_finite(narrow, found, field=field)
        return narrow
    return found


def _kind(kind: type) -> str:
    return "text" if issubclass(kind, str) else "truth" if issubclass(kind, bool | np.bool_) else "number"
