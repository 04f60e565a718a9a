"""What a process knows of itself."""

import os
import resource
from contextlib import suppress
from pathlib import Path

from app.observability.metrics.definitions import CPU_SECONDS, OPEN_FDS, RESIDENT_MEMORY, START_TIME
from app.observability.metrics.figures import Figures

_PROC = Path("/proc")
_STARTED_AFTER_BOOT, _RESIDENT_PAGES = 19, 21
"""Fields of /proc/self/stat (proc(5)), counted from the one after the command's name."""


def note_process(figures: Figures, process: str) -> None:
    """Put this process's memory, processor time, descriptors and start among its figures, as far as they can be had."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures.put(CPU_SECONDS, used.ru_utime + used.ru_stime, process)
    with suppress(OSError, ValueError, IndexError):
        fields = (_PROC / "self/stat").read_text().rpartition(")")[2].split()
        figures.put(RESIDENT_MEMORY, int(fields[_RESIDENT_PAGES]) * resource.getpagesize(), process)
        figures.put(OPEN_FDS, len(os.listdir(_PROC / "self/fd")), process)
        started = int(fields[_STARTED_AFTER_BOOT]) / os.sysconf("SC_CLK_TCK")
        figures.put(START_TIME, _booted() + started, process)


def _booted() -> float:
    lines = (_PROC / "stat").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("btime ")))
