"""A fleet over a Parquet table that is larger than the trainer's memory limit is fitted within that limit.

`LARGE_FLEET_TIMES` is how many times the limit the table has.
"""

# N rows · I in_features · O out_features
import math
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.fork_server import own_starts
from tests.support.process_tree import FIT, TrainerProcess, the
from tests.support.service import ServiceProcess, wait_for_job

pytestmark = pytest.mark.slow

I, O, GROUPS = 512, 2, 1_000
TIMES = float(os.environ.get("LARGE_FLEET_TIMES", "1.25"))
LIMIT = 2**29
"""The least that a trainer may be given."""
PART = 20_000
PARTS = math.ceil(TIMES * LIMIT / (4 * I * PART))
SECONDS = 600.0


@pytest.fixture(autouse=True, scope="module")
def _own_starts() -> Iterator[None]:
    with own_starts():
        yield


@cache
def _block() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((PART, I), dtype=np.float32)


def _part(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and groups of a part of the rows: most groups have rows in each part."""
    group_N = np.random.default_rng(number).integers(GROUPS, size=PART)
    group_N[: GROUPS if number == 0 else 0] = range(GROUPS if number == 0 else 0)
    x_NI = _block() * np.float32(1 + number / 64)
    return x_NI, x_NI[:, :O] * (1 + group_N[:, None] % 3).astype(np.float32), group_N


def _write_parquet(path: Path) -> None:
    schema = pa.schema([("x", pa.list_(pa.float32(), I)), ("y", pa.list_(pa.float32(), O)), ("group", pa.int64())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for number in range(PARTS):
            x_NI, y_NO, group_N = _part(number)
            lists = [pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1]) for rows in (x_NI, y_NO)]
            writer.write_batch(pa.record_batch([*lists, pa.array(group_N)], schema=schema))


def _of_group(group: int) -> dict[str, Any]:
    """The rows of one group, as they are sent to train it alone."""
    rows = [(x_NI[group_N == group], y_NO[group_N == group]) for x_NI, y_NO, group_N in map(_part, range(PARTS))]
    inputs, targets = map(np.concatenate, zip(*rows, strict=True))
    return {"inputs": inputs.tolist(), "targets": targets.tolist()}


def _peak_bytes(process: Any) -> int:
    """Most memory that a process had at once, with the pages of mapped files."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_fleet_that_is_larger_than_the_memory_limit_is_fitted_within_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    _write_parquet(file)
    assert file.stat().st_size > TIMES * LIMIT
    settings: dict[str, Any] = {"base": f"zeros:{I},{O}", "trainer_memory_bytes": LIMIT}
    training = {"method": "adamw", "max_steps": 10}
    with ServiceProcess(tmp_path / "data", trainers=0, **settings) as service:
        client = service.client
        client.timeout = SECONDS
        with file.open("rb") as content:
            headers = {"Content-Type": "application/vnd.apache.parquet"}
            client.put("/datasets/rows", content=content, headers=headers).raise_for_status()
        file.unlink()
        data = {"dataset": "rows", "inputs": {"column": "x"}, "targets": {"column": "y"}, "group_by": "group"}
        body = {"name": "fleet-{group}", "rank": O, "data": data, "training": training}
        started = client.post("/adapters", json=body).raise_for_status().json()
        with TrainerProcess(service.data_dir, **settings, forks=False) as trainer:
            fit = the(trainer.process.pid, FIT)
            job = wait_for_job(client, started["id"], seconds=SECONDS)
            peak = _peak_bytes(fit)
            assert job["status"] == "succeeded", job["error"]
            assert peak <= LIMIT, peak
            assert job["metrics"] == {"published": GROUPS, "failed": 0, "total": GROUPS}
            assert any("sorted by group on disk" in line["text"] for line in job["log"]), job["log"]
            assert not any((service.data_dir / "scratch").iterdir())
            for group in (0, GROUPS - 1):
                alone = {"name": "alone", "rank": O, "data": _of_group(group), "training": training}
                of_group = client.post("/adapters", json=alone).raise_for_status().json()
                ended = wait_for_job(client, of_group["id"], seconds=SECONDS)
                live = client.get(f"/adapters/fleet-{group}/versions/1").raise_for_status().json()
                assert live["digest"] == ended["result"]["digest"]
