"""Reader of NPZ, a zip with one NumPy array per column. Nothing is unpickled, and arrays are read in chunks."""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy

from adapters.datasets.columns import (
    MAX_ROW_BYTES,
    TEXT_BLOCK_BYTES,
    PlannedColumn,
    ReportUnreadable,
    Source,
    check_names,
)
from adapters.errors import InvalidDataset, shorten

_SUFFIX = ".npy"
_MAX_FORTRAN_BYTES = 2**25
_MAX_HEADER_CHARACTERS = 10_000
_SUPPORTED = "arrays of numbers, booleans or text"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Array:
    """Array in the zip, described by its header."""

    name: str
    member: zipfile.ZipInfo
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
        raise InvalidDataset(
            f"the body cannot be read as NPZ: {shorten(str(error))}", field="body", expected="a zip of .npy files"
        ) from None
    members = archive.infolist()
    check_names([member.filename.removesuffix(_SUFFIX) for member in members])
    arrays = [_read_header(archive, member) for member in members]
    rows = arrays[0].shape[0]
    for array in arrays:
        if array.shape[0] != rows:
            raise _invalid_array(
                array.name, f"has {array.shape[0]} rows, and {arrays[0].name!r} has {rows}", f"{rows} rows"
            )
    columns = [PlannedColumn(name=array.name, type=_stored_type(array)) for array in arrays]
    return Source(columns=columns, chunks=partial(_chunks, archive, arrays), rows=rows)


def _read_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Array:
    name = member.filename.removesuffix(_SUFFIX)
    if not member.filename.endswith(_SUFFIX):
        raise _invalid_array(name, "is not a .npy file", "a zip of .npy files")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 0x1:
        raise _invalid_array(name, "is encrypted or packed otherwise than with deflate", "members stored or deflated")
    try:
        with archive.open(member) as file:
            version = npy.read_magic(file)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
            if read is None:
                raise _invalid_array(name, f"is of the NPY version {version[0]}.{version[1]}", "version 1.0 or 2.0")
            shape, fortran, dtype = read(file, max_header_size=_MAX_HEADER_CHARACTERS)
            data_bytes = member.file_size - file.tell()
    except (ValueError, OSError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise _invalid_array(name, f"has no header that can be read: {shorten(str(error))}", "a NPY header") from None
    array = _Array(name=name, member=member, shape=shape, fortran=fortran and len(shape) > 1, dtype=dtype)
    _check_header(array, data_bytes)
    return array


def _check_header(array: _Array, data_bytes: int) -> None:
    """Check everything in the header, before any memory is allocated for it."""
    if array.dtype.hasobject:
        raise _invalid_array(array.name, "holds Python objects, which only pickle could read", _SUPPORTED)
    if array.dtype.kind not in "biufU" or (array.dtype.kind == "f" and array.dtype.itemsize > 8):
        raise _invalid_array(array.name, f"is of the type {shorten(str(array.dtype))}, which is not taken", _SUPPORTED)
    if any(type(length) is not int or length < 0 for length in array.shape):
        raise _invalid_array(array.name, f"has the shape {array.shape}", "lengths of 0 or more")
    if len(array.shape) not in (1, 2) or 0 in array.shape[1:] or (array.dtype.kind == "U" and len(array.shape) > 1):
        raise _invalid_array(array.name, f"has the shape {array.shape}", "(rows,), or (rows, width) for numbers")
    claimed = prod(array.shape) * array.dtype.itemsize
    if claimed != data_bytes:
        raise _invalid_array(
            array.name,
            f"claims the shape {array.shape}, which takes {claimed} bytes, and has {data_bytes}",
            "a header that its data bears out",
        )
    if array.row_bytes > MAX_ROW_BYTES:
        raise _invalid_array(array.name, f"has {array.row_bytes} bytes a row", f"at most {MAX_ROW_BYTES} bytes a row")
    if array.fortran and claimed > _MAX_FORTRAN_BYTES:
        raise _invalid_array(array.name, "is in Fortran order: save numpy.ascontiguousarray of it", "C order")


def _stored_type(array: _Array) -> Any:
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "f":
        value = pa.float32() if size <= 4 else pa.float64()
    elif kind == "U":
        value = pa.string()
    else:
        value = pa.bool_() if kind == "b" and len(array.shape) == 1 else pa.int64()
    return value if len(array.shape) == 1 else pa.list_(value, array.shape[1])


def _chunks(
    archive: zipfile.ZipFile, arrays: Sequence[_Array], _unreadable: ReportUnreadable
) -> Iterator[Sequence[Any]]:
    rows = arrays[0].shape[0]
    row_bytes = sum(array.row_bytes for array in arrays)
    chunk_rows = max(1, min(8192, TEXT_BLOCK_BYTES // max(1, row_bytes)))
    readers = [_rows(archive, array, chunk_rows) for array in arrays]
    for _ in range(0, rows, chunk_rows):
        yield [_to_arrow(array, next(reader)) for array, reader in zip(arrays, readers, strict=True)]


def _rows(archive: zipfile.ZipFile, array: _Array, chunk_rows: int) -> Iterator[Any]:
    rows = array.shape[0]
    try:
        with archive.open(array.member) as file:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            read(file, max_header_size=_MAX_HEADER_CHARACTERS)
            whole = None
            if array.fortran:
                whole = _read_bytes(file, array, array.row_bytes * rows).reshape(array.shape, order="F")
            for begin in range(0, rows, chunk_rows):
                count = min(chunk_rows, rows - begin)
                if whole is not None:
                    yield np.ascontiguousarray(whole[begin : begin + count])
                    continue
                if begin + count == rows:
                    yield _read_last(file, array, count)
                    continue
                yield _read_bytes(file, array, array.row_bytes * count).reshape(count, *array.shape[1:])
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _invalid_array(array.name, f"cannot be unpacked: {shorten(str(error))}", "a zip that is whole") from None


def _read_last(file: IO[bytes], array: _Array, count: int) -> Any:
    values = _read_bytes(file, array, array.row_bytes * count).reshape(count, *array.shape[1:])
    file.read(1)  # compares the checksum at the end
    return values


def _read_bytes(file: IO[bytes], array: _Array, size: int) -> Any:
    content = file.read(size)
    if len(content) != size:
        raise _invalid_array(array.name, "ends before its last row", "data as long as the header says")
    return np.frombuffer(content, array.dtype)


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


def _invalid_array(name: str, what: str, expected: str) -> InvalidDataset:
    return InvalidDataset(f"the array {shorten(name)!r} {what}", field=name, expected=expected)
