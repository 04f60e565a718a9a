"""Rows of a fleet that are sorted for several shares: each share has the adapters that it has with all rows."""

# N rows · K rows of a block · I in_features · O out_features
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from adapters.errors import FitFailed, StorageFailed
from adapters.lora.base_layer import BaseLayer
from adapters.storage.blobs import BLOBS, FolderBlobs
from adapters.storage.quarantine import Quarantine
from adapters.training import fleet, sorted_rows
from adapters.training.data_file import TrainingData, write_data_file
from adapters.training.fleet import fit_fleet
from adapters.training.planning.split import Split, SplitBy
from adapters.training.settings import Method, TrainingSpec
from adapters.training.sorted_rows import RowTable
from tests.support.data_file_columns import columns_of

I, O, ROWS, GROUPS, STACK_ROWS, NAME = 24, 3, 3_000, 60, 120, "0" * 32
_DRAW = torch.Generator().manual_seed(5)
BASE = BaseLayer(torch.randn(O, I, generator=_DRAW), torch.zeros(O), source="", fingerprint="sha256:", weight_norm=1.0)
SPEC = TrainingSpec(rank=2, alpha=2.0, max_steps=12)


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    """A folder with a data file: groups of very different sizes in no order, with weights and keys."""
    groups_N = (GROUPS * torch.rand(ROWS, generator=_DRAW) ** 2).long()
    groups_N[:GROUPS] = torch.arange(GROUPS)
    inputs_NI = torch.randn(ROWS, I, generator=_DRAW)
    data = TrainingData(
        inputs_NI,
        inputs_NI[:, :O] * (1 + groups_N[:, None] % 4),
        weights_N=torch.rand(ROWS, generator=_DRAW) + 0.5,
        key_N=torch.randint(2**62, (ROWS,), generator=_DRAW),
        groups_N=groups_N,
        prior_OR=torch.ones(O, 1),
        prior_RI=torch.ones(1, I),
    )
    blobs = FolderBlobs(tmp_path, quarantine=Quarantine(tmp_path, now=float, days=1.0))
    blobs.create_folder()
    with (tmp_path / BLOBS / NAME).open("wb") as file:
        write_data_file(columns_of(data), file)
    return blobs


def _sorted(table: RowTable) -> pa.Table:
    """All rows, sorted."""
    unsorted = pa.concat_tables(table.read(row, min(row + 700, ROWS)) for row in range(0, ROWS, 700))
    return unsorted.append_column("index", pa.array(table.sorted_index())).sort_by("index").drop_columns("index")


@pytest.mark.parametrize(
    "spec",
    [replace(SPEC, batch_size=16, split=Split(by=SplitBy.HASH)), replace(SPEC, method=Method.CLOSED_FORM, ridge=2.0)],
    ids=["adamw", "closed form"],
)
def test_shares_of_the_rows_give_the_adapters_of_all_rows(
    spec: TrainingSpec, blobs: FolderBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (fleet, sorted_rows):
        monkeypatch.setattr(module, "STACK_NUMBERS", STACK_ROWS * I)
    data, table = TrainingData.open(blobs.local(NAME)), RowTable(blobs, NAME)
    expected = {one.position: one for stack in fit_fleet(BASE, data, spec) for one in stack}
    in_order, fitted = _sorted(table), []
    shares = table.shares(5)
    assert [begin for begin, _ in shares[1:]] == [end for _, end in shares[:-1]]
    for begin, end in shares:
        last = table.rows_end(end)
        # In two parts, as if a block ended in the middle.
        middle = (begin + last) // 2
        parts = [(first, in_order.slice(first, until - first)) for first, until in ((begin, middle), (middle, last))]
        table.write_share(tmp_path / "rows", parts)
        share = TrainingData.open(tmp_path / "rows")
        for stack in fit_fleet(BASE, share, spec, rows=range(begin, end)):
            fitted += stack
    assert sorted(one.position for one in fitted) == sorted(expected) == [*range(GROUPS)]
    for one in fitted:
        other = expected[one.position]
        assert one.adapter is not None
        assert other.adapter is not None
        assert (one.adapter.digest, one.metrics) == (other.adapter.digest, other.metrics)


def test_a_share_has_holes_for_the_rows_of_others(blobs: FolderBlobs, tmp_path: Path) -> None:
    table, all_rows = RowTable(blobs, NAME), TrainingData.open(blobs.local(NAME))
    table.write_share(tmp_path / "rows", [(1_000, _sorted(table).slice(1_000, 500))])
    share, row_of = TrainingData.open(tmp_path / "rows"), torch.from_numpy(table.sorted_index()).argsort()
    assert share.groups_N is not None
    assert all_rows.groups_N is not None
    assert torch.equal(share.groups_N, all_rows.groups_N[row_of])
    assert torch.equal(share.inputs_NI[1_000:1_500], all_rows.inputs_NI[row_of[1_000:1_500]])
    assert not share.inputs_NI[:1_000].any()
    assert not share.inputs_NI[1_500:].any()


def test_a_share_has_the_blocks_of_its_rows_and_an_empty_one_has_none(
    blobs: FolderBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorted_rows, "STACK_NUMBERS", STACK_ROWS * I)
    monkeypatch.setattr(RowTable, "block_rows", 100)
    table = RowTable(blobs, NAME)
    # Far more shares than groups: most begin and end in the largest groups.
    shares = table.shares(1_000)
    assert (shares[0][0], shares[-1][1]) == (0, ROWS)
    assert any(begin == end for begin, end in shares)
    for begin, end in shares:
        blocks = range(ROWS // 100)[table.share_blocks(begin, end)]
        needed = {row // 100 for row in range(begin, table.rows_end(end))} if begin < end else set()
        assert set(blocks) == needed


def test_rows_that_are_missing_are_the_error(blobs: FolderBlobs, tmp_path: Path) -> None:
    with pytest.raises(FitFailed):
        RowTable(blobs, "1" * 32)
    table = RowTable(blobs, NAME)
    os.truncate(tmp_path / BLOBS / NAME, 10_000)
    with pytest.raises(FitFailed):
        table.read(ROWS - 1, ROWS)


def test_a_file_that_a_cache_evicts_is_fetched_once_more(
    blobs: FolderBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [blobs.local(NAME), tmp_path / "evicted"]
    monkeypatch.setattr(blobs, "local", lambda _name: paths.pop())
    assert RowTable(blobs, NAME).rows == ROWS
    paths += [tmp_path / "evicted"] * 2
    with pytest.raises(StorageFailed):
        RowTable(blobs, NAME)
