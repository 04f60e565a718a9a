"""Names, versions, aliases and the revision: the transactions that publish, delete, point and find adapters.

The statements that they consist of are in `queries`. `resolver` caches, for serving, what references mean.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate, compress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.access import audit
from adapters.access.audit import Action, Change
from adapters.access.quotas import AdapterQuota
from adapters.catalog import queries, trash
from adapters.catalog.versions import AdapterSummary, Publication, Published, Version
from adapters.clock import rfc3339
from adapters.errors import StorageFailed, StorageFull
from adapters.lora.adapter import delta_norms
from adapters.names import LIVE, MAX_VERSION, Reference
from adapters.storage.blob_location import BlobLocation
from adapters.storage.database import Database
from adapters.storage.pending_blobs import BlobWriter, Upload
from adapters.storage.quarantine import DEFAULT_DAYS, SECONDS_A_DAY, Quarantine
from adapters.storage.schema import adapters, batched, catalog, versions
from adapters.storage.sqlite_database import SqliteDatabase
from adapters.storage.store_identity import check_store, complete_store

# Takes whether the name exists and the digest of its live version; raises `PreconditionFailed`.
Precondition: TypeAlias = Callable[[bool, str | None], None]
# Returns, in the transaction of a publish, which publications may become versions. An error undoes the publish.
Admit: TypeAlias = Callable[[Connection, Sequence[Publication]], Sequence[bool]]
# Stores more in the transaction of a publish, given the new versions. An error undoes the publish.
Record: TypeAlias = Callable[[Connection, Sequence[Published]], None]
# Adapters in one blob. With one each, a fleet of thousands would cost thousands of syncs. With more, much would stay
# when adapters are deleted: a blob stays until all of its adapters are gone.
PACK_ADAPTERS = 64
# A publication, and its version without its number, which is given in the transaction.
_Draft: TypeAlias = tuple[Publication, Version]


class Catalog:
    """The adapters of all tenants in one data folder. Safe to use from any thread and from several processes.

    Opening it raises `CatalogNotLoadable`, and changes nothing, if the catalogue and the blobs do not belong together.
    """

    def __init__(
        self,
        folder: Path,
        *,
        now: Callable[[], float],
        blobs: BlobLocation | None = None,
        trash_days: float = DEFAULT_DAYS,
        database: Database | None = None,
    ) -> None:
        """Open the catalogue in a database; by default, in the one of the folder, which is created if it is missing.

        `blobs` are in the folder by default.
        """
        location = blobs or BlobLocation(folder=folder)
        self.blobs = location.open(now=now)
        # A bucket that does not answer is no reason to stop: what is cached can be served.
        with suppress(StorageFailed):
            check_store(folder, database, blobs=self.blobs)
        self.folder = folder
        self.quarantine = Quarantine(folder, now=now, days=location.quarantine_days)
        self.database: Database = database or SqliteDatabase(folder, make_room=self.quarantine.empty)
        self.blobs.create_folder()
        self.writer = BlobWriter(self.database, self.blobs, folder)
        self._now = now
        self._opened_at = now()
        self._trash_seconds = trash_days * SECONDS_A_DAY
        with suppress(StorageFailed):
            complete_store(folder, database, blobs=self.blobs)

    def close(self) -> None:
        """Close the connections to the database and end the writing of blobs."""
        self.writer.close()
        self.database.close()

    def publish(
        self,
        publications: Sequence[Publication],
        *,
        tenant: str,
        admit: Admit | None = None,
        record: Record | None = None,
    ) -> list[Published]:
        """Make each publication that `admit` lets pass a version, or none if there is an error. The result is durable.

        Writes packs of adapters, one blob for each `statistics`, and one transaction. A crash at any point leaves the
        old state or the new one, and at most blobs that no row refers to. Raises `QuotaExceeded` if they exceed a limit
        of the tenant; `admit` can leave some of them out before.
        """
        if not publications:
            return []
        with self._drafts(publications) as (drafts, upload), self.database.write() as connection:
            admitted = drafts if admit is None else list(compress(drafts, admit(connection, publications)))
            _check_quota(connection, admitted, tenant=tenant)
            published = _insert(connection, admitted, tenant=tenant)
            if record is not None:
                record(connection, published)
            upload.publish(connection, _files(admitted))
        return published

    def put(
        self, publication: Publication, *, tenant: str, precondition: Precondition | None = None
    ) -> tuple[Version, bool]:
        """Publish one adapter unless live has its bytes already; return its version and whether it is new.

        If the stored copy of those bytes is missing or corrupt, live gets the new copy and stays the same version.
        Raises `QuotaExceeded` and what `precondition` raises, and then nothing has changed.
        """
        name, digest = publication.name, publication.adapter.digest
        with self._drafts([publication]) as (drafts, upload):
            ((_, draft),) = drafts
            # Read before the write lock is taken: a slow disk must not hold up other writers.
            corrupt = self._corrupt_live(name, digest, tenant=tenant)
            with self.database.write() as connection:
                live = queries.find_live(connection, name, tenant=tenant)
                _check_condition(connection, name, precondition, tenant=tenant)
                if live is None or (live.digest, live.base) != (digest, draft.base):
                    _check_quota(connection, drafts, tenant=tenant)
                    upload.publish(connection)
                    return _insert(connection, drafts, tenant=tenant)[0].version, True
                if live != corrupt:
                    return live, False
                repaired = replace(live, file=draft.file, offset=draft.offset)
                upload.publish(connection, [draft.file])
                unused = queries.relocate_version(connection, live, repaired, tenant=tenant)
                _record(connection, Action.ADAPTER_REPAIR, name, before=digest, after=digest, tenant=tenant)
                # Workers cache where the bytes of a version are.
                queries.increment_revision(connection, [name], tenant=tenant)
        self.blobs.set_aside(unused)
        return repaired, False

    def delete(self, name: str, *, tenant: str, purge: bool = False, precondition: Precondition | None = None) -> None:
        """Move the adapter with all its versions to the trash; its next number stays. Raises `AdapterNotFound`.

        Kept statistics are removed. With `purge`, nothing of the name remains in the trash either; it may then name an
        adapter that was deleted before.
        """
        try:
            with self.database.write() as connection:
                unused = self._delete(connection, name, tenant=tenant, purge=purge, precondition=precondition)
        except StorageFull as error:
            raise error.explain(after="" if purge else "; with ?purge=true, a deletion needs no space") from None
        # After the commit: a crash in between leaves files without rows, never rows without files.
        self.blobs.remove(unused)

    def restore(self, name: str, *, tenant: str) -> AdapterSummary:
        """Bring back a deleted adapter with the versions and aliases that the trash has of it.

        Raises `NameTaken`, `AdapterNotFound` and `QuotaExceeded`.
        """
        with self.database.write() as connection:
            quota = AdapterQuota(connection, [name], tenant=tenant)
            trash.restore(connection, name, tenant=tenant)
            quota.take(name, 0)
            queries.increment_revision(connection, [name], tenant=tenant)
            restored = queries.summaries(connection, [name], tenant=tenant)[0]
            after = restored.live.digest if restored.live else None
            _record(connection, Action.ADAPTER_RESTORE, name, after=after, tenant=tenant)
            return restored

    def purge_trash(self) -> int:
        """Delete from the trash what has been in it for its days; return the bytes of the removed blobs."""
        until, removed = rfc3339(self._now() - self._trash_seconds), 0
        with self.database.read() as connection:
            has_more = trash.has_deleted_until(connection, until)
        while has_more:
            with self.database.write() as connection:
                unused, has_more = trash.purge_deleted_until(connection, until)
            removed += self.blobs.remove(unused)
        return removed

    def set_live(
        self, name: str, number: int, *, tenant: str, precondition: Precondition | None = None
    ) -> AdapterSummary:
        """Point live at a version; raise `AdapterNotFound` or `VersionNotFound`."""
        with self.database.write() as connection:
            queries.require(connection, name, tenant=tenant)
            _check_condition(connection, name, precondition, tenant=tenant)
            before = _live_digest(connection, name, tenant=tenant)
            version = queries.get_version(connection, name, number, tenant=tenant)
            queries.set_alias(connection, LIVE, {name: number}, tenant=tenant)
            queries.increment_revision(connection, [name], tenant=tenant)
            _record(connection, Action.ADAPTER_LIVE, name, before=before, after=version.digest, tenant=tenant)
            return queries.summaries(connection, [name], tenant=tenant)[0]

    def find(self, reference: Reference, *, tenant: str) -> Version:
        """Return the version that a reference means now; raise a `NotFound` that lists what exists instead."""
        with self.database.read() as connection:
            return queries.find(connection, reference, tenant=tenant)

    def find_all(self, references: Collection[Reference], *, tenant: str) -> dict[Reference, Version]:
        """Return the versions that references mean now, without metrics and lineage; others are absent."""
        with self.database.read() as connection:
            return queries.find_all(connection, references, tenant=tenant)

    def live_versions(
        self, names: Collection[str], *, tenant: str, instead: Mapping[str, int | None] | None = None
    ) -> dict[str, tuple[Version, bytes | None]]:
        """Return the live version of each of these names, with its evidence; names without one are absent.

        instead: numbers of versions to return in place of live, by name; None for none.
        """
        replaced, found = instead or {}, dict[str, tuple[Version, bytes | None]]()
        # A read of a whole fleet would keep every writer waiting.
        for part in batched(names):
            with self.database.read() as connection:
                numbers: dict[str, int | None] = {**queries.alias_targets(connection, part, LIVE, tenant=tenant)}
                numbers |= {name: replaced[name] for name in part if name in replaced}
                keys = [(name, number) for name, number in numbers.items() if number is not None]
                found |= {entry[0].adapter: entry for entry in queries.versions_at(connection, keys, tenant=tenant)}
        return found

    def revision(self) -> int:
        """Return the number that every publish, delete and roll back raises, and nothing else does."""
        with self.database.read() as connection:
            return int(connection.scalars(sa.select(catalog.c.revision)).one())

    def is_readable(self) -> bool:
        """Return whether the revision can be read; raise what `Database.read` raises."""
        try:
            self.revision()
        except (sa.exc.SQLAlchemyError, OSError):
            return False
        return True

    def adapter(self, name: str, *, tenant: str) -> AdapterSummary:
        """Return one adapter; raise `AdapterNotFound`."""
        with self.database.read() as connection:
            queries.require(connection, name, tenant=tenant)
            return queries.summaries(connection, [name], tenant=tenant)[0]

    def adapters(self, *, tenant: str, prefix: str = "", after: str = "", limit: int = 100) -> list[AdapterSummary]:
        """Return the adapters whose names begin with `prefix` and follow `after`, in byte order of name."""
        with self.database.read() as connection:
            names = queries.list_names(connection, adapters, tenant=tenant, prefix=prefix, after=after, limit=limit)
            return queries.summaries(connection, names, tenant=tenant)

    def versions(self, name: str, *, tenant: str, before: int | None = None, limit: int = 100) -> list[Version]:
        """Return an adapter's versions below `before`, newest first; raise `AdapterNotFound`."""
        below = MAX_VERSION + 1 if before is None else before
        with self.database.read() as connection:
            queries.require(connection, name, tenant=tenant)
            return queries.list_versions(connection, name, tenant=tenant, below=below, limit=limit)

    def version_numbers(self, name: str, *, tenant: str) -> list[int]:
        """Return the numbers of all versions of an adapter, oldest first; raise `AdapterNotFound`."""
        statement = sa.select(versions.c.version).where(versions.c.tenant == tenant, versions.c.adapter == name)
        statement = statement.order_by(versions.c.version)
        with self.database.read() as connection:
            queries.require(connection, name, tenant=tenant)
            return list(connection.scalars(statement))

    def sweep(self) -> int:
        """Move the files that no row refers to, and that nobody is writing, into quarantine; return their number."""
        return self.writer.sweep()

    def sweep_once(self) -> int:
        """Do the same, unless another process has begun to since this catalogue was opened."""
        return self.writer.sweep_since(self._opened_at, now=self._now)

    def _delete(
        self, connection: Connection, name: str, *, tenant: str, purge: bool, precondition: Precondition | None
    ) -> set[str]:
        """Delete an adapter's rows, or move them to the trash; return the blobs that are no longer needed."""
        if not (purge and trash.holds(connection, name, tenant=tenant)):
            queries.require(connection, name, tenant=tenant)
        _check_condition(connection, name, precondition, tenant=tenant)
        before = _live_digest(connection, name, tenant=tenant)
        unused: set[str] = set()
        if queries.exists(connection, name, tenant=tenant):
            if not purge and self._trash_seconds > 0:
                trash.add(connection, name, rfc3339(self._now()), tenant=tenant)
            unused = queries.delete_adapter(connection, name, tenant=tenant)
            queries.increment_revision(connection, [name], tenant=tenant)
        if purge:
            unused |= trash.purge(connection, name, tenant=tenant)
        # Last, so that the entry can have the space of the rows that are gone.
        action = Action.ADAPTER_PURGE if purge else Action.ADAPTER_DELETE
        _record(connection, action, name, before=before, tenant=tenant)
        return unused

    def _corrupt_live(self, name: str, digest: str, *, tenant: str) -> Version | None:
        """Return the live version of a name if it has this digest and its stored bytes do not."""
        with self.database.read() as connection:
            live = queries.find_live(connection, name, tenant=tenant)
        if live is None or live.digest != digest:
            return None
        is_intact = self.blobs.has_digest(live.file, digest, offset=live.offset, length=live.bytes)
        return None if is_intact else live

    @contextmanager
    def _drafts(self, publications: Sequence[Publication]) -> Iterator[tuple[list[_Draft], Upload]]:
        """Write the blobs of publications, and hold them until their transaction has ended."""
        created_at, drafts = rfc3339(self._now()), []
        norms = delta_norms([publication.adapter for publication in publications])
        with self.writer.upload() as upload:
            for first in range(0, len(publications), PACK_ADAPTERS):
                pack = publications[first : first + PACK_ADAPTERS]
                contents = [publication.adapter.canonical_bytes for publication in pack]
                file = upload.write(partial(_write_all, contents))
                offsets = accumulate(map(len, contents), initial=0)
                for publication, norm, offset in zip(pack, norms[first:], offsets, strict=False):
                    statistics = None if publication.statistics is None else upload.write(publication.statistics)
                    location = {"file": file, "offset": offset, "statistics": statistics}
                    version = _describe(publication, norm=norm, created_at=created_at, **location)
                    drafts.append((publication, version))
            yield drafts, upload


