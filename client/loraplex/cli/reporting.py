"""What a training came to, for people."""

from collections.abc import Mapping
from typing import Any

from loraplex.cli.tables import Fitting, Pairs
from loraplex.results import JobFields, Version

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
_SIDES: Mapping[str, str] = {
    "adapter": "adapter",
    "base": "bare base",
    "trivial": "trivial guess",
    "live": "live before",
}


def pairs(values: Mapping[str, object]) -> Pairs:
    """A table of names and values."""
    return Pairs({name: dash(value) for name, value in values.items()})


def held_out(metrics: Mapping[str, Any] | None) -> Fitting | None:
    """The metrics on held-out rows, with the adapter and without; None where no rows were held out."""
    told = (metrics or {}).get("held_out")
    if not told:
        return None
    sides = [side for side in _SIDES if told.get(side)]
    headings = [_SIDES[side] for side in sides]
    made = Fitting("", *headings, title=f"On {told['rows']:,} held-out rows", right=headings)
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


def headline(version: Version) -> str:
    """The one metric that says most about a version: its own, and the bare base layer's."""
    metrics = version.metrics or {}
    told = metrics.get("held_out") or {"adapter": {}}
    for name in _HEADLINES:
        if told["adapter"].get(name) is not None:
            return f"{name} {number(told['adapter'][name])} (base {number(told['base'].get(name))})"
    if metrics.get("train_loss") is not None:
        return f"train_loss {number(metrics['train_loss'])} (base {number(metrics.get('base_train_loss'))})"
    return "–"


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
