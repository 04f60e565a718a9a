"""What is known of a request when it has been answered: what metrics, the request log and traces are made of."""

from typing import NamedTuple

from adapters.catalog.versions import Version
from adapters.names import Reference

FAILED = 400
"""The first status of a request that failed."""
NOT_ANSWERED = 499
"""The status of a request that got no answer: its client had gone, or the service ended. Nobody is sent it."""
OTHER = "other"
"""The route of a path that has none, and the method of a request with one that is none."""
LONGEST_PATH = 200
"""Characters of a path that are kept: paths are the clients'."""


class PredictionRecord(NamedTuple):
    """Of a predict or infer request, as far as it came."""

    reference: Reference | None
    """What was asked for; None is the bare base. Of the row form, the first."""
    version: Version | None
    """What answered."""
    by_row: bool
    adapters: int
    """Distinct adapters that answered."""
    rows: int
    queue_seconds: float | None
    """None where no batch has taken it."""
    forward_seconds: float


class Timespan(NamedTuple):
    """A part of a request that is worth a span; times are `time.perf_counter`'s."""

    began: float
    ended: float


class RequestRecord(NamedTuple):
    """One request, from its beginning to its answer; times are `time.perf_counter`'s."""

    route: str
    """The route's template, such as `/adapters/{name}`."""
    method: str
    status: int
    began: float
    ended: float
    request_id: bytes
    path: str
    """Without the query, and no more than `LONGEST_PATH` of it."""
    code: str | None = None
    """Of the error, where it ended in one."""
    prediction: PredictionRecord | None = None
    trace_id: str | None = None
