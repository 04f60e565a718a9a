"""Query parameters, pages of lists, and cursors that are valid only for the list that issued them."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from adapters.errors import InvalidCombination, InvalidCursor, WrongType, shorten
from adapters.strict_json import whole_number
from app.http.schemas.fields import PageBody

_MAX_DIGITS = 200


def _parse_digits(value: object) -> object:
    # Query values are text. Python's `int` would also take "１", "1_0" and " 1".
    return whole_number(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


def _parse_flag(value: object) -> object:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


QueryFlag = Annotated[bool, BeforeValidator(_parse_flag)]
QueryInteger = Annotated[int, BeforeValidator(_parse_digits)]
QueryStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Item = TypeVar("Item")
Body = TypeVar("Body", bound=PageBody[Any])


class QueryFields(BaseModel):
    """Base of query parameters: strict types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Page(QueryFields):
    """Query parameters of a list."""

    limit: QueryInteger = Field(100, ge=1, le=1000, description="Maximum number of entries.")
    cursor: str | None = Field(None, description="`next_cursor` of the previous page.")

    def answer(self, body: type[Body], list_key: str, items: Iterable[Any], position: str) -> Body:
        """Return a page of up to `limit + 1` items, whose attribute `position` is the position in the list."""
        data, next_cursor = page_of(list_key, list(items), self.limit, attrgetter(position))
        return body(data=data, next_cursor=next_cursor)


async def check_query_fields(request: Request) -> None:
    """Raise `InvalidCombination` if a query field is repeated, because either value could be meant."""
    # A call without query parameters ignores its query.
    if not request.scope["route"].dependant.query_params:
        return
    for field in request.query_params:
        values = request.query_params.getlist(field)
        if len(values) > 1:
            detail = f"{shorten(field)} is in the query {len(values)} times"
            raise InvalidCombination(detail, field=field, given=values, expected="it once")


class NamePage(Page):
    """Query parameters of a list of names."""

    prefix: str = Field("", description="Only names with this prefix.")


def version_in_path(text: str) -> int:
    """Return the version in a path. A number with more digits than any version can have is cut, and does not exist."""
    if not (text.isascii() and text.isdigit()):
        raise WrongType("the version is not a whole number", field="version", given=text, expected="a version's number")
    return int(text[:_MAX_DIGITS])


def make_cursor(list_key: str, position: str | int) -> str:
    """Return a cursor to the rest of a list. `list_key` describes the list with its filters."""
    members = [position, _checksum(list_key, position)]
    return base64.urlsafe_b64encode(json.dumps(members).encode()).decode().rstrip("=")


def read_cursor(list_key: str, cursor: str | None) -> Any:
    """Return the position in a cursor of the same list, or None for None; raise `InvalidCursor`."""
    if cursor is None:
        return None
    try:
        position, checksum = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True))
        is_canonical = _is_position(position) and make_cursor(list_key, position) == cursor
        if is_canonical and checksum == _checksum(list_key, position):
            return position
    except (ValueError, TypeError, RecursionError):
        pass
    detail = "cursor was not issued by this service for this list"
    raise InvalidCursor(detail, field="cursor", given=cursor, expected="a next_cursor")


def page_of(
    list_key: str, items: Sequence[Item], limit: int, position: Callable[[Item], str | int]
) -> tuple[list[Item], str | None]:
    """Return the first `limit` items, and the cursor to the rest if there are more."""
    data = list(items[:limit])
    return data, make_cursor(list_key, position(data[-1])) if len(items) > limit else None


def _is_position(position: object) -> bool:
    """Return whether this is a name, or a number that the database can hold: clients can compute the checksum."""
    return (isinstance(position, str) and position.isascii()) or (type(position) is int and 0 <= position < 2**63)


def _checksum(list_key: str, position: str | int) -> str:
    return hashlib.sha256(f"loraplex {list_key} {position!r}".encode()).hexdigest()[:12]
