"""Page `/ui/usage`: the answered predictions of the last 24 hours, and the limits of the tenant with what it uses."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from adapters.access.keys import Scope
from adapters.access.tenants import Limits
from adapters.access.usage import HOUR_SECONDS, HourlyUsage, UsageBy
from adapters.catalog.counts import CatalogCounts
from adapters.clock import parse_rfc3339
from adapters.jobs.job import JobStatus
from app.http.authentication import CallerOf
from app.service import ServiceOf
from app.web.pages.rendering import PageRouter, render

_HOURS = 24
_NAMES = 50
router = PageRouter()


class _Bar(NamedTuple):
    """One hour of the chart; the height is a share of the highest, in percent."""

    begins: str
    requests: int
    rows: int
    height: float


class _Limit(NamedTuple):
    """A limit of the tenant, and how much of it is used; None for no limit, and if the use is not known."""

    name: str
    value: float | None
    used: int | None


@router.page("/ui/usage")
def show_usage(request: Request, service: ServiceOf, caller: CallerOf, by: str = "") -> Response:
    """Show the hours as a chart, the adapters or keys with the most rows, and the limits."""
    caller.require(Scope.ADMIN)
    chosen = UsageBy.KEY if by == UsageBy.KEY else UsageBy.ADAPTER
    begins = (time.time() // HOUR_SECONDS - _HOURS + 1) * HOUR_SECONDS
    hours = service.usage.list(tenant=caller.tenant, by=None, begins=begins, ends=None, limit=_HOURS + 1)
    names = service.usage.largest(tenant=caller.tenant, by=chosen, begins=begins, limit=_NAMES + 1)
    return render(
        request,
        "usage.html",
        part="fragments/usage_names.html",
        bars=_bars(hours, begins),
        requests=sum(hour.requests for hour in hours),
        rows=sum(hour.rows for hour in hours),
        by=chosen,
        names=names[:_NAMES],
        has_more=len(names) > _NAMES,
        limits=_limits(service.tenants.get(caller.tenant).limits, service.catalog_figures.census(caller.tenant)),
    )


def _bars(hours: Sequence[HourlyUsage], begins: float) -> Sequence[_Bar]:
    """Return a bar for each hour, also for those without a prediction."""
    of_time = {parse_rfc3339(hour.hour): hour for hour in hours}
    most = max((hour.rows for hour in hours), default=0) or 1
    bars = []
    for number in range(_HOURS):
        at = begins + number * HOUR_SECONDS
        hour = of_time.get(at)
        requests, rows = (0, 0) if hour is None else (hour.requests, hour.rows)
        bars.append(_Bar(time.strftime("%H:%M", time.gmtime(at)), requests, rows, 100 * rows / most))
    return bars


def _limits(limits: Limits, census: CatalogCounts | None) -> Sequence[_Limit]:
    used = {}
    if census is not None:
        used = {name: getattr(census, name) for name in ("adapters", "stored_bytes", "dataset_bytes")}
        used |= {"concurrent_jobs": census.jobs[JobStatus.RUNNING], "queued_jobs": census.jobs[JobStatus.QUEUED]}
    return [_Limit(name, value, used.get(name)) for name, value in asdict(limits).items()]
