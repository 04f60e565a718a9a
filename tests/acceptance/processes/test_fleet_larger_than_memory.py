"""A fleet over a Parquet table of three times the trainer's memory limit is fitted within that limit."""

# N rows · I in_features · O out_features
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import Ridge

from tests.support.fork_server import own_starts
from tests.support.process_tree import FIT, TrainerProcess, the
from tests.support.service import ServiceProcess, wait_for_job
from tests.support.training_oracle import published_delta

pytestmark = pytest.mark.slow

I, O, GROUPS = 512, 2, 500
LIMIT = 640 * 2**20
ROWS, PART = 3 * LIMIT // (4 * I) + 4_000, 20_000
RIDGE = 5.0


@pytest.fixture(autouse=True, scope="module")
def _own_starts() -> Iterator[None]:
    with own_starts():
        yield


def _part(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and groups of a part of the rows: each group has rows in each part."""
    rng = np.random.default_rng(number)
    size = min(PART, ROWS - number * PART)
    x_NI = rng.standard_normal((size, I), dtype=np.float32)
    group_N = rng.integers(GROUPS, size=size)
    y_NO = x_NI[:, :O] * (1 + group_N[:, None]) + rng.standard_normal((size, O), dtype=np.float32)
    return x_NI, y_NO, group_N


def _parquet(path: Path) -> None:
    schema = pa.schema([("x", pa.list_(pa.float32(), I)), ("y", pa.list_(pa.float32(), O)), ("group", pa.int64())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for number in range(-(-ROWS // PART)):
            x_NI, y_NO, group_N = _part(number)
            lists = [pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1]) for rows in (x_NI, y_NO)]
            writer.write_batch(pa.record_batch([*lists, pa.array(group_N)], schema=schema))


def _expected(group: int) -> np.ndarray:
    """The ridge regression of a group's rows, by scikit-learn, (O, I)."""
    rows = [
        (x_NI[group_N == group], y_NO[group_N == group]) for x_NI, y_NO, group_N in map(_part, range(ROWS // PART + 1))
    ]
    x_KI, y_KO = map(np.concatenate, zip(*rows, strict=True))
    model = Ridge(alpha=RIDGE, fit_intercept=False).fit(x_KI.astype(np.float64), y_KO)
    return np.asarray(model.coef_)


def _peak_bytes(process: Any) -> int:
    """Most memory that a process had at once, with the pages of mapped files."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


@pytest.mark.timeout(600)
def test_a_fleet_of_three_times_the_memory_limit_is_fitted_within_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    _parquet(file)
    assert file.stat().st_size > 3 * LIMIT
    settings: dict[str, Any] = {"base": f"zeros:{I},{O}", "trainer_memory_bytes": LIMIT}
    with ServiceProcess(tmp_path / "data", trainers=0, **settings) as service:
        client = service.client
        with file.open("rb") as content:
            headers = {"Content-Type": "application/vnd.apache.parquet"}
            client.put("/datasets/rows", content=content, headers=headers, timeout=300).raise_for_status()
        data = {"dataset": "rows", "inputs": {"column": "x"}, "targets": {"column": "y"}, "group_by": "group"}
        training = {"method": "closed_form", "ridge": RIDGE}
        body = {"name": "fleet-{group}", "rank": O, "data": data, "training": training, "publish": "always"}
        plan = client.post("/adapters?dry_run=true", json=body, timeout=300).raise_for_status().json()
        assert plan["estimate"]["scratch_bytes"] > 3 * LIMIT
        with TrainerProcess(service.data_dir, **settings, forks=False) as trainer:
            fit = the(trainer.process.pid, FIT)
            started = client.post("/adapters", json=body, timeout=300).raise_for_status().json()
            job = wait_for_job(client, started["id"], seconds=300)
            peak = _peak_bytes(fit)
            assert job["status"] == "succeeded", job["error"]
            assert the(trainer.process.pid, FIT) == fit
        assert peak <= LIMIT, peak
        assert job["adapters"]["published"] == GROUPS
        assert any("sorted by group on disk" in line["text"] for line in job["log"]), job["log"]
        assert not any((service.data_dir / "scratch").iterdir())
        for group in (0, GROUPS - 1):
            expected_OI = _expected(group)
            delta_OI = published_delta(client, f"fleet-{group}").numpy()
            assert np.linalg.norm(delta_OI - expected_OI) < 1e-5 * np.linalg.norm(expected_OI)
