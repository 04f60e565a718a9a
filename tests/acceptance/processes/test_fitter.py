"""The process that fits, and the hold on it."""

import io
import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapters.lora.base_layer import load_base_layer
from adapters.storage.blob_location import BlobLocation
from adapters.training.execution.fit_client import ChildFitter, Done, Failed, FitRequest, Frame, _read_frames
from tests.support.catalog_factories import training_job
from tests.support.fork_server import own_starts
from tests.support.service import eventually

pytestmark = pytest.mark.slow


@pytest.fixture
def _own_starts() -> Iterator[None]:
    with own_starts():
        yield


def test_a_base_file_that_was_replaced_under_a_trainer_is_never_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "base.safetensors"
    save_file({"weight": torch.zeros(2, 10)}, file)
    of_the_trainer = load_base_layer(str(file))
    save_file({"weight": torch.ones(2, 10)}, file)
    # A process that fits starts late, after a cancel for one, and reads the file anew.
    fitter = ChildFitter({"source": str(file)}, blobs=BlobLocation(folder=Path()), threads=1, memory_bytes=2**31)
    try:
        fitter.begin(FitRequest(job=training_job(), base=of_the_trainer.fingerprint, feature_space=None, data=""))
        frame = eventually(lambda: fitter.next_frame(0.1), what="a frame")
    finally:
        fitter.kill()
    assert isinstance(frame, Failed)
    assert frame.error["code"] == "base_changed"


@pytest.mark.usefixtures("_own_starts")
def test_it_runs_where_nothing_else_wants_the_core_once_it_has_loaded_what_it_needs() -> None:
    fitter = ChildFitter({"source": "zeros:2,2"}, blobs=BlobLocation(folder=Path()), threads=1, memory_bytes=2**31)
    try:
        process = fitter.start()
        assert os.sched_getscheduler(process.pid) == os.sched_getscheduler(0) != os.SCHED_IDLE
        assert eventually(lambda: fitter.is_ready(0.1), what="a process that fits")
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
    finally:
        fitter.kill()


@pytest.mark.usefixtures("_own_starts")
def test_a_thread_that_has_ended_keeps_no_other_from_that_class(monkeypatch: pytest.MonkeyPatch) -> None:
    fitter = ChildFitter({"source": "zeros:2,2"}, blobs=BlobLocation(folder=Path()), threads=1, memory_bytes=2**31)
    try:
        process = fitter.start()
        ended = str(2**30)  # above every id that the kernel gives
        monkeypatch.setattr(os, "listdir", lambda _folder: [ended, str(process.pid)])
        assert eventually(lambda: fitter.is_ready(0.1), what="a process that fits")
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
    finally:
        fitter.kill()


@pytest.mark.usefixtures("_own_starts")
def test_it_runs_on_systems_without_that_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "SCHED_IDLE", raising=False)
    fitter = ChildFitter({"source": "zeros:2,2"}, blobs=BlobLocation(folder=Path()), threads=1, memory_bytes=2**31)
    try:
        assert eventually(lambda: fitter.is_ready(0.1), what="a process that fits")
    finally:
        fitter.kill()


def test_an_adapter_that_was_cut_off_is_no_adapter() -> None:
    whole = io.BytesIO()
    Done(metrics={}, contents=[b"x" * 1000]).write(whole)
    dying = f"import sys; sys.stdout.buffer.write({whole.getvalue()[:-1]!r})"
    frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
    with subprocess.Popen([sys.executable, "-c", dying], stdout=subprocess.PIPE) as process:
        _read_frames(process, frames)
    assert frames.get_nowait() is None
    assert frames.empty()
