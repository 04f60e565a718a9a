"""Memory and file descriptors of the processes of a service, sampled over time, and the slope of their memory."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil  # type: ignore[import-untyped]

from tests.support.process_tree import FIT, TRAINER, WORKER, running, session_of

MIB = 2**20
_HOUR = 3600.0
_NORMAL_95 = 1.96
_ROLES = {WORKER: "worker", TRAINER: "trainer", FIT: "fit"}


class Slope(NamedTuple):
    """Slope of a regression line, per hour, and the 95 % interval."""

    value: float
    low: float
    high: float


def slope_per_hour(seconds: Sequence[float], values: Sequence[float], *, lag_seconds: float) -> Slope:
    """Return the slope of a least-squares line, with an interval that holds for autocorrelated noise.

    The variance is that of Newey and West (1987), with Bartlett weights up to `lag_seconds`, times n / (n - 2).
    """
    hours_N, y_N = np.asarray(seconds) / _HOUR, np.asarray(values)
    x_N = hours_N - hours_N.mean()
    slope = float(x_N @ y_N / (x_N @ x_N))
    score_N = x_N * (y_N - y_N.mean() - slope * x_N)
    lags = int(lag_seconds / np.diff(seconds).mean())
    variance = score_N @ score_N
    for lag in range(1, lags + 1):
        variance += 2 * (1 - lag / (lags + 1)) * (score_N[lag:] @ score_N[:-lag])
    variance *= len(x_N) / (len(x_N) - 2)
    half_width = _NORMAL_95 * float(np.sqrt(max(variance, 0.0))) / float(x_N @ x_N)
    return Slope(slope, slope - half_width, slope + half_width)


@dataclass
class Series:
    """Samples of one process."""

    role: str
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    """Bytes that only this process has (the unique set size), in MiB."""
    resident: list[float] = field(default_factory=list)
    """Resident set size, in MiB."""
    descriptors: list[int] = field(default_factory=list)


class Sampler:
    """Samples of every process of a service that serves, trains or supervises."""

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self._begin = time.monotonic()
        self.series: dict[int, Series] = {}

    def sample(self) -> None:
        """Take one sample of each process."""
        roles = {self._leader: "supervisor"}
        for module, role in _ROLES.items():
            roles |= {process.pid: role for process in running(self._leader, module)}
        for process in session_of(self._leader):
            if process.pid not in roles:
                continue
            try:
                memory, descriptors = process.memory_full_info(), process.num_fds()
            except psutil.Error:
                continue
            series = self.series.setdefault(process.pid, Series(roles[process.pid]))
            series.seconds.append(time.monotonic() - self._begin)
            series.memory.append(memory.uss / MIB)
            series.resident.append(memory.rss / MIB)
            series.descriptors.append(descriptors)

    def write(self, file: Path) -> None:
        """Write the samples as CSV."""
        lines = ["pid,role,seconds,unique_mib,resident_mib,descriptors"]
        for pid, series in self.series.items():
            for row in zip(series.seconds, series.memory, series.resident, series.descriptors, strict=True):
                lines.append(f"{pid},{series.role},{row[0]:.1f},{row[1]:.3f},{row[2]:.3f},{row[3]}")
        file.write_text("\n".join(lines) + "\n")
