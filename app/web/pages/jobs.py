"""Pages `/ui/jobs`: the queue, and one job with its progress."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from adapters.jobs.job import TRANSITIONS, Job, JobStatus
from adapters.jobs.job_adapters import AdapterOutcome, Order, Selection
from adapters.names import check_name
from app.http.authentication import CallerOf
from app.http.paging import page_of, read_cursor
from app.service import ServiceOf
from app.web.pages.formatting import part
from app.web.pages.rendering import PageRouter, render

_JOBS_PER_PAGE = 25
_ADAPTERS_PER_PAGE = 50
# Members of the description that are not among the settings on the page.
_SHOWN_APART = ("data", "name", "warnings", "renamed", "renamed_count")
_NO_REPORT: Mapping[str, Any] = {"evaluation": None, "decision": None, "auto": None, "summary": None, "warnings": ()}
router = PageRouter()


@router.page("/ui/jobs")
def list_jobs(
    request: Request,
    service: ServiceOf,
    caller: CallerOf,
    status: str = "",
    adapter: str = "",
    cursor: str | None = None,
) -> Response:
    """Show the jobs, newest first."""
    chosen = JobStatus(status) if status in list(JobStatus) else None
    adapter = adapter.strip()
    name = check_name(adapter, field="adapter") if adapter else None
    list_key = f"jobs {chosen} {name}"
    before = read_cursor(list_key, cursor or None, int)
    limit = _JOBS_PER_PAGE + 1
    listed = service.queue.list(tenant=caller.tenant, status=chosen, adapter=name, before=before, limit=limit)
    data, next_cursor = page_of(list_key, listed, _JOBS_PER_PAGE, lambda job: job.sequence)
    return render(
        request,
        "jobs.html",
        part="fragments/job_rows.html",
        jobs=data,
        statuses=list(JobStatus),
        selected_status=chosen,
        adapter=adapter,
        cursor=cursor,
        next_cursor=next_cursor,
    )


@router.page("/ui/jobs/{job_id}")
def show_job(
    request: Request,
    service: ServiceOf,
    caller: CallerOf,
    job_id: str,
    outcome: str = "",
    sort: str = "",
    cursor: str | None = None,
) -> Response:
    """Show one job; a refresh renders only its results. Of a fleet, show the adapters with one outcome, or all."""
    job = service.queue.get(job_id, tenant=caller.tenant)
    chosen = AdapterOutcome(outcome) if outcome in list(AdapterOutcome) else None
    order = Order(sort) if sort in (Order.GAIN, Order.NAME) else Order.POSITION
    list_key = f"adapters of job {job_id} {chosen} {order}"
    selection = Selection(
        outcomes=() if chosen is None else (chosen,),
        order=order,
        after=read_cursor(list_key, cursor or None, int),
        limit=_ADAPTERS_PER_PAGE + 1,
    )
    listed = list(service.queue.adapters(job_id, selection, tenant=caller.tenant))
    adapters, next_cursor = page_of(list_key, listed, _ADAPTERS_PER_PAGE, lambda adapter: adapter.position)
    ended = not TRANSITIONS[job.status]
    return render(
        request,
        "job.html",
        part="fragments/job_parts.html",
        job=job,
        report={**_NO_REPORT, **(job.report or {})},
        here=f"/ui/jobs/{part(job_id)}",
        path=f"/jobs/{part(job_id)}",
        ended=ended,
        fleet=job.training.is_fleet,
        other_base=job.base != service.base.fingerprint,
        outcome=chosen or "",
        sort="" if order is Order.POSITION else order,
        retried=_retried(job) if ended else [],
        adapters=adapters,
        cursor=cursor,
        next_cursor=next_cursor,
        settings=_settings(job),
        data=job.training.description.get("data"),
        notes=job.training.description.get("warnings") or (),
        renamed=job.training.description.get("renamed") or (),
        renamed_count=job.training.description.get("renamed_count", 0),
    )


def _retried(job: Job) -> list[str]:
    """Return the outcomes of a fleet whose adapters may be trained again."""
    summary = (job.report or {}).get("summary") or {}
    return [outcome for outcome in (AdapterOutcome.FAILED, AdapterOutcome.WORSE) if summary.get(outcome)]


def _settings(job: Job) -> list[tuple[str, str]]:
    """Return the resolved settings as names and values; the page shows the data separately."""
    shown = {name: value for name, value in job.training.description.items() if name not in _SHOWN_APART}
    return [(name, _format(value)) for name, value in _flat(shown)]


def _flat(members: dict[str, Any], within: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in members.items():
        if isinstance(value, dict) and name == "classes":
            rows.append((within + name, ", ".join(f"{label}: {count}" for label, count in value.items())))
        elif isinstance(value, dict):
            rows += _flat(value, f"{within}{name}.")
        else:
            rows.append((within + name, value))
    return rows


def _format(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else f"{text[:400]} …"
