"""Which rows are held out: each row is on one side, and on the side where its split wants it."""

# N rows
from collections import Counter

import pytest
import torch
from torch import Tensor

from adapters.errors import OutOfRange
from adapters.training.planning.split import Split, SplitBy


def _sides(
    split: Split, rows: int, seed: int = 0, *, key_N: Tensor | None = None, classes_N: Tensor | None = None
) -> tuple[list[int], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    training_K, held_K = split.sides(rows, generator, key_N=key_N, classes_N=classes_N)
    assert training_K.dtype == held_K.dtype == torch.int64
    assert (training_K.tolist(), held_K.tolist()) == (sorted(training_K.tolist()), sorted(held_K.tolist()))
    assert sorted(training_K.tolist() + held_K.tolist()) == list(range(rows))
    return training_K.tolist(), held_K.tolist()


@pytest.mark.parametrize(
    ("rows", "fraction", "held_out"),
    [(10, 0.3, 3), (10, 0.25, 3), (10, 0.24, 2), (3, 0.5, 2), (7, 0.9, 6), (20, 0.05, 1), (20, 0.95, 19), (2, 0.5, 1)],
)
@pytest.mark.parametrize("by", [SplitBy.ROWS, SplitBy.TIME])
def test_the_fraction_of_the_rows_is_rounded_half_up(by: SplitBy, rows: int, fraction: float, held_out: int) -> None:
    assert len(_sides(Split(by=by, fraction=fraction), rows, key_N=torch.arange(rows))[1]) == held_out


@pytest.mark.parametrize(("rows", "fraction"), [(1, 0.5), (2, 0.1), (10, 0.999), (10, 0.01)])
@pytest.mark.parametrize("by", [SplitBy.ROWS, SplitBy.TIME])
def test_neither_side_may_be_empty(by: SplitBy, rows: int, fraction: float) -> None:
    with pytest.raises(OutOfRange) as caught:
        _sides(Split(by=by, fraction=fraction), rows, key_N=torch.arange(rows))
    assert caught.value.field == "split"


def test_rows_are_drawn_at_random_from_the_seed() -> None:
    split = Split(fraction=0.25)
    assert len({tuple(_sides(split, 20, seed)[1]) for seed in range(8)}) > 4
    assert _sides(split, 20, 3) == _sides(split, 20, 3)


def test_every_row_is_held_out_as_often_as_the_fraction_says() -> None:
    times = Counter(row for seed in range(2000) for row in _sides(Split(fraction=0.25), 8, seed)[1])
    # 500 expected, a standard deviation of 19.
    assert set(times) == set(range(8))
    assert all(400 < count < 600 for count in times.values())


def test_a_stratified_split_takes_the_fraction_of_each_class() -> None:
    classes_N = torch.tensor([0] * 40 + [1] * 10 + [3] * 4 + [7])[torch.randperm(55)]
    training, held = _sides(Split(fraction=0.25, stratify=True), 55, classes_N=classes_N)
    assert Counter(classes_N[held].tolist()) == {0: 10, 1: 3, 3: 1}
    assert Counter(classes_N[training].tolist()) == {0: 30, 1: 7, 3: 3, 7: 1}
    again = {tuple(_sides(Split(fraction=0.25, stratify=True), 55, seed, classes_N=classes_N)[1]) for seed in range(8)}
    assert len(again) == 8


def test_a_stratified_split_that_no_class_has_a_row_for_is_refused() -> None:
    with pytest.raises(OutOfRange):
        _sides(Split(fraction=0.2, stratify=True), 6, classes_N=torch.arange(6))


def test_without_classes_to_stratify_by_rows_are_drawn_alike() -> None:
    assert _sides(Split(stratify=True), 30) == _sides(Split(), 30)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.8])
def test_a_group_is_never_on_both_sides_and_the_part_is_near_the_fraction(fraction: float, seed: int) -> None:
    sizes = torch.randint(1, 9, (30,), generator=torch.Generator().manual_seed(seed))
    # Codes with gaps, in no order.
    key_N = (torch.arange(30) * 5 + 2).repeat_interleave(sizes)
    key_N = key_N[torch.randperm(len(key_N), generator=torch.Generator().manual_seed(seed))]
    training, held = _sides(Split(by=SplitBy.GROUP, fraction=fraction), len(key_N), seed, key_N=key_N)
    assert not set(key_N[training].tolist()) & set(key_N[held].tolist())
    assert abs(len(held) - fraction * len(key_N)) <= 4.5


