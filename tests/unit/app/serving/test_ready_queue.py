"""Tenants and entries have fair shares of each batch, counted in rows."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adapters.access.grants import Caller, Grant
from app.serving.queue_entry import QueueEntry
from app.serving.ready_queue import ReadyQueue, fair_shares
from app.serving.request import InferenceRequest

NOW = 0.0


def _entry(tenant: str, rows: int = 1) -> QueueEntry:
    request = InferenceRequest(np.zeros((rows, 2), np.float32), [None])
    grant = Grant(Caller(None, tenant, frozenset()))
    return QueueEntry(request, grant, lambda: None, wait_seconds=60, disconnected=None)


def _take(queue: ReadyQueue, room: int) -> Counter[str]:
    """Take a batch, put back the entries that have rows left, and return the rows of each tenant."""
    slices = queue.take(room, NOW)
    assert len({id(part.entry) for part in slices}) == len(slices)
    for part in slices:
        if part.entry.rows_left:
            queue.add(part.entry)
    rows: Counter[str] = Counter()
    for part in slices:
        rows[part.entry.grant.caller.tenant] += part.end - part.begin
    return rows


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(12, 100))
def test_shares_use_all_of_the_room_and_only_a_smaller_request_gets_less(rows: list[int], room: int) -> None:
    shares = fair_shares(rows, room)
    assert sum(shares) == min(room, sum(rows))
    assert all(1 <= share <= number for share, number in zip(shares, rows, strict=True))
    # Whoever does not get all of its rows has as many as anybody, up to the remainder of a division.
    short = [share for share, number in zip(shares, rows, strict=True) if share < number]
    assert not short or min(short) >= max(shares) - 1


def test_one_row_of_a_quiet_tenant_joins_the_next_batch() -> None:
    queue = ReadyQueue()
    busy = [_entry("busy", 1 + number % 3) for number in range(1000)]
    for entry in busy:
        queue.add(entry)
    assert _take(queue, 8) == {"busy": 8}
    row = _entry("quiet")
    queue.add(row)
    assert _take(queue, 8) == {"quiet": 1, "busy": 7}
    assert row.rows_left == 0


def test_tenants_with_backlogs_get_as_many_rows_however_many_requests_they_send() -> None:
    queue = ReadyQueue()
    for _ in range(100):
        queue.add(_entry("many small"))
    for tenant in ("one large", "another"):
        queue.add(_entry(tenant, 100))
    taken = sum((_take(queue, 10) for _ in range(6)), Counter[str]())
    # The remainder of each batch goes to each in turn.
    assert taken == {"many small": 20, "one large": 20, "another": 20}


def test_more_tenants_than_rows_take_turns() -> None:
    queue = ReadyQueue()
    tenants = [f"t{number}" for number in range(6)]
    for tenant in tenants:
        queue.add(_entry(tenant, 9))
    assert [sorted(_take(queue, 4)) for _ in range(3)] == [
        ["t0", "t1", "t2", "t3"],
        ["t0", "t1", "t4", "t5"],
        ["t2", "t3", "t4", "t5"],
    ]


def test_entries_that_have_ended_take_no_rows_from_their_tenant() -> None:
    queue = ReadyQueue()
    entries = [_entry(tenant) for tenant in ("busy", "quiet") for _ in range(6)]
    for entry in entries:
        queue.add(entry)
    for entry in entries[:4]:
        entry.cancel()
    assert _take(queue, 4) == {"busy": 2, "quiet": 2}
    assert _take(queue, 4) == {"quiet": 4}
    assert (queue.rows, bool(queue)) == (0, False)
