"""Requests → batches → compute: what waits together runs together, whatever its adapters, ranks and row counts.

Everything here runs on the event loop, apart from what is handed to a thread by name: so there are no locks. A batch
starts when the engine is free, never after a timer.
"""

# N rows of one request · M rows of one batch · I in_features · O out_features
import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from adapters.arrays import Float32
from adapters.catalog.resolver import Snapshot
from adapters.errors import CatalogBusy, QueueFull
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.lora.forward import mixed_forward
from app.serving.adapter_loader import AdapterLoader, CacheStats
from app.serving.queue_entry import BatchRecord, EntrySlice, InferenceResult, QueueEntry
from app.serving.request import InferenceRequest

_INLINE_MULTIPLICATIONS = 2**26
"""Up to about 3 ms of work is done on the event loop's own thread: a hop to another costs more than it frees."""
_LONGEST_WAIT_SECONDS = 60.0
_LONGEST_LOCK_SECONDS = 5.0
_LOCK_RETRY_SECONDS = 0.001
_REFUSAL_SECONDS = 0.002
_LONGEST_REFUSAL_SECONDS = 1.0
"""Whoever is refused is back at once, and refusing takes time from answering: a crowd is told one by one, and the first
without delay."""


_Answers = tuple[Float32, BatchRecord]
"""(M, O), and what they took."""


class QueueState(NamedTuple):
    """What waits now, and what is in memory."""

    rows: int
    rows_limit: int
    residency: CacheStats


