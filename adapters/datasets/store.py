"""Store of data sets: their names and versions in the catalogue, and their stored forms as blobs.

The blobs are swept together with those of the adapters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.access.audit import Action, Change, record
from adapters.access.quotas import check_dataset_bytes
from adapters.catalog import queries
from adapters.clock import rfc3339
from adapters.datasets.ingest import Ingestion
from adapters.datasets.validation import Column, IngestReport, findings_from_json, findings_to_json
from adapters.errors import AliasNotFound, BadRow, BlobCorrupt, DatasetNotFound, VersionNotFound, shorten
from adapters.names import LIVE, MAX_VERSION, Reference
from adapters.storage.database import Database
from adapters.storage.pending_blobs import BlobWriter
from adapters.storage.schema import dataset_versions as versions
from adapters.storage.schema import datasets
from adapters.storage.totals import add_to_totals

# Callback with whether the name exists, and the digest of its newest version. It may raise `PreconditionFailed`.
Precondition = Callable[[bool, str | None], None]
# Lists do not read the reports, which are long for wide data sets.
_SELECT_ENTRY = sa.select(*(column for column in versions.c if column.name not in ("tenant", "columns", "bad_rows")))


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetEntry:
    """Immutable version of a data set, as in a list."""

    dataset: str
    version: int
    digest: str
    created_at: str
    content_type: str
    """Media type of the uploaded file."""
    rows: int
    file: str
    """The blob with its stored form, `bytes` long."""
    bytes: int

    def __str__(self) -> str:
        return f"{self.dataset}@{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetVersion(DatasetEntry):
    """Immutable version of a data set, with its columns and first bad rows."""

    columns: tuple[Column, ...] = field(hash=False)
    bad_rows: tuple[BadRow, ...] = field(hash=False)
    """The first bad rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSummary:
    """Data set with its newest version and the number of its versions."""

    name: str
    created_at: str
    newest: DatasetEntry
    versions: int


class Datasets:
    """Data sets of all tenants of one catalogue. Safe to use from any thread and from several processes."""

    def __init__(self, database: Database, writer: BlobWriter, *, now: Callable[[], float]) -> None:
        self._database = database
        self._writer = writer
        self._blobs = writer.blobs
        self._now = now
        # Blobs whose digest was computed by this process: previews of a large file do not read it each time.
        self._checked: set[str] = set()

    def add(
        self,
        name: str,
        ingestion: Ingestion,
        *,
        tenant: str,
        content_type: str,
        precondition: Precondition | None = None,
    ) -> tuple[DatasetVersion, bool]:
        """Ingest an upload as a new version, unless the newest one has the same bytes; return it and whether it is new.

        If the stored copy of those bytes is missing or corrupt, that version gets the new copy. Raises `QuotaExceeded`
        and what `ingestion` and `precondition` raise, and then nothing has changed.
        """
        with self._writer.upload() as upload:
            reports: list[IngestReport] = []

            def convert(file: BinaryIO) -> None:
                reports.append(ingestion.run(Path(file.name)))

            file = upload.write(convert)
            report = {name: getattr(reports[-1], name) for name in IngestReport.__dataclass_fields__}
            unnumbered = DatasetVersion(
                dataset=name, version=0, created_at=rfc3339(self._now()), content_type=content_type, file=file, **report
            )
            corrupt = self._corrupt_newest(name, unnumbered.digest, tenant=tenant)
            with self._database.write() as connection:
                newest = _newest(connection, name, tenant=tenant)
                if precondition is not None:
                    precondition(newest is not None, newest.digest if newest else None)
                before, after = newest.digest if newest else None, unnumbered.digest
                if newest is None or before != after:
                    check_dataset_bytes(connection, unnumbered.bytes, tenant=tenant)
                    upload.publish(connection)
                    _record(connection, Action.DATASET_PUBLISH, name, before, after, tenant=tenant)
                    return _insert(connection, unnumbered, tenant=tenant), True
                if newest.file != corrupt:
                    return newest, False
                upload.publish(connection)
                is_newest = _of(name, newest.version, tenant=tenant)
                connection.execute(sa.update(versions).where(*is_newest).values(file=file))
                _record(connection, Action.DATASET_REPAIR, name, before, after, tenant=tenant)
        self._blobs.set_aside([corrupt])
        return replace(newest, file=file), False

    def get(self, name: str, *, tenant: str) -> DatasetSummary:
        """Return one data set; raise `DatasetNotFound`."""
        with self._database.read() as connection:
            _require(connection, name, tenant=tenant)
            return _summary(connection, name, tenant=tenant)

    def list(self, *, tenant: str, prefix: str = "", after: str = "", limit: int = 100) -> Sequence[DatasetSummary]:
        """Return the data sets whose name begins with `prefix`, in byte order of name, after the name `after`."""
        with self._database.read() as connection:
            names = queries.list_names(connection, datasets, tenant=tenant, prefix=prefix, after=after, limit=limit)
            return [_summary(connection, name, tenant=tenant) for name in names]

    def versions(
        self, name: str, *, tenant: str, before: int | None = None, limit: int = 100
    ) -> Sequence[DatasetEntry]:
        """Return the versions of a data set below `before`, newest first; raise `DatasetNotFound`."""
        is_below = versions.c.version < (MAX_VERSION + 1 if before is None else before)
        statement = _SELECT_ENTRY.where(*_of(name, tenant=tenant), is_below)
        statement = statement.order_by(versions.c.version.desc()).limit(limit)
        with self._database.read() as connection:
            _require(connection, name, tenant=tenant)
            return [DatasetEntry(**row._mapping) for row in connection.execute(statement)]

    def find(self, reference: Reference, *, tenant: str, field: str = "dataset") -> DatasetVersion:
        """Return the version that a reference of a tenant resolves to; a bare name is the newest version.

        Raises `DatasetNotFound`, `VersionNotFound` or `AliasNotFound`, with `field`.
        """
        name = reference.name
        if reference.version is None and reference.alias != LIVE:
            detail = f"a data set has no aliases but {LIVE}, its newest version"
            raise AliasNotFound(detail, field=field, given=str(reference))
        with self._database.read() as connection:
            _require(connection, name, tenant=tenant, field=field)
            version = _newest(connection, name, tenant=tenant, number=reference.version)
            newest = version or _newest(connection, name, tenant=tenant)
        if version is None:
            detail = f"the data set {name!r} has no version {shorten(reference.version)}; its newest is {newest}"
            raise VersionNotFound(detail, field=field, given=reference.version, expected=f"a version of {name!r}")
        return version

    def delete(self, name: str, *, tenant: str, precondition: Precondition | None = None) -> None:
        """Delete a data set with all its versions, but keep its next version number. Raise `DatasetNotFound`."""
        with self._database.write() as connection:
            _require(connection, name, tenant=tenant)
            newest = _newest(connection, name, tenant=tenant)
            digest = newest.digest if newest else None
            if precondition is not None:
                precondition(True, digest)
            are_its = _of(name, tenant=tenant)
            rows = connection.execute(sa.select(versions.c.file, versions.c.bytes).where(*are_its)).all()
            number_of_bytes = sum(row.bytes for row in rows)
            add_to_totals(connection, tenant=tenant, datasets=-1, dataset_bytes=-number_of_bytes)
            connection.execute(sa.delete(versions).where(*are_its))
            is_it = (datasets.c.tenant == tenant, datasets.c.name == name)
            connection.execute(sa.update(datasets).where(*is_it).values(deleted=True))
            _record(connection, Action.DATASET_DELETE, name, digest, None, tenant=tenant)
        files = [row.file for row in rows]
        self._checked.difference_update(files)
        self._blobs.remove(files)

    def local(self, version: DatasetEntry, *, is_read_whole: bool = False) -> Path:
        """Return the path of the stored form of a version, for `adapters.datasets.table.Table.open`.

        Its digest is computed the first time, and each time if the file `is_read_whole`, as for a training. Raises
        `BlobCorrupt` if the file is missing, cut off, or has other bytes.
        """
        digest = version.digest if is_read_whole or version.file not in self._checked else None
        try:
            path = self._blobs.local(version.file, size=version.bytes, digest=digest)
        except BlobCorrupt as error:
            raise BlobCorrupt(f"the data set {version} is damaged: {error.detail}") from error
        self._checked.add(version.file)
        return path

    def _corrupt_newest(self, name: str, digest: str, *, tenant: str) -> str | None:
        """Return the blob of the newest version if the version has this digest but the blob is corrupt."""
        with self._database.read() as connection:
            newest = _newest(connection, name, tenant=tenant)
        if newest is None or newest.digest != digest or self._blobs.has_digest(newest.file, digest):
            return None
        return newest.file


