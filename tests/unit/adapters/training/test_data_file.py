"""Training data: they survive their file, part by part or at once, and have the same digest either way."""

# N rows
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from adapters.training.data_file import Column, TrainingData, rows_digest, write_data_file
from tests.support.data_file_columns import columns_of

INPUTS = torch.arange(60, dtype=torch.float32).reshape(20, 3)
DATA = TrainingData(INPUTS, INPUTS[:, :1] * 10, torch.ones(1, 2), torch.ones(2, 3))
EVERYTHING = TrainingData(
    INPUTS,
    torch.arange(20),
    start_OR=torch.randn(4, 2),
    start_RI=torch.randn(2, 3),
    weights_N=torch.rand(20),
    key_N=torch.arange(20) - 10,
    groups_N=torch.arange(20) % 4,
    held_inputs_NI=torch.randn(5, 3),
    held_targets=torch.arange(5),
    held_weights_N=torch.rand(5),
    prior_OR=torch.randn(4, 1),
    prior_RI=torch.randn(1, 3),
    corpus_MO=torch.randn(7, 4),
    gone_inputs_NI=torch.randn(2, 3),
    gone_targets=torch.arange(2),
    gone_weights_N=torch.rand(2),
)
SINGLE_ROW = TrainingData(torch.tensor([[1.0]]), torch.tensor([[2.0]]))


def _digest(data: TrainingData) -> str:
    return rows_digest(columns_of(data))


def _written(data: TrainingData, path: Path) -> Path:
    with path.open("wb") as file:
        write_data_file(columns_of(data), file)
    return path


@pytest.mark.parametrize(
    "data",
    [DATA, TrainingData(INPUTS, torch.arange(20)), EVERYTHING, SINGLE_ROW, TrainingData(INPUTS.T, INPUTS.T)],
    ids=["numbers", "classes", "everything", "a single row", "not contiguous"],
)
def test_what_is_stored_is_read_back(data: TrainingData, tmp_path: Path) -> None:
    again = TrainingData.open(_written(data, tmp_path / "rows"))
    for field in fields(TrainingData):
        before, after = getattr(data, field.name), getattr(again, field.name)
        assert (before is None and after is None) or (before.equal(after) and before.dtype == after.dtype)


def test_the_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    with safe_open(_written(EVERYTHING, tmp_path / "rows"), framework="np") as stored:
        assert set(stored.keys()) == {field.name for field in fields(TrainingData)} - {"mapping"}
        for name in stored.keys():  # noqa: SIM118 - not a mapping
            np.testing.assert_array_equal(stored.get_tensor(name), getattr(EVERYTHING, name).numpy())


def test_opened_data_stay_on_the_disk_and_do_not_count_as_memory_of_the_process(tmp_path: Path) -> None:
    rows = 2**19
    path = _written(TrainingData(torch.ones(rows, 32), torch.ones(rows, 32)), tmp_path / "rows")

    def kib(what: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(what))

    before = {what: kib(what) for what in ("RssAnon", "VmData")}
    data = TrainingData.open(path)
    total = sum(float(part.inputs_NI.sum()) for part in data.parts(None, 8192))
    assert total == rows * 32
    assert all(kib(what) - before[what] < 2**14 for what in before)  # of 128 MiB


def test_the_digest_is_over_the_rows_and_not_over_where_training_starts() -> None:
    same = TrainingData(INPUTS.clone(), INPUTS[:, :1] * 10, prior_OR=torch.ones(1, 1), prior_RI=torch.ones(1, 3))
    assert _digest(same) == _digest(DATA)
    others = [
        TrainingData(INPUTS + 1, DATA.targets),
        TrainingData(INPUTS, DATA.targets + 1),
        TrainingData(INPUTS, DATA.targets.long()[:, 0]),
        TrainingData(INPUTS.reshape(10, 6), DATA.targets),
        replace(DATA, weights_N=torch.ones(20)),
        replace(DATA, key_N=torch.ones(20).long()),
        replace(DATA, groups_N=torch.ones(20).long()),
    ]
    assert len({_digest(data) for data in [DATA, *others]}) == 1 + len(others)


