"""Times as they are stored and shown."""

from datetime import UTC, datetime


def rfc3339(seconds: float) -> str:
    """Seconds since the epoch → RFC 3339 in UTC, to the microsecond: text that sorts as the times do."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def seconds_since(then: str, now: float) -> float:
    """From a time that `rfc3339` wrote to seconds since the epoch, to the millisecond."""
    return round(now - datetime.fromisoformat(then).timestamp(), 3)