def _write_all(contents: Sequence[bytes], file: BinaryIO) -> None:
    file.writelines(contents)


def _insert(connection: Connection, drafts: Sequence[_Draft], *, tenant: str) -> list[Published]:
    """Give versions their numbers, store their rows, move live, and increment the revision once."""
    if not drafts:
        return []
    names = [publication.name for publication, _ in drafts]
    numbers = queries.allocate_numbers(connection, names, drafts[0][1].created_at, tenant=tenant)
    live = queries.live_digests(connection, dict.fromkeys(names), tenant=tenant)
    moved, published, changes = {}, [], []
    for (publication, draft), number in zip(drafts, numbers, strict=True):
        name = publication.name
        before, digest_before = live.get(name, (None, None))
        # If live has moved since the adapter was compared with it, the comparison no longer holds.
        moves = publication.moves_live and (not publication.checks_live or before == publication.expected_live)
        if moves:
            live[name], moved[name] = (number, draft.digest), number
        version, replaced = replace(draft, version=number), before if moves else None
        action = Action.ADAPTER_PUBLISH if moves else Action.ADAPTER_ADD
        changes.append(Change(action, f"adapters/{name}", digest_before, draft.digest))
        position = publication.position
        published.append(Published(position=position, version=version, moved_live=moves, replaced=replaced))
    evidence = (publication.evidence for publication, _ in drafts)
    new = zip((item.version for item in published), evidence, strict=True)
    queries.insert_versions(connection, new, tenant=tenant)
    queries.set_alias(connection, LIVE, moved, tenant=tenant)
    queries.increment_revision(connection, names, tenant=tenant)
    audit.record(connection, changes, tenant=tenant)
    return published


def _check_quota(connection: Connection, drafts: Sequence[_Draft], *, tenant: str) -> None:
    quota = AdapterQuota(connection, [publication.name for publication, _ in drafts], tenant=tenant)
    for publication, version in drafts:
        quota.take(publication.name, version.bytes)


def _live_digest(connection: Connection, name: str, *, tenant: str) -> str | None:
    return queries.live_digests(connection, [name], tenant=tenant).get(name, (0, None))[1]


def _record(
    connection: Connection,
    action: Action,
    name: str,
    *,
    tenant: str,
    before: str | None = None,
    after: str | None = None,
) -> None:
    """Add the change of an adapter to the audit log."""
    audit.record(connection, [Change(action, f"adapters/{name}", before, after)], tenant=tenant)


def _files(drafts: Sequence[_Draft]) -> set[str]:
    files = {version.file for _, version in drafts}
    return files.union(version.statistics for _, version in drafts if version.statistics is not None)


def _check_condition(connection: Connection, name: str, precondition: Precondition | None, *, tenant: str) -> None:
    if precondition is not None:
        live = queries.find_live(connection, name, tenant=tenant)
        precondition(queries.exists(connection, name, tenant=tenant), live.digest if live else None)


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
