"""Data sets that the asynchronous client makes: of tables, and of rows that are too large for a training request."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loraplex import training_rows
from loraplex._async.connection import AsyncConnection
from loraplex._async.predict import read_rows
from loraplex.arrays import Encode
from loraplex.calls import Call, given, path, upload_call
from loraplex.decode import dataset_version
from loraplex.errors import LoraplexError
from loraplex.results import DatasetVersion


async def upload_table(
    connection: AsyncConnection,
    name: str,
    write: Callable[[Path], str],
    *,
    headers: Mapping[str, str],
    timeout: float | None,
) -> DatasetVersion:
    """Upload what `write` writes to a file; it returns the content type, unless `headers` have another."""
    with TemporaryDirectory(prefix="loraplex-") as folder:
        file = Path(folder) / "table"
        headers = {"Content-Type": await asyncio.to_thread(write, file), **headers}
        return await connection.fetch(upload_call(name, file, headers=headers, timeout=timeout), dataset_version)


class AsyncTrainingRows:
    """Rows of one training request, with the temporary data sets that hold those that are too large for it."""

    def __init__(self, connection: AsyncConnection, encode: Encode | None, *, key: str, timeout: float | None) -> None:
        """Create the rows of a request with this idempotency key."""
        self._connection = connection
        self._encode = encode
        self._key = key
        self._timeout = timeout
        self._datasets: list[str] = []

    async def prepare(self, rows: Any, *, field: str, fleet: bool = False) -> Any:
        """Return the `data` of a request from arrays; return a reference to a data set unchanged."""
        if not isinstance(rows, Mapping) or "dataset" in rows:
            return rows
        arrays: dict[str, Any] = {}
        for name, value in given(rows).items():
            if name == "inputs":
                arrays[name] = (await read_rows(value, self._encode, field=f"{field}.{name}")).x_NI
            elif name in training_rows.ARRAYS:
                arrays[name] = training_rows.values_of(value, field=f"{field}.{name}")
            else:
                arrays[name] = value
        if training_rows.fits_in_request(arrays):
            return arrays
        dataset = await self._upload(training_rows.columns_of(arrays))
        data = training_rows.references(arrays, dataset, fleet=fleet)
        if "corpus" in arrays:
            corpus = await self._upload({"documents": arrays["corpus"]})
            data["corpus"] = {"dataset": corpus, "documents": {"column": "documents"}}
        return data

    async def aclose(self) -> None:
        """Delete the temporary data sets; a job keeps its own copy of the rows."""
        for name in self._datasets:
            # The job is queued, and an error here must not hide it.
            with suppress(LoraplexError):
                await self._connection.send(Call("DELETE", path("datasets", name)))

    async def _upload(self, columns: dict[str, Any]) -> str:
        name = await asyncio.to_thread(training_rows.temporary_name, columns, self._key)
        self._datasets.append(name)
        write = partial(training_rows.write_columns, columns)
        await upload_table(self._connection, name, write, headers={}, timeout=self._timeout)
        return name
