"""Finding the original of a digit that was turned, blurred and smeared: what an adapter of the queries brings."""

# N rows · I in_features · O out_features · M documents
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits

from adapters.lora.adapter import Adapter
from adapters.lora.base_layer import load_base_layer
from adapters.training.data_file import TrainingData
from adapters.training.fit import Fit, fit
from adapters.training.gradient.sampling import Sampler
from adapters.training.planning.split import Split as HoldOut
from adapters.training.planning.split import SplitBy
from adapters.training.settings import Loss, TrainingSpec
from tests.acceptance.quality.real_data import Array, turned_and_inverted
from tests.support.dense_oracle import answer

pytestmark = pytest.mark.slow

DOCUMENTS, COPIES, TEMPERATURE = 600, 2, 0.1
SPEC = TrainingSpec(
    rank=32,
    alpha=32.0,
    loss=Loss.MULTIPLE_NEGATIVES,
    epochs=25,
    learning_rate=0.01,
    batch_size=64,
    temperature=TEMPERATURE,
    split=HoldOut(by=SplitBy.GROUP),
)


def _pairs() -> TrainingData:
    """Each document twice, as two scans of it that differ: equal targets in one batch are no negatives."""
    draw = np.random.default_rng(5)
    originals_MI = load_digits().data[:DOCUMENTS]
    number_N = np.repeat(np.arange(DOCUMENTS), COPIES)
    scans_NI = turned_and_inverted(originals_MI[number_N]).reshape(-1, 8, 8)
    scans_NI = gaussian_filter(scans_NI, sigma=(0, 0.6, 0.6)).reshape(-1, 64)
    scans_NI = scans_NI + draw.normal(scale=1.0, size=scans_NI.shape)
    inputs_NI = torch.from_numpy((scans_NI - scans_NI.mean()) / 16).float()
    documents_NO = torch.from_numpy(originals_MI[number_N] / 16).float()
    return TrainingData(inputs_NI, documents_NO, key_N=torch.from_numpy(number_N))


def _recall_at_1(queries_NO: Array, own_NO: Array, searched_MO: Array) -> float:
    """The share of queries that are nearer to their own document than to every other distinct one."""
    unit_NO, unit_MO = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (queries_NO, searched_MO))
    nearest_NO = searched_MO[(unit_NO @ unit_MO.T).argmax(axis=1)]
    return float((nearest_NO == own_NO).all(axis=1).mean())


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return _pairs()


@pytest.fixture(scope="module")
def done(data: TrainingData) -> Fit:
    return fit(load_base_layer("identity:64", device="cpu"), data, SPEC)


def _held_out(data: TrainingData) -> TrainingData:
    held_K = Sampler(SPEC, data.rows, key_N=data.key_N).held_K
    assert held_K is not None
    return data.take(held_K)


def _answers(rows: TrainingData, adapter: Adapter | None) -> Array:
    return answer(load_base_layer("identity:64", device="cpu"), rows.inputs_NI, adapter)


def test_recall_on_held_out_documents_rises_far_above_the_base(data: TrainingData, done: Fit) -> None:
    rows = _held_out(data)
    documents_NO = rows.targets.numpy()
    distinct_MO = np.unique(documents_NO, axis=0)
    told = done.metrics["held_out"]
    for who, adapter in (("base", None), ("adapter", done.adapter)):
        recall = _recall_at_1(_answers(rows, adapter), documents_NO, distinct_MO)
        assert told[who]["recall_at_1"] == pytest.approx(recall)
    print({who: told[who]["recall_at_1"] for who in ("trivial", "base", "adapter")})
    assert told["adapter"]["documents"] == len(distinct_MO) == DOCUMENTS // 5
    assert told["adapter"]["recall_at_1"] > told["base"]["recall_at_1"] + 0.2
    assert told["adapter"]["recall_at_1"] > 0.5


def test_a_second_scan_of_the_same_document_is_no_negative(data: TrainingData, done: Fit) -> None:
    rows = _held_out(data)
    documents_NO = rows.targets.double().numpy()
    answers_NO = _answers(rows, done.adapter)
    # In batches of the rows as they stand.
    masked, unmasked = [], []
    for begin in range(0, rows.rows, SPEC.batch_size or rows.rows):
        some = slice(begin, begin + 64)
        y_KO, d_KO = (
            each / np.linalg.norm(each, axis=1, keepdims=True) for each in (answers_NO[some], documents_NO[some])
        )
        logits_KK = y_KO @ d_KO.T / TEMPERATURE
        own_K = np.diag(logits_KK).copy()
        unmasked += list(np.log(np.exp(logits_KK).sum(axis=1)) - own_K)
        twice_KK = (documents_NO[some][:, None] == documents_NO[some][None]).all(axis=2)
        logits_KK[twice_KK & ~np.eye(len(own_K), dtype=bool)] = -np.inf
        masked += list(np.log(np.exp(logits_KK).sum(axis=1)) - own_K)
    assert done.metrics["validation_loss"] == pytest.approx(np.mean(masked), rel=1e-4)
    assert np.mean(masked) < 0.9 * np.mean(unmasked)


def test_a_corpus_that_is_given_is_what_is_searched(data: TrainingData) -> None:
    """All digits, those too that no scan shows: harder than the held-out documents alone."""
    corpus_MO = torch.from_numpy(load_digits().data / 16).float()
    with_corpus = fit(
        load_base_layer("identity:64", device="cpu"), replace(data, corpus_MO=corpus_MO), replace(SPEC, epochs=3)
    )
    rows = _held_out(data)
    recall = _recall_at_1(
        _answers(rows, with_corpus.adapter), rows.targets.numpy(), np.unique(corpus_MO.numpy(), axis=0)
    )
    told = with_corpus.metrics["held_out"]["adapter"]
    assert told["recall_at_1"] == pytest.approx(recall)
    assert told["documents"] == len(np.unique(corpus_MO.numpy(), axis=0)) > DOCUMENTS
    assert told["missing"] == 0
