"""Batches that are computed while the catalogue's revision is being read, as it is on PostgreSQL.

The reading is a future of the test, so that each test says what happens before it ends.
"""

# O out_features
import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.access.grants import OPEN_GRANT
from adapters.arrays import Float32
from adapters.lora.adapter import Adapter
from adapters.names import Reference
from app.service import Service
from app.serving.queue_entry import InferenceResult
from app.serving.request import InferenceRequest
from app.settings import Settings
from tests.support import dense_oracle as dense
from tests.support.concurrent_clients import publish
from tests.support.dense_oracle import random_adapter

OLD, NEW = (random_adapter(2, 10, 3, seed=seed) for seed in (1, 2))
X_1I = np.random.default_rng(3).standard_normal((1, 10)).astype(np.float32)
REQUEST = InferenceRequest(X_1I, [Reference("acme")])


class _Readings:
    """What the batcher waits for instead of the database; and the forward passes that it computed."""

    def __init__(self) -> None:
        self._begun: asyncio.Queue[asyncio.Future[float]] = asyncio.Queue()
        self.forwards = 0

    def begin(self) -> "asyncio.Future[float]":
        reading: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._begun.put_nowait(reading)
        return reading

    async def next(self) -> "asyncio.Future[float]":
        """Return the next reading, when it has begun."""
        return await self._begun.get()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """The service of one worker, with one adapter."""
    opened = Service(Settings(data_dir=tmp_path, base="random:10,2,42"))
    publish(opened.catalog, opened.base, {"acme": OLD})
    yield opened
    opened.close()


@pytest.fixture
def readings(service: Service, monkeypatch: pytest.MonkeyPatch) -> _Readings:
    """The readings of the service's batcher."""
    readings, forward = _Readings(), service.batcher._forward

    def count(*arguments: Any) -> Any:
        readings.forwards += 1
        return forward(*arguments)

    monkeypatch.setattr(service.batcher._loader, "begin_read", readings.begin)
    monkeypatch.setattr(service.batcher, "_forward", count)
    return readings


def _run(
    service: Service, readings: _Readings, meanwhile: Callable[[Coroutine[Any, Any, InferenceResult]], Any]
) -> Any:
    """Answer one request, so that its adapter is in memory, and then run a coroutine with the next one."""

    async def run() -> Any:
        first = asyncio.create_task(service.batcher.infer(REQUEST, OPEN_GRANT))
        (await readings.next()).set_result(0.0)
        await first
        readings.forwards = 0
        return await meanwhile(service.batcher.infer(REQUEST, OPEN_GRANT))

    return asyncio.run(run())


def _expected(service: Service, adapter: Adapter) -> Float32:
    return dense.answer(service.base, torch.from_numpy(X_1I), adapter).astype(np.float32)


def test_a_batch_is_computed_during_the_reading_and_answered_after_it(service: Service, readings: _Readings) -> None:
    async def read(request: Coroutine[Any, Any, InferenceResult]) -> InferenceResult:
        task = asyncio.create_task(request)
        reading = await readings.next()
        await asyncio.sleep(0.01)
        assert readings.forwards == 1
        assert not task.done()
        reading.set_result(0.0)
        return await task

    result = _run(service, readings, read)
    np.testing.assert_allclose(result.outputs_NO, _expected(service, OLD), rtol=1e-5)
    assert readings.forwards == 1
    assert result.queue_seconds < 0.01


def test_what_was_published_during_the_reading_is_used(service: Service, readings: _Readings) -> None:
    async def publish_meanwhile(request: Coroutine[Any, Any, InferenceResult]) -> InferenceResult:
        task = asyncio.create_task(request)
        reading = await readings.next()
        await asyncio.to_thread(publish, service.catalog, service.base, {"acme": NEW})
        reading.set_result(0.0)
        return await task

    result = _run(service, readings, publish_meanwhile)
    assert [version.version for version in result.versions if version is not None] == [2]
    np.testing.assert_allclose(result.outputs_NO, _expected(service, NEW), rtol=1e-5)
    assert readings.forwards == 2


def test_a_request_that_ends_during_the_reading_changes_no_other(service: Service, readings: _Readings) -> None:
    other_1I = -X_1I

    async def cancel_meanwhile(request: Coroutine[Any, Any, InferenceResult]) -> InferenceResult:
        cancelled = asyncio.create_task(request)
        other = InferenceRequest(other_1I, [Reference("acme")])
        task = asyncio.create_task(service.batcher.infer(other, OPEN_GRANT))
        reading = await readings.next()
        cancelled.cancel()
        await asyncio.sleep(0)
        reading.set_result(0.0)
        return await task

    result = _run(service, readings, cancel_meanwhile)
    expected = dense.answer(service.base, torch.from_numpy(other_1I), OLD)
    np.testing.assert_allclose(result.outputs_NO, expected, rtol=1e-5)


def test_a_forecast_is_for_its_own_requests_alone(service: Service, readings: _Readings) -> None:
    publish(service.catalog, service.base, {"other": NEW})

    async def fail_to_make_the_next(request: Coroutine[Any, Any, InferenceResult]) -> InferenceResult:
        # Its only request is cancelled, so that no batch takes this forecast.
        cancelled = asyncio.create_task(request)
        reading = await readings.next()
        cancelled.cancel()
        await asyncio.sleep(0)
        reading.set_result(0.0)
        await asyncio.sleep(0.01)
        other = InferenceRequest(X_1I, [Reference("other")])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.batcher, "_make_forecast", _fail)
            task = asyncio.create_task(service.batcher.infer(other, OPEN_GRANT))
            (await readings.next()).set_result(0.0)
            return await task

    result = _run(service, readings, fail_to_make_the_next)
    np.testing.assert_allclose(result.outputs_NO, _expected(service, NEW), rtol=1e-5)


def _fail(*_: object) -> None:
    raise MemoryError


def test_a_failed_reading_fails_the_requests_whatever_was_computed(service: Service, readings: _Readings) -> None:
    async def fail(request: Coroutine[Any, Any, InferenceResult]) -> None:
        task = asyncio.create_task(request)
        (await readings.next()).set_exception(OSError("gone"))
        with pytest.raises(OSError, match="gone"):
            await task

    _run(service, readings, fail)
