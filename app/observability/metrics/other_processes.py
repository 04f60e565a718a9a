"""Metrics of the other processes, read from the files that they write: of those that run, and of those that have ended.

The files are replaced, not mapped: writing to a mapped page on a full disk ends the process.
"""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import orjson

from app.observability.metrics.definitions import Definition, Kind
from app.observability.metrics.metric_values import MetricValues

# Age after which the metrics of a process count as those of a dead one.
DEAD_AFTER_SECONDS = 15.0
# Names of slots. Other files in the folder are ignored.
_SLOT_NAME = re.compile(r"[a-z]+-[0-9]+")

log = logging.getLogger(__name__)


class ProcessMetrics(NamedTuple):
    """Metrics of one process."""

    name: str
    values: MetricValues
    is_alive: bool


class OtherProcesses:
    """Reader of the files in the folder of the metrics."""

    def __init__(self, folder: Path | None) -> None:
        """Read from a folder; without one there are no other processes."""
        self._folder = folder
        # Files that were logged as malformed.
        self._malformed: set[Path] = set()

    def list(self, *, own: Path | None) -> Iterator[ProcessMetrics]:
        """Yield the metrics of all processes but the one with the file `own`; of one that has ended, what it counted.

        Its momentary values, such as its memory, have ended with it.
        """
        paths: list[Path] = []
        with suppress(OSError):
            paths = [] if self._folder is None else sorted(self._folder.glob("*.json"))
        for path in paths:
            if path == own or not _SLOT_NAME.fullmatch(path.stem) or (process := self._read(path)) is None:
                continue
            yield process if process.is_alive else process._replace(values=process.values.only(_outlives))

    def counted(self, file: Path) -> MetricValues:
        """Return the counters and histograms in the file of an earlier process, for the one that takes its slot."""
        stored = self._read(file)
        return MetricValues() if stored is None else stored.values.only(_is_counted)

    def _read(self, path: Path) -> ProcessMetrics | None:
        """Return the content of a file. A malformed one stays: a process of another release may have written it."""
        try:
            content = orjson.loads(path.read_bytes())
            is_alive = abs(time.time() - float(content["written_at"])) < DEAD_AFTER_SECONDS
            return ProcessMetrics(path.stem, MetricValues.from_json(content), is_alive)
        except FileNotFoundError:
            pass
        except OSError as error:
            # The error may be temporary, such as too many open files.
            log.warning("the metrics in %s cannot be read now: %s", path.name, error)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            if path not in self._malformed:
                log.warning("%s does not hold metrics, and is not counted: %s", path.name, error)
            self._malformed.add(path)
        return None


def _is_counted(metric: Definition) -> bool:
    return metric.kind is not Kind.GAUGE


def _outlives(metric: Definition) -> bool:
    """Return whether a metric is kept after its process has ended: counters and histograms are, gauges are not."""
    return _is_counted(metric) and "process" not in metric.labels
