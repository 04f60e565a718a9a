"""A job with what can be done with it, on a client that blocks or on one that does not."""

# ruff: noqa: ASYNC109  # as in `loraplex.async_client`

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, TypeVar

from loraplex.errors import JobCancelled, JobFailed
from loraplex.progress import Display
from loraplex.results import Event, JobAdapter, JobFields, JobStatus, Reverted

if TYPE_CHECKING:
    from loraplex.async_client import AsyncClient
    from loraplex.client import Client

J = TypeVar("J", bound=JobFields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(JobFields):
    """One training job, as it stood when it was asked for."""

    client: "Client" = field(repr=False, compare=False)

    def wait(self, *, progress: bool | Display = False, timeout: float | None = None) -> "Job":
        """The job once it has ended; with `progress`, shown on standard error, or by that `Display`, as it goes on.

        Raises `JobFailed` and `JobCancelled`, which carry the job, and `TimedOut` after `timeout` seconds. The job goes
        on whatever becomes of the waiting.
        """
        return self.client.wait(self.id, progress=progress, timeout=timeout)

    def events(self) -> Iterator[Event]:
        """What it tells until it has ended."""
        return self.client.events(self.id)

    def refresh(self) -> "Job":
        """The job as it is now."""
        return self.client.job(self.id)

    def cancel(self) -> "Job":
        """End it; raises `JobEnded` where it has ended already."""
        return self.client.cancel(self.id)

    def adapters(self, *, status: str | None = None, limit: int | None = None) -> Iterator[JobAdapter]:
        """What it trains; `status` is `waiting`, `published` or `failed`."""
        return self.client.job_adapters(self.id, status=status, limit=limit)

    def revert(self) -> Reverted:
        """Take back what it published; raises `JobNotEnded` before its end."""
        return self.client.revert(self.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncJob(JobFields):
    """One training job, as it stood when it was asked for."""

    client: "AsyncClient" = field(repr=False, compare=False)

    async def wait(self, *, progress: bool | Display = False, timeout: float | None = None) -> "AsyncJob":
        """The job once it has ended; with `progress`, shown on standard error, or by that `Display`, as it goes on.

        Raises `JobFailed` and `JobCancelled`, which carry the job, and `TimedOut` after `timeout` seconds. The job goes
        on whatever becomes of the waiting.
        """
        return await self.client.wait(self.id, progress=progress, timeout=timeout)

    def events(self) -> AsyncIterator[Event]:
        """What it tells until it has ended."""
        return self.client.events(self.id)

    async def refresh(self) -> "AsyncJob":
        """The job as it is now."""
        return await self.client.job(self.id)

    async def cancel(self) -> "AsyncJob":
        """End it; raises `JobEnded` where it has ended already."""
        return await self.client.cancel(self.id)

    def adapters(self, *, status: str | None = None, limit: int | None = None) -> AsyncIterator[JobAdapter]:
        """What it trains; `status` is `waiting`, `published` or `failed`."""
        return self.client.job_adapters(self.id, status=status, limit=limit)

    async def revert(self) -> Reverted:
        """Take back what it published; raises `JobNotEnded` before its end."""
        return await self.client.revert(self.id)


def with_client(job: JobFields, client: "Client") -> Job:
    """A job that can be waited for."""
    return Job(**_members(job), client=client)  # type: ignore[arg-type]


def with_async_client(job: JobFields, client: "AsyncClient") -> AsyncJob:
    """The same for a client that does not block."""
    return AsyncJob(**_members(job), client=client)  # type: ignore[arg-type]


def succeeded(job: J) -> J:
    """The job itself; raises `JobFailed` or `JobCancelled` where it ended otherwise."""
    if job.status is JobStatus.CANCELLED:
        raise JobCancelled(f"job {job.id} ({job.adapter}) was cancelled", job=job)
    if job.status is JobStatus.FAILED:
        why = "without saying why" if job.error is None else f"{job.error.code}: {job.error.detail}"
        raise JobFailed(f"job {job.id} ({job.adapter}) failed, {why}", job=job) from job.error
    return job


def _members(job: JobFields) -> dict[str, object]:
    return {each.name: getattr(job, each.name) for each in fields(JobFields)}
