"""Fleets larger than the memory of a trainer: `python -m benchmarks.large_fleets`, or `make large-fleets`.

A table of three times the limit is fitted twice, each time in a process of its own with that limit: from rows that are
sorted by group on disk, as a trainer does it, and from the unsorted file, as with more memory. It writes
`benchmarks/LARGE_FLEETS.md`.
"""

# N rows · I in_features · O out_features
import argparse
import hashlib
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters.lora.base_layer import BaseLayer
from adapters.training.data_file import Column, TrainingData, write_data_file
from adapters.training.fleet import fit_fleet
from adapters.training.planning.estimate import PROCESS_BYTES
from adapters.training.scratch import Scratch
from adapters.training.settings import TrainingSpec

_ROOT = Path(__file__).parents[1]
_LIMIT = 2**29
_I, _O, _GROUPS, _BLOCK = 1_000, 8, 8_000, 20_000
_ROWS = 3 * _LIMIT // (4 * _I) // _BLOCK * _BLOCK + _BLOCK
_SPEC = TrainingSpec(rank=4, alpha=4.0, max_steps=20)
_PACKAGES = ("torch", "numpy")


def main() -> None:
    """Measure both forms and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_fleets", description="Fleets larger than memory.")
    parser.add_argument("--rows", type=int, default=_ROWS)
    parser.add_argument("--fit", nargs=2, metavar=("FORM", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fit is not None:
        print(json.dumps(_fit(options.fit[0], Path(options.fit[1]))))
        return
    # Not at the top: the process that fits has no more in memory than that of a trainer.
    from benchmarks.progress import say

    with tempfile.TemporaryDirectory(prefix="loraplex-fleets-") as folder:
        path = Path(folder, "rows")
        with path.open("wb") as file:
            write_data_file(_columns(options.rows), file)
        size, rows = path.stat().st_size, []
        for form in ("sorted on disk", "unsorted"):
            say(f"a fleet of {size / 2**20:,.0f} MiB, {form}")
            command = [sys.executable, "-m", "benchmarks.large_fleets", "--fit", form, folder]
            answer = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
            rows.append((form, json.loads(answer)))
    page = _ROOT / "benchmarks" / "LARGE_FLEETS.md"
    page.write_text(_page(rows, options.rows, size))
    say(f"{page.relative_to(_ROOT)} is written")


def _columns(rows: int) -> Mapping[str, Column]:
    rng = np.random.default_rng(0)
    block_NI = rng.standard_normal((_BLOCK, _I), dtype=np.float32)
    groups_N = rng.integers(_GROUPS, size=rows)
    groups_N[:_GROUPS] = np.arange(_GROUPS)

    def parts(width: int) -> Iterator[Any]:
        for begin in range(0, rows, _BLOCK):
            yield block_NI[: rows - begin, :width] * np.float32(1 + begin / rows)

    return {
        "inputs_NI": Column("F32", (rows, _I), lambda: parts(_I)),
        "targets": Column("F32", (rows, _O), lambda: parts(_O)),
        "groups_N": Column.of(groups_N),
    }


def _fit(form: str, folder: Path) -> dict[str, Any]:
    """Fit the fleet in this process under the limit; return times, memory and a digest of all adapters."""
    torch.set_num_threads(1)
    torch.ones(2**20).neg_()
    resource.setrlimit(resource.RLIMIT_DATA, (_LIMIT, _LIMIT))
    base = BaseLayer(torch.eye(_O, _I), torch.zeros(_O), source="", fingerprint="sha256:", weight_norm=1.0)
    began, path, buckets = time.perf_counter(), folder / "rows", 0
    if form == "unsorted":
        data = TrainingData.open(path)
    else:
        scratch = Scratch(folder, size=path.stat().st_size, memory_bytes=_LIMIT - PROCESS_BYTES)
        data, buckets = scratch.sort_by_group(path)
    is_sorted, digest, adapters = time.perf_counter(), hashlib.sha256(), 0
    for stack in fit_fleet(base, data, _SPEC):
        for outcome in stack:
            assert outcome.adapter is not None
            digest.update(outcome.adapter.canonical_bytes)
            adapters += 1
    status = Path("/proc/self/status").read_text()
    peak = {name: int(re.findall(rf"{name}:\s+(\d+)", status)[0]) / 1024 for name in ("VmHWM", "VmData")}
    seconds = {"sort": is_sorted - began, "fit": time.perf_counter() - is_sorted}
    return {"adapters": adapters, "buckets": buckets, **seconds, "digest": digest.hexdigest()[:12], **peak}


def _page(rows: list[tuple[str, dict[str, Any]]], count: int, size: int) -> str:
    """Return the page with the figures."""
    from benchmarks import machine
    from benchmarks.report import table

    facts = machine.describe(_PACKAGES)
    lines = [
        (
            form,
            str(figures["buckets"] or ""),
            f"{figures['sort']:.1f}",
            f"{figures['fit']:.1f}",
            f"{figures['VmHWM']:,.0f}",
            figures["digest"],
        )
        for form, figures in rows
    ]
    head = ("rows", "buckets", "sort, s", "fit, s", "largest resident memory, MiB", "digest of all adapters")
    about = (
        f"Written by `make large-fleets`: {_GROUPS:,} groups with {count:,} rows of {_I:,} numbers in no order, "
        f"{size / 2**20:,.0f} MiB, AdamW with {_SPEC.max_steps} steps, in a process that may use "
        f"{_LIMIT / 2**20:,.0f} MiB of private memory. Resident memory includes the pages of mapped files. "
        f"Measured {machine.moment()}."
    )
    return "\n\n".join((
        "# A fleet larger than memory",
        about,
        table(head, lines),
        table(("", ""), list(facts.items())),
    )) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
