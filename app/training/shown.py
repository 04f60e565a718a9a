"""What a job shows of its request, and what a version tells of where it came from."""

from dataclasses import asdict
from typing import Any

from adapters.catalog.versions import Version
from adapters.lora.adapter import Adapter
from adapters.training.settings import Init, TrainingSpec
from app.training.fields import IGNORED
from app.training.rows import Rows
from app.training.schemas import TrainRequest, is_auto
from app.training.starts import Start

_ALWAYS_SHOWN = frozenset(
    {
        "method",
        "loss",
        "epochs",
        "learning_rate",
        "batch_size",
        "seed",
        "init",
        "validation_fraction",
        "ridge",
    }
)
_OF_THE_SIDES = frozenset({"train", "held_out"})


def show(
    request: TrainRequest,
    spec: TrainingSpec,
    start: Start,
    rows: Rows,
    digest: str,
    prior: tuple[Version, Adapter] | None,
) -> dict[str, Any]:
    """The resolved settings as the job shows them: what the method uses and is not as usual, the data by digest."""
    given = request.training
    # What only held-out rows decide is still open.
    open_fields = ({"learning_rate"} if spec.try_rates else set()) | ({"ridge"} if spec.try_ridges else set())
    training: dict[str, Any] = {}
    # Without warnings: a field that is auto is not of the type that it has otherwise.
    for name, value in given.model_dump(warnings=False).items():
        if name in IGNORED[spec.method] or not (name in _ALWAYS_SHOWN or given.gave(name)):
            continue
        decided = is_auto(value) and name not in open_fields
        training[name] = getattr(spec, name) if decided else value
    if "init" in training:
        training["init"] = start.shown
    if prior is not None:
        training["prior"] = {"adapter": reference_of(prior[0])}
    shown: dict[str, Any] = {
        "name": request.name,
        "rank": spec.rank if not spec.try_ranks else "auto",
        "alpha": spec.alpha if not spec.try_ranks or not spec.alpha_is_rank else "auto",
        "data": {**rows.shown, "rows": rows.count, "digest": digest},
        "training": training,
        "publish": request.publish,
    }
    if rows.labels is not None:
        shown["labels"] = list(rows.labels)
    return shown | ({"rslora": True} if spec.rslora and spec.init is Init.FACTORS else {})


def lineage_of(
    spec: TrainingSpec,
    start: Start,
    rows: Rows,
    digest: str,
    prior: tuple[Version, Adapter] | None,
    sides: dict[str, Any] | None,
) -> dict[str, Any]:
    """What a version keeps: enough to train it again from the same data."""
    return {
        "loss": str(spec.loss),
        "data": {**rows.shown, "rows": rows.count, "digest": digest},
        "split": None if sides is None else {name: sides[name] for name in sides if name not in _OF_THE_SIDES},
        "seed": spec.seed,
        "spec": asdict(spec),
        "parent": start.shown["adapter"] if isinstance(start.shown, dict) and "adapter" in start.shown else None,
        "prior": None if prior is None else reference_of(prior[0]),
    }


def reference_of(version: Version) -> str:
    """`name@3`."""
    return f"{version.adapter}@{version.version}"
