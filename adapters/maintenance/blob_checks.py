"""Checks of blobs against the rows of a catalogue that refer to them."""

import errno
import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from adapters.access.tenants import DEFAULT_TENANT
from adapters.maintenance.catalog_reader import CatalogReader
from adapters.storage.blobs import NO_DESCRIPTORS, Blobs
from adapters.storage.schema import batched

_CHUNK_BYTES = 2**20


class Problem(StrEnum):
    """Kind of damage to a data folder."""

    STORE_MISMATCH = "store_mismatch"
    """The catalogue and the blobs do not belong together."""
    DAMAGED_CATALOG = "damaged_catalog"
    """A page or a value of the catalogue is damaged."""
    DAMAGED_INDEX = "damaged_index"
    """An index of the catalogue does not have the rows of its table."""
    DANGLING_REFERENCE = "dangling_reference"
    """A row refers to one that does not exist."""
    MISSING_BLOB = "missing_blob"
    """A row refers to a blob that does not exist."""
    SHORT_BLOB = "short_blob"
    """A blob ends before the bytes that a row refers to."""
    WRONG_BYTES = "wrong_bytes"
    """Bytes of a blob do not have their digest."""
    UNREADABLE_BLOB = "unreadable_blob"
    """The system cannot read a blob."""
    WRONG_TOTAL = "wrong_total"
    """The totals of a tenant, or the tally of a job, are not those of a count."""
    NOT_DURABLE = "not_durable"
    """The database may lose changes that were acknowledged."""
    ORPHAN = "orphan"
    """No row refers to a blob, and no process is writing it."""


class Part(NamedTuple):
    """Bytes of a blob that a row refers to."""

    source: "Source"
    key: tuple[str | int, ...]
    """Primary key of the row: tenant, name and version, or tenant and id."""
    file: str
    offset: int
    bytes: int | None
    """None if the row does not have it."""
    digest: str | None
    """None if the row does not have it."""

    def __str__(self) -> str:
        tenant, name, *version = map(str, self.key)
        owner = "" if tenant == DEFAULT_TENANT else f" of the tenant {tenant}"
        return f"{self.source.noun} {'@'.join([name, *version])}{owner}"


class Source(NamedTuple):
    """Column of a table that refers to blobs."""

    table: str
    column: str
    noun: str
    key: tuple[str, ...]
    location: tuple[str, str, str] = ("0", "NULL", "NULL")
    """SQL of the offset, the number of bytes and the digest."""
    is_whole: bool = False
    """True if the blob has no other bytes."""


_ADAPTER_KEY = ("tenant", "adapter", "version")
_SLICE = ('"offset"', "bytes", "digest")
SOURCES = (
    Source("versions", "file", "adapter", _ADAPTER_KEY, _SLICE),
    Source("trashed_versions", "file", "deleted adapter", _ADAPTER_KEY, _SLICE),
    Source("versions", "statistics", "statistics of", _ADAPTER_KEY),
    Source("dataset_versions", "file", "data set", ("tenant", "dataset", "version"), ("0", "bytes", "digest"), True),
    Source("jobs", "data_file", "data of job", ("tenant", "id")),
)


def sources_in(catalog: CatalogReader) -> list[Source]:
    """Return the columns that refer to blobs and exist in a catalogue."""
    return [source for source in SOURCES if source.column in catalog.columns(source.table)]


def read_parts(catalog: CatalogReader, files: Iterable[str]) -> Mapping[str, Sequence[Part]]:
    """Return what the rows expect of these blobs; blobs that no row refers to are absent."""
    parts: defaultdict[str, list[Part]] = defaultdict(list)
    sources = sources_in(catalog)
    for some in batched(files):
        for source in sources:
            columns = ", ".join((source.column, *source.location, *source.key))
            marks = ", ".join("?" * len(some))
            statement = f"SELECT {columns} FROM {source.table} WHERE {source.column} IN ({marks})"
            for file, offset, length, digest, *key in catalog.rows(statement, some):
                parts[file].append(Part(source, tuple(key), file, offset, length, digest))
    return parts


def referenced_files(catalog: CatalogReader) -> Iterator[str]:
    """Yield the names of the blobs that rows refer to; one may come more than once.

    Raises `CatalogNotLoadable` if the names are not in order, as those of a damaged index.
    """
    for source in sources_in(catalog):
        yield from catalog.distinct(source.table, source.column)


class Damage(NamedTuple):
    """A part of a blob that is not as its row expects."""

    problem: Problem
    part: Part
    detail: str


def stored_damage(blobs: Blobs, name: str, parts: Sequence[Part]) -> list[Damage]:
    """Check the parts of a blob as it is stored now; return those that are not as their rows expect."""
    if not parts:
        return []
    with blobs.stored_copy(name) as path:
        return damage_of(path, parts)


def damage_of(path: Path, parts: Sequence[Part]) -> list[Damage]:
    """Check the parts of a blob in a file; return those that are not as their rows expect."""
    try:
        # Non-blocking: a pipe in place of the file must not block.
        blob = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in NO_DESCRIPTORS:
            raise
        is_missing = error.errno in (errno.ENOENT, errno.ELOOP)
        problem = Problem.MISSING_BLOB if is_missing else Problem.UNREADABLE_BLOB
        return [Damage(problem, part, f"the file {part.file} cannot be opened: {error.strerror}") for part in parts]
    try:
        status = os.fstat(blob)
        if not stat.S_ISREG(status.st_mode):
            return [Damage(Problem.MISSING_BLOB, part, f"{part.file} is not a regular file") for part in parts]
        checked = (_damage(blob, status.st_size, part) for part in parts)
        return [damage for damage in checked if damage is not None]
    finally:
        os.close(blob)


def _damage(blob: int, size: int, part: Part) -> Damage | None:
    if part.bytes is None:
        return None
    if not all(isinstance(number, int) for number in (part.offset, part.bytes)):
        return Damage(Problem.WRONG_BYTES, part, "its row does not say where its bytes are")
    end = part.offset + part.bytes
    if size < end:
        return Damage(Problem.SHORT_BLOB, part, f"the file {part.file} has {size} bytes instead of {end}")
    if part.source.is_whole and size != end:
        return Damage(Problem.WRONG_BYTES, part, f"the file {part.file} has {size} bytes instead of {end}")
    digest = hashlib.sha256()
    try:
        for offset in range(part.offset, end, _CHUNK_BYTES):
            digest.update(os.pread(blob, min(_CHUNK_BYTES, end - offset), offset))
    except OSError as error:
        detail = f"the file {part.file} cannot be read: {error.strerror}"
        return Damage(Problem.UNREADABLE_BLOB, part, detail)
    if f"sha256:{digest.hexdigest()}" == part.digest:
        return None
    detail = f"the bytes {part.offset} to {end} of the file {part.file} do not have the digest {part.digest}"
    return Damage(Problem.WRONG_BYTES, part, detail)
