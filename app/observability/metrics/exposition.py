"""Exposition of all metrics for `/metrics`, in Prometheus' text format or OpenMetrics."""

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from typing import Any

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from adapters.lora.base_layer import BaseLayer
from app.observability.metrics import definitions as d
from app.observability.metrics.catalog_metrics import CatalogMetrics
from app.observability.metrics.definitions import DEFINITIONS, Definition
from app.observability.metrics.recorder import Metrics
from app.observability.metrics.values import HistogramValue, Labels, MetricValues, sum_values

_OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def exposition(figures: MetricValues, accept: str) -> tuple[bytes, str]:
    """Return the body and the content type of an answer, by the request's `Accept`."""
    # The encoder raises an error for an unknown version, and echoes it, so the header itself is not passed on.
    encode, content_type = choose_encoder(_OPENMETRICS if "application/openmetrics-text" in accept else "")
    return encode(_Shown(figures)), content_type


class _Shown(Collector):
    """Metrics that have a value, in the order of the definitions."""

    def __init__(self, figures: MetricValues) -> None:
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


def _samples(
    definition: Definition, values: Labels, tally: HistogramValue
) -> Iterator[tuple[str, dict[str, str], float]]:
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


_ROLES = ("worker", "trainer")


class MetricsExposition:
    """Answers of one worker to scrapes. Every worker gives the same answer."""

    def __init__(self, metrics: Metrics, catalog: CatalogMetrics, base: BaseLayer, *, max_queued_jobs: int) -> None:
        self._metrics, self._catalog = metrics, catalog
        self._fixed = MetricValues()
        self._fixed.put(d.QUEUED_JOBS_LIMIT, max_queued_jobs)
        self._fixed.put(d.BUILD_INFO, 1, _version())
        dtype = str(base.weight_OI.dtype).removeprefix("torch.")
        self._fixed.put(d.BASE_INFO, 1, str(base.in_features), str(base.out_features), dtype, str(base.device))

    def answer(self, accept: str) -> tuple[bytes, str]:
        """Return the body and the content type of an answer. Reads files and the database: call it in a thread."""
        everyone = self._metrics.all_processes()
        here = MetricValues()
        for role in _ROLES:
            here.put(d.PROCESSES, sum(each.lives and each.name.rpartition("-")[0] == role for each in everyone), role)
        self._catalog.note(here)
        return exposition(sum_values([*(each.figures for each in everyone), here, self._fixed]), accept)


def _version() -> str:
    try:
        return version("loraplex-server")
    except PackageNotFoundError:
        return "unknown"
