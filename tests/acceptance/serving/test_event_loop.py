"""However heavy the requests are, the loop that answers all of them is free every few milliseconds."""

# I in_features · O out_features · R rank
import http.client
import json
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from adapters.catalog.catalog import Catalog
from adapters.lora.base_layer import load_base_layer
from tests.support.concurrent_clients import JSON, publish
from tests.support.dense_oracle import random_adapter
from tests.support.service import ServiceProcess

pytestmark = pytest.mark.timing

BASE = load_base_layer("random:2048,256,3")
TRIES, CLIENTS, WIDEST_RANK = 50, 2, 2048
LONGEST_RUN_SECONDS = 60
"""A bound for a machine that has much else to do."""
LONGEST_SECONDS = 0.1
MAX_JSON_BYTES = 4 * 2**20
ROWS = MAX_JSON_BYTES // (2 * BASE.in_features + 2) - 1
"""Of digits: as many as fit in the largest body."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One worker with a wide layer, and an adapter that is wider still."""
    folder = tmp_path_factory.mktemp("service") / "data"
    catalog = Catalog(folder, now=time.time)
    publish(catalog, BASE, {"wide": random_adapter(BASE.out_features, BASE.in_features, WIDEST_RANK)})
    catalog.database.close()
    with ServiceProcess(folder, base=BASE.source, trainers=0, max_rank=WIDEST_RANK, forks=False) as started:
        yield started


def _body(kind: str) -> bytes:
    digits = np.random.default_rng(0).integers(0, 10, (ROWS, BASE.in_features)).tolist()
    asked = {"adapter": "wide" if kind == "much to compute" else None, "inputs": digits}
    body = json.dumps(asked, separators=(",", ":")).encode()
    if kind == "refused by its last row":
        body = body.replace(b"]]}", b',"x"]]}')
    assert 0.99 * MAX_JSON_BYTES < len(body) < MAX_JSON_BYTES
    return body


@pytest.mark.parametrize(
    ("kind", "status"), [("much to read", 200), ("much to compute", 200), ("refused by its last row", 422)]
)
def test_the_loop_is_free_while_large_requests_run(service: ServiceProcess, kind: str, status: int) -> None:
    body = _body(kind)
    done = threading.Event()
    answered: list[int] = []

    def ask_on() -> None:
        with service.connect() as client:
            while not done.is_set():
                answered.append(client.post("/predict", content=body, headers=JSON).status_code)

    clients = [threading.Thread(target=ask_on) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    waits: list[float] = []
    # The standard library's: its own time counts as well.
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    try:
        give_up = time.monotonic() + LONGEST_RUN_SECONDS
        while len(waits) < TRIES or (len(answered) < 2 * CLIENTS and time.monotonic() < give_up):
            begin = time.perf_counter()
            connection.request("GET", "/healthz")
            assert connection.getresponse().read()
            waits.append(time.perf_counter() - begin)
    finally:
        done.set()
        connection.close()
        for client in clients:
            client.join(60)
    # Looks follow each other: whoever comes at any moment meets a long wait more often than there are long waits.
    expected = sum(wait**2 for wait in waits) / sum(waits) / 2
    typical = np.median(waits)
    print(f"{kind}: {len(waits)} looks of {typical * 1e3:.1f} ms, at any moment {expected * 1e3:.0f} ms")
    assert len(answered) >= 2 * CLIENTS
    assert set(answered) == {status}
    assert typical < LONGEST_SECONDS / 2
    assert expected < LONGEST_SECONDS
