"""Statistics are the sums over the rows, however the rows came, and survive being stored."""

# N rows · I in_features · O out_features · G groups
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from adapters.errors import BlobCorrupt, InvalidCombination
from adapters.lora.base_layer import BaseLayer
from adapters.training.closed_form import statistics as module
from adapters.training.closed_form.statistics import Statistics, accumulate
from tests.support.dense_oracle import Float64
from tests.unit.adapters.training.closed_form.closed_form_oracle import Problem, numbers, stacked

Exact = Any
"""Arrays of numpy's longdouble: 64 bits of mantissa."""


def _problem(rows: int = 90, *, weighted: bool = True, shift: float = 2.0) -> Problem:
    weights_N = np.abs(numbers(rows, seed=4)) if weighted else None
    return Problem.of(numbers(rows, 6, seed=1) + shift, numbers(rows, 4, seed=2), weights_N)


def _exactly(problem: Problem) -> tuple[Exact, Exact, Exact, Exact, Exact]:
    """Means of x and r, and XᵀX, XᵀR and tr RᵀR about them."""
    x_NI, r_NO, w_N = (each.astype(np.longdouble) for each in (problem.x_NI, problem.r_NO, problem.w_N))
    mean_I, mean_O = ((w_N[:, None] * each).sum(0) / w_N.sum() for each in (x_NI, r_NO))
    x_NI, r_NO = x_NI - mean_I, r_NO - mean_O
    wx_NI = w_N[:, None] * x_NI
    return mean_I, mean_O, wx_NI.T @ x_NI, wx_NI.T @ r_NO, (w_N[:, None] * r_NO**2).sum()


def _off(given: Tensor | float, wanted: Exact) -> float:
    """The largest difference, relative to the largest number."""
    return float(np.abs(np.asarray(given, dtype=np.longdouble) - wanted).max() / np.abs(wanted).max())


def _assert_same(given: Statistics, wanted: Statistics, tolerance: float = 1e-12) -> None:
    assert torch.equal(given.count, wanted.count)
    for each in fields(Statistics):
        if each.name != "peak_2J":
            torch.testing.assert_close(
                getattr(given, each.name), getattr(wanted, each.name), rtol=tolerance, atol=1e-10
            )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [0.0, 1e3, 1e6])
def test_they_are_exact_however_far_the_mean_is_from_zero(shift: float, weighted: bool) -> None:
    problem = _problem(weighted=weighted, shift=shift)
    statistics = problem.statistics()
    mean_I, mean_O, gram_II, cross_IO, spread = _exactly(problem)
    assert statistics.rows == 90
    assert statistics.weight == pytest.approx(problem.w_N.sum(), rel=1e-14)
    assert max(_off(statistics.mean_I, mean_I), _off(statistics.mean_O, mean_O)) < 1e-14
    # The residuals come from products of 1e6: their own rounding is 1e-16 of that.
    assert _off(statistics.gram_II, gram_II) < 1e-13
    assert _off(statistics.cross_IO, cross_IO) < 1e-12
    assert _off(statistics.spread, spread) < 1e-12


@pytest.mark.parametrize("weighted", [False, True])
def test_the_sums_about_zero_are_the_plain_ones(weighted: bool) -> None:
    problem = _problem(weighted=weighted)
    gram_II, cross_IO, square = problem.statistics().about_zero()
    wx_NI = problem.w_N[:, None] * problem.x_NI
    assert _off(gram_II, wx_NI.T @ problem.x_NI) < 1e-14
    assert _off(cross_IO, wx_NI.T @ problem.r_NO) < 1e-13
    assert float(square) == pytest.approx((problem.w_N[:, None] * problem.r_NO**2).sum(), rel=1e-13)
    assert problem.statistics().square == pytest.approx(float(square), rel=1e-14)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("length", [1, 7, 89])
def test_chunks_of_any_length_come_to_the_same_as_one(length: int, weighted: bool) -> None:
    problem = _problem(weighted=weighted, shift=50.0)
    chunks = (problem.chunk(slice(begin, begin + length)) for begin in range(0, 90, length))
    _assert_same(accumulate(problem.base, chunks), problem.statistics())


