"""Summary of a fleet: counts, medians and the worst adapters."""

from collections import Counter
from collections.abc import Iterable
from statistics import median
from typing import Any

from loraplex.cli.reporting import Headline, dash, headline, number, pairs
from loraplex.cli.session import Session, plural
from loraplex.cli.tables import Fitting
from loraplex.results import JobAdapter, JobFields

_MOST_NAMED = 3
Reached = list[tuple[JobAdapter, Headline]]


def is_fleet(job: JobFields) -> bool:
    """Return whether a job trains one adapter for each group."""
    return "{" in job.adapter


def fleet_summary(session: Session, job: JobFields) -> list[Any]:
    """Return what a fleet's adapters reached, as tables and lines; nothing for a job of one adapter."""
    return [] if session.as_json or not is_fleet(job) else summarize(session.client.job_adapters(job.id))


def summarize(adapters: Iterable[JobAdapter]) -> list[Any]:
    """Return counts, the median of one metric, the adapters that gained least over the base layer, and failures."""
    counts = Counter({"published": 0, "failed": 0})
    reached: Reached = []
    failed: list[str] = []
    for adapter in adapters:
        if adapter.error is not None:
            counts["failed"] += 1
            failed += [f"{adapter.name} failed: {adapter.error.detail}"] if len(failed) < _MOST_NAMED else []
            continue
        counts["waiting" if adapter.version is None else "published"] += 1
        found = headline(adapter.metrics)
        if found is not None:
            reached.append((adapter, found))
    about = {"adapters": ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())}
    if not reached:
        return [pairs(about), *failed]
    # A group with few rows holds none out, and its training loss cannot be compared with the others' held-out figures.
    metric = min((found for _, found in reached), key=lambda found: found.kind != "held-out").heading
    reached = [(adapter, found) for adapter, found in reached if found.heading == metric]
    return [pairs(about | _medians(reached)), "", _worst(reached), *failed]


def _medians(reached: Reached) -> dict[str, str]:
    found = [headline for _, headline in reached]
    bases = [each.base for each in found if each.base is not None]
    gains = [each.gain for each in found if each.gain is not None]
    own, base = number(median(each.own for each in found)), number(median(bases)) if bases else dash(None)
    return {
        found[0].heading: f"median {own} (base {base}), of {plural(len(found), 'adapter')}",
        "better than base": f"{sum(gain > 0 for gain in gains):,} of {len(gains):,}",
    }


def _worst(reached: Reached) -> Fitting:
    least = sorted(reached, key=lambda one: one[1].gain or 0.0)[:_MOST_NAMED]
    heading = reached[0][1].heading
    made = Fitting(
        "adapter", "rows", heading, "base", title="Least gain over the base layer", right=("rows", heading, "base")
    )
    for adapter, found in least:
        made.add_row(adapter.name, f"{adapter.rows:,}", number(found.own), number(found.base))
    return made
