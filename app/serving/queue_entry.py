"""Queue entry: one inference request in the queue of the batcher, from its arrival to its result."""

# N rows of one request · K rows of one slice · O out_features
import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from starlette.requests import ClientDisconnect

from adapters.access.grants import Grant
from adapters.arrays import Float32
from adapters.catalog.versions import Version
from adapters.errors import OutputNotFinite, RequestTimeout
from adapters.lora.adapter import Adapter
from app.observability.records import PredictionRecord
from app.serving.request import InferenceRequest

_WATCH_DELAY_SECONDS = 0.02

# Callable that returns when the client has disconnected.
Disconnected = Callable[[], Awaitable[None]]

log = logging.getLogger(__name__)


# Objects made for each request are dataclasses with slots: a named tuple takes almost three times as long to make
# (decision 7).
@dataclass(slots=True, eq=False)
class InferenceResult:
    """Outputs of one request, and the version that each row was computed with."""

    outputs_NO: Float32
    """(N, O), every number finite."""
    versions: Sequence[Version | None]
    """Versions of the distinct references, in the order of their first rows; None for the bare base layer."""
    choice_N: Sequence[int]
    """Row n was computed with `versions[choice_N[n]]`."""
    queue_seconds: float
    forward_seconds: float
    age_seconds: float = 0.0
    """Age of the catalogue's revision that its references were resolved by; 0 if it was current."""


class BatchRecord(NamedTuple):
    """One computed batch. Times are those of `time.perf_counter`, in seconds."""

    rows: int
    adapters: int
    """Distinct adapters, without the bare base layer."""
    began: float
    ended: float


@dataclass(slots=True, eq=False)
class Resolution:
    """Versions and adapters of the distinct references of one request; None for the bare base layer."""

    versions: Sequence[Version | None]
    adapters: Sequence[Adapter | None]
    rank: int
    """Largest rank of the adapters; 0 for the bare base layer alone."""


