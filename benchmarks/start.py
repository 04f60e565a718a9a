"""From nothing: start to ready with all adapters published, the first answer of an adapter, and what one takes."""

import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.failures import BenchFailed
from benchmarks.layer_servers import touch
from benchmarks.plan import RANK, WIDE, Plan
from benchmarks.processes import Server, converse, get, start_service
from benchmarks.progress import say
from benchmarks.requests import input_rows, json_request
from benchmarks.stores import base_name, make_store, memory_bytes
from benchmarks.tenants import name_of

SHAPE = WIDE
_WARM_REQUESTS = 100


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """Seconds to ready; milliseconds of cold and warm answers; bytes of a resident adapter."""
    folder.mkdir(parents=True)
    store = make_store(folder / "store", SHAPE, tenants=plan.many_tenants, rank=RANK)
    ready = [_start_to_ready(store) for _ in range(plan.starts)]
    say(f"start: ready after {', '.join(f'{seconds:.2f}' for seconds in ready)} s")
    cold = {"cached": _cold_loads(store, plan, evict=False), "evicted": _cold_loads(store, plan, evict=True)}
    return {
        "layer": str(SHAPE),
        "published": plan.many_tenants,
        "ready_seconds": ready,
        "cold": cold,
        "memory_bytes": memory_bytes(SHAPE, RANK),
        "rss_bytes": _growth(store, plan),
    }


def _start(store: Path) -> tuple[Server, float]:
    server = start_service(store, base_name(SHAPE), cache_bytes=2**31)
    try:
        return server, server.wait_until(get("/readyz"))
    except BaseException:
        server.stop()
        raise


def _start_to_ready(store: Path) -> float:
    server, seconds = _start(store)
    server.stop()
    return seconds


def _cold_loads(store: Path, plan: Plan, *, evict: bool) -> dict[str, list[float]]:
    """Return the milliseconds of the first and of the second answer of many adapters, one after the other.

    With `evict`, the bytes come from the disk, because the page cache is emptied before the first answer.
    """
    server, _ = _start(store)
    rows_NI = input_rows(SHAPE)
    numbers = np.random.default_rng(11).permutation(plan.many_tenants)[: plan.cold_loads + _WARM_REQUESTS]
    cold, warm = [], []
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            for count, number in enumerate(numbers):
                if evict:
                    _forget(store)
                request = json_request(rows_NI[count % len(rows_NI)].tolist(), name_of(int(number)))
                first, second = _milliseconds(connection, request), _milliseconds(connection, request)
                if count >= _WARM_REQUESTS:
                    cold.append(first)
                    warm.append(second)
    finally:
        server.stop()
    say(f"start: cold {np.percentile(cold, 99):.2f} ms at p99, warm {np.percentile(warm, 99):.2f} ms, evict={evict}")
    return {"cold_ms": cold, "warm_ms": warm}


def _milliseconds(connection: socket.socket, request: bytes) -> float:
    begin = time.perf_counter()
    status, _, body = converse(connection, request)
    if status != 200:
        raise BenchFailed(f"/predict answered {status}: {body[:500]!r}")
    return 1000 * (time.perf_counter() - begin)


def _forget(store: Path) -> None:
    """Drop the blobs from the page cache; they are clean, publishing has synced them."""
    for blob in (store / "blobs").iterdir():
        descriptor = os.open(blob, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _growth(store: Path, plan: Plan) -> float:
    """Resident bytes that an adapter adds to the process that answers."""
    server, _ = _start(store)
    first = plan.many_tenants // 3
    try:
        # What the service itself grows by with its first large requests is not the adapters'.
        touch(server.port, SHAPE, range(first))
        before = server.largest_rss()
        touch(server.port, SHAPE, range(first, plan.many_tenants))
        return (server.largest_rss() - before) / (plan.many_tenants - first)
    finally:
        server.stop()
