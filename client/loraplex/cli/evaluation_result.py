"""Tables of the result of an evaluation, for people."""

from typing import Any

from loraplex.cli.output import Table, cell_text, plural
from loraplex.results import EvaluatedAdapter, EvaluationResult

# Metrics of docs/metrics.md beside the figure that is compared.
_METRICS = ("accuracy", "exact_match", "macro_f1", "r2_mean", "rmse", "cosine", "loss")
_LOWER_IS_BETTER = ("mse", "rmse", "loss")
# Past these, the figures by class are in the JSON alone.
_MAX_CLASSES, _MAX_COLUMNS = 20, 4


def evaluation_tables(result: EvaluationResult) -> list[Any]:
    """Return the figures of each adapter, those of each class if there are few, and what could not be compared."""
    measured = [entry for entry in result.adapters if entry.problem is None]
    parts: list[Any] = [_figure_table(result)] if measured else []
    if measured and measured[0].classes is not None:
        parts += ["", *_class_table(measured)]
    notes = [line for entry in result.adapters for line in _problems(entry)]
    return [*parts, "", *notes] if parts and notes else [*parts, *notes]


def name_of_entry(entry: EvaluatedAdapter) -> str:
    """Return the reference of an entry, or words for the base layer."""
    return entry.adapter or "base layer"


def _figure_table(result: EvaluationResult) -> Table:
    first = next(iter(result.adapters))
    gain = f"gain over {name_of_entry(first)}"
    shown = [
        name for name in _METRICS if name != result.metric and any(name in (e.metrics or ()) for e in result.adapters)
    ]
    rows = [
        (
            name_of_entry(entry),
            cell_text(entry.figure)
            + ("" if entry.interval is None else " ({} – {})".format(*map(cell_text, entry.interval))),
            None
            if entry.gain is None
            else f"{entry.gain:+.4g}" + ("" if entry.gain_error is None else f" ± {entry.gain_error:.2g}"),
            *((entry.metrics or {}).get(name) for name in shown),
        )
        for entry in result.adapters
    ]
    headings = ("", _heading(result.metric), gain, *map(_heading, shown))
    title = f"On {plural(result.rows, 'row')}"
    return Table(headings, rows, title=title, right=headings[1:], least=headings[:2:-1])


def _heading(metric: str) -> str:
    return f"{metric} {'↓' if metric in _LOWER_IS_BETTER else '↑'}"


def _class_table(entries: list[EvaluatedAdapter]) -> list[Any]:
    """Return precision and recall of each class, side by side."""
    by_entry = [{figures.label: figures for figures in entry.classes or ()} for entry in entries]
    labels = list(dict.fromkeys(label for figures in by_entry for label in figures))
    if len(labels) > _MAX_CLASSES or len(entries) > _MAX_COLUMNS:
        return ["--json has precision, recall and the confusion matrix of each class"]
    headings = ("class", "rows", *map(name_of_entry, entries))
    rows = []
    for label in labels:
        figures = [of_entry.get(label) for of_entry in by_entry]
        count = next(one.rows for one in figures if one is not None)
        cells = (None if one is None else f"{cell_text(one.precision)} / {cell_text(one.recall)}" for one in figures)
        rows.append((label, count, *cells))
    return [Table(headings, rows, title="Precision / recall", right=headings[1:], least=headings[:2:-1])]


def _problems(entry: EvaluatedAdapter) -> list[str]:
    name = name_of_entry(entry)
    if entry.problem is not None:
        return [f"{name} could not be evaluated: {entry.problem}"]
    if not entry.missing_labels:
        return []
    labels = ", ".join(str(label)[:40] for label in entry.missing_labels[:3])
    more = ", …" if len(entry.missing_labels) > 3 else ""
    return [f"{name} has no output for {labels}{more}: {plural(entry.missing_rows, 'row')} cannot be right"]
