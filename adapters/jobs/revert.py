"""Revert of a job: each live alias that it moved points again at the version that was live before."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy.engine import Connection

from adapters.access import audit
from adapters.access.audit import Action, Change
from adapters.catalog import queries
from adapters.jobs.job import Job
from adapters.jobs.job_adapters import JobAdapter, deleted_since
from adapters.names import LIVE


class SkipReason(StrEnum):
    """Why an adapter of the job was left as it is."""

    NOT_PUBLISHED = "not_published"
    """The job published no version of it."""
    NEVER_LIVE = "never_live"
    """The job's version did not become live when it was published."""
    ADAPTER_DELETED = "adapter_deleted"
    """It was deleted since."""
    LIVE_MOVED = "live_moved"
    """Its live alias no longer points at the job's version."""
    VERSION_GONE = "version_gone"
    """The version that live pointed at before is no longer there."""


@dataclass(frozen=True, slots=True)
class RevertedAdapter:
    """A live alias that was pointed back."""

    name: str
    version: int
    """Version of the job, which was live."""
    to: int | None
    """Version that is live again; None if none was live before."""


@dataclass(frozen=True, slots=True)
class SkippedAdapter:
    """An adapter of the job that was left as it is."""

    name: str
    version: int | None
    reason: SkipReason
    detail: str


@dataclass(frozen=True, slots=True)
class RevertResult:
    """Result of a revert: every adapter of the job is in one of the two lists."""

    reverted: Sequence[RevertedAdapter]
    skipped: Sequence[SkippedAdapter]


def join(results: Iterable[RevertResult]) -> RevertResult:
    """Return the results of several slices as one."""
    reverted, skipped = list[RevertedAdapter](), list[SkippedAdapter]()
    for result in results:
        reverted += result.reverted
        skipped += result.skipped
    return RevertResult(reverted, skipped)


def revert(connection: Connection, job: Job, adapters: Sequence[JobAdapter]) -> RevertResult:
    """Point back the live alias of each of these adapters for which that is possible, and raise the revision once."""
    tenant = job.tenant
    names = [adapter.name for adapter in adapters]
    live = queries.alias_targets(connection, names, LIVE, tenant=tenant)
    deleted = {adapter.position for adapter in deleted_since(connection, adapters, tenant=tenant)}
    replaced = [(adapter.name, adapter.replaced) for adapter in adapters if adapter.replaced is not None]
    digests = queries.digests(connection, replaced, tenant=tenant)
    reverted, skipped, changes = [], [], []
    for adapter in adapters:
        digest = None if adapter.replaced is None else digests.get((adapter.name, adapter.replaced))
        is_gone = adapter.replaced is not None and digest is None
        reason = _reason(adapter, live, is_deleted=adapter.position in deleted, is_gone=is_gone)
        if reason is not None:
            current = f"it is {live[adapter.name]}" if adapter.name in live else "nothing is live"
            detail = _DETAILS[reason].format(adapter=adapter, current=current)
            skipped.append(SkippedAdapter(adapter.name, adapter.version, reason, detail))
        elif adapter.version is not None:
            reverted.append(RevertedAdapter(adapter.name, adapter.version, adapter.replaced))
            changes.append(Change(Action.ADAPTER_REVERT, f"adapters/{adapter.name}", adapter.digest, digest))
    if reverted:
        numbers = {back.name: back.to for back in reverted if back.to is not None}
        queries.set_alias(connection, LIVE, numbers, tenant=tenant)
        never_live = [back.name for back in reverted if back.to is None]
        queries.remove_alias(connection, LIVE, never_live, tenant=tenant)
        queries.increment_revision(connection, [back.name for back in reverted], tenant=tenant)
        audit.record(connection, changes, tenant=tenant)
    return RevertResult(reverted, skipped)


_DETAILS: Mapping[SkipReason, str] = {
    SkipReason.NOT_PUBLISHED: "the job published no version of {adapter.name}",
    SkipReason.NEVER_LIVE: "{adapter.name}@{adapter.version} was published without moving live",
    SkipReason.ADAPTER_DELETED: "{adapter.name} was deleted since",
    SkipReason.LIVE_MOVED: "live of {adapter.name} is no longer version {adapter.version}: {current}",
    SkipReason.VERSION_GONE: "{adapter.name}@{adapter.replaced}, which was live before, is no longer there",
}


def _reason(adapter: JobAdapter, live: Mapping[str, int], *, is_deleted: bool, is_gone: bool) -> SkipReason | None:
    if adapter.version is None:
        return SkipReason.NOT_PUBLISHED
    if not adapter.moved_live:
        return SkipReason.NEVER_LIVE
    if is_deleted:
        return SkipReason.ADAPTER_DELETED
    if live.get(adapter.name) != adapter.version:
        return SkipReason.LIVE_MOVED
    return SkipReason.VERSION_GONE if is_gone else None
