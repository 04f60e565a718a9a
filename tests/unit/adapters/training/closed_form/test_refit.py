"""A fit from sums that were kept is the fit of the rows that they are of, with some more and without some."""

# N rows · I in_features · O out_features
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from adapters.errors import IllConditioned
from adapters.training.closed_form.refit import refit
from adapters.training.closed_form.statistics import Statistics
from adapters.training.data_file import TrainingData
from adapters.training.fit import Fit, fit
from adapters.training.settings import Method, TrainingSpec
from tests.support.dense_oracle import answer, delta, layer, relative_error

O, I, ROWS = 4, 6, 80
DRAW = torch.Generator().manual_seed(0)
BASE = layer(torch.randn(O, I, generator=DRAW), torch.randn(O, generator=DRAW))
INPUTS = torch.randn(ROWS, I, generator=DRAW) + 2
TARGETS = INPUTS @ torch.randn(I, O, generator=DRAW) + torch.randn(ROWS, O, generator=DRAW)
WEIGHTS = torch.rand(ROWS, generator=DRAW) + 0.1
PRIOR = torch.randn(O, 2, generator=DRAW), torch.randn(2, I, generator=DRAW)
SPEC = TrainingSpec(rank=2, alpha=3.0, method=Method.CLOSED_FORM, keep_statistics=True)
SPECS = {
    "rank 2": SPEC,
    "rank 2, ridge, bias": replace(SPEC, ridge=4.0, bias=True),
    "full rank, bias": replace(SPEC, rank=4, bias=True),
}


def _rows(rows: slice, *, weighted: bool, prior: bool = False) -> TrainingData:
    weights_N = WEIGHTS[rows] if weighted else None
    prior_OR, prior_RI = PRIOR if prior else (None, None)
    return TrainingData(INPUTS[rows], TARGETS[rows], weights_N=weights_N, prior_OR=prior_OR, prior_RI=prior_RI)


def _without(data: TrainingData, gone: TrainingData) -> TrainingData:
    return replace(data, gone_inputs_NI=gone.inputs_NI, gone_targets=gone.targets, gone_weights_N=gone.weights_N)


def _kept(done: Fit) -> Statistics:
    """As they lie on the disk between the two fits."""
    assert done.statistics is not None
    return Statistics.from_bytes(done.statistics.to_bytes())


def _refit(first: Fit, data: TrainingData, spec: TrainingSpec) -> Fit:
    return refit(BASE, _kept(first), data, spec, feature_space="words@1", labels=None)


def _assert_same(done: Fit, wanted: Fit, tolerance: float = 1e-5) -> None:
    assert relative_error(delta(done.adapter), delta(wanted.adapter)) < tolerance
    if wanted.adapter.bias_O is not None:
        assert done.adapter.bias_O is not None
        assert relative_error(done.adapter.bias_O.numpy(), wanted.adapter.bias_O.double().numpy()) < tolerance
    for name in ("train_loss", "base_train_loss"):
        assert done.metrics[name] == pytest.approx(wanted.metrics[name], rel=1e-6)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("first", [1, 30, 79])
def test_two_parts_one_after_the_other_are_the_whole(first: int, name: str, weighted: bool, prior: bool) -> None:
    spec = SPECS[name]
    before = fit(BASE, _rows(slice(0, first), weighted=weighted, prior=prior), spec)
    done = _refit(before, _rows(slice(first, ROWS), weighted=weighted, prior=prior), spec)
    _assert_same(done, fit(BASE, _rows(slice(0, ROWS), weighted=weighted, prior=prior), spec))
    assert done.metrics["rows"] == ROWS
    assert done.statistics is not None
    assert done.statistics.rows == ROWS


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("added", [0, 25])
def test_rows_that_are_forgotten_were_never_there(added: int, name: str, weighted: bool) -> None:
    spec = SPECS[name]
    first = fit(BASE, _rows(slice(0, ROWS - added), weighted=weighted), spec)
    more = _rows(slice(ROWS - added, ROWS), weighted=weighted)
    done = _refit(first, _without(more, _rows(slice(0, 20), weighted=weighted)), spec)
    _assert_same(done, fit(BASE, _rows(slice(20, ROWS), weighted=weighted), spec))
    assert done.metrics["rows"] == ROWS - 20


def test_what_a_refit_kept_is_refitted_again() -> None:
    spec = SPECS["rank 2, ridge, bias"]
    done = fit(BASE, _rows(slice(0, 20), weighted=True), spec)
    for begin in range(20, ROWS, 20):
        done = _refit(done, _rows(slice(begin, begin + 20), weighted=True), spec)
    _assert_same(done, fit(BASE, _rows(slice(0, ROWS), weighted=True), spec))


def test_at_full_rank_it_is_ridge_regression_on_the_rows_that_stay() -> None:
    spec = replace(SPEC, rank=4, bias=True, ridge=4.0)
    first = fit(BASE, _rows(slice(0, 50), weighted=True), spec)
    gone = _rows(slice(0, 20), weighted=True)
    adapter = _refit(first, _without(_rows(slice(50, ROWS), weighted=True), gone), spec).adapter
    stay = slice(20, ROWS)
    residuals_NO = TARGETS[stay].double().numpy() - answer(BASE, INPUTS[stay], None)
    oracle = Ridge(alpha=4.0, solver="cholesky")
    oracle.fit(INPUTS[stay].double().numpy(), residuals_NO, sample_weight=WEIGHTS[stay].double().numpy())
    np.testing.assert_allclose(delta(adapter), oracle.coef_, rtol=1e-4, atol=1e-5)


def test_losses_are_those_of_the_adapter_on_the_rows() -> None:
    spec = SPECS["rank 2, ridge, bias"]
    first = fit(BASE, _rows(slice(0, 50), weighted=True), spec)
    done = _refit(first, _rows(slice(50, ROWS), weighted=True), spec)
    wanted = TARGETS.double().numpy()
    losses = [
        np.average(((answer(BASE, INPUTS, adapter) - wanted) ** 2).mean(1), weights=WEIGHTS.double().numpy())
        for adapter in (None, done.adapter)
    ]
    assert done.history == [(0, done.metrics["base_train_loss"]), (1, done.metrics["train_loss"])]
    assert [loss for _, loss in done.history] == pytest.approx(losses, rel=1e-9)
    assert done.metrics["validation_loss"] is None
    assert (done.adapter.feature_space, done.adapter.alpha, done.spec) == ("words@1", 3.0, spec)


def _moved(rows: Tensor) -> Tensor:
    return rows + 50


@pytest.mark.parametrize("gone", ["all of them", "rows that were never there"])
def test_what_cannot_be_forgotten_is_refused(gone: str) -> None:
    first = fit(BASE, _rows(slice(0, 40), weighted=False), SPEC)
    rows = _rows(slice(0, 40), weighted=False)
    if gone == "rows that were never there":
        rows = replace(rows.take(torch.arange(30)), inputs_NI=_moved(rows.inputs_NI[:30]))
    nothing = _rows(slice(0, 0), weighted=False)
    with pytest.raises(IllConditioned):
        _refit(first, _without(nothing, rows), SPEC)
