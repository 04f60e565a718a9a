"""Where processes leave their figures for each other: one file for each place that a process can have.

A process that is started again finds its figures in its place, and goes on from them. They are plain files that are
replaced, never mapped ones: writing to a mapped page on a full disk ends the process.
"""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import orjson

from app.observability.metrics.definitions import Definition, Kind
from app.observability.metrics.figures import Figures
from app.observability.metrics.process_slot import Place, take_place

GONE_AFTER_SECONDS = 15.0
"""A process writes every few seconds; one that has not for so long has ended, or stands still."""

_NAME = re.compile(r"[a-z]+-[0-9]+")
"""Of a place; what else lies in the folder is not ours."""

log = logging.getLogger(__name__)


class Left(NamedTuple):
    """What a process has left."""

    name: str
    figures: Figures
    """Where it lives no more, only what it has counted."""
    lives: bool


class Slot:
    """One process's place, from `take` to `give_back`."""

    def __init__(self, folder: Path, place: Place) -> None:
        self.name, self._lock = place
        self._path = folder / f"{self.name}.json"
        self._complained = False

    @classmethod
    def take(cls, folder: Path, role: str) -> "Slot | None":
        """The first free place of this role; None where the folder does not let us, which is logged."""
        try:
            place = take_place(folder, role)
        except OSError as error:
            log.warning("this process's metrics are not shared with the others: %s", error)
            return None
        return None if place is None else cls(folder, place)

    def counted(self) -> Figures:
        """What was counted in this place before."""
        stored = _read(self._path)
        return Figures() if stored is None else stored.figures.only(_is_counted)

    def leave(self, figures: Figures, *, ended: bool = False) -> None:
        """Replace what lies here. Where that cannot be done, the first time is logged."""
        written = self._path.with_suffix(".tmp")
        content = {"written_at": 0.0 if ended else time.time(), **figures.to_json()}
        try:
            written.write_bytes(orjson.dumps(content))
            written.replace(self._path)
        except OSError as error:
            with suppress(OSError):
                written.unlink()
            if not self._complained:
                log.warning(
                    "the metrics of this process cannot be written, and those shown elsewhere are old: %s", error
                )
            self._complained = True
        else:
            self._complained = False

    def give_back(self) -> None:
        """Let the next process have the place."""
        os.close(self._lock)


def left_by_others(folder: Path, own: str | None) -> Iterator[Left]:
    """What lies in every place but our own; a file that cannot be read is none."""
    try:
        paths = sorted(folder.glob("*.json"))
    except OSError:
        return
    for path in paths:
        if not _NAME.fullmatch(path.stem) or path.stem == own or (stored := _read(path)) is None:
            continue
        lives = abs(time.time() - stored.written_at) < GONE_AFTER_SECONDS
        yield Left(path.stem, stored.figures if lives else stored.figures.only(_outlives), lives)


class _Stored(NamedTuple):
    written_at: float
    figures: Figures


def _read(path: Path) -> _Stored | None:
    """What lies there; what is no metrics is removed: its process writes anew, where it lives."""
    try:
        stored = orjson.loads(path.read_bytes())
        return _Stored(float(stored["written_at"]), Figures.from_json(stored))
    except FileNotFoundError:
        return None
    except OSError as error:
        # It may be read again, such as where only too many files were open.
        log.warning("the metrics in %s cannot be read now: %s", path.name, error)
        return None
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        log.warning("what lies in %s is no metrics, and is not counted: %s", path.name, error)
        with suppress(OSError):
            path.unlink()
        return None


def _is_counted(metric: Definition) -> bool:
    return metric.kind is not Kind.GAUGE


def _outlives(metric: Definition) -> bool:
    """What a process is, nobody wants to know when it has ended; what it did, stays done."""
    return _is_counted(metric) and "process" not in metric.labels
