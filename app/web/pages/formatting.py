"""Formatting of numbers, times and names: the filters of the templates."""

import math
from datetime import UTC, datetime
from urllib.parse import quote

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
_DIGEST_DIGITS = 10
# The same list is in `sentence` of app/web/static/js/wording.js.
_CAPITALISED = frozenset(
    (
        "a",
        "an",
        "at",
        "each",
        "every",
        "it",
        "its",
        "no",
        "none",
        "one",
        "only",
        "the",
        "there",
        "they",
        "this",
        "which",
    )
)
_METRICS = {
    "loss": "Loss",
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "micro_f1": "Micro F1",
    "exact_match": "Exact match",
    "calibration_error": "Calibration error",
    "r2_mean": "R², mean",
    "mae_mean": "Mean absolute error",
    "rmse": "RMSE",
    "cosine": "Cosine",
    "recall_at_1": "Recall at 1",
    "recall_at_5": "Recall at 5",
    "recall_at_10": "Recall at 10",
    "mrr": "MRR",
}


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
    return _METRICS.get(name, name.replace("_", " ").capitalize())


def inline(text: str) -> str:
    """Return a metric's label for use within a sentence: `accuracy`, but `RMSE`."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def sentence(text: str) -> str:
    """Return a text with a full stop and an initial capital.

    Only the words of `_CAPITALISED` get a capital, because others may be names of adapters, data sets or fields.
    """
    whole_text = text[:1].upper() + text[1:] if text.partition(" ")[0] in _CAPITALISED else text
    return whole_text if whole_text.endswith((".", "!", "?")) else f"{whole_text}."


FILTERS = {
    "whole": whole,
    "figure": figure,
    "size": size,
    "count": count,
    "when": when,
    "clock": clock,
    "lasted": lasted,
    "short": short,
    "part": part,
    "metric": metric,
    "inline": inline,
    "sentence": sentence,
}
