"""`loraplex serve` and `loraplex trainer` on a folder that was made for another base layer."""

from pathlib import Path

import pytest

from tests.support.long_jobs import submit
from tests.support.process_tree import TrainerProcess
from tests.support.service import ServiceProcess, eventually

pytestmark = pytest.mark.slow

FACTORS = {"A": [[1.0], [2.0]], "B": [[1.0] * 10]}


def _warnings(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "another base layer" in line]


def test_they_say_so_once_at_their_start(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with ServiceProcess(folder, base="random:10,2,42", trainers=0) as first:
        for name in ("acme", "globex"):
            first.client.put(f"/adapters/{name}", json=FACTORS).raise_for_status()
        submit(first.client, "acme")
        made_for = first.client.get("/base").json()["fingerprint"]
    assert _warnings(first.log) == []
    with ServiceProcess(folder, base="random:10,2,43", workers=2) as second:
        eventually(lambda: len(_warnings(second.log)) == 2, what="two warnings")
        assert second.client.get("/adapters").json()["data"][0]["problem"] == "base_mismatch"
    adapters, jobs = _warnings(second.log)
    assert "2 live adapters were made for another base layer" in adapters
    assert "base_mismatch" in adapters
    assert "1 queued job is for another base layer" in jobs
    for line in (adapters, jobs):
        assert made_for in line
        assert '"level":"warning"' in line
    with TrainerProcess(folder, base="random:10,2,43") as trainer:
        eventually(lambda: _warnings(trainer.log), what="a warning")
    assert "1 queued job is for another base layer" in _warnings(trainer.log)[0]
