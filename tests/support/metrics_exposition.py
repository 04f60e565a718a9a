"""What `/metrics` shows, read by Prometheus' own parser for Python."""

from collections.abc import Callable
from typing import Any, TypeAlias

import httpx
from prometheus_client.parser import text_string_to_metric_families

from app.observability.metrics.exposition import exposition
from app.observability.metrics.metric_values import MetricValues
from tests.support.service import eventually

Series: TypeAlias = tuple[str, frozenset[tuple[str, str]]]
Shown: TypeAlias = dict[Series, float]


def series(name: str, **labels: str) -> Series:
    """The key of one series; `loraplex_` is left out of its name."""
    return f"loraplex_{name}", frozenset(labels.items())


def read(text: str) -> Shown:
    """Every series of an answer, and its number; each is there once."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    shown = {(sample.name, frozenset(sample.labels.items())): float(sample.value) for sample in samples}
    assert len(shown) == len(samples)
    return shown


def shown_of(figures: MetricValues) -> Shown:
    """What figures look like."""
    return read(exposition(figures, "")[0].decode())


def scrape(client: httpx.Client) -> Shown:
    """What one scrape shows."""
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    return read(answer.text)


def scraped(
    client: httpx.Client, condition: Callable[[Shown], Any], *, what: str = "what a scrape was to show"
) -> Shown:
    """Return the first scrape that fulfils a condition. A connection to a worker that was killed is opened again."""
    found: list[Shown] = []

    def holds() -> bool:
        try:
            found.append(scrape(client))
        except httpx.TransportError:
            return False
        return bool(condition(found[-1]))

    eventually(holds, what=what)
    return found[-1]


def total(shown: Shown, name: str, **labels: str) -> float:
    """The sum over every series of this name with these labels."""
    wanted = frozenset(labels.items())
    return sum(value for (of, its), value in shown.items() if of == f"loraplex_{name}" and wanted <= its)
