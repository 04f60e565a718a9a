"""`python -m benchmarks [--quick] [section …]`, or `make bench`; `SECTIONS` has the names.

Writes `results.json` and draws `RESULTS.md` and its pictures from it; `--redraw` only draws. A run of some sections
keeps what the file has of the others. The quick mode writes beside them, into `benchmarks/quick/`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import access, engine, fits, limits, machine, overload, quality, service, start, training
from benchmarks.failures import BenchFailed
from benchmarks.plan import FULL, QUICK
from benchmarks.plots import draw
from benchmarks.progress import say
from benchmarks.report import page
from benchmarks.wrk import require_wrk

HERE = Path(__file__).resolve().parent
SECTIONS = {
    "engine": lambda plan, _: engine.measure(plan),
    "service": service.measure,
    "training": training.measure,
    "overload": overload.measure,
    "limits": limits.measure,
    "start": start.measure,
    "fits": fits.measure,
    "quality": quality.measure,
    "keys": access.measure_keys,
    "tenants": access.measure_tenants,
}


def main() -> int:
    """Run what was asked for; 1 where a measurement was not what it claims to be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What loraplex costs, beside its peers.")
    parser.add_argument(
        "sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; all where none is given"
    )
    parser.add_argument("--quick", action="store_true", help="few repetitions, some three minutes")
    parser.add_argument("--redraw", action="store_true", help="draw the page again, run nothing")
    given = parser.parse_args()
    unknown = set(given.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    try:
        require_wrk()
    except BenchFailed as error:
        parser.error(str(error))
    folder = HERE / "quick" if given.quick else HERE
    folder.mkdir(exist_ok=True)
    failures = [] if given.redraw else run(given.sections or list(SECTIONS), folder / "results.json", quick=given.quick)
    results = json.loads((folder / "results.json").read_text())
    draw(results, folder)
    (folder / "RESULTS.md").write_text(page(results))
    say(f"written: {(folder / 'RESULTS.md').relative_to(HERE.parent)}")
    for failure in failures:
        print(f"benchmarks: {failure}", file=sys.stderr)
    return 1 if failures else 0


def run(sections: Sequence[str], path: Path, *, quick: bool) -> list[str]:
    """Measure these sections, and write each into the file as soon as it is done; returns what failed.

    A section that fails has no figures at all, and does not keep the others from theirs.
    """
    failures = []
    every = set(sections) == set(SECTIONS)
    results: dict[str, Any] = {} if every or not path.exists() else json.loads(path.read_text())
    results |= {"mode": "quick" if quick else "full", "machine": machine.describe()}
    plan = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as temporary:
        for section, measure in SECTIONS.items():
            if section in sections:
                results.pop(section, None)
                try:
                    results.setdefault("measured", {})[section] = machine.moment()
                    results[section] = measure(plan, Path(temporary) / section)
                except BenchFailed as error:
                    say(f"{section} failed: {error}")
                    failures.append(f"{section}: {error}")
                path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return failures


if __name__ == "__main__":
    sys.exit(main())
