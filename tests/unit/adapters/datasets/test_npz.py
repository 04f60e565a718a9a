"""NPZ: arrays as columns, and headers that lie."""

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.datasets.ingest import Format
from adapters.errors import InvalidDataset
from tests.support.data_set_files import npz, read, types


def header(shape: tuple[int, ...], descr: str = "<f8", *, fortran: bool = False) -> bytes:
    """A NPY header, version 1.0."""
    text = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    text += b" " * (63 - (10 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_columns_in_their_order(tmp_path: Path, save: Any) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "x": rng.standard_normal((50_000, 3)),
        "half": rng.standard_normal(50_000).astype(np.float16),
        "big": np.arange(50_000, dtype=">i4"),
        "columns": np.asfortranarray(rng.standard_normal((50_000, 2)).astype(np.float32)),
        "bytes": rng.integers(0, 256, (50_000, 2), dtype=np.uint8),
        "truth": rng.integers(0, 2, 50_000).astype(bool),
        "text": np.array(["a", "zß", ""] * 16_666 + ["b", "c"]),
    }
    buffer = io.BytesIO()
    save(buffer, **arrays)
    report, values = read(tmp_path, buffer.getvalue(), Format.NPZ)
    assert types(report) == {
        "x": ("list<float64>", 3),
        "half": ("float32", None),
        "big": ("int64", None),
        "columns": ("list<float32>", 2),
        "bytes": ("list<int64>", 2),
        "truth": ("bool", None),
        "text": ("string", None),
    }
    assert report.rows == 50_000
    for name, array in arrays.items():
        assert values[name] == array.tolist()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.array([{"a": 1}], dtype=object)}, "'x' holds Python objects"),
        ({"x": np.zeros(2, [("a", int)])}, "'x' is of the type"),
        ({"x": np.zeros(2, complex)}, "complex128"),
        ({"x": np.zeros(2, "datetime64[s]")}, "datetime64"),
        ({"x": np.zeros(2, np.longdouble)}, "'x' is of the type"),
        ({"x": np.float64(1)}, "shape \\(\\)"),
        ({"x": np.zeros((2, 2, 2))}, "shape \\(2, 2, 2\\)"),
        ({"x": np.zeros((2, 0))}, "shape \\(2, 0\\)"),
        ({"x": np.zeros(2), "y": np.zeros(3)}, "'y' has 3 rows, and 'x' has 2"),
        ({"x": np.zeros(0)}, "no rows"),
        ({}, "no columns"),
    ],
)
def test_arrays_that_are_no_columns_are_refused_by_name(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidDataset, match=says):
        read(tmp_path, npz(**arrays), Format.NPZ)


@pytest.mark.parametrize("shape", [(2**32,), (2**32, 1), (-1,), (2**62, 2**62), (3,)])
def test_a_header_that_claims_more_than_there_is_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidDataset, match=r"'x' (claims|has)"):
        read(tmp_path, zipped({"x.npy": header(shape)}), Format.NPZ)


def test_a_member_that_unpacks_to_less_than_it_says_is_refused(tmp_path: Path) -> None:
    content = bytearray(zipped({"x.npy": header((4,)) + bytes(32)}, zipfile.ZIP_DEFLATED))
    member = zipped({"x.npy": header((400,)) + bytes(3200)}, zipfile.ZIP_DEFLATED)
    sizes = struct.pack("<I", len(header((4,))) + 32)
    larger = struct.pack("<I", len(header((400,))) + 3200)
    assert content.count(sizes) >= 2
    lying = bytes(content).replace(sizes, larger)
    with pytest.raises(InvalidDataset):
        read(tmp_path, lying, Format.NPZ)
    with pytest.raises(InvalidDataset):
        read(tmp_path, member.replace(larger, sizes), Format.NPZ)


def test_a_wrong_checksum_is_found(tmp_path: Path) -> None:
    content = zipped({"x.npy": header((4,)) + b"abcdefgh" * 4})
    with pytest.raises(InvalidDataset, match=r"'x' .*CRC"):
        read(tmp_path, content.replace(b"abcdefgh" * 4, b"abcdefgi" * 4), Format.NPZ)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "NPZ"),
        (b"\x93NUMPY\x01\x00" + b"x" * 72, "NPZ"),
        (zipped({"readme.txt": b"x"}), "not a .npy"),
        (zipped({"x.npy": b"not an array"}), "header"),
        (zipped({"x.npy": b"\x93NUMPY\x01\x00\xff\xff{"}), "header"),
        (zipped({"x.npy": header((1,)) + bytes(8)}, zipfile.ZIP_LZMA), "otherwise"),
        (zipped({"x.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", 20_000) + b"[" * 20_000}), "header"),
        (zipped({".npy": header((1,)) + bytes(8)}), "column 0"),
    ],
)
def test_what_is_no_npz_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(InvalidDataset, match=says):
        read(tmp_path, content, Format.NPZ)


def test_a_large_array_in_fortran_order_is_refused_with_the_way_out(tmp_path: Path) -> None:
    content = npz(x=np.asfortranarray(np.zeros((2**21, 3))))
    with pytest.raises(InvalidDataset, match="ascontiguousarray"):
        read(tmp_path, content, Format.NPZ, max_bytes=2**30)
