"""Usage counter: the usage of one worker in memory, added to the catalogue every few seconds.

Only answered predictions count: requests to `/predict` and to the infer calls of `/v2` with status 200. A request
counts once for its key, and once for each adapter that it names.
"""

import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import islice

from adapters.access.usage import (
    HOUR_SECONDS,
    LONGEST_REPETITION_SECONDS,
    OTHER_ADAPTERS,
    Usage,
    UsageBy,
    UsageCount,
    UsageSlot,
)
from adapters.errors import LoraplexError
from app.serving.queue_entry import QueueEntry

# A killed process loses the counts of at most 5 seconds: 4 between flushes, and up to 1 for writing.
_SECONDS_BETWEEN_FLUSHES = 4.0
# A transaction of this many counts holds the write lock of SQLite for about 30 ms.
_COUNTS_AT_ONCE = 2000
# About 20 MB. Adapters beyond it are counted together.
_MAX_SLOTS = 2**15
# Equal requests are counted together, which takes a quarter of the time; a call for this many takes up to 2 ms.
_MAX_RECENT = 2**11

# Tenant, id of the key, hours since the epoch, and name of the adapter.
_Slot = tuple[str, str | None, float, str | None]
# Tenant, id of the key, name of the adapter, and rows. A plain tuple: it is made for every request.
_Recent = tuple[str, str | None, str | None, int]

log = logging.getLogger(__name__)


class UsageCounter:
    """Counts of one worker, and the thread that stores them. `count` is for its event loop only."""

    def __init__(
        self,
        usage: Usage,
        *,
        seconds_between_flushes: float = _SECONDS_BETWEEN_FLUSHES,
        max_slots: int = _MAX_SLOTS,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the thread."""
        self._usage = usage
        self._seconds = seconds_between_flushes
        self._max_slots = max_slots
        self._now = now
        self._monotonic = monotonic
        # Requests of one adapter in the hour `_hour` that are not in `_counts` yet.
        self._recent: deque[_Recent] = deque()
        self._hour = 0.0
        # Since the last flush: requests, rows, and the requests whose first adapter this is.
        self._counts: dict[_Slot, list[int]] = {}
        # Guards `_counts`, `_hour` and removals from `_recent`. Appending to `_recent` needs no lock.
        self._lock = threading.Lock()
        self._writer = secrets.token_hex(8)
        self._sequence = 1
        # Batches that are not stored yet, or whose commit has an unknown outcome; the first has `_sequence`.
        self._batches: deque[Sequence[UsageCount]] = deque()
        self._taken_at = 0.0
        self._is_failing = False
        # Held during a flush.
        self._flushing = threading.Lock()
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._flush_regularly, name="usage", daemon=True)
        self._thread.start()

    def count(self, entry: QueueEntry) -> None:
        """Count an answered prediction."""
        caller, references = entry.grant.caller, entry.references
        hour = self._now() // HOUR_SECONDS
        if hour != self._hour or len(self._recent) >= _MAX_RECENT:
            with self._lock:
                self._count_recent()
                self._hour = hour
        if len(references) == 1:
            reference = references[0]
            name = None if reference is None else reference.name
            self._recent.append((caller.tenant, caller.key_id, name, entry.rows))
            return
        with self._lock:
            for index, (name, rows) in enumerate(entry.rows_by_name().items()):
                self._add((caller.tenant, caller.key_id, hour, name), 1, rows, int(not index))

    def flush(self) -> None:
        """Store what was counted until now, unless the catalogue cannot be written; then the next call does."""
        with self._flushing:
            # First what an earlier call could not store: the counts since then are other batches.
            for _ in range(2):
                if not self._batches:
                    self._take()
                while self._batches:
                    self._usage.add(self._batches[0], writer=self._writer, sequence=self._sequence)
                    self._next_batch()

    def close(self) -> None:
        """Stop the thread and store the rest. May be called again."""
        self._closed.set()
        self._wake.set()
        self._thread.join()
        self._try_flush()
        if self._batches:
            log.error("the usage of some requests could not be stored, and is lost: the process ends")

    def _count_recent(self) -> None:
        recent = [self._recent.popleft() for _ in range(len(self._recent))]
        for (tenant, key_id, name, rows), requests in Counter(recent).items():
            self._add((tenant, key_id, self._hour, name), requests, requests * rows, requests)

    def _add(self, slot: _Slot, requests: int, rows: int, requests_of_key: int) -> None:
        """Add to the sums of a slot, or to those of all other adapters if there are too many slots."""
        sums = self._counts.get(slot)
        if sums is None:
            if len(self._counts) >= self._max_slots:
                slot = *slot[:3], OTHER_ADAPTERS
            sums = self._counts.setdefault(slot, [0, 0, 0])
            if len(self._counts) > self._max_slots // 2 and not self._is_failing:
                self._wake.set()
        sums[0] += requests
        sums[1] += rows
        sums[2] += requests_of_key

    def _take(self) -> None:
        """Move the counts to batches."""
        with self._lock:
            self._count_recent()
            counts, self._counts = self._counts, {}
        self._taken_at = self._monotonic()
        stored: dict[UsageSlot, list[int]] = {}
        for (tenant, key_id, hour, name), (requests, rows, requests_of_key) in counts.items():
            for by, part, count in (UsageBy.ADAPTER, name, requests), (UsageBy.KEY, key_id, requests_of_key):
                sums = stored.setdefault(UsageSlot(tenant, by, int(hour), part or ""), [0, 0])
                sums[0] += count
                sums[1] += rows
        # Sorted, so that each batch changes a range of the table, with few pages.
        rest = iter(sorted(UsageCount(slot, *sums) for slot, sums in stored.items()))
        while batch := list(islice(rest, _COUNTS_AT_ONCE)):
            self._batches.append(batch)

    def _next_batch(self) -> None:
        self._batches.popleft()
        self._sequence += 1

    def _flush_regularly(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(self._seconds)
            self._wake.clear()
            self._try_flush()

    def _try_flush(self) -> None:
        try:
            self.flush()
            self._is_failing = False
        except Exception as error:
            if not self._is_failing:
                is_defect = not isinstance(error, LoraplexError)
                log.warning("the usage cannot be stored now, and is kept in memory: %s", error, exc_info=is_defect)
            self._is_failing = True
            if self._batches and self._monotonic() - self._taken_at > LONGEST_REPETITION_SECONDS:
                log.error("the usage of some requests could not be stored for a day, and is lost")
                self._next_batch()
