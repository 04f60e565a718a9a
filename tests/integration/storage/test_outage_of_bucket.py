"""An outage of the bucket under load, with the processes of a real service, one of which is killed meanwhile."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable

import httpx
import pytest

from adapters.storage.blob_location import BLOB_CACHE, BlobLocation
from tests.support.catalog_factories import make_adapter
from tests.support.hostile_proxy import HostileProxy, refuse
from tests.support.object_server import objects_in
from tests.support.process_tree import WORKER, children
from tests.support.service import ServiceProcess, eventually

_SECONDS = float(os.environ.get("OUTAGE_SECONDS", "8"))
_WARM = [f"warm-{number}" for number in range(20)]


def _body(seed: int) -> dict[str, object]:
    adapter = make_adapter(seed)
    return {"A": adapter.a_OR.tolist(), "B": adapter.b_RI.tolist()}


def _status(call: Callable[[], httpx.Response]) -> int:
    """The status of an answer; 0 if the connection broke."""
    try:
        return call().status_code
    except httpx.TransportError:
        return 0


def _predict(client: httpx.Client, name: str) -> int:
    return _status(lambda: client.post("/predict", json={"adapter": name, "inputs": [[0.5] * 10]}))


def _publish(client: httpx.Client, name: str, seed: int) -> int:
    return _status(lambda: client.put(f"/adapters/{name}", json=_body(seed)))


@pytest.mark.slow
def test_an_outage_costs_no_warm_answer_and_leaves_no_version_without_bytes(
    proxy: HostileProxy, in_bucket: BlobLocation
) -> None:
    # Not forked: the supervisor has threads of its own, which read the bucket.
    service = ServiceProcess(
        in_bucket.folder,
        forks=False,
        base="random:10,2,42",
        workers=2,
        trainers=0,
        blob_url=in_bucket.url,
        allow_mixed_storage="true",
    )
    try:
        service.wait_until_ready()
        for seed, name in enumerate([*_WARM, "cold"]):
            assert _publish(service.client, name, seed) == 201
        newest = max(objects_in(in_bucket, "blobs"))
        (in_bucket.folder / BLOB_CACHE / newest).unlink()
        answers: Counter[tuple[str, int]] = Counter()
        stop = threading.Event()

        def predict(client: httpx.Client) -> None:
            while not stop.is_set():
                for name in _WARM:
                    answers["warm", _predict(client, name)] += 1

        clients = [service.connect() for _ in range(4)]
        threads = [threading.Thread(target=predict, args=(client,)) for client in clients]
        with proxy.failing(refuse):
            for thread in threads:
                thread.start()
            ends_at, published = time.monotonic() + _SECONDS, 0
            killed = False
            while time.monotonic() < ends_at:
                answers["publish", _publish(service.client, f"new-{published}", published)] += 1
                answers["cold", _predict(service.client, "cold")] += 1
                published += 1
                if not killed and time.monotonic() > ends_at - _SECONDS / 2:
                    os.kill(children(WORKER, service.process.pid)[0].pid, signal.SIGKILL)
                    killed = True
            stop.set()
            for thread, client in zip(threads, clients, strict=True):
                thread.join()
                client.close()
        # Those that were in flight when the worker was killed.
        lost = sum(answers.pop((kind, 0), 0) for kind in ("warm", "cold", "publish"))
        assert lost <= len(threads) + 1
        assert set(answers) == {("warm", 200), ("cold", 503), ("publish", 503)}
        assert answers["warm", 200] > 100
        eventually(lambda: _predict(service.client, "cold") == 200, what="the answer of the cold adapter")
        assert len(service.client.get("/adapters?limit=100").json()["data"]) == len(_WARM) + 1
    finally:
        service.close()
