"""One question's way through the queue."""

# N rows of one request · O out_features
import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import numpy as np
from starlette.requests import ClientDisconnect

from adapters.arrays import Float32
from adapters.catalog.versions import Version
from adapters.errors import OutputNotFinite, RequestTimeout
from adapters.lora.adapter import Adapter
from app.observability.records import PredictionRecord
from app.serving.request import InferenceRequest

_MOMENT_SECONDS = 0.02


class InferenceResult(NamedTuple):
    """The answer to a question: its numbers, and which version each row's come from."""

    outputs_NO: Float32
    """(N, O), every number finite."""
    versions: Sequence[Version | None]
    """Of the distinct references, in the order in which they first stand."""
    choice_N: Sequence[int]
    """Row n was answered by `versions[choice_N[n]]`."""
    queue_seconds: float
    forward_seconds: float


class BatchRecord(NamedTuple):
    """One batch that was computed; times are `time.perf_counter`'s."""

    rows: int
    adapters: int
    """Distinct ones; the bare base is none."""
    began: float
    ended: float


class QueueEntry:
    """A question that waits, what has become of it, and the future of its outcome."""

    __slots__ = (
        "_deadline",
        "_done_rows",
        "_forward_seconds",
        "_gone",
        "_outputs_NO",
        "_timer",
        "_watch",
        "adapters",
        "choice_N",
        "choices",
        "future",
        "pinned",
        "question",
        "ran",
        "rank",
        "rows",
        "submitted",
        "taken",
        "taken_rows",
        "versions",
    )

    def __init__(
        self,
        question: InferenceRequest,
        future: "asyncio.Future[InferenceResult]",
        *,
        wait_seconds: float,
        gone: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self.question = question
        self.future = future
        self.choices = question.references
        if question.by_row:
            self.choices = list(dict.fromkeys(question.references))
            position = {reference: index for index, reference in enumerate(self.choices)}
            self.choice_N = [position[reference] for reference in question.references]
        else:
            self.choice_N = [0] * len(question.inputs_NI)
        self.rows = len(self.choice_N)
        self.versions: Sequence[Version | None] = ()
        self.adapters: Sequence[Adapter | None] = ()
        self.rank = 0
        self.taken_rows = 0
        self._done_rows = 0
        self._outputs_NO: Float32 | None = None
        self.submitted = time.perf_counter()
        self.pinned: float | None = None
        """When it was known what the references mean."""
        self.taken: float | None = None
        """When the first batch took of its rows."""
        self.ran: BatchRecord | None = None
        """The last batch that computed some of its rows."""
        self._deadline = self.submitted + wait_seconds
        self._forward_seconds = 0.0
        self._gone = gone
        self._watch: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def left_rows(self) -> int:
        """Rows that no batch has taken yet."""
        return self.rows - self.taken_rows

    def pin(self, versions: Sequence[Version | None], adapters: Sequence[Adapter | None], now: float) -> None:
        """Say what the choices mean, for all of its rows: delete and replace change nothing from here on."""
        self.versions, self.adapters, self.pinned = versions, adapters, now
        self.rank = max([0 if adapter is None else adapter.rank for adapter in adapters])

    def fail(self, error: Exception) -> None:
        """End it with an error, unless it has ended."""
        if not self.future.done():
            self.future.set_exception(error)

    def ended(self, now: float) -> bool:
        """Whether it has an outcome, or its time is up `now`."""
        if now > self._deadline:
            self.fail(self._timeout())
        return self.future.done()

    def take(self, rows: int, now: float) -> "EntrySlice":
        """The next rows, for a batch that begins `now`."""
        if self.taken is None:
            self.taken = now
        begin = self.taken_rows
        self.taken_rows += rows
        return EntrySlice(self, begin, self.taken_rows)

    def put(self, part: "EntrySlice", outputs_KO: Float32, ran: BatchRecord) -> None:
        """Give it the answers to a slice; the last one ends it."""
        self.ran = ran
        self._forward_seconds += ran.ended - ran.began
        self._done_rows += len(outputs_KO)
        if len(outputs_KO) == self.rows:
            self._outputs_NO = outputs_KO
        else:
            if self._outputs_NO is None:
                self._outputs_NO = np.empty((self.rows, outputs_KO.shape[1]), dtype=np.float32)
            self._outputs_NO[part.begin : part.end] = outputs_KO
        if self._done_rows == self.rows and not self.future.done():
            assert self.taken is not None
            outcome = InferenceResult(
                self._outputs_NO, self.versions, self.choice_N, self.taken - self.submitted, self._forward_seconds
            )
            self.future.set_result(outcome)

    def refuse(self, part: "EntrySlice", outputs_KO: Float32) -> None:
        """End it because of the first row of a slice whose answer is not finite."""
        row = part.begin + int(np.argmin(np.isfinite(outputs_KO).all(axis=1)))
        self.fail(
            OutputNotFinite(
                f"the answer to row {row} is past what float32 holds",
                field="inputs",
                row=row,
                expected="inputs and factors whose product is finite",
            )
        )

    def linger(self) -> None:
        """See from now on whether anybody still waits: not worth a task for what the next batch answers."""
        if self._watch is None and not self.future.done():
            self._watch = asyncio.get_running_loop().create_task(self._see_whether_anybody_waits())

    def linger_soon(self) -> None:
        """The same, where it has not ended in a moment."""
        self._timer = asyncio.get_running_loop().call_later(_MOMENT_SECONDS, self.linger)

    def leave(self) -> None:
        """It has ended."""
        if self._timer is not None:
            self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
            # The cancelled task holds this ticket by its traceback: a circle would keep the adapters for long.
            self._watch = None

    async def _see_whether_anybody_waits(self) -> None:
        try:
            async with asyncio.timeout(self._deadline - time.perf_counter()):
                await (self._gone() if self._gone is not None else asyncio.Event().wait())
        except TimeoutError:
            self.fail(self._timeout())
        else:
            self.fail(ClientDisconnect())

    def told(self) -> PredictionRecord:
        """What an observer is told of it; it holds nothing large."""
        by_row = self.question.by_row
        return PredictionRecord(
            self.choices[0],
            self.versions[0] if self.versions else None,
            by_row,
            len({version.digest for version in self.versions if version is not None}) if by_row else 1,
            self.rows,
            None if self.taken is None else self.taken - self.submitted,
            self._forward_seconds,
        )

    def _timeout(self) -> RequestTimeout:
        waited = time.perf_counter() - self.submitted
        allowed = self._deadline - self.submitted
        return RequestTimeout(f"the request waited for {waited:.3g} s and would not wait for more than {allowed:.3g}")


class EntrySlice(NamedTuple):
    """Rows `begin` to `end` of a ticket."""

    ticket: QueueEntry
    begin: int
    end: int
