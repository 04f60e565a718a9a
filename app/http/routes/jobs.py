"""Handlers of `/jobs`: list, show, follow, cancel and revert."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Literal

from fastapi import Depends, Header, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from adapters.jobs.job import JobStatus
from adapters.jobs.job_adapters import AdapterOutcome, AdapterStatus, Order, Selection
from adapters.jobs.queue import JobQueue
from adapters.names import check_name
from adapters.training.planning.planner import Plan, Planner
from adapters.training.planning.retry import retry_groups, retry_request
from app.http.authentication import CallerOf
from app.http.bodies import object_of_body, read_as
from app.http.job_events import Subscription, read_event_id
from app.http.job_submission import SubmissionOf
from app.http.paging import Page, QueryStatus, page_of, read_cursor
from app.http.schemas.jobs import (
    JobAdapterPage,
    JobPage,
    JobWithHistory,
    RetryRequest,
    RevertBody,
    SuspectBody,
    SuspectPage,
)
from app.http.schemas.trainings import training_request
from app.service import ServiceOf

EVENT_STREAM = "text/event-stream"


class JobQuery(Page):
    """Query of the list of jobs."""

    status: QueryStatus | None = None
    adapter: str | None = Field(None, description="Only jobs that train this adapter.")
    prefix: str | None = Field(
        None, min_length=4, max_length=128, description="Only jobs whose id has this prefix of 4 or more characters."
    )


class JobAdapterQuery(Page):
    """Query of the list of a job's adapters."""

    status: Literal["waiting", "published", "failed"] | None = None
    outcome: Literal["better", "same", "worse", "failed"] | None = None
    sort: Literal["name", "gain"] | None = Field(
        None, description="By name, or by gain with the smallest first; in the order of the job if left out."
    )


async def _subscription(job_id: str, service: ServiceOf, caller: CallerOf) -> AsyncIterator[Subscription]:
    """Hold a subscription for as long as the answer lasts."""
    state = await run_in_threadpool(service.queue.state, job_id, tenant=caller.tenant)
    with service.job_events.subscribe(job_id, state, tenant=caller.tenant) as subscription:
        yield subscription


def list_jobs(query: Annotated[JobQuery, Query()], service: ServiceOf, caller: CallerOf) -> JobPage:
    """List jobs, newest first, without their histories."""
    adapter = None if query.adapter is None else check_name(query.adapter, field="adapter")
    status = None if query.status is None else JobStatus(query.status)
    list_key = f"jobs {status} {adapter} {query.prefix}"
    before = read_cursor(list_key, query.cursor, int)
    page = service.queue.list(
        tenant=caller.tenant, status=status, adapter=adapter, prefix=query.prefix, before=before, limit=query.limit + 1
    )
    return query.answer(JobPage, list_key, page, "sequence")


def show_job(job_id: str, service: ServiceOf, caller: CallerOf) -> JobWithHistory:
    """Show one job with its loss history and its log."""
    return JobWithHistory.of(service.queue.get(job_id, tenant=caller.tenant))


def list_job_adapters(
    job_id: str, query: Annotated[JobAdapterQuery, Query()], service: ServiceOf, caller: CallerOf
) -> JobAdapterPage:
    """List the adapters of a job in its order: one, or those of a fleet."""
    status = None if query.status is None else AdapterStatus(query.status)
    list_key = f"adapters of job {job_id} {status} {query.outcome} {query.sort}"
    selection = Selection(
        status=status,
        outcomes=() if query.outcome is None else (AdapterOutcome(query.outcome),),
        order=Order.POSITION if query.sort is None else Order(query.sort),
        after=read_cursor(list_key, query.cursor, int),
        limit=query.limit + 1,
    )
    adapters = service.queue.adapters(job_id, selection, tenant=caller.tenant)
    return query.answer(JobAdapterPage, list_key, adapters, "position")


def list_suspects(job_id: str, query: Annotated[Page, Query()], service: ServiceOf, caller: CallerOf) -> SuspectPage:
    """List the rows whose label the other rows contradict, worst first: at most 200.

    Each comes with the label that the other rows suggest.
    """
    list_key = f"suspects of job {job_id}"
    first = read_cursor(list_key, query.cursor, int) or 0
    suspects = service.queue.suspects(job_id, tenant=caller.tenant)
    numbered = list(enumerate(suspects[first:], start=first + 1))[: query.limit + 1]
    data, next_cursor = page_of(list_key, numbered, query.limit, lambda entry: entry[0])
    return SuspectPage(data=[SuspectBody.of(suspect) for _, suspect in data], next_cursor=next_cursor)


async def watch_job(
    subscription: Annotated[Subscription, Depends(_subscription)],
    request: Request,
    service: ServiceOf,
    last_event_id: Annotated[str | None, Header(description="Continue after this event.")] = None,
) -> Response:
    """Stream server-sent events `status`, `log`, `progress` and `metrics` until the job has ended.

    The stream also ends when the key is revoked or expires. The answer is 204 if the client has received the last
    event.
    """
    position = read_event_id(subscription.job_id, last_event_id)
    if position.is_end:
        return Response(status_code=204)
    # Proxies must neither store nor buffer the stream: nginx buffers answers by default.
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    events = service.job_events.stream(subscription, position)
    until_revoked = service.authenticator.while_granted(request.state.grant, events)
    return StreamingResponse(until_revoked, media_type=EVENT_STREAM, headers=headers)


async def cancel_job(job_id: str, service: ServiceOf, caller: CallerOf) -> JobWithHistory:
    """Cancel a job, which then publishes nothing more. Adapters that a fleet has published remain."""
    return JobWithHistory.of(await service.writes.run(service.queue.cancel, job_id, tenant=caller.tenant))


async def retry_job(job_id: str, request: Request, service: ServiceOf, submission: SubmissionOf) -> JobWithHistory:
    """Train the failed, or other, adapters of an ended job again, on the same version of its data set.

    `training` replaces settings of the job's request. Of a fleet only the groups with these outcomes are trained.
    """
    body = read_as(RetryRequest, object_of_body(await service.json.read(request)))
    return await submission.queue(partial(_plan_retry, service.queue, job_id, body))


def _plan_retry(queue: JobQueue, job_id: str, body: RetryRequest, planner: Planner) -> Plan:
    job = queue.get(job_id, tenant=planner.tenant)
    again = training_request(retry_request(job, planner.datasets, training=body.training))
    groups = retry_groups(job, queue, [AdapterOutcome(outcome) for outcome in body.outcomes])
    return planner.plan(again, only_groups=groups if job.training.is_fleet else None)


async def revert_job(job_id: str, service: ServiceOf, caller: CallerOf) -> RevertBody:
    """Restore each live version that an ended job replaced, unless it has changed again since."""
    return RevertBody.of(await service.writes.run(service.queue.revert, job_id, tenant=caller.tenant))
