"""A data set on its way in: from the connection to a file, and from there to the process that reads it."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import IO

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from adapters.datasets.ingest import CONTENT_TYPES, Ingestion, upload_file
from adapters.datasets.store import DatasetVersion
from app.http.bodies import content_type
from app.service import Service

_BYTES_AT_ONCE = 2**20


async def receive_dataset(
    name: str, request: Request, service: Service, precondition: Callable[[bool, str | None], None] | None
) -> tuple[DatasetVersion, bool]:
    """Read the body into a version of `name`; returns it and whether it is new.

    Raises `UnsupportedMediaType`, what the reading raises, and `ClientDisconnect`, which leaves nothing behind.
    """
    kind = content_type(request.headers.get("content-type", ""), *CONTENT_TYPES)
    with upload_file(service.settings.data_dir / "tmp") as raw:
        await _receive(request, raw)
        reading = Ingestion(
            raw,
            CONTENT_TYPES[kind],
            memory_bytes=service.settings.trainer_memory_bytes,
            max_bytes=service.settings.max_dataset_bytes,
        )
        adding = asyncio.create_task(_add(name, reading, kind, service, precondition))
        leaving = asyncio.create_task(_until_client_leaves(request))
        try:
            await asyncio.wait((adding, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not adding.done():
                raise ClientDisconnect
            return adding.result()
        finally:
            leaving.cancel()
            adding.cancel()
            # The file stays open until nobody reads it any more.
            await asyncio.wait((adding,))


async def _add(
    name: str,
    reading: Ingestion,
    kind: str,
    service: Service,
    precondition: Callable[[bool, str | None], None] | None,
) -> tuple[DatasetVersion, bool]:
    async with service.writes.turn(service.readings):
        add = partial(service.datasets.add, name, reading, content_type=kind, precondition=precondition)
        thread = asyncio.create_task(service.writes.run(add))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            # A thread cannot be cancelled: without its child it ends by itself.
            await asyncio.to_thread(reading.cancel)
            await asyncio.wait((thread,))
            thread.exception()
            raise


async def _receive(request: Request, raw: IO[bytes]) -> None:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size >= _BYTES_AT_ONCE:
            await run_in_threadpool(_write, raw, b"".join(parts))
            parts, size = [], 0
    await run_in_threadpool(_write, raw, b"".join(parts))


def _write(raw: IO[bytes], content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[raw.write(view) :]


async def _until_client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
