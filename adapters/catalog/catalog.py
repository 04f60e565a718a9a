"""Names, versions, aliases and the revision: the transactions that publish, delete, point and find adapters.

The statements that they consist of are in `queries`. `Resolver` caches, for serving, what references mean, for as long
as the catalogue does not change.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, compress
from pathlib import Path
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.catalog import queries
from adapters.catalog.versions import AdapterSummary, Publication, Published, Version
from adapters.clock import rfc3339
from adapters.lora.adapter import delta_norms
from adapters.names import LIVE, MAX_VERSION, Reference
from adapters.storage.blob_writer import BlobWriter, Upload
from adapters.storage.blobs import DEFAULT_DAYS, FolderBlobs, Quarantine
from adapters.storage.database import SqliteDatabase
from adapters.storage.schema import TENANT, adapters, catalog, versions
from adapters.storage.store_identity import check_store, complete_store

# Takes whether the name exists and the digest of its live version; raises `PreconditionFailed`.
Precondition: TypeAlias = Callable[[bool, str | None], None]
# Returns, in the transaction of a publish, which publications may become versions. An error undoes the publish.
Admit: TypeAlias = Callable[[Connection, Sequence[Publication]], Sequence[bool]]
# Stores more in the transaction of a publish, given the new versions. An error undoes the publish.
Record: TypeAlias = Callable[[Connection, Sequence[Published]], None]
# A publication, and its version without its number, which is given in the transaction.
_Draft: TypeAlias = tuple[Publication, Version]


class Catalog:
    """The adapters in one data folder. Safe to use from any thread and from several processes.

    Opening it raises `CatalogNotLoadable`, and changes nothing, if the catalogue and the blobs do not belong together.
    """

    def __init__(self, folder: Path, *, now: Callable[[], float], quarantine_days: float = DEFAULT_DAYS) -> None:
        check_store(folder)
        self.folder = folder
        self.quarantine = Quarantine(folder, now=now, days=quarantine_days)
        self.database = SqliteDatabase(folder, make_room=self.quarantine.empty)
        self.blobs = FolderBlobs(folder, quarantine=self.quarantine)
        self.blobs.create_folder()
        self.writer = BlobWriter(self.database, self.blobs, folder)
        self._now = now
        complete_store(folder)

    def close(self) -> None:
        """Close the connections to the database and end the writing of blobs."""
        self.writer.close()
        self.database.close()

    def publish(
        self, publications: Sequence[Publication], *, admit: Admit | None = None, record: Record | None = None
    ) -> list[Published]:
        """Make each publication that `admit` lets pass a version, or none if there is an error. The result is durable.

        Writes one blob, one more for each `statistics`, and one transaction. A crash at any point leaves the old state
        or the new one, and at most blobs that no row refers to.
        """
        if not publications:
            return []
        with self._drafts(publications) as (drafts, upload), self.database.write() as connection:
            admitted = drafts if admit is None else list(compress(drafts, admit(connection, publications)))
            published = _insert(connection, admitted)
            if record is not None:
                record(connection, published)
            upload.publish(connection, _files(admitted))
        return published

    def put(self, publication: Publication, *, precondition: Precondition | None = None) -> tuple[Version, bool]:
        """Publish one adapter unless live has its bytes already; return its version and whether it is new.

        If the stored copy of those bytes is missing or corrupt, live gets the new copy and stays the same version.
        Raises what `precondition` raises, and then nothing has changed.
        """
        name, digest = publication.name, publication.adapter.digest
        with self._drafts([publication]) as (drafts, upload):
            ((_, draft),) = drafts
            # Read before the write lock is taken: a slow disk must not hold up other writers.
            corrupt = self._corrupt_live(name, digest)
            with self.database.write() as connection:
                live = queries.find_live(connection, name)
                if precondition is not None:
                    precondition(queries.exists(connection, name), live.digest if live else None)
                if live is None or (live.digest, live.base) != (digest, draft.base):
                    upload.publish(connection)
                    return _insert(connection, drafts)[0].version, True
                if live != corrupt:
                    return live, False
                repaired = replace(live, file=draft.file, offset=draft.offset)
                upload.publish(connection, [draft.file])
                unused = queries.relocate_version(connection, live, repaired)
                # Workers cache where the bytes of a version are.
                queries.increment_revision(connection)
        self.blobs.set_aside(unused)
        return repaired, False

    def delete(self, name: str, *, precondition: Precondition | None = None) -> None:
        """Remove the adapter with all its versions; its next number stays. Raises `AdapterNotFound`."""
        with self.database.write() as connection:
            _check(connection, name, precondition)
            unused = queries.delete_adapter(connection, name)
            queries.increment_revision(connection)
        # After the commit: a crash in between leaves files without rows, never rows without files.
        self.blobs.remove(unused)

    def set_live(self, name: str, number: int, *, precondition: Precondition | None = None) -> AdapterSummary:
        """Point live at a version; raise `AdapterNotFound` or `VersionNotFound`."""
        with self.database.write() as connection:
            _check(connection, name, precondition)
            queries.get_version(connection, name, number)
            queries.set_alias(connection, LIVE, {name: number})
            queries.increment_revision(connection)
            return queries.summaries(connection, [name])[0]

    def find(self, reference: Reference) -> Version:
        """Return the version that a reference means now; raise a `NotFound` that lists what exists instead."""
        with self.database.read() as connection:
            return queries.find(connection, reference)

    def find_all(self, references: Collection[Reference]) -> dict[Reference, Version]:
        """Return the versions that references mean now, without metrics and lineage; others are absent."""
        with self.database.read() as connection:
            return queries.find_all(connection, references)

    def live_versions(
        self, names: Collection[str], *, instead: Mapping[str, int | None] | None = None
    ) -> dict[str, tuple[Version, bytes | None]]:
        """Return the live version of each of these names, with its evidence; names without one are absent.

        instead: numbers of versions to return in place of live, by name; None for none.
        """
        with self.database.read() as connection:
            numbers = queries.alias_targets(connection, names, LIVE) | dict(instead or {})
            keys = [(name, number) for name, number in numbers.items() if number is not None]
            return {entry[0].adapter: entry for entry in queries.versions_at(connection, keys)}

    def revision(self) -> int:
        """Return the number that every publish, delete and roll back raises, and nothing else does."""
        with self.database.read() as connection:
            return int(connection.scalars(sa.select(catalog.c.revision)).one())

    def is_readable(self) -> bool:
        """Return whether the revision can be read; raise what `SqliteDatabase.read` raises."""
        try:
            self.revision()
        except (sa.exc.SQLAlchemyError, OSError):
            return False
        return True

    def adapter(self, name: str) -> AdapterSummary:
        """Return one adapter; raise `AdapterNotFound`."""
        with self.database.read() as connection:
            queries.require(connection, name)
            return queries.summaries(connection, [name])[0]

    def adapters(self, *, prefix: str = "", after: str = "", limit: int = 100) -> list[AdapterSummary]:
        """Return the adapters whose names begin with `prefix` and follow `after`, in byte order of name."""
        with self.database.read() as connection:
            names = queries.list_names(connection, adapters, prefix=prefix, after=after, limit=limit)
            return queries.summaries(connection, names)

    def versions(self, name: str, *, before: int | None = None, limit: int = 100) -> list[Version]:
        """Return an adapter's versions below `before`, newest first; raise `AdapterNotFound`."""
        below = MAX_VERSION + 1 if before is None else before
        with self.database.read() as connection:
            queries.require(connection, name)
            return queries.list_versions(connection, name, below=below, limit=limit)

    def version_numbers(self, name: str) -> list[int]:
        """Return the numbers of all versions of an adapter, oldest first; raise `AdapterNotFound`."""
        statement = sa.select(versions.c.version).where(versions.c.tenant == TENANT, versions.c.adapter == name)
        statement = statement.order_by(versions.c.version)
        with self.database.read() as connection:
            queries.require(connection, name)
            return list(connection.scalars(statement))

    def sweep(self) -> int:
        """Move the files that no row refers to, and that nobody is writing, into quarantine; return their number."""
        return self.writer.sweep()

    def _corrupt_live(self, name: str, digest: str) -> Version | None:
        """Return the live version of a name if it has this digest and its stored bytes do not."""
        with self.database.read() as connection:
            live = queries.find_live(connection, name)
        if live is None or live.digest != digest:
            return None
        is_intact = self.blobs.has_digest(live.file, digest, offset=live.offset, length=live.bytes)
        return None if is_intact else live

    @contextmanager
    def _drafts(self, publications: Sequence[Publication]) -> Iterator[tuple[list[_Draft], Upload]]:
        """Write the blobs of publications, and hold them until their transaction has ended."""
        contents = [publication.adapter.canonical_bytes for publication in publications]
        norms = delta_norms([publication.adapter for publication in publications])
        with self.writer.upload() as upload:
            # One file for all: a fleet of thousands would otherwise cost thousands of syncs.
            file = upload.write(lambda blob: blob.writelines(contents))
            created_at, drafts = rfc3339(self._now()), []
            offsets = accumulate(map(len, contents), initial=0)
            for publication, norm, offset in zip(publications, norms, offsets, strict=False):
                statistics = None if publication.statistics is None else upload.write(publication.statistics)
                location = {"file": file, "offset": offset, "statistics": statistics}
                version = _describe(publication, norm=norm, created_at=created_at, **location)
                drafts.append((publication, version))
            yield drafts, upload


