"""The client for an event loop of asyncio: the same names as `loraplex.client`, and what that returns is awaited."""

# ruff: noqa: ASYNC109  # a timeout is what it is for the client that blocks: seconds for a call, repeats and all

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from loraplex.async_driver import AsyncDriver
from loraplex.calls import adapters as catalog
from loraplex.calls import datasets, jobs, predictions, service, trainings, uploads
from loraplex.effects import ask
from loraplex.encoding import Encode
from loraplex.jobs import AsyncJob, succeeded, with_async_client
from loraplex.progress import Display
from loraplex.results import (
    Adapter,
    Base,
    Dataset,
    DatasetVersion,
    Estimate,
    Event,
    JobAdapter,
    Label,
    Prediction,
    Preview,
    Reverted,
    Version,
)
from loraplex.transport import settings


class AsyncClient:
    """A loraplex service. Tasks of one event loop may share one; close it, or use it in an `async with`.

    `url` is where the service is, by default `LORAPLEX_URL` or http://127.0.0.1:8000. With `encode`, such as a
    SentenceTransformer's, texts go in wherever inputs do; `feature_space` names that encoder, and the service refuses
    what comes from another one than its layer was made for. `timeout` is in seconds for each call, its `retries`
    included; what has the service read a data set or the rows of a training may take two minutes more, unless it is
    given a time of its own. A call is repeated only where that is safe. Every error is a `LoraplexError`.
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
        """Where the service is."""
        return self._settings.url

    async def predict(
        self, adapter: str | Sequence[str | None] | None, inputs: Any, *, timeout: float | None = None
    ) -> Prediction:
        """The layer's outputs for rows: of one adapter (None is the base layer), or of one a row.

        `inputs` are (rows, in_features) or one row, of numpy, torch or nested lists, or texts where the client has an
        encoder. Any number of rows: more than fit in one request go in several, all answered by the same versions.
        """
        encode = self._settings.encode
        return await self._driver.run(predictions.predict(adapter, inputs, encode=encode, timeout=timeout))

    async def classify(
        self,
        adapter: str | Sequence[str | None] | None,
        inputs: Any,
        *,
        top_k: int = 1,
        timeout: float | None = None,
    ) -> list[list[Label]]:
        """The `top_k` most probable classes of each row, that one first."""
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
        """Queue the training of an adapter, or of a fleet of them; the rest is as `POST /adapters` has it.

        Rows are `inputs` and `targets` with what goes with them, or `data`, such as columns of a data set. Large
        arrays go as a data set of their own, which is deleted once the job has its rows.
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
        """What `train` would do with the same arguments, all of it checked, and what it would take."""
        rows = {
            "inputs": inputs,
            "targets": targets,
            "weights": weights,
            "groups": groups,
            "labels": labels,
            "corpus": corpus,
        }
        body = {"rank": rank, "alpha": alpha, "training": training, "split": split, "publish": publish}
        found: Estimate = await self._train(name, rows, data, body, timeout, dry_run=True)
        return found

    async def update(
        self,
        name: str,
        *,
        add: Mapping[str, Any] | None = None,
        forget: Mapping[str, Any] | None = None,
        publish: str | Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> AsyncJob:
        """Queue the refit of an adapter that kept its statistics: rows that come in, rows that are forgotten.

        Both are `{"inputs": …, "targets": …, "weights": …}`, or columns of a data set.
        """
        rows, encode = {"add": add, "forget": forget}, self._settings.encode
        steps = trainings.update(name, rows, {"publish": publish}, encode=encode, timeout=timeout)
        return self._job(await self._driver.run(steps))

    async def job(self, job_id: str) -> AsyncJob:
        """One job as it is now."""
        return self._job(await self._driver.run(ask(jobs.show_job(job_id))))

    async def jobs(
        self,
        *,
        status: str | None = None,
        adapter: str | None = None,
        prefix: str | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[AsyncJob]:
        """Jobs, newest first, without their histories; all of them unless `limit` says how many.

        `prefix` is how their ids begin, 4 or more characters.
        """
        steps = jobs.list_jobs(status=status, adapter=adapter, prefix=prefix, limit=limit)
        async for job in self._driver.iterate(steps):
            yield self._job(job)

    def job_adapters(
        self, job_id: str, *, status: str | None = None, limit: int | None = None
    ) -> AsyncIterator[JobAdapter]:
        """What a job trains; `status` is `waiting`, `published` or `failed`."""
        return self._driver.iterate(jobs.list_job_adapters(job_id, status=status, limit=limit))

    def events(self, job_id: str) -> AsyncIterator[Event]:
        """What a job tells until it has ended, over connections that break too."""
        return self._driver.iterate(jobs.watch(job_id, self._settings.patience))

    async def wait(self, job_id: str, *, progress: bool | Display = False, timeout: float | None = None) -> AsyncJob:
        """As `AsyncJob.wait`."""
        steps = jobs.wait(job_id, self._settings.patience, timeout=timeout, progress=progress)
        return succeeded(self._job(await self._driver.run(steps)))

    async def cancel(self, job_id: str) -> AsyncJob:
        """End a job; raises `JobEnded` where it has ended already."""
        return self._job(await self._driver.run(jobs.cancel(job_id)))

    async def revert(self, job_id: str) -> Reverted:
        """Take back what a job published; raises `JobNotEnded` before its end."""
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
        """A new version, or live's where that has these bytes already.

        `source` is a PEFT model, a folder that PEFT wrote, or a zip of it. Or the factors: `A` (out, r), `B` (r, in),
        and `bias` (out). `if_match` is the digest that live must have; `if_none_match="*"`: only a name that is new.
        """
        factors = {"A": A, "B": B, "alpha": alpha, "bias": bias, "labels": labels}
        steps = uploads.upload(
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
        """Write an adapter into a folder from which `PeftModel.from_pretrained` loads it; returns the folder."""
        steps = catalog.download(name, Path(folder), version=version, module=module, timeout=timeout)
        return await self._driver.run(steps)

    def adapters(self, *, prefix: str | None = None, limit: int | None = None) -> AsyncIterator[Adapter]:
        """Adapters in byte order of name; all of them unless `limit` says how many."""
        return self._driver.iterate(catalog.list_adapters(prefix=prefix, limit=limit))

    async def adapter(self, name: str) -> Adapter:
        """One adapter and its live version."""
        return await self._driver.run(catalog.show_adapter(name))

    def versions(self, name: str, *, limit: int | None = None) -> AsyncIterator[Version]:
        """An adapter's versions, newest first."""
        return self._driver.iterate(catalog.list_versions(name, limit=limit))

    async def version(self, name: str, version: int) -> Version:
        """One version."""
        return await self._driver.run(catalog.show_version(name, version))

    async def roll_back(self, name: str, version: int, *, if_match: str | None = None) -> Adapter:
        """Back or forward: let the bare name mean this version."""
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
        """A new version of a data set, or the newest where that has this content already.

        `source` is a file's path (its ending says what it is), a mapping of names to arrays, a pandas or
        polars DataFrame, or anything else that gives Arrow streams, such as a pyarrow.Table.
        """
        steps = datasets.put_dataset(
            name,
            source,
            content_type=content_type,
            if_match=if_match,
            if_none_match=if_none_match,
            timeout=timeout,
        )
        return await self._driver.run(steps)

    def datasets(self, *, prefix: str | None = None, limit: int | None = None) -> AsyncIterator[Dataset]:
        """Data sets in byte order of name, without their reports."""
        return self._driver.iterate(datasets.list_datasets(prefix=prefix, limit=limit))

    async def dataset(self, name: str) -> Dataset:
        """One data set with the report of its newest version."""
        return await self._driver.run(datasets.show_dataset(name))

    def dataset_versions(self, name: str, *, limit: int | None = None) -> AsyncIterator[DatasetVersion]:
        """A data set's versions, newest first, without their reports."""
        return self._driver.iterate(datasets.list_dataset_versions(name, limit=limit))

    async def dataset_version(self, name: str, version: int) -> DatasetVersion:
        """One version with its report."""
        return await self._driver.run(datasets.show_dataset_version(name, version))

    async def preview(
        self, name: str, *, version: int | None = None, offset: int | None = None, limit: int | None = None
    ) -> Preview:
        """Some rows of a data set: 10 from the first on, unless it is said otherwise."""
        return await self._driver.run(datasets.preview(name, version=version, offset=offset, limit=limit))

    async def delete_dataset(self, name: str, *, if_match: str | None = None) -> None:
        """Delete a data set with all its versions."""
        await self._driver.run(datasets.delete_dataset(name, if_match=if_match))

    async def base(self) -> Base:
        """The frozen layer."""
        return await self._driver.run(catalog.show_base())

    async def ready(self) -> bool:
        """Whether the service is there and able to serve."""
        return await self._driver.run(service.ready(self._settings.timeout))

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
        return with_async_client(job, self)
