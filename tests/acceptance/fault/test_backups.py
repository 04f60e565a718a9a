"""A backup under load, restored: it passes the doctor, and has all that was acknowledged before it began.

`FAULT_BACKUPS` is how many are made.
"""

import random
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import pytest

from adapters.maintenance.backup import back_up
from adapters.maintenance.doctor import diagnose
from adapters.maintenance.restore import restore
from tests.acceptance.crash.invariants import state_of
from tests.acceptance.crash.ledger import Ledger
from tests.acceptance.crash.load import Load
from tests.acceptance.crash.oracle import BASE
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_count, chosen_seed, recorded
from tests.support.service import ServiceProcess, eventually

pytestmark = pytest.mark.slow

BACKUPS = chosen_count("FAULT_BACKUPS", 1)
_LONGEST_LOAD_SECONDS = 2.0


@pytest.mark.timeout(scaled(240 + 60 * BACKUPS))
def test_a_backup_under_load_has_all_that_was_acknowledged_before(tmp_path: Path) -> None:
    seed = chosen_seed()
    draw = random.Random(seed)
    ledger = Ledger(random.Random(draw.getrandbits(64)), writers=3, names=3)
    with recorded("backups under load", seed) as counts:
        try:
            with ServiceProcess(
                tmp_path / "data", base=BASE, workers=2 if BACKUPS > 1 else 1, max_queued_jobs=1000
            ) as service:
                for number in range(BACKUPS):
                    load = Load(service, ledger, draw.getrandbits(64))
                    try:
                        before = ledger.counts["changes acknowledged"]
                        eventually(lambda before=before: ledger.counts["changes acknowledged"] > before)  # type: ignore[misc]
                        load.failed.wait(draw.uniform(0.1, _LONGEST_LOAD_SECONDS))
                        known = {mine.name: len(mine.history) for mine in chain.from_iterable(ledger.uploaded)}
                        jobs = list(ledger.jobs)
                        file = tmp_path / f"{number}.tar"
                        assert back_up(tmp_path / "data", file).damages == ()
                    finally:
                        load.end()
                    _check(file, tmp_path / f"restored-{number}", ledger, known, jobs)
                    counts["backups"] += 1
        finally:
            counts.update(ledger.counts)


def _check(file: Path, folder: Path, ledger: Ledger, known: Mapping[str, int], jobs: Sequence[str]) -> None:
    """Restore a backup, and compare it with what was acknowledged when it began."""
    restore(file, folder)
    assert diagnose(folder).findings == []
    with ServiceProcess(folder, base=BASE, trainers=0) as service:
        for mine in chain.from_iterable(ledger.uploaded):
            versions, _ = state_of(service.client, ledger, mine.name)
            candidates = [dict(state.versions) for state in mine.history[known[mine.name] - 1 :]]
            assert versions in candidates, f"{mine.name} is {versions}, which is none of {candidates}"
        for job_id in jobs:
            assert service.client.get(f"/jobs/{job_id}").status_code == 200, job_id
