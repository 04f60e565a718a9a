"""Run the fault harness until every check has been done as often as it has to be.

    python -m scripts.fault                   go on where the last run ended
    python -m scripts.fault kills "clock"     only the checks whose names begin with one of these
    python -m scripts.fault --short           the short form of every check
    python -m scripts.fault --storage cluster  on PostgreSQL and an S3 server that the tests start
    python -m scripts.fault --table           only write the table in docs/reliability.md

Each run of a check has a new seed and appends one line to build/fault/results.jsonl. The lines of all runs are summed,
so that the harness can be interrupted and resumed. A check that has failed is not run again before the next start.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "build" / "fault" / "results.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- results: written by `python -m scripts.fault --table` -->", "<!-- end of the results -->"
_LONGEST_SECONDS = 7200
# Kinds of storage in `tests.support.databases`.
EMBEDDED, CLUSTER = "sqlite", "cluster"
# What the names of counts say of which the largest is shown, and not the sum.
_LARGEST = (" at most", "upper end", " a second")


@dataclass(frozen=True, slots=True)
class Check:
    """Check of the harness, which is a file of tests."""

    name: str
    """Name in the table."""
    tests: str
    """File of its tests, or the id of one."""
    recorded: str
    """Prefix of the names of its lines in the results."""
    unit: str
    """Count that is summed."""
    target: int
    variable: str
    """Environment variable with how much a run does."""
    amount: int
    """Value of that variable in the full form."""
    of_one_machine: str | None = None
    """Why it is not run on PostgreSQL and a bucket; None if it is."""


_FOLDER = "tests/acceptance/fault"
_OVERLOAD = f"{_FOLDER}/test_overload.py"
_REPLICAS = "tests/acceptance/replicas"
_RESTARTS = f"{_REPLICAS}/test_database_restarts.py"
_COHERENCE = f"{_REPLICAS}/test_coherence.py::test_no_acknowledged_change_is_missing"
CHECKS = (
    Check(
        "kill -9 under load", "tests/acceptance/crash/test_kill.py", "kills under load", "kills", 200, "CRASH_KILLS", 20
    ),
    Check(
        "kill -9 of trainers and fits",
        "tests/acceptance/crash/test_training_kills.py",
        "kills of trainers",
        "kills",
        200,
        "TRAINING_KILLS",
        25,
    ),
    Check(
        "SIGTERM under load",
        f"{_FOLDER}/test_signals.py",
        "stops and terminations",
        "terminations",
        50,
        "FAULT_SIGTERMS",
        10,
    ),
    Check(
        "ENOSPC, EIO, EINTR at storage calls",
        f"{_FOLDER}/test_storage_faults.py",
        "storage faults",
        "changes",
        10,
        "FAULT_POINTS",
        0,
        "the calls are those of a file system",
    ),
    Check(
        "full disk",
        f"{_FOLDER}/test_full_disk.py",
        "full disk",
        "times",
        50,
        "FAULT_FULL_DISKS",
        10,
        "the disk is that of the data folder",
    ),
    Check(
        "backups under load",
        f"{_FOLDER}/test_backups.py",
        "backups under load",
        "backups",
        20,
        "FAULT_BACKUPS",
        5,
        "the backup is of one data folder",
    ),
    Check(
        "flipped bits",
        f"{_FOLDER}/test_damage.py",
        "flipped bits",
        "flips",
        1000,
        "FAULT_FLIPS",
        200,
        "the bits are those of files in the data folder",
    ),
    Check(
        "clock jumps",
        f"{_FOLDER}/test_clock_jumps.py",
        "clock jumps",
        "jumps",
        100,
        "FAULT_JUMPS",
        20,
        "a bucket refuses requests that are signed by a wrong clock",
    ),
    Check(
        "steps of the state machine",
        f"{_FOLDER}/test_catalog_machine.py",
        "catalogue machine",
        "steps",
        10_000,
        "FAULT_STEPS",
        2500,
    ),
    Check("fuzz inputs", f"{_FOLDER}/test_fuzz.py", "fuzzing", "inputs", 1_000_000, "FAULT_INPUTS", 50_000),
    Check("Schemathesis cases", f"{_FOLDER}/test_schemathesis.py", "Schemathesis", "cases", 5000, "FAULT_CASES", 2500),
    Check("overload, 3-fold and 10-fold", _OVERLOAD, "overload", "seconds", 120, "FAULT_LOAD_SECONDS", 60),
    Check("slow and idle clients", _OVERLOAD, "slow and idle clients", "seconds", 60, "FAULT_LOAD_SECONDS", 60),
    Check("minutes of churn", f"{_FOLDER}/test_churn.py", "churn", "minutes", 30, "FAULT_CHURN_MINUTES", 30),
    Check(
        "changes asked for on another replica",
        f"{_COHERENCE}_on_the_other_replica",
        "coherence",
        "cases",
        10_000,
        "FAULT_CHANGES",
        10_000,
    ),
    Check(
        "changes around a stop of the other replica",
        f"{_COHERENCE}_on_a_replica_that_was_stopped",
        "stopped coherence",
        "cases",
        1000,
        "FAULT_CHANGES",
        1000,
    ),
    Check(
        "changes with 1 ms more per round trip",
        f"{_COHERENCE}_with_a_slow_network",
        "slow coherence",
        "cases",
        1000,
        "FAULT_CHANGES",
        1000,
    ),
    Check(
        "kill -9 of a replica",
        f"{_REPLICAS}/test_replica_kills.py",
        "kills of replicas",
        "kills",
        100,
        "FAULT_REPLICA_KILLS",
        50,
    ),
    Check(
        "restarts of PostgreSQL",
        f"{_RESTARTS}::test_while_postgresql_is_away_answers_are_503_and_nothing_acknowledged_is_lost",
        "restarts of PostgreSQL",
        "restarts",
        20,
        "FAULT_DATABASE_RESTARTS",
        20,
    ),
    Check(
        "failovers to a standby", f"{_REPLICAS}/test_failover.py", "failovers", "failovers", 10, "FAULT_FAILOVERS", 10
    ),
    Check(
        "seconds of answers from memory",
        f"{_RESTARTS}::test_with_max_stale_seconds_adapters_in_memory_answer_for_that_long_and_say_their_age",
        "answers from memory",
        "seconds",
        30,
        "FAULT_STALE_SECONDS",
        30,
    ),
    Check(
        "seconds without S3",
        f"{_REPLICAS}/test_bucket_outage.py",
        "outage of S3",
        "seconds",
        60,
        "FAULT_BUCKET_SECONDS",
        60,
    ),
    Check(
        "stops in a write",
        f"{_REPLICAS}/test_stopped_writer.py",
        "stops in a write",
        "stops",
        10,
        "FAULT_STOPPED_WRITES",
        10,
    ),
)


def read_results(file: Path = RESULTS) -> list[Mapping[str, Any]]:
    """Return the recorded runs, oldest first. A last line that was cut off by a kill is skipped."""
    runs = []
    for line in file.read_text("utf-8").splitlines() if file.exists() else ():
        try:
            runs.append(json.loads(line))
        except ValueError:
            continue
    return runs


def on_storage(storage: str, runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the runs on a kind of storage."""
    return [run for run in runs if run.get("storage", EMBEDDED) == storage]


