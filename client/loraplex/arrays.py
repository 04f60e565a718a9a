"""Conversion of NumPy arrays, tensors, nested lists and texts to rows, and back. This module never imports torch."""

# N rows · I in_features · O out_features
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraplex.errors import NotFinite, WrongShape, WrongType

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows to send, and the form of their answer."""

    x_NI: Float32
    """Finite and contiguous."""
    one: bool
    """True if the input was a single row, without a dimension for rows."""
    device: Any
    """Device of the tensor that was given; None if none was."""
    index: Any = None
    """Index of the pandas object that was given; None if none was."""

    def answer(self, outputs_NO: Float32) -> Any:
        """Return outputs in the form of the input: a tensor for a tensor, one row for one row."""
        shaped = outputs_NO[0] if self.one else outputs_NO
        return shaped if self.device is None else _torch().from_numpy(shaped).to(self.device)


def is_text(value: object) -> bool:
    """Return whether these are texts for an encoder: a string, a list of strings, or an array of them."""
    # An Arrow stream alone can be read once only, so it is not looked at here.
    columns = table_columns(value) if hasattr(value, "__array__") else None
    if columns is not None and len(columns) == 1:
        value = columns[0][1]
    # A column of pandas, polars or Arrow; Arrow's have no shape.
    if hasattr(value, "__array__") and len(getattr(value, "shape", (0,))) == 1 and not _is_tensor(value):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        return value.dtype.kind == "U" or (value.dtype == object and all(isinstance(text, str) for text in value.flat))
    return isinstance(value, str) or (
        isinstance(value, Sequence) and len(value) > 0 and all(isinstance(text, str) for text in value)
    )


def rows_of(value: object, *, field: str = "inputs") -> Rows:
    """Return rows of numbers, (N, I), or a single row, (I,).

    Raises `WrongType`, `WrongShape` and `NotFinite`.
    """
    x = numbers(value, field=field)
    if x.ndim not in (1, 2) or 0 in x.shape:
        expected = "(rows, columns), or (columns,) for one row; at least one of each"
        raise WrongShape(f"{field} has the shape {x.shape}", field=field, given=x.shape, expected=expected)
    device = getattr(value, "device", None) if _is_tensor(value) else None
    return Rows(np.atleast_2d(x), x.ndim == 1, device, rows_index(value))


def rows_index(value: object) -> Any:
    """Return the index of a pandas object, and None for anything else."""
    return getattr(value, "index", None) if hasattr(value, "iloc") else None


def numbers(value: object, *, field: str) -> Float32:
    """Return an array of finite float32.

    Raises `WrongType`, `WrongShape` and, with the row, `NotFinite`.
    """
    values = array(value, field=field)
    if values.dtype.kind not in "iuf":
        detail = f"{field} is no array of numbers: its type is {values.dtype}"
        raise WrongType(detail, field=field, given=str(values.dtype), expected="real numbers")
    return finite(values, field=field)


def finite(values: NDArray[Any], *, field: str) -> Float32:
    """Return numbers as float32; raise `NotFinite` for the first that is not finite."""
    with np.errstate(over="ignore"):
        narrow = np.asarray(values, np.float32, order="C")
    is_finite = np.isfinite(narrow)
    if not is_finite.all():
        position = [int(index) for index in np.unravel_index(np.argmin(is_finite), is_finite.shape)]
        where = "".join(f", {name} {index}" for name, index in zip(("row", "column"), position, strict=False))
        raise NotFinite(
            f"{field}{where}: not a finite float32 number",
            field=field,
            row=position[0] if position else None,
            given=float(values[tuple(position)]),
            expected="a finite number",
        )
    return narrow


def array(value: object, *, field: str) -> NDArray[Any]:
    """Return any array-like as a NumPy array; raise `WrongShape` if its rows differ in length."""
    if _is_tensor(value):
        value = _from_tensor(value, field)
    columns = table_columns(value)
    if columns is not None:
        # Many columns of numbers take long one by one.
        whole = np.asarray(value) if hasattr(value, "__array__") else np.empty(0, object)
        return whole if whole.dtype.kind in "iuf" else stack_columns(columns, field=field)
    try:
        values = np.asarray(lists_of_vectors(value, field=field))
        # pandas has columns of several numeric types as objects.
        is_numeric = values.dtype == object and all(isinstance(cell, int | float | np.number) for cell in values.flat)
        return np.asarray(values.tolist()) if is_numeric else values
    except ValueError:
        detail = f"{field} is no array: its rows differ in length"
        raise WrongShape(detail, field=field, expected="rows of one length") from None


def table_columns(value: Any) -> list[tuple[str, Any]] | None:
    """Return the named columns of a pandas or polars DataFrame or an Arrow table; None for anything else.

    Raises `WrongType` for a polars LazyFrame, which has no rows yet.
    """
    if hasattr(value, "collect_schema") and not hasattr(value, "get_columns"):
        raise WrongType("a LazyFrame has no rows yet", given=type(value).__name__, expected="frame.collect()")
    if hasattr(value, "__arrow_c_stream__") and not hasattr(value, "__array__"):
        # Such as a reader of record batches, or a relation of DuckDB.
        value = import_module("pyarrow").table(value)
    if hasattr(value, "iloc") and hasattr(value, "columns"):
        return [(str(name), value.iloc[:, index]) for index, name in enumerate(value.columns)]
    if hasattr(value, "get_columns"):
        return [(column.name, column) for column in value.get_columns()]
    if hasattr(value, "column_names") and hasattr(value, "itercolumns"):
        return list(zip(value.column_names, value.itercolumns(), strict=True))
    return None


def stack_columns(columns: Sequence[tuple[str, Any]], *, field: str) -> NDArray[Any]:
    """Return columns of numbers or of vectors side by side, (N, I), or one column of anything else, (N, 1).

    Raises `WrongType` for one of several columns that has no numbers, with its name.
    """
    arrays = []
    for name, column in columns:
        values = array(column, field=f"{field}, column {name}")
        if values.dtype.kind not in "iufb" and len(columns) > 1:
            detail, kind = f"{field}: the column {name!r} has no numbers", str(values.dtype)
            raise WrongType(detail, field=field, given=kind, expected="columns of numbers: select them")
        arrays.append(values[:, np.newaxis] if values.ndim == 1 else values)
    if not arrays:
        raise WrongShape(f"{field} has no columns", field=field, given=0, expected="a column")
    return np.hstack(arrays)


def lists_of_vectors(value: Any, *, field: str) -> Any:
    """Return a column of vectors, such as a pandas Series of lists, as a list of lists, and anything else as it is.

    Raises `WrongType` for a row that has no vector.
    """
    # Only what NumPy would turn into an array of objects: neither a list nor a tensor.
    if isinstance(value, list | tuple | str) or not hasattr(value, "__array__"):
        return value
    cells = np.asarray(value)
    if cells.dtype != object or cells.ndim != 1 or not any(map(_is_vector, cells)):
        return value
    for row, cell in enumerate(cells):
        if not _is_vector(cell):
            detail = f"{field}, row {row}: {cell!r} is no vector"
            raise WrongType(detail, field=field, row=row, given=cell, expected="a vector")
    return [np.asarray(cell).tolist() for cell in cells]


def _is_vector(cell: object) -> bool:
    return isinstance(cell, list | tuple) or getattr(cell, "ndim", 0) == 1


def _from_tensor(tensor: Any, field: str) -> NDArray[Any]:
    try:
        # NumPy has no bfloat16.
        narrow = tensor.dtype.is_floating_point and tensor.element_size() < 4
        return (tensor.float() if narrow else tensor).numpy(force=True)  # type: ignore[no-any-return]
    except (TypeError, ValueError, RuntimeError) as error:
        # A sparse or quantized tensor, or one without data, such as a parameter of a lazy module.
        detail = f"{field} is a tensor that is no array: {error}"
        raise WrongType(detail, field=field, expected="a dense tensor of numbers") from None


def _is_tensor(value: object) -> bool:
    torch = _torch()
    return torch is not None and isinstance(value, torch.Tensor)


def _torch() -> Any:
    # Torch is imported if the caller has a tensor.
    return sys.modules.get("torch")


# Encoder: texts to one row of numbers per text, such as `SentenceTransformer.encode`.
Encode = Callable[[list[str]], Any]


def encode_rows(inputs: Any, encode: Encode | None, *, field: str) -> Rows:
    """Return rows from texts by the encoder; raise `WrongType` without one."""
    if encode is None:
        detail, expected = "are texts, and this client has no encoder", "numbers, or a Client(url, encode=model.encode)"
        raise WrongType(f"{field} {detail}", field=field, given="text", expected=expected)
    texts = [inputs] if isinstance(inputs, str) else np.asarray(inputs, dtype=object).ravel().tolist()
    rows = rows_of(encode(texts), field=field)
    if rows.one or len(rows.x_NI) != len(texts):
        shape, expected = rows.x_NI.shape, f"({len(texts)}, columns)"
        detail = f"the encoder made {shape} numbers of {len(texts)} texts"
        raise WrongShape(detail, field=field, given=shape, expected=expected)
    return Rows(rows.x_NI, isinstance(inputs, str), None, rows_index(inputs))
