"""What `auto` takes, against scikit-learn, and the promises about what it evaluates."""

# N rows · I in_features · C classes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score
from torch import Tensor

from adapters.errors import Diverged
from adapters.lora.base_layer import BaseLayer, load_base_layer
from adapters.training.candidates.auto_fit import fit_auto, fit_fleet_auto
from adapters.training.candidates.composed import Composed
from adapters.training.candidates.fit_result import AutoFit
from adapters.training.candidates.task import shared_rows
from adapters.training.data_file import Column, TrainingData
from adapters.training.evaluation.judgement import LiveVersion
from adapters.training.fit import fit
from adapters.training.fleet import fit_fleet
from adapters.training.gradient.sampling import Sampler
from adapters.training.planning.row_keys import keys_of_rows
from adapters.training.planning.split import Split, SplitBy
from adapters.training.settings import Candidate, Loss, TrainingSpec

EXACT = (Candidate.BASE, Candidate.RIDGE, Candidate.RIDGE_IN_BASE_METRIC, Candidate.OWN_HEAD)
FLEET = (*EXACT, Candidate.FLEET_MEAN, Candidate.CLUSTER_MEAN)
SPEC = TrainingSpec(
    rank=64, alpha=64.0, alpha_is_rank=True, candidates=EXACT, try_bias=True, try_ridges=True,
    split=Split(by=SplitBy.HASH),
)  # fmt: skip
CLASSES = replace(SPEC, loss=Loss.CROSS_ENTROPY)


