"""Batcher: the queue of inference requests, and the batches that are computed from it.

Requests for any adapters, of any rank and number of rows, share a batch. A batch starts when the previous one has
ended, never on a timer. Everything runs on the event loop except the forward pass of a large batch, so there are no
locks.
"""

# N rows of one request · K rows of one slice · M rows of one batch · I in_features · O out_features
import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch

from adapters.access.grants import Grant, Grants
from adapters.arrays import Float32
from adapters.catalog.resolver import Snapshot
from adapters.errors import CatalogBusy, LoraplexError, QueueFull
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import BaseLayer
from adapters.lora.forward import mixed_forward
from app.serving.adapter_loader import AdapterLoader, CacheStats
from app.serving.queue_entry import BatchRecord, Disconnected, EntrySlice, InferenceResult, QueueEntry, Resolution
from app.serving.ready_queue import ReadyQueue
from app.serving.request import InferenceRequest

# Largest batch, about 3 ms of work, that is computed on the event loop. A smaller one costs less than the switch to a
# thread.
_INLINE_MULTIPLICATIONS = 2**26
_LONGEST_WAIT_SECONDS = 60.0
_LONGEST_LOCK_SECONDS = 5.0
_LOCK_RETRY_SECONDS = 0.001
_REFUSAL_SECONDS = 0.002
# Refusals are sent 2 ms apart, with a delay of at most 1 s: refused clients retry immediately, and each refusal takes
# time from the requests in the queue.
_LONGEST_REFUSAL_SECONDS = 1.0

# Outputs of a batch, (M, O), and its record.
_Outputs = tuple[Float32, BatchRecord]


class _Forecast(NamedTuple):
    """A batch that was computed speculatively, by the last known snapshot, while the revision was being read.

    It is used if the snapshot is unchanged, and dropped otherwise.
    """

    snapshot: Snapshot
    entries: Sequence[QueueEntry]
    resolutions: Sequence[Resolution]
    """Those of the entries by the snapshot."""
    outputs: _Outputs


class QueueState(NamedTuple):
    """Rows in the queue, their limit, and the adapter cache."""

    rows: int
    rows_limit: int
    cache: CacheStats


