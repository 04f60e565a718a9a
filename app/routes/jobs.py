"""`/jobs`: list, show, cancel."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from pydantic import Field

from adapters.jobs import Status
from adapters.names import check_name
from app.dependencies import ServiceOf, same_feature_space
from app.paging import Page, QueryStatus, page_of, read_cursor
from app.schemas import JobBody, JobPage, JobWithHistory

router = APIRouter(prefix="/jobs", tags=["jobs"], dependencies=[Depends(same_feature_space)])


class JobQuery(Page):
    """Which jobs."""

    status: QueryStatus | None = None
    adapter: str | None = Field(None, description="Only jobs that train this adapter.")


@router.get("")
def list_jobs(query: Annotated[JobQuery, Query()], service: ServiceOf) -> JobPage:
    """Jobs, newest first, without their histories."""
    adapter = None if query.adapter is None else check_name(query.adapter, field="adapter")
    status = None if query.status is None else Status(query.status)
    of = f"jobs {status} {adapter}"
    before = read_cursor(of, query.cursor)
    found = service.queue.list(status=status, adapter=adapter, before=before, limit=query.limit + 1)
    data, next_cursor = page_of(of, found, query.limit, lambda job: job.sequence)
    return JobPage(data=[JobBody.of(job) for job in data], next_cursor=next_cursor)


@router.get("/{job_id}")
def show_job(job_id: str, service: ServiceOf) -> JobWithHistory:
    """One job with the losses on its way."""
    return JobWithHistory.of(service.queue.get(job_id))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, service: ServiceOf) -> JobWithHistory:
    """End a job that has not ended: it publishes nothing from now on."""
    return JobWithHistory.of(service.queue.cancel(job_id))
