"""Ten thousand tenants, and memory for a hundred of them: right answers all the same, and no more memory than that."""

# I in_features · O out_features · R rank
import json
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from adapters.catalog.catalog import Catalog
from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import load_base_layer
from tests.support.concurrent_clients import outputs, publish
from tests.support.dense_oracle import relative_error
from tests.support.process_tree import WORKER, the
from tests.support.service import ServiceProcess

pytestmark = pytest.mark.slow

ADAPTERS, RESIDENT = 10_000, 100
BASE = "random:576,64,5"
I, O, R = 576, 64, 8
BYTES_EACH = 4 * R * (I + O)
MIB = 2**20
ASKED = 5_000
MOST_GROWTH = ASKED * BYTES_EACH // 2
"""What the worker may grow by: what it remembers of names, and an allocator's leftovers, but not the adapters."""
CLIENTS, SINGLES, ROWS = 4, 400, 100
TOLERANCE = 1e-5

BASE_LAYER = load_base_layer(BASE)
WEIGHT_OI = BASE_LAYER.weight_OI.double().numpy()
X_I = np.array([number % 19 - 9 for number in range(I)])
POOL = torch.randn(ADAPTERS + R * (I + O), generator=torch.Generator().manual_seed(9))
"""Adapter n has the numbers from the n-th on: all of them differ, and none takes long to draw."""


def _adapter(number: int) -> Adapter:
    numbers = POOL[number : number + R * (I + O)]
    return Adapter(numbers[: O * R].view(O, R), numbers[O * R :].view(R, I), None, alpha=float(R))


def _is_right(given_O: Any, number: int) -> bool:
    adapter = _adapter(number)
    delta_OI = adapter.a_OR.double().numpy() @ adapter.b_RI.double().numpy()
    wanted_O = (WEIGHT_OI + delta_OI) @ X_I
    return relative_error(np.array(given_O, dtype=np.float64), wanted_O) < TOLERANCE


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One worker on a catalogue of ten thousand, which are published while it starts: that takes a core each."""
    folder: Path = tmp_path_factory.mktemp("fleet") / "data"
    room = RESIDENT * _adapter(0).memory_bytes
    starting = ServiceProcess(folder, base=BASE, trainers=0, cache_bytes=room, forks=False)
    catalog = Catalog(folder, now=time.time)
    for first in range(0, ADAPTERS, 1000):
        publish(catalog, BASE_LAYER, {f"tenant-{number}": _adapter(number) for number in range(first, first + 1000)})
    catalog.database.close()
    with starting:
        yield starting


def _ask_singly(client: httpx.Client, numbers: Sequence[int]) -> None:
    row = json.dumps(X_I.tolist())
    for number in numbers:
        body = f'{{"adapter": "tenant-{number}", "inputs": [{row}]}}'
        answer = client.post("/predict", content=body, headers={"Content-Type": "application/json"})
        assert _is_right(outputs(answer)[0], number)
        assert answer.json()["adapter"]["name"] == f"tenant-{number}"


def _ask_by_row(client: httpx.Client, numbers: Sequence[int]) -> None:
    body = {"adapters": [f"tenant-{number}" for number in numbers], "inputs": [X_I.tolist()] * len(numbers)}
    for given_O, number in zip(outputs(client.post("/predict", json=body)), numbers, strict=True):
        assert _is_right(given_O, number)


def test_ten_thousand_adapters_answer_right_from_the_memory_of_a_hundred(service: ServiceProcess) -> None:
    assert RESIDENT * BYTES_EACH < MOST_GROWTH / 20
    worker = the(service.process.pid, WORKER)

    def ask(client: httpx.Client, singly: Sequence[int], by_row: Sequence[Sequence[int]]) -> None:
        """Both forms by turns, so that the large requests drive out what the small ones ask for."""
        turns = max(1, len(singly) // max(1, len(by_row)))
        for turn, numbers in enumerate(by_row):
            _ask_by_row(client, numbers)
            _ask_singly(client, singly[turn * turns : (turn + 1) * turns])

    def ask_all(numbers: Sequence[int], draw: random.Random) -> int:
        """Each of them in a row of a large request, others by themselves; returns the worker's bytes in memory."""
        shuffled = draw.sample(numbers, len(numbers))
        large = [shuffled[first : first + ROWS] for first in range(0, len(shuffled), ROWS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            asked = [
                pool.submit(ask, client, draw.choices(numbers, k=SINGLES // CLIENTS), large[place::CLIENTS])
                for place, client in enumerate(clients)
            ]
            for one in asked:
                one.result(100)
        return int(worker.memory_info().rss)

    clients = [service.connect() for _ in range(CLIENTS)]
    try:
        warm = ask_all(range(5 * RESIDENT), random.Random(1))
        after = ask_all(random.Random(2).sample(range(ADAPTERS), ASKED), random.Random(2))
    finally:
        for client in clients:
            client.close()
    print(f"resident after {5 * RESIDENT} adapters: {warm / MIB:.0f} MiB, after {ASKED} more: {after / MIB:.0f} MiB")
    assert after - warm < MOST_GROWTH