class Batcher:
    """The queue in front of one base layer."""

    def __init__(
        self,
        base: BaseLayer,
        lookup: AdapterLoader,
        *,
        queue_rows: int,
        batch_rows: int,
        on_batch: Callable[[BatchRecord], None] = lambda _ran: None,
    ) -> None:
        """`on_batch` is told each batch that was computed."""
        self._on_batch = on_batch
        self._base = base
        self._lookup = lookup
        self._queue_rows = queue_rows
        self._batch_rows = batch_rows
        self._arrived: list[QueueEntry] = []
        self._ready: deque[QueueEntry] = deque()
        """Those whose versions and adapters are known."""
        self._rows = 0
        """Of everything that is not answered yet."""
        self._refused = 0.0
        """When the last refusal is told: seconds of the monotonic clock."""
        self._engaged = False
        self._seen = 0
        self._computing = False
        self._locked_since: float | None = None
        self._fetches: set[asyncio.Task[None]] = set()
        self._thread = ThreadPoolExecutor(1, "forward")
        self._loop: asyncio.AbstractEventLoop

    def close(self) -> None:
        """Give back the threads, once nothing is asked any more."""
        self._thread.shutdown()
        self._lookup.close()

    def standing(self) -> QueueState:
        """For an observer."""
        return QueueState(self._rows, self._queue_rows, self._lookup.counted())

    def has_room(self, rows: int = 1) -> bool:
        """Whether so many rows more may wait; alone, a request may be larger than the queue."""
        return not self._rows or self._rows + rows <= self._queue_rows

    async def admit(self, rows: int = 1, *, timeout_seconds: float | None = None) -> None:
        """Raises `QueueFull` where there is no room: up to a second late, and never later than `timeout_seconds`."""
        if not self.has_room(rows):
            now = time.monotonic()
            self._refused = min(max(now, self._refused + _REFUSAL_SECONDS), now + _LONGEST_REFUSAL_SECONDS)
            wait = self._refused - now
            await asyncio.sleep(wait if timeout_seconds is None else min(wait, timeout_seconds))
            raise QueueFull(
                f"at most {self._queue_rows} rows may wait: try again in a moment",
                expected=f"at most {self._queue_rows} rows waiting",
            )

    async def ask(
        self,
        question: InferenceRequest,
        *,
        timeout_seconds: float | None = None,
        gone: Callable[[], Awaitable[None]] | None = None,
        entered: Callable[[QueueEntry], None] = lambda _ticket: None,
    ) -> InferenceResult:
        """The answer to a question; `gone` returns when nobody waits for it any more. `entered` is told its ticket.

        `timeout_seconds` may only shorten the minute that a question waits at most. Raises `QueueFull`,
        `RequestTimeout`, `ClientDisconnect`, `OutputNotFinite`, and what `AdapterLoader` raises.
        """
        await self.admit(len(question.inputs_NI), timeout_seconds=timeout_seconds)
        wait = _LONGEST_WAIT_SECONDS if timeout_seconds is None else min(timeout_seconds, _LONGEST_WAIT_SECONDS)
        ticket = self.enter(question, wait_seconds=wait, gone=gone)
        entered(ticket)
        try:
            return await ticket.future
        finally:
            self.leave(ticket)

    def enter(
        self,
        question: InferenceRequest,
        *,
        wait_seconds: float = _LONGEST_WAIT_SECONDS,
        gone: Callable[[], Awaitable[None]] | None = None,
    ) -> QueueEntry:
        """The same for whoever has seen that there is room: the ticket whose future ends as `ask` does.

        Whoever entered must `leave` when the future has ended, or after cancelling it.
        """
        if not self._arrived:
            # Once a batch: it is a system call.
            self._loop = asyncio.get_running_loop()
        ticket = QueueEntry(question, self._loop.create_future(), wait_seconds=wait_seconds, gone=gone)
        self._rows += ticket.rows
        self._arrived.append(ticket)
        if self._computing:
            ticket.linger()
        self._engage()
        return ticket

    def leave(self, ticket: QueueEntry) -> None:
        """Nobody waits for this ticket any more."""
        ticket.leave()
        self._rows -= ticket.rows

    def _engage(self) -> None:
        if not self._engaged and (self._arrived or self._ready):
            self._engaged = True
            self._loop.call_soon(self._start)

    def _start(self) -> None:
        """Run one batch of what waits now."""
        if self._seen < len(self._arrived) and self._rows < self._batch_rows:
            # What its sockets hold already joins: a turn of the loop reads it, and while that brings more, another.
            self._seen = len(self._arrived)
            self._loop.call_soon(self._start)
            return
        self._seen = 0
        try:
            self._prepare()
            slices = self._next_batch()
            if slices:
                self._run(slices)
            else:
                self._disengage()
        except CatalogBusy as error:
            self._locked_since = self._locked_since or time.monotonic()
            if time.monotonic() - self._locked_since < _LONGEST_LOCK_SECONDS:
                self._loop.call_later(_LOCK_RETRY_SECONDS, self._start)
            else:
                self._give_up(error)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        for ticket in [*self._arrived, *self._ready]:
            ticket.fail(error)
        self._arrived, self._locked_since, self._engaged = [], None, False
        self._ready.clear()

    def _prepare(self) -> None:
        """One look at the catalogue, and what arrived since the last one is ready, or being fetched."""
        if not self._arrived:
            return
        view = self._lookup.current()
        self._locked_since = None
        arrived, self._arrived = self._arrived, []
        now = time.perf_counter()
        for ticket in arrived:
            if ticket.ended(now):
                continue
            try:
                found = self._lookup.at_hand(view, ticket)
            except Exception as error:
                ticket.fail(error)
                continue
            if found is None:
                ticket.linger_soon()
                fetch = self._loop.create_task(self._fetch(view, ticket))
                # The loop holds its tasks weakly.
                self._fetches.add(fetch)
                fetch.add_done_callback(self._fetches.discard)
            else:
                ticket.pin(*found, now)
                self._ready.append(ticket)
                if len(self._ready) > self._batch_rows:
                    ticket.linger()

    async def _fetch(self, view: Snapshot, ticket: QueueEntry) -> None:
        try:
            found = await self._lookup.fetch(view, ticket)
            ticket.pin(*found, time.perf_counter())
        except Exception as error:
            ticket.fail(error)
        else:
            self._ready.append(ticket)
            self._engage()

    def _next_batch(self) -> list[EntrySlice]:
        """From those that are ready, of each its fair share of the batch, and then the rest in their order."""
        now = time.perf_counter()
        tickets: list[QueueEntry] = []
        while self._ready and len(tickets) < self._batch_rows:
            ticket = self._ready.popleft()
            if not ticket.ended(now):
                tickets.append(ticket)
        lefts = [ticket.left_rows for ticket in tickets]
        if sum(lefts) <= self._batch_rows:
            return [ticket.take(left, now) for ticket, left in zip(tickets, lefts, strict=True)]
        share = self._batch_rows // len(tickets)
        counts = [min(left, share) for left in lefts]
        room = self._batch_rows - sum(counts)
        slices = []
        for ticket, count in zip(tickets, counts, strict=True):
            more = min(ticket.left_rows - count, room)
            room -= more
            slices.append(ticket.take(count + more, now))
            if ticket.left_rows:
                ticket.linger()
        return slices

    def _run(self, slices: list[EntrySlice]) -> None:
        choices: dict[Adapter | None, int] = {}
        choice_M: list[int] = []
        parts: list[Float32] = []
        ranks = 0
        for ticket, begin, end in slices:
            parts.append(ticket.question.inputs_NI[begin:end])
            ranks += (end - begin) * ticket.rank
            for choice in ticket.choice_N[begin:end]:
                choice_M.append(choices.setdefault(ticket.adapters[choice], len(choices)))
        arguments = parts, list(choices), choice_M
        if self._is_quick(len(choice_M), ranks):
            try:
                answers = self._forward(*arguments)
            except Exception as error:
                self._fail(slices, error)
            else:
                self._answer(slices, answers)
            return
        self._computing = True
        work = self._loop.run_in_executor(self._thread, self._forward, *arguments)
        work.add_done_callback(lambda work: self._computed(slices, work))

    def _is_quick(self, M: int, ranks: int) -> bool:
        base = self._base
        # A low-rank term has no rows to share its factors with: four times the cost of as much of the base GEMM.
        multiplications = M * base.in_features * base.out_features + 4 * ranks * (base.in_features + base.out_features)
        return base.device.type == "cpu" and multiplications <= _INLINE_MULTIPLICATIONS

    def _forward(
        self, parts: Sequence[Float32], choices: Sequence[Adapter | None], choice_M: Sequence[int]
    ) -> _Answers:
        begin = time.perf_counter()
        x_MI = torch.from_numpy(np.concatenate(parts))
        if self._base.device.type == "cpu":
            y_MO = mixed_forward(self._base, x_MI, choices, choice_M)
        else:
            y_MO = mixed_forward(self._base, x_MI.to(self._base.weight_OI), choices, choice_M).float().cpu()
        adapters = len(choices) - (None in choices)
        return y_MO.numpy(), BatchRecord(len(choice_M), adapters, begin, time.perf_counter())

    def _computed(self, slices: list[EntrySlice], work: "asyncio.Future[_Answers]") -> None:
        self._computing = False
        error = work.exception()
        assert error is None or isinstance(error, Exception)
        if error is None:
            self._answer(slices, work.result())
        else:
            self._fail(slices, error)

    def _fail(self, slices: list[EntrySlice], error: Exception) -> None:
        for part in slices:
            part.ticket.fail(error)
        self._disengage()

    def _answer(self, slices: list[EntrySlice], answers: _Answers) -> None:
        y_MO, ran = answers
        self._on_batch(ran)
        finite = bool(np.isfinite(y_MO).all())
        at = 0
        for part in slices:
            y_KO = y_MO[at : at + part.end - part.begin]
            at += len(y_KO)
            if finite or np.isfinite(y_KO).all():
                part.ticket.put(part, y_KO, ran)
            else:
                part.ticket.refuse(part, y_KO)
            if part.ticket.left_rows:
                self._ready.append(part.ticket)
        self._disengage()

    def _disengage(self) -> None:
        self._engaged = False
        self._engage()
