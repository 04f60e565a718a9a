"""Fitters whose process is kept for the next test, because the import of torch in it takes over a second."""

import atexit
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from adapters.training.execution.fit_client import ChildFitter, Done, Failed, FitRequest, FitterDied, Frame, ShareRows
from app.bootstrap import open_child_fitter
from app.settings import Settings

_MOST_IDLE = 2
"""Processes that are kept. Each has torch in its memory."""
_KEYS = {"base", "base_weight_key", "base_bias_key", "device", "dtype", "trainer_threads", "trainer_memory_bytes"}
_IDLE: "dict[str, ChildFitter]" = {}
# The kernel kills a fit process when the thread that started it ends, so one thread starts all of them.
_STARTER = ThreadPoolExecutor(1, "start-fitter")


class _ReusedFitter(ChildFitter):
    """Fitter whose `kill` leaves an idle process alone."""

    def __init__(self, fitter: ChildFitter) -> None:
        self._fitter = fitter
        self._is_idle = False

    def is_ready(self, seconds: float) -> bool:
        _STARTER.submit(self._fitter.start).result()
        try:
            self._is_idle = self._fitter.is_ready(seconds)
        except FitterDied:
            self._is_idle = False
            raise
        return self._is_idle

    def begin(self, request: FitRequest, *, checkpoint: Path = Path(), rows: ShareRows | None = None) -> None:
        while not self.is_ready(1.0):
            pass
        self._is_idle = False
        self._fitter.begin(request, checkpoint=checkpoint, rows=rows)

    def next_frame(self, seconds: float) -> Frame | None:
        frame = self._fitter.next_frame(seconds)
        self._is_idle = isinstance(frame, Done | Failed)
        return frame

    def kill(self) -> None:
        if not self._is_idle:
            self._fitter.kill()


@contextmanager
def reused_fitter(settings: Settings) -> Iterator[ChildFitter]:
    """Yield a fitter for these settings, with the process of an earlier test if there is one.

    A process that loads its base layer from a file is never reused: the file may have been replaced.
    """
    key = settings.model_dump_json(include=_KEYS)
    fitter = _IDLE.pop(key, None) or open_child_fitter(settings)
    fitter.blobs = settings.blob_location
    try:
        yield _ReusedFitter(fitter)
    finally:
        if Path(settings.base).exists():
            fitter.kill()
        else:
            _IDLE[key] = fitter
        for oldest in list(_IDLE)[:-_MOST_IDLE]:
            _IDLE.pop(oldest).kill()


@contextmanager
def new_fitter(settings: Settings) -> Iterator[ChildFitter]:
    """Yield a fitter whose process is the only one of this process and ends with it, for tests that look for it."""
    end_idle_fitters()
    fitter = open_child_fitter(settings)
    try:
        yield fitter
    finally:
        fitter.kill()


@atexit.register
def end_idle_fitters() -> None:
    """End the processes that are kept."""
    while _IDLE:
        _IDLE.popitem()[1].kill()
