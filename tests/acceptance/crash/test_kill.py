"""`kill -9` of the whole tree at random moments: nothing acknowledged lost, nothing torn, every job ends.

`CRASH_KILLS=50` runs the long form; `FAULT_SEED` repeats the draws of a run that failed.
"""

import os
import random
import threading
from pathlib import Path

import pytest

from tests.acceptance.crash.invariants import check_after_restart, check_at_the_end
from tests.acceptance.crash.ledger import Ledger
from tests.acceptance.crash.load import Load, train_one
from tests.acceptance.crash.oracle import BASE
from tests.support.databases import database_url, forget_machine
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_seed, recorded
from tests.support.service import ServiceProcess
from tests.support.storage_kinds import on_both_storages

pytestmark = [pytest.mark.slow, pytest.mark.soak, on_both_storages]

KILLS = int(os.environ.get("CRASH_KILLS", "2"))
LONG = KILLS > 10
_LONGEST_LOAD_SECONDS = 4.0 if LONG else 2.0
_LONGEST_START_SECONDS = 4.0


@pytest.mark.timeout(scaled(240 + 60 * KILLS))
def test_nothing_acknowledged_is_lost_by_kills_at_random_moments(data_folder: Path) -> None:
    seed = chosen_seed()
    draw = random.Random(seed)
    ledger = Ledger(random.Random(draw.getrandbits(64)), writers=3, names=3)
    with recorded("kills under load", seed) as counts:
        for _ in range(KILLS):
            if LONG and draw.random() < 0.2:
                _kill_while_it_starts(data_folder, draw)
            _load_and_kill(data_folder, ledger, draw)
            counts["kills"] += 1
            if database_url(data_folder) is not None and draw.random() < 0.5:
                # It goes on on another machine.
                forget_machine(data_folder)
        with _service(data_folder) as service:
            check_after_restart(service, ledger)
            check_at_the_end(service, ledger)
        counts.update(ledger.counts)
    for what in ("changes acknowledged", "jobs acknowledged", "batches checked"):
        assert ledger.counts[what] >= KILLS, ledger.counts


def _service(folder: Path) -> ServiceProcess:
    return ServiceProcess(folder, base=BASE, workers=2 if LONG else 1, lease_seconds=1, max_queued_jobs=1000)


def _load_and_kill(folder: Path, ledger: Ledger, draw: random.Random) -> None:
    with _service(folder) as service:
        check_after_restart(service, ledger)
        if draw.random() < 0.5:
            # From here on jobs publish many times a second: the process that fits has started.
            train_one(service.client, ledger)
        load = Load(service, ledger, draw.getrandbits(64))
        try:
            load.failed.wait(draw.uniform(0.1, _LONGEST_LOAD_SECONDS))
        finally:
            service.kill_group()
            load.end()


def _kill_while_it_starts(folder: Path, draw: random.Random) -> None:
    service = _service(folder)
    threading.Event().wait(draw.uniform(0, _LONGEST_START_SECONDS))
    service.kill_group()
    service.close()