def test_a_large_chunk_is_worked_through_in_bounded_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem()
    whole = problem.statistics()
    seen, of_rows = [], module._statistics_of_rows

    def watched(base: BaseLayer, x_NI: Tensor, y_NO: Tensor, weights_N: Tensor | None) -> Statistics:
        seen.append(len(x_NI))
        return of_rows(base, x_NI, y_NO, weights_N)

    monkeypatch.setattr(module, "SUM_CHUNK_NUMBERS", 250)
    monkeypatch.setattr(module, "_statistics_of_rows", watched)
    _assert_same(problem.statistics(), whole)
    assert seen == [25, 25, 25, 15]


def test_no_rows_come_to_nothing_and_add_nothing() -> None:
    problem = _problem()
    nothing = accumulate(problem.base, [])
    assert (nothing.rows, nothing.weight, nothing.square) == (0, 0.0, 0.0)
    _assert_same(nothing.plus(problem.statistics()), problem.statistics(), 1e-15)
    _assert_same(problem.statistics().plus(nothing), problem.statistics(), 1e-15)


def test_rows_of_weight_zero_are_not_there() -> None:
    problem = _problem()
    x_NI, y_NO, weights_N = problem.chunk()
    assert weights_N is not None
    padded = (torch.cat([x_NI, 100 * x_NI[:9]]), torch.cat([y_NO, y_NO[:9]]), torch.cat([weights_N, torch.zeros(9)]))
    _assert_same(accumulate(problem.base, [padded]), problem.statistics())


@pytest.mark.parametrize("weighted", [False, True])
def test_a_column_of_one_number_has_no_spread_at_all_in_one_part_or_several(weighted: bool) -> None:
    x_NI = numbers(90, 6, seed=1)
    x_NI[:, 2], x_NI[:, 4] = 1000.1, 0
    problem = Problem.of(x_NI, numbers(90, 4, seed=2), np.abs(numbers(90, seed=4)) if weighted else None)
    parts = accumulate(problem.base, [problem.chunk(slice(begin, begin + 13)) for begin in range(0, 90, 13)])
    rest = problem.statistics().minus(problem.statistics(slice(0, 80)))
    for statistics in (problem.statistics(), parts, rest):
        assert statistics.constant().tolist() == [False, False, True, False, True, False]
        assert float(statistics.gram_II[2].abs().max()) == 0


def test_columns_without_spread_have_none_after_rows_of_far_more_weight_are_taken_away() -> None:
    """One of the rows that go differs in three columns, but has next to no weight: the spread is all rounding."""
    x_NI, weights_N = numbers(60, 6, seed=1), np.abs(numbers(60, seed=3)) + 0.1
    nearly = np.array([1000.0005, 1000.001, 1000.0015], dtype=np.float32)
    x_NI[:, 3:] = nearly
    x_NI[7, 3:] = np.nextafter(nearly, np.float32(2000))
    weights_N[:30] *= 1e9
    weights_N[7] = 1e-20
    problem = Problem.of(x_NI, numbers(60, 4, seed=2), weights_N)
    whole = problem.statistics()
    rest = whole.minus(problem.statistics(slice(0, 30)))
    assert np.ptp(problem.x_NI[30:, 3:], axis=0).tolist() == [0, 0, 0]
    for statistics in (whole, rest):
        assert statistics.constant().tolist() == [False] * 3 + [True] * 3
    assert float(rest.gram_II[3:].abs().max()) == float(rest.cross_IO[3:].abs().max()) == 0


def test_flags_that_add_up_to_one_stay_dependent_over_many_rows() -> None:
    classes = np.random.default_rng(0).integers(0, 3, 20_000)
    problem = Problem.of(np.eye(3)[classes], numbers(20_000, 1, seed=2))
    gram_II = problem.statistics().gram_II
    assert float((gram_II @ torch.ones(3, dtype=torch.float64)).abs().max()) < 8 * 2.2e-16 * float(gram_II.max())


def test_two_parts_are_the_whole_and_what_is_taken_away_was_never_there() -> None:
    problem = _problem()
    first, second = problem.statistics(slice(0, 50)), problem.statistics(slice(50, 90))
    _assert_same(first.plus(second), problem.statistics())
    _assert_same(problem.statistics().minus(second), first)


def test_the_peaks_remember_the_largest_sums_on_the_way() -> None:
    problem = _problem()
    loud = Problem.of(1e4 * problem.x_NI, problem.y_NO, problem.weights_N).statistics(slice(0, 10))
    after = problem.statistics().plus(loud).minus(loud)
    peaks_I = ((problem.w_N[:10, None] * 1e8 * problem.x_NI[:10] ** 2).sum(0)).max()
    assert float(after.peak_2J[1, :-1].max()) == pytest.approx(peaks_I, rel=1e-4)


