"""Names, versions, aliases and the revision: what is published, and how it becomes so.

Here are the whole transactions; the statements that they are made of are in `catalog_rows`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters import catalog_rows as rows
from adapters import tables
from adapters.blobs import BlobStore
from adapters.clock import rfc3339
from adapters.database import Database
from adapters.errors import LoraplexError
from adapters.names import LIVE, MAX_VERSION, Reference
from adapters.tables import DEFAULT_TENANT as TENANT
from adapters.versions import AdapterSummary, Publication, Version

Precondition: TypeAlias = Callable[[bool, str | None], None]
"""Told whether the name exists and the digest of its live version; raises `PreconditionFailed`."""
Also: TypeAlias = Callable[[Connection, Sequence[Version]], None]
"""More to do in the transaction of a publish; what it raises undoes the publish."""


class Catalog:
    """The adapters in one data folder. Safe to use from any thread and from several processes."""

    def __init__(self, folder: Path, *, now: Callable[[], float]) -> None:
        self.database = Database(folder)
        self.blobs = BlobStore(folder)
        self._now = now

    def publish(self, publications: Sequence[Publication], *, also: Also | None = None) -> list[Version]:
        """Make each publication a version: all of them, or none. What is returned is durable.

        One blob, one transaction. A crash at any point leaves the old state or the new one, and at most a blob
        that nobody refers to.
        """
        with self._stored(publications) as unnumbered, self.database.write() as connection:
            versions = [
                self._insert(connection, version, publication.moves_live)
                for version, publication in zip(unnumbered, publications, strict=True)
            ]
            rows.next_revision(connection)
            if also is not None:
                also(connection, versions)
        return versions

    def put(self, publication: Publication, *, precondition: Precondition | None = None) -> tuple[Version, bool]:
        """Publish one adapter unless live has its bytes already; returns its version and whether it is new.

        Raises what `precondition` raises, and then nothing has changed.
        """
        name, digest = publication.name, publication.adapter.digest
        with self._stored([publication]) as (unnumbered,):
            with self.database.write() as connection:
                live = rows.live_or_none(connection, name)
                if precondition is not None:
                    precondition(rows.exists(connection, name), live.digest if live else None)
                same = live is not None and (live.digest, live.base) == (digest, unnumbered.base)
                if live is None or not same:
                    version = self._insert(connection, unnumbered, publication.moves_live)
                    rows.next_revision(connection)
                    return version, True
            self.blobs.remove([unnumbered.file])
            return live, False

    def delete(self, name: str, *, precondition: Precondition | None = None) -> None:
        """Remove the adapter with all its versions; its next number stays. Raises `AdapterNotFound`."""
        with self.database.write() as connection:
            _check(connection, name, precondition)
            unused = rows.bury(connection, name)
            rows.next_revision(connection)
        self.blobs.remove(unused)

    def set_live(self, name: str, number: int, *, precondition: Precondition | None = None) -> AdapterSummary:
        """Roll back or forward; raises `AdapterNotFound` or `VersionNotFound`."""
        with self.database.write() as connection:
            _check(connection, name, precondition)
            rows.version(connection, name, number)
            rows.point(connection, name, LIVE, number)
            rows.next_revision(connection)
            return rows.summaries(connection, [name])[0]

    def find(self, reference: Reference) -> Version:
        """The version that a reference means now; raises a `NotFound` that says what there is instead."""
        with self.database.read() as connection:
            return rows.find(connection, reference)

    def find_all(self, references: Collection[Reference]) -> dict[Reference, Version]:
        """The versions that references mean now, of those that mean one."""
        with self.database.read() as connection:
            return rows.find_all(connection, references)

    def revision(self) -> int:
        """A number that every publish, delete and roll back raises, and nothing else does."""
        with self.database.read() as connection:
            return int(connection.scalars(sa.select(tables.catalog.c.revision)).one())

    def adapter(self, name: str) -> AdapterSummary:
        """One adapter; raises `AdapterNotFound`."""
        with self.database.read() as connection:
            rows.require(connection, name)
            return rows.summaries(connection, [name])[0]

    def adapters(self, *, prefix: str = "", after: str = "", limit: int = 100) -> list[AdapterSummary]:
        """Adapters whose name begins with `prefix`, in byte order of name, from past `after` on."""
        columns = tables.adapters.c
        statement = (
            sa.select(columns.name)
            .where(columns.tenant == TENANT, columns.deleted.is_(False), columns.name > after)
            # Names are ASCII without DEL: every name with the prefix lies below prefix + DEL.
            .where(columns.name >= prefix, columns.name < prefix + "\x7f")
            .order_by(columns.name)
            .limit(limit)
        )
        with self.database.read() as connection:
            return rows.summaries(connection, connection.scalars(statement).all())

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
            rows.require(connection, name)
            return [rows.as_version(row) for row in connection.execute(statement)]

    def version_numbers(self, name: str) -> list[int]:
        """All versions that an adapter has, oldest first; raises `AdapterNotFound`."""
        columns = tables.versions.c
        statement = (
            sa.select(columns.version)
            .where(columns.tenant == TENANT, columns.adapter == name)
            .order_by(columns.version)
        )
        with self.database.read() as connection:
            rows.require(connection, name)
            return list(connection.scalars(statement))

    def sweep(self) -> int:
        """Remove the files that no row refers to, unless somebody is publishing; returns how many."""
        with self.blobs.sweeping() as alone:
            if not alone:
                return 0
            data_file = tables.jobs.c.data_file
            with self.database.read() as connection:
                files = set(connection.scalars(sa.select(tables.versions.c.file).distinct()))
                files.update(connection.scalars(sa.select(data_file).where(data_file.is_not(None))))
            return self.blobs.sweep(files)

    @contextmanager
    def _stored(self, publications: Sequence[Publication]) -> Iterator[list[Version]]:
        """Write the blob of all of them; yields their versions, which get their numbers in the transaction."""
        contents = [publication.adapter.canonical_bytes for publication in publications]
        created_at = rfc3339(self._now())
        with self.blobs.publishing():
            file = self.blobs.write(b"".join(contents))
            try:
                yield [
                    _describe(publication, created_at=created_at, file=file, offset=offset)
                    for publication, offset in zip(
                        publications, accumulate(map(len, contents), initial=0), strict=False
                    )
                ]
            except LoraplexError:
                # Refused for certain. After any other error a commit may have happened: leave it to the sweep.
                self.blobs.remove([file])
                raise

    def _insert(self, connection: Connection, unnumbered: Version, moves_live: bool) -> Version:
        number = rows.take_number(connection, unnumbered.adapter, unnumbered.created_at)
        version = replace(unnumbered, version=number)
        rows.insert(connection, version)
        if moves_live:
            rows.point(connection, version.adapter, LIVE, number)
        return version


def _check(connection: Connection, name: str, precondition: Precondition | None) -> None:
    rows.require(connection, name)
    if precondition is not None:
        live = rows.live_or_none(connection, name)
        precondition(True, live.digest if live else None)


def _describe(made: Publication, *, created_at: str, file: str, offset: int) -> Version:
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
        relative_norm=made.adapter.relative_norm(made.base),
        file=file,
        offset=offset,
        bytes=len(made.adapter.canonical_bytes),
    )
