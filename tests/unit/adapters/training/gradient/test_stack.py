"""Adapters that are trained together end as each does alone."""

# G adapters of a stack · N rows of all of them · I in_features · O out_features
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from adapters.training.data_file import TrainingData
from adapters.training.gradient.batches import batch_shape
from adapters.training.gradient.sampling import Sampler, StackEntry
from adapters.training.gradient.stack import TrainedFactors
from adapters.training.gradient.training_loop import HeldOut, run_training_loop
from adapters.training.planning.split import Split
from adapters.training.settings import Loss, Method, Schedule, TrainingSpec
from tests.support.dense_oracle import layer

O, I = 3, 5
DRAW = torch.Generator().manual_seed(0)
BASE = layer(torch.randn(O, I, generator=DRAW), torch.randn(O, generator=DRAW))
SPEC = TrainingSpec(rank=2, alpha=3.0, bias=True, epochs=6, learning_rate=0.05, temperature=0.3)
SPECS = {
    "full batches": replace(SPEC, batch_size=None),
    "batches of 7": replace(SPEC, batch_size=7),
    "sgd": replace(SPEC, method=Method.SGD, momentum=0.9, batch_size=8, learning_rate=0.01),
    "clipped, scheduled": replace(
        SPEC, batch_size=5, clip_norm=0.5, weight_decay=0.1, schedule=Schedule.COSINE, warmup_steps=3
    ),
}


@dataclass
class Table:
    """Rows of several adapters under one another, each with rows to train on and rows held out."""

    data: TrainingData
    members: list[Tensor]

    @classmethod
    def of(cls, sizes: Sequence[int], loss: Loss, *, weighted: bool = False) -> "Table":
        """Targets are near what a low-rank change makes of the inputs."""
        draw = torch.Generator().manual_seed(sum(sizes))
        rows = sum(sizes)
        inputs_NI = torch.randn(rows, I, generator=draw)
        targets = inputs_NI @ torch.randn(I, O, generator=draw) + torch.randn(rows, O, generator=draw)
        if loss is Loss.CROSS_ENTROPY:
            targets = targets.argmax(dim=1)
        elif loss is Loss.BINARY_CROSS_ENTROPY:
            targets = (targets > 0).float()
        weights_N = torch.rand(rows, generator=draw) + 0.5 if weighted else None
        members = list(torch.randperm(rows, generator=draw).split(list(sizes)))
        return cls(TrainingData(inputs_NI, targets, weights_N=weights_N), members)

    def together(self, spec: TrainingSpec, *, shared: bool = True) -> list[TrainedFactors]:
        """All in one stack; those of one size share what is drawn for them, as in a fleet, or not."""
        drawn: dict[int, tuple[Sampler, tuple[Tensor, Tensor]]] = {}
        tasks, held = [], []
        for place, rows_K in enumerate(self.members):
            key = len(rows_K) if shared else -place - 1
            if key not in drawn:
                sampler = Sampler(spec, len(rows_K))
                drawn[key] = sampler, sampler.draw_factors(BASE)
            sampler, start = drawn[key]
            tasks.append(StackEntry(sampler, rows_K[sampler.training_K], start))
            if sampler.held_K is not None:
                held.append(rows_K[sampler.held_K])
        held_out = HeldOut(self.data, held) if held and spec.patience else None
        return run_training_loop(BASE, self.data, spec, tasks, report=lambda *_: None, held_out=held_out)[0]

    def alone(self, spec: TrainingSpec, member: int) -> TrainedFactors:
        """One of them, from a table of its own."""
        return Table(self.data.take(self.members[member]), [torch.arange(len(self.members[member]))]).together(spec)[0]


def _numbers(trained: TrainedFactors) -> Tensor:
    return torch.cat([factor.flatten() for factor in trained.factors if factor is not None])


def _assert_same(together: list[TrainedFactors], table: Table, spec: TrainingSpec) -> None:
    for member, trained in enumerate(together):
        alone = table.alone(spec, member)
        assert (trained.step, trained.steps) == (alone.step, alone.steps)
        assert _numbers(trained).equal(_numbers(alone))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("loss", Loss)
@pytest.mark.parametrize("weighted", [False, True])
def test_adapters_of_as_many_rows_are_to_the_last_bit_what_each_is_alone(loss: Loss, name: str, weighted: bool) -> None:
    spec = replace(SPECS[name], loss=loss)
    table = Table.of([23] * 6, loss, weighted=weighted)
    _assert_same(table.together(spec), table, spec)


