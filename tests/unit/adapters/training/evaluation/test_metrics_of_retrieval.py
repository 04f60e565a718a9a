"""Ranks against sorting everything, and scikit-learn's own ranking measures."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score
from sklearn.metrics.pairwise import cosine_similarity

from adapters.training.evaluation.metrics import Task, measure, measure_trivial
from tests.unit.adapters.training.evaluation.held_out_rows import Float64, held_out, plain

ROWS = held_out(Task.RETRIEVAL, rows=61)
QUERIES, DOCUMENTS, WEIGHTS = ROWS.outputs_NO, ROWS.targets, ROWS.weights_N
RECALLS = ("recall_at_1", "recall_at_5", "recall_at_10")


def _similarities() -> tuple[Float64, NDArray[np.int64]]:
    """(N, D) of each query to each distinct document, and (N,) which of them is its own."""
    distinct, own_N = np.unique(DOCUMENTS.numpy(), axis=0, return_inverse=True)
    assert len(distinct) == 31
    return cosine_similarity(QUERIES.numpy(), distinct), own_N.reshape(-1).astype(np.int64)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_recall_and_reciprocal_rank_are_scikit_learn_s_over_the_distinct_documents(
    weights: torch.Tensor | None,
) -> None:
    cosine_ND, own_N = _similarities()
    metrics = measure(Task.RETRIEVAL, QUERIES, DOCUMENTS, weights_N=weights)
    for k in (1, 5, 10):
        wanted = top_k_accuracy_score(own_N, cosine_ND, k=k, labels=range(31), sample_weight=weights)
        assert plain(metrics, f"recall_at_{k}") == pytest.approx(wanted)
    # With one relevant document a row, the average precision is the reciprocal of its rank.
    each = None if weights is None else weights.numpy()
    wanted = label_ranking_average_precision_score(np.eye(31)[own_N], cosine_ND, sample_weight=each)
    assert plain(metrics, "mrr") == pytest.approx(wanted)
    assert (metrics["documents"], metrics["missing"]) == (31, 0)
    assert 0 < plain(metrics, "recall_at_1") < plain(metrics, "recall_at_5") < 1


def test_a_corpus_is_searched_instead_and_what_it_lacks_is_never_found() -> None:
    others = torch.randn(40, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    corpus = torch.cat([others, DOCUMENTS[10:], others[:7]])
    kept, there = cosine_similarity(QUERIES, torch.cat([others, DOCUMENTS[10::2]])), range(10, 61)
    ranks = [int((kept[row] >= kept[row, 40 + (row - 10) // 2] - 1e-9).sum()) for row in there]
    metrics = measure(Task.RETRIEVAL, QUERIES, DOCUMENTS, corpus_MO=corpus)
    assert (metrics["documents"], metrics["missing"]) == (40 + 26, 10)
    assert plain(metrics, "mrr") == pytest.approx(sum(1 / rank for rank in ranks) / 61)
    for name, k in zip(RECALLS, (1, 5, 10), strict=True):
        assert plain(metrics, name) == pytest.approx(sum(rank <= k for rank in ranks) / 61)


def test_a_row_nearer_to_its_missing_document_than_to_any_that_is_there_is_never_found() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    metrics = measure(Task.RETRIEVAL, queries, queries, corpus_MO=torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    assert [metrics[name] for name in (*RECALLS, "mrr", "missing")] == [0.5] * 4 + [1]


def test_an_empty_answer_ties_with_everything_and_ranks_last() -> None:
    metrics = measure(Task.RETRIEVAL, torch.zeros(4, 3), torch.eye(4, 3))
    assert metrics["documents"] == 4
    assert (metrics["recall_at_1"], metrics["recall_at_5"], metrics["mrr"]) == (0.0, 1.0, 0.25)


def test_documents_of_one_direction_tie_against_the_adapter_whatever_their_length() -> None:
    direction = torch.tensor([[0.1, 0.7, -0.3]], dtype=torch.float64)
    documents = direction * torch.tensor([[1.0], [3.0], [7.0], [-1.0]])
    metrics = measure(Task.RETRIEVAL, direction.expand(4, 3), documents)
    assert plain(metrics, "mrr") == pytest.approx((1 / 3 + 1 / 3 + 1 / 3 + 1 / 4) / 4)


def test_a_zero_document_is_as_near_as_a_right_angle() -> None:
    documents = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    metrics = measure(Task.RETRIEVAL, torch.tensor([[0.0, 1.0]] * 3), documents)
    # By cosine 0, 0 and −1: ranks 2, 2 and 3.
    assert plain(metrics, "mrr") == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)


def test_equal_rows_are_one_document_and_minus_0_is_0() -> None:
    documents = torch.tensor([[1.0, 0.0], [1.0, -0.0], [0.0, 1.0]])
    assert measure(Task.RETRIEVAL, documents, documents)["documents"] == 2
    found = measure(Task.RETRIEVAL, documents, documents, corpus_MO=torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert (found["missing"], found["recall_at_1"]) == (0, 1.0)


def test_a_corpus_in_float32_holds_the_same_documents_in_float64() -> None:
    documents = DOCUMENTS.float()
    metrics = measure(Task.RETRIEVAL, QUERIES, documents.double(), corpus_MO=documents)
    assert metrics["missing"] == 0
    assert metrics == measure(Task.RETRIEVAL, QUERIES, documents.double())


def test_one_row_is_found_at_once_among_the_one_document_there_is() -> None:
    metrics = measure(Task.RETRIEVAL, torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    assert [metrics[name] for name in (*RECALLS, "mrr")] == [1.0] * 4


def test_an_answer_that_is_not_a_number_ranks_last() -> None:
    metrics = measure(
        Task.RETRIEVAL, torch.tensor([[math.nan, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    )
    assert (metrics["recall_at_1"], metrics["mrr"]) == (0.5, 0.75)


def test_rows_that_all_weigh_nothing_have_nothing_to_tell() -> None:
    metrics = measure(Task.RETRIEVAL, QUERIES, DOCUMENTS, weights_N=torch.zeros(61))
    assert [metrics[name] for name in (*RECALLS, "mrr")] == [None] * 4


def test_chance_is_the_mean_over_every_place_that_a_document_can_have() -> None:
    metrics = measure_trivial(Task.RETRIEVAL, torch.zeros(4), DOCUMENTS, weights_N=WEIGHTS)
    for name, k in zip(RECALLS, (1, 5, 10), strict=True):
        assert plain(metrics, name) == pytest.approx(k / 31)
    assert plain(metrics, "mrr") == pytest.approx(float(sum(Fraction(1, rank) for rank in range(1, 32)) / 31))


def test_chance_finds_no_document_that_is_not_there_and_every_one_within_the_first_few() -> None:
    corpus = DOCUMENTS[:6]
    metrics = measure_trivial(Task.RETRIEVAL, torch.zeros(4), DOCUMENTS, corpus_MO=corpus)
    assert (metrics["documents"], metrics["missing"]) == (3, 55)
    assert plain(metrics, "recall_at_1") == pytest.approx(6 / 61 / 3)
    assert plain(metrics, "recall_at_5") == pytest.approx(6 / 61)


def test_random_answers_do_about_as_well_as_chance() -> None:
    draw = torch.Generator().manual_seed(3)
    queries, documents = torch.randn(2, 2000, 8, generator=draw, dtype=torch.float64)
    reached, chance = (
        measure(Task.RETRIEVAL, queries, documents),
        measure_trivial(Task.RETRIEVAL, torch.zeros(4), documents),
    )
    # 2,000 draws of a share of 10/2,000: its standard deviation is about 0.0016.
    assert plain(reached, "recall_at_10") == pytest.approx(plain(chance, "recall_at_10"), abs=0.006)
    assert plain(reached, "mrr") == pytest.approx(plain(chance, "mrr"), abs=0.003)