def test_statistics_of_another_shape_cannot_be_joined() -> None:
    other = Statistics.zeros(6, 3)
    for join in (_problem().statistics().plus, _problem().statistics().minus):
        with pytest.raises(InvalidCombination, match=r"\(6, 3\).*\(6, 4\)"):
            join(other)


def test_groups_of_different_lengths_come_to_the_same_together_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, lengths = _problem(), [40, 1, 23, 0]
    starts = np.cumsum([0, *lengths])
    x_GNI, y_GNO, weights_GN = torch.zeros(4, 40, 6), torch.zeros(4, 40, 4), torch.zeros(4, 40)
    alone = []
    for group, length in enumerate(lengths):
        chunk = problem.chunk(slice(starts[group], starts[group] + length))
        assert chunk[2] is not None
        x_GNI[group, :length], y_GNO[group, :length], weights_GN[group, :length] = chunk[0], chunk[1], chunk[2]
        alone.append(accumulate(problem.base, [chunk]))
    monkeypatch.setattr(module, "SUM_CHUNK_NUMBERS", 4 * 10 * 11)
    stack = accumulate(problem.base, [(x_GNI, y_GNO, weights_GN)], groups=4)
    for group, one in enumerate(alone):
        _assert_same(stack[group], one)
    _assert_same(stacked(alone), stack)


def test_without_weights_every_row_of_a_stack_counts_once() -> None:
    problem = _problem(weighted=False)
    x_NI, y_NO, _ = problem.chunk()
    stack = accumulate(problem.base, [(x_NI.reshape(3, 30, 6), y_NO.reshape(3, 30, 4), None)], groups=3)
    assert stack.count.tolist() == [30, 30, 30]
    for group in range(3):
        _assert_same(stack[group], problem.statistics(slice(30 * group, 30 * group + 30)))


def test_stored_and_read_again_they_are_the_same_bit_for_bit() -> None:
    statistics = _problem().statistics()
    content = statistics.to_bytes()
    again = Statistics.from_bytes(content)
    assert all(torch.equal(getattr(again, each.name), getattr(statistics, each.name)) for each in fields(Statistics))
    assert again.to_bytes() == content


def _stored(**changed: Tensor) -> bytes:
    return save(load(_problem().statistics().to_bytes()) | changed)


def _without(name: str) -> bytes:
    return save({key: tensor for key, tensor in load(_problem().statistics().to_bytes()).items() if key != name})


DAMAGED = {
    "nothing": b"",
    "not safetensors": b"statistics" * 20,
    "cut short": _problem().statistics().to_bytes()[:-8],
    "a tensor is missing": _without("gram_II"),
    "the means are missing": _without("mean_I"),
    "a tensor too many": _stored(extra=torch.zeros(1)),
    "a row too few": _stored(cross_IO=torch.zeros(5, 4, dtype=torch.float64)),
    "a mean without a shape": _stored(mean_I=torch.zeros((), dtype=torch.float64)),
    "float32": _stored(spread=torch.zeros(())),
    "not finite": _stored(total=torch.tensor(float("nan"), dtype=torch.float64)),
    "a stack": stacked([_problem().statistics()] * 2).to_bytes(),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_what_was_not_stored_as_statistics_is_refused(content: bytes) -> None:
    with pytest.raises(BlobCorrupt, match="stored statistics cannot be read"):
        Statistics.from_bytes(content)


def test_they_are_values_that_joining_does_not_change() -> None:
    statistics, part = _problem().statistics(), _problem().statistics(slice(0, 30))
    before = replace(statistics, **{each.name: getattr(statistics, each.name).clone() for each in fields(Statistics)})
    statistics.plus(part)
    statistics.minus(part)
    _assert_same(statistics, before, 0.0)


def test_a_billion_to_one_between_columns_keeps_every_column_exact() -> None:
    scale_I: Float64 = np.logspace(0, -9, 6)
    problem = Problem.of(numbers(80, 6, seed=1) * scale_I, numbers(80, 4, seed=2))
    _, _, gram_II, _, _ = _exactly(problem)
    units_II = np.outer(scale_I, scale_I)
    assert _off(problem.statistics().gram_II / torch.from_numpy(units_II), gram_II / units_II) < 1e-13
