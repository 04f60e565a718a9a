"""Conversion between seconds since the epoch and RFC 3339 text."""

from datetime import UTC, datetime


def rfc3339(seconds: float) -> str:
    """Return seconds since the epoch as RFC 3339 in UTC, to the microsecond. The text sorts in order of time."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def seconds_since(then: str, now: float) -> float:
    """Return the seconds from `then`, in the form of `rfc3339`, to `now`, in seconds since the epoch; to 1 ms."""
    return round(now - datetime.fromisoformat(then).timestamp(), 3)
