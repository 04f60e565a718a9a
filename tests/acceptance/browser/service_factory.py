"""A service with something in every view."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from app.service import Service
from app.settings import Settings
from tests.support.service import serving, train, wait_for_job

DIGITS = Path(__file__).parents[3] / "examples" / "turned-digits.csv"
LONG_NAME = "z-name-" + "that-goes-on-" * 9 + "0123"
BAD_TABLE = b"age,height,class\n31,1.71,a\n,1.80,b\nold,1.65,a\n40,nan,b\n"
ROWS: dict[str, Any] = {"dataset": "turned-digits", "inputs": {"prefix": "pixel_"}, "targets": {"column": "digit"}}
FIT: dict[str, Any] = {"method": "adamw", "loss": "cross_entropy", "learning_rate": 0.01, "epochs": 20}


@contextmanager
def filled(folder: Path) -> Iterator[tuple[httpx.Client, Service]]:
    """The bundled digits base, data sets, an adapter with two trained versions, a fleet, a failed job, uploads."""
    with serving(Settings(data_dir=folder / "data"), trainer=True) as (client, service):
        put_dataset(client, "turned-digits", DIGITS.read_bytes())
        put_dataset(client, "people", BAD_TABLE)
        upload(client, *(f"tenant-{number:03}" for number in range(30)), LONG_NAME)
        train(client, name="acme", rank=2, data=ROWS, split={"by": "rows"}, training=FIT)
        train(client, name="acme", data=ROWS, training={"method": "auto"})
        train(client, name="team-{digit}", data=ROWS | {"group_by": "digit"}, training={"method": "auto"})
        rows = np.random.default_rng(0).standard_normal((8, 74)).tolist()
        diverging = {"inputs": [row[:64] for row in rows], "targets": [row[64:] for row in rows]}
        train(client, name="broken", rank=1, data=diverging, training={"method": "sgd", "learning_rate": 1e6})
        yield client, service


def put_dataset(client: httpx.Client, name: str, table: bytes) -> None:
    """Store a CSV table."""
    client.put(f"/datasets/{name}", content=table, headers={"Content-Type": "text/csv"}).raise_for_status()


def upload(client: httpx.Client, *names: str) -> None:
    """One small adapter under each of these names."""
    factors = {"A": [[0.5]] * 10, "B": [[0.01] * 64], "labels": [f"class {number}" for number in range(10)]}
    for name in names:
        client.put(f"/adapters/{name}", json=factors).raise_for_status()


def start_long_job(client: httpx.Client, name: str) -> str:
    """A training that would go on for a long time; returns its id."""
    generator = np.random.default_rng(1)
    data = {"inputs": generator.standard_normal((64, 64)).tolist(), "targets": generator.integers(0, 10, 64).tolist()}
    training = {"method": "adamw", "loss": "cross_entropy", "epochs": 5_000_000, "learning_rate": 1e-4}
    answer = client.post("/adapters", json={"name": name, "rank": 4, "data": data, "training": training})
    job: dict[str, Any] = answer.raise_for_status().json()
    return str(job["id"])


def ended(client: httpx.Client, job_id: str) -> str:
    """The status that a job ends with."""
    return str(wait_for_job(client, job_id)["status"])
