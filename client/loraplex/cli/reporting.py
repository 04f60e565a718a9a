"""What a training came to, for people."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from loraplex.cli.tables import Fitting, Pairs
from loraplex.results import JobFields

_HIGHER, _LOWER = "↑", "↓"
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
"""What docs/metrics.md has an arrow for, and which way is better."""
_HEADLINES = ("accuracy", "exact_match", "recall_at_1", "rmse")
_WITHOUT_EVALUATION = (
    ("held-out", "accuracy", "validation_accuracy"),
    ("held-out", "loss", "validation_loss"),
    ("training", "loss", "train_loss"),
)
"""Kind, metric and member of a version without `held_out`, such as an adapter of a fleet; the base's has `base_`."""
_SIDES: Mapping[str, str] = {
    "adapter": "adapter",
    "base": "bare base",
    "trivial": "trivial guess",
    "live": "live before",
}


def pairs(values: Mapping[str, object]) -> Pairs:
    """A table of names and values."""
    return Pairs({name: dash(value) for name, value in values.items()})


class Headline(NamedTuple):
    """The metric that says most about a version, on the rows of one kind, for the version and for the bare base layer.

    Held-out rows come first, because the loss on training rows does not say how good a version is on others.
    """

    kind: str
    """`held-out` or `training`: the rows that it was computed on."""
    metric: str
    own: float
    base: float | None

    @property
    def heading(self) -> str:
        """`held-out loss`."""
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
    """The metrics on held-out rows, with the adapter and without; None where no rows were held out."""
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
    """The loss on the rows that were trained on, in one line; empty where there is none."""
    told = metrics or {}
    if told.get("train_loss") is None:
        return ""
    base = number(told.get("base_train_loss"))
    return f"loss on the rows that it was trained on: {number(told['train_loss'])} (bare base: {base})"


def outcome(job: JobFields) -> list[str]:
    """What was chosen, what was published, and whether it is live."""
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
    """Return the metric that says most about a version; None without metrics."""
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
    """A number in four digits; – for none."""
    return f"{value:.4g}" if isinstance(value, float) else dash(value)


def dash(value: object) -> str:
    """A value as text; – for none."""
    return "–" if value is None else str(value)


def when(time: str | None) -> str:
    """A time to the second, in UTC."""
    return dash(time if time is None else time[:19].replace("T", " "))


def size(count: float) -> str:
    """Bytes for people."""
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
    """Whether the publish of a job moved live to its version."""
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
