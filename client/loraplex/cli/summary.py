"""Summary of the result of a training, for people."""

from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

from loraplex.cli.output import Fitting, Pairs
from loraplex.cli.session import Session, plural
from loraplex.results import JobAdapter, JobFields

_HIGHER, _LOWER = "↑", "↓"
# Direction of each metric of docs/metrics.md: whether higher or lower is better.
_METRICS: Mapping[str, str] = {
    "accuracy": _HIGHER,
    "exact_match": _HIGHER,
    "macro_f1": _HIGHER,
    "micro_f1": _HIGHER,
    "recall_at_1": _HIGHER,
    "recall_at_5": _HIGHER,
    "recall_at_10": _HIGHER,
    "mrr": _HIGHER,
    "r2_mean": _HIGHER,
    "rmse": _LOWER,
    "mae_mean": _LOWER,
    "cosine": _HIGHER,
    "calibration_error": _LOWER,
    "loss": _LOWER,
}
_HEADLINES = ("accuracy", "exact_match", "recall_at_1", "rmse")
# Kind, metric and member of a version without `held_out`, such as a fleet adapter; the base layer's has the prefix
# `base_`.
_WITHOUT_EVALUATION = (
    ("held-out", "accuracy", "validation_accuracy"),
    ("held-out", "loss", "validation_loss"),
    ("training", "loss", "train_loss"),
)
_SIDES: Mapping[str, str] = {
    "adapter": "adapter",
    "base": "bare base",
    "trivial": "trivial guess",
    "live": "live before",
}


def pairs(values: Mapping[str, object]) -> Pairs:
    """Return a table of names and values."""
    return Pairs({name: dash(value) for name, value in values.items()})


class Headline(NamedTuple):
    """Most important metric of a version on rows of one kind, for the version and for the base layer.

    Held-out rows come first, because the loss on training rows does not show how good a version is on other rows.
    """

    kind: str
    """The rows that it was computed on: `held-out` or `training`."""
    metric: str
    own: float
    base: float | None

    @property
    def heading(self) -> str:
        """Return the name, such as `held-out loss`."""
        return f"{self.kind} {self.metric}"

    @property
    def gain(self) -> float | None:
        """Return how much better the version is than the base layer; None without a figure of the base layer."""
        if self.base is None:
            return None
        return self.own - self.base if _METRICS[self.metric] == _HIGHER else self.base - self.own

    def __str__(self) -> str:
        return f"{self.heading} {number(self.own)} (base {number(self.base)})"


def held_out(metrics: Mapping[str, Any] | None) -> Fitting | None:
    """Return the metrics on held-out rows, with and without the adapter; None if no rows were held out."""
    told = (metrics or {}).get("held_out") or _validation(metrics or {})
    if not told:
        return None
    sides = [side for side in _SIDES if told.get(side)]
    headings = [_SIDES[side] for side in sides]
    title = f"On {told['rows']:,} held-out rows" if "rows" in told else "On held-out rows"
    made = Fitting("", *headings, title=title, right=headings)
    for name, arrow in _METRICS.items():
        if name in told["adapter"]:
            cells = [
                _with_interval(told[side], name) if side == "adapter" else number(told[side].get(name))
                for side in sides
            ]
            made.add_row(f"{name} {arrow}", *cells)
    return made


def losses(metrics: Mapping[str, Any] | None) -> str:
    """Return the training loss in one line; empty if there is none."""
    told = metrics or {}
    if told.get("train_loss") is None:
        return ""
    base = number(told.get("base_train_loss"))
    return f"loss on the rows that it was trained on: {number(told['train_loss'])} (bare base: {base})"


def outcome(job: JobFields) -> list[str]:
    """Return what was selected and published, and whether it is live."""
    metrics = job.metrics or {}
    lines = []
    if metrics.get("chosen"):
        lines.append("chosen: " + ", ".join(f"{name} {number(value)}" for name, value in metrics["chosen"].items()))
    if "published" in metrics:
        lines.append(f"published {metrics['published']} of {metrics['total']} adapters, {metrics['failed']} failed")
    if job.result is not None:
        lines.append(f"{job.result} {_about_live(job)}")
    return lines


def headline(metrics: Mapping[str, Any] | None) -> Headline | None:
    """Return the most important metric of a version; None without metrics."""
    told = metrics or {}
    sides = told.get("held_out") or {"adapter": {}}
    for name in _HEADLINES:
        if sides["adapter"].get(name) is not None:
            return Headline("held-out", name, sides["adapter"][name], sides["base"].get(name))
    for kind, name, member in _WITHOUT_EVALUATION:
        if told.get(member) is not None:
            return Headline(kind, name, told[member], told.get(f"base_{member}"))
    return None


def number(value: object) -> str:
    """Return a number with four digits; – for None."""
    return f"{value:.4g}" if isinstance(value, float) else dash(value)


def dash(value: object) -> str:
    """Return a value as text; – for None."""
    return "–" if value is None else str(value)


def when(time: str | None) -> str:
    """Return a time in UTC, to the second."""
    return dash(time if time is None else time[:19].replace("T", " "))


def size(count: float) -> str:
    """Return a number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _validation(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the losses on held-out rows in the form of `held_out`; empty if no rows were held out."""
    if metrics.get("validation_loss") is None:
        return {}
    names = ("loss", "accuracy")
    return {
        "adapter": {name: metrics[f"validation_{name}"] for name in names if f"validation_{name}" in metrics},
        "base": {name: metrics.get(f"base_validation_{name}") for name in names},
    }


def _with_interval(told: Mapping[str, Any], name: str) -> str:
    interval = told.get(f"{name}_interval")
    return number(told.get(name)) + (f" ({number(interval[0])} – {number(interval[1])})" if interval else "")


def is_live(job: JobFields) -> bool:
    """Return whether a job made its version live."""
    gate = (job.metrics or {}).get("gate")
    publish = job.spec.get("publish", "always")
    when = publish.get("when") if isinstance(publish, Mapping) else publish
    return when != "never" if gate is None else bool(gate["moves_live"])


def _about_live(job: JobFields) -> str:
    if is_live(job):
        return "is live"
    gate = (job.metrics or {}).get("gate")
    why = "--publish never was asked for" if gate is None else gate["reason"]
    name, version, _ = job.result or ("", 0, None)
    return f"was made, and live did not move: {why}. To make it live: loraplex rollback {name} {version}"


_MOST_NAMED = 3
Reached = list[tuple[JobAdapter, Headline]]


def is_fleet(job: JobFields) -> bool:
    """Return whether a job trains one adapter for each group."""
    return "{" in job.adapter


def fleet_summary(session: Session, job: JobFields) -> list[Any]:
    """Return what the adapters of a fleet reached, as tables and lines; nothing for a job of one adapter."""
    return [] if session.as_json or not is_fleet(job) else summarize(session.client.job_adapters(job.id))


def summarize(adapters: Iterable[JobAdapter]) -> list[Any]:
    """Return counts, the median of one metric, the adapters with the smallest gain, and failures."""
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
    # Groups with few rows have no held-out rows, and their training loss cannot be compared with held-out metrics.
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
