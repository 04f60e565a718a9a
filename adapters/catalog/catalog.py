"""Names, versions, aliases and the revision: what is published, and how it becomes so.

Here are the whole transactions; the statements that they are made of are in `queries`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from itertools import accumulate, compress
from pathlib import Path
from typing import NamedTuple, TypeAlias

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.catalog import queries
from adapters.catalog.versions import AdapterSummary, Publication, Published, Version
from adapters.clock import rfc3339
from adapters.errors import BlobCorrupt, CatalogBusy, LoraplexError
from adapters.lora.adapter import delta_norms, digest_of
from adapters.names import LIVE, MAX_VERSION, Reference
from adapters.storage import schema as tables
from adapters.storage.blobs import FolderBlobs
from adapters.storage.database import CatalogWatch, SqliteDatabase
from adapters.storage.quarantine import DEFAULT_DAYS, Quarantine
from adapters.storage.schema import DEFAULT_TENANT as TENANT
from adapters.storage.store_identity import check_store, complete_store

Precondition: TypeAlias = Callable[[bool, str | None], None]
"""Told whether the name exists and the digest of its live version; raises `PreconditionFailed`."""
Admit: TypeAlias = Callable[[Connection, Sequence[Publication]], Sequence[bool]]
"""Says, in the transaction of a publish, which of them may become versions; what it raises undoes the publish."""
Record: TypeAlias = Callable[[Connection, Sequence[Published]], None]
"""More to do in that transaction, told what has become a version; what it raises undoes the publish."""


class _Made(NamedTuple):
    """A publication, and its version as far as it is known before the transaction."""

    publication: Publication
    version: Version


class Catalog:
    """The adapters in one data folder. Safe to use from any thread and from several processes.

    Opening it raises `CatalogNotLoadable`, and changes nothing, if the catalogue and the blobs do not belong together.
    """

    def __init__(self, folder: Path, *, now: Callable[[], float], quarantine_days: float = DEFAULT_DAYS) -> None:
        check_store(folder)
        self.quarantine = Quarantine(folder, now=now, days=quarantine_days)
        self.database = SqliteDatabase(folder, make_room=self.quarantine.empty)
        self.blobs = FolderBlobs(folder, revision=self._revision_at_hand, quarantine=self.quarantine)
        self._now = now
        complete_store(folder)
        self._last_revision = self.revision()

    def publish(
        self, publications: Sequence[Publication], *, admit: Admit | None = None, record: Record | None = None
    ) -> list[Published]:
        """Make each publication a version: all that `admit` lets pass, or none. What is returned is durable.

        One blob (and one for each `statistics`), one transaction. A crash at any point leaves the old state or the
        new one, and at most blobs that nobody refers to.
        """
        if not publications:
            return []
        with self._stored(publications) as made:
            with self.database.write() as connection:
                kept = made if admit is None else list(compress(made, admit(connection, publications)))
                published = _insert(connection, kept)
                if record is not None:
                    record(connection, published)
            self.blobs.remove(_files(made) - _files(kept))
        return published

    def put(self, publication: Publication, *, precondition: Precondition | None = None) -> tuple[Version, bool]:
        """Publish one adapter unless live has its bytes already; returns its version and whether it is new.

        If the stored copy of those bytes is missing or corrupt, live gets the new copy, and stays the same version.
        Raises what `precondition` raises, and then nothing has changed.
        """
        name, digest = publication.name, publication.adapter.digest
        with self._stored([publication]) as made:
            ((_, unnumbered),) = made
            corrupt = self._corrupt_live(name, digest)
            with self.database.write() as connection:
                live = queries.find_live(connection, name)
                if precondition is not None:
                    precondition(queries.exists(connection, name), live.digest if live else None)
                same = live is not None and (live.digest, live.base) == (digest, unnumbered.base)
                if live is None or not same:
                    return _insert(connection, made)[0].version, True
                if live == corrupt:
                    repaired = replace(live, file=unnumbered.file, offset=unnumbered.offset)
                    unused = queries.relocate_version(connection, live, repaired)
                    # Workers remember where the bytes of a version are.
                    queries.increment_revision(connection)
            if live == corrupt:
                self.blobs.set_aside(unused)
                return repaired, False
            self.blobs.remove(_files(made))
            return live, False

    def delete(self, name: str, *, precondition: Precondition | None = None) -> None:
        """Remove the adapter with all its versions; its next number stays. Raises `AdapterNotFound`."""
        with self.database.write() as connection:
            _check(connection, name, precondition)
            unused = queries.delete_adapter(connection, name)
            queries.increment_revision(connection)
        self.blobs.remove(unused)

    def set_live(self, name: str, number: int, *, precondition: Precondition | None = None) -> AdapterSummary:
        """Roll back or forward; raises `AdapterNotFound` or `VersionNotFound`."""
        with self.database.write() as connection:
            _check(connection, name, precondition)
            queries.get_version(connection, name, number)
            queries.set_alias(connection, LIVE, {name: number})
            queries.increment_revision(connection)
            return queries.summaries(connection, [name])[0]

    def find(self, reference: Reference) -> Version:
        """The version that a reference means now; raises a `NotFound` that says what there is instead."""
        with self.database.read() as connection:
            return queries.find(connection, reference)

    def find_all(self, references: Collection[Reference]) -> dict[Reference, Version]:
        """The versions that references mean now, of those that mean one: what answering needs to know of them."""
        with self.database.read() as connection:
            return queries.find_all(connection, references)

    def revision(self) -> int:
        """A number that every publish, delete and roll back raises, and nothing else does."""
        with self.database.read() as connection:
            return int(connection.scalars(sa.select(tables.catalog.c.revision)).one())

    def _revision_at_hand(self) -> int:
        """The revision; if the catalogue is locked this moment, the last one seen: writing a blob does not wait."""
        with closing(CatalogWatch(self.database.path)) as watch, suppress(CatalogBusy):
            self._last_revision = watch.revision()
        return self._last_revision

    def adapter(self, name: str) -> AdapterSummary:
        """One adapter; raises `AdapterNotFound`."""
        with self.database.read() as connection:
            queries.require(connection, name)
            return queries.summaries(connection, [name])[0]

    def adapters(self, *, prefix: str = "", after: str = "", limit: int = 100) -> list[AdapterSummary]:
        """Adapters whose name begins with `prefix`, in byte order of name, from past `after` on."""
        columns = tables.adapters.c
        statement = (
            sa.select(columns.name)
            .where(columns.tenant == TENANT, columns.deleted.is_(False))
            .where(*queries.name_range(columns.name, prefix=prefix, after=after))
            .order_by(columns.name)
            .limit(limit)
        )
        with self.database.read() as connection:
            return queries.summaries(connection, connection.scalars(statement).all())

    def versions(self, name: str, *, before: int | None = None, limit: int = 100) -> list[Version]:
        """An adapter's versions, newest first, those below `before`; raises `AdapterNotFound`."""
        columns = tables.versions.c
        bound = MAX_VERSION + 1 if before is None else before
        statement = (
            sa.select(tables.versions)
            .where(columns.tenant == TENANT, columns.adapter == name, columns.version < bound)
            .order_by(columns.version.desc())
            .limit(limit)
        )
        with self.database.read() as connection:
            queries.require(connection, name)
            return [queries.version_from_row(row) for row in connection.execute(statement)]

    def version_numbers(self, name: str) -> list[int]:
        """All versions that an adapter has, oldest first; raises `AdapterNotFound`."""
        columns = tables.versions.c
        statement = (
            sa.select(columns.version)
            .where(columns.tenant == TENANT, columns.adapter == name)
            .order_by(columns.version)
        )
        with self.database.read() as connection:
            queries.require(connection, name)
            return list(connection.scalars(statement))

    def sweep(self) -> int:
        """Move the files that no row refers to into quarantine, unless a publish is under way; return their number."""
        with self.blobs.sweeping() as alone:
            if not alone:
                return 0
            data_file, statistics = tables.jobs.c.data_file, tables.versions.c.statistics
            with self.database.read() as connection:
                files = set(connection.scalars(sa.select(tables.versions.c.file).distinct()))
                files.update(connection.scalars(sa.select(tables.dataset_versions.c.file)))
                files.update(connection.scalars(sa.select(statistics).where(statistics.is_not(None))))
                files.update(connection.scalars(sa.select(data_file).where(data_file.is_not(None))))
            return self.blobs.sweep(files)

    def _corrupt_live(self, name: str, digest: str) -> Version | None:
        """The live version of a name if it has this digest and its stored bytes do not."""
        with self.database.read() as connection:
            live = queries.find_live(connection, name)
        if live is None or live.digest != digest:
            return None
        try:
            content = self.blobs.read(live.file, offset=live.offset, length=live.bytes)
        except BlobCorrupt:
            return live
        return None if digest_of(content) == digest else live

    @contextmanager
    def _stored(self, publications: Sequence[Publication]) -> Iterator[list[_Made]]:
        """Write the blobs; yields the versions with them, which get their numbers in the transaction."""
        contents = [publication.adapter.canonical_bytes for publication in publications]
        norms = delta_norms([publication.adapter for publication in publications])
        written: list[str] = []
        with self.blobs.publishing():
            try:
                written.append(self.blobs.write(lambda file: file.writelines(contents)))
                sums = []
                for publication in publications:
                    if publication.statistics is not None:
                        written.append(self.blobs.write(publication.statistics))
                    sums.append(None if publication.statistics is None else written[-1])
                about = {"created_at": rfc3339(self._now()), "file": written[0]}
                offsets = accumulate(map(len, contents), initial=0)
                yield [
                    _Made(made, _describe(made, norm=norm, offset=offset, statistics=statistics, **about))
                    for made, norm, offset, statistics in zip(publications, norms, offsets, sums, strict=False)
                ]
            except LoraplexError as error:
                # If it is not refused for certain, or after any other error, the sweep decides.
                if not error.outcome_unknown:
                    self.blobs.remove(written)
                raise


