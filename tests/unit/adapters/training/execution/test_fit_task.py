"""A fit on a node, with a child process that is played: what is sent, and what is kept for the next task."""

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from adapters.errors import StorageFull
from adapters.storage.blob_location import BlobLocation
from adapters.training.execution import fit_task
from adapters.training.execution.fit_client import Done, Failed, FitRequest, FitterDied, Frame, Note, ShareRows
from adapters.training.execution.fit_task import (
    OUT_OF_MEMORY,
    FitProcess,
    ItemKind,
    WriteRows,
    frame_from_bytes,
    frame_to_bytes,
    run_fit,
    write_checkpoint,
)
from tests.support.catalog_factories import training_job
from tests.support.deadlines import scaled

REQUEST = FitRequest(job=training_job(), base="sha256:0", feature_space=None, data="blob", done=(1,))
PROCESS = FitProcess(
    base={"source": "zeros:2,2"}, blobs=BlobLocation(folder=Path()), threads=1, memory_bytes=1, stopped_seconds=1.0
)


class _PlayedFitter:
    """Fitter that plays frames; a string is a checkpoint that the fit writes, and an exception is raised."""

    def __init__(self, script: Sequence[Frame | str | Exception | None]) -> None:
        self.script, self.kills, self.requests = [*script], 0, list[tuple[FitRequest, bytes | None]]()
        self.rows: ShareRows | None = None
        self._checkpoint = Path()

    def is_ready(self, _seconds: float) -> bool:
        return True

    def begin(self, request: FitRequest, *, checkpoint: Path, rows: ShareRows | None = None) -> None:
        self._checkpoint, self.rows = checkpoint, rows
        self.requests.append((request, checkpoint.read_bytes() if checkpoint.exists() else None))

    def next_frame(self, _seconds: float) -> Frame | None:
        played = self.script.pop(0)
        if isinstance(played, Exception):
            raise played
        if isinstance(played, str):
            self._checkpoint.write_text(played)
            logging.getLogger("adapters.test").warning("a checkpoint was written")
            return None
        return played

    def kill(self) -> None:
        self.kills += 1


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    fit_task._KEPT.clear()
    yield
    fit_task._KEPT.clear()


def _run(
    fitter: _PlayedFitter, *, checkpoint: bytes | None = None, write_rows: WriteRows | None = None,
    on_item: Callable[[ItemKind], None] = lambda _kind: None,
) -> list[tuple[ItemKind, bytes]]:  # fmt: skip
    """The items of a fit."""
    items = list[tuple[ItemKind, bytes]]()

    def send(kind: ItemKind, content: bytes) -> None:
        items.append((kind, content))
        on_item(kind)

    text = PROCESS.to_json()
    fit_task._KEPT[text] = fitter  # type: ignore[assignment]
    request = json.dumps(REQUEST.to_json()).encode()
    run_fit(text, request, share=(1, 3), done=[4, 5], checkpoint=checkpoint, send=send, write_rows=write_rows)
    assert items.pop(0) == (ItemKind.ALIVE, b"")
    return items


def test_frames_checkpoints_and_lines_of_the_log_are_sent_in_order() -> None:
    note, done = Note(text="begun"), Done(metrics={"loss": 0.5}, contents=[b"adapter"])
    fitter = _PlayedFitter([note, "state", None, done])
    assert _run(fitter, checkpoint=b"earlier") == [
        (ItemKind.FRAME, frame_to_bytes(note)),
        (ItemKind.CHECKPOINT, b"state"),
        (ItemKind.LOG, b"a checkpoint was written"),
        (ItemKind.ALIVE, b""),
        (ItemKind.ALIVE, b""),
        (ItemKind.FRAME, frame_to_bytes(done)),
    ]
    ((request, checkpoint),) = fitter.requests
    assert (request.share, request.done, checkpoint) == ((1, 3), (1, 4, 5), b"earlier")
    assert fitter.kills == 0


def test_a_task_that_writes_its_rows_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_task, "_SECONDS_BETWEEN_ITEMS", 0.01)
    fitter, sent = _PlayedFitter([Done(metrics={})]), threading.Semaphore(0)

    def write_rows(path: Path) -> ShareRows:
        # The first item is sent before the rows are written.
        assert all(sent.acquire(timeout=scaled(10.0)) for _ in range(3))
        return ShareRows(str(path), 2, 5)

    items = _run(fitter, write_rows=write_rows, on_item=lambda _kind: sent.release())
    assert [kind for kind, _ in items[:2]] == [ItemKind.ALIVE] * 2
    assert fitter.rows is not None
    assert fitter.rows[1:] == (2, 5)