def _insert(connection: Connection, drafts: Sequence[_Draft]) -> list[Published]:
    """Give versions their numbers, store their rows, move live, and increment the revision once."""
    if not drafts:
        return []
    names = [publication.name for publication, _ in drafts]
    numbers = queries.allocate_numbers(connection, names, drafts[0][1].created_at)
    live = queries.alias_targets(connection, dict.fromkeys(names), LIVE)
    moved, published = {}, []
    for (publication, draft), number in zip(drafts, numbers, strict=True):
        name, before = publication.name, live.get(publication.name)
        # If live has moved since the adapter was compared with it, the comparison no longer holds.
        moves = publication.moves_live and (not publication.checks_live or before == publication.expected_live)
        if moves:
            live[name] = moved[name] = number
        version, replaced = replace(draft, version=number), before if moves else None
        position = publication.position
        published.append(Published(position=position, version=version, moved_live=moves, replaced=replaced))
    evidence = (publication.evidence for publication, _ in drafts)
    queries.insert_versions(connection, zip((item.version for item in published), evidence, strict=True))
    queries.set_alias(connection, LIVE, moved)
    queries.increment_revision(connection)
    return published


def _files(drafts: Sequence[_Draft]) -> set[str]:
    files = {version.file for _, version in drafts}
    return files.union(version.statistics for _, version in drafts if version.statistics is not None)


