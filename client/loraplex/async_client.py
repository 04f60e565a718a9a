"""Asynchronous client and job.

`scripts/generate_client.py` makes `client.py`, the blocking client, from this file.
"""

# ruff: noqa: ASYNC109  # both clients have the same parameters, so `timeout` is one of them

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from loraplex.arrays import Encode
from loraplex.async_driver import AsyncDriver
from loraplex.calls import adapters as catalog
from loraplex.calls import datasets, jobs
from loraplex.calls import predict as predictions
from loraplex.calls import train as trainings
from loraplex.calls.jobs import succeeded
from loraplex.effects import ask
from loraplex.progress import Display
from loraplex.results import (
    Adapter,
    Base,
    Dataset,
    DatasetVersion,
    Estimate,
    Event,
    JobAdapter,
    JobFields,
    Label,
    Prediction,
    Preview,
    Reverted,
    Version,
)
from loraplex.transport import settings


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncJob(JobFields):
    """Training job, in the state in which it was fetched."""

    client: "AsyncClient" = field(repr=False, compare=False)

    async def wait(self, *, progress: bool | Display = False, timeout: float | None = None) -> "AsyncJob":
        """Wait for the end of the job, and return it; `progress` shows its progress on standard error or a `Display`.

        Raises `JobFailed` and `JobCancelled`, which carry the job, and `TimedOut` after `timeout` seconds. The job
        continues if the wait is interrupted.
        """
        return await self.client.wait(self.id, progress=progress, timeout=timeout)

    def events(self) -> AsyncIterator[Event]:
        """Iterate over the events of the job until it ends."""
        return self.client.events(self.id)

    async def refresh(self) -> "AsyncJob":
        """Return the current state of the job."""
        return await self.client.job(self.id)

    async def cancel(self) -> "AsyncJob":
        """Cancel the job; raise `JobEnded` if it has already ended."""
        return await self.client.cancel(self.id)

    def adapters(self, *, status: str | None = None, limit: int | None = None) -> AsyncIterator[JobAdapter]:
        """Iterate over the adapters that the job trains; `status` is `waiting`, `published` or `failed`."""
        return self.client.job_adapters(self.id, status=status, limit=limit)

    async def revert(self) -> Reverted:
        """Point the live aliases that the job moved back; raise `JobNotEnded` if it is running."""
        return await self.client.revert(self.id)