@pytest.mark.parametrize(("fraction", "held_out"), [(0.3, 5), (0.2, None)])
def test_a_group_is_taken_where_that_brings_the_part_nearer_to_the_fraction(
    fraction: float, held_out: int | None
) -> None:
    split, key_N = Split(by=SplitBy.GROUP, fraction=fraction), torch.tensor([4] * 5 + [9] * 5)
    if held_out is None:
        with pytest.raises(OutOfRange):
            _sides(split, 10, key_N=key_N)
    else:
        assert len(_sides(split, 10, key_N=key_N)[1]) == held_out


def test_groups_are_drawn_at_random_from_the_seed() -> None:
    key_N = torch.arange(40) // 4
    split = Split(by=SplitBy.GROUP, fraction=0.3)
    assert len({tuple(_sides(split, 40, seed, key_N=key_N)[1]) for seed in range(8)}) > 4
    assert _sides(split, 40, 2, key_N=key_N) == _sides(split, 40, 2, key_N=key_N)


@pytest.mark.parametrize("groups", [[5] * 9, [1] + [2] * 99])
def test_groups_that_leave_a_side_empty_are_refused(groups: list[int]) -> None:
    with pytest.raises(OutOfRange):
        _sides(
            Split(by=SplitBy.GROUP, fraction=0.001 if len(groups) > 50 else 0.3),
            len(groups),
            key_N=torch.tensor(groups),
        )


def test_the_latest_rows_are_held_out_and_of_equal_times_the_later_in_the_data() -> None:
    key_N = torch.tensor([50, 10, 40, 10, 40, 40, 2**62, -(2**62)])
    assert _sides(Split(by=SplitBy.TIME, fraction=0.5), 8, key_N=key_N)[1] == [0, 4, 5, 6]
    assert _sides(Split(by=SplitBy.TIME, fraction=0.25), 8, key_N=key_N)[1] == [0, 6]


@pytest.mark.parametrize(
    ("fraction", "held_out"), [(0.2, [3]), (0.4, [3, 4]), (0.6, [2, 3, 4]), (0.8, [0, 2, 3, 4])], ids=str
)
def test_of_the_rows_at_the_boundary_time_only_as_many_are_held_out_as_the_fraction_says(
    fraction: float, held_out: list[int]
) -> None:
    key_N = torch.tensor([20, 10, 20, 30, 20])
    assert _sides(Split(by=SplitBy.TIME, fraction=fraction), 5, key_N=key_N)[1] == held_out


def test_a_column_holds_out_the_rows_that_it_says() -> None:
    key_N = torch.tensor([0, 1, 1, 0, 0, 1])
    assert _sides(Split(by=SplitBy.COLUMN), 6, key_N=key_N) == ([0, 3, 4], [1, 2, 5])
    for side in (0, 1):
        with pytest.raises(OutOfRange):
            _sides(Split(by=SplitBy.COLUMN), 6, key_N=torch.full((6,), side))


def test_a_hash_holds_out_the_same_rows_of_any_table() -> None:
    split, key_N = Split(by=SplitBy.HASH), torch.arange(200) * (2**63 // 200) + 2**50
    assert _sides(split, 200, 3, key_N=key_N)[1] == list(range(40))
    shuffled_N = torch.randperm(200)
    assert sorted(shuffled_N[_sides(split, 200, 4, key_N=key_N[shuffled_N])[1]].tolist()) == list(range(40))


def test_a_hash_holds_none_out_of_few_rows_or_if_all_would_be_on_one_side() -> None:
    split, low, high = Split(by=SplitBy.HASH), torch.zeros(100).long(), torch.full((100,), 2**62)
    mixed = torch.cat([low[:1], high[1:]])
    assert [split.holds_out(100, key_N) for key_N in (mixed, low, high)] == [True, False, False]
    assert not split.holds_out(99, mixed[:99])
    assert Split().holds_out(1)
