"""Faults of fleets whose rows are sorted on disk: deaths of the fit, cancels, and rows in a bucket.

The fleets are small, and planned as if they did not fit in memory.
"""

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adapters.training.execution import fit_client
from adapters.training.execution.fit_client import Frame, Note, Outcomes
from adapters.training.planning import planner
from adapters.training.planning.estimate import Estimate, estimate_fleet
from adapters.training.scratch import SCRATCH
from app.settings import Settings
from tests.support.long_jobs import versions
from tests.support.object_server import new_url
from tests.support.process_tree import FIT, Process, children
from tests.support.service import eventually, serving, wait_for_job

pytestmark = pytest.mark.slow

INPUTS, OUTPUTS, RANK = 64, 2, 8
SIZES = [8] * 100 + [16] * 100 + [24] * 100
"""Rows of each group."""
PIPE_BYTES = 2**16 + io.DEFAULT_BUFFER_SIZE
"""Bytes that a pipe holds, so that a fit can send them although nobody reads."""
METHODS = ["adamw", "closed_form", "auto"]
Digests = dict[str, tuple[int, str]]
"""Version and digest of each group that is published."""


class Hold:
    """Hold of the frames of a fit after the first one of a kind: what comes next fills the pipe, and the fit waits."""

    current: "Hold | None" = None

    def __init__(self, after: type[Frame]) -> None:
        self.after, self.release = after, threading.Event()
        self.frame: Frame | None = None
        """That after which they are held."""

    @contextmanager
    def holding(self) -> Iterator["Hold"]:
        """Hold the frames of the next fit until the end."""
        Hold.current = self
        try:
            yield self
        finally:
            Hold.current = None
            self.release.set()


@contextmanager
def _can_be_held() -> Iterator[None]:
    """Read frames so that a `Hold` holds them. A reader waits for its next frame in the function that it has called."""
    read = fit_client.Frame.read

    def held_read(file: Any) -> Frame | None:
        if (hold := Hold.current) is not None and hold.frame is not None:
            hold.release.wait()
        frame = read(file)
        if (hold := Hold.current) is not None and hold.frame is None and type(frame) is hold.after:
            hold.frame = frame
        return frame

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_client.Frame, "read", held_read)
        yield


@contextmanager
def _on_disk() -> Iterator[None]:
    """Plan fleets as if they did not fit in memory."""

    def planned(*arguments: Any, **names: Any) -> Estimate:
        return replace(estimate_fleet(*arguments, **names), scratch_bytes=2**20)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "estimate_fleet", planned)
        yield


def _table() -> bytes:
    generator = np.random.default_rng(5)
    groups_N = generator.permutation(np.repeat(np.arange(len(SIZES)), SIZES))
    columns: dict[str, Any] = {"group": groups_N}
    for name, width in (("x", INPUTS), ("y", OUTPUTS)):
        rows = generator.standard_normal(len(groups_N) * width, dtype=np.float32)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(rows), width)
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


@contextmanager
def _service(folder: Path, **settings: Any) -> Iterator[httpx.Client]:
    """Run a service with a trainer and the table."""
    of_service = Settings(base=f"random:{INPUTS},{OUTPUTS},1", data_dir=folder, **settings)
    with _can_be_held(), serving(of_service, trainer=True, own_fitter=True) as (client, _):
        headers = {"Content-Type": "application/vnd.apache.parquet"}
        client.put("/datasets/rows", content=_table(), headers=headers).raise_for_status()
        yield client


def _submit(client: httpx.Client, name: str, method: str) -> str:
    data = {"dataset": "rows", "inputs": {"column": "x"}, "targets": {"column": "y"}, "group_by": "group"}
    training = {"method": method} | ({"epochs": 4, "batch_size": 8} if method == "adamw" else {})
    body = {"name": f"{name}-{{group}}", "rank": RANK, "data": data, "training": training, "publish": "always"}
    return str(client.post("/adapters", json=body).raise_for_status().json()["id"])


def _published(client: httpx.Client, job_id: str) -> Digests:
    query: dict[str, Any] = {"status": "published", "limit": 1000}
    page = client.get(f"/jobs/{job_id}/adapters", params=query).raise_for_status().json()
    return {entry["group"]: (entry["version"], entry["digest"]) for entry in page["data"]}


def _sorting_fits(folder: Path) -> list[Process]:
    """The fits that have a scratch file of this data folder, open or mapped."""
    found, scratch = [], str(folder / SCRATCH)
    for process in children(FIT):
        of_process = Path("/proc") / str(process.pid)
        # Files are closed, and processes end, meanwhile.
        with suppress(OSError):
            paths = []
            for opened in (of_process / "fd").iterdir():
                with suppress(FileNotFoundError):
                    paths.append(os.readlink(opened))
            if scratch in " ".join(paths) + (of_process / "maps").read_text():
                found.append(process)
    return found


