"""Conversion between seconds since the epoch and RFC 3339 text."""

from datetime import UTC, datetime

from adapters.errors import WrongType


def rfc3339(seconds: float) -> str:
    """Return seconds since the epoch as RFC 3339 in UTC, to the microsecond. The text sorts in order of time."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def seconds_since(then: str, now: float) -> float:
    """Return the seconds from `then`, in the form of `rfc3339`, to `now`, in seconds since the epoch; to 1 ms."""
    return round(now - datetime.fromisoformat(then).timestamp(), 3)


def parse_rfc3339(text: str) -> float:
    """Return RFC 3339 text as seconds since the epoch; raise `ValueError` if it is malformed or has no offset."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None or "T" not in text.upper():
        raise ValueError(f"{text!r} has no time or no offset")
    return moment.timestamp()


def read_time(text: str, *, field: str) -> float:
    """Return RFC 3339 text of a client as seconds since the epoch; raise `WrongType`, which names the field."""
    try:
        return parse_rfc3339(text)
    except ValueError:
        expected = "an RFC 3339 time with its offset, such as 2030-01-31T12:00:00Z"
        raise WrongType(f"{field} is not a time", field=field, given=text, expected=expected) from None
