"""Which adapters are in memory, and who may go on using one that is not any more."""

import gc
import os
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import app.serving.batcher
from adapters.catalog.adapter_cache import AdapterCache
from adapters.catalog.catalog import Catalog
from adapters.catalog.versions import Version
from adapters.errors import AdapterNotFound
from adapters.lora.adapter import Adapter
from adapters.lora.forward import mixed_forward
from adapters.names import Reference
from tests.conftest import Serve
from tests.support.catalog_factories import (
    BASE,
    INPUTS_NI,
    as_upload,
    dense_answer,
    make_adapter,
    publication,
    put,
    skip_unless_cached,
)
from tests.support.deadlines import scaled

ADAPTERS = 60
ONE = make_adapter(0).memory_bytes


def _fleet(catalog: Catalog) -> list[str]:
    names = [f"tenant-{seed}" for seed in range(ADAPTERS)]
    catalog.publish([publication(name, seed) for seed, name in enumerate(names)], tenant="default")
    return names


def _load(residency: AdapterCache, version: Version) -> Adapter:
    ((_, adapter),) = residency.load([version])
    assert isinstance(adapter, Adapter)
    return adapter


def _use(residency: AdapterCache, version: Version) -> Adapter:
    adapter = residency.get(version.digest)
    if adapter is None:
        adapter = _load(residency, version)
        residency.add(version.digest, adapter)
    return adapter


