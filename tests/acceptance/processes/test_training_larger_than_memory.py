"""Data that are larger than a trainer's memory are trained on all the same: they are read through, part by part."""

# N rows · I in_features · O out_features
import io
from collections.abc import Iterator
from functools import cache
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc

from app.settings import Settings
from tests.support.fork_server import own_starts
from tests.support.service import serving, wait_for_job
from tests.support.training_oracle import published_delta

pytestmark = pytest.mark.slow

I, O, ROWS, PART = 512, 3, 310_000, 10_000
MEMORY_BYTES = 600 * 2**20
SEED = 5


@pytest.fixture(autouse=True, scope="module")
def _own_starts() -> Iterator[None]:
    with own_starts():
        yield


@cache
def _distinct() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(SEED)
    truth_IO = rng.standard_normal((I, O)).astype(np.float32)
    inputs = [rng.standard_normal((PART, I), dtype=np.float32) for _ in range(2)]
    return [(x_NI, x_NI @ truth_IO + rng.standard_normal((PART, O), dtype=np.float32)) for x_NI in inputs]


def _parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two parts in turn: what their rows sum up to is known without going through all of them."""
    return islice(cycle(_distinct()), ROWS // PART)


def _lists(numbers: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), numbers.shape[1])


def _stream() -> Iterator[bytes]:
    schema = pa.schema([("x", pa.list_(pa.float32(), I)), ("y", pa.list_(pa.float32(), O))])
    sink = io.BytesIO()
    writer = ipc.new_stream(sink, schema)
    for x_NI, y_NO in _parts():
        writer.write_batch(pa.record_batch([_lists(x_NI), _lists(y_NO)], schema=schema))
        yield sink.getvalue()
        sink.seek(0)
        sink.truncate()
    writer.close()
    yield sink.getvalue()


@pytest.mark.timeout(240)
def test_data_past_the_memory_limit_are_streamed(tmp_path: Path) -> None:
    assert ROWS * I * 4 > MEMORY_BYTES
    settings = Settings(base=f"zeros:{I},{O}", data_dir=tmp_path, trainer_memory_bytes=MEMORY_BYTES)
    with serving(settings, trainer=True) as (client, _):
        answer = client.put(
            "/datasets/large", content=_stream(), headers={"Content-Type": "application/vnd.apache.arrow.stream"}
        )
        assert answer.status_code == 201, answer.text
        data = {"dataset": "large", "inputs": {"column": "x"}, "targets": {"column": "y"}}
        for name, training in (
            ("exact", {"method": "closed_form", "ridge": 3}),
            ("steps", {"method": "adamw", "max_steps": 30, "epochs": 1}),
        ):
            answer = client.post("/adapters", json={"name": name, "rank": O, "data": data, "training": training})
            assert answer.status_code == 202, answer.text
            job = wait_for_job(client, answer.json()["id"], seconds=120)
            assert job["status"] == "succeeded", job["error"]
            assert job["metrics"]["train_loss"] < job["metrics"]["base_train_loss"]
        delta_OI = published_delta(client, "exact").numpy()
    gram_II, cross_IO = 3 * np.eye(I), np.zeros((I, O))
    for place, (x_NI, y_NO) in enumerate(_distinct()):
        times = len(range(place, ROWS // PART, 2))
        gram_II += times * (x_NI.astype(np.float64).T @ x_NI)
        cross_IO += times * (x_NI.astype(np.float64).T @ y_NO)
    wanted_IO = np.linalg.solve(gram_II, cross_IO)
    assert np.linalg.norm(delta_OI.T - wanted_IO) < 1e-6 * np.linalg.norm(wanted_IO)
