"""Metrics of retrieval: the rank of the true document by cosine, with the outputs as queries."""

# N rows · O outputs · M documents of a corpus · D distinct ones
from collections.abc import Iterator
from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn import functional

from adapters.training.evaluation.metrics.regression import cosine_of
from adapters.training.evaluation.metrics.weighting import Metrics, effective_rows, number, row_weights, slices, tiles

CUTOFFS = (1, 5, 10)
# Largest difference of cosines that is rounding (at most O·ε); they then count as equal.
_TIE = 1e-12


def measure_retrieval(
    outputs_NO: Tensor, documents_NO: Tensor, *, corpus_MO: Tensor | None = None, weights_N: Tensor | None = None
) -> Metrics:
    """Return the metrics of finite queries (N, O), their true documents (N, O), and weights (N,) ≥ 0.

    The corpus (M, O) is searched, or all true documents. Equal rows are one document; `documents` is their number.
    `recall_at_1`, `_5`, `_10`: the share of rows whose document has at most that rank; `mrr`: the mean of 1/rank. The
    rank is the number of documents that are at least as similar as the true one, itself included, so that ties count
    against the adapter. Rows whose document is not in the corpus are never found; `missing` is their number. This takes
    N·D·O multiplications, one tile at a time.
    """
    searched_MO, distinct_D, found_N = _documents(documents_NO, corpus_MO)
    weights = row_weights(weights_N, outputs_NO)
    ranks_N = _ranks(outputs_NO, documents_NO, searched_MO, distinct_D)
    total = weights.sum()
    metrics: Metrics = {"rows": outputs_NO.shape[0], "effective_rows": effective_rows(weights)}
    for k in CUTOFFS:
        metrics[f"recall_at_{k}"] = number((weights * (found_N & (ranks_N <= k))).sum() / total)
    metrics["mrr"] = number(torch.where(found_N, weights / ranks_N, 0.0).sum() / total)
    return metrics | {"documents": distinct_D.shape[0], "missing": int((~found_N).sum())}


def measure_trivial_retrieval(
    documents_NO: Tensor, *, corpus_MO: Tensor | None = None, weights_N: Tensor | None = None
) -> Metrics:
    """Return the expected metrics of a random order of the D documents.

    The rank is uniform over 1 … D: recall at k is min(k, D)/D and the reciprocal rank (1 + 1/2 + … + 1/D)/D, times the
    share of rows whose document is in the corpus. There is no `loss`, which depends on the negatives of a loss.
    """
    _, distinct_D, found_N = _documents(documents_NO, corpus_MO)
    weights = row_weights(weights_N, documents_NO)
    documents = distinct_D.shape[0]
    there = (weights * found_N).sum() / weights.sum()
    metrics: Metrics = {"rows": documents_NO.shape[0], "effective_rows": effective_rows(weights)}
    for k in CUTOFFS:
        metrics[f"recall_at_{k}"] = number(there * min(k, documents) / documents)
    metrics["mrr"] = number(there * sum(1 / rank for rank in range(1, documents + 1)) / documents)
    return metrics | {"documents": documents, "missing": int((~found_N).sum())}


def _documents(documents_NO: Tensor, corpus_MO: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the corpus, the position of each distinct row, (D,), and whether it has each row's document, (N,)."""
    wanted = list(_digests(documents_NO))
    positions: dict[bytes, int] = {}
    for position, digest in enumerate(wanted if corpus_MO is None else _digests(corpus_MO)):
        positions.setdefault(digest, position)
    device = documents_NO.device
    found_N = torch.tensor([digest in positions for digest in wanted], dtype=torch.bool, device=device)
    searched_MO = documents_NO if corpus_MO is None else corpus_MO.to(device)
    return searched_MO, torch.tensor(list(positions.values()), dtype=torch.int64, device=device), found_N


def _digests(rows_MO: Tensor) -> Iterator[bytes]:
    """Yield a hash of each row's float64 bytes, with −0 as 0."""
    for part in slices(*rows_MO.shape):
        for row_O in (rows_MO[part].double() + 0.0).cpu().numpy():
            yield blake2b(row_O, digest_size=16).digest()


def _ranks(outputs_NO: Tensor, documents_NO: Tensor, searched_MO: Tensor, distinct_D: Tensor) -> Tensor:
    """Return the number of distinct documents that are at least as similar as the row's own, (N,) int64."""
    rows, outputs = outputs_NO.shape
    ranks_N = torch.zeros(rows, dtype=torch.int64, device=outputs_NO.device)
    for columns in tiles(distinct_D.shape[0], outputs):
        unit_DO = _unit(searched_MO[distinct_D[columns]])
        for part in tiles(rows, outputs):
            own_N = cosine_of(outputs_NO[part].double(), documents_NO[part].double())
            cosine_ND = _unit(outputs_NO[part]) @ unit_DO.T
            # Counted as not less similar, so that the rank of a NaN output is the last one.
            ranks_N[part] += unit_DO.shape[0] - (cosine_ND < own_N[:, None] - _TIE).sum(dim=1)
    return ranks_N


def _unit(rows_NO: Tensor) -> Tensor:
    """Return each row with length 1, in float64; 0 stays 0."""
    return functional.normalize(rows_NO.double(), dim=1, eps=torch.finfo(torch.float64).tiny)