def _nothing_is_left(folder: Path) -> None:
    eventually(lambda: not _sorting_fits(folder), what="the end of the scratch files")
    assert list((folder / SCRATCH).iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of the service whose blobs are in it."""
    return tmp_path_factory.mktemp("large") / "data"


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    """A client of that service."""
    with _service(folder) as client:
        yield client


@pytest.fixture(scope="module")
def calm(client: httpx.Client) -> dict[str, Digests]:
    """The digests that each method publishes in an undisturbed run, from rows in memory."""
    jobs = {method: _submit(client, f"calm-{method}", method) for method in METHODS}
    for job_id in jobs.values():
        job = wait_for_job(client, job_id)
        assert job["metrics"] == {"published": len(SIZES), "failed": 0, "total": len(SIZES)}, job
        assert "sorted by group on disk" not in str(job["log"])
    return {method: _published(client, job_id) for method, job_id in jobs.items()}


def _wait_for_first_stack(client: httpx.Client, job_id: str, hold: Hold) -> Digests:
    """Return what of a held fit is published, once all that came before the hold is."""
    stack = eventually(lambda: hold.frame, what="the first stack")
    assert isinstance(stack, Outcomes)
    # The fit cannot have ended.
    assert (len(SIZES) - len(stack.trained)) * len(stack.contents[0]) > PIPE_BYTES
    eventually(lambda: len(_published(client, job_id)) == len(stack.trained), what="its publish")
    return _published(client, job_id)


def _check_killed(client: httpx.Client, folder: Path, name: str, job_id: str, expected: Digests) -> None:
    """Check the end of a fleet whose first fit was killed."""
    job = wait_for_job(client, job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2), job
    assert job["metrics"] == {"published": len(SIZES), "failed": 0, "total": len(SIZES)}
    assert "sorted by group on disk" in str(job["log"])
    # One version each.
    assert _published(client, job_id) == expected
    assert all(versions(client, f"{name}-{group}") == [1] for group in (0, 100, len(SIZES) - 1))
    _nothing_is_left(folder)


@pytest.mark.parametrize("method", METHODS)
def test_after_a_kill_between_stacks_every_group_is_published_once(
    client: httpx.Client, folder: Path, calm: dict[str, Digests], method: str
) -> None:
    name = f"killed-{method}"
    with _on_disk(), Hold(Outcomes).holding() as hold:
        job_id = _submit(client, name, method)
        before = _wait_for_first_stack(client, job_id, hold)
        (fit,) = _sorting_fits(folder)
        fit.kill()
    _check_killed(client, folder, name, job_id, calm[method])
    assert before.items() < calm[method].items()


def test_after_a_kill_before_the_first_stack_every_group_is_published_once(
    client: httpx.Client, folder: Path, calm: dict[str, Digests]
) -> None:
    with _on_disk(), Hold(Note).holding():
        job_id = _submit(client, "early", "adamw")
        # Most often while it sorts; it waits in its first stack at the latest.
        (fit,) = eventually(lambda: _sorting_fits(folder), what="a scratch file")
        fit.kill()
    _check_killed(client, folder, "early", job_id, calm["adamw"])


@pytest.mark.parametrize("method", METHODS)
def test_a_cancel_between_stacks_keeps_what_is_published(
    client: httpx.Client, folder: Path, calm: dict[str, Digests], method: str
) -> None:
    with _on_disk(), Hold(Outcomes).holding() as hold:
        job_id = _submit(client, f"cancelled-{method}", method)
        before = _wait_for_first_stack(client, job_id, hold)
        assert len(_sorting_fits(folder)) == 1
        assert client.post(f"/jobs/{job_id}/cancel").raise_for_status().json()["status"] == "cancelled"
        _nothing_is_left(folder)
    assert wait_for_job(client, job_id)["status"] == "cancelled"
    assert _published(client, job_id) == before
    assert before.items() < calm[method].items()


def test_a_cancel_before_the_first_stack_publishes_nothing(client: httpx.Client, folder: Path) -> None:
    with _on_disk(), Hold(Note).holding():
        job_id = _submit(client, "never", "adamw")
        eventually(lambda: _sorting_fits(folder), what="a scratch file")
        assert client.post(f"/jobs/{job_id}/cancel").raise_for_status().json()["status"] == "cancelled"
        _nothing_is_left(folder)
    assert wait_for_job(client, job_id)["status"] == "cancelled"
    assert _published(client, job_id) == {}
    assert versions(client, "never-0") == []


@pytest.mark.usefixtures("s3")
def test_rows_in_a_bucket_give_the_same_bytes_also_after_a_kill(calm: dict[str, Digests], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with _service(folder, blob_url=new_url(), allow_mixed_storage=True) as client, _on_disk():
        for method in METHODS:
            job_id = _submit(client, f"bucket-{method}", method)
            assert wait_for_job(client, job_id)["status"] == "succeeded"
            assert _published(client, job_id) == calm[method]
            _nothing_is_left(folder)
        with Hold(Outcomes).holding() as hold:
            job_id = _submit(client, "killed", "adamw")
            _wait_for_first_stack(client, job_id, hold)
            (fit,) = _sorting_fits(folder)
            fit.kill()
        _check_killed(client, folder, "killed", job_id, calm["adamw"])
