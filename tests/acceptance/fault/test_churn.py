"""Uploads, deletions, predictions, trainings and data sets at a moderate rate: memory and descriptors do not grow.

`FAULT_CHURN_MINUTES` is how long the churn is measured; 0 is the short form, which has no slope.
"""

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.acceptance.crash.invariants import check_after_restart, check_at_the_end
from tests.acceptance.crash.ledger import Ledger
from tests.acceptance.crash.load import Load
from tests.acceptance.crash.oracle import BASE
from tests.acceptance.fault.memory_series import MIB, Sampler, Series, slope_per_hour
from tests.support.deadlines import scaled
from tests.support.fault_results import RESULTS, chosen_count, chosen_seed, recorded
from tests.support.service import ServiceProcess

pytestmark = pytest.mark.slow

MINUTES = chosen_count("FAULT_CHURN_MINUTES", 0)
_SECONDS, _WARM_UP_SECONDS = (60.0 * MINUTES, 600.0) if MINUTES else (6.0, 2.0)
_SAMPLE_SECONDS = 5.0 if MINUTES else 0.5
_LAG_SECONDS = 300.0
_MOST_MIB_AN_HOUR = 5.0
_MOST_MORE_DESCRIPTORS = 8 if MINUTES else 64
"""Connections of the clients, and of the catalogue, which has not yet opened all of them in the short form."""
_PAUSE_SECONDS = 0.1


@pytest.mark.timeout(scaled(300 + 3 * (_SECONDS + _WARM_UP_SECONDS)))
def test_memory_and_descriptors_do_not_grow_under_churn(data_folder: Path) -> None:
    seed = chosen_seed()
    draw = random.Random(seed)
    ledger = Ledger(random.Random(draw.getrandbits(64)), writers=3, names=3)
    with recorded("churn", seed) as counts:
        try:
            # Caches that are full after the warm-up, and no trash: what grows afterwards is a leak.
            settings: dict[str, Any] = {
                "base": BASE,
                "workers": 2 if MINUTES else 1,
                "cache_bytes": MIB,
                "trash_days": 0,
                "max_queued_jobs": 1000,
            }
            with ServiceProcess(data_folder, **settings) as service:
                load = Load(service, ledger, draw.getrandbits(64), pause_seconds=_PAUSE_SECONDS)
                try:
                    load.failed.wait(_WARM_UP_SECONDS)
                    sampler = _sample(service, load)
                finally:
                    load.end()
                check_after_restart(service, ledger)
                check_at_the_end(service, ledger)
        finally:
            counts.update(ledger.counts)
        if RESULTS in os.environ:
            sampler.write(Path(os.environ[RESULTS]).with_name(f"churn-{seed}.csv"))
        whole = [series for series in sampler.series.values() if series.seconds[0] < 2 * _SAMPLE_SECONDS]
        assert {"supervisor", "worker", "trainer"} <= {series.role for series in whole}
        wrong = [text for series in whole for text in _growth(series, counts)]
        assert not wrong, "\n".join(wrong)
        counts["minutes"] = MINUTES


def _sample(service: ServiceProcess, load: Load) -> Sampler:
    sampler = Sampler(service.process.pid)
    sampler.sample()
    while sampler.series[service.process.pid].seconds[-1] < _SECONDS:
        if load.failed.wait(_SAMPLE_SECONDS):
            break
        sampler.sample()
    return sampler


def _growth(series: Series, counts: Counter[str]) -> list[str]:
    """Record how a process grows, and return what is too much."""
    wrong = []
    role = series.role
    counts[f"MiB at most, {role}"] = max(counts[f"MiB at most, {role}"], round(max(series.resident)))
    # The last tenth against the first: single samples have the connections of the moment.
    tenth = max(len(series.descriptors) // 10, 1)
    more = max(series.descriptors[-tenth:]) - max(series.descriptors[:tenth])
    if more > _MOST_MORE_DESCRIPTORS:
        wrong.append(f"the {role} has {more} more descriptors at the end")
    if MINUTES and np.ptp(series.seconds) > _SECONDS / 2:
        slope = slope_per_hour(series.seconds, series.memory, lag_seconds=_LAG_SECONDS)
        key = f"KiB an hour, upper end, {role}"
        counts[key] = max(counts.get(key, round(1024 * slope.high)), round(1024 * slope.high))
        if slope.high >= _MOST_MIB_AN_HOUR:
            wrong.append(f"the {role} grows by {slope.value:.2f} MiB an hour ({slope.low:.2f} to {slope.high:.2f})")
    return wrong
