"""Each loss and its slope are those of the formula, whatever the rows weigh."""

# G adapters of a stack · K rows of a batch · N rows · O out_features · C classes
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional

from adapters.training.closed_form.solver import Factors
from adapters.training.data_file import TrainingData
from adapters.training.gradient.batches import stack_base_outputs
from adapters.training.gradient.losses import (
    add_low_rank_stack,
    class_weights,
    compute_outputs,
    document_ids,
    loss_and_gradient,
    row_losses,
    row_weights,
    weighted_mean,
)
from adapters.training.settings import BALANCED, Loss, TrainingSpec
from tests.support.dense_oracle import answer, layer, random_adapter
from tests.unit.adapters.training.loss_oracle import losses_of_rows, mean_of_rows

G, O, K = 3, 5, 8
SPEC = TrainingSpec(rank=2, alpha=2.0)
SPECS = {
    "mse": replace(SPEC, loss=Loss.MSE),
    "huber": replace(SPEC, loss=Loss.HUBER, huber_delta=0.7),
    "cross_entropy": replace(SPEC, loss=Loss.CROSS_ENTROPY),
    "cross_entropy, smoothed": replace(SPEC, loss=Loss.CROSS_ENTROPY, label_smoothing=0.1),
    "cross_entropy, 3 of 5": replace(SPEC, loss=Loss.CROSS_ENTROPY, label_smoothing=0.1, classes=3),
    "binary_cross_entropy": replace(SPEC, loss=Loss.BINARY_CROSS_ENTROPY),
    "binary_cross_entropy, 3 of 5": replace(SPEC, loss=Loss.BINARY_CROSS_ENTROPY, classes=3),
    "cosine": replace(SPEC, loss=Loss.COSINE),
    "multiple_negatives": replace(SPEC, loss=Loss.MULTIPLE_NEGATIVES, temperature=0.3),
}
OF_ITS_OWN = [name for name in SPECS if name != "multiple_negatives"]
"""Losses in which a row does not see the others of its batch."""


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _targets(spec: TrainingSpec) -> Tensor:
    """(G, K) classes, or (G, K, O') float64."""
    C = spec.classes or O
    if spec.loss is Loss.CROSS_ENTROPY:
        return torch.randint(0, C, (G, K), generator=_generator())
    if spec.loss is Loss.BINARY_CROSS_ENTROPY:
        return torch.randint(0, 2, (G, K, C), generator=_generator()).double()
    targets_GKO = torch.randn(G, K, C, generator=_generator(), dtype=torch.float64)
    targets_GKO[:, 3] = targets_GKO[:, 6] = targets_GKO[:, 0]
    return targets_GKO


def _outputs() -> Tensor:
    return 2 * torch.randn(G, K, O, generator=_generator().manual_seed(9), dtype=torch.float64)


def _weights(weighted: bool) -> Tensor | None:
    if not weighted:
        return None
    weights_GK = torch.rand(G, K, generator=_generator(), dtype=torch.float64) * 4
    weights_GK[:, 2] = 0
    return weights_GK


def _documents(spec: TrainingSpec, targets: Tensor) -> Tensor | None:
    documents = document_ids(spec, targets.flatten(0, 1))
    return None if documents is None else documents.view(G, K)


