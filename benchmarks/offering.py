"""Runs the paced client as a process of its own, and reads what it tells."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.failures import BenchFailed
from benchmarks.processes import ROOT, plain_environment

_PATIENCE_SECONDS = 60.0
_BUSY = 0.95


def offer(
    port: int, folder: Path, *, rate: float, connections: int, seconds: float, warm_seconds: float = 1
) -> dict[str, Any]:
    """Offer `rate` requests a second; what came of them. Raises `BenchFailed` where the client was the bottleneck."""
    command = [sys.executable, "-m", "benchmarks.paced", str(folder), "--port", str(port), "--rate", str(rate)]
    command += ["--connections", str(connections), "--seconds", str(seconds), "--warm-seconds", str(warm_seconds)]
    finished = subprocess.run(
        command,
        cwd=ROOT,
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=seconds + warm_seconds + _PATIENCE_SECONDS,
        check=False,
    )
    if finished.returncode != 0:
        raise BenchFailed(f"the paced client ended with {finished.returncode}: {finished.stderr[-1000:]}")
    told: dict[str, Any] = json.loads(finished.stdout)
    if told["client_cpu"] > _BUSY:
        raise BenchFailed(f"the paced client itself was busy {told['client_cpu']:.0%} of the time at {rate:.0f}/s")
    return told | {"rate": rate, "seconds": seconds}