def of_check(check: Check, runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the runs of a check."""
    return [run for run in runs if run["check"].startswith(check.recorded)]


def done(check: Check, runs: Sequence[Mapping[str, Any]]) -> int:
    """Return how much of a check has been done without a failure."""
    return sum(run["counts"].get(check.unit, 0) for run in of_check(check, runs) if run["failure"] is None)


def run_once(check: Check, *, is_short: bool, storage: str) -> bool:
    """Run the tests of a check with a new seed; return whether they passed."""
    seed = str(random.SystemRandom().getrandbits(31))
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    environment = os.environ | {"FAULT_RESULTS": str(RESULTS), "FAULT_SEED": seed, "TESTS_DATABASE": storage}
    environment["FAULT_COMMIT"] = commit.stdout.strip() or "unknown"
    if not is_short:
        environment[check.variable] = str(check.amount)
    print(f"{check.name}: seed {seed}", flush=True)
    pytest = [sys.executable, "-m", "pytest", "-n", "0", "-x", "--timeout", str(_LONGEST_SECONDS), check.tests]
    return subprocess.run(pytest, cwd=ROOT, env=environment, check=False).returncode == 0


def table(runs: Sequence[Mapping[str, Any]], checks: Sequence[Check] = CHECKS) -> str:
    """Return the results of some checks as a Markdown table."""
    lines = [
        "| check | done | target | runs | failed | seeds | commits |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for check in checks:
        its = of_check(check, runs)
        seeds = list(dict.fromkeys(str(run["seed"]) for run in its))
        commits = list(dict.fromkeys(str(run["commit"]) for run in its))
        failed = sum(run["failure"] is not None for run in its)
        shown = ", ".join(seeds[:6]) + (f" and {len(seeds) - 6} more" if len(seeds) > 6 else "")
        figures = f"{done(check, runs):,} | {check.target:,} | {len(its)} | {failed}"
        lines.append(f"| {check.name} | {figures} | {shown or '–'} | {', '.join(commits) or '–'} |")
    what = "All that was counted, over all runs; of figures with *at most*, *upper end* and *a second*, the largest:"
    return "\n".join([*lines, "", what, "", *_counts(runs)])


def _tables(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of both kinds of storage, if there are runs on the second."""
    cluster = on_storage(CLUSTER, runs)
    tables = [table(on_storage(EMBEDDED, runs))]
    if cluster:
        # Replicas are always on these.
        others = [check for check in CHECKS if check.of_one_machine is None and not check.tests.startswith(_REPLICAS)]
        tables += ["On PostgreSQL and an S3 server:", table(cluster, others)]
    return "\n\n".join(tables)


def _counts(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what was counted besides, a line for each kind of run."""
    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        for what, count in run["counts"].items():
            total = sums[run["check"]][what]
            is_largest = any(words in what for words in _LARGEST)
            sums[run["check"]][what] = max(total, count) if is_largest else total + count
    return [
        f"- {name}: " + ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()))
        for name, counts in sorted(sums.items())
    ]


def write_table(page: Path = PAGE) -> None:
    """Replace the table in the documentation."""
    text = page.read_text("utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{_tables(read_results())}\n\n{END}{after}", "utf-8")


def main() -> int:
    """Run what is missing; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of the names of checks")
    parser.add_argument("--short", action="store_true", help="run the short form of each check once")
    parser.add_argument("--storage", choices=(EMBEDDED, CLUSTER), default=EMBEDDED, help="the storage of the services")
    parser.add_argument("--table", action="store_true", help="write the table in docs/reliability.md")
    arguments = parser.parse_args()
    if arguments.table:
        write_table()
        return 0
    storage = arguments.storage
    chosen = [check for check in CHECKS if not arguments.names or check.name.startswith(tuple(arguments.names))]
    for check in chosen:
        if storage == CLUSTER and check.of_one_machine is not None:
            print(f"{check.name} is skipped: {check.of_one_machine}")
    if storage == CLUSTER:
        chosen = [check for check in chosen if check.of_one_machine is None]
    failed = [check.name for check in chosen if not _run(check, is_short=arguments.short, storage=storage)]
    print(table(on_storage(storage, read_results())))
    print("failed: " + ", ".join(failed) if failed else "all passed")
    return 1 if failed else 0


def _run(check: Check, *, is_short: bool, storage: str) -> bool:
    """Run a check as often as it needs; return whether every run passed."""
    if is_short:
        return run_once(check, is_short=True, storage=storage)
    while (before := done(check, on_storage(storage, read_results()))) < check.target:
        if not run_once(check, is_short=False, storage=storage):
            return False
        if done(check, on_storage(storage, read_results())) == before:
            print(f"{check.name}: its tests were skipped")
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
