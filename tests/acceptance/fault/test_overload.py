"""Three and ten times the load that a worker can bear, and clients that are slow or idle.

`FAULT_LOAD_SECONDS` is how long each load lasts.
"""

# N rows · I in_features · O out_features
import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import torch

from tests.acceptance.crash.oracle import Floats
from tests.acceptance.fault.memory_series import MIB
from tests.acceptance.fault.raw_requests import Connection, offer, post_request, trickle
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_count, chosen_seed, recorded
from tests.support.process_tree import workers
from tests.support.service import ServiceProcess, eventually

pytestmark = pytest.mark.slow

_FEW = 3
SECONDS = chosen_count("FAULT_LOAD_SECONDS", _FEW)
IN, OUT, QUEUE_ROWS = 8192, 2048, 32
_BASE = f"random:{IN},{OUT},1"
BODY = {"adapter": None, "inputs": [[1] * IN]}
_CONNECTIONS = 3 * QUEUE_ROWS
_MOST_A_SECOND = 1000
_MOST_MIB = 256
_SLOW_HEADS, _SLOW_BODIES, _IDLE = 100, 50, 500
_PROBE_SECONDS = 5.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A worker with a short queue, whose every row takes milliseconds."""
    folder = tmp_path_factory.mktemp("overload") / "data"
    settings: dict[str, Any] = {"workers": 1, "trainers": 0, "queue_rows": QUEUE_ROWS, "max_batch_rows": 1}
    with ServiceProcess(folder, base=_BASE, **settings) as started:
        yield started


@pytest.fixture(scope="module")
def expected() -> Floats:
    """What the layer answers to a row of ones."""
    torch.manual_seed(1)
    weight_OI: Floats = torch.randn(OUT, IN).numpy().astype(np.float64)
    return np.asarray(weight_OI.sum(axis=1))


@pytest.mark.timeout(scaled(240 + 10 * SECONDS))
@pytest.mark.parametrize("factor", [3, 10] if SECONDS > _FEW else [10])
def test_what_is_more_than_a_worker_can_bear_is_refused_at_once(
    service: ServiceProcess, expected: Floats, factor: int
) -> None:
    request = post_request("/predict", BODY)
    (worker,) = workers(service)
    before = worker.memory_info().rss
    with recorded(f"overload, {factor}-fold", chosen_seed()) as counts:
        # What one connection gets is less than what it can bear, so that the factor is at least this.
        alone = asyncio.run(offer(service.port, request, rate=_MOST_A_SECOND, seconds=2, connections=1))
        bearable = sum(count for (status, _), count in alone.items() if status == 200) / 2
        rate = factor * bearable
        answers = asyncio.run(offer(service.port, request, rate=rate, seconds=SECONDS, connections=_CONNECTIONS))
        for (status, body), count in answers.items():
            counts[f"answered {status}" if status else "not sent: every connection waits"] += count
            if status == 200:
                np.testing.assert_allclose(json.loads(body)["outputs"][0], expected, rtol=1e-3, atol=1e-1)
            elif status:
                assert (status, json.loads(body)["code"]) == (429, "queue_full"), body
        counts["answered a second, alone"] = round(bearable)
        counts["offered a second"] = round(rate)
        counts["answered a second"] = round(counts["answered 200"] / SECONDS)
        counts["MiB more at most, worker"] = (worker.memory_info().rss - before) // MIB
        # On a machine that was busy before and no longer is, the load may be bearable.
        assert counts["answered 429"] > 0 or counts["answered 200"] == answers.total(), counts
        assert counts["answered a second"] > bearable / 10, counts
        assert counts["MiB more at most, worker"] < _MOST_MIB
        assert service.client.post("/predict", json=BODY).status_code == 200
        counts["seconds"] = SECONDS


@pytest.mark.timeout(scaled(240 + 10 * SECONDS))
def test_slow_and_idle_clients_keep_nobody_waiting(service: ServiceProcess) -> None:
    (worker,) = workers(service)
    service.client.get("/healthz")
    descriptors, memory = worker.num_fds(), worker.memory_info().rss
    with recorded("slow and idle clients", chosen_seed()) as counts:
        asyncio.run(_besiege(service, worker, counts))
        assert counts["probes"] > 0
        assert counts["ms at most, probe"] < 1000 * scaled(_PROBE_SECONDS), counts
        counts["MiB more at most, worker"] = (worker.memory_info().rss - memory) // MIB
        assert counts["MiB more at most, worker"] < _MOST_MIB
        eventually(lambda: worker.num_fds() <= descriptors, what="the end of all their connections")
        counts["seconds"] = SECONDS


async def _besiege(service: ServiceProcess, worker: psutil.Process, counts: Counter[str]) -> None:
    """Hold slow and idle connections, and probe the service as another client."""
    head = post_request("/predict", BODY)
    stop = asyncio.Event()
    idle = [await Connection.open(service.port) for _ in range(_IDLE)]
    slow = [
        *(trickle(service.port, head, at_once=1, pause_seconds=0.5, stop=stop) for _ in range(_SLOW_HEADS)),
        *(trickle(service.port, head, at_once=100, pause_seconds=0.5, stop=stop) for _ in range(_SLOW_BODIES)),
    ]
    tasks = [asyncio.create_task(connection) for connection in slow]
    end = time.monotonic() + SECONDS
    async with httpx.AsyncClient(base_url=service.client.base_url, timeout=60) as client:
        while time.monotonic() < end:
            begin = time.monotonic()
            answered = await client.post("/predict", json=BODY)
            assert answered.status_code == 200, answered.text
            counts["probes"] += 1
            counts["ms at most, probe"] = max(counts["ms at most, probe"], round(1000 * (time.monotonic() - begin)))
            counts["descriptors at most"] = max(counts["descriptors at most"], worker.num_fds())
    stop.set()
    for status in await asyncio.gather(*tasks):
        counts[f"slow clients answered {status}" if status else "slow clients not answered"] += 1
        assert status in (0, 200, 408, 503), status
    for connection in idle:
        await connection.close()