class AsyncClient:
    """Client of a loraplex service. Tasks of one event loop may share it; close it, or use it in an `async with`.

    `url` is the address of the service, by default `LORAPLEX_URL` or http://127.0.0.1:8000. With `encode`, such as the
    `encode` method of a SentenceTransformer, every method that takes inputs takes texts too. `feature_space` names that
    encoder; the service refuses inputs from an encoder that its layer was not made for. `timeout` is in seconds for
    each call, including its `retries`. Calls for which the service reads a data set or the rows of a training may take
    two minutes more, unless they are given a timeout of their own. A call is retried only if that is safe. Every error
    is a `LoraplexError`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        encode: Encode | None = None,
        feature_space: str | None = None,
        timeout: float = 30.0,
        retries: int = 4,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._settings = settings(
            url, encode=encode, feature_space=feature_space, timeout=timeout, retries=retries, headers=headers
        )
        self._driver = AsyncDriver(self._settings, transport)

    @property
    def url(self) -> str:
        """Address of the service."""
        return self._settings.url

    async def predict(
        self, adapter: str | Sequence[str | None] | None, inputs: Any, *, timeout: float | None = None
    ) -> Prediction:
        """Return the layer's outputs for rows, with one adapter for all rows (None is the base layer) or one per row.

        `inputs` is (rows, in_features) or one row, as a NumPy array, a tensor or nested lists, or texts if the client
        has an encoder. Rows that do not fit in one request are sent in several, and the same versions answer all.
        """
        encode = self._settings.encode
        return await self._driver.run(predictions.predict(adapter, inputs, encode=encode, timeout=timeout))

    async def classify(
        self, adapter: str | Sequence[str | None] | None, inputs: Any, *, top_k: int = 1, timeout: float | None = None
    ) -> list[list[Label]]:
        """Return the `top_k` most probable classes of each row, in order of probability."""
        encode = self._settings.encode
        steps = predictions.classify(adapter, inputs, top_k=top_k, encode=encode, timeout=timeout)
        return await self._driver.run(steps)

    async def train(
        self,
        name: str,
        *,
        rank: int | str,
        inputs: Any = None,
        targets: Any = None,
        weights: Any = None,
        groups: Any = None,
        labels: Sequence[str | int] | None = None,
        corpus: Any = None,
        data: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        split: Mapping[str, Any] | None = None,
        publish: str | Mapping[str, Any] | None = None,
        alpha: float | str | None = None,
        timeout: float | None = None,
    ) -> AsyncJob:
        """Queue the training of an adapter or of a fleet; the arguments are the fields of `POST /adapters`.

        The rows are `inputs` and `targets`, with optional weights and groups, or `data`, such as columns of a data set.
        Large arrays are sent as a temporary data set, which is deleted once the job has its rows.
        """
        rows = {
            "inputs": inputs,
            "targets": targets,
            "weights": weights,
            "groups": groups,
            "labels": labels,
            "corpus": corpus,
        }
        body = {"rank": rank, "alpha": alpha, "training": training, "split": split, "publish": publish}
        return self._job(await self._train(name, rows, data, body, timeout, dry_run=False))

    async def estimate(
        self,
        name: str,
        *,
        rank: int | str,
        inputs: Any = None,
        targets: Any = None,
        weights: Any = None,
        groups: Any = None,
        labels: Sequence[str | int] | None = None,
        corpus: Any = None,
        data: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        split: Mapping[str, Any] | None = None,
        publish: str | Mapping[str, Any] | None = None,
        alpha: float | str | None = None,
        timeout: float | None = None,
    ) -> Estimate:
        """Check the arguments of `train`, and return the resolved settings with the estimated memory and time."""
        rows = {
            "inputs": inputs,
            "targets": targets,
            "weights": weights,
            "groups": groups,
            "labels": labels,
            "corpus": corpus,
        }
        body = {"rank": rank, "alpha": alpha, "training": training, "split": split, "publish": publish}
        estimate: Estimate = await self._train(name, rows, data, body, timeout, dry_run=True)
        return estimate

    async def update(
        self,
        name: str,
        *,
        add: Mapping[str, Any] | None = None,
        forget: Mapping[str, Any] | None = None,
        publish: str | Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> AsyncJob:
        """Queue the refit of an adapter that kept its statistics, with rows to add and rows to forget.

        Both are `{"inputs": …, "targets": …, "weights": …}`, or columns of a data set.
        """
        rows, encode = {"add": add, "forget": forget}, self._settings.encode
        steps = trainings.update(name, rows, {"publish": publish}, encode=encode, timeout=timeout)
        return self._job(await self._driver.run(steps))

    async def job(self, job_id: str) -> AsyncJob:
        """Return the current state of a job."""
        return self._job(await self._driver.run(ask(jobs.show_job(job_id))))

    async def jobs(
        self,
        *,
        status: str | None = None,
        adapter: str | None = None,
        prefix: str | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[AsyncJob]:
        """Iterate over jobs, newest first and without their histories; `limit` is the most to return.

        `prefix` is the beginning of a job id, of at least 4 characters.
        """
        steps = jobs.list_jobs(status=status, adapter=adapter, prefix=prefix, limit=limit)
        async for job in self._driver.iterate(steps):
            yield self._job(job)

    def job_adapters(
        self, job_id: str, *, status: str | None = None, limit: int | None = None
    ) -> AsyncIterator[JobAdapter]:
        """Iterate over the adapters that a job trains; `status` is `waiting`, `published` or `failed`."""
        return self._driver.iterate(jobs.list_job_adapters(job_id, status=status, limit=limit))

    def events(self, job_id: str) -> AsyncIterator[Event]:
        """Iterate over the events of a job until it ends; a broken connection is opened again."""
        return self._driver.iterate(jobs.watch(job_id, self._settings.retry_policy))

    async def wait(self, job_id: str, *, progress: bool | Display = False, timeout: float | None = None) -> AsyncJob:
        """Wait for the end of a job, as `AsyncJob.wait` does."""
        steps = jobs.wait(job_id, self._settings.retry_policy, timeout=timeout, progress=progress)
        return succeeded(self._job(await self._driver.run(steps)))

    async def cancel(self, job_id: str) -> AsyncJob:
        """Cancel a job; raise `JobEnded` if it has already ended."""
        return self._job(await self._driver.run(jobs.cancel(job_id)))

    async def revert(self, job_id: str) -> Reverted:
        """Point the live aliases that a job moved back to the versions before; raise `JobNotEnded` if it is running."""
        return await self._driver.run(jobs.revert(job_id))

    async def upload(
        self,
        name: str,
        source: Any = None,
        *,
        A: Any = None,
        B: Any = None,
        alpha: float | None = None,
        bias: Any = None,
        labels: Sequence[str | int] | None = None,
        if_match: str | None = None,
        if_none_match: str | None = None,
        timeout: float | None = None,
    ) -> Version:
        """Upload an adapter, and return its new version, or the live one if that has the same bytes.

        `source` is a PEFT model, a folder that PEFT wrote, or a zip archive of one. Otherwise, give the factors: `A`
        (out, r), `B` (r, in) and `bias` (out). `if_match` is the digest that the live version must have, and
        `if_none_match="*"` requires that the name is new.
        """
        factors = {"A": A, "B": B, "alpha": alpha, "bias": bias, "labels": labels}
        steps = catalog.upload(
            name, source, factors=factors, if_match=if_match, if_none_match=if_none_match, timeout=timeout
        )
        return await self._driver.run(steps)

    async def download(
        self,
        name: str,
        folder: str | Path,
        *,
        version: int | None = None,
        module: str | None = None,
        timeout: float | None = None,
    ) -> Path:
        """Write an adapter to a folder that `PeftModel.from_pretrained` loads, and return the folder."""
        steps = catalog.download(name, Path(folder), version=version, module=module, timeout=timeout)
        return await self._driver.run(steps)

    def adapters(self, *, prefix: str | None = None, limit: int | None = None) -> AsyncIterator[Adapter]:
        """Iterate over adapters in byte order of their names; `limit` is the most to return."""
        return self._driver.iterate(catalog.list_adapters(prefix=prefix, limit=limit))

    async def adapter(self, name: str) -> Adapter:
        """Return an adapter and its live version."""
        return await self._driver.run(catalog.show_adapter(name))

    def versions(self, name: str, *, limit: int | None = None) -> AsyncIterator[Version]:
        """Iterate over the versions of an adapter, newest first."""
        return self._driver.iterate(catalog.list_versions(name, limit=limit))

    async def version(self, name: str, version: int) -> Version:
        """Return one version of an adapter."""
        return await self._driver.run(catalog.show_version(name, version))

    async def roll_back(self, name: str, version: int, *, if_match: str | None = None) -> Adapter:
        """Make an earlier or later version live."""
        return await self._driver.run(catalog.roll_back(name, version, if_match=if_match))

    async def delete(self, name: str, *, if_match: str | None = None) -> None:
        """Delete an adapter with all its versions."""
        await self._driver.run(catalog.delete(name, if_match=if_match))

    async def put_dataset(
        self,
        name: str,
        source: Any,
        *,
        content_type: str | None = None,
        if_match: str | None = None,
        if_none_match: str | None = None,
        timeout: float | None = None,
    ) -> DatasetVersion:
        """Upload a data set, and return its new version, or the newest if that has the same content.

        `source` is the path of a file (its ending gives the format), a mapping of names to arrays, a pandas or polars
        DataFrame, or any object that exports Arrow streams, such as a `pyarrow.Table`.
        """
        steps = datasets.put_dataset(
            name, source, content_type=content_type, if_match=if_match, if_none_match=if_none_match, timeout=timeout
        )
        return await self._driver.run(steps)

    def datasets(self, *, prefix: str | None = None, limit: int | None = None) -> AsyncIterator[Dataset]:
        """Iterate over data sets in byte order of their names, without their reports."""
        return self._driver.iterate(datasets.list_datasets(prefix=prefix, limit=limit))

    async def dataset(self, name: str) -> Dataset:
        """Return a data set with the report of its newest version."""
        return await self._driver.run(datasets.show_dataset(name))

    def dataset_versions(self, name: str, *, limit: int | None = None) -> AsyncIterator[DatasetVersion]:
        """Iterate over the versions of a data set, newest first, without their reports."""
        return self._driver.iterate(datasets.list_dataset_versions(name, limit=limit))

    async def dataset_version(self, name: str, version: int) -> DatasetVersion:
        """Return one version of a data set with its report."""
        return await self._driver.run(datasets.show_dataset_version(name, version))

    async def preview(
        self, name: str, *, version: int | None = None, offset: int | None = None, limit: int | None = None
    ) -> Preview:
        """Return rows of a data set: `limit` of them (10 by default) from row `offset` on."""
        return await self._driver.run(datasets.preview(name, version=version, offset=offset, limit=limit))

    async def delete_dataset(self, name: str, *, if_match: str | None = None) -> None:
        """Delete a data set with all its versions."""
        await self._driver.run(datasets.delete_dataset(name, if_match=if_match))

    async def base(self) -> Base:
        """Return the description of the base layer."""
        return await self._driver.run(catalog.show_base())

    async def ready(self) -> bool:
        """Return whether the service answers and is ready to serve."""
        return await self._driver.run(catalog.ready(self._settings.timeout))

    async def close(self) -> None:
        """Close the connections."""
        await self._driver.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _train(
        self, name: str, rows: Mapping[str, Any], data: Any, body: Any, timeout: float | None, *, dry_run: bool
    ) -> Any:
        encode = self._settings.encode
        steps = trainings.train(name, rows, data, body, encode=encode, timeout=timeout, dry_run=dry_run)
        return await self._driver.run(steps)

    def _job(self, job: Any) -> AsyncJob:
        members = {member.name: getattr(job, member.name) for member in fields(JobFields)}
        return AsyncJob(**members, client=self)
