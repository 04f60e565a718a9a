"""A fleet gives each group what it would get alone: the same adapter to the last bit, the same numbers and errors."""

# N rows · K rows of one group · I in_features · O out_features
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from adapters.errors import Diverged, OutOfRange
from adapters.training.data_file import TrainingData
from adapters.training.fit import Fit, fit
from adapters.training.fleet import Outcome, fit_fleet
from adapters.training.gradient import batches as layout
from adapters.training.planning.split import Split, SplitBy
from adapters.training.settings import BALANCED, Init, Loss, Method, Schedule, TrainingSpec
from tests.support.dense_oracle import Float64, delta, layer

# Odd widths: no row of anything is a whole cache line.
I, O = 13, 5
DRAW = torch.Generator().manual_seed(3)
BASE = layer(torch.randn(O, I, generator=DRAW), torch.randn(O, generator=DRAW))
SIZES = (1, 1, 2, 3, 7, 12, 12, 12, 23, 30, 41, 66)
LARGER = (9, 11, 14, 14, 23, 30, 41, 66)
SPEC = TrainingSpec(rank=2, alpha=3.0, epochs=6, learning_rate=0.05)
EXACT = TrainingSpec(rank=2, alpha=3.0, method=Method.CLOSED_FORM, ridge=0.3)


