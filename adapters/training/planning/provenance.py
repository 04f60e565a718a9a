"""Description of a training: what the job shows of it, and what its versions come from."""

from dataclasses import asdict
from typing import Any

from adapters.jobs.training_job import Provenance
from adapters.training.planning.auto import Decisions
from adapters.training.planning.initialization import Initialization
from adapters.training.planning.request import TrainingRequest
from adapters.training.planning.split_report import SplitReport
from adapters.training.settings import AUTO, SETTINGS, EarlyStopping, Init, TrainingSpec, unused_settings

_ALWAYS_SHOWN = frozenset(
    {"method", "loss", "epochs", "learning_rate", "batch_size", "seed", "init", "validation_fraction", "ridge"}
)


def describe(
    request: TrainingRequest,
    spec: TrainingSpec,
    start: Initialization,
    provenance: Provenance,
    *,
    labels: tuple[str | int, ...] | None,
    split: SplitReport | None,
    decisions: Decisions,
    warnings: list[str],
) -> dict[str, Any]:
    """Return the resolved settings as the job shows them: what the method uses, and the data by digest."""
    description: dict[str, Any] = {
        "name": request.name,
        "rank": AUTO if spec.try_ranks else spec.rank,
        "alpha": AUTO if spec.try_ranks and spec.alpha_is_rank else spec.alpha,
        "data": provenance.data,
        "training": _describe_settings(request, spec, start, provenance),
        "publish": request.publish.as_sent,
    }
    optional = {
        "labels": None if labels is None else list(labels),
        "rslora": spec.rslora and spec.init is Init.FACTORS,
        "warnings": warnings,
        "split": None if split is None else split.to_json(),
        "auto": dict(decisions.reasons),
    }
    return description | {name: value for name, value in optional.items() if value}


def _describe_settings(
    request: TrainingRequest, spec: TrainingSpec, start: Initialization, provenance: Provenance
) -> dict[str, Any]:
    settings, unused = request.settings, unused_settings(spec.method)
    # Only the held-out rows decide these, in the fit.
    open_names = {"learning_rate": bool(spec.try_rates), "ridge": spec.try_ridges}
    members: dict[str, Any] = {}
    for name in SETTINGS:
        if name in unused or not (name in _ALWAYS_SHOWN or name in settings.given):
            continue
        value = getattr(settings, name)
        if name == "init":
            value = start.description()
        elif name == "prior" and provenance.prior is not None:
            value = {"adapter": provenance.prior}
        elif isinstance(value, EarlyStopping):
            value = asdict(value)
        elif value == AUTO and not open_names.get(name, False):
            value = getattr(spec, name)
        members[name] = value
    return members
