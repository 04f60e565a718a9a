"""Values of metrics by name and labels, as one process counts them, and their sum over processes."""

# B buckets of a histogram
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.observability.metrics.definitions import DEFINITIONS, Definition

# Values of the labels, in the order of the definition.
Labels = tuple[str, ...]
Key = tuple[Definition, Labels]
# A number, or (B + 1,) float64 for a histogram: the observations in each bucket, then the sum of all.
Value = float | NDArray[np.float64]


class MetricValues:
    """Values by metric and labels. Every method may be called from any thread."""

    def __init__(self, values: Iterable[tuple[Key, Value]] = ()) -> None:
        self._values = dict(values)
        self._lock = threading.Lock()
        # Whether a value has changed since this was last set to False.
        self.changed = False

    def add(self, metric: Definition, amount: Value, *labels: str) -> None:
        """Increase a counter or a histogram."""
        with self._lock:
            self._values[metric, labels] = self._values.get((metric, labels), 0.0) + amount
        if np.any(amount):
            self.changed = True

    def put(self, metric: Definition, value: float, *labels: str) -> None:
        """Set a gauge, or a counter that is counted elsewhere."""
        with self._lock:
            before, self._values[metric, labels] = self._values.get((metric, labels)), float(value)
        if before != value:
            self.changed = True

    def observe(self, metric: Definition, values: Sequence[float], *labels: str) -> None:
        """Add observations to a histogram. A list costs little more than one, so callers collect them."""
        if values:
            value_N = np.asarray(values, dtype=np.float64)
            buckets = np.searchsorted(np.asarray(metric.bounds), value_N)
            count_B = np.bincount(buckets, minlength=len(metric.bounds) + 1)
            self.add(metric, np.append(count_B, value_N.sum()), *labels)

    def items(self) -> list[tuple[Key, Value]]:
        """Return a copy of all values."""
        with self._lock:
            return list(self._values.items())

    def only(self, condition: Callable[[Definition], bool]) -> "MetricValues":
        """Return the values of the metrics that fulfil a condition."""
        return MetricValues((key, value) for key, value in self.items() if condition(key[0]))

    def to_json(self) -> dict[str, Any]:
        """Return the form that `from_json` reads, in every release: an upgrade must not lose counters."""
        numbers, tallies = [], []
        for (metric, labels), value in self.items():
            *counts, last = np.atleast_1d(value).tolist()
            if metric.shape:
                tallies.append([metric.name, labels, counts, last])
            else:
                numbers.append([metric.name, labels, last])
        return {"numbers": numbers, "tallies": tallies}

    @classmethod
    def from_json(cls, stored: Any) -> "MetricValues":
        """Read the form of `to_json`, without metrics that no longer exist or have changed.

        Raises `ValueError`, `TypeError`, `KeyError` or `OverflowError` if it is malformed.
        """
        values: dict[Key, Value] = {}
        histograms = ([name, labels, [*counts, total]] for name, labels, counts, total in stored["tallies"])
        for name, labels, entry in [*stored["numbers"], *histograms]:
            metric, value = DEFINITIONS.get(name), np.asarray(entry, dtype=np.float64)
            if metric is None or len(labels) != len(metric.labels) or value.shape != metric.shape:
                continue
            values[metric, tuple(map(str, labels))] = value if metric.shape else float(value)
        return cls(values.items())


def sum_values(parts: Iterable[MetricValues]) -> MetricValues:
    """Return the sum of values by metric and labels."""
    whole = MetricValues()
    for part in parts:
        for (metric, labels), value in part.items():
            whole.add(metric, value, *labels)
    return whole
