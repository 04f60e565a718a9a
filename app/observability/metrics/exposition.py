"""Figures as Prometheus reads them: its text format, or OpenMetrics where the request asks for that."""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.observability.metrics.definitions import DEFINITIONS, Definition
from app.observability.metrics.figures import Figures, Labels, Tally

_OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def exposition(figures: Figures, accept: str) -> tuple[bytes, str]:
    """The body and the content type of an answer to a request with this `Accept`."""
    # Of what clients write only that: a version that is none would be an error, and it would be echoed.
    encode, content_type = choose_encoder(_OPENMETRICS if "application/openmetrics-text" in accept else "")
    return encode(_Shown(figures)), content_type


class _Shown(Collector):
    """Everything that there is a number for, in the order of the definitions."""

    def __init__(self, figures: Figures) -> None:
        self._numbers = sorted(figures.numbers(), key=_by_labels)
        self._tallies = sorted(figures.tallies(), key=_by_labels)

    def collect(self) -> Iterable[Metric]:
        metrics = {name: Metric(name.removesuffix("_total"), d.meaning, d.kind) for name, d in DEFINITIONS.items()}
        for definition, values, number in self._numbers:
            metrics[definition.name].add_sample(definition.name, _named(definition, values), number)
        for definition, values, tally in self._tallies:
            for name, labels, number in _samples(definition, values, tally):
                metrics[definition.name].add_sample(name, labels, number)
        return [metric for metric in metrics.values() if metric.samples]


def _samples(definition: Definition, values: Labels, tally: Tally) -> Iterator[tuple[str, dict[str, str], float]]:
    labels, name = _named(definition, values), definition.name
    counts = list(accumulate(tally.counts.tolist()))
    for bound, count in zip((*map(str, definition.bounds), "+Inf"), counts, strict=True):
        yield f"{name}_bucket", {**labels, "le": bound}, count
    yield f"{name}_count", labels, counts[-1]
    yield f"{name}_sum", labels, tally.total


def _named(definition: Definition, values: Labels) -> dict[str, str]:
    return dict(zip(definition.labels, values, strict=True))


def _by_labels(figure: tuple[Definition, Labels, Any]) -> Labels:
    return figure[1]