class QueueEntry:
    """Queue entry of one inference request: its progress and its result.

    It calls `on_end` once, as soon as it has a result or an error. A future would take a callback of the event loop for
    each entry.
    """

    __slots__ = (
        *("request", "grant", "tenant", "references", "choice_N", "rows", "rows_left", "resolution", "age_seconds"),
        *("submitted_at", "deadline", "resolved_at", "batch_began_at", "batch", "forward_seconds"),
        *("_on_end", "_outcome", "_done_rows", "_outputs_NO", "_disconnected", "_watch", "_watch_timer"),
    )

    def __init__(
        self,
        request: InferenceRequest,
        grant: Grant,
        on_end: Callable[[], None],
        *,
        wait_seconds: float,
        disconnected: Disconnected | None,
    ) -> None:
        self.request = request
        # Checked again when the entry is resolved, because its key may have been revoked since.
        self.grant = grant
        self.tenant = grant.caller.tenant
        self._on_end = on_end
        self._outcome: InferenceResult | Exception | None = None
        # Distinct references; row n is for `references[choice_N[n]]`.
        self.references = request.references
        if request.by_row:
            self.references = list(dict.fromkeys(request.references))
            position = {reference: index for index, reference in enumerate(self.references)}
            self.choice_N = [position[reference] for reference in request.references]
        else:
            self.choice_N = [0] * len(request.inputs_NI)
        self.rows = len(self.choice_N)
        # Times are those of `time.perf_counter`, in seconds; None for a step that has not been reached.
        self.submitted_at = time.perf_counter()
        self.deadline = self.submitted_at + wait_seconds
        self.resolved_at: float | None = None
        # Start of the first batch that has rows of the entry.
        self.batch_began_at: float | None = None
        # Last batch that had rows of the entry.
        self.batch: BatchRecord | None = None
        self.forward_seconds = 0.0
        self.age_seconds = 0.0
        self.resolution: Resolution | None = None
        # Rows that no batch has taken yet.
        self.rows_left = self.rows
        self._done_rows = 0
        self._outputs_NO: Float32 | None = None
        self._disconnected = disconnected
        # Task that fails the entry when its client disconnects or its deadline passes. An entry has one only if it
        # waits for longer than the next batch: a task costs more than a small forward pass.
        self._watch: asyncio.Task[None] | None = None
        self._watch_timer: asyncio.TimerHandle | None = None

    def resolve(self, resolution: Resolution, now: float, age_seconds: float = 0.0) -> None:
        """Fix the versions of all rows. A later delete or publish does not change the result."""
        self.resolution = resolution
        self.age_seconds = age_seconds
        self.resolved_at = now

    def take(self, rows: int, now: float) -> "EntrySlice":
        """Return the next rows, for a batch that begins `now`."""
        if self.batch_began_at is None:
            self.batch_began_at = now
        begin = self.rows - self.rows_left
        self.rows_left -= rows
        return EntrySlice(self, begin, begin + rows)

    def add_outputs(self, part: "EntrySlice", outputs_KO: Float32, batch: BatchRecord) -> None:
        """Store the outputs of a slice, (K, O); after the last slice, set the result."""
        self.batch = batch
        self.forward_seconds += batch.ended - batch.began
        self._done_rows += len(outputs_KO)
        if len(outputs_KO) == self.rows:
            self._outputs_NO = outputs_KO
        else:
            if self._outputs_NO is None:
                self._outputs_NO = np.empty((self.rows, outputs_KO.shape[1]), dtype=np.float32)
            self._outputs_NO[part.begin : part.end] = outputs_KO
        if self._done_rows == self.rows and self._outcome is None:
            assert self.batch_began_at is not None
            assert self.resolution is not None
            queue_seconds, versions = self.batch_began_at - self.submitted_at, self.resolution.versions
            forward_seconds, age_seconds = self.forward_seconds, self.age_seconds
            self._end(
                InferenceResult(self._outputs_NO, versions, self.choice_N, queue_seconds, forward_seconds, age_seconds)
            )

    def fail(self, error: Exception) -> None:
        """End with an error, unless the entry has ended."""
        if self._outcome is None:
            self._end(error)

    def cancel(self) -> None:
        """Discard the request, unless the entry has ended. `result` then raises `ClientDisconnect`."""
        self.fail(ClientDisconnect())

    def fail_not_finite(self, part: "EntrySlice", outputs_KO: Float32) -> None:
        """Fail because of the first row of a slice whose outputs are not finite."""
        row = part.begin + int(np.argmin(np.isfinite(outputs_KO).all(axis=1)))
        detail, expected = f"the outputs of row {row} are too large for float32", "inputs whose outputs are finite"
        self.fail(OutputNotFinite(detail, field="inputs", row=row, expected=expected))

    def end_if_overdue(self, now: float) -> bool:
        """Fail if the deadline has passed; return whether the entry has ended."""
        if now > self.deadline:
            self.fail(self._timeout_error())
        return self._outcome is not None

    @property
    def is_cancelled(self) -> bool:
        """Whether the client disconnected before the entry ended."""
        return isinstance(self._outcome, ClientDisconnect)

    def result(self) -> InferenceResult:
        """Return the result of an entry that has ended, or raise its error."""
        outcome = self._outcome
        assert outcome is not None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def watch(self) -> None:
        """Fail from now on as soon as the client disconnects or the deadline passes."""
        if self._watch is None and self._outcome is None:
            self._watch = asyncio.get_running_loop().create_task(self._fail_if_abandoned())

    def watch_later(self) -> None:
        """Call `watch` after a short time, in which most entries end."""
        self._watch_timer = asyncio.get_running_loop().call_later(_WATCH_DELAY_SECONDS, self.watch)

    def release(self) -> None:
        """Stop watching. Must be called when the entry has ended."""
        if self._watch is None and self._watch_timer is None:
            return
        for watch in (self._watch, self._watch_timer):
            if watch is not None:
                watch.cancel()
        # Both refer to this entry: the cycle would keep the adapters until a garbage collection.
        self._watch = self._watch_timer = None

    def rows_by_name(self) -> Mapping[str | None, int]:
        """Return the number of rows for each adapter by its name, whatever version; None is the bare base layer."""
        if len(self.references) == 1:
            reference = self.references[0]
            return {None if reference is None else reference.name: self.rows}
        rows: Counter[str | None] = Counter()
        for choice, count in Counter(self.choice_N).items():
            reference = self.references[choice]
            rows[None if reference is None else reference.name] += count
        return rows

    def summarize(self) -> PredictionRecord:
        """Return what telemetry records. It refers to no large array."""
        by_row, versions = self.request.by_row, self.resolution.versions if self.resolution else ()
        return PredictionRecord(
            self.references[0],
            versions[0] if versions else None,
            by_row,
            len({version.digest for version in versions if version is not None}) if by_row else 1,
            self.rows,
            None if self.batch_began_at is None else self.batch_began_at - self.submitted_at,
            self.forward_seconds,
        )

    async def _fail_if_abandoned(self) -> None:
        try:
            async with asyncio.timeout(self.deadline - time.perf_counter()):
                await (self._disconnected() if self._disconnected is not None else asyncio.Event().wait())
        except TimeoutError:
            self.fail(self._timeout_error())
        else:
            self.cancel()

    def _timeout_error(self) -> RequestTimeout:
        waited = time.perf_counter() - self.submitted_at
        allowed = self.deadline - self.submitted_at
        return RequestTimeout(f"the request waited {waited:.3g} s, and its limit is {allowed:.3g} s")

    def _end(self, outcome: InferenceResult | Exception) -> None:
        self._outcome = outcome
        try:
            self._on_end()
        except Exception:  # a defect in the answer to one request must not fail the others of its batch
            log.exception("a request could not be answered")


@dataclass(slots=True, eq=False)
class EntrySlice:
    """Rows `begin` to `end` of an entry."""

    entry: QueueEntry
    begin: int
    end: int