class Batcher:
    """Queue and batches of one base layer."""

    def __init__(
        self,
        base: BaseLayer,
        loader: AdapterLoader,
        grants: Grants,
        *,
        queue_rows: int,
        batch_rows: int,
        on_batch: Callable[[BatchRecord], None] = lambda _batch: None,
    ) -> None:
        """Create an empty queue; `on_batch` is called after each computed batch."""
        self._on_batch = on_batch
        self._base = base
        self._loader = loader
        self._grants = grants
        self._queue_rows = queue_rows
        self._batch_rows = batch_rows
        self._arrived: list[QueueEntry] = []
        # Entries that arrived before the reading of the revision under way began; None while none is.
        self._reading: list[QueueEntry] | None = None
        # Whether a reading has ended, and the next batch has not begun.
        self._has_read = False
        # Made during the reading under way, or during the last one.
        self._forecast: _Forecast | None = None
        self._ready = ReadyQueue()
        # Rows of all entries that are not released, and those of each tenant that has any.
        self._rows = 0
        self._tenant_rows: dict[str, int] = {}
        # Time of the last scheduled refusal, in seconds of the monotonic clock.
        self._last_refusal = 0.0
        # Whether a batch is scheduled or being computed.
        self._is_running = False
        # Entries that had arrived when the next batch was last postponed.
        self._seen = 0
        # Whether the thread computes a batch.
        self._is_computing = False
        self._locked_since: float | None = None
        self._loads: set[asyncio.Task[None]] = set()
        self._thread = ThreadPoolExecutor(1, "forward")
        self._loop: asyncio.AbstractEventLoop

    def close(self) -> None:
        """Stop the threads. No request may be in the queue."""
        self._thread.shutdown()
        self._loader.close()

    def state(self) -> QueueState:
        """Return the state of the queue, for telemetry."""
        return QueueState(self._rows, self._queue_rows, self._loader.stats())

    def has_room(self, tenant: str, rows: int = 1) -> bool:
        """Return whether the queue has room for more rows of a tenant. An empty queue takes a request of any size.

        Others cannot use up the room of a tenant: a full queue still takes one request of a tenant that has none in it,
        and more as long as the tenant has no more rows than its equal share of the limit.
        """
        if not self._rows or self._rows + rows <= self._queue_rows:
            return True
        present = self._tenant_rows.get(tenant)
        return present is None or (present + rows) * len(self._tenant_rows) <= self._queue_rows

    async def admit(self, tenant: str, rows: int = 1, *, timeout_seconds: float | None = None) -> None:
        """Raise `QueueFull` if there is no room, after a delay of at most a second or `timeout_seconds`."""
        if self.has_room(tenant, rows):
            return
        now = time.monotonic()
        self._last_refusal = min(max(now, self._last_refusal + _REFUSAL_SECONDS), now + _LONGEST_REFUSAL_SECONDS)
        delay = self._last_refusal - now
        await asyncio.sleep(delay if timeout_seconds is None else min(delay, timeout_seconds))
        expected = f"at most {self._queue_rows} rows waiting"
        raise QueueFull(f"the queue is full: try again in a moment; it takes {expected}", expected=expected)

    async def infer(
        self,
        request: InferenceRequest,
        grant: Grant,
        *,
        timeout_seconds: float | None = None,
        disconnected: Disconnected | None = None,
        on_entry: Callable[[QueueEntry], None] = lambda _entry: None,
    ) -> InferenceResult:
        """Return the result of a request; `on_entry` is called with its queue entry.

        `timeout_seconds` can only shorten the limit of a minute. Raises `QueueFull`, `RequestTimeout`,
        `ClientDisconnect`, `OutputNotFinite`, `Unauthenticated` if the key of `grant` was revoked meanwhile, and the
        errors of `AdapterLoader`.
        """
        await self.admit(grant.caller.tenant, len(request.inputs_NI), timeout_seconds=timeout_seconds)
        ended = asyncio.Event()
        entry = self.enqueue(request, grant, ended.set, timeout_seconds=timeout_seconds, disconnected=disconnected)
        on_entry(entry)
        try:
            await ended.wait()
            return entry.result()
        finally:
            entry.cancel()
            self.release(entry)

    def enqueue(
        self,
        request: InferenceRequest,
        grant: Grant,
        on_end: Callable[[], None],
        *,
        timeout_seconds: float | None = None,
        disconnected: Disconnected | None = None,
    ) -> QueueEntry:
        """Put a request into the queue, which must have room, and return its entry.

        `on_end` is called when the entry has the result or the error of `infer`. Then call `release`.
        """
        if not self._arrived:
            # Once for each batch, because it is a system call.
            self._loop = asyncio.get_running_loop()
        wait = _LONGEST_WAIT_SECONDS if timeout_seconds is None else min(timeout_seconds, _LONGEST_WAIT_SECONDS)
        entry = QueueEntry(request, grant, on_end, wait_seconds=wait, disconnected=disconnected)
        tenant = entry.tenant
        self._rows += entry.rows
        self._tenant_rows[tenant] = self._tenant_rows.get(tenant, 0) + entry.rows
        self._arrived.append(entry)
        if self._is_computing:
            entry.watch()
        if not self._is_running:
            self._schedule()
        return entry

    def release(self, entry: QueueEntry) -> None:
        """Give back the room of an entry that has ended."""
        entry.release()
        tenant = entry.tenant
        self._rows -= entry.rows
        rows = self._tenant_rows[tenant] - entry.rows
        if rows:
            self._tenant_rows[tenant] = rows
        else:
            del self._tenant_rows[tenant]

    def _schedule(self) -> None:
        # Entries that arrive during a reading of the revision wait for the next one.
        if not self._is_running and (self._ready or (self._arrived and self._reading is None)):
            self._is_running = True
            self._loop.call_soon(self._start)

    def _start(self) -> None:
        """Start a batch of the entries that wait."""
        if self._seen < len(self._arrived) and self._rows < self._batch_rows:
            # Requests that the sockets hold already should join the batch. One turn of the loop reads them; as long as
            # a turn brings more, wait for another.
            self._seen = len(self._arrived)
            self._loop.call_soon(self._start)
            return
        self._seen = 0
        # After a reading, its batch comes first. The next reading is then for the clients of this batch too: fewer and
        # larger batches share more.
        self._has_read, has_read = False, self._has_read
        try:
            if not has_read:
                self._resolve_arrived()
            slices = self._ready.take(self._batch_rows, time.perf_counter())
            if slices:
                for part in slices:
                    if part.entry.rows_left:
                        part.entry.watch()
                self._run(slices)
            else:
                self._end_batch()
        except CatalogBusy as error:
            self._locked_since = self._locked_since or time.monotonic()
            if time.monotonic() - self._locked_since < _LONGEST_LOCK_SECONDS:
                self._loop.call_later(_LOCK_RETRY_SECONDS, self._start)
            else:
                self._fail_all(error)
        except Exception as error:
            self._fail_all(error)

    def _fail_all(self, error: Exception) -> None:
        for entry in [*self._arrived, *self._ready.clear()]:
            entry.fail(error)
        self._arrived, self._locked_since, self._is_running = [], None, False

    def _resolve_arrived(self) -> None:
        """Resolve the entries that have arrived, with one look at the catalogue's revision; start the loads.

        If the look takes a round trip, they are resolved at its end. Meanwhile what is ready is computed, or if nothing
        is, a forecast of their batch.
        """
        if not self._arrived or self._reading is not None:
            return
        reading = self._loader.begin_read()
        if reading is None:
            snapshot = self._loader.current()
            self._locked_since = None
            arrived, self._arrived = self._arrived, []
            self._resolve(arrived, snapshot)
        else:
            self._reading, self._arrived = self._arrived, []
            reading.add_done_callback(self._end_reading)
            self._forecast = None
            if not self._ready:
                self._forecast = self._make_forecast(self._reading)

    def _end_reading(self, reading: "asyncio.Future[float]") -> None:
        """Resolve the entries that waited for a reading of the revision, and schedule their batch."""
        arrived, self._reading, self._has_read = self._reading or [], None, True
        try:
            age_seconds, snapshot = reading.result(), self._loader.current()
            forecast = self._forecast
            if forecast is not None and (forecast.snapshot is not snapshot or forecast.entries is not arrived):
                self._forecast = None
            self._resolve(arrived, snapshot, age_seconds=age_seconds)
        except Exception as error:
            for entry in arrived:
                entry.fail(error)
        self._schedule()

    def _resolve(self, arrived: Sequence[QueueEntry], snapshot: Snapshot, *, age_seconds: float = 0.0) -> None:
        """Resolve entries by a snapshot of this age; start the loads."""
        now = time.perf_counter()
        known: Iterable[Resolution | None] = self._forecast.resolutions if self._forecast is not None else repeat(None)
        is_current = self._grants.is_current
        # The entries of a forecast are those that have arrived, in the same order.
        for entry, resolution in zip(arrived, known, strict=False):
            if entry.end_if_overdue(now):
                continue
            try:
                if not is_current(entry.grant):
                    resolution = None  # `_load` verifies the key again
                elif resolution is None:
                    resolution = self._loader.try_cached(snapshot, entry)
            except Exception as error:
                entry.fail(error)
                continue
            if resolution is None:
                entry.watch_later()
                load = self._loop.create_task(self._load(snapshot, entry, age_seconds))
                # The loop has weak references to its tasks only.
                self._loads.add(load)
                load.add_done_callback(self._loads.discard)
            else:
                entry.resolve(resolution, now, age_seconds)
                self._ready.add(entry)
                if self._ready.rows > self._batch_rows:
                    entry.watch()

    def _make_forecast(self, entries: Sequence[QueueEntry]) -> _Forecast | None:
        """Compute a batch of entries by the revision that was read last.

        Return None if any of them is not cached or cannot be resolved, or if they are too many for the event loop.
        """
        if sum(entry.rows for entry in entries) > self._batch_rows:
            return None
        try:
            snapshot, resolutions = self._loader.current(), list[Resolution]()
            for entry in entries:
                resolution = self._loader.try_cached(snapshot, entry)
                if resolution is None:
                    return None
                resolutions.append(resolution)
        except LoraplexError:
            # To be raised by the resolution that counts.
            return None
        forward, is_small = self._prepare([EntrySlice(entry, 0, entry.rows) for entry in entries], resolutions)
        return _Forecast(snapshot, entries, resolutions, forward()) if is_small else None

    async def _load(self, snapshot: Snapshot, entry: QueueEntry, age_seconds: float) -> None:
        try:
            if not self._grants.is_current(entry.grant):
                await asyncio.to_thread(self._grants.verify, entry.grant.credential)
            resolution = await self._loader.load(snapshot, entry)
            entry.resolve(resolution, time.perf_counter(), age_seconds)
        except Exception as error:
            entry.fail(error)
        else:
            self._ready.add(entry)
            self._schedule()

    def _run(self, slices: list[EntrySlice]) -> None:
        forecast, self._forecast = self._forecast, None
        if forecast is not None and _is_of(forecast, slices):
            for part in slices:
                part.entry.batch_began_at = forecast.outputs[1].began
            self._finish(slices, lambda: forecast.outputs)
            return
        forward, is_small = self._prepare(slices, [part.entry.resolution for part in slices])
        if is_small:
            self._finish(slices, forward)
        else:
            self._is_computing = True
            work = self._loop.run_in_executor(self._thread, forward)
            work.add_done_callback(lambda work: self._finish(slices, work.result))

    def _prepare(
        self, slices: Sequence[EntrySlice], resolutions: Sequence[Resolution | None]
    ) -> tuple[Callable[[], _Outputs], bool]:
        """Return the forward pass of slices with the resolutions of their entries, and whether it is small."""
        choices: dict[Adapter | None, int] = {}
        choice_M: list[int] = []
        parts: list[Float32] = []
        ranks = 0
        for part, resolution in zip(slices, resolutions, strict=True):
            assert resolution is not None
            entry, begin, end = part.entry, part.begin, part.end
            adapters = resolution.adapters
            inputs_KI, choice_K = entry.request.inputs_NI, entry.choice_N
            if end - begin < entry.rows:  # a slice of an array takes as long as the rest of this loop
                inputs_KI, choice_K = inputs_KI[begin:end], choice_K[begin:end]
            parts.append(inputs_KI)
            ranks += (end - begin) * resolution.rank
            for choice in choice_K:
                choice_M.append(choices.setdefault(adapters[choice], len(choices)))
        return partial(self._forward, parts, list(choices), choice_M), self._is_small(len(choice_M), ranks)

    def _is_small(self, M: int, ranks: int) -> bool:
        """Return whether a batch of `M` rows is computed on the event loop; `ranks` is the sum of its rows' ranks."""
        base = self._base
        # A multiplication of a low-rank term takes four times as long as one of the base GEMM: each row reads factors
        # of its own.
        multiplications = M * base.in_features * base.out_features + 4 * ranks * (base.in_features + base.out_features)
        return base.device.type == "cpu" and multiplications <= _INLINE_MULTIPLICATIONS

    def _forward(
        self, parts: Sequence[Float32], choices: Sequence[Adapter | None], choice_M: Sequence[int]
    ) -> _Outputs:
        """Compute a batch; row m of the concatenated parts is for `choices[choice_M[m]]`."""
        began = time.perf_counter()
        x_MI = torch.from_numpy(np.concatenate(parts))
        if self._base.device.type == "cpu":
            y_MO = mixed_forward(self._base, x_MI, choices, choice_M)
        else:
            y_MO = mixed_forward(self._base, x_MI.to(self._base.weight_OI), choices, choice_M).float().cpu()
        adapters = len(choices) - (None in choices)
        return y_MO.numpy(), BatchRecord(len(choice_M), adapters, began, time.perf_counter())

    def _finish(self, slices: list[EntrySlice], outputs: Callable[[], _Outputs]) -> None:
        """Give each entry the outputs of its rows, or the error that `outputs` raises, and start the next batch."""
        self._is_computing = False
        try:
            y_MO, batch = outputs()
        except Exception as error:
            for part in slices:
                part.entry.fail(error)
        else:
            self._distribute(slices, y_MO, batch)
        self._end_batch()

    def _distribute(self, slices: list[EntrySlice], y_MO: Float32, batch: BatchRecord) -> None:
        """Give each entry the outputs of its rows, and put entries with more rows back into the queue."""
        self._on_batch(batch)
        is_finite = bool(np.isfinite(y_MO).all())
        begin = 0
        for part in slices:
            y_KO = y_MO[begin : begin + part.end - part.begin]
            begin += len(y_KO)
            if is_finite or np.isfinite(y_KO).all():
                part.entry.add_outputs(part, y_KO, batch)
            else:
                part.entry.fail_not_finite(part, y_KO)
            if part.entry.rows_left:
                self._ready.add(part.entry)

    def _end_batch(self) -> None:
        self._is_running = False
        self._schedule()


def _is_of(forecast: _Forecast, slices: Sequence[EntrySlice]) -> bool:
    """Return whether a batch is the one of a forecast: whole entries, in this order, with these adapters."""
    return len(slices) == len(forecast.entries) and all(
        part.entry is entry and part.entry.resolution is resolution and part.end - part.begin == entry.rows
        for part, entry, resolution in zip(slices, forecast.entries, forecast.resolutions, strict=True)
    )