def test_the_digest_is_the_hash_of_a_file_of_the_rows_alone(tmp_path: Path) -> None:
    rows_alone = replace(DATA, start_OR=None, start_RI=None)
    content = _written(rows_alone, tmp_path / "rows").read_bytes()
    assert _digest(DATA) == f"sha256:{hashlib.sha256(content).hexdigest()}"


def _in_parts(array: NDArray[Any], most: int) -> Column:
    def parts() -> Iterator[NDArray[Any]]:
        for begin in range(0, len(array), most):
            yield array[begin : begin + most]

    return Column(Column.of(array).dtype, array.shape, parts)


@pytest.mark.parametrize("most", [1, 3, 7, 20])
def test_parts_make_the_file_and_the_digest_that_the_whole_makes(most: int) -> None:
    arrays = {"inputs_NI": INPUTS.numpy(), "targets": np.arange(20), "weights_N": np.ones(20, np.float32)}
    at_once, by_parts = io.BytesIO(), io.BytesIO()
    files = [
        {name: Column.of(array) for name, array in arrays.items()},
        {name: _in_parts(array, most) for name, array in arrays.items()},
    ]
    for columns, target in zip(files, (at_once, by_parts), strict=True):
        write_data_file(columns, target)
    assert by_parts.getvalue() == at_once.getvalue()
    assert rows_digest(files[1]) == rows_digest(files[0])


def test_every_tensor_lies_at_a_multiple_of_the_size_of_its_numbers(tmp_path: Path) -> None:
    odd = replace(EVERYTHING, start_OR=torch.ones(1, 3), start_RI=torch.ones(3, 3), weights_N=torch.ones(21))
    content = _written(odd, tmp_path / "rows").read_bytes()
    length = int.from_bytes(content[:8], "little")
    for entry in json.loads(content[8 : 8 + length]).values():
        assert entry["data_offsets"][0] % (8 if entry["dtype"] == "I64" else 4) == 0


def test_a_header_is_padded_so_that_the_numbers_lie_at_multiples_of_8() -> None:
    for columns in range(1, 12):
        target = io.BytesIO()
        data = TrainingData(torch.ones(2, columns), torch.ones(2, 10**columns % 17 + 1))
        write_data_file(columns_of(data), target)
        length = int.from_bytes(target.getvalue()[:8], "little")
        assert length % 8 == 0
        json.loads(target.getvalue()[8 : 8 + length])


@pytest.mark.parametrize("most", [1, 6, 19, 20, 100])
@pytest.mark.parametrize("rows", [None, [5, 3, 3, 19, 0, 7, 11]])
def test_parts_are_the_rows_in_their_order_at_most_so_many_at_a_time(rows: list[int] | None, most: int) -> None:
    data = replace(DATA, weights_N=torch.rand(20))
    rows_K = None if rows is None else torch.tensor(rows)
    parts = list(data.parts(rows_K, most))
    wanted = slice(None) if rows_K is None else rows_K
    assert all(part.rows <= most for part in parts)
    assert torch.cat([part.inputs_NI for part in parts]).equal(data.inputs_NI[wanted])
    assert torch.cat([part.targets for part in parts]).equal(data.targets[wanted])
    assert data.weights_N is not None
    weights = [part.weights_N for part in parts if part.weights_N is not None]
    assert torch.cat(weights).equal(data.weights_N[wanted])


def test_rows_that_are_held_out_or_to_be_forgotten_are_data_of_their_own() -> None:
    assert DATA.held_out is None
    assert DATA.gone is None
    held_out, gone = EVERYTHING.held_out, EVERYTHING.gone
    assert held_out is not None
    assert gone is not None
    assert held_out.inputs_NI is EVERYTHING.held_inputs_NI
    assert held_out.weights_N is EVERYTHING.held_weights_N
    assert gone.targets is EVERYTHING.gone_targets
    assert (held_out.rows, gone.rows) == (5, 2)


def test_the_prior_is_the_product_of_its_factors_in_float64() -> None:
    assert DATA.prior is None
    assert EVERYTHING.prior is not None
    assert EVERYTHING.prior_OR is not None
    assert EVERYTHING.prior_RI is not None
    wanted = EVERYTHING.prior_OR.numpy().astype(np.float64) @ EVERYTHING.prior_RI.numpy().astype(np.float64)
    np.testing.assert_allclose(EVERYTHING.prior.numpy(), wanted, rtol=1e-15)
