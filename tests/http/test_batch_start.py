"""When a batch starts."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from app.questions import Question
from app.service import Service, open_service
from app.settings import Settings
from app.tickets import Outcome


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """One worker's, without a server in front of it."""
    opened = open_service(Settings(data_dir=tmp_path))
    yield opened
    opened.close()


def test_what_a_turn_of_the_loop_brings_joins_the_batch_that_is_about_to_start(service: Service) -> None:
    question = Question(np.ones((1, service.base.in_features), np.float32), [None])

    async def scene() -> tuple[Outcome, Outcome]:
        first = asyncio.create_task(service.batcher.ask(question))
        await asyncio.sleep(0)
        return await asyncio.gather(first, service.batcher.ask(question))

    first, second = asyncio.run(scene())
    # To the nanosecond: they were measured once.
    assert first.forward_seconds == second.forward_seconds
