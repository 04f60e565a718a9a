"""Retry of a job: its request again, on the same rows, for the adapters that need it."""

from collections.abc import Collection, Mapping
from typing import Any

from adapters.datasets.store import Datasets
from adapters.errors import Conflict, DataGone, JobNotEnded, NotFound
from adapters.jobs.job import Job
from adapters.jobs.job_adapters import AdapterOutcome, Selection
from adapters.jobs.queue import JobQueue
from adapters.names import parse_reference


def retry_request(job: Job, datasets: Datasets, *, training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request of a job as it was sent, with settings replaced, on the same version of its data set.

    Raises `JobNotEnded`, and `DataGone` if the rows are not stored any more, or never were.
    """
    if not job.ended:
        detail = f"job {job.id} is {job.status}: cancel it first, or wait for its end"
        raise JobNotEnded(detail, field="id", given=job.status)
    sent, data = job.training.request, job.training.provenance.data
    reference = data.get("dataset")
    if sent is None or reference is None:
        raise _data_gone(job, "the rows of job {} were in the request, and are not kept")
    try:
        version = datasets.find(parse_reference(reference), tenant=job.tenant)
    except NotFound:
        raise _data_gone(job, f"the data set {reference} of job {{}} was deleted") from None
    if version.digest != data.get("dataset_digest"):
        raise _data_gone(job, f"{reference} is no longer the data set of job {{}}")
    pinned = {**sent["data"], "dataset": reference}
    return {**sent, "data": pinned, "training": {**(sent.get("training") or {}), **training}}


def retry_groups(job: Job, queue: JobQueue, outcomes: Collection[AdapterOutcome]) -> frozenset[str | None]:
    """Return the groups of a job's adapters with one of these outcomes; raise `Conflict` if there is none."""
    adapters = queue.adapters(job.id, Selection(outcomes=outcomes), tenant=job.tenant)
    if not adapters:
        names = " or ".join(sorted(outcomes))
        raise Conflict(f"job {job.id} has no adapter that is {names}", field="outcomes", given=list(outcomes))
    return frozenset(adapter.group for adapter in adapters)


def _data_gone(job: Job, detail: str) -> DataGone:
    expected = "a job on a data set that is still there"
    return DataGone(f"{detail.format(job.id)}: send them again", field="id", given=job.id, expected=expected)
