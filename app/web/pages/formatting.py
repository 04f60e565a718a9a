"""Formatting of numbers, times, names and tables of metrics: the filters of the templates."""

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import quote

from adapters.training.evaluation.metrics import HIGHER_IS_BETTER, PRIMARY

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
_DIGEST_DIGITS = 10
# The same list is in app/web/static/js/wording.js. Other words may be names of adapters, data sets or fields.
_CAPITALISED = "a|an|at|each|every|it|its|no|none|one|only|the|there|they|this|which"
# Labels of the metrics whose names are not words.
_LABELS = {
    "macro_f1": "Macro F1",
    "micro_f1": "Micro F1",
    "r2_mean": "R², mean",
    "mae_mean": "Mean absolute error",
    "rmse": "RMSE",
    "mrr": "MRR",
    "mse": "Mean squared error",
}
_MODELS = {"adapter": "Adapter", "base": "Base layer", "trivial": "Trivial guess", "live": "Previous live"}
_EVALUATED = {"adapter": "Adapter", "live": "Live before", "base": "Base layer", "guess": "Trivial guess"}
_ROWS = {"held_out": "held-out", "cross_validation": "cross-validated", "leave_one_out": "left-out"}
_LOWER_IS_BETTER = ("mse", "loss", "log_loss")
_MAIN_METRICS = (*PRIMARY.values(), "loss")


def whole(number: int) -> str:
    """Format a whole number: `12,345`."""
    return f"{number:,}"


def figure(number: object) -> str:
    """Format a number with three significant digits: `0.0661`, `15.9`, `1.2e-05`; anything else is an en dash."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return "–"
    if isinstance(number, int):
        return whole(number)
    if not math.isfinite(number):
        return "–"
    if number == 0:
        return "0"
    if abs(number) >= 999.5:  # three digits of these are 1e+03
        return f"{number:,.0f}"
    return f"{number:.3g}"


def size(number: int) -> str:
    """Format a size in bytes: `264 KiB`."""
    value = float(number)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def count(number: int, one: str, many: str | None = None) -> str:
    """Format a number with its noun: `1 row`, `500 rows`."""
    return f"{whole(number)} {one if number == 1 else many or one + 's'}"


def when(text: str) -> str:
    """Format an RFC 3339 time: `25 Nov 2026, 02:58 UTC`."""
    return datetime.fromisoformat(text).astimezone(UTC).strftime("%-d %b %Y, %H:%M UTC")


def clock(text: str) -> str:
    """Format the clock time of an RFC 3339 time: `02:58:26`."""
    return datetime.fromisoformat(text).astimezone(UTC).strftime("%H:%M:%S")


def lasted(begin: str, end: str) -> str:
    """Format the time between two RFC 3339 times: `0.9 s`, `3 min 20 s`."""
    seconds = (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def short(digest: str) -> str:
    """Return the first digits of a digest, without the name of its algorithm."""
    return digest.removeprefix("sha256:")[:_DIGEST_DIGITS]


def part(text: str) -> str:
    """Quote any text as one segment of a path."""
    return quote(text, safe="")


def metric(name: str) -> str:
    """Return the label of a metric."""
    return _LABELS.get(name, name.replace("_", " ").capitalize())


def inline(text: str) -> str:
    """Return a metric's label for use within a sentence: `accuracy`, but `RMSE`."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def sentence(text: str) -> str:
    """Return a text with a full stop, and with an initial capital if it begins with a word of `_CAPITALISED`."""
    capitalised = text[:1].upper() + text[1:] if re.match(rf"({_CAPITALISED})(?= |$)", text) else text
    return capitalised if capitalised.endswith((".", "!", "?")) else f"{capitalised}."


class Measure(NamedTuple):
    """One metric of all compared models on the same rows."""

    name: str
    higher_is_better: bool
    values: tuple[Any, ...]
    best: int | None
    """Index of the best value; None if fewer than two models have one."""


class HeldOut(NamedTuple):
    """Comparison on rows that were not trained on."""

    rows: int | None
    """None if the number is unknown."""
    models: list[str]
    measures: list[Measure]


class Evaluation(NamedTuple):
    """Figures of the models that an evaluation compares."""

    title: str
    metric: str
    higher_is_better: bool
    figures: list[tuple[str, float, Any]]
    """Model, figure and interval; the interval may be None."""
    gain: str | None
    """The gain with its standard error, in words."""


class Headline(NamedTuple):
    """Metric that a list shows."""

    rows: str
    """Rows that it was computed on: `held-out`, `cross-validated` or `training`."""
    name: str
    adapter: float
    base: float | None