def _insert(connection: Connection, made: Sequence[_Made]) -> list[Published]:
    """Give versions their numbers, store their rows and move live, and the revision once."""
    if not made:
        return []
    names = [publication.name for publication, _ in made]
    numbers = queries.allocate_numbers(connection, names, made[0].version.created_at)
    live = queries.alias_targets(connection, dict.fromkeys(names), LIVE)
    moved, published = {}, []
    for (publication, unnumbered), number in zip(made, numbers, strict=True):
        name, before = publication.name, live.get(publication.name)
        moves = publication.moves_live and (not publication.checks_live or before == publication.expected_live)
        if moves:
            live[name] = moved[name] = number
        published.append(
            Published(
                position=publication.position,
                version=replace(unnumbered, version=number),
                moved_live=moves,
                replaced=before if moves else None,
            )
        )
    queries.insert_versions(connection, [one.version for one in published])
    queries.set_alias(connection, LIVE, moved)
    queries.increment_revision(connection)
    return published


def _files(made: Sequence[_Made]) -> set[str]:
    files = {version.file for _, version in made}
    return files.union(version.statistics for _, version in made if version.statistics is not None)


def _check(connection: Connection, name: str, precondition: Precondition | None) -> None:
    queries.require(connection, name)
    if precondition is not None:
        live = queries.find_live(connection, name)
        precondition(True, live.digest if live else None)


def _describe(
    made: Publication, *, norm: float, created_at: str, file: str, offset: int, statistics: str | None
) -> Version:
    return Version(
        adapter=made.name,
        version=0,
        digest=made.adapter.digest,
        rank=made.adapter.rank,
        alpha=made.adapter.alpha,
        rslora=made.adapter.rslora,
        base=made.base.fingerprint,
        feature_space=made.adapter.feature_space,
        created_at=created_at,
        source=made.source,
        job=made.job,
        module=made.module,
        metrics=made.metrics,
        relative_norm=None if made.base.weight_norm == 0 else norm / made.base.weight_norm,
        file=file,
        offset=offset,
        bytes=len(made.adapter.canonical_bytes),
        lineage=made.lineage,
        statistics=statistics,
        labels=None if made.adapter.labels is None else list(made.adapter.labels),
    )
