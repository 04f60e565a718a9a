"""Records of finished requests, from which metrics, the request log and traces are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from adapters.catalog.versions import Version
from adapters.errors import QuotaExceeded, RateLimited
from adapters.names import Reference

if TYPE_CHECKING:
    from app.serving.queue_entry import QueueEntry

# First status of a failed request.
FAILED = 400
# Status recorded for a request without an answer, because its client disconnected or the service stopped.
NOT_ANSWERED = 499
# Error code recorded for such a request.
NO_ANSWER = "not_answered"
# Error codes of requests that a limit of their tenant refuses.
LIMIT_CODES = (RateLimited.code, QuotaExceeded.code)
# Route recorded for a path that has none, and method recorded for a method that does not exist.
OTHER = "other"
# Largest number of recorded characters of a path, which clients choose.
LONGEST_PATH = 200


class Timespan(NamedTuple):
    """Part of a request that gets a span; times of `time.perf_counter`, in seconds."""

    began: float
    ended: float


@dataclass(slots=True, eq=False)
class RequestRecord:
    """A finished request, as its handler reports it; times of `time.perf_counter`, in seconds."""

    route: str
    """Template of the route, such as `/adapters/{name}`."""
    method: str
    path: str
    """Without the query."""
    headers: Mapping[bytes, bytes]
    """Headers of the request, for the parent of its trace."""
    request_id: bytes
    began: float
    status: int = NOT_ANSWERED
    code: str | None = None
    """Error code, if it failed."""
    entry: "QueueEntry | None" = None
    publish: Timespan | None = None


class PredictionRecord(NamedTuple):
    """What the request log and traces show of a predict or infer request."""

    reference: Reference | None
    """Reference of the first row; None for the bare base layer."""
    version: Version | None
    """Version of the first row."""
    by_row: bool
    adapters: int
    """Number of distinct adapters."""
    rows: int
    queue_seconds: float | None
    """None if no batch has taken it."""
    forward_seconds: float

    def members(self) -> dict[str, str | int | None]:
        """Return the adapter with its version, or the number of adapters if each row has its own, and the rows."""
        if self.by_row:
            return {"adapters": self.adapters, "rows": self.rows}
        members: dict[str, str | int | None] = {"adapter": None if self.reference is None else str(self.reference)}
        if self.version is not None:
            members |= {"version": self.version.version, "digest": self.version.digest}
        return members | {"rows": self.rows}


class LogRecord(NamedTuple):
    """A finished request, as the request log and traces show it; times of `time.perf_counter`, in seconds."""

    route: str
    method: str
    status: int
    began: float
    ended: float
    request_id: bytes
    path: str
    """Without the query, at most `LONGEST_PATH` characters."""
    code: str | None = None
    prediction: PredictionRecord | None = None
    trace_id: str | None = None
