"""What a fit tells of itself: every number against the answers of the adapter that it returns, in float64."""

# N rows · K rows of one side · I in_features · O out_features
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters.errors import Diverged, OutOfRange
from adapters.training.closed_form.statistics import accumulate
from adapters.training.fit import Fit, Watcher, fit
from adapters.training.planning.split import Split, SplitBy
from adapters.training.settings import Method, TrainingSpec
from tests.unit.adapters.training.held_out_oracle import (
    BASE,
    ROWS,
    SPEC,
    SPECS,
    WEIGHTS,
    data_of,
    held_apart,
    loss_of,
    sides,
)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_losses_of_both_sides_are_those_of_the_adapter_that_is_returned_and_of_the_bare_base(
    name: str, weighted: bool, apart: bool
) -> None:
    spec, data = SPECS[name], data_of(SPECS[name], weighted)
    done = fit(BASE, held_apart(data), replace(spec, split=None)) if apart else fit(BASE, data, spec)
    weights_N = WEIGHTS if weighted else None
    for side, rows_K in zip(("train", "validation"), sides(), strict=True):
        for who, adapter in (("", done.adapter), ("base_", None)):
            wanted = loss_of(spec, rows_K, adapter, weights_N)
            assert done.metrics[f"{who}{side}_loss"] == pytest.approx(wanted, rel=1e-9)
    assert done.metrics["held_out"]["rows"] == 20
    assert {who: done.metrics["held_out"][who]["loss"] for who in ("adapter", "base")} == {
        "adapter": done.metrics["validation_loss"],
        "base": done.metrics["base_validation_loss"],
    }
    assert "live" not in done.metrics["held_out"]


@pytest.mark.parametrize("name", SPECS)
def test_without_rows_held_out_there_is_nothing_to_say_of_them(name: str) -> None:
    spec = replace(SPECS[name], split=None)
    done = fit(BASE, data_of(spec, False), spec)
    assert done.metrics["validation_loss"] is None
    assert done.metrics["base_validation_loss"] is None
    assert "held_out" not in done.metrics
    all_rows = torch.arange(ROWS)
    assert done.metrics["train_loss"] == pytest.approx(loss_of(spec, all_rows, done.adapter, None), rel=1e-9)


def _told(spec: TrainingSpec, **meaning: Any) -> tuple[Fit, list[str], list[tuple[int, float]]]:
    notes: list[str] = []
    reports: list[tuple[int, float]] = []
    watcher = Watcher(lambda step, loss, _history: reports.append((step, loss)), notes.append)
    return fit(BASE, data_of(spec, False), spec, watcher=watcher, **meaning), notes, reports


def test_a_closed_form_has_two_lines_of_history_the_bare_loss_and_the_one_that_is_reached() -> None:
    done, notes, reports = _told(SPECS["closed form"])
    assert done.history == [(0, done.metrics["base_train_loss"]), (1, done.metrics["train_loss"])]
    assert (notes, reports) == ([], done.history[1:])


def test_it_is_told_where_the_factors_are_not_those_of_the_last_step() -> None:
    assert _told(SPEC)[1] == []
    assert _told(replace(SPEC, max_steps=5))[1] == []
    assert _told(replace(SPEC, max_seconds=1e-9))[1] == ["took 1 of 12 steps; the factors are those of step 1"]
    _, (note,), reports = _told(replace(SPEC, patience=1, learning_rate=3.0))
    assert note == f"took {len(reports)} of 12 steps; the factors are those of step 0"


def test_labels_feature_space_and_scaling_go_into_the_adapter() -> None:
    spec = replace(SPEC, rslora=True, alpha=5.0)
    adapter = _told(spec, feature_space="minilm@1", labels=["a", "b"])[0].adapter
    assert (adapter.feature_space, adapter.labels, adapter.alpha, adapter.rslora) == ("minilm@1", ("a", "b"), 5.0, True)
    assert adapter.scaling == pytest.approx(5.0 / 2**0.5)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_statistics_that_are_kept_are_those_of_the_rows_that_were_trained_on(weighted: bool) -> None:
    spec = replace(SPECS["closed form"], keep_statistics=True)
    data = data_of(spec, weighted)
    kept = fit(BASE, data, spec).statistics
    assert kept is not None
    training = data.take(sides()[0])
    wanted = accumulate(BASE, [(training.inputs_NI, training.targets, training.weights_N)])
    torch.testing.assert_close(kept.gram_II, wanted.gram_II, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kept.cross_IO, wanted.cross_IO, rtol=1e-12, atol=1e-12)
    assert kept.rows == int((training.weights_N > 0).sum() if training.weights_N is not None else 30)
    assert fit(BASE, data, replace(spec, keep_statistics=False)).statistics is None


@pytest.mark.parametrize("by", [SplitBy.GROUP, SplitBy.TIME, SplitBy.COLUMN])
def test_a_split_by_a_key_holds_out_the_rows_that_it_says(by: SplitBy) -> None:
    key_N = {
        SplitBy.GROUP: torch.arange(ROWS) // 5,
        SplitBy.TIME: -torch.arange(ROWS),
        SplitBy.COLUMN: torch.arange(ROWS) % 2,
    }[by]
    split = Split(by=by, fraction=0.4)
    spec = replace(SPEC, split=split)
    done = fit(BASE, replace(data_of(spec, False), key_N=key_N), spec)
    training_K, held_K = split.sides(ROWS, torch.Generator().manual_seed(spec.seed), key_N=key_N)
    assert done.metrics["held_out"]["rows"] == len(held_K)
    assert done.metrics["validation_loss"] == pytest.approx(loss_of(spec, held_K, done.adapter, None), rel=1e-9)
    assert done.metrics["train_loss"] == pytest.approx(loss_of(spec, training_K, done.adapter, None), rel=1e-9)


def test_a_split_that_leaves_a_side_empty_is_refused_before_anything_is_trained() -> None:
    spec = replace(SPEC, split=Split(by=SplitBy.GROUP))
    with pytest.raises(OutOfRange):
        fit(BASE, replace(data_of(spec, False), key_N=torch.zeros(ROWS).long()), spec)


def test_a_training_whose_end_is_not_finite_has_diverged() -> None:
    with pytest.raises(Diverged):
        fit(BASE, data_of(SPEC, False), replace(SPEC, method=Method.SGD, learning_rate=1e30))
