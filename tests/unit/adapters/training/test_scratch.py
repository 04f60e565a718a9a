"""Rows of a fleet that are sorted on disk, and lists of tensors on disk."""

# N rows · I in_features · O out_features
import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from adapters.errors import StorageFull
from adapters.lora.base_layer import BaseLayer
from adapters.training import scratch as scratch_module
from adapters.training.candidates.auto_fit import fit_fleet_auto
from adapters.training.data_file import TrainingData, write_data_file
from adapters.training.fleet import fit_fleet
from adapters.training.planning.split import Split, SplitBy
from adapters.training.scratch import Scratch
from adapters.training.settings import Candidate, Loss, Method, TrainingSpec
from tests.support.data_file_columns import columns_of

I, O, ROWS, GROUPS = 24, 3, 5_000, 60
_DRAW = torch.Generator().manual_seed(3)
BASE = BaseLayer(torch.randn(O, I, generator=_DRAW), torch.zeros(O), source="", fingerprint="sha256:", weight_norm=1.0)


def _data() -> TrainingData:
    """Groups of very different sizes, in no order, with a weight and a key for each row."""
    groups_N = (GROUPS * torch.rand(ROWS, generator=_DRAW) ** 2).long()
    groups_N[:GROUPS] = torch.arange(GROUPS)
    inputs_NI = torch.randn(ROWS, I, generator=_DRAW)
    targets_NO = inputs_NI[:, :O] * (1 + groups_N[:, None] % 4) + 0.1 * torch.randn(ROWS, O, generator=_DRAW)
    return TrainingData(
        inputs_NI,
        targets_NO,
        weights_N=torch.rand(ROWS, generator=_DRAW) + 0.5,
        key_N=torch.randint(2**62, (ROWS,), generator=_DRAW),
        groups_N=groups_N,
        prior_OR=torch.ones(O, 1),
        prior_RI=torch.ones(1, I),
    )


DATA = _data()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with (tmp_path / "rows").open("wb") as file:
        write_data_file(columns_of(DATA), file)
    return tmp_path / "rows"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scratch]:
    """Its buckets have 40 rows of the inputs at most."""
    monkeypatch.setattr(scratch_module, "_MIN_BUCKET_BYTES", 40 * 4 * I)
    yield Scratch(tmp_path / "scratch", size=2**20, memory_bytes=0)
    assert not list((tmp_path / "scratch").iterdir())


def test_rows_are_sorted_by_size_and_number_of_their_group(path: Path, scratch: Scratch) -> None:
    data, buckets = scratch.sort_by_group(path)
    assert buckets == ROWS // 40
    assert DATA.groups_N is not None
    sizes = torch.bincount(DATA.groups_N).tolist()
    groups = DATA.groups_N.tolist()
    order_N = torch.tensor(sorted(range(ROWS), key=lambda row: (sizes[groups[row]], groups[row], row)))
    for name in ("inputs_NI", "targets", "weights_N", "key_N", "groups_N"):
        assert torch.equal(getattr(data, name), getattr(DATA, name)[order_N]), name
    for name in ("prior_OR", "prior_RI"):
        assert torch.equal(getattr(data, name), getattr(DATA, name)), name


SPEC = TrainingSpec(rank=2, alpha=2.0, max_steps=12)
AUTO = replace(
    SPEC,
    bias=True,
    try_ridges=True,
    split=Split(by=SplitBy.HASH),
    candidates=(Candidate.BASE, Candidate.RIDGE, Candidate.FLEET_MEAN, Candidate.CLUSTER_MEAN),
)


def _few() -> TrainingData:
    """Groups of ten rows, one with held-out rows, and one with more rows than are left out one by one."""
    sizes = torch.tensor([10] * 20 + [120, 700])
    groups_N = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    groups_N = groups_N[torch.randperm(len(groups_N), generator=_DRAW)]
    rows = torch.arange(len(groups_N))
    data = DATA.take(rows)
    assert DATA.key_N is not None
    return replace(data, key_N=DATA.key_N[rows], groups_N=groups_N)


FEW = _few()


@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, batch_size=16, split=Split(by=SplitBy.ROWS)),
        replace(SPEC, split=Split(by=SplitBy.GROUP)),
        replace(SPEC, method=Method.CLOSED_FORM, ridge=2.0),
    ],
    ids=["adamw", "by group", "closed form"],
)
def test_a_fleet_sorted_on_disk_has_the_adapters_of_one_in_memory(
    spec: TrainingSpec, path: Path, scratch: Scratch
) -> None:
    in_memory = [_ended(outcome) for stack in fit_fleet(BASE, TrainingData.open(path), spec) for outcome in stack]
    on_disk = [_ended(outcome) for stack in fit_fleet(BASE, scratch.sort_by_group(path)[0], spec) for outcome in stack]
    assert len(on_disk) == GROUPS
    assert on_disk == in_memory


