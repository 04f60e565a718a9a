"""HTTP calls of the demo, one function each."""

# N rows · I in_features · O out_features
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from demo.digits import Array, Digits
from demo.problems import DemoFailed

Job = dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """Outputs (N, O), and the digest of each adapter that gave some, in the service's order."""

    outputs: Array
    digests: tuple[str, ...]

    @property
    def classes(self) -> Array:
        """The class that each row is taken for, (N)."""
        classes: Array = self.outputs.argmax(axis=1)
        return classes


def predict(client: httpx.Client, adapter: str | None, images_NI: Array) -> Answer:
    """`POST /predict` with one adapter for all rows; None is the bare base."""
    body = _json(client.post("/predict", json={"adapter": adapter, "inputs": images_NI.tolist()}))
    used = [] if body["adapter"] is None else [body["adapter"]]
    return Answer(np.array(body["outputs"]), tuple(version["digest"] for version in used))


def predict_rows(client: httpx.Client, adapters: Sequence[str | None], images_NI: Array) -> Answer:
    """`POST /predict` with an adapter of its own for each row."""
    body = _json(client.post("/predict", json={"adapters": list(adapters), "inputs": images_NI.tolist()}))
    return Answer(np.array(body["outputs"]), tuple(version["digest"] for version in body["adapters"]))


def start_training(client: httpx.Client, name: str, *, rank: int, digits: Digits, training: dict[str, object]) -> Job:
    """`POST /adapters`: the job, durable and queued."""
    data = {"inputs": digits.images.tolist(), "targets": digits.labels.tolist()}
    body = {"name": name, "rank": rank, "data": data, "training": training}
    return _json(client.post("/adapters", json=body))


def follow_job(client: httpx.Client, job: Job, *, wait: Callable[[], None], show: Callable[[Job], None]) -> Job:
    """`GET /jobs/{id}` again and again, each answer shown, until the job has succeeded."""
    while job["status"] in ("queued", "running"):
        wait()
        job = _json(client.get(f"/jobs/{job['id']}"))
        show(job)
    if job["status"] != "succeeded":
        raise DemoFailed(f"The training ended as {job['status']}: {job['error']}")
    return job


def upload_peft_files(client: httpx.Client, name: str, folder: Path) -> dict[str, Any]:
    """`PUT /adapters/{name}` with the two files that PEFT saves; the version that came of it."""
    paths = (folder / "adapter_model.safetensors", folder / "adapter_config.json")
    files = [("files", (path.name, path.read_bytes())) for path in paths]
    return _json(client.put(f"/adapters/{name}", files=files))


def _json(response: httpx.Response) -> dict[str, Any]:
    request = f"{response.request.method} {response.request.url.path}"
    if not response.is_success:
        raise DemoFailed(f"{request} was answered with {response.status_code}: {response.text[:500]}")
    body: dict[str, Any] = response.json()
    return body
