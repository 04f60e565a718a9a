"""When a batch starts, and when those are told that it has no room for."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from adapters.access.grants import OPEN_GRANT
from adapters.errors import QueueFull
from app.service import Service
from app.serving.queue_entry import InferenceResult
from app.serving.request import InferenceRequest
from app.settings import Settings


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """One worker's, without a server in front of it."""
    opened = Service(Settings(data_dir=tmp_path))
    yield opened
    opened.close()


def test_what_a_turn_of_the_loop_brings_joins_the_batch_that_is_about_to_start(service: Service) -> None:
    question = InferenceRequest(np.ones((1, service.base.in_features), np.float32), [None])

    async def scene() -> tuple[InferenceResult, InferenceResult]:
        first = asyncio.create_task(service.batcher.infer(question, OPEN_GRANT))
        await asyncio.sleep(0)
        return await asyncio.gather(first, service.batcher.infer(question, OPEN_GRANT))

    first, second = asyncio.run(scene())
    # To the nanosecond: they were measured once.
    assert first.forward_seconds == second.forward_seconds


@pytest.mark.timing
def test_a_crowd_is_refused_one_by_one_and_none_later_than_it_would_wait(tmp_path: Path) -> None:
    service = Service(Settings(data_dir=tmp_path, queue_rows=1))
    question = InferenceRequest(np.ones((1, service.base.in_features), np.float32), [None])

    async def told(begin: float, timeout_seconds: float | None = None) -> float:
        with pytest.raises(QueueFull):
            await service.batcher.admit("default", timeout_seconds=timeout_seconds)
        return time.monotonic() - begin

    async def scene() -> tuple[list[float], float]:
        # As if a batch were being computed all the time.
        service.batcher._is_running = True
        waiting = asyncio.create_task(service.batcher.infer(question, OPEN_GRANT))
        await asyncio.sleep(0)
        begin = time.monotonic()
        crowd = asyncio.gather(*(told(begin) for _ in range(100)))
        await asyncio.sleep(0)
        brief = await told(begin, timeout_seconds=0.001)
        seconds = await crowd
        waiting.cancel()
        return seconds, brief

    seconds, brief = asyncio.run(scene())
    service.close()
    # 2 ms apart.
    assert seconds[0] < 0.05
    assert seconds[-1] > 0.19
    assert brief < seconds[-1] / 2
    assert seconds == sorted(seconds)
