"""What becomes of checkpoints: a job that is handed back keeps its own, one that has ended leaves none."""

from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from tests.support.long_jobs import submit, submit_endless
from tests.support.service import eventually, serving

pytestmark = pytest.mark.slow

GOES_ON = "continues from the checkpoint at step "


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _steps_gone_on_from(client: httpx.Client, job_id: str) -> list[int]:
    log = client.get(f"/jobs/{job_id}").json()["log"]
    return [int(line["text"].removeprefix(GOES_ON)) for line in log if line["text"].startswith(GOES_ON)]


def test_they_stay_as_long_as_their_job_may_need_them(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, base="random:10,2,42", lease_seconds=1)
    folder = tmp_path / "checkpoints"
    with serving(settings, trainer=True) as (client, _):
        job_id = submit_endless(client)
        eventually((folder / f"{job_id}.1.safetensors").exists, what="a checkpoint")
        ended = submit(client, "ended")
        client.post(f"/jobs/{ended}/cancel").raise_for_status()
        # As trainers leave them that are killed, whatever becomes of their jobs then.
        for name in (f"{ended}.1.safetensors", f"{ended}.2.tmp", "unknown.1.safetensors"):
            (folder / name).write_bytes(b"left")
        (folder / "notes.txt").write_bytes(b"not ours")
    # The trainer was told to stop: the job is handed back, and the attempt does not count.
    with serving(settings) as (client, _):
        job = client.get(f"/jobs/{job_id}").json()
        assert (job["status"], job["attempt"]) == ("queued", 0)
        assert f"{job_id}.1.safetensors" in _names(folder)
    with serving(settings, trainer=True) as (client, _):
        (step,) = eventually(lambda: _steps_gone_on_from(client, job_id), what="another attempt")
        assert step > 0
        assert client.get(f"/jobs/{job_id}").json()["attempt"] == 1
        client.post(f"/jobs/{job_id}/cancel").raise_for_status()
        eventually(lambda: _names(folder) == {"notes.txt"}, what="the removal of what nobody needs")
