"""ENOSPC, EIO and EINTR at the storage calls of each change: the answer says truly whether the change is stored.

`FAULT_POINTS=0` tries every call; otherwise it is how many are drawn for each change.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.fault.storage_faults import CHANGES
from tests.support.deadlines import scaled
from tests.support.external_programs import program
from tests.support.fault_results import chosen_count, chosen_seed, recorded

pytestmark = pytest.mark.slow

POINTS = chosen_count("FAULT_POINTS", 1)


@pytest.mark.timeout(scaled(300 if POINTS else 7200))
def test_a_change_whose_storage_fails_once_says_truly_whether_it_is_stored(tmp_path: Path) -> None:
    program("strace")
    seed = chosen_seed()
    wrong: list[str] = []
    for change, results in groupby(_results(tmp_path, seed), lambda result: result["change"]):
        try:
            with recorded(f"storage faults: {change}", seed) as counts:
                _count(results, counts)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


def _results(folder: Path, seed: int) -> Iterator[Mapping[str, Any]]:
    """Yield the results of the points, each with its change."""
    # A process of its own: it forks, and this one has threads. One for all changes, as its imports take seconds.
    command = [sys.executable, "-m", "tests.acceptance.fault.storage_faults", str(folder), str(seed), str(POINTS)]
    change = ""
    with subprocess.Popen([*command, *CHANGES], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for result in map(json.loads, process.stdout):
            change = result.get("change", change)
            yield {"change": change} | result
    assert process.returncode == 0
    assert change == list(CHANGES)[-1]


def _count(results: Iterator[Mapping[str, Any]], counts: Counter[str]) -> None:
    """Count the results of one change; assert that none is wrong."""
    wrong = []
    counts["points that exist"] = next(results)["points"]
    for result in results:
        counts["points"] += result["is_injected"]
        counts["points that the call did not reach"] += not result["is_injected"]
        counts[f"answered {result['outcome'] and result['outcome']['code']}"] += 1
        if result["wrong"] is not None:
            wrong.append(f"{result['change']}, {result['point']}: {result['wrong']}")
    assert not wrong, "\n".join(wrong)
    counts["changes"] = 1
