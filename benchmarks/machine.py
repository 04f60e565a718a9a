"""What the figures were measured on."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from benchmarks.processes import ROOT

_PACKAGES = (
    "torch",
    "numpy",
    "uvicorn",
    "uvloop",
    "httptools",
    "orjson",
    "fastapi",
    "pydantic",
    "peft",
    "litserve",
    "ray",
    "scikit-learn",
    "cleanlab",
    "wordllama",
)


def describe(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Return the machine and the versions of `packages`; no names of machines or people."""
    return {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "wrk": _wrk(),
    }


def moment() -> str:
    """Date and commit, and whether this runs in front of what else the machine does (`chrt -r 1`)."""
    is_real_time = sys.platform == "linux" and os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {_commit()}" + ", real-time priority" * is_real_time


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git(
        "status", "--porcelain", "--", "adapters", "app", "benchmarks", ":!benchmarks/*.md", ":!benchmarks/results*"
    )
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (", with changes" if changed else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _wrk() -> str:
    told = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout
    return told.split("[")[0].removeprefix("wrk").strip()
