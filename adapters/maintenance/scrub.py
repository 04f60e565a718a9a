"""Scrub: in the background, every blob is read again and compared with the digests of its rows.

A pass over all blobs takes half of `SCRUB_DAYS`, so that each blob is read at least once in any `SCRUB_DAYS`. Names
begin with the catalogue's revision, so that blobs which are written during a pass are at its end. The state is in a
file, so that a restart goes on with the pass, and the processes on one folder share it.
"""

import fcntl
import json
import logging
from bisect import bisect_right
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from adapters.maintenance.blob_checks import read_parts, referenced_files, stored_damage
from adapters.maintenance.catalog_reader import CatalogReader, opened_reader
from adapters.maintenance.doctor import confirmed_damage
from adapters.storage.blob_location import BlobLocation
from adapters.storage.blobs import Blobs
from adapters.storage.database import Database, WriterLocks
from adapters.storage.quarantine import SECONDS_A_DAY
from adapters.storage.schema import batched

_STATE = "scrub.json"
_MAX_FINDINGS = 1000
# Owner of the lock of the one process that scrubs what several machines share.
_SCRUBBER = "7363727562626572" + 16 * "0"

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ScrubState:
    """Progress and findings of the scrub of one data folder."""

    began_at: float | None = None
    """Start of this pass, in seconds since the epoch; None before the first."""
    position: str = ""
    """Name of the blob that was checked last."""
    finished_at: float | None = None
    """End of the last complete pass."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Description of the damage of each blob that was damaged when it was last read, by name."""


class ScrubTurn:
    """Choice of the one process that scrubs a store which several machines share: the first one, until it ends."""

    def __init__(self, locks: WriterLocks | None) -> None:
        self._locks = locks
        self._is_ours = False

    def take(self) -> bool:
        """Return whether this process is the one. Raises `CatalogBusy` and `CatalogUnavailable`."""
        if self._locks is None:
            return True
        if not self._is_ours and self._locks.live([_SCRUBBER]):
            return False
        # Until the lock is held: after a lost connection, another process may have it.
        self._is_ours = False
        self._locks.hold(_SCRUBBER)
        self._is_ours = True
        return True


def read_state(folder: Path) -> ScrubState:
    """Return the state of the scrub; that of one that has not begun if there is none or it is malformed."""
    with suppress(OSError, ValueError, TypeError):
        stored = json.loads((folder / _STATE).read_text())
        return _state(stored)
    return ScrubState()


def scrub(
    folder: Path,
    blobs: Blobs | None = None,
    *,
    database: Database | None = None,
    days: float,
    now: Callable[[], float],
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Check the blobs that are due, in the folder by default; return their number. New damage is logged.

    The catalogue is that of the database, or the file in the folder.

    Does nothing while another process scrubs the folder. Raises `CatalogBusy`, `CatalogNotLoadable`, `OSError`, and
    `StorageFailed` if a bucket does not answer.
    """
    blobs = blobs or BlobLocation(folder=folder).open()
    with (folder / _STATE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        state = read_state(folder)
        began_at = state.began_at
        if began_at is None or began_at > now():  # the clock went back
            began_at = state.began_at = now()
        # Those that are missing too.
        with opened_reader(folder, database) as catalog:
            names = sorted(set(referenced_files(catalog)))
        share = min(1.0, (now() - began_at) / (days * SECONDS_A_DAY / 2))
        due = names[bisect_right(names, state.position) : round(share * len(names))]
        count = _check(partial(opened_reader, folder, database), blobs, due, state, stop=stop)
        if share == 1.0 and count == len(due):
            state.began_at, state.position, state.finished_at = now(), "", now()
        # A blob that was deleted, or replaced by a new one, is no finding any more.
        state.damaged = {name: state.damaged[name] for name in set(names).intersection(state.damaged)}
        _write(file, state)
        return count


def _check(
    opened: Callable[[], AbstractContextManager[CatalogReader]],
    blobs: Blobs,
    names: list[str],
    state: ScrubState,
    *,
    stop: Callable[[], bool],
) -> int:
    """Check blobs in order, and change the state; return how many were checked before `stop` was true."""
    count = 0
    for some in batched(names):
        with opened() as catalog:
            expected = read_parts(catalog, some)
            for name in some:
                if stop():
                    return count
                damages = stored_damage(blobs, name, expected.get(name, ()))
                findings = list(confirmed_damage(catalog, blobs, damages))
                if findings and name not in state.damaged:
                    log.error("the scrub found damage: %s: %s", findings[0].subject, findings[0].detail)
                if findings and len(state.damaged) < _MAX_FINDINGS:
                    state.damaged[name] = f"{findings[0].subject}: {findings[0].detail}"
                elif not findings:
                    state.damaged.pop(name, None)
                state.position, count = name, count + 1
    return count


def _state(stored: Mapping[str, object]) -> ScrubState:
    """Return the state in a JSON object; raise `TypeError` if it is malformed."""
    state = ScrubState(**stored)  # type: ignore[arg-type]
    types = {"began_at": int | float | None, "position": str, "finished_at": int | float | None, "damaged": dict}
    if not all(isinstance(getattr(state, name), expected) for name, expected in types.items()):
        raise TypeError("not a state")
    return state


def _write(file: IO[str], state: ScrubState) -> None:
    """Write the state in place: the lock is on this file. A crash in between begins the pass again."""
    file.seek(0)
    file.truncate()
    json.dump(asdict(state), file)
    file.flush()