@pytest.mark.parametrize("room", [0, 10, ADAPTERS])
def test_it_keeps_to_its_budget_and_answers_right(catalog: Catalog, room: int) -> None:
    names = _fleet(catalog)
    residency = AdapterCache(BASE, catalog.blobs, budget_bytes=room * ONE + ONE // 2)
    loaded: list[weakref.ref[Adapter]] = []
    drawn = set()
    order = random.Random(3)
    for _ in range(2 * ADAPTERS):
        seed = order.randrange(ADAPTERS)
        drawn.add(seed)
        adapter = _use(residency, catalog.find(Reference(names[seed]), tenant="default"))
        answer = mixed_forward(BASE, INPUTS_NI, [adapter], [0] * len(INPUTS_NI))
        torch.testing.assert_close(answer.double(), dense_answer(make_adapter(seed)), rtol=1e-5, atol=1e-5)
        loaded.append(weakref.ref(adapter))
    del adapter
    gc.collect()
    alive = {id(resident) for reference in loaded if (resident := reference()) is not None}
    assert len(alive) == min(room, len(drawn))


def test_the_least_recently_used_leaves_first(catalog: Catalog) -> None:
    a, b, c = (put(catalog, name, seed) for seed, name in enumerate("abc"))
    residency = AdapterCache(BASE, catalog.blobs, budget_bytes=2 * ONE)
    first = _use(residency, a)
    _use(residency, b)
    assert _use(residency, a) is first
    _use(residency, c)
    assert residency.get(b.digest) is None
    assert residency.get(a.digest) is first


def test_one_that_is_larger_than_the_budget_answers_and_drives_nobody_out(catalog: Catalog) -> None:
    small = put(catalog, "small", 1)
    large = catalog.publish([publication("large", adapter=make_adapter(2, rank=50))], tenant="default")[0].version
    residency = AdapterCache(BASE, catalog.blobs, budget_bytes=2 * ONE)
    kept = _use(residency, small)
    assert _use(residency, large).a_OR.equal(make_adapter(2, rank=50).a_OR)
    assert residency.get(large.digest) is None
    assert residency.get(small.digest) is kept


@pytest.mark.parametrize("room", [1, 2, 3])
def test_adapters_of_exactly_the_budget_stay(catalog: Catalog, room: int) -> None:
    *versions, last = (put(catalog, f"tenant-{seed}", seed) for seed in range(room + 1))
    residency = AdapterCache(BASE, catalog.blobs, budget_bytes=room * ONE)
    for version in versions:
        _use(residency, version)
    assert (len(residency), residency.bytes, residency.evictions) == (room, room * ONE, 0)
    _use(residency, last)
    assert (len(residency), residency.bytes, residency.evictions) == (room, room * ONE, 1)


def test_one_of_exactly_the_budget_is_taken_at_once(catalog: Catalog) -> None:
    version = put(catalog, "acme", 1)
    skip_unless_cached(catalog.blobs.local(version.file))
    assert AdapterCache(BASE, catalog.blobs, budget_bytes=version.bytes - 1).load_cached(version) is None
    assert AdapterCache(BASE, catalog.blobs, budget_bytes=version.bytes).load_cached(version) is not None


def test_one_that_is_kept_twice_counts_once(catalog: Catalog) -> None:
    a, b = put(catalog, "a", 1), put(catalog, "b", 2)
    residency = AdapterCache(BASE, catalog.blobs, budget_bytes=2 * ONE)
    for _ in range(3):
        residency.add(a.digest, _load(residency, a))
    _use(residency, b)
    assert residency.get(a.digest) is not None


def test_an_adapter_in_hand_answers_after_it_was_deleted(catalog: Catalog) -> None:
    residency = AdapterCache(BASE, catalog.blobs, budget_bytes=0)
    held = _use(residency, put(catalog, "acme", 1))
    catalog.delete("acme", tenant="default")
    with pytest.raises(AdapterNotFound):
        catalog.find(Reference("acme"), tenant="default")
    answer = mixed_forward(BASE, INPUTS_NI, [held], [0] * len(INPUTS_NI))
    torch.testing.assert_close(answer.double(), dense_answer(make_adapter(1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_a_request_that_has_begun_keeps_its_adapter(serve: Serve, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    # On a thread, so that what happens meanwhile can.
    monkeypatch.setattr(app.serving.batcher, "_INLINE_MULTIPLICATIONS", 0)
    client, _ = serve(cache_bytes=0)
    client.put("/adapters/acme", json=as_upload(make_adapter(1))).raise_for_status()
    reached, may_go_on = threading.Event(), threading.Event()

    def held_up(*arguments: Any) -> torch.Tensor:
        reached.set()
        assert may_go_on.wait(scaled(30))
        return mixed_forward(*arguments)

    with ThreadPoolExecutor(2) as pool:
        with monkeypatch.context() as patched:
            patched.setattr(app.serving.batcher, "mixed_forward", held_up)
            body = {"adapter": "acme", "inputs": INPUTS_NI.tolist()}
            begun = pool.submit(client.post, "/predict", json=body)
            assert reached.wait(scaled(30))
        if change == "deleted":
            client.delete("/adapters/acme").raise_for_status()
        else:
            client.put("/adapters/acme", json=as_upload(make_adapter(2))).raise_for_status()
        later = pool.submit(client.post, "/predict", json=body)
        may_go_on.set()
        answer, after = begun.result(scaled(30)), later.result(scaled(30))
    if change == "deleted":
        assert after.status_code == 404
    else:
        assert after.json()["adapter"]["version"] == 2
    assert answer.status_code == 200
    assert answer.json()["adapter"] == {"name": "acme", "version": 1, "digest": make_adapter(1).digest}
    outputs = torch.tensor(answer.json()["outputs"], dtype=torch.float64)
    torch.testing.assert_close(outputs, dense_answer(make_adapter(1)), rtol=1e-5, atol=1e-5)


def test_what_the_kernel_has_in_memory_is_taken_at_once(catalog: Catalog) -> None:
    version = catalog.find(Reference(_fleet(catalog)[7]), tenant="default")
    skip_unless_cached(catalog.blobs.local(version.file))
    residency = AdapterCache(BASE, catalog.blobs, budget_bytes=100 * ONE)
    adapter = residency.load_cached(version)
    assert adapter is not None
    assert residency.get(version.digest) is adapter
    answer = mixed_forward(BASE, INPUTS_NI, [adapter], [0] * len(INPUTS_NI))
    torch.testing.assert_close(answer.double(), dense_answer(make_adapter(7)), rtol=1e-5, atol=1e-5)


def test_where_the_kernel_cannot_tell_nothing_is_taken_at_once(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = catalog.find(Reference(_fleet(catalog)[7]), tenant="default")
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    residency = AdapterCache(BASE, catalog.blobs, budget_bytes=100 * ONE)
    assert residency.load_cached(version) is None
    assert _load(residency, version).memory_bytes == ONE


def test_what_is_taken_at_once_is_checked_like_everything_else(catalog: Catalog) -> None:
    names = _fleet(catalog)
    version = catalog.find(Reference(names[7]), tenant="default")
    residency = AdapterCache(BASE, catalog.blobs, budget_bytes=100 * ONE)
    path = catalog.blobs.local(version.file)
    content = bytearray(path.read_bytes())
    content[version.offset + version.bytes - 1] ^= 1
    path.write_bytes(content)
    assert residency.load_cached(version) is None
    path.write_bytes(content[: version.offset + version.bytes - 1])
    assert residency.load_cached(version) is None
    path.unlink()
    assert residency.load_cached(version) is None
    assert residency.get(version.digest) is None
    assert (
        AdapterCache(BASE, catalog.blobs, budget_bytes=ONE // 2).load_cached(
            catalog.find(Reference(names[8]), tenant="default")
        )
        is None
    )