def _of(name: str, number: int | None = None, *, tenant: str) -> list[sa.ColumnElement[bool]]:
    """Return the conditions for the versions of a data set, or for one of them."""
    conditions = [versions.c.tenant == tenant, versions.c.dataset == name]
    return conditions if number is None else [*conditions, versions.c.version == number]


def _insert(connection: Connection, unnumbered: DatasetVersion, *, tenant: str) -> DatasetVersion:
    name, created_at = unnumbered.dataset, unnumbered.created_at
    (number,) = queries.allocate_numbers(connection, [name], created_at, tenant=tenant, table=datasets)
    version = replace(unnumbered, version=number)
    row_values = {name: getattr(version, name) for name in DatasetVersion.__dataclass_fields__}
    row_values |= findings_to_json(version.columns, version.bad_rows)
    connection.execute(sa.insert(versions).values(tenant=tenant, **row_values))
    add_to_totals(connection, tenant=tenant, dataset_bytes=version.bytes)
    return version


def _record(
    connection: Connection, action: Action, name: str, before: str | None, after: str | None, *, tenant: str
) -> None:
    """Add the change of a data set to the audit log."""
    record(connection, [Change(action, f"datasets/{name}", before, after)], tenant=tenant)


def _require(connection: Connection, name: str, *, tenant: str, field: str = "name") -> None:
    if not queries.exists(connection, name, tenant=tenant, table=datasets):
        raise DatasetNotFound(f"there is no data set {name!r}", field=field, given=name)


def _newest(connection: Connection, name: str, *, tenant: str, number: int | None = None) -> DatasetVersion | None:
    """Return the newest version of a data set, or the one with this number; None if there is none."""
    if number is not None and number > MAX_VERSION:
        return None
    statement = sa.select(versions).where(*_of(name, number, tenant=tenant))
    row = connection.execute(statement.order_by(versions.c.version.desc()).limit(1)).one_or_none()
    if row is None:
        return None
    values = {name: row._mapping[name] for name in DatasetVersion.__dataclass_fields__}
    return DatasetVersion(**values | findings_from_json(values))


def _summary(connection: Connection, name: str, *, tenant: str) -> DatasetSummary:
    created = sa.select(datasets.c.created_at).where(datasets.c.tenant == tenant, datasets.c.name == name)
    are_its = _of(name, tenant=tenant)
    counted = sa.select(sa.func.count()).where(*are_its)
    newest = _SELECT_ENTRY.where(*are_its).order_by(versions.c.version.desc()).limit(1)
    return DatasetSummary(
        name=name,
        created_at=connection.scalars(created).one(),
        newest=DatasetEntry(**connection.execute(newest).one()._mapping),
        versions=connection.scalars(counted).one(),
    )