def _ours(
    spec: TrainingSpec, y_GKO: Tensor, targets: Tensor, weights_GK: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The losses (G,) and slopes (G, K, O)."""
    documents_GK = _documents(spec, targets)
    given = targets.to(dtype).transpose(1, 2).contiguous() if targets.is_floating_point() else targets
    y_GOK = y_GKO.to(dtype).transpose(1, 2).contiguous()
    weights_GK = None if weights_GK is None else weights_GK.to(dtype)
    losses_G, gradient_GOK = loss_and_gradient(spec, y_GOK, given, weights_GK, documents_GK)
    return losses_G, gradient_GOK.transpose(1, 2)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_slope_are_those_of_the_formula(
    name: str, weighted: bool, dtype: torch.dtype, tolerance: float
) -> None:
    spec = SPECS[name]
    y_GKO, targets, weights_GK = _outputs(), _targets(spec), _weights(weighted)
    losses_G, slope_GKO = _ours(spec, y_GKO, targets, weights_GK, dtype)
    for place in range(G):
        y_KO = y_GKO[place].clone().requires_grad_()
        wanted = mean_of_rows(
            losses_of_rows(spec, y_KO, targets[place]), None if weights_GK is None else weights_GK[place]
        )
        wanted.backward()
        assert y_KO.grad is not None
        assert float(losses_G[place]) == pytest.approx(float(wanted.detach()), rel=tolerance)
        torch.testing.assert_close(slope_GKO[place].double(), y_KO.grad, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OF_ITS_OWN)
def test_a_row_of_weight_3_is_the_row_three_times_and_one_of_weight_0_is_not_there(name: str) -> None:
    spec = SPECS[name]
    y_GKO, targets = _outputs(), _targets(spec)
    counts_K = torch.tensor([1, 3, 0, 1, 2, 0, 1, 1])
    weighted_G, slope_GKO = _ours(spec, y_GKO, targets, counts_K.double().expand(G, K), torch.float64)
    rows_K = torch.arange(K).repeat_interleave(counts_K)
    repeated_G, repeated_GKO = _ours(spec, y_GKO[:, rows_K], targets[:, rows_K], None, torch.float64)
    torch.testing.assert_close(weighted_G, repeated_G, rtol=1e-12, atol=0)
    gathered_GKO = torch.zeros_like(slope_GKO).index_add_(1, rows_K, repeated_GKO)
    torch.testing.assert_close(slope_GKO, gathered_GKO, rtol=1e-12, atol=1e-14)


def test_among_negatives_a_row_of_weight_3_counts_three_times_but_its_target_is_there_once() -> None:
    spec = SPECS["multiple_negatives"]
    y_GKO, targets_GKO = _outputs(), _targets(spec)
    weights_GK = torch.ones(G, K, dtype=torch.float64)
    weights_GK[:, 1] = 3
    losses_G, _ = _ours(spec, y_GKO, targets_GKO, weights_GK, torch.float64)
    wanted_GK = torch.stack([losses_of_rows(spec, *each) for each in zip(y_GKO, targets_GKO, strict=True)])
    torch.testing.assert_close(losses_G, (wanted_GK.sum(1) + 2 * wanted_GK[:, 1]) / (K + 2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SPECS)
def test_where_no_row_counts_the_loss_and_its_slope_are_0(name: str) -> None:
    spec = SPECS[name]
    losses_G, slope_GKO = _ours(spec, _outputs(), _targets(spec), torch.zeros(G, K), torch.float32)
    assert losses_G.tolist() == [0.0] * G
    assert not slope_GKO.any()


def test_rows_that_fill_up_a_batch_are_nobody_s_negatives() -> None:
    spec = SPECS["multiple_negatives"]
    y_GKO, targets_GKO = _outputs(), _targets(spec)
    documents_GK = _documents(spec, targets_GKO)
    assert documents_GK is not None
    filled_GK, weights_GK = documents_GK.clone(), torch.ones(G, K, dtype=torch.float64)
    filled_GK[:, 5:] = -1
    weights_GK[:, 5:] = 0
    columns = [each.transpose(1, 2).contiguous() for each in (y_GKO, targets_GKO)]
    losses_G, gradient_GOK = loss_and_gradient(spec, columns[0].clone(), columns[1], weights_GK, filled_GK)
    shorter_y, shorter_targets = (each[..., :5].contiguous() for each in columns)
    wanted_G, wanted_GOK = loss_and_gradient(spec, shorter_y, shorter_targets, None, documents_GK[:, :5])
    torch.testing.assert_close(losses_G, wanted_G, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient_GOK[..., :5], wanted_GOK, rtol=1e-12, atol=1e-15)
    assert not gradient_GOK[..., 5:].any()


@pytest.mark.parametrize("name", SPECS)
def test_outputs_of_a_thousand_leave_everything_finite(name: str) -> None:
    spec = SPECS[name]
    y_GKO = _outputs() * 1e3
    losses_G, slope_GKO = _ours(spec, y_GKO, _targets(spec), None, torch.float32)
    assert bool(torch.isfinite(losses_G).all())
    assert bool(torch.isfinite(slope_GKO).all())


CLASSES_N = torch.tensor([0, 0, 0, 0, 2, 2, 3])
COUNTS_N = torch.tensor([1, 2, 1, 1, 3, 0, 2])


@pytest.mark.parametrize("weighted", [False, True])
def test_balanced_weights_are_scikit_learn_s_and_1_for_classes_without_rows(weighted: bool) -> None:
    spec = replace(SPECS["cross_entropy"], class_weights=BALANCED)
    found_C = class_weights(spec, CLASSES_N, COUNTS_N.float() if weighted else None, O)
    repeated = CLASSES_N.repeat_interleave(COUNTS_N).numpy() if weighted else CLASSES_N.numpy()
    present = np.unique(repeated)
    wanted_C = np.ones(O)
    wanted_C[present] = compute_class_weight("balanced", classes=present, y=repeated)
    assert found_C is not None
    assert found_C.dtype == torch.float32
    np.testing.assert_allclose(found_C.numpy(), wanted_C, rtol=1e-6)


def test_balanced_weights_are_for_the_task_s_classes_alone() -> None:
    found_C = class_weights(replace(SPECS["cross_entropy"], class_weights=BALANCED, classes=4), CLASSES_N, None, O)
    assert found_C is not None
    assert found_C.shape == (4,)


@pytest.mark.parametrize("weighted", [False, True])
def test_given_class_weights_make_the_loss_that_torch_weights_by_class(weighted: bool) -> None:
    given_C = (0.5, 2.0, 1.0, 4.0, 1.0)
    spec = replace(SPECS["cross_entropy"], class_weights=given_C)
    y_NO = _outputs()[0, :7]
    data = TrainingData(torch.zeros(7, 1), CLASSES_N, weights_N=COUNTS_N.float() if weighted else None)
    weights_N = row_weights(data, class_weights(spec, data.targets, data.weights_N, O))
    assert weights_N is not None
    ours = weighted_mean(row_losses(spec, y_NO.T[None], CLASSES_N[None]), weights_N[None])
    rows_N = torch.arange(7).repeat_interleave(COUNTS_N) if weighted else torch.arange(7)
    torchs = functional.cross_entropy(y_NO[rows_N], CLASSES_N[rows_N], weight=torch.tensor(given_C).double())
    assert float(ours) == pytest.approx(float(torchs), rel=1e-6)


def test_without_class_weights_rows_count_what_they_were_given() -> None:
    assert class_weights(SPECS["cross_entropy"], CLASSES_N, None, O) is None
    data = TrainingData(torch.zeros(7, 1), CLASSES_N, weights_N=COUNTS_N.float())
    weights_N = row_weights(data, None)
    assert weights_N is not None
    # A power of two apart: the same in every mean, to the last bit.
    scale = math.log2(float(weights_N.max() / COUNTS_N.max()))
    assert scale == round(scale)
    assert (weights_N / 2**scale).equal(COUNTS_N.float())
    assert row_weights(TrainingData(torch.zeros(7, 1), CLASSES_N), None) is None


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e38])
def test_weights_of_any_size_count_by_their_ratio(size: float) -> None:
    data = TrainingData(torch.zeros(7, 1), CLASSES_N, weights_N=torch.full((7,), size))
    weights_N = row_weights(data, torch.full((O,), size))
    assert weights_N is not None
    assert 1 <= float(weights_N.min()) == float(weights_N.max()) < 2


def test_documents_are_the_same_where_targets_are_equal_to_the_last_bit() -> None:
    targets_NO = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0 + 2**-22], [2.0, 1.0]])
    documents_N = document_ids(SPECS["multiple_negatives"], targets_NO)
    assert documents_N is not None
    numbers = documents_N.tolist()
    same = [[a == b for b in numbers] for a in numbers]
    assert same == [[bool(torch.equal(a, b)) for b in targets_NO] for a in targets_NO]


@pytest.mark.parametrize("with_base_bias", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_are_those_of_the_dense_layer(bias: bool, with_base_bias: bool) -> None:
    base = layer(torch.randn(5, 4, generator=_generator()), torch.ones(5) if with_base_bias else None)
    x_GKI = torch.randn(2, 6, 4, generator=_generator())
    adapters = [random_adapter(5, 4, 2, alpha=3.0, bias=bias, seed=seed) for seed in (1, 2)]
    biases = [each.bias_O for each in adapters if each.bias_O is not None]
    stacked = Factors(
        torch.stack([each.a_OR for each in adapters]),
        torch.stack([each.b_RI for each in adapters]),
        torch.stack(biases) if biases else None,
    )
    base_GOK = stack_base_outputs(base, x_GKI.double())
    y_GOK = add_low_rank_stack(base_GOK, x_GKI.double(), stacked.map(Tensor.double), 1.5)
    for place, adapter in enumerate(adapters):
        wanted_KO = answer(base, x_GKI[place], adapter)
        np.testing.assert_allclose(y_GOK[place].T.numpy(), wanted_KO, rtol=1e-12, atol=1e-12)
        factors = Factors(adapter.a_OR, adapter.b_RI, adapter.bias_O)
        np.testing.assert_allclose(
            compute_outputs(base, x_GKI[place], factors, 1.5).numpy(), wanted_KO, rtol=1e-12, atol=1e-12
        )
    np.testing.assert_allclose(
        compute_outputs(base, x_GKI[0], None, 1.0).numpy(), answer(base, x_GKI[0], None), rtol=1e-12
    )
