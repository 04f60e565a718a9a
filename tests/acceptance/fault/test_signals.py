"""Processes that are stopped and go on, and a service that is terminated, under mixed load.

`FAULT_SIGTERMS` is how often the service is terminated. Before each, one to three processes are stopped.
"""

import random
import signal
from collections import Counter
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.acceptance.crash.invariants import check_after_restart, check_at_the_end
from tests.acceptance.crash.ledger import Ledger
from tests.acceptance.crash.load import Load
from tests.acceptance.crash.oracle import BASE
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_count, chosen_seed, recorded
from tests.support.process_tree import FIT, TRAINER, WORKER, all_gone, running, session_of, suspended
from tests.support.service import ServiceProcess, eventually

pytestmark = pytest.mark.slow

SIGTERMS = chosen_count("FAULT_SIGTERMS", 1)
LEASE_SECONDS = 1
_LONGEST_LOAD_SECONDS, _LONGEST_STOP_SECONDS = 1.5, 2.5 * LEASE_SECONDS
_MOST_STOPS = 3


@pytest.mark.timeout(scaled(240 + 60 * SIGTERMS))
def test_nothing_acknowledged_is_lost_by_processes_that_stop_or_are_terminated(data_folder: Path) -> None:
    seed = chosen_seed()
    draw = random.Random(seed)
    ledger = Ledger(random.Random(draw.getrandbits(64)), writers=3, names=3)
    with recorded("stops and terminations", seed) as counts:
        try:
            for _ in range(SIGTERMS):
                with _service(data_folder) as service:
                    check_after_restart(service, ledger)
                    for _ in range(draw.randint(1, _MOST_STOPS)):
                        _stop_one(service, ledger, draw, counts)
                    _terminate(service, ledger, draw, counts)
            with _service(data_folder) as service:
                check_after_restart(service, ledger)
                check_at_the_end(service, ledger)
        finally:
            counts.update(ledger.counts)
        assert counts["changes acknowledged"] >= SIGTERMS, counts


def _service(folder: Path) -> ServiceProcess:
    return ServiceProcess(
        folder, base=BASE, workers=2 if SIGTERMS > 1 else 1, lease_seconds=LEASE_SECONDS, max_queued_jobs=1000
    )


def _stop_one(service: ServiceProcess, ledger: Ledger, draw: random.Random, counts: Counter[str]) -> None:
    """Stop a process under load, for less or more than the lease."""
    load = Load(service, ledger, draw.getrandbits(64))
    try:
        load.failed.wait(draw.uniform(0.1, _LONGEST_LOAD_SECONDS))
        module = draw.choice((WORKER, WORKER, TRAINER, FIT))
        processes = running(service.process.pid, module)
        if processes:
            try:
                with suspended(draw.choice(processes)):
                    load.failed.wait(draw.uniform(0.1, _LONGEST_STOP_SECONDS))
            except psutil.NoSuchProcess:
                pass  # A fit ended meanwhile.
            counts[f"stops of {module.rpartition('.')[2]}"] += 1
            counts["stops"] += 1
        load.failed.wait(0.2)
    finally:
        load.end()


def _terminate(service: ServiceProcess, ledger: Ledger, draw: random.Random, counts: Counter[str]) -> None:
    """SIGTERM under load: the service ends well, with all its processes."""
    processes = session_of(service.process.pid)
    load = Load(service, ledger, draw.getrandbits(64))
    try:
        load.failed.wait(draw.uniform(0.1, _LONGEST_LOAD_SECONDS))
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(scaled(60)) == 0
        counts["terminations"] += 1
    finally:
        load.end()
    eventually(lambda: all_gone(processes), what="the end of every process")