def held_out(metrics: Mapping[str, Any] | None) -> HeldOut | None:
    """Compare the adapter with the base, a trivial guess and the previous live version; None without held-out rows."""
    comparison = _comparison(metrics or {})
    if comparison is None:
        return None
    models = [model for model in _MODELS if comparison.get(model) is not None]
    measures = [_measure(name, comparison, models) for name in HIGHER_IS_BETTER if name in comparison["adapter"]]
    return HeldOut(comparison.get("rows"), [_MODELS[model] for model in models], measures)


def losses(metrics: Mapping[str, Any] | None) -> list[tuple[str, Any, Any]]:
    """Return the label, and the values of adapter and base, of each metric on the training rows."""
    values = metrics or {}
    names = [name for name in ("loss", "accuracy") if values.get(f"train_{name}") is not None]
    return [(metric(name), values[f"train_{name}"], values.get(f"base_train_{name}")) for name in names]


def evaluation(report: Mapping[str, Any] | None) -> Evaluation | None:
    """Return the evaluation of a report as a table; None without one."""
    values = (report or {}).get("evaluation")
    if values is None:
        return None
    figures = [
        (label, values[model], (values.get("intervals") or {}).get(model))
        for model, label in _EVALUATED.items()
        if values.get(model) is not None
    ]
    kind = _ROWS.get(values["by"], values["by"])
    gain = None
    if values.get("gain") is not None:
        over = "the base layer" if values.get("live") is None else "the version that was live"
        gain = f"Gain over {over}: {signed(values['gain'])} per row, standard error {figure(values.get('gain_error'))}."
    title = f"On {count(values['rows'], f'{kind} row')}"
    return Evaluation(title, values["metric"], is_higher_better(values["metric"]), figures, gain)


def is_higher_better(name: str) -> bool:
    """Return whether a higher figure of this metric is better."""
    return name not in _LOWER_IS_BETTER


def signed(number: object) -> str:
    """Format a number as `figure` does, with its sign."""
    text = figure(number)
    return f"+{text}" if isinstance(number, int | float) and number > 0 else text.replace("-", "−", 1)


def headline(metrics: Mapping[str, Any] | None, report: Mapping[str, Any] | None = None) -> Headline | None:
    """Return the figure of the evaluation, the main metric on held-out rows, or the loss on training rows."""
    values = metrics or {}
    evaluated = (report or {}).get("evaluation")
    if evaluated is not None and evaluated["adapter"] is not None:
        kind = _ROWS.get(evaluated["by"], evaluated["by"])
        return Headline(kind, evaluated["metric"], evaluated["adapter"], evaluated["base"])
    comparison = _comparison(values)
    if comparison is not None:
        for name in _MAIN_METRICS:
            if isinstance(value := comparison["adapter"].get(name), int | float):
                return Headline("held-out", name, value, comparison["base"].get(name))
    if isinstance(value := values.get("train_loss"), int | float):
        return Headline("training", "loss", value, values.get("base_train_loss"))
    return None


def _comparison(metrics: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return `held_out`, or the same form of the fewer metrics that a fleet's adapters have."""
    comparison: Mapping[str, Any] | None = metrics.get("held_out")
    if comparison is not None:
        return comparison
    names = [name for name in ("loss", "accuracy") if metrics.get(f"validation_{name}") is not None]
    if not names:
        return None
    return {
        "adapter": {name: metrics[f"validation_{name}"] for name in names},
        "base": {name: metrics.get(f"base_validation_{name}") for name in names},
    }


def _measure(name: str, comparison: Mapping[str, Any], models: Sequence[str]) -> Measure:
    values = [comparison[model].get(name) for model in models]
    # Class frequencies are calibrated by construction, so that the guess is not ranked.
    ranked = [
        (value, index)
        for index, (model, value) in enumerate(zip(models, values, strict=True))
        if isinstance(value, int | float) and (name, model) != ("calibration_error", "trivial")
    ]
    is_better = HIGHER_IS_BETTER[name]
    best = (max if is_better else min)(ranked)[1] if len(ranked) > 1 else None
    return Measure(name, is_better, tuple(values), best)


_FUNCTIONS = whole, figure, signed, size, count, when, clock, lasted, short, part, metric, inline, sentence
_TABLES = held_out, losses, headline, evaluation, is_higher_better
FILTERS = {function.__name__: function for function in (*_FUNCTIONS, *_TABLES)}
