"""Recorder of fault checks: what was done, how often, with which seed, and how it ended."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

RESULTS = "FAULT_RESULTS"
"""Environment variable with the file that each run appends one line to. `make fault` sets it."""
STORAGE = "TESTS_DATABASE"
"""Environment variable with the kind of storage (`tests.support.databases`), if it is not SQLite and a folder."""
SEED = "FAULT_SEED"
"""Environment variable with the seed of a run that is to be repeated."""


def chosen_seed() -> int:
    """Return the seed of this run: the one in the environment, or always the same one.

    `scripts.fault` gives each run a new seed. In the short form, new draws would fail for changes that are no cause.
    """
    return int(os.environ.get(SEED) or 1)


def chosen_count(variable: str, short: int) -> int:
    """Return how often something is done: as the environment says, or as in the short form."""
    return int(os.environ.get(variable) or short)


@contextmanager
def recorded(check: str, seed: int) -> Iterator[Counter[str]]:
    """Print and record a run of a check. It counts what it does in the counter, also if it fails."""
    counts: Counter[str] = Counter()
    began, failure = time.monotonic(), None
    try:
        yield counts
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"[:500]
        error.add_note(f"repeat the draws of {check!r} with {SEED}={seed}")
        raise
    finally:
        line = {
            "check": check,
            "storage": os.environ.get(STORAGE) or "sqlite",
            "seed": seed,
            "counts": dict(sorted(counts.items())),
            "failure": failure,
            "seconds": round(time.monotonic() - began, 1),
            "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": os.environ.get("FAULT_COMMIT"),
        }
        print(json.dumps(line, ensure_ascii=False))
        _append(line)


def _append(line: dict[str, object]) -> None:
    if file := os.environ.get(RESULTS):
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode: several checks may run at the same time.
        with path.open("a") as results:
            results.write(json.dumps(line, ensure_ascii=False) + "\n")
