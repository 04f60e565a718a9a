"""Summary of the result of a training, for people."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from loraplex.cli.output import Table, alert, cell_text, pairs, plural
from loraplex.cli.session import Session
from loraplex.results import AdapterRef, Comparison, Evaluation, FleetOutcomes, JobAdapter, JobFields

# Metrics of docs/metrics.md, in the order of their display.
_METRICS = (
    *("accuracy", "exact_match", "macro_f1", "micro_f1", "recall_at_1", "recall_at_5", "recall_at_10", "mrr"),
    *("r2_mean", "rmse", "mae_mean", "cosine", "calibration_error", "loss"),
)
_LOWER_IS_BETTER = ("rmse", "mae_mean", "calibration_error", "loss", "mse", "log_loss")
_HEADLINES = ("accuracy", "exact_match", "recall_at_1", "rmse")
# Kind, metric and member of a version without `held_out`, such as a fleet adapter; the base layer's has the prefix
# `base_`.
_WITHOUT_EVALUATION = (
    ("held-out", "accuracy", "validation_accuracy"),
    ("held-out", "loss", "validation_loss"),
    ("training", "loss", "train_loss"),
)
_SUBJECTS = {"adapter": "adapter", "base": "base layer", "trivial": "trivial guess", "live": "live before"}
_EVALUATED = {"adapter": "adapter", "live": "live before", "base": "base layer", "guess": "trivial guess"}
_ROWS = {"held_out": "held-out", "cross_validation": "cross-validated", "leave_one_out": "left-out"}
_MAX_NAMED = 3


class Headline(NamedTuple):
    """Most important metric of a version on rows of one kind, for the version and for the base layer.

    Held-out rows come first, because the loss on training rows does not show how good a version is on other rows.
    """

    kind: str
    """The rows that it was computed on: `held-out`, `cross-validated` or `training`."""
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
        return self.base - self.own if self.metric in _LOWER_IS_BETTER else self.own - self.base

    def __str__(self) -> str:
        return f"{self.heading} {cell_text(self.own)} (base {cell_text(self.base)})"


# An adapter of a fleet with its most important metric.
Reached = tuple[JobAdapter, Headline]


def evaluation(value: Evaluation | None) -> list[Any]:
    """Return the figures of an evaluation with their intervals, and the gain; nothing without an evaluation."""
    if value is None:
        return []
    figures = {subject: getattr(value, name) for name, subject in _EVALUATED.items()}
    intervals = {_EVALUATED[name]: value.intervals.get(name) for name in _EVALUATED}
    rows = [
        (subject, figure, None if intervals[subject] is None else " – ".join(map(cell_text, intervals[subject] or ())))
        for subject, figure in figures.items()
        if figure is not None
    ]
    name = _name(value.metric)
    heading = f"{name} {_arrow(value.metric)}"
    title = f"{name.capitalize()} on {plural(value.rows, f'{_ROWS.get(value.by, value.by)} row')}"
    lines: list[Any] = [Table(("", heading, "95 % interval"), rows, title=title, right=(heading,))]
    if value.gain is not None:
        over = "base layer" if value.live is None else "live version before"
        lines.append(f"gain over the {over}: {value.gain:+.4g} per row, standard error {cell_text(value.gain_error)}")
    return lines


def comparison(value: Comparison | None) -> list[Any]:
    """Return what `method: auto` tried and took; nothing if it did not choose."""
    if value is None:
        return []
    heading = f"{_name(value.metric)} {_arrow(value.metric)}"
    rows = []
    for tried in value.candidates:
        values = {name: ("no", "yes")[of] if isinstance(of, bool) else of for name, of in tried.settings.items()}
        settings = ", ".join(f"{_name(name)} {cell_text(of)}" for name, of in values.items() if of is not None)
        note = f"skipped: {tried.skipped}" if tried.skipped else settings
        rows.append((f"{_name(tried.candidate)}{' *' * (tried.candidate == value.taken)}", tried.figure, note))
    rows_left_out = plural(value.rows, "left-out row")
    if value.by == "held_out":
        rows_left_out = f"a fifth of {plural(value.rows, 'training row')}"
    title = f"What auto compared: loss on {rows_left_out}"
    table = Table(("candidate", heading, "settings"), rows, title=title, right=(heading,), folds="settings")
    return [table, f"* taken: {_name(value.taken)}, {value.reason}"]


def adapter_table(adapters: Iterable[JobAdapter]) -> Table:
    """Return a table of adapters of a job with their outcomes."""
    rows = []
    for adapter in adapters:
        metric, decision = headline_of(adapter), adapter.decision
        figures = (None, None) if metric is None else (metric.own, metric.base)
        live = "yes" if adapter.moved_live else "no" if adapter.version else None
        reason = adapter.error.detail if adapter.error else decision.reason if decision else None
        # The name of a group that is no valid name says little about it.
        is_renamed = adapter.group is not None and adapter.group not in adapter.name
        name = f"{adapter.name} ({adapter.group})" if is_renamed else adapter.name
        rows.append((name, f"{adapter.rows:,}", adapter.outcome, adapter.gain, *figures, live, reason))
    return Table(
        ("adapter", "rows", "outcome", "gain", "figure", "base", "live", "reason"),
        rows,
        right=("rows", "gain", "figure", "base"),
        folds="reason",
        least=("reason", "live", "rows"),
    )


def _name(text: str) -> str:
    return text.replace("_", " ")


def _arrow(metric: str) -> str:
    return "↓" if metric in _LOWER_IS_BETTER else "↑"


def headline_of(trained: JobAdapter | JobFields) -> Headline | None:
    """Return the most important metric of an adapter of a job, or of its only one: that of its evaluation, if any."""
    value = trained.evaluation
    if value is None or value.adapter is None:
        return headline(trained.metrics)
    return Headline(_ROWS.get(value.by, value.by), value.metric, value.adapter, value.base)


def headline(metrics: Mapping[str, Any] | None) -> Headline | None:
    """Return the most important metric of a version; None without metrics."""
    metrics = metrics or {}
    own, base = ((metrics.get("held_out") or {}).get(subject, {}) for subject in ("adapter", "base"))
    candidates = [("held-out", name, own.get(name), base.get(name)) for name in _HEADLINES]
    for kind, name, member in _WITHOUT_EVALUATION:
        candidates.append((kind, name, metrics.get(member), metrics.get(f"base_{member}")))
    return next((Headline(*candidate) for candidate in candidates if candidate[2] is not None), None)


def held_out(metrics: Mapping[str, Any] | None) -> list[Table]:
    """Return a table of the metrics on held-out rows, with and without the adapter; nothing if there are none."""
    evaluation = (metrics or {}).get("held_out") or _validation(metrics or {})
    subjects = [subject for subject in _SUBJECTS if evaluation.get(subject)]
    if not subjects:
        return []
    headings = [_SUBJECTS[subject] for subject in subjects]
    count = f"{evaluation['rows']:,} " if "rows" in evaluation else ""
    rows = [
        (f"{name} {_arrow(name)}", *(_cell(evaluation, subject, name) for subject in subjects))
        for name in _METRICS
        if name in evaluation["adapter"]
    ]
    return [Table(("", *headings), rows, title=f"On {count}held-out rows", right=headings)]


def outcome_lines(job: JobFields) -> list[Any]:
    """Return the training loss, and what was selected and published, and whether it is live."""
    metrics = job.metrics or {}
    lines: list[Any] = []
    if metrics.get("train_loss") is not None:
        own, base = cell_text(metrics["train_loss"]), cell_text(metrics.get("base_train_loss"))
        lines.append(f"loss on the training rows: {own} (base layer: {base})")
    if metrics.get("chosen"):
        lines.append("chosen: " + ", ".join(f"{name} {cell_text(value)}" for name, value in metrics["chosen"].items()))
    if "published" in metrics:
        lines.append(f"published {metrics['published']} of {metrics['total']} adapters, {metrics['failed']} failed")
    if not isinstance(job.result, AdapterRef):
        return lines
    if is_live(job):
        reason = f": {job.decision.reason}" if job.decision else ""
        lines.append(f"{job.result} is live{reason}")
    else:
        undo = f"loraplex rollback {job.result.name} {job.result.version}"
        why = _reason_against(job)
        lines.append(alert(f"{job.result} was made, and live did not move: {why}. To make it live: {undo}"))
    return lines


def _reason_against(job: JobFields) -> str:
    """Return the reason for which live did not move."""
    if job.decision is not None:
        return job.decision.reason.rstrip(".")
    gate = (job.metrics or {}).get("gate")
    return gate["reason"] if gate else "--publish never was asked for"


def is_live(job: JobFields) -> bool:
    """Return whether a job made its version live."""
    if job.decision is not None:
        return job.decision.moved
    gate = (job.metrics or {}).get("gate")
    publish = job.spec.get("publish", "always")
    when = publish.get("when") if isinstance(publish, Mapping) else publish
    return when != "never" if gate is None else bool(gate["moves_live"])


def fleet_summary(session: Session, job: JobFields) -> list[Any]:
    """Return what the adapters of a fleet reached, as tables and lines; nothing for a job of one adapter."""
    if session.as_json or "{" not in job.adapter:
        return []
    return summarize(session.client.job_adapters(job.id), job.summary)


def summarize(adapters: Iterable[JobAdapter], outcomes: FleetOutcomes | None = None) -> list[Any]:
    """Return counts, the median of one metric, the adapters with the smallest gain, and failures."""
    adapters = list(adapters)
    failed = [adapter for adapter in adapters if adapter.error is not None]
    waiting = [adapter for adapter in adapters if adapter.error is None and adapter.version is None]
    published = len(adapters) - len(failed) - len(waiting)
    about = {"adapters": f"{published:,} published, {len(failed):,} failed"}
    about["adapters"] += f", {len(waiting):,} waiting" if waiting else ""
    if outcomes is not None:
        counts = f"{outcomes.better:,} better, {outcomes.same:,} the same, {outcomes.worse:,} worse"
        about["outcomes"] = f"{counts}, {outcomes.failed:,} failed; live moved for {outcomes.moved:,}"
    failures = [f"{adapter.name} failed: {adapter.error.detail}" for adapter in failed[:_MAX_NAMED] if adapter.error]
    headlines = [(adapter, headline_of(adapter)) for adapter in adapters if adapter.error is None]
    reached = [(adapter, metric) for adapter, metric in headlines if metric is not None]
    if not reached:
        return [pairs(about), *failures]
    # Figures on other rows cannot be compared; those on training rows are shown only if there are no others.
    counts_by_heading = Counter(metric.heading for _, metric in reached if metric.kind != "training")
    heading = counts_by_heading.most_common(1)[0][0] if counts_by_heading else reached[0][1].heading
    reached = [(adapter, metric) for adapter, metric in reached if metric.heading == heading]
    return [*_gains(reached, heading, about), *failures]


def _gains(reached: Sequence[Reached], heading: str, about: Mapping[str, str]) -> list[Any]:
    """Return a table of `about` and the median of one metric, and one of the adapters with the smallest gain."""
    bases = [metric.base for _, metric in reached if metric.base is not None]
    gains = [metric.gain for _, metric in reached if metric.gain is not None]
    own, base = cell_text(median(metric.own for _, metric in reached)), cell_text(median(bases) if bases else None)
    medians = {
        heading: f"median {own} (base {base}), of {plural(len(reached), 'adapter')}",
        "better than base": f"{sum(gain > 0 for gain in gains):,} of {len(gains):,}",
    }
    least = sorted(reached, key=lambda item: item[1].gain or 0.0)[:_MAX_NAMED]
    table = Table(
        ("adapter", "rows", heading, "base"),
        [(adapter.name, f"{adapter.rows:,}", metric.own, metric.base) for adapter, metric in least],
        title="Least gain over the base layer",
        right=("rows", heading, "base"),
    )
    return [pairs({**about, **medians}), "", table]


def _validation(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of a version without `held_out` on held-out rows in the same form; empty if there are none."""
    if metrics.get("validation_loss") is None:
        return {}
    names = ("loss", "accuracy")
    return {
        "adapter": {name: metrics[f"validation_{name}"] for name in names if f"validation_{name}" in metrics},
        "base": {name: metrics.get(f"base_validation_{name}") for name in names},
    }


def _cell(evaluation: Mapping[str, Any], subject: str, name: str) -> str:
    """Return a metric of the adapter, the base layer or another model; that of the adapter with its interval."""
    interval = evaluation[subject].get(f"{name}_interval") if subject == "adapter" else None
    return cell_text(evaluation[subject].get(name)) + (
        " ({} – {})".format(*map(cell_text, interval)) if interval else ""
    )
