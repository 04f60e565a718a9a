"""Values of metrics, of one process or summed over several, by metric and labels."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.observability.metrics.definitions import DEFINITIONS, Definition

# Values of the labels, in the order of the definition.
Labels = tuple[str, ...]
_Counts = NDArray[np.int64]


class HistogramValue(NamedTuple):
    """Value of a histogram: observations in each bucket, the last without a bound, and their sum."""

    counts: _Counts
    total: float

    def __add__(self, other: object) -> "HistogramValue":
        assert isinstance(other, HistogramValue)
        return HistogramValue(self.counts + other.counts, self.total + other.total)


class MetricValues:
    """Values by metric and labels. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, Labels], float] = {}
        self._tallies: dict[tuple[str, Labels], HistogramValue] = {}
        self._lock = threading.Lock()

    def add(self, metric: Definition, amount: float, *labels: str) -> bool:
        """Increase a counter; return whether it changed."""
        with self._lock:
            key = metric.name, labels
            self._numbers[key] = self._numbers.get(key, 0.0) + amount
        return amount != 0

    def put(self, metric: Definition, value: float, *labels: str) -> bool:
        """Set a gauge; return whether it changed."""
        with self._lock:
            key = metric.name, labels
            before, self._numbers[key] = self._numbers.get(key), float(value)
        return before != value

    def observe(self, metric: Definition, values: Sequence[float], *labels: str) -> None:
        """Add observations to a histogram."""
        values_N = np.asarray(values, dtype=np.float64)
        bucket_N = np.searchsorted(np.asarray(metric.bounds), values_N)
        seen = HistogramValue(np.bincount(bucket_N, minlength=len(metric.bounds) + 1), float(values_N.sum()))
        with self._lock:
            key = metric.name, labels
            before = self._tallies.get(key)
            self._tallies[key] = seen if before is None else before + seen

    def numbers(self) -> Iterator[tuple[Definition, Labels, float]]:
        """Yield counters and gauges."""
        with self._lock:
            numbers = list(self._numbers.items())
        for (name, labels), value in numbers:
            yield DEFINITIONS[name], labels, value

    def tallies(self) -> Iterator[tuple[Definition, Labels, HistogramValue]]:
        """Yield histograms."""
        with self._lock:
            tallies = list(self._tallies.items())
        for (name, labels), tally in tallies:
            yield DEFINITIONS[name], labels, tally

    def only(self, wanted: Callable[[Definition], bool]) -> "MetricValues":
        """Return the values of the metrics for which `wanted` is true."""
        selected = MetricValues()
        selected._numbers = {(each.name, labels): value for each, labels, value in self.numbers() if wanted(each)}
        selected._tallies = {(each.name, labels): tally for each, labels, tally in self.tallies() if wanted(each)}
        return selected

    def to_json(self) -> dict[str, Any]:
        """Return the form that `from_json` reads."""
        return {
            "numbers": [[metric.name, labels, value] for metric, labels, value in self.numbers()],
            "tallies": [
                [metric.name, labels, tally.counts.tolist(), tally.total] for metric, labels, tally in self.tallies()
            ],
        }

    @classmethod
    def from_json(cls, stored: Any) -> "MetricValues":
        """Read the form of `to_json`, without metrics that no longer exist or have changed.

        Raises `ValueError`, `TypeError`, `KeyError` or `OverflowError` if it is malformed.
        """
        figures = cls()
        for name, labels, value in stored["numbers"]:
            metric = DEFINITIONS.get(name)
            if metric is not None and len(labels) == len(metric.labels):
                figures._numbers[name, tuple(map(str, labels))] = float(value)
        for name, labels, counts, total in stored["tallies"]:
            metric = DEFINITIONS.get(name)
            if metric is None or len(labels) != len(metric.labels) or len(counts) != len(metric.bounds) + 1:
                continue
            counts_B = np.asarray(counts, np.int64).reshape(len(metric.bounds) + 1)
            figures._tallies[name, tuple(map(str, labels))] = HistogramValue(counts_B, float(total))
        return figures


def sum_values(parts: Iterable[MetricValues]) -> MetricValues:
    """Return the sum of values by metric and labels."""
    whole = MetricValues()
    for part in parts:
        for metric, labels, value in part.numbers():
            whole.add(metric, value, *labels)
        for metric, labels, tally in part.tallies():
            key = metric.name, labels
            before = whole._tallies.get(key)
            whole._tallies[key] = tally if before is None else before + tally
    return whole
