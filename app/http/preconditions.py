"""Preconditions: `If-Match` and `If-None-Match` (RFC 9110, section 13.1), and the feature space of a request."""

import re
from collections.abc import Iterable

from fastapi import Request

from adapters.catalog.catalog import Precondition
from adapters.errors import FeatureSpaceMismatch, PreconditionFailed

_STRONG_TAG = re.compile(r'(?:^|[\s,])"([\x21\x23-\x7e\x80-\xff]*)"(?=$|[\s,])')
_ANY = re.compile(r"(?:^|,)\s*\*\s*(?:,|$)")


def etag(digest: str) -> str:
    """Return a digest as a strong entity tag."""
    return f'"{digest}"'


def precondition(request: Request) -> Precondition | None:
    """Return the check that a request's headers ask for, or None if it has no conditions.

    Weak tags and unquoted text never match.
    """
    match, none_match = _header(request, "if-match"), _header(request, "if-none-match")
    if match is None and none_match is None:
        return None

    def check(exists: bool, live: str | None) -> None:
        if match is not None and not _matches(match, exists, live):
            raise _failure("If-Match", match, exists, live)
        if none_match is not None and _matches(none_match, exists, live):
            raise _failure("If-None-Match", none_match, exists, live)

    return check


def check_feature_space(headers: Iterable[tuple[bytes, bytes]], feature_space: str | None) -> None:
    """Raise `FeatureSpaceMismatch` if `X-Feature-Space` names another encoder than that of the base layer.

    The header may be repeated. Clients write the names of encoders in UTF-8.
    """
    for name, value in headers:
        if name == b"x-feature-space" and (theirs := value.decode("utf-8", "replace")) != feature_space:
            detail = f"the request is for the feature space {theirs!r}, this service has {feature_space!r}"
            raise FeatureSpaceMismatch(detail, field="X-Feature-Space", given=theirs, expected=feature_space)


def _header(request: Request, name: str) -> str | None:
    values = request.headers.getlist(name)
    return ", ".join(values).strip() if values else None


def _matches(condition: str, exists: bool, live: str | None) -> bool:
    if _ANY.search(condition):
        return exists
    return live is not None and live in _STRONG_TAG.findall(condition)


def _failure(header: str, condition: str, exists: bool, live: str | None) -> PreconditionFailed:
    missing = "nothing is live" if exists else "there is nothing of that name"
    state = f"the live version is {etag(live)}" if live else missing
    return PreconditionFailed(f"{header} does not hold: {state}", field=header, given=condition, expected=live)
