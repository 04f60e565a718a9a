"""Reader of NPZ, a zip with one NumPy array per column. Nothing is unpickled, and arrays are read in chunks."""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy

from adapters.datasets.columns import MAX_ROW_BYTES, PlannedColumn, Source, check_names, rows_per_chunk, stored_type
from adapters.errors import InvalidDataset, shorten

_SUFFIX = ".npy"
_MAX_FORTRAN_BYTES = 2**25
_MAX_HEADER_CHARACTERS = 10_000
_SUPPORTED = "arrays of numbers, booleans or text"
_HEADER_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Array:
    """Array in the zip, described by its header."""

    name: str
    member: zipfile.ZipInfo
    header_bytes: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: Any

    @property
    def row_bytes(self) -> int:
        return int(prod(self.shape[1:])) * int(self.dtype.itemsize)


def open_npz(path: str) -> Source:
    """Open an NPZ file; raise `InvalidDataset`."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        detail = f"the body cannot be read as NPZ: {shorten(str(error))}"
        raise InvalidDataset(detail, expected="a zip of .npy files") from None
    members = archive.infolist()
    check_names([member.filename.removesuffix(_SUFFIX) for member in members])
    arrays = [_read_header(archive, member) for member in members]
    rows = arrays[0].shape[0]
    for array in arrays:
        if array.shape[0] != rows:
            what = f"has {array.shape[0]} rows, and {arrays[0].name!r} has {rows}"
            raise _invalid_array(array.name, what, f"{rows} rows")
    columns = [PlannedColumn(array.name, _stored_type(array)) for array in arrays]
    return Source(columns=columns, chunks=partial(_chunks, archive, arrays), rows=rows)


def _read_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Array:
    name = member.filename.removesuffix(_SUFFIX)
    if not member.filename.endswith(_SUFFIX):
        raise _invalid_array(name, "is not a .npy file", "a zip of .npy files")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 0x1:
        raise _invalid_array(name, "is encrypted or packed otherwise than with deflate", "members stored or deflated")
    with _errors_as_invalid(name, "header", "a NPY header of version 1.0 or 2.0"), archive.open(member) as file:
        read = _HEADER_READERS[npy.read_magic(file)]
        shape, fortran, dtype = read(file, max_header_size=_MAX_HEADER_CHARACTERS)
        header_bytes = file.tell()
    fortran = fortran and len(shape) > 1
    array = _Array(name=name, member=member, header_bytes=header_bytes, shape=shape, fortran=fortran, dtype=dtype)
    _check_header(array)
    return array


def _check_header(array: _Array) -> None:
    """Check everything in the header, before any memory is allocated for it."""
    shape, dtype, data_bytes = array.shape, array.dtype, array.member.file_size - array.header_bytes
    if dtype.hasobject:
        raise _invalid_array(array.name, "holds Python objects, which only pickle could read", _SUPPORTED)
    if dtype.kind not in "biufU" or (dtype.kind == "f" and dtype.itemsize > 8):
        raise _invalid_array(array.name, f"is of the type {shorten(str(dtype))}, which is not taken", _SUPPORTED)
    if (
        any(type(length) is not int or length < 0 for length in shape)
        or len(shape) not in (1, 2)
        or 0 in shape[1:]
        or (dtype.kind == "U" and len(shape) > 1)
    ):
        raise _invalid_array(array.name, f"has the shape {shape}", "(rows,), or (rows, width) for numbers")
    claimed = prod(shape) * dtype.itemsize
    if claimed != data_bytes:
        what = f"claims the shape {shape}, which takes {claimed} bytes, and has {data_bytes}"
        raise _invalid_array(array.name, what, "a header that its data bears out")
    if array.row_bytes > MAX_ROW_BYTES:
        raise _invalid_array(array.name, f"has {array.row_bytes} bytes a row", f"at most {MAX_ROW_BYTES} bytes a row")
    if array.fortran and claimed > _MAX_FORTRAN_BYTES:
        raise _invalid_array(array.name, "is in Fortran order: save numpy.ascontiguousarray of it", "C order")


def _stored_type(array: _Array) -> Any:
    if array.dtype.kind == "U":
        return pa.string()
    value = stored_type(array.name, pa.from_numpy_dtype(array.dtype.newbyteorder("=")))
    if len(array.shape) == 1:
        return value
    # There are no lists of booleans.
    return pa.list_(pa.int64() if array.dtype.kind == "b" else value, array.shape[1])


def _chunks(archive: zipfile.ZipFile, arrays: Sequence[_Array], _unreadable: object) -> Iterator[Sequence[Any]]:
    chunk_rows = rows_per_chunk(sum(array.row_bytes for array in arrays))
    return zip(*(_rows(archive, array, chunk_rows) for array in arrays), strict=True)


def _rows(archive: zipfile.ZipFile, array: _Array, chunk_rows: int) -> Iterator[Any]:
    rows = array.shape[0]
    # An array in Fortran order can only be read as a whole.
    rows_at_once = rows if array.fortran else chunk_rows
    with _errors_as_invalid(array.name, "data", "a zip that is whole"), archive.open(array.member) as file:
        file.read(array.header_bytes)
        for begin in range(0, rows, max(1, rows_at_once)):
            count = min(rows_at_once, rows - begin)
            content = file.read(array.row_bytes * count)
            if len(content) != array.row_bytes * count:
                raise _invalid_array(array.name, "ends before its last row", "data as long as the header says")
            if begin + count == rows:
                file.read(1)  # compares the checksum at the end
            shape = (count, *array.shape[1:])
            values = np.ndarray(shape, array.dtype, content, order="F" if array.fortran else "C")
            for position in range(0, count, chunk_rows):
                yield _to_arrow(array, values[position : position + chunk_rows])


def _to_arrow(array: _Array, values: Any) -> Any:
    if array.dtype.kind == "U":
        try:
            return pa.array(values.tolist(), pa.string())
        except (UnicodeEncodeError, ValueError, SystemError):
            raise _invalid_array(array.name, "has text that is not Unicode", "text") from None
    if array.dtype.kind == "b" and values.ndim > 1:
        values = values.astype(np.int64)
    flat = pa.array(values.reshape(-1).astype(array.dtype.newbyteorder("="), copy=False))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


@contextmanager
def _errors_as_invalid(name: str, part: str, expected: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise _invalid_array(name, f"has a {part} that cannot be read: {shorten(str(error))}", expected) from None


def _invalid_array(name: str, what: str, expected: str) -> InvalidDataset:
    return InvalidDataset(f"the array {shorten(name)!r} {what}", field=name, expected=expected)
