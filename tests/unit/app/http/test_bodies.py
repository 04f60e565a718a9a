"""Large JSON bodies that wait for the process that reads them."""

import asyncio
import threading
from typing import Any

import pytest

from adapters.errors import RequestTimeout
from adapters.lora.base_layer import BaseLayer
from app.http import bodies as bodies_module
from app.http.bodies import JsonBodies
from app.http.errors import problem
from tests.support.catalog_factories import BASE

LARGE = b"[" + b" " * 2**20 + b"]"


def test_a_large_body_does_not_wait_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(bodies_module, "_MAX_WAIT_SECONDS", 0.1)

    def read(body: bytes, **_: Any) -> object:
        assert release.wait(60)
        return []

    monkeypatch.setattr(bodies_module, "read_in_process", read)
    base: BaseLayer = BASE

    async def check() -> None:
        bodies = JsonBodies(base)
        first = asyncio.create_task(bodies.parse(LARGE))
        await asyncio.sleep(0)
        try:
            with pytest.raises(RequestTimeout, match="other large bodies") as raised:
                async with asyncio.timeout(20):
                    await bodies.parse(LARGE)
        finally:
            release.set()
        answer = problem(raised.value)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert await first == []
        # The slot is free again.
        assert await bodies.parse(LARGE) == []

    asyncio.run(check())
