"""Cursors: where a list goes on. Opaque to clients, and good only for the list that issued them."""

import base64
import hashlib
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from adapters.errors import InvalidCursor
from adapters.strict_json import whole_number


def _digits(value: object) -> object:
    """Query strings are text: take digits as a number, and nothing else that Python would."""
    return whole_number(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


def _flag(value: object) -> object:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


QueryFlag = Annotated[bool, BeforeValidator(_flag)]
QueryInteger = Annotated[int, BeforeValidator(_digits)]
QueryStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Item = TypeVar("Item")


class Page(BaseModel):
    """Which part of a list is asked for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    limit: QueryInteger = Field(100, ge=1, le=1000, description="How many at most.")
    cursor: str | None = Field(None, description="`next_cursor` of the page before.")


def make_cursor(of: str, position: str | int) -> str:
    """A cursor for the list that `of` describes, filters included."""
    return base64.urlsafe_b64encode(json.dumps([position, _check(of, position)]).encode()).decode().rstrip("=")


def read_cursor(of: str, cursor: str | None) -> Any:
    """The position in a cursor that `make_cursor` made for the same list; None for None. Raises `InvalidCursor`."""
    if cursor is None:
        return None
    try:
        position, check = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True))
        if _could_be_ours(position) and make_cursor(of, position) == cursor and check == _check(of, position):
            return position
    except (ValueError, TypeError, RecursionError):
        pass
    raise InvalidCursor(
        "cursor was not issued by this service for this list",
        field="cursor",
        given=cursor,
        expected="a next_cursor",
    )


def page_of(
    of: str, found: list[Item], limit: int, position: Callable[[Item], str | int]
) -> tuple[list[Item], str | None]:
    """The first `limit` of `found`, and the cursor to the rest where it holds more; `position` reads an item's."""
    data = found[:limit]
    return data, make_cursor(of, position(data[-1])) if len(found) > limit else None


def _could_be_ours(position: object) -> bool:
    """Whether it is a name, or a number that the catalogue can hold: anyone can compute the check of another."""
    return (isinstance(position, str) and position.isascii()) or (type(position) is int and 0 <= position < 2**63)


def _check(of: str, position: str | int) -> str:
    return hashlib.sha256(f"loraplex {of} {position!r}".encode()).hexdigest()[:12]