def _table(sizes: Sequence[int], loss: Loss = Loss.MSE, seed: int = 0) -> TrainingData:
    """Rows of groups of these sizes, in no order."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(sizes)
    inputs_NI = torch.randn(rows, I, generator=generator)
    targets = torch.randn(rows, O, generator=generator)
    if loss is Loss.CROSS_ENTROPY:
        targets = torch.randint(0, O, (rows,), generator=generator)
    if loss is Loss.BINARY_CROSS_ENTROPY:
        targets = (targets > 0).float()
    codes_N = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return TrainingData(inputs_NI, targets, groups_N=codes_N[torch.randperm(rows, generator=generator)])


def _rows_of(data: TrainingData, position: int) -> TrainingData:
    """What is sent where this group is trained alone."""
    assert data.groups_N is not None
    rows_K = (data.groups_N == position).nonzero()[:, 0]
    key_K = None if data.key_N is None else data.key_N[rows_K]
    given = {name: getattr(data, name) for name in ("start_OR", "start_RI", "prior_OR", "prior_RI")}
    return replace(data.take(rows_K), key_N=key_K, **given)


def _fleet(data: TrainingData, spec: TrainingSpec) -> list[Outcome]:
    """In order of position; each there once."""
    outcomes = sorted((each for stack in fit_fleet(BASE, data, spec) for each in stack), key=lambda each: each.position)
    assert data.groups_N is not None
    assert [each.position for each in outcomes] == list(range(int(data.groups_N.max()) + 1))
    return outcomes


def _pairs(data: TrainingData, spec: TrainingSpec) -> Iterator[tuple[Outcome, Fit]]:
    for outcome in _fleet(data, spec):
        yield outcome, fit(BASE, _rows_of(data, outcome.position), spec)


def _delta(outcome: Outcome) -> Float64:
    assert outcome.error is None, outcome.error
    assert outcome.adapter is not None
    return delta(outcome.adapter)


def _check_metrics(outcome: Outcome, alone: Fit, *, relative: float, absolute: float) -> None:
    assert set(outcome.metrics) == set(alone.metrics) - {"held_out"}
    for name, value in outcome.metrics.items():
        wanted = alone.metrics[name]
        assert value is None if wanted is None else value == pytest.approx(wanted, rel=relative, abs=absolute), name


def _check_each_is_the_one_trained_alone(data: TrainingData, spec: TrainingSpec) -> None:
    for outcome, alone in _pairs(data, spec):
        assert outcome.error is None, outcome.error
        assert outcome.adapter is not None
        assert outcome.adapter.digest == alone.adapter.digest, outcome.position
        _check_metrics(outcome, alone, relative=1e-9, absolute=1e-12)


@pytest.mark.parametrize("batch_size", [None, 1, 8, 64])
@pytest.mark.parametrize("loss", list(Loss))
def test_whatever_the_loss_each_group_s_adapter_is_the_one_trained_alone(loss: Loss, batch_size: int | None) -> None:
    sizes = SIZES if batch_size != 1 else SIZES[:8]
    _check_each_is_the_one_trained_alone(_table(sizes, loss), replace(SPEC, loss=loss, batch_size=batch_size))


@pytest.mark.parametrize(
    "changed",
    [
        {"method": Method.SGD},
        {"method": Method.SGD, "momentum": 0.9, "weight_decay": 0.1},
        {"bias": True, "weight_decay": 0.1},
        {"clip_norm": 0.1},
        {"schedule": Schedule.COSINE, "warmup_steps": 3},
        {"schedule": Schedule.LINEAR},
        {"max_steps": 4},
        {"init": Init.RANDN, "rank": 7, "alpha": 7.0},
        {"rank": 1, "alpha": 1.0, "rslora": True},
    ],
)
def test_whatever_the_method_each_group_s_adapter_is_the_one_trained_alone(changed: dict[str, object]) -> None:
    _check_each_is_the_one_trained_alone(_table(SIZES), replace(SPEC, batch_size=16, **changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("patience", [None, 2])
@pytest.mark.parametrize("by", list(SplitBy))
def test_whatever_the_split_each_group_is_split_and_stopped_as_if_alone(by: SplitBy, patience: int | None) -> None:
    # A hash holds rows out of the two large groups only.
    data = _table([*LARGER, 130, 110])
    key_N = torch.randint(0, 6, (data.rows,), generator=torch.Generator().manual_seed(4))
    keys = {SplitBy.COLUMN: key_N % 2, SplitBy.HASH: key_N * 2**60}
    data = replace(data, key_N=keys.get(by, key_N))
    spec = replace(SPEC, split=Split(by=by, fraction=0.3), patience=patience, batch_size=8, epochs=12)
    _check_each_is_the_one_trained_alone(data, spec)


@pytest.mark.parametrize("loss", [Loss.CROSS_ENTROPY, Loss.MULTIPLE_NEGATIVES])
def test_a_stratified_split_and_early_stopping_are_those_of_the_group_alone(loss: Loss) -> None:
    split = Split(stratify=loss is Loss.CROSS_ENTROPY)
    spec = replace(SPEC, loss=loss, split=split, patience=1, min_delta=0.01, evaluate_every=3, batch_size=8)
    _check_each_is_the_one_trained_alone(_table(LARGER, loss), spec)


@pytest.mark.parametrize("class_weights", [None, BALANCED, (1.0, 2.0, 0.5, 1.0, 3.0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_and_classes_weigh_in_a_group_what_they_weigh_alone(
    weighted: bool, class_weights: str | tuple[float, ...] | None
) -> None:
    data = _table(LARGER, Loss.CROSS_ENTROPY)
    if weighted:
        data = data.weighted(torch.rand(data.rows, generator=torch.Generator().manual_seed(5)) + 0.1)
    spec = replace(SPEC, loss=Loss.CROSS_ENTROPY, class_weights=class_weights, split=Split(), label_smoothing=0.1)
    _check_each_is_the_one_trained_alone(data, spec)


def test_a_start_that_is_given_is_that_of_every_group() -> None:
    start = torch.randn(O, 2, generator=DRAW), torch.randn(2, I, generator=DRAW)
    data = replace(_table(SIZES), start_OR=start[0], start_RI=start[1])
    _check_each_is_the_one_trained_alone(data, replace(SPEC, init=Init.FACTORS, batch_size=None))


@pytest.mark.parametrize("most", ["_MAX_BATCH_ROWS", "_MAX_NUMBERS"])
@pytest.mark.parametrize("batch_size", [None, 32])
def test_groups_of_very_many_rows_are_trained_from_where_their_rows_are(
    batch_size: int | None, most: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, most, 25 if most == "_MAX_BATCH_ROWS" else 25 * (I + 2 * O))
    spec = replace(SPEC, batch_size=batch_size, split=Split(), patience=2)
    _check_each_is_the_one_trained_alone(_table(LARGER), spec)


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("changed", [{}, {"bias": True}, {"ridge": 0.0}, {"ridge": 0.0, "bias": True}])
def test_the_closed_form_of_a_group_is_that_of_the_group_alone(changed: dict[str, object], with_prior: bool) -> None:
    data, spec = _table(SIZES), replace(EXACT, **changed)  # type: ignore[arg-type]
    data = data.weighted(torch.rand(data.rows, generator=torch.Generator().manual_seed(5)) + 0.1)
    if with_prior:
        data = replace(data, prior_OR=torch.ones(O, 1), prior_RI=torch.ones(1, I))
    for outcome, alone in _pairs(data, spec):
        wanted = delta(alone.adapter)
        # Sums in float64 that are added up in another order: after rounding to float32 most are the same.
        np.testing.assert_allclose(_delta(outcome), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
        _check_metrics(outcome, alone, relative=1e-5, absolute=1e-6)


@pytest.mark.parametrize(
    ("spec", "inputs"),
    [
        (replace(SPEC, method=Method.SGD, batch_size=8), 1e30),
        (replace(SPEC, batch_size=None), 1e30),
        (replace(EXACT, ridge=0.0), 1e-41),
    ],
)
def test_a_group_that_diverges_fails_alone(spec: TrainingSpec, inputs: float) -> None:
    data = _table(LARGER)
    assert data.groups_N is not None
    data.targets[data.groups_N == 3] *= 1e38
    data.inputs_NI[data.groups_N == 3] *= inputs
    for outcome in _fleet(data, spec):
        mine = _rows_of(data, outcome.position)
        if outcome.position != 3:
            assert _delta(outcome) == pytest.approx(delta(fit(BASE, mine, spec).adapter), rel=1e-6)
            continue
        with pytest.raises(Diverged) as caught:
            fit(BASE, mine, spec)
        assert isinstance(outcome.error, Diverged)
        assert (outcome.error.step, outcome.adapter, outcome.metrics) == (caught.value.step, None, {})


def test_a_group_that_cannot_be_split_fails_alone_and_says_what_it_says_alone() -> None:
    data, spec = _table((1, 20, 2, 9)), replace(SPEC, split=Split(fraction=0.2))
    outcomes = _fleet(data, spec)
    for position, rows in ((0, 1), (2, 2)):
        with pytest.raises(OutOfRange) as caught:
            fit(BASE, _rows_of(data, position), spec)
        error = outcomes[position].error
        assert error is not None
        assert error.members() == caught.value.members()
        assert f"{rows} rows" in error.detail
    assert [outcome.error is None for outcome in outcomes] == [False, True, False, True]


def test_groups_of_many_sizes_share_stacks_by_shape_and_each_comes_once() -> None:
    sizes = [1 + number % 40 for number in range(300)]
    data = _table(sizes)
    stacks = [[each.position for each in stack] for stack in fit_fleet(BASE, data, replace(SPEC, epochs=1))]
    assert sorted(position for stack in stacks for position in stack) == list(range(300))
    assert len(stacks) < 10
    for stack in stacks:
        shapes = {layout.padded_rows(sizes[position], I, O, SPEC.rank) for position in stack}
        assert len(shapes) == 1


def test_what_is_done_is_passed_over_and_the_rest_is_as_it_would_have_been() -> None:
    data, spec = _table(SIZES), replace(SPEC, batch_size=8)
    every = {outcome.position: outcome.adapter for outcome in _fleet(data, spec)}
    done = {0, 3, 4, 8}
    steps: list[int] = []
    rest = [
        outcome
        for stack in fit_fleet(BASE, data, spec, done=done, progress=lambda step, _: steps.append(step))
        for outcome in stack
    ]
    assert {outcome.position for outcome in rest} == set(every) - done
    for outcome in rest:
        expected = every[outcome.position]
        assert outcome.adapter is not None
        assert expected is not None
        assert outcome.adapter.digest == expected.digest
    assert len(steps) > 0
    assert list(fit_fleet(BASE, data, spec, done=set(every))) == []


def test_the_adapters_carry_the_feature_space_and_the_labels() -> None:
    data = _table((4, 4))
    found = [each for stack in fit_fleet(BASE, data, SPEC, feature_space="f@1", labels=["a", "b"]) for each in stack]
    for outcome in found:
        assert outcome.adapter is not None
        assert (outcome.adapter.feature_space, outcome.adapter.labels) == ("f@1", ("a", "b"))


def test_the_table_is_only_read() -> None:
    data = _table(SIZES).weighted(torch.ones(sum(SIZES)))
    watched = [data.inputs_NI, data.targets, data.weights_N, data.groups_N]
    before = [tensor.clone() for tensor in watched if tensor is not None]
    for spec in (SPEC, EXACT):
        _fleet(data, spec)
    assert all(map(torch.equal, before, (tensor for tensor in watched if tensor is not None)))


@pytest.mark.parametrize("spec", [SPEC, EXACT])
def test_shares_give_together_what_the_whole_fleet_gives(spec: TrainingSpec) -> None:
    data = _table(SIZES)
    whole = _fleet(data, spec)
    shares = [
        [outcome for stack in fit_fleet(BASE, data, spec, share=(share, 3)) for outcome in stack] for share in range(3)
    ]
    together = sorted((outcome for share in shares for outcome in share), key=lambda outcome: outcome.position)
    assert [outcome.position for outcome in together] == [outcome.position for outcome in whole]
    for outcome, expected in zip(together, whole, strict=True):
        assert outcome.adapter is not None
        assert expected.adapter is not None
        assert outcome.adapter.canonical_bytes == expected.adapter.canonical_bytes