def test_rows_that_cannot_be_written_are_the_error_after_the_lines_of_the_log() -> None:
    def write_rows(_path: Path) -> ShareRows:
        logging.getLogger("adapters.test").warning("the disk has little space")
        raise StorageFull("the disk is full")

    log, failed = _run(_PlayedFitter([]), write_rows=write_rows)
    assert log == (ItemKind.LOG, b"the disk has little space")
    frame = frame_from_bytes(failed[1])
    assert isinstance(frame, Failed)
    assert frame.error["code"] == "storage_full"


def test_a_death_is_sent_with_its_reason() -> None:
    for out_of_memory, content in ((True, OUT_OF_MEMORY), (False, b"")):
        fitter = _PlayedFitter([FitterDied(out_of_memory=out_of_memory)])
        assert _run(fitter) == [(ItemKind.DIED, content)]
        assert fitter.kills == 1


def test_a_process_whose_fit_failed_is_not_kept() -> None:
    fitter = _PlayedFitter([Failed(error={"code": "out_of_memory"})])
    assert [kind for kind, _ in _run(fitter)] == [ItemKind.FRAME]
    assert fitter.kills == 1


def test_a_task_that_cannot_send_ends_the_process() -> None:
    fitter = _PlayedFitter([Note(text="never arrives")])
    fit_task._KEPT[PROCESS.to_json()] = fitter  # type: ignore[assignment]

    def refuse(_kind: ItemKind, _content: bytes) -> None:
        raise ConnectionError

    request = json.dumps(REQUEST.to_json()).encode()
    with pytest.raises(ConnectionError):
        run_fit(PROCESS.to_json(), request, share=(0, 1), done=[], checkpoint=None, send=refuse)
    assert fitter.kills == 1


def test_folders_of_tasks_that_were_killed_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "from adapters.training.execution import fit_task; print(fit_task._new_folder()[0]); input()"
    python = partial(subprocess.Popen, [sys.executable, "-c", code], text=True, stdin=subprocess.PIPE)
    with python(stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": str(tmp_path)}) as running:
        assert running.stdout is not None
        folder = Path(running.stdout.readline().strip())
        (folder / "rows").write_text("large")
        _run(_PlayedFitter([Done(metrics={})]))
        assert [*tmp_path.iterdir()] == [folder]
        running.kill()
        running.wait()
        _run(_PlayedFitter([Done(metrics={})]))
    assert [*tmp_path.iterdir()] == []


def test_a_folder_without_a_lock_is_removed_by_its_own_task_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as without_locks:

        def refuse(_number: int, _how: int) -> None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        without_locks.setattr(fcntl, "flock", refuse)
        with fit_task._fit_folder() as other:
            _run(_PlayedFitter([Done(metrics={})]))
            assert [*tmp_path.iterdir()] == [other]
        assert [*tmp_path.iterdir()] == []
        unlocked, lock = fit_task._new_folder()
    # That of an earlier release, which locks nothing.
    earlier = tmp_path / "loraplex-fit-1"
    earlier.mkdir()
    _run(_PlayedFitter([Done(metrics={})]))
    assert lock is None
    assert {*tmp_path.iterdir()} == {unlocked, earlier}


def test_the_process_of_another_configuration_ends() -> None:
    other = _PlayedFitter([])
    fit_task._KEPT["other"] = other  # type: ignore[assignment]
    assert fit_task._kept_fitter(PROCESS.to_json()) is fit_task._kept_fitter(PROCESS.to_json())
    assert other.kills == 1


def test_configuration_and_frames_survive_the_journey() -> None:
    assert FitProcess.from_json(PROCESS.to_json()) == PROCESS
    done = Done(metrics={}, contents=[b"one", b"two"], also=["evidence"])
    content = frame_to_bytes(done)
    assert frame_to_bytes(frame_from_bytes(content)) == content
    assert frame_from_bytes(content).contents == done.contents
    with pytest.raises(ValueError, match="within a frame"):
        frame_from_bytes(frame_to_bytes(done)[:-1])


def test_a_checkpoint_that_cannot_be_written_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path / "checkpoints" / "job.1.safetensors", b"state")
    assert (tmp_path / "checkpoints" / "job.1.safetensors").read_bytes() == b"state"
    (tmp_path / "file").touch()
    write_checkpoint(tmp_path / "file" / "job.1.safetensors", b"state")
    assert "no checkpoint is written" in caplog.text