def test_choices_of_a_fleet_sorted_on_disk_are_those_of_one_in_memory(path: Path, scratch: Scratch) -> None:
    with path.open("wb") as file:
        write_data_file(columns_of(FEW), file)
    in_memory = fit_fleet_auto(BASE, TrainingData.open(path), AUTO, wants_prior=True)
    on_disk = fit_fleet_auto(BASE, scratch.sort_by_group(path)[0], AUTO, wants_prior=True, scratch=scratch)
    expected = [_ended(result) for stack in in_memory for result in stack]
    assert [_ended(result) for stack in on_disk for result in stack] == expected
    assert len(expected) == 22 + 1


def test_classes_chosen_on_disk_are_those_chosen_in_memory(path: Path, scratch: Scratch) -> None:
    classes = replace(FEW, targets=FEW.targets.argmax(1), weights_N=None)
    with path.open("wb") as file:
        write_data_file(columns_of(classes), file)
    spec = replace(AUTO, loss=Loss.CROSS_ENTROPY, rank=3)
    in_memory = fit_fleet_auto(BASE, TrainingData.open(path), spec)
    on_disk = fit_fleet_auto(BASE, scratch.sort_by_group(path)[0], spec, scratch=scratch)
    expected = [_ended(result) for stack in in_memory for result in stack]
    assert [_ended(result) for stack in on_disk for result in stack] == expected


def _ended(result: Any) -> tuple[Any, ...]:
    """What is published of a group."""
    report = None if result.report is None else result.report.to_json()
    digest = None if result.adapter is None else result.adapter.digest
    error = None if result.error is None else result.error.members()
    return result.position, digest, result.metrics, report, error


class _Pair(NamedTuple):
    wide: Tensor
    few: Tensor | None
    name: str


def test_a_list_on_disk_has_its_items_with_their_types_and_shapes(scratch: Scratch) -> None:
    items = [
        _Pair(torch.randn(size, 3, dtype=torch.float64), few, str(size))
        for size, few in ((0, None), (1, torch.tensor([True])), (2_000, torch.arange(5, dtype=torch.int8)))
    ]
    stored = scratch.list_of(iter(items))
    assert len(stored) == 3
    for number in (2, 0, 1):
        item, expected = stored[number], items[number]
        assert (item.wide.dtype, item.name) == (torch.float64, expected.name)
        assert torch.equal(item.wide, expected.wide)
        assert item.wide.numel() == 0 or item.wide.data_ptr() % 64 == 0
        assert (item.few is None) == (expected.few is None)
        assert item.few is None or item.few.tolist() == expected.few.tolist()  # type: ignore[union-attr]
    assert [item.name for item in stored] == [item.name for item in stored[:]] == ["0", "1", "2000"]


def test_too_little_free_space_is_found_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageFull, match="needs about"):
        Scratch(tmp_path, size=2**60, memory_bytes=0)


def test_a_disk_that_fills_up_is_the_error(path: Path, scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(StorageFull, match="the disk is full"):
        scratch.sort_by_group(path)
    with pytest.raises(StorageFull):
        scratch.keep(_Pair(torch.ones(1), None, ""))


def test_the_closed_form_of_each_group_on_disk_is_its_ridge_regression(path: Path, scratch: Scratch) -> None:
    spec = TrainingSpec(rank=O, alpha=float(O), method=Method.CLOSED_FORM, ridge=2.0)
    data, _ = scratch.sort_by_group(path)
    data = replace(data, prior_OR=None, prior_RI=None)
    outcomes = [outcome for stack in fit_fleet(BASE, data, spec) for outcome in stack]
    assert len(outcomes) == GROUPS
    for outcome in outcomes:
        assert outcome.adapter is not None
        rows_K = DATA.groups_N == outcome.position
        assert DATA.weights_N is not None
        x_KI, weights_K = DATA.inputs_NI[rows_K].double(), DATA.weights_N[rows_K].double()
        residuals_KO = DATA.targets[rows_K].double() - x_KI @ BASE.weight_OI.double().T
        expected = Ridge(alpha=2.0, fit_intercept=False).fit(x_KI.numpy(), residuals_KO.numpy(), weights_K.numpy())
        delta_OI = outcome.adapter.scaling * (outcome.adapter.a_OR @ outcome.adapter.b_RI).double()
        torch.testing.assert_close(delta_OI, torch.from_numpy(expected.coef_), rtol=1e-4, atol=1e-5)
