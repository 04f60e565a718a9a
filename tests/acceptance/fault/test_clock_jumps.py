"""A wall clock that jumps forward and back under mixed load, with libfaketime: every job ends, nothing is lost.

`FAULT_JUMPS` is how often it jumps.
"""

import os
import random
from pathlib import Path

import pytest

from tests.acceptance.crash.invariants import check_after_restart, check_at_the_end
from tests.acceptance.crash.ledger import Ledger
from tests.acceptance.crash.load import Load
from tests.acceptance.crash.oracle import BASE
from tests.support.deadlines import scaled
from tests.support.external_programs import skip_or_fail
from tests.support.fault_results import chosen_count, chosen_seed, recorded
from tests.support.service import ServiceProcess

pytestmark = pytest.mark.slow

_FEW = 2
JUMPS = chosen_count("FAULT_JUMPS", _FEW)
_OFFSETS = (-10 * 365 * 86_400, -8 * 86_400, -3600, -2, 0, 2, 60, 3600, 8 * 86_400, 10 * 365 * 86_400)
"""Seconds that the clock is away from the true time."""


def _library() -> Path:
    """Return the path of libfaketime, for programs with threads."""
    folder = next(Path("/usr/lib").glob("*-linux-gnu*/faketime"), None)
    return folder / "libfaketimeMT.so.1" if folder else skip_or_fail("libfaketime is not installed (Debian: faketime)")


@pytest.mark.timeout(scaled(240 + 10 * JUMPS))
def test_nothing_is_lost_and_every_job_ends_while_the_clock_jumps(tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0s")
    # Only the wall clock jumps. The monotonic one never does.
    environment = {
        "LD_PRELOAD": str(_library()),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_NO_CACHE": "1",
    }
    seed = chosen_seed()
    draw = random.Random(seed)
    # The short form has a smaller load: most of its time goes into the checks at the end.
    size = 2 if JUMPS <= _FEW else 3
    ledger = Ledger(random.Random(draw.getrandbits(64)), writers=size, names=size)
    with recorded("clock jumps", seed) as counts:
        try:
            with ServiceProcess(
                tmp_path / "data",
                preload=environment,
                base=BASE,
                workers=size - 1,
                lease_seconds=2,
                max_queued_jobs=1000,
            ) as service:
                for _ in range(JUMPS):
                    load = Load(service, ledger, draw.getrandbits(64))
                    try:
                        load.failed.wait(draw.uniform(0.2, 1.5))
                        _set_clock(clock, draw.choice(_OFFSETS))
                        counts["jumps"] += 1
                        load.failed.wait(draw.uniform(0.2, 1.5))
                    finally:
                        load.end()
                check_after_restart(service, ledger)
                check_at_the_end(service, ledger)
        finally:
            counts.update(ledger.counts)
        assert counts["changes acknowledged"] >= JUMPS, counts


def _set_clock(clock: Path, offset: int) -> None:
    """Replace the file at once, so that no process reads a part of it."""
    new = clock.with_suffix(".new")
    new.write_text(f"{offset:+d}s")
    os.replace(new, clock)
