"""Handler of `/usage`: answered predictions and their rows by hour."""

import time
from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import Field

from adapters.access.usage import HOUR_SECONDS, HourlyUsage, UsageBy
from adapters.clock import read_time
from app.http.authentication import CallerOf
from app.http.paging import Page, page_of, read_cursor
from app.http.schemas.usage import AdapterUsageBody, HourUsageBody, KeyUsageBody, UsagePage
from app.service import ServiceOf

_DEFAULT_SECONDS = 24 * HOUR_SECONDS


class UsageQuery(Page):
    """Query parameters of `GET /usage`."""

    begins: str | None = Field(
        None, alias="from", description="RFC 3339 time from which on hours begin; by default, 24 hours ago."
    )
    ends: str | None = Field(None, alias="to", description="RFC 3339 time before which hours begin.")
    by: Literal["adapter", "key"] | None = Field(None, description="What to split each hour by; nothing by default.")


def list_usage(query: Annotated[UsageQuery, Query()], caller: CallerOf, service: ServiceOf) -> UsagePage:
    """List the hours, oldest first, with the requests to predict and infer that were answered, and their rows.

    The counts are up to five seconds late.
    """
    by = None if query.by is None else UsageBy(query.by)
    begins = time.time() - _DEFAULT_SECONDS if query.begins is None else read_time(query.begins, field="from")
    ends = None if query.ends is None else read_time(query.ends, field="to")
    list_key = f"usage {caller.tenant} {by} {query.begins} {query.ends}"
    after = read_cursor(list_key, query.cursor, str)
    hours = service.usage.list(
        tenant=caller.tenant, by=by, begins=begins, ends=ends, after=after, limit=query.limit + 1
    )
    data, next_cursor = page_of(list_key, hours, query.limit, lambda usage: usage.position)
    return UsagePage(data=[_body(usage, by) for usage in data], next_cursor=next_cursor)


def _body(usage: HourlyUsage, by: UsageBy | None) -> HourUsageBody:
    counts: dict[str, Any] = {"hour": usage.hour, "requests": usage.requests, "rows": usage.rows}
    if by is UsageBy.ADAPTER:
        return AdapterUsageBody(adapter=usage.name, **counts)
    return HourUsageBody(**counts) if by is None else KeyUsageBody(key=usage.name, **counts)
