"""Fixtures that several rooms share."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from app.service import Service
from app.settings import Settings
from tests.support.service import serving

torch.set_num_threads(1)

Serve = Callable[..., tuple[httpx.Client, Service]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start one worker with these settings, in this process; `trainer=True` trains too."""
    with ExitStack() as stack:

        def start(*, trainer: bool = False, **settings: Any) -> tuple[httpx.Client, Service]:
            chosen: dict[str, Any] = {"data_dir": tmp_path / "data", "base": "random:10,2,42"} | settings
            return stack.enter_context(serving(Settings(**chosen), trainer=trainer))

        yield start


@pytest.fixture
def client(serve: Serve) -> httpx.Client:
    """A client of one worker with a random 10 → 2 base layer, without a trainer."""
    return serve()[0]
