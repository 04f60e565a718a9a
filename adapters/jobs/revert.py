"""Taking back what a job published: each live that it moved points again where it pointed before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy.engine import Connection

from adapters.catalog import queries
from adapters.jobs import job_adapters
from adapters.jobs.job_adapters import JobAdapter
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
    """A live alias that points back."""

    name: str
    version: int
    """The job's, which it pointed at."""
    to: int | None
    """None: no version was live before, and none is now."""


@dataclass(frozen=True, slots=True)
class SkippedAdapter:
    """An adapter of the job that was left as it is."""

    name: str
    version: int | None
    reason: SkipReason
    detail: str


@dataclass(frozen=True, slots=True)
class RevertResult:
    """Every adapter of a job, each in one of the two."""

    reverted: Sequence[RevertedAdapter]
    skipped: Sequence[SkippedAdapter]


def revert(connection: Connection, job_id: str) -> RevertResult:
    """Within the caller's transaction: all that can be pointed back is, and the revision moves once."""
    adapters = job_adapters.list_adapters(connection, job_id)
    names = [adapter.name for adapter in adapters]
    live = queries.alias_targets(connection, names, LIVE)
    deleted = {adapter.position for adapter in job_adapters.deleted_since(connection, adapters)}
    wanted = [(adapter.name, adapter.replaced) for adapter in adapters if adapter.replaced is not None]
    there = queries.existing_versions(connection, wanted)
    reverted, skipped = [], []
    for adapter in adapters:
        gone = adapter.replaced is not None and (adapter.name, adapter.replaced) not in there
        reason = _reason(adapter, live, deleted=adapter.position in deleted, gone=gone)
        if reason is not None:
            now = f"it is {live[adapter.name]}" if adapter.name in live else "nothing is live"
            detail = _SENTENCES[reason].format(adapter=adapter, now=now)
            skipped.append(SkippedAdapter(adapter.name, adapter.version, reason, detail))
        elif adapter.version is not None:
            reverted.append(RevertedAdapter(adapter.name, adapter.version, adapter.replaced))
    if reverted:
        queries.set_alias(connection, LIVE, {back.name: back.to for back in reverted if back.to is not None})
        queries.remove_alias(connection, LIVE, [back.name for back in reverted if back.to is None])
        queries.increment_revision(connection)
    return RevertResult(reverted, skipped)


_SENTENCES: Mapping[SkipReason, str] = {
    SkipReason.NOT_PUBLISHED: "the job published no version of {adapter.name}",
    SkipReason.NEVER_LIVE: "{adapter.name}@{adapter.version} was published without moving live",
    SkipReason.ADAPTER_DELETED: "{adapter.name} was deleted since",
    SkipReason.LIVE_MOVED: "live of {adapter.name} is no longer version {adapter.version}: {now}",
    SkipReason.VERSION_GONE: "{adapter.name}@{adapter.replaced}, which was live before, is no longer there",
}


def _reason(adapter: JobAdapter, live: Mapping[str, int], *, deleted: bool, gone: bool) -> SkipReason | None:
    if adapter.version is None:
        return SkipReason.NOT_PUBLISHED
    if not adapter.moved_live:
        return SkipReason.NEVER_LIVE
    if deleted:
        return SkipReason.ADAPTER_DELETED
    if live.get(adapter.name) != adapter.version:
        return SkipReason.LIVE_MOVED
    return SkipReason.VERSION_GONE if gone else None
