"""Mailbox between the tasks of a cluster and the trainer. It imports little, so that its process starts soon."""

import asyncio
from contextlib import suppress
from typing import NamedTuple

# Bytes in the mailbox from which a task waits: the trainer may publish more slowly than the nodes fit.
_MAX_BYTES = 64 * 2**20


class Item(NamedTuple):
    """Message from a task to the trainer."""

    request: int
    """Number of the request that the task belongs to."""
    share: int
    """Share of the fleet that the task fits."""
    kind: str
    """`fit_task.ItemKind`."""
    content: bytes


class Mailbox:
    """Actor with the items that the trainer has not taken yet."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._bytes = 0
        self._changed = asyncio.Condition()

    async def put(self, item: Item) -> None:
        """Add an item, as soon as there is room for it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._bytes < _MAX_BYTES)
            self._items.append(item)
            self._bytes += len(item.content)
            self._changed.notify_all()

    async def take(self, seconds: float) -> list[Item]:
        """Return all items, oldest first; wait `seconds` for the first one."""
        async with self._changed:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait_for(lambda: self._items)
            items, self._items, self._bytes = self._items, [], 0
            self._changed.notify_all()
            return items
