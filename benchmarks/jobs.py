"""Trainings through the service: its base layer, data sets, jobs, and what they publish."""

# N rows · I in_features · O out_features
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from adapters.catalog.catalog import Catalog
from adapters.lora.adapter import Adapter, from_canonical_bytes
from adapters.names import Reference
from benchmarks.failures import BenchFailed
from benchmarks.processes import Server, exchange, get, start_service
from benchmarks.requests import message

JSON, _ARROW = "Content-Type: application/json", "Content-Type: application/vnd.apache.arrow.stream"
_DEADLINE_SECONDS = 600.0
_POLL_SECONDS = 0.2
"""Seldom enough to cost the job nothing: the service notes the time itself."""


@contextmanager
def serving_layer(
    folder: Path, weight_OI: NDArray[np.float32], bias_O: NDArray[np.float32] | None, labels: Sequence[str] = ()
) -> Iterator[Server]:
    """Start the service with this base layer, and a trainer."""
    folder.mkdir(parents=True)
    path, tensors = folder / "base.safetensors", {"weight": weight_OI, "bias": bias_O}
    metadata = {"labels": json.dumps(list(labels))} if labels else None
    save_file({name: torch.from_numpy(array) for name, array in tensors.items() if array is not None}, path, metadata)
    server = start_service(folder / "store", str(path), trainers=1)
    try:
        server.wait_until(get("/readyz"))
        yield server
    finally:
        server.stop()


def arrow_stream(**columns: Any) -> memoryview:
    """Return the Arrow stream with these columns; an array of two dimensions is a column of lists."""
    arrays = {name: _column(values) for name, values in columns.items()}
    batch, stream = pa.RecordBatch.from_pydict(arrays), BytesIO()
    with pa.ipc.new_stream(stream, batch.schema) as writer:
        writer.write_batch(batch)
    return stream.getbuffer()


def _column(values: Any) -> pa.Array:
    if np.ndim(values) == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(values).reshape(-1), np.shape(values)[1])


def upload(server: Server, name: str, content: memoryview) -> None:
    """Store a data set."""
    head = f"PUT /datasets/{name} HTTP/1.1\r\nHost: 127.0.0.1\r\n{_ARROW}\r\nContent-Length: {len(content)}\r\n\r\n"
    status, _, body = exchange(server.port, head.encode() + content, seconds=_DEADLINE_SECONDS)
    if status != 201:
        raise BenchFailed(f"PUT /datasets/{name} answered {status}: {body[:500]!r}")


def columns_of(dataset: str, **more: object) -> dict[str, Any]:
    """Return the `data` of a request for a data set with the columns `x` and `y`."""
    return {"dataset": dataset, "inputs": {"column": "x"}, "targets": {"column": "y"}} | more


def train(server: Server, body: Mapping[str, Any]) -> dict[str, Any]:
    """Queue a training, and return the job once it has succeeded."""
    status, _, answer = exchange(server.port, message("/adapters", json.dumps(body).encode(), JSON), seconds=120)
    if status != 202:
        raise BenchFailed(f"POST /adapters answered {status}: {answer[:500]!r}")
    job_id, give_up = json.loads(answer)["id"], time.monotonic() + _DEADLINE_SECONDS
    while time.monotonic() < give_up:
        job: dict[str, Any] = read(server, f"/jobs/{job_id}")
        if job["status"] in ("failed", "cancelled"):
            raise BenchFailed(f"the training ended otherwise than it should: {job}")
        if job["status"] == "succeeded":
            return job
        time.sleep(_POLL_SECONDS)
    raise BenchFailed(f"the training did not end: {job}")


def train_fleet(server: Server, body: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train a fleet; return the job and its adapters, all of which were trained."""
    job = train(server, body)
    if job["metrics"]["failed"]:
        raise BenchFailed(f"{job['metrics']['failed']} groups of the fleet failed")
    adapters: list[dict[str, Any]] = []
    page: dict[str, Any] = {"next_cursor": ""}
    while page["next_cursor"] is not None:
        cursor = f"&cursor={page['next_cursor']}" if page["next_cursor"] else ""
        page = read(server, f"/jobs/{job['id']}/adapters?limit=1000{cursor}")
        adapters += page["data"]
    return job, adapters


def seconds_of(job: Mapping[str, Any]) -> float:
    """Return the seconds that a job took."""
    started, finished = (datetime.fromisoformat(job[at]).timestamp() for at in ("started_at", "finished_at"))
    return finished - started


def read(server: Server, path: str) -> Any:
    """Return the body of a GET request."""
    status, _, answer = exchange(server.port, get(path))
    if status != 200:
        raise BenchFailed(f"GET {path} answered {status}: {answer[:500]!r}")
    return json.loads(answer)


def predict(server: Server, adapter: str, inputs_NI: NDArray[np.float32], **more: object) -> dict[str, Any] | None:
    """Return the answer of `POST /predict`, or None if the adapter has no live version."""
    body = orjson.dumps({"adapter": adapter, "inputs": inputs_NI} | more, option=orjson.OPT_SERIALIZE_NUMPY)
    status, _, answer = exchange(server.port, message("/predict", body, JSON))
    if status not in (200, 404):
        raise BenchFailed(f"POST /predict for {adapter} answered {status}: {answer[:500]!r}")
    return orjson.loads(answer) if status == 200 else None


def peak_bytes(server: Server) -> int:
    """Return the peak memory of the fit process, including mapped file pages."""
    fits = [process.pid for process in server.tree() if "adapters.training.execution.fit_child" in process.cmdline()]
    if len(fits) != 1:
        raise BenchFailed(f"there are {len(fits)} processes that fit")
    lines = Path(f"/proc/{fits[0]}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


class Published:
    """Adapters in the folder of a service."""

    def __init__(self, store: Path) -> None:
        self._catalog = Catalog(store, now=time.time)

    def adapter(self, name: str) -> Adapter:
        """Return the live version of an adapter."""
        version = self._catalog.find(Reference(name), tenant="default")
        return from_canonical_bytes(self._catalog.blobs.read(version.file, offset=version.offset, length=version.bytes))
