"""If-Match and If-None-Match (RFC 9110, section 13.1) on the digest of an adapter's live version."""

import re
from collections.abc import Callable

from fastapi import Request

from adapters.errors import PreconditionFailed

_STRONG_TAG = re.compile(r'(?:^|[\s,])"([\x21\x23-\x7e\x80-\xff]*)"(?=$|[\s,])')
_ANY = re.compile(r"(?:^|,)\s*\*\s*(?:,|$)")


def etag(digest: str) -> str:
    """The strong entity tag of a digest."""
    return f'"{digest}"'


def precondition(request: Request) -> Callable[[bool, str | None], None] | None:
    """What the request's conditions ask of (whether the name exists, the digest of its live version).

    None where there are no conditions. Weak tags, and what is not a quoted tag, never match.
    """
    match, none_match = _header(request, "if-match"), _header(request, "if-none-match")
    if match is None and none_match is None:
        return None

    def check(exists: bool, live: str | None) -> None:
        if match is not None and not _holds(match, exists, live):
            raise _failed("If-Match", match, exists, live)
        if none_match is not None and _holds(none_match, exists, live):
            raise _failed("If-None-Match", none_match, exists, live)

    return check


def _header(request: Request, name: str) -> str | None:
    values = request.headers.getlist(name)
    return ", ".join(values).strip() if values else None


def _holds(condition: str, exists: bool, live: str | None) -> bool:
    if _ANY.search(condition):
        return exists
    return live is not None and live in _STRONG_TAG.findall(condition)


def _failed(header: str, given: str, exists: bool, live: str | None) -> PreconditionFailed:
    missing = "nothing is live" if exists else "there is nothing of that name"
    state = f"the live version is {etag(live)}" if live else missing
    return PreconditionFailed(f"{header} does not hold: {state}", field=header, given=given, expected=live)
