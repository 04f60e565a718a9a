"""The shapes that adapters are trained in: few, hardly larger than what is in them, each matrix on a cache line."""

# N rows · K rows of one adapter, filled up · I in_features · O out_features
import math

import pytest
import torch
from torch.nn import functional

from adapters.training.data_file import TrainingData
from adapters.training.gradient.batches import LINE, is_packed, pack_rows, padded_rows, padded_width
from tests.support.dense_oracle import layer

WIDTHS = [(64, 10, 4), (768, 768, 8), (13, 5, 2), (1, 1, 1), (16, 32, 16)]


@pytest.mark.parametrize("widths", WIDTHS)
def test_a_shape_holds_its_rows_and_every_matrix_of_it_is_whole_cache_lines(widths: tuple[int, ...]) -> None:
    for rows in (*range(1, 300), 1000, 4095, 4096):
        filled = padded_rows(rows, *widths)
        assert filled >= rows
        assert all(filled * width % LINE == 0 for width in widths)
        # What is a shape already stays as it is: equal shapes are equal whoever asks.
        assert padded_rows(filled, *widths) == filled
        assert filled <= padded_rows(rows + 1, *widths)


@pytest.mark.parametrize("widths", WIDTHS)
def test_many_rows_are_filled_up_by_a_sixteenth_at_most(widths: tuple[int, ...]) -> None:
    least = max(4, LINE // math.gcd(LINE, *widths))
    for rows in range(1, 5000, 7):
        assert padded_rows(rows, *widths) - rows < max(least, rows / 16 + 1)


def test_few_shapes_are_enough_for_all_sizes() -> None:
    assert len({padded_rows(rows, 64, 10, 4) for rows in range(1, 4097)}) < 100
    assert [padded_width(numbers) for numbers in (1, 16, 17)] == [16, 16, 32]


def test_rows_are_laid_out_one_adapter_under_the_other_and_what_fills_up_weighs_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    base = layer(torch.randn(3, 5, generator=generator), torch.randn(3, generator=generator))
    data = TrainingData(
        torch.randn(9, 5, generator=generator),
        torch.randn(9, 3, generator=generator),
        weights_N=torch.rand(9, generator=generator) + 1,
    )
    rows = [torch.tensor([4, 0, 8]), torch.tensor([1, 2, 3, 7])]
    documents_N = torch.arange(9)
    batch = pack_rows(base, data, rows, [4, 4], documents_N).batch(4)
    assert data.weights_N is not None
    assert batch.weights_GK is not None
    assert batch.documents_GK is not None
    for place, rows_K in enumerate(rows):
        filled_K = torch.cat([rows_K, rows_K[:1]])[:4]
        assert torch.equal(batch.x_GKI[place], data.inputs_NI[filled_K])
        assert torch.equal(batch.targets[place], data.targets[filled_K].T)
        wanted_KO = functional.linear(data.inputs_NI[filled_K], base.weight_OI, base.bias_O)
        torch.testing.assert_close(batch.base_GOK[place], wanted_KO.T)
        there = len(rows_K)
        assert torch.equal(batch.weights_GK[place, :there], data.weights_N[rows_K])
        assert batch.weights_GK[place, there:].tolist() == [0.0] * (4 - there)
        assert batch.documents_GK[place].tolist() == [*rows_K.tolist(), *[-1] * (4 - there)]
    mine = batch.select([1])
    assert torch.equal(mine.x_GKI[0], batch.x_GKI[1])
    assert pack_rows(base, data.weighted(None), rows[1:], [4]).weights_T is None


def test_what_would_take_much_memory_is_not_laid_out() -> None:
    small, wide = layer(torch.zeros(10, 64)), layer(torch.zeros(768, 768))
    assert is_packed(10_000, 64, small)
    assert is_packed(1000, 1000, wide)
    assert not is_packed(10_000, 64, wide)
    assert not is_packed(10_000, 10_000, small)
