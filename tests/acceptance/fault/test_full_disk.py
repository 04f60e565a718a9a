"""A disk that is full for a while under mixed load: changes are refused with a code, and go on afterwards.

`FAULT_FULL_DISKS` is how often the disk is full.
"""

import errno
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.maintenance.doctor import diagnose
from tests.acceptance.crash.invariants import check_after_restart, check_at_the_end
from tests.acceptance.crash.ledger import Ledger
from tests.acceptance.crash.load import Load
from tests.acceptance.crash.oracle import BASE
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_count, chosen_seed, recorded
from tests.support.service import ServiceProcess, eventually

pytestmark = pytest.mark.slow

TIMES = chosen_count("FAULT_FULL_DISKS", 1)
_DISK_MIB = 64
_LONGEST_LOAD_SECONDS = 2.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode != 0:
        # A right that most containers lack, so that `TESTS_NEED_ALL` does not ask for it.
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.timeout(scaled(240 + 30 * TIMES))
def test_nothing_is_lost_on_a_disk_that_is_full_and_is_emptied(disk: Path) -> None:
    seed = chosen_seed()
    draw = random.Random(seed)
    ledger = Ledger(random.Random(draw.getrandbits(64)), writers=3, names=3)
    with recorded("full disk", seed) as counts:
        try:
            with ServiceProcess(
                disk / "data", base=BASE, workers=2 if TIMES > 2 else 1, lease_seconds=2, max_queued_jobs=1000
            ) as service:
                for _ in range(TIMES):
                    _fill_and_empty(disk / "filler", service, ledger, draw)
                    counts["times"] += 1
                    check_after_restart(service, ledger)
                check_at_the_end(service, ledger, failures=("storage_full",))
            assert diagnose(disk / "data").findings == []
        finally:
            counts.update(ledger.counts)
        assert counts["changes refused: storage_full"] > 0, counts


def _fill_and_empty(filler: Path, service: ServiceProcess, ledger: Ledger, draw: random.Random) -> None:
    """Let the disk be full under load, and wait for a change once it is not."""
    load = Load(service, ledger, draw.getrandbits(64))
    try:
        load.failed.wait(draw.uniform(0.2, _LONGEST_LOAD_SECONDS))
        _fill(filler)
        load.failed.wait(draw.uniform(0.2, _LONGEST_LOAD_SECONDS))
        filler.unlink()
        before = ledger.counts["changes acknowledged"]
        eventually(
            lambda: load.failed.is_set() or ledger.counts["changes acknowledged"] > before,
            what="a change after the disk was emptied",
        )
    finally:
        load.end()


def _fill(file: Path) -> None:
    """Write until the disk is full."""
    with file.open("wb", buffering=0) as filler:
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    filler.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
