"""Ready queue: entries whose adapters are loaded, and the fair shares that tenants and entries have of a batch."""

from collections import deque
from collections.abc import Sequence
from itertools import islice
from operator import itemgetter

from app.serving.queue_entry import EntrySlice, QueueEntry


def fair_shares(rows: Sequence[int], room: int) -> Sequence[int]:
    """Divide a batch of `room` rows: return how many rows of each claimant it takes, of those that it has.

    The shares are max-min fair (Bertsekas and Gallager, Data Networks, section 6.5.2). What a claimant with few rows
    leaves of its share is divided between the others. The first claimants get the remainder.
    """
    if sum(rows) <= room:
        return rows
    shares = [0] * len(rows)
    unsatisfied: Sequence[int] = range(len(rows))
    while room:
        share = max(1, room // len(unsatisfied))
        for index in unsatisfied[:room]:
            more = min(share, rows[index] - shares[index])
            shares[index] += more
            room -= more
        unsatisfied = [index for index in unsatisfied if shares[index] < rows[index]]
    return shares


class _TenantQueue:
    """Entries of one tenant, in the order of arrival."""

    __slots__ = ("entries", "rows")

    def __init__(self) -> None:
        self.entries: deque[QueueEntry] = deque()
        # Rows left of these entries. Entries that have ended count until `take` drops them.
        self.rows = 0

    def take(self, room: int, now: float) -> list[EntrySlice]:
        """Remove entries and return slices of them, with at most `room` rows; drop entries that have ended."""
        entries: list[QueueEntry] = []
        while self.entries and len(entries) < room:
            entry = self.entries.popleft()
            if entry.end_if_overdue(now):
                self.rows -= entry.rows_left
            else:
                entries.append(entry)
        left = [entry.rows_left for entry in entries]
        self.rows -= sum(left)
        shares = fair_shares(left, room)
        return [entry.take(rows, now) for entry, rows in zip(entries, shares, strict=True)]


class ReadyQueue:
    """Entries of all tenants that can join a batch. The rows of a batch are divided fairly between the tenants.

    A tenant with no more rows than its share therefore waits for one batch at most, however many rows others have. If
    there are more tenants than a batch has rows, they take turns.
    """

    def __init__(self) -> None:
        # The first tenants get the remainder of a batch. A tenant without entries keeps its position for one batch, in
        # which the rest of its last entry may come back.
        self._tenants: dict[str, _TenantQueue] = {}
        # Rows left of all entries.
        self.rows = 0

    def __bool__(self) -> bool:
        return self.rows > 0

    def clear(self) -> list[QueueEntry]:
        """Remove all entries, and return them."""
        entries = [entry for queue in self._tenants.values() for entry in queue.entries]
        self._tenants.clear()
        self.rows = 0
        return entries

    def add(self, entry: QueueEntry) -> None:
        """Add an entry, behind the others of its tenant."""
        tenant, rows = entry.tenant, entry.rows_left
        queue = self._tenants.get(tenant)
        if queue is None:
            queue = self._tenants[tenant] = _TenantQueue()
        queue.entries.append(entry)
        queue.rows += rows
        self.rows += rows

    def take(self, room: int, now: float) -> list[EntrySlice]:
        """Remove entries and return slices of them for a batch of at most `room` rows that begins `now`.

        After the batch, the caller adds the entries with rows left again.
        """
        if len(self._tenants) == 1:  # the common case, without the shares of tenants
            (queue,) = self._tenants.values()
            slices = queue.take(room, now)
            self.rows = queue.rows
            return slices
        self._tenants = {tenant: queue for tenant, queue in self._tenants.items() if queue.entries}
        tenants = list(islice(self._tenants, room))
        shares = fair_shares([self._tenants[tenant].rows for tenant in tenants], room)
        slices = []
        # The tenants that get the fewest rows are the first of the next batch, behind those that got none.
        for share, tenant in sorted(zip(shares, tenants, strict=True), key=itemgetter(0)):
            queue = self._tenants.pop(tenant)
            self.rows -= queue.rows
            slices += queue.take(share, now)
            self.rows += queue.rows
            self._tenants[tenant] = queue
        return slices
