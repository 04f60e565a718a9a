"""Frames of the fit process, as the trainer reads them."""

import queue
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.training.execution.fit_client import Frame, _read_frames


def test_the_trainer_learns_of_the_end_after_a_frame_that_cannot_be_read() -> None:
    process: Any = SimpleNamespace(stdout=BytesIO(b'{"kind": "of another version"}\n'))
    frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
    with pytest.raises(KeyError):
        _read_frames(process, frames)
    assert frames.get_nowait() is None
