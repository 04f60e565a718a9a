"""An adapter that is not in memory is read once, however many ask for it, and holds nobody else up."""

# I in_features · O out_features
import asyncio
import gc
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest

from adapters.lora.adapter import Adapter
from adapters.names import Reference
from adapters.storage.blobs import FolderBlobs
from app.service import Service
from tests.conftest import Serve
from tests.support import dense_oracle as dense
from tests.support.catalog_factories import BASE, INPUTS_NI, make_adapter, skip_unless_cached
from tests.support.concurrent_clients import Crowd, code, outputs, publish, together
from tests.support.service import eventually

COLD = 20
"""More than any pool has threads that could wait."""
ROWS = INPUTS_NI.tolist()
SEEDS = {"warm": 1, "hot": 2} | {f"cold-{number}": 10 + number for number in range(COLD)}


class Disk:
    """The blobs of some adapters, which nobody gets to read before `give`; who tried, and how often."""

    def __init__(self) -> None:
        self.slow: set[tuple[str, int]] = set()
        self.reads: list[tuple[str, int]] = []
        self.asked = threading.Semaphore(0)
        self._given = threading.Event()

    def hold(self, service: Service, names: Sequence[str]) -> None:
        """From here on reading these takes until `give`."""
        versions = [service.catalog.find(Reference(name), tenant="default") for name in names]
        self.slow = {(version.file, version.offset) for version in versions}

    def wait(self, place: tuple[str, int]) -> None:
        """Where somebody reads at `place`."""
        if place in self.slow:
            self.reads.append(place)
            self.asked.release()
            assert self._given.wait(60)

    def give(self) -> None:
        """Let all that wait read on."""
        self._given.set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A slow one."""
    disk, read, cached = Disk(), FolderBlobs.read, FolderBlobs.read_cached

    def slowly(self: FolderBlobs, name: str, *, offset: int = 0, **part: Any) -> bytes:
        disk.wait((name, offset))
        return read(self, name, offset=offset, **part)

    def never(self: FolderBlobs, name: str, *, offset: int, length: int) -> bytearray | None:
        return None if (name, offset) in disk.slow else cached(self, name, offset=offset, length=length)

    monkeypatch.setattr(FolderBlobs, "read", slowly)
    monkeypatch.setattr(FolderBlobs, "read_cached", never)
    yield disk
    disk.give()


def _serve(serve: Serve) -> tuple[httpx.Client, Service]:
    """A service with all of `SEEDS`, of which `warm` and `hot` have been asked for."""
    client, service = serve()
    publish(service.catalog, service.base, {name: make_adapter(seed) for name, seed in SEEDS.items()})
    for name in ("warm", "hot"):
        client.post("/predict", json={"adapter": name, "inputs": ROWS}).raise_for_status()
    return client, service


def _check(answer: httpx.Response, name: str | None) -> None:
    wanted_NO = dense.answer(BASE, INPUTS_NI, None if name is None else make_adapter(SEEDS[name]))
    np.testing.assert_allclose(outputs(answer), wanted_NO, rtol=1e-5, atol=1e-5)


def _body(name: str | None) -> dict[str, Any]:
    return {"adapter": name, "inputs": ROWS}


@pytest.mark.parametrize("several", [False, True], ids=["one cold adapter", "many cold adapters"])
def test_a_cold_adapter_is_read_once_and_holds_no_warm_one_up(serve: Serve, disk: Disk, several: bool) -> None:
    client, service = _serve(serve)
    names = [f"cold-{number if several else 0}" for number in range(COLD)] * (2 if several else 1)
    disk.hold(service, sorted(set(names)))

    async def scene(crowd: Crowd) -> None:
        waiting = [crowd.begin(_body(name)) for name in names]
        # A request of both waits for the cold one, and the warm one answers others meanwhile.
        mixed = {"adapters": ["warm", names[0], None, "hot", names[0]], "inputs": ROWS}
        both = crowd.begin(mixed)
        assert await asyncio.to_thread(disk.asked.acquire, timeout=30)
        for turn in range(6):
            if turn % 2:
                # From here on what every name means has to be read anew.
                await asyncio.to_thread(publish, service.catalog, service.base, {"other": make_adapter(500 + turn)})
            warm: list[str | None] = ["warm", "hot", None]
            async with asyncio.timeout(5):
                answers = await asyncio.gather(*(crowd.ask(_body(name)) for name in warm))
            for name, answer in zip(warm, answers, strict=True):
                _check(answer, name)
            assert (await crowd.get("/healthz")).status_code == 200
        assert not any(task.done() for task in [both, *waiting])
        disk.give()
        for name, answer in zip(names, await asyncio.gather(*waiting), strict=True):
            _check(answer, name)
        assert (await both).json()["row_adapters"] == [0, 1, None, 2, 1]

    together(client.base_url, scene)
    assert len(disk.reads) == len(disk.slow)
    assert set(disk.reads) == disk.slow


def test_what_the_kernel_has_in_memory_needs_no_thread(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    # Room for a few: asked for in turn, each has left when its turn comes again.
    client, service = serve(cache_bytes=5 * make_adapter(0).memory_bytes)
    publish(service.catalog, service.base, {name: make_adapter(seed) for name, seed in SEEDS.items()})
    for name in SEEDS:
        # What it means is known from here on.
        client.post("/predict", json=_body(name)).raise_for_status()
    skip_unless_cached(service.catalog.blobs.local(service.catalog.find(Reference("warm"), tenant="default").file))

    reads, read = [0], FolderBlobs.read

    def by_a_thread(*arguments: Any, **options: Any) -> bytes:
        reads[0] += 1
        return read(*arguments, **options)

    monkeypatch.setattr(FolderBlobs, "read", by_a_thread)
    missing = set(SEEDS)
    # A kernel that reclaims memory may drop a file, which a thread then reads once.
    for name in [*SEEDS] * 5:
        before = reads[0]
        _check(client.post("/predict", json=_body(name)), name)
        if reads[0] == before:
            missing.discard(name)
    assert not missing


def test_a_read_that_fails_is_everybody_s_error_who_waited_and_is_tried_again(serve: Serve, disk: Disk) -> None:
    client, service = _serve(serve)
    disk.hold(service, ["cold-0"])
    blob = service.catalog.blobs.local(service.catalog.find(Reference("cold-0"), tenant="default").file)
    kept = blob.read_bytes()

    async def scene(crowd: Crowd) -> list[httpx.Response]:
        waiting = [crowd.begin(_body("cold-0")) for _ in range(5)]
        assert await asyncio.to_thread(disk.asked.acquire, timeout=30)
        blob.write_bytes(bytes(len(kept)))
        disk.give()
        return await asyncio.gather(*waiting)

    assert {code(answer) for answer in together(client.base_url, scene)} == {(503, "blob_corrupt")}
    _check(client.post("/predict", json=_body("warm")), "warm")
    blob.write_bytes(kept)
    _check(client.post("/predict", json=_body("cold-0")), "cold-0")


def test_clients_that_leave_while_their_adapter_is_read_harm_nobody(serve: Serve, disk: Disk) -> None:
    client, service = _serve(serve)
    disk.hold(service, ["cold-0"])

    async def scene(crowd: Crowd) -> httpx.Response:
        leaving = [crowd.begin(_body("cold-0")) for _ in range(3)]
        assert await asyncio.to_thread(disk.asked.acquire, timeout=30)
        staying = crowd.begin(_body("cold-0"))
        for task in leaving:
            task.cancel()
        await asyncio.wait(leaving)
        _check(await crowd.ask(_body("warm")), "warm")
        disk.give()
        return await staying

    _check(together(client.base_url, scene), "cold-0")


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Python's garbage collector does not run: what is held by a cycle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_an_adapter_without_room_is_gone_with_the_request_that_asked_for_it(serve: Serve, no_collection: None) -> None:
    client, service = serve(cache_bytes=0)
    publish(service.catalog, service.base, {name: make_adapter(seed) for name, seed in SEEDS.items()})

    def in_memory() -> int:
        return sum(type(thing) is Adapter for thing in gc.get_objects())

    before = in_memory()
    for name in SEEDS:
        client.post("/predict", json=_body(name)).raise_for_status()
        client.post("/predict", json={"adapters": [name, "warm", None, "hot", name], "inputs": ROWS}).raise_for_status()
    # The last of them may still be on its way out, when its answer is here.
    eventually(lambda: in_memory() <= before, seconds=5, what="the end of the adapters")
