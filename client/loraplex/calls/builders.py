"""Builders of calls: paths, bodies, conditions, pages."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from loraplex.decode import reading
from loraplex.effects import JSON, Call, Emit, Operation, Repeat, ask
from loraplex.errors import InvalidInput, InvalidName

T = TypeVar("T")
Query = Mapping[str, str | int | None]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NAMES = "1 to 128 of A-Z a-z 0-9 . _ -, the first a letter or a digit"
# The largest page of the service.
_PAGE = 1000


def path(*parts: str | int) -> str:
    """Return the path of these parts; raise `InvalidName` for a part that would lead to another resource."""
    for part in parts:
        if not NAME.fullmatch(str(part)):
            raise InvalidName(
                f"{str(part)[:100]!r} is not a valid name: a name is {_NAMES}",
                field="name",
                given=part,
                expected=_NAMES,
            )
    return "/" + "/".join(map(str, parts))


def given(members: Mapping[str, T | None]) -> dict[str, T]:
    """Return the members that are not None."""
    return {name: value for name, value in members.items() if value is not None}


def get(where: str, read: Callable[[Any], T], query: Query | None = None) -> Call[T]:
    """Return a GET call."""
    return Call(method="GET", path=where, read=reading(read), repeats=Repeat.ALWAYS, query=given(query or {}))


def encoded(body: object) -> bytes:
    """Return a JSON body; raise `InvalidInput` for a value that JSON cannot represent."""
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":"), default=_listed).encode()
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"this cannot be sent as JSON: {error}", expected="numbers, text, lists, mappings") from None


def conditions(if_match: str | None, if_none_match: str | None) -> dict[str, str]:
    """Return the headers of a condition: a digest, or `*` for any."""
    headers = given({"If-Match": if_match, "If-None-Match": if_none_match})
    return {name: value if value == "*" or value.startswith('"') else f'"{value}"' for name, value in headers.items()}


def send_json(
    method: str,
    where: str,
    body: object,
    read: Callable[[Any], T],
    *,
    repeats: Repeat = Repeat.IF_REFUSED,
    query: Query | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = None,
    allowance: float = 0.0,
) -> Call[T]:
    """Return a call with a JSON body."""
    return Call(
        method=method,
        path=where,
        read=reading(read),
        repeats=repeats,
        query=given(query or {}),
        headers={"Content-Type": JSON, **(headers or {})},
        content=encoded(body),
        timeout=timeout,
        allowance=allowance,
    )


def pages(
    where: str, read: Callable[[Any], T], *, query: Query | None = None, limit: int | None = None
) -> Operation[None]:
    """Emit at most `limit` items of a list; each page is requested when it is needed."""
    if limit is not None and limit < 0:
        raise InvalidInput(f"limit is {limit}", field="limit", given=limit, expected="0 or more, or None")
    left, cursor = limit, None
    while left is None or left > 0:
        size = _PAGE if left is None else min(left, _PAGE)
        page: tuple[list[T], str | None] = yield from ask(
            get(where, lambda value: _page(value, read), {**(query or {}), "limit": size, "cursor": cursor})
        )
        items, cursor = page
        for item in items:
            yield Emit(item)
        left = None if left is None else left - len(items)
        if cursor is None:
            return


def _page(value: Any, read: Callable[[Any], T]) -> tuple[list[T], str | None]:
    return [read(item) for item in value["data"]], value["next_cursor"]


def _listed(value: Any) -> Any:
    # A NumPy number or an array in a setting, such as training={"ridge": np.float64(1)}.
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")