def with_keys(inputs_NI: np.ndarray, targets: np.ndarray, groups_N: Tensor | None = None) -> TrainingData:
    """Return training data with the keys by which rows are held out."""
    inputs = inputs_NI.astype(np.float32)
    keys_N = torch.from_numpy(keys_of_rows(Column.of(inputs)))
    numbers = torch.from_numpy(targets if targets.dtype == np.int64 else targets.astype(np.float32))
    return TrainingData(torch.from_numpy(inputs), numbers, key_N=keys_N, groups_N=groups_N)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the digits in a random order."""
    inputs_NI, classes_N = load_digits(return_X_y=True)
    order_N = np.random.default_rng(5).permutation(len(classes_N))
    return inputs_NI[order_N] / 16, classes_N[order_N].astype(np.int64)


@pytest.fixture(scope="module")
def base() -> BaseLayer:
    """Return the digits layer of the package."""
    return load_base_layer("digits", device="cpu")


def evaluation_of(result: AutoFit) -> dict[str, Any]:
    """Return the figures of a fit."""
    assert result.report is not None
    assert result.report.evaluation is not None
    return dict(result.report.evaluation)


def test_regression_beside_ridge() -> None:
    inputs_NI, targets_N = load_diabetes(return_X_y=True)
    data = with_keys(inputs_NI, targets_N[:, None])
    figures = evaluation_of(fit_auto(load_base_layer("zeros:10,1"), data, SPEC))
    assert SPEC.split is not None
    held_N = SPEC.split.held_by_hash(data.key_N).numpy()  # type: ignore[arg-type]
    model = RidgeCV(np.logspace(-5, 3, 30)).fit(inputs_NI[~held_N], targets_N[~held_N])
    error = np.square(model.predict(inputs_NI[held_N]) - targets_N[held_N]).mean()
    assert figures["by"] == "held_out"
    assert figures["rows"] == held_N.sum()
    assert 1 - figures["adapter"] / figures["guess"] > 1 - error / figures["guess"] - 0.01


def test_held_out_rows_have_all_metrics_of_what_is_compared(
    base: BaseLayer, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    inputs_NI, classes_N = digits
    data = with_keys(inputs_NI[:150], classes_N[:150])
    first = fit_auto(base, data, CLASSES)
    held_out = fit_auto(base, data, CLASSES, live=LiveVersion(first.adapter)).metrics["held_out"]
    assert held_out.keys() == {"rows", "adapter", "base", "live", "trivial"}
    assert held_out["adapter"]["accuracy"] == pytest.approx(evaluation_of(first)["adapter"])
    assert held_out["live"]["loss"] == pytest.approx(held_out["adapter"]["loss"])


def test_documents_are_found_by_the_adapter_that_is_taken() -> None:
    generator = np.random.default_rng(0)
    data = with_keys(generator.standard_normal((150, 8)), generator.standard_normal((150, 4)))
    spec = replace(
        SPEC,
        loss=Loss.MULTIPLE_NEGATIVES,
        candidates=(Candidate.BASE, Candidate.ADAMW),
        rank=2,
        epochs=2,
        batch_size=50,
    )
    assert "recall_at_1" in fit_auto(load_base_layer("random:8,4,0"), data, spec).metrics["held_out"]["adapter"]


def test_regression_worse_than_the_mean_does_not_move() -> None:
    generator = np.random.default_rng(0)
    data = with_keys(generator.standard_normal((12, 8)), generator.standard_normal((12, 1)) * 5 + 100)
    result = fit_auto(load_base_layer("zeros:8,1"), data, SPEC)
    assert result.report is not None
    assert result.report.judgement is not None
    figures = evaluation_of(result)
    assert result.report.judgement.moves == (figures["adapter"] <= figures["guess"])


def test_few_rows_of_classes(base: BaseLayer, digits: tuple[np.ndarray, np.ndarray]) -> None:
    inputs_NI, classes_N = digits
    # Classes in another order than the base layer's.
    renamed_N = (classes_N + 3) % 10
    result = fit_auto(base, with_keys(inputs_NI[:60], renamed_N[:60]), CLASSES)
    figures = evaluation_of(result)
    assert figures["by"] == "cross_validation"
    assert result.adapter is not None
    adapter = result.adapter
    x_NI = torch.from_numpy(inputs_NI[60:]).double()
    y_NO = base.forward(x_NI.float()).double() + adapter.scaling * (
        x_NI @ adapter.b_RI.double().T @ adapter.a_OR.double().T
        + (0 if adapter.bias_O is None else adapter.bias_O.double())
    )
    accuracy = float((y_NO.argmax(1).numpy() == renamed_N[60:]).mean())
    assert accuracy > 0.8
    assert abs(figures["adapter"] - accuracy) < 0.15


def test_nothing_to_change_keeps_the_base(base: BaseLayer, digits: tuple[np.ndarray, np.ndarray]) -> None:
    inputs_NI, classes_N = digits
    result = fit_auto(base, with_keys(inputs_NI[:40], classes_N[:40]), CLASSES)
    figures = evaluation_of(result)
    assert figures["adapter"] >= figures["base"] - 0.05


def test_same_bits_again(base: BaseLayer, digits: tuple[np.ndarray, np.ndarray]) -> None:
    inputs_NI, classes_N = digits
    groups_N = torch.arange(300) % 30
    data = with_keys(inputs_NI[:300], (classes_N[:300] + 2) % 10, groups_N)
    spec = replace(CLASSES, candidates=FLEET)
    first, second = (
        {fit.position: fit for part in fit_fleet_auto(base, data, spec, wants_prior=True) for fit in part}
        for _ in range(2)
    )
    assert sorted(first) == list(range(31))
    for position, made in first.items():
        assert made.adapter is not None
        other = second[position].adapter
        assert other is not None
        assert made.adapter.digest == other.digest


def test_a_fleet_goes_on_as_if_it_had_not_stopped(base: BaseLayer, digits: tuple[np.ndarray, np.ndarray]) -> None:
    inputs_NI, classes_N = digits
    # One group of many rows, whose candidates are compared in another way, and stacks of small ones.
    groups_N = torch.cat([torch.zeros(800, dtype=torch.int64), 1 + torch.arange(900) % 90])
    data = with_keys(inputs_NI[:1700], (classes_N[:1700] + 2) % 10, groups_N)
    spec = replace(CLASSES, candidates=FLEET)
    stacks = [{made.position: made for made in stack} for stack in fit_fleet_auto(base, data, spec)]
    assert len(stacks) == 3
    for done in (stacks[0], stacks[-1]):
        rest = {made.position: made for stack in fit_fleet_auto(base, data, spec, done=set(done)) for made in stack}
        assert sorted([*done, *rest]) == list(range(91))
        for position, made in rest.items():
            (before,) = (stack[position] for stack in stacks if position in stack)
            assert made.adapter is not None
            assert before.adapter is not None
            assert (made.adapter.digest, made.report) == (before.adapter.digest, before.report)


def test_one_row_and_duplicates(base: BaseLayer, digits: tuple[np.ndarray, np.ndarray]) -> None:
    inputs_NI, classes_N = digits
    one = fit_auto(base, with_keys(inputs_NI[:1], classes_N[:1]), CLASSES)
    assert one.adapter is not None
    repeated = with_keys(np.repeat(inputs_NI[:20], 3, axis=0), np.repeat((classes_N[:20] + 1) % 10, 3))
    # A copy of a row that stayed would give its label away.
    alone = with_keys(inputs_NI[:20], (classes_N[:20] + 1) % 10)
    figures = [evaluation_of(fit_auto(base, data, CLASSES)) for data in (repeated, alone)]
    assert abs(figures[0]["adapter"] - figures[1]["adapter"]) <= 0.15


def test_rank_bound_counts_in_the_folds(base: BaseLayer, digits: tuple[np.ndarray, np.ndarray]) -> None:
    inputs_NI, classes_N = digits
    data = with_keys(inputs_NI[:80], (classes_N[:80] + 3) % 10)
    bounded = fit_auto(base, data, replace(CLASSES, rank=2, alpha=2.0))
    assert bounded.adapter is not None
    assert bounded.adapter.rank <= 2
    assert evaluation_of(bounded)["adapter"] < evaluation_of(fit_auto(base, data, CLASSES))["adapter"] - 0.1


def test_a_bounded_rank_does_not_make_tenants_worse(base: BaseLayer, digits: tuple[np.ndarray, np.ndarray]) -> None:
    inputs_NI, classes_N = digits
    draw = np.random.default_rng(2)
    names_TC, rows_TN = np.tile(np.arange(10), (16, 1)), draw.permutation(600)[: 16 * 30].reshape(16, 30)
    for names_C in names_TC:
        renamed = draw.permutation(10)[:6]
        names_C[renamed] = np.roll(renamed, 1)
    targets = np.concatenate([names_C[classes_N[rows_N]] for names_C, rows_N in zip(names_TC, rows_TN, strict=True)])
    data = with_keys(inputs_NI[rows_TN.ravel()], targets, torch.arange(16).repeat_interleave(30))
    results = [one for part in fit_fleet_auto(base, data, replace(CLASSES, rank=1, candidates=FLEET)) for one in part]
    fresh_NI = torch.from_numpy(inputs_NI[600:]).float()
    worse = 0
    for result in results:
        assert result.adapter is not None
        names_C = names_TC[result.position]
        change_NO = fresh_NI @ result.adapter.b_RI.T @ result.adapter.a_OR.T * result.adapter.scaling
        change_NO = change_NO if result.adapter.bias_O is None else change_NO + result.adapter.bias_O
        before_N, after_N = (
            y_NO.argmax(1).numpy() for y_NO in (base.forward(fresh_NI), base.forward(fresh_NI) + change_NO)
        )
        worse += int(
            np.mean(after_N == names_C[classes_N[600:]]) < np.mean(before_N == names_C[classes_N[600:]]) - 0.01
        )
    assert worse == 0


def test_live_is_judged_by_its_own_left_out_errors(base: BaseLayer, digits: tuple[np.ndarray, np.ndarray]) -> None:
    inputs_NI, classes_N = digits
    data = with_keys(inputs_NI[:60], (classes_N[:60] + 3) % 10)
    first = fit_auto(base, data, CLASSES)
    assert first.evidence is not None
    again = fit_auto(base, data, CLASSES, live=LiveVersion(first.adapter, first.evidence))
    figures = evaluation_of(again)
    assert figures["live"] == figures["adapter"]
    unfair = evaluation_of(fit_auto(base, data, CLASSES, live=LiveVersion(first.adapter)))
    assert unfair["live"] > figures["live"]


def test_a_named_method_judges_live_by_its_left_out_errors_too(
    base: BaseLayer, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    inputs_NI, classes_N = digits
    data = with_keys(inputs_NI[:60], (classes_N[:60] + 3) % 10)
    first = fit_auto(base, data, CLASSES)
    assert first.evidence is not None
    assert first.adapter is not None
    spec = TrainingSpec(rank=4, alpha=4.0, epochs=2, loss=Loss.CROSS_ENTROPY, split=Split(fraction=0.5))
    held_N = Sampler(spec, 60).held_K
    assert held_N is not None
    left_out = 1 - first.evidence.errors_N[held_N.numpy()].mean()
    in_sample = fit(base, data, spec, live=LiveVersion(first.adapter)).report
    assert in_sample is not None
    assert in_sample.evaluation is not None
    assert in_sample.evaluation["live"] > left_out

    alone = fit(base, data, spec, live=LiveVersion(first.adapter, first.evidence)).report
    groups = replace(data, groups_N=torch.zeros(60, dtype=torch.int64))
    ((of_fleet,),) = fit_fleet(base, groups, spec, live={0: LiveVersion(first.adapter, first.evidence)})
    for report in (alone, of_fleet.report):
        assert report is not None
        assert report.evaluation is not None
        assert report.evaluation["live"] == pytest.approx(left_out)


def test_suspects(base: BaseLayer, digits: tuple[np.ndarray, np.ndarray]) -> None:
    inputs_NI, classes_N = digits
    generator = np.random.default_rng(2)
    wrong_N = generator.random(90) < 0.15
    labels_N = np.where(wrong_N, (classes_N[:90] + generator.integers(1, 10, 90)) % 10, classes_N[:90])
    result = fit_auto(base, with_keys(inputs_NI[:90], labels_N), CLASSES)
    assert result.suspects is not None
    scores_N = np.zeros(90)
    for suspect in result.suspects:
        scores_N[suspect["row"]] = suspect["score"]
    assert roc_auc_score(wrong_N, scores_N) > 0.9
    worst = result.suspects[0]
    assert worst["suggested"] == classes_N[worst["row"]]


def test_one_adapter_has_all_metrics_on_its_held_out_rows(
    base: BaseLayer, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    result = fit_auto(base, with_keys(digits[0][:200], digits[1][:200]), CLASSES)
    held_out, evaluation = result.metrics["held_out"], evaluation_of(result)
    assert held_out["rows"] == evaluation["rows"]
    assert held_out["adapter"]["accuracy"] == pytest.approx(evaluation["adapter"])
    assert held_out["base"]["accuracy"] == pytest.approx(evaluation["base"])


@pytest.mark.parametrize("groups", [1, 2])
def test_documents_are_measured_without_held_out_rows(groups: int) -> None:
    base, draw = load_base_layer("random:16,16,1", device="cpu"), np.random.default_rng(0)
    documents = draw.normal(size=(60, 16)).astype(np.float32)
    data = with_keys(draw.normal(size=(60, 16)), documents, torch.arange(60) % groups if groups > 1 else None)
    spec = replace(
        SPEC, rank=2, alpha=2.0, loss=Loss.MULTIPLE_NEGATIVES, batch_size=16, epochs=2, split=None,
        candidates=(Candidate.BASE, Candidate.ADAMW),
    )  # fmt: skip
    results = (
        [fit_auto(base, data, spec)]
        if groups == 1
        else [fit for part in fit_fleet_auto(base, data, spec) for fit in part]
    )
    assert [result.metrics["validation_loss"] for result in results] == [None] * groups
    assert all(result.metrics["train_loss"] <= result.metrics["base_train_loss"] for result in results)


def test_a_group_without_weight_fails_alone(base: BaseLayer, digits: tuple[np.ndarray, np.ndarray]) -> None:
    inputs_NI, classes_N = digits
    groups_N = torch.arange(60) % 3
    data = with_keys(inputs_NI[:60], (classes_N[:60] + 1) % 10, groups_N)
    data = replace(data, weights_N=(groups_N != 1).float())
    fits = {
        fit.position: fit for part in fit_fleet_auto(base, data, replace(CLASSES, candidates=FLEET)) for fit in part
    }
    assert [fits[position].error is None for position in range(3)] == [True, False, True]


def test_factors_past_float32_fail() -> None:
    composed = Composed(torch.full((1, 4), 1e80, dtype=torch.float64), None)
    with pytest.raises(Diverged):
        composed.adapter(torch.eye(4, dtype=torch.float64), 1, outputs=1, feature_space=None, labels=None)


@pytest.mark.parametrize("groups", [1, 2])
def test_prior_of_groups_with_many_rows(base: BaseLayer, digits: tuple[np.ndarray, np.ndarray], groups: int) -> None:
    inputs_NI, classes_N = digits
    groups_N = torch.arange(1500) % groups
    data = with_keys(inputs_NI[:1500], (classes_N[:1500] + 3) % 10, groups_N)
    spec = replace(CLASSES, candidates=FLEET)
    fits = [fit for part in fit_fleet_auto(base, data, spec, wants_prior=True) for fit in part]
    assert sorted(fit.position for fit in fits) == list(range(groups + 1))
    assert all(fit.adapter is not None for fit in fits)


@pytest.mark.parametrize("attack", ["inputs", "targets", "weights"])
def test_a_group_of_another_size_changes_no_other_group(attack: str) -> None:
    draw, hostile = np.random.default_rng(7), 3
    weight_CI, groups_N = draw.normal(size=(3, 8)), np.repeat(np.arange(12), 25)
    inputs_NI = draw.normal(size=(300, 8)).astype(np.float32)
    classes_N = (inputs_NI @ weight_CI.T).argmax(1)
    targets = inputs_NI @ weight_CI.T if attack == "targets" else classes_N
    is_hostile_N = groups_N == hostile
    sizes_N = np.where(is_hostile_N, 1e30, 1.0)
    data = with_keys(inputs_NI, targets, torch.from_numpy(groups_N))
    changed = {
        "inputs": lambda: with_keys(inputs_NI * sizes_N[:, None], targets, data.groups_N),
        "targets": lambda: with_keys(inputs_NI, targets * sizes_N[:, None], data.groups_N),
        "weights": lambda: replace(data, weights_N=torch.from_numpy(sizes_N).float()),
    }[attack]()
    assert data.key_N is not None
    assert data.groups_N is not None
    rest_N = torch.from_numpy(np.flatnonzero(~is_hostile_N))
    rest_groups_N = data.groups_N[rest_N] - (data.groups_N[rest_N] > hostile).long()
    rest = replace(data.take(rest_N), key_N=data.key_N[rest_N], groups_N=rest_groups_N)
    base = BaseLayer(torch.from_numpy(draw.normal(size=(3, 8)).astype(np.float32)), None, "", "", 1.0)
    spec = replace(SPEC, candidates=FLEET, loss=Loss.MSE if attack == "targets" else Loss.CROSS_ENTROPY)
    attacked = {result.position: result for part in fit_fleet_auto(base, changed, spec) for result in part}
    alone = {result.position: result for part in fit_fleet_auto(base, rest, spec) for result in part}
    assert attacked.keys() == set(range(12))
    for position, expected in alone.items():
        result = attacked[position + (position >= hostile)]
        assert evaluation_of(result)["adapter"] == pytest.approx(evaluation_of(expected)["adapter"], abs=1e-9)
        assert result.report is not None
        assert expected.report is not None
        assert result.report.judgement == expected.report.judgement
        assert result.adapter is not None
        assert expected.adapter is not None
        delta_OI = result.adapter.a_OR @ result.adapter.b_RI
        expected_OI = expected.adapter.a_OR @ expected.adapter.b_RI
        torch.testing.assert_close(delta_OI, expected_OI, rtol=1e-3, atol=1e-4)


def test_rows_of_one_input_are_trained_on(base: BaseLayer, digits: tuple[np.ndarray, np.ndarray]) -> None:
    inputs_NI, classes_N = digits
    for rows in (200, 700):
        data = with_keys(np.repeat(inputs_NI[:1], rows, axis=0), classes_N[:rows])
        result = fit_auto(base, data, replace(CLASSES, candidates=(*EXACT, Candidate.ADAMW)))
        assert result.adapter is not None
        assert result.report is not None
        # They cannot be divided. The few are judged in folds, without others to learn from, and the many are not.
        assert (result.report.evaluation is None) == (rows == 700)


def test_numbers_that_keep_the_base_gain_nothing() -> None:
    draw = np.random.default_rng(3)
    base = BaseLayer(torch.from_numpy(draw.normal(size=(4, 6)).astype(np.float32)), None, "", "", 1.0)
    targets = draw.normal(size=(40, 4))
    targets[1] *= 1e20
    result = fit_auto(base, with_keys(draw.normal(size=(40, 6)), targets), replace(SPEC, loss=Loss.MSE))
    evaluation = evaluation_of(result)
    assert evaluation["adapter"] == pytest.approx(evaluation["base"], rel=0.2)
    constant = fit_auto(base, with_keys(draw.normal(size=(40, 6)), np.ones((40, 4))), replace(SPEC, loss=Loss.MSE))
    assert constant.report is not None
    assert constant.report.judgement is not None
    assert (constant.report.judgement.moves, constant.report.warnings) == (True, ())


def test_rows_of_other_groups_do_not_count_for_the_gain_of_a_fleet() -> None:
    keys_N, groups_N = torch.tensor([1, 2, 2, 3, 3, 4]), torch.tensor([0, 0, 1, 1, 1, 2])
    data = replace(with_keys(np.zeros((6, 2)), np.zeros(6, np.int64), groups_N), key_N=keys_N)
    shared_N = shared_rows(data)
    assert shared_N is not None
    assert shared_N.tolist() == [False, True, True, False, False, False]
