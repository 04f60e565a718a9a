"""Calls: requests as values, before they are sent, and the address that they are sent to."""

import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeVar

from loraplex.errors import InvalidInput, InvalidName

T = TypeVar("T")
DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE, KEY_VARIABLE = "LORAPLEX_URL", "LORAPLEX_KEY"
Query = Mapping[str, str | int | None]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_KEY = re.compile(r"[ -~]{1,255}")
# Time that the service allows itself for reading rows: two minutes, and a second for each MiB of a file.
_READING_SECONDS = 120.0
_READING_SECONDS_A_BYTE = 2.0**-20
_NAMES = "1 to 128 of A-Z a-z 0-9 . _ -, the first a letter or a digit"


class Unset(Enum):
    """Type of the value of an argument that is not sent although None would be."""

    UNSET = "the default of the service"


UNSET: Final = Unset.UNSET


@dataclass(frozen=True, slots=True)
class Call:
    """One request."""

    method: str
    path: str
    _: KW_ONLY
    safe: bool = False
    """True if the call may be sent again after a lost connection: it changes nothing, or has an idempotency key."""
    query: Query = field(default_factory=dict)
    """Members that are None are left out."""
    headers: Mapping[str, str] = field(default_factory=dict)
    json: object = None
    """The body as a value of JSON, unless there is `content`."""
    content: bytes | Path = b""
    """The body. A file is read from its beginning each time the request is sent."""
    timeout: float | None = None
    """Seconds in total, with retries; None for the timeout of the client."""
    allowance: float = 0.0
    """Seconds in addition to the timeout of the client, for work of the service."""
    retries: int | None = None
    """None for the retries of the client."""


def address(url: str | None = None) -> str:
    """Return the given address, or that of the environment, or that of a local `loraplex serve`."""
    return url or os.environ.get(URL_VARIABLE) or DEFAULT_URL


def checked_key(idempotency_key: str | None) -> str:
    """Return an idempotency key, a new one for None; raise `InvalidInput` if it cannot be sent."""
    if idempotency_key is None:
        return uuid.uuid4().hex
    if not _KEY.fullmatch(idempotency_key) or idempotency_key != idempotency_key.strip():
        expected = "1 to 255 printable ASCII characters, without spaces around them"
        detail = f"the idempotency key {idempotency_key[:100]!r} cannot be sent"
        raise InvalidInput(detail, field="idempotency_key", given=idempotency_key, expected=expected)
    return idempotency_key


def planning_call(
    path: str, body: object, *, timeout: float | None, idempotency_key: str | None = None, query: Query | None = None
) -> Call:
    """Return a call for which the service checks the rows of a training.

    One with an idempotency key is safe, and so is one with a query, which changes nothing.
    """
    return Call(
        "POST",
        path,
        safe=idempotency_key is not None or bool(query),
        query=query or {},
        headers=given({"Idempotency-Key": idempotency_key}),
        json=body,
        timeout=timeout,
        allowance=_READING_SECONDS,
    )


def upload_call(name: str, file: Path, *, headers: Mapping[str, str], timeout: float | None) -> Call:
    """Return the call that uploads a file as a data set; the headers have its content type."""
    allowance = _READING_SECONDS + file.stat().st_size * _READING_SECONDS_A_BYTE
    return Call("PUT", path("datasets", name), headers=headers, content=file, timeout=timeout, allowance=allowance)


def path(*parts: str | int) -> str:
    """Return the path of these parts; raise `InvalidName` for a part that would lead to another resource."""
    for part in parts:
        if not NAME.fullmatch(str(part)):
            detail = f"{str(part)[:100]!r} is not a valid name: a name is {_NAMES}"
            raise InvalidName(detail, field="name", given=part, expected=_NAMES)
    return "/" + "/".join(map(str, parts))


def given(members: Mapping[str, T | None]) -> dict[str, T]:
    """Return the members that are not None."""
    return {name: value for name, value in members.items() if value is not None}


def conditions(if_match: str | None = None, if_none_match: str | None = None) -> dict[str, str]:
    """Return the headers of a condition: a digest, or `*` for any."""
    headers = given({"If-Match": if_match, "If-None-Match": if_none_match})
    return {name: value if value == "*" or value.startswith('"') else f'"{value}"' for name, value in headers.items()}


def time_text(time: str | datetime | None, *, field: str) -> str | None:
    """Return a time as RFC 3339; raise `InvalidInput` for a datetime without a time zone."""
    if not isinstance(time, datetime):
        return time
    if time.tzinfo is None:
        expected = "such as datetime.now(UTC)"
        raise InvalidInput(f"{field} has no time zone", field=field, given=str(time), expected=expected)
    return time.isoformat()


def encoded(body: object) -> bytes:
    """Return a JSON body; raise `InvalidInput` for a value that JSON cannot represent."""
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":"), default=_listed).encode()
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"this cannot be sent as JSON: {error}", expected="numbers, text, lists, mappings") from None


def _listed(value: Any) -> Any:
    # An array, or a NumPy number in a setting, such as training={"ridge": np.float64(1)}.
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")
