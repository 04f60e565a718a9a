"""A request that has passed every check, and its way into the queue."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from adapters.errors import EstimateTooLarge
from adapters.jobs.job import Job
from adapters.jobs.job_adapters import JobAdapter
from adapters.training.data_file import Column, DataFile
from adapters.training.evaluation.gate import Gate
from adapters.training.planning.estimate import Estimate
from adapters.training.settings import TrainingSpec
from app.service import Service


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A request that has passed every check."""

    name: str
    fleet: list[JobAdapter] | None
    spec: TrainingSpec
    gate: Gate
    labels: tuple[str | int, ...] | None
    columns: Callable[[], dict[str, Column]]
    """Of the data file; anew at each call."""
    shown: dict[str, Any]
    lineage: dict[str, Any]
    steps: int
    estimate: Estimate
    rows: int
    is_update: bool = False
    """Whether the fit begins with the statistics of the live version."""

    def answer(self) -> dict[str, Any]:
        """What a dry run answers."""
        return {"spec": self.shown, "estimate": asdict(self.estimate), "adapters": len(self.fleet or [0])}


def submit(service: Service, plan: Plan) -> Job:
    """Store the data and the job of a plan."""
    adapters = plan.fleet or [JobAdapter(plan.name, None, plan.rows)]

    def write(file: BinaryIO) -> None:
        DataFile(plan.columns()).write(file)

    return service.queue.submit(
        service.new_id(),
        adapter=plan.name,
        adapters=adapters,
        base=service.base.fingerprint,
        feature_space=service.settings.feature_space,
        spec={
            "shown": plan.shown,
            "resolved": asdict(plan.spec),
            "steps": plan.steps,
            "publish": asdict(plan.gate),
            "fleet": plan.fleet is not None,
            "adapters": len(adapters),
            "labels": None if plan.labels is None else list(plan.labels),
            "update": plan.is_update,
            "lineage": plan.lineage,
        },
        steps=plan.steps,
        data=write,
        max_queued=service.settings.max_queued_jobs,
    )


def check_estimate(guessed: Estimate, most_bytes: int) -> None:
    """Raises `EstimateTooLarge` where a trainer may not use as much memory."""
    if guessed.memory_bytes > most_bytes:
        raise EstimateTooLarge(
            f"the training is estimated to need {guessed.memory_bytes} bytes of memory, a trainer may use {most_bytes} "
            "(LORAPLEX_TRAINER_MEMORY_BYTES)",
            field="data",
            given=guessed.memory_bytes,
            expected=f"a training of at most {most_bytes} bytes",
        )
