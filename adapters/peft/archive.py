"""Zip archive of PEFT's two files. Reading checks every limit first; writing is deterministic."""

import stat
import zipfile
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import PurePosixPath

from adapters.errors import InvalidArchive
from adapters.peft.config import CONFIG_FILE, MAX_CONFIG_BYTES
from adapters.peft.weights import TENSOR_FILE

_IGNORED = "README.md"
_FILES = (CONFIG_FILE, TENSOR_FILE)
_MAX_ENTRIES, _MAX_DIRECTORY_BYTES, _END_BYTES = 8, 64 * 1024, 22
# Earliest time in a zip. It is fixed, so that archives of the same adapter have the same bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def pack(files: Mapping[str, bytes]) -> bytes:
    """Return a zip with the files at its root. It is not compressed, because factors do not compress."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, date_time=_EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def unpack(content: bytes, *, max_bytes: int) -> dict[str, bytes]:
    """Return PEFT's two files from a zip that has them at its root or in one folder.

    Nothing is written to disk, and no entry unpacks to more than `max_bytes`. Raises `InvalidArchive` with the entry.
    """
    _check_directory(content)
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            entries = _select_entries(archive.infolist())
            limits = {CONFIG_FILE: min(max_bytes, MAX_CONFIG_BYTES), TENSOR_FILE: max_bytes}
            return {name: _read(archive, entry, limits[name]) for name, entry in entries.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, OverflowError, ValueError) as error:
        raise InvalidArchive(f"the body is not a readable zip archive: {error}", expected="a zip archive") from None


def _check_directory(content: bytes) -> None:
    """Check the size of the directory in the end record, before `zipfile` reads all of the directory into memory.

    The record is a signature, four 16-bit numbers, the last of which counts the entries, and the size of the directory
    (APPNOTE.TXT 6.3.10, section 4.3.16). Zip64 archives have a second record, whose locator precedes this one.
    """
    end = content.rfind(b"PK\5\6", max(0, len(content) - _END_BYTES - 0xFFFF), len(content) - _END_BYTES + 4)
    if end < 0:
        raise InvalidArchive("the body is not a zip archive: it has no end record", expected="a zip archive")
    entries = int.from_bytes(content[end + 10 : end + 12], "little")
    size = int.from_bytes(content[end + 12 : end + 16], "little")
    if entries > _MAX_ENTRIES or size > _MAX_DIRECTORY_BYTES or content[max(0, end - 20) :][:4] == b"PK\6\7":
        detail = f"the zip has {entries} entries in a directory of {size} bytes"
        expected = f"at most {_MAX_ENTRIES} entries in {_MAX_DIRECTORY_BYTES} bytes"
        raise InvalidArchive(detail, given=f"{entries} entries", expected=expected)


def _select_entries(entries: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    selected: dict[str, zipfile.ZipInfo] = {}
    folders = set()
    for entry in entries:
        path = PurePosixPath(entry.filename)
        _check_path(entry, path)
        if entry.is_dir() or path.name == _IGNORED:
            continue
        folders.add(path.parent)
        if path.name not in _FILES or len(path.parts) > 2:
            raise _invalid_entry(entry, f"is not one of {', '.join(_FILES)}")
        if path.name in selected:
            raise _invalid_entry(entry, "is there twice")
        selected[path.name] = entry
    if len(folders) > 1:
        raise InvalidArchive("the zip has files in several folders", expected="both files at the root or in one folder")
    for name in _FILES:
        if name not in selected:
            raise InvalidArchive(f"the zip has no {name}", field=name, expected=", ".join(_FILES))
    return selected


def _check_path(entry: zipfile.ZipInfo, path: PurePosixPath) -> None:
    name = entry.orig_filename
    if not entry.filename or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name:
        raise _invalid_entry(entry, "has an unsafe path")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise _invalid_entry(entry, "is a link")
    if entry.flag_bits & 1:
        raise _invalid_entry(entry, "is encrypted")


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, max_bytes: int) -> bytes:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _invalid_entry(entry, "is compressed by another method than deflate")
    if entry.file_size > max_bytes:
        raise _invalid_entry(entry, f"unpacks to {entry.file_size} bytes, more than {max_bytes}")
    with archive.open(entry) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise _invalid_entry(entry, f"unpacks to more than {max_bytes} bytes")
    return content


def _invalid_entry(entry: zipfile.ZipInfo, why: str) -> InvalidArchive:
    return InvalidArchive(f"the zip entry {entry.orig_filename[:80]!r} {why}", field="body", given=entry.orig_filename)
