"""Handler of `/audit`: the entries of the audit log, as a page or as a stream."""

from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Annotated

from fastapi import Header, Query, Request, Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from adapters.access.audit import AuditEntry
from adapters.clock import parse_rfc3339, rfc3339
from adapters.errors import InvalidCombination, WrongType
from app.http.authentication import CallerOf
from app.http.bodies import JSON
from app.http.paging import Page, read_cursor
from app.http.schemas.audit import AuditEntryBody, AuditPage
from app.service import ServiceOf

JSON_LINES = "application/jsonl"
# Entries that the stream reads at once: a reader holds up writers, so each reading is short.
_STREAMED_AT_ONCE = 500


class AuditQuery(Page):
    """Query of the audit log."""

    since: str | None = Field(None, description="Only entries from this RFC 3339 time on.")
    actor: str | None = Field(None, description="Only the changes of this key, by its id, or of `cli` or `service`.")
    resource: str | None = Field(None, description="Only the changes of this resource, such as `adapters/acme`.")


def list_audit_entries(
    query: Annotated[AuditQuery, Query()],
    request: Request,
    service: ServiceOf,
    caller: CallerOf,
    accept: Annotated[str, Header()] = "",
) -> Response:
    """List the changes of the tenant's data, newest first.

    With `Accept: application/jsonl`, the answer has all of them, one in each line. It ends early if the key is revoked.
    """
    since = None if query.since is None else _parse_since(query.since)
    read = partial(service.audit.list, tenant=caller.tenant, since=since, actor=query.actor, resource=query.resource)
    if JSON_LINES in accept:
        if unfit := query.model_fields_set & {"limit", "cursor"}:
            detail = f"{min(unfit)} does not go with {JSON_LINES}, which has all entries"
            raise InvalidCombination(detail, field=min(unfit), expected=f"no {min(unfit)}, or Accept: {JSON}")
        lines = service.authenticator.while_granted(request.state.grant, _lines(read))
        return StreamingResponse(lines, media_type=JSON_LINES, headers={"Cache-Control": "no-store"})
    list_key = f"audit {caller.tenant} {since} {query.actor} {query.resource}"
    entries = read(before=read_cursor(list_key, query.cursor, int), limit=query.limit + 1)
    page = query.answer(AuditPage, list_key, entries, "sequence")
    return Response(page.model_dump_json(), media_type=JSON)


async def _lines(read: Callable[..., Sequence[AuditEntry]]) -> AsyncGenerator[bytes, None]:
    """Yield all entries as lines of JSON, many at once."""
    before: int | None = None
    while entries := await run_in_threadpool(read, before=before, limit=_STREAMED_AT_ONCE):
        yield b"".join(AuditEntryBody.of(entry).model_dump_json().encode() + b"\n" for entry in entries)
        before = entries[-1].sequence


def _parse_since(text: str) -> str:
    """Return a time in the form of `rfc3339`; raise `WrongType`."""
    try:
        return rfc3339(parse_rfc3339(text))
    except (ValueError, OverflowError):
        expected = "an RFC 3339 time with its offset, such as 2030-01-31T12:00:00Z"
        raise WrongType("since is not a time", field="since", given=text, expected=expected) from None