@pytest.mark.parametrize("batch_size", [None, 64, 16])
def test_shared_draws_are_the_draws_of_each(batch_size: int | None) -> None:
    spec = replace(SPEC, batch_size=batch_size)
    table = Table.of([40] * 5, Loss.MSE)
    pairs = zip(table.together(spec), table.together(spec, shared=False), strict=True)
    assert all(_numbers(ours).equal(_numbers(own)) for ours, own in pairs)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("loss", [Loss.MSE, Loss.CROSS_ENTROPY, Loss.MULTIPLE_NEGATIVES])
def test_adapters_of_different_sizes_and_numbers_of_steps_are_what_each_is_alone(loss: Loss, name: str) -> None:
    spec = replace(SPECS[name], loss=loss)
    table = Table.of([23, 8, 31, 23, 64, 9], loss)
    together = table.together(spec)
    alone = [table.alone(spec, member) for member in range(6)]
    assert [each.steps for each in together] == [each.steps for each in alone]
    assert (len({each.steps for each in together}) > 1) == (spec.batch_size is not None)
    for ours, own in zip(together, alone, strict=True):
        assert float((_numbers(ours) - _numbers(own)).abs().max()) < 1e-5 * float(_numbers(own).abs().max())


@pytest.mark.parametrize("batch_size", [None, 16])
@pytest.mark.parametrize("loss", [Loss.MSE, Loss.CROSS_ENTROPY])
def test_sizes_that_are_filled_up_to_one_shape_are_to_the_last_bit_what_each_is_alone(
    loss: Loss, batch_size: int | None
) -> None:
    spec = replace(SPEC, loss=loss, batch_size=batch_size)
    sizes = [33, 40, 47, 48]
    assert len({batch_shape(BASE, spec, size) for size in sizes}) == 1
    table = Table.of(sizes, loss)
    _assert_same(table.together(spec), table, spec)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_one_that_diverges_ends_with_its_error_and_the_others_go_on_as_if_it_had_not_been_there(
    batch_size: int | None,
) -> None:
    spec = replace(SPEC, batch_size=batch_size)
    table = Table.of([23] * 5, Loss.MSE)
    table.data.inputs_NI[table.members[1]] = 1e25
    table.data.inputs_NI[table.members[4][-1]] = 1e25
    together = table.together(spec)
    assert [each.error is not None for each in together] == [False, True, False, False, True]
    for member, trained in enumerate(together):
        alone = table.alone(spec, member)
        assert trained.steps == alone.steps
        if trained.error is None:
            assert _numbers(trained).equal(_numbers(alone))
        else:
            assert alone.error is not None
            assert (trained.error.step, trained.error.detail) == (alone.error.step, alone.error.detail)


def test_where_all_diverge_each_has_its_error() -> None:
    table = Table.of([10] * 3, Loss.MSE)
    table.data.inputs_NI.fill_(1e25)
    assert [each.error is not None and each.error.step for each in table.together(SPEC)] == [1, 1, 1]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("evaluate_every", [None, 2])
def test_each_is_stopped_early_where_it_is_stopped_alone(name: str, evaluate_every: int | None) -> None:
    spec = replace(
        SPECS[name], epochs=60, patience=2, split=Split(fraction=0.4), evaluate_every=evaluate_every, warmup_steps=0
    )
    table = Table.of([30] * 8, Loss.MSE)
    together = table.together(spec)
    assert len({(each.step, each.steps) for each in together}) > 3
    _assert_same(together, table, spec)


def test_stopped_early_with_different_sizes_each_is_what_it_is_alone() -> None:
    spec = replace(SPEC, batch_size=8, epochs=40, patience=2, split=Split(fraction=0.4))
    table = Table.of([17, 60, 30, 18, 31], Loss.MSE)
    for member, trained in enumerate(table.together(spec)):
        alone = table.alone(spec, member)
        assert (trained.step, trained.steps) == (alone.step, alone.steps)
        assert float((_numbers(trained) - _numbers(alone)).abs().max()) < 1e-5


def test_one_that_diverges_is_not_brought_back_by_its_best_step() -> None:
    spec = replace(SPEC, batch_size=7, patience=3, split=Split(fraction=0.4))
    table = Table.of([23] * 3, Loss.MSE)
    training_K = Sampler(spec, 23).training_K
    table.data.inputs_NI[table.members[1][training_K[-1]]] = 1e25
    together = table.together(spec)
    assert [each.error is not None for each in together] == [False, True, False]