def _check(connection: Connection, name: str, precondition: Precondition | None) -> None:
    queries.require(connection, name)
    if precondition is not None:
        live = queries.find_live(connection, name)
        precondition(True, live.digest if live else None)


def _describe(publication: Publication, *, norm: float, created_at: str, **location: Any) -> Version:
    """Return a publication's version without its number. location: `file`, `offset` and `statistics`."""
    adapter, base, loss = publication.adapter, publication.base, (publication.lineage or {}).get("loss")
    return Version(
        adapter=publication.name,
        version=0,
        **{name: getattr(adapter, name) for name in ("digest", "rank", "alpha", "rslora", "feature_space")},
        base=base.fingerprint,
        created_at=created_at,
        **{name: getattr(publication, name) for name in ("source", "job", "module", "metrics", "lineage")},
        relative_norm=None if base.weight_norm == 0 else norm / base.weight_norm,
        bytes=len(adapter.canonical_bytes),
        loss=None if loss is None else str(loss),
        labels=None if adapter.labels is None else list(adapter.labels),
        **location,
    )


# References. Above this number a snapshot stops caching, so that a client cannot fill memory with names.
_MAX_CACHED = 100_000


class Snapshot:
    """The versions that references mean, read at one revision of the catalogue or later."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._versions: dict[Reference, Version] = {}

    def cached(self, reference: Reference) -> Version | None:
        """Return the version that a reference means if it was read before; None otherwise."""
        return self._versions.get(reference)

    def versions(self, references: Sequence[Reference]) -> Iterator[tuple[Reference, Version | Exception]]:
        """Yield each reference with the version that it means, or with the error that `Catalog.find` raises."""
        uncached = [reference for reference in references if reference not in self._versions]
        versions = self._catalog.find_all(uncached) if uncached else {}
        # References that mean nothing are not cached: a client could send any number of them.
        if len(self._versions) < _MAX_CACHED:
            self._versions |= versions
        for reference in references:
            version = self._versions.get(reference) or versions.get(reference)
            try:
                yield reference, version or self._catalog.find(reference)
            except Exception as error:
                yield reference, error


class Resolver:
    """Provides snapshots that are never older than the last commit of any process on this machine."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._watch = catalog.database.catalog_watch()
        self._revision = -1
        self._snapshot = Snapshot(catalog)

    def close(self) -> None:
        """Close the connection that watches the catalogue."""
        self._watch.close()

    def fresh(self) -> Snapshot:
        """Return a snapshot that caches nothing from before this call."""
        return Snapshot(self._catalog)

    def current(self) -> Snapshot:
        """Return a snapshot that includes every change acknowledged before this call.

        Raises `CatalogBusy` if a commit is under way at this moment: try again in a millisecond.
        """
        revision = self._watch.revision()
        if revision != self._revision:
            # A new snapshot, not a cleared one: a thread that read a row before the commit still holds the old one,
            # and caches the old row there.
            self._snapshot, self._revision = Snapshot(self._catalog), revision
        return self._snapshot
