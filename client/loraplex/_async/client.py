"""Asynchronous client of a loraplex service."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from loraplex import decode
from loraplex._async.administration import AsyncAdministration
from loraplex._async.connection import AsyncConnection
from loraplex._async.jobs import AsyncJob, wait_for, watch
from loraplex._async.predict import AsyncPredictor, read_rows
from loraplex._async.uploads import AsyncTrainingRows, upload_table
from loraplex.arrays import Encode, numbers
from loraplex.base_file import make_base
from loraplex.calls import UNSET, Call, Unset, checked_key, conditions, given, path, planning_call, upload_call
from loraplex.errors import InvalidCombination, LoraplexError
from loraplex.frames import AsyncListing
from loraplex.inference import prediction, references_of
from loraplex.peft_files import read_source, unpack
from loraplex.progress import Display
from loraplex.results import (
    Adapter,
    Base,
    Classification,
    Dataset,
    DatasetVersion,
    Estimate,
    Event,
    JobAdapter,
    Prediction,
    Preview,
    Reverted,
    Suspect,
    Version,
    succeeded,
)
from loraplex.tables import media_type, write_table
from loraplex.training_rows import rows_of_table
from loraplex.transport import settings

T = TypeVar("T")
_ROWS = ("inputs", "targets", "weights", "groups", "labels", "corpus")


class AsyncClient(AsyncAdministration):
    """Client of a loraplex service. Tasks of one event loop may share it; close it, or use it in `async with`.

    `url` is the address of the service, by default `LORAPLEX_URL` or http://127.0.0.1:8000. `key` is a key of the
    service, by default `LORAPLEX_KEY`; neither the client nor its errors show it. `tenant` is the tenant that an
    operator acts for, by default `default`; other keys have one of their own. With `encode`, such as the
    `encode` method of a SentenceTransformer, every method that takes inputs takes texts too. `feature_space` names that
    encoder; the service refuses inputs from an encoder that its layer was not made for. `timeout` is in seconds for
    each call, including its `retries`. Calls for which the service reads a data set or the rows of a training may take
    two minutes more, unless they are given a timeout of their own. A call is retried only if that is safe. Every error
    is a `LoraplexError`.
    """

    make_base = staticmethod(make_base)

    def __init__(
        self,
        url: str | None = None,
        *,
        key: str | None = None,
        tenant: str | None = None,
        encode: Encode | None = None,
        feature_space: str | None = None,
        timeout: float = 30.0,
        retries: int = 4,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        sent = headers if tenant is None else {**(headers or {}), "X-Tenant": tenant}
        checked = settings(url, key=key, feature_space=feature_space, timeout=timeout, retries=retries, headers=sent)
        self._connection = AsyncConnection(checked, transport)
        self._encode = encode

    @property
    def url(self) -> str:
        """Address of the service."""
        return self._connection.settings.url

    async def predict(
        self, adapter: str | Sequence[str | None] | None, inputs: Any, *, timeout: float | None = None
    ) -> Prediction:
        """Return the layer's outputs for rows, with one adapter for all rows (None is the base layer) or one per row.

        `inputs` is (rows, in_features) or one row: a NumPy array, a tensor, nested lists, or a DataFrame or table of
        pandas, polars or Arrow; or texts if the client has an encoder. Rows that do not fit in one request are sent in
        several, and the same versions answer all.
        """
        rows = await read_rows(inputs, self._encode)
        references, by_row = references_of(adapter, len(rows.x_NI))
        predictor = AsyncPredictor(connection=self._connection, by_row=by_row, options={}, timeout=timeout)
        return prediction(rows, await predictor.predict(references, rows.x_NI), by_row=by_row)

    async def classify(
        self, adapter: str | Sequence[str | None] | None, inputs: Any, *, top_k: int = 1, timeout: float | None = None
    ) -> Classification:
        """Return the `top_k` most probable classes of each row, in order of probability."""
        rows = await read_rows(inputs, self._encode)
        references, by_row = references_of(adapter, len(rows.x_NI))
        options = {"return": ["labels", "probabilities"], "top_k": top_k}
        predictor = AsyncPredictor(connection=self._connection, by_row=by_row, options=options, timeout=timeout)
        parts = await predictor.predict(references, rows.x_NI)
        return Classification(labels for part in parts for labels in part.values)

    async def train(
        self,
        name: str,
        *,
        inputs: Any = None,
        targets: Any = None,
        weights: Any = None,
        groups: Any = None,
        labels: Sequence[str | int] | None = None,
        corpus: Any = None,
        data: Any = None,
        rank: int | str | None = None,
        alpha: float | str | None = None,
        training: Mapping[str, Any] | None = None,
        split: Mapping[str, Any] | str | Unset | None = UNSET,
        publish: str | Mapping[str, Any] | None = None,
        fleet_prior: str | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
    ) -> AsyncJob:
        """Queue the training of an adapter or of a fleet; the arguments are the fields of `POST /adapters`.

        The rows are `inputs` and `targets`, with optional weights and groups, or `data`, such as columns of a data set.
        If `data` is a pandas or polars DataFrame or an Arrow table, `targets`, `weights`, `groups` and `inputs` are
        names of its columns; by default, the inputs are all other columns. Large arrays are sent as a temporary data
        set, which is deleted once the job has its rows.

        An argument that is left out is not sent, and the service decides; `split=None` holds no rows out.

        Each call has an `idempotency_key` of its own by default, so that it is sent again after a lost connection
        without queueing a second job. To repeat a call in another process, give both the same key: within 24 hours, the
        second returns the job of the first. Raises `IdempotencyKeyReused` if the arguments differ.
        """
        rows = zip(_ROWS, (inputs, targets, weights, groups, labels, corpus), strict=True)
        settings = {"rank": rank, "alpha": alpha, "training": training, "publish": publish, "fleet_prior": fleet_prior}
        body = given(settings) | ({} if split is UNSET else {"split": split})
        key = checked_key(idempotency_key)
        return await self._train(self._read_job, name, dict(rows), data, body, timeout=timeout, idempotency_key=key)

    async def estimate(
        self,
        name: str,
        *,
        inputs: Any = None,
        targets: Any = None,
        weights: Any = None,
        groups: Any = None,
        labels: Sequence[str | int] | None = None,
        corpus: Any = None,
        data: Any = None,
        rank: int | str | None = None,
        alpha: float | str | None = None,
        training: Mapping[str, Any] | None = None,
        split: Mapping[str, Any] | str | Unset | None = UNSET,
        publish: str | Mapping[str, Any] | None = None,
        fleet_prior: str | None = None,
        timeout: float | None = None,
    ) -> Estimate:
        """Check the arguments of `train`, and return the resolved settings with the estimated memory and time."""
        rows = zip(_ROWS, (inputs, targets, weights, groups, labels, corpus), strict=True)
        settings = {"rank": rank, "alpha": alpha, "training": training, "publish": publish, "fleet_prior": fleet_prior}
        body = given(settings) | ({} if split is UNSET else {"split": split})
        return await self._train(decode.estimate, name, dict(rows), data, body, timeout=timeout)

    async def update(
        self,
        name: str,
        *,
        add: Mapping[str, Any] | None = None,
        forget: Mapping[str, Any] | None = None,
        publish: str | Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
    ) -> AsyncJob:
        """Queue the refit of an adapter that kept its statistics, with rows to add and rows to forget.

        Both are `{"inputs": …, "targets": …, "weights": …}`, or columns of a data set. `idempotency_key` is as in
        `train`.
        """
        body: dict[str, Any] = given({"publish": publish})
        key = checked_key(idempotency_key)
        async with aclosing(AsyncTrainingRows(self._connection, self._encode, key=key, timeout=timeout)) as sent:
            for field, rows in given({"add": add, "forget": forget}).items():
                body[field] = await sent.prepare(rows, field=field)
            where = path("adapters", name, "update")
            call = planning_call(where, body, timeout=timeout, idempotency_key=key)
            return await self._connection.fetch(call, self._read_job)

    async def evaluate(
        self,
        adapters: str | Sequence[str | None] | None,
        *,
        inputs: Any = None,
        targets: Any = None,
        weights: Any = None,
        labels: Sequence[str | int] | None = None,
        data: Any = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
    ) -> AsyncJob:
        """Queue the evaluation of adapters (None is the base layer) on labelled rows that none was trained on.

        The rows are given as in `train`. The `result` of the job that has ended is an `EvaluationResult`, whose entries
        are in the order of `adapters`; gains are over the first. Outputs are matched to targets by label. `labels` are
        those of outputs that have none of their own. Nothing is published. `idempotency_key` is as in `train`.
        """
        rows = {"inputs": inputs, "targets": targets, "weights": weights, "labels": labels}
        body = {"adapters": [adapters] if adapters is None or isinstance(adapters, str) else list(adapters)}
        key, where = checked_key(idempotency_key), "/evaluations"
        return await self._plan(self._read_job, where, body, rows, data, timeout=timeout, idempotency_key=key)

    async def job(self, job_id: str) -> AsyncJob:
        """Return the current state of a job."""
        return await self._connection.get(path("jobs", job_id), self._read_job)

    def jobs(
        self,
        *,
        status: str | None = None,
        adapter: str | None = None,
        prefix: str | None = None,
        limit: int | None = None,
    ) -> AsyncListing[AsyncJob]:
        """Iterate over jobs, newest first and without their histories; `limit` is the most to return.

        `prefix` is the beginning of a job id, of at least 4 characters.
        """
        query = {"status": status, "adapter": adapter, "prefix": prefix}
        return self._connection.pages("/jobs", self._read_job, query, limit=limit)

    def job_adapters(
        self,
        job_id: str,
        *,
        status: str | None = None,
        outcome: str | None = None,
        sort: str | None = None,
        limit: int | None = None,
    ) -> AsyncListing[JobAdapter]:
        """Iterate over the adapters that a job trains, as `AsyncJob.adapters` does."""
        query = {"status": status, "outcome": outcome, "sort": sort}
        return self._connection.pages(path("jobs", job_id, "adapters"), decode.job_adapter, query, limit=limit)

    def suspects(self, job_id: str, *, limit: int | None = None) -> AsyncListing[Suspect]:
        """Iterate over the rows of a job whose label the other rows contradict, as `AsyncJob.suspects` does."""
        return self._connection.pages(path("jobs", job_id, "suspects"), decode.suspect, limit=limit)

    def events(self, job_id: str) -> AsyncIterator[Event]:
        """Iterate over the events of a job until it ends; a broken connection is opened again."""
        return watch(self._connection, job_id)

    async def wait(self, job_id: str, *, progress: bool | Display = False, timeout: float | None = None) -> AsyncJob:
        """Wait for the end of a job, as `AsyncJob.wait` does."""
        job = await wait_for(self._connection, job_id, self._read_job, progress=progress, timeout=timeout)
        return succeeded(job)

    async def cancel(self, job_id: str) -> AsyncJob:
        """Cancel a job; raise `JobEnded` if it has already ended."""
        return await self._connection.fetch(Call("POST", path("jobs", job_id, "cancel")), self._read_job)

    async def retry(
        self,
        job_id: str,
        *,
        outcomes: Sequence[str] | None = None,
        training: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> AsyncJob:
        """Queue the training of some adapters of a job again, as `AsyncJob.retry` does."""
        call = planning_call(
            path("jobs", job_id, "retry"), given({"outcomes": outcomes, "training": training}), timeout=timeout
        )
        return await self._connection.fetch(call, self._read_job)

    async def revert(self, job_id: str) -> Reverted:
        """Point the live aliases that a job moved back to the versions before; raise `JobNotEnded` if it is running."""
        return await self._connection.fetch(Call("POST", path("jobs", job_id, "revert")), decode.reverted)

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
        factors: dict[str, Any] = given({"A": A, "B": B, "alpha": alpha, "bias": bias, "labels": labels})
        if (source is None) == (not factors):
            expected = "a PEFT model, a folder or a zip; or A and B"
            detail = "an adapter comes from a source or from factors"
            raise InvalidCombination(detail, field="source", expected=expected)
        where, headers = path("adapters", name), conditions(if_match, if_none_match)
        if source is None:
            # Labels are not converted: an array would turn numbers beside texts into texts, which the service refuses.
            factors |= {key: numbers(factors[key], field=key) for key in ("A", "B", "bias") if key in factors}
            call = Call("PUT", where, headers=headers, json=factors, timeout=timeout)
        else:
            headers["Content-Type"] = "application/zip"
            archive = await asyncio.to_thread(read_source, source)
            call = Call("PUT", where, headers=headers, content=archive, timeout=timeout)
        return await self._connection.fetch(call, decode.version)

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
        query = {"version": version, "module": module}
        call = Call("GET", path("adapters", name, "download"), safe=True, query=query, timeout=timeout)
        answer = await self._connection.send(call)
        return await asyncio.to_thread(unpack, answer.content, Path(folder))

    def adapters(self, *, prefix: str | None = None, limit: int | None = None) -> AsyncListing[Adapter]:
        """Iterate over adapters in byte order of their names; `limit` is the most to return."""
        return self._connection.pages("/adapters", decode.adapter, {"prefix": prefix}, limit=limit)

    async def adapter(self, name: str) -> Adapter:
        """Return an adapter and its live version."""
        return await self._connection.get(path("adapters", name), decode.adapter)

    def versions(self, name: str, *, limit: int | None = None) -> AsyncListing[Version]:
        """Iterate over the versions of an adapter, newest first."""
        return self._connection.pages(path("adapters", name, "versions"), decode.version, limit=limit)

    async def version(self, name: str, version: int) -> Version:
        """Return one version of an adapter."""
        return await self._connection.get(path("adapters", name, "versions", version), decode.version)

    async def roll_back(self, name: str, version: int, *, if_match: str | None = None) -> Adapter:
        """Make an earlier or later version live."""
        where = path("adapters", name, "aliases", "live")
        call = Call("PUT", where, headers=conditions(if_match), json={"version": version})
        return await self._connection.fetch(call, decode.adapter)

    async def delete(self, name: str, *, purge: bool = False, if_match: str | None = None) -> None:
        """Delete an adapter with all its versions. It can be restored for some days, unless `purge` is true."""
        query = {"purge": "true" if purge else None}
        await self._connection.send(Call("DELETE", path("adapters", name), headers=conditions(if_match), query=query))

    async def restore_adapter(self, name: str) -> Adapter:
        """Bring back a deleted adapter with all its versions. Raises `NameTaken` if the name exists again."""
        return await self._connection.fetch(Call("POST", path("adapters", name, "restore")), decode.adapter)

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
        headers = conditions(if_match, if_none_match)
        if isinstance(source, str | Path):
            headers["Content-Type"] = media_type(Path(source), content_type)
            call = upload_call(name, Path(source), headers=headers, timeout=timeout)
            return await self._connection.fetch(call, decode.dataset_version)
        if content_type is not None:
            headers["Content-Type"] = content_type
        write = partial(write_table, source)
        return await upload_table(self._connection, name, write, headers=headers, timeout=timeout)

    def datasets(self, *, prefix: str | None = None, limit: int | None = None) -> AsyncListing[Dataset]:
        """Iterate over data sets in byte order of their names, without their reports."""
        return self._connection.pages("/datasets", decode.dataset, {"prefix": prefix}, limit=limit)

    async def dataset(self, name: str) -> Dataset:
        """Return a data set with the report of its newest version."""
        return await self._connection.get(path("datasets", name), decode.dataset)

    def dataset_versions(self, name: str, *, limit: int | None = None) -> AsyncListing[DatasetVersion]:
        """Iterate over the versions of a data set, newest first, without their reports."""
        return self._connection.pages(path("datasets", name, "versions"), decode.dataset_version, limit=limit)

    async def dataset_version(self, name: str, version: int) -> DatasetVersion:
        """Return one version of a data set with its report."""
        return await self._connection.get(path("datasets", name, "versions", version), decode.dataset_version)

    async def preview(
        self, name: str, *, version: int | None = None, offset: int | None = None, limit: int | None = None
    ) -> Preview:
        """Return rows of a data set: `limit` of them (10 by default) from row `offset` on."""
        query = {"version": version, "offset": offset, "limit": limit}
        return await self._connection.get(path("datasets", name, "preview"), decode.preview, query)

    async def delete_dataset(self, name: str, *, if_match: str | None = None) -> None:
        """Delete a data set with all its versions."""
        await self._connection.send(Call("DELETE", path("datasets", name), headers=conditions(if_match)))

    async def base(self) -> Base:
        """Return the description of the base layer."""
        return await self._connection.get("/base", decode.base)

    async def ready(self) -> bool:
        """Return whether the service answers and is ready to serve."""
        try:
            # There are no retries, because "not ready" is a result.
            await self._connection.send(Call("GET", "/readyz", retries=0))
        except LoraplexError:
            return False
        return True

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _train(
        self,
        read: Callable[[Any], T],
        name: str,
        rows: Mapping[str, Any],
        data: Any,
        body: Mapping[str, Any],
        *,
        timeout: float | None,
        idempotency_key: str | None = None,
    ) -> T:
        body, key = {"name": name, **body}, idempotency_key
        query = {"dry_run": "true"} if key is None else {}
        return await self._plan(read, "/adapters", body, rows, data, timeout=timeout, idempotency_key=key, query=query)

    async def _plan(
        self,
        read: Callable[[Any], T],
        where: str,
        body: Mapping[str, Any],
        rows: Mapping[str, Any],
        data: Any,
        *,
        timeout: float | None,
        idempotency_key: str | None,
        query: Mapping[str, str] | None = None,
    ) -> T:
        """Send a request with its rows, or with those of `data`."""
        rows, data = rows_of_table(given(rows), data)
        if (data is None) == (not rows):
            expected = 'inputs=…, targets=…; or data={"dataset": …, "inputs": …, "targets": …}'
            raise InvalidCombination("rows come as inputs and targets, or as data", field="data", expected=expected)
        fleet = "{" in body.get("name", "")
        key = checked_key(idempotency_key)
        async with aclosing(AsyncTrainingRows(self._connection, self._encode, key=key, timeout=timeout)) as sent:
            whole = {**body, "data": await sent.prepare(rows or data, field="data", fleet=fleet)}
            call = planning_call(where, whole, query=query, timeout=timeout, idempotency_key=idempotency_key)
            return await self._connection.fetch(call, read)

    def _read_job(self, value: Any) -> AsyncJob:
        return decode.build(AsyncJob, value, client=self)
