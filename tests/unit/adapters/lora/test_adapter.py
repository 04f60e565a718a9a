"""Canonical bytes, the digest over them, and what an adapter says of itself."""

# I in_features · O out_features · R rank
import hashlib
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.errors import BlobCorrupt, NotFinite, OutOfRange, RankTooLarge, WrongShape
from adapters.lora.adapter import Adapter, check_alpha, check_factors, delta_norms, from_canonical_bytes
from tests.support.dense_oracle import delta, layer, random_adapter

PLAIN = Adapter(torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5, 0.25, 3.0]]), None, 1.0)
BIASED = replace(PLAIN, bias_O=torch.tensor([0.5, -1.0]), alpha=1.5)
NAMED = replace(PLAIN, feature_space="minilm-l6-v2@1")
RSLORA = replace(BIASED, rslora=True, feature_space="encodeur é@2")

GOLDEN = {
    "plain": (PLAIN, "sha256:51ce93fd303d0676a0ab52aa2e58f67cb8992f64057a48098ca8c8c4f9cae248"),
    "bias": (BIASED, "sha256:f649852499ecb38bd18264d3c6789c22871dff03394898727873faa046fc7499"),
    "feature space": (NAMED, "sha256:87f9079b379ff3b5892a52ca8f1b3e457eed1989312243c042865ee694429134"),
    "all": (RSLORA, "sha256:a0598c1c546de51e74d910cb24ebb91d39ec025a2f0229d2b035b189fc6afe39"),
}


def _file(tensors: dict[str, tuple[list[int], list[float]]], about: str) -> bytes:
    """A safetensors file by hand: the header's length, the header padded to 8 bytes, the numbers."""
    header: dict[str, object] = {"__metadata__": {"loraplex": about}}
    numbers = b""
    for name, (shape, values) in tensors.items():
        packed = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(numbers), len(numbers) + len(packed)]}
        numbers += packed
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + numbers


FACTORS = {"A": ([2, 1], [1.0, -2.0]), "B": ([1, 3], [0.5, 0.25, 3.0])}
BIAS = {"bias": ([2], [0.5, -1.0])}
BY_HAND = {
    "plain": _file(FACTORS, '{"alpha":1.0,"format":1,"rslora":false}'),
    "bias": _file(FACTORS | BIAS, '{"alpha":1.5,"format":1,"rslora":false}'),
    "feature space": _file(FACTORS, '{"alpha":1.0,"feature_space":"minilm-l6-v2@1","format":1,"rslora":false}'),
    "all": _file(FACTORS | BIAS, '{"alpha":1.5,"feature_space":"encodeur \\u00e9@2","format":1,"rslora":true}'),
}


@pytest.mark.parametrize("which", GOLDEN)
def test_the_canonical_bytes_are_these_to_the_last_one(which: str) -> None:
    adapter, digest = GOLDEN[which]
    assert adapter.canonical_bytes == BY_HAND[which]
    assert adapter.digest == "sha256:" + hashlib.sha256(BY_HAND[which]).hexdigest() == digest


@pytest.mark.parametrize("which", GOLDEN)
def test_what_was_stored_is_read_back(which: str) -> None:
    adapter = from_canonical_bytes(BY_HAND[which])
    assert adapter.canonical_bytes == BY_HAND[which]
    assert delta(adapter).tolist() == delta(GOLDEN[which][0]).tolist()


def test_whatever_changes_the_answer_or_its_meaning_changes_the_digest() -> None:
    others = [
        replace(PLAIN, alpha=2.0),
        replace(PLAIN, alpha=-1.0),
        replace(PLAIN, rslora=True),
        replace(PLAIN, bias_O=torch.zeros(2)),
        replace(PLAIN, a_OR=-PLAIN.a_OR, b_RI=-PLAIN.b_RI),
        NAMED,
        BIASED,
    ]
    assert len({adapter.digest for adapter in [PLAIN, *others]}) == len(others) + 1


def test_an_alpha_that_is_whole_is_one_alpha() -> None:
    assert replace(PLAIN, alpha=1).digest == PLAIN.digest


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 40, BY_HAND["plain"][:-1], _file(FACTORS, "{}"), _file({"A": FACTORS["A"]}, '{"alpha":1.0}')],
)
def test_bytes_that_are_no_adapter_are_called_corrupt(content: bytes) -> None:
    with pytest.raises(BlobCorrupt):
        from_canonical_bytes(content)


def test_scaling_is_alpha_over_r_and_over_its_root_for_rslora() -> None:
    adapter = random_adapter(4, 6, 9, alpha=3.0)
    assert adapter.scaling == pytest.approx(1 / 3)
    assert replace(adapter, rslora=True).scaling == pytest.approx(1.0)


@pytest.mark.parametrize("rank", [1, 3, 4, 40])
@pytest.mark.parametrize("alpha", [-2.5, 1e-3, 16.0])
def test_the_norm_is_that_of_the_dense_delta(rank: int, alpha: float) -> None:
    adapter = random_adapter(4, 6, rank, alpha=alpha, rslora=rank == 3, bias=True)
    assert delta_norms([adapter]) == pytest.approx([np.linalg.norm(delta(adapter))], rel=1e-12)


def test_the_norm_of_a_tiny_delta_of_large_factors_is_not_lost() -> None:
    # A·B cancels to 2⁻²⁰ of its parts: ‖A‖·‖B‖ would say 1.
    a_OR, b_RI = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0 + 2**-20], [1.0]])
    assert delta_norms([Adapter(a_OR, b_RI, None, 2.0)]) == pytest.approx([2**-20], rel=1e-9)


def _zero(which: str) -> tuple[Tensor, Tensor, float]:
    adapter = random_adapter(4, 6, 2)
    return {
        "A": (torch.zeros(4, 2), adapter.b_RI, 2.0),
        "B": (adapter.a_OR, torch.zeros(2, 6), 2.0),
        "alpha": (adapter.a_OR, adapter.b_RI, 0.0),
    }[which]


@pytest.mark.parametrize("which", ["A", "B", "alpha"])
def test_the_norm_of_a_zero_delta_is_exactly_0(which: str) -> None:
    a_OR, b_RI, alpha = _zero(which)
    assert delta_norms([Adapter(a_OR, b_RI, None, alpha)]) == [0.0]


def test_the_largest_factors_have_a_finite_norm() -> None:
    largest = torch.full((1, 1), torch.finfo(torch.float32).max)
    wanted = float(torch.finfo(torch.float32).max) ** 2 * 1e6
    assert delta_norms([Adapter(largest, largest, None, 1e6)]) == pytest.approx([wanted])


@pytest.mark.parametrize("alpha", [0, 1e6, -1e6, 2.5])
def test_an_alpha_within_a_million_is_taken(alpha: float) -> None:
    assert check_alpha(alpha) == alpha


@pytest.mark.parametrize(
    ("alpha", "error"),
    [(float("nan"), NotFinite), (float("inf"), NotFinite), (-float("inf"), NotFinite), (1e6 + 1, OutOfRange)],
)
def test_an_alpha_outside_is_refused(alpha: float, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_alpha(alpha)


def test_shapes_are_held_against_each_other_and_the_base() -> None:
    base = layer(torch.ones(4, 6))
    names = ("A", "B", "bias")
    a_OR, b_RI, bias_O = torch.ones(4, 2), torch.ones(2, 6), torch.ones(4)
    check_factors(a_OR, b_RI, bias_O, base, max_rank=2, names=names)
    for culprit, wrong_a, wrong_b, wrong_bias in (
        ("A", torch.ones(3, 2), b_RI, None),
        ("A", torch.ones(4), b_RI, None),
        ("B", a_OR, torch.ones(3, 6), None),
        ("B", a_OR, torch.ones(2, 5), None),
        ("B", a_OR, torch.ones(2, 6, 1), None),
        ("bias", a_OR, b_RI, torch.ones(6)),
        ("bias", a_OR, b_RI, torch.ones(4, 1)),
    ):
        with pytest.raises(WrongShape) as caught:
            check_factors(wrong_a, wrong_b, wrong_bias, base, max_rank=2, names=names)
        assert caught.value.field == culprit
    with pytest.raises(RankTooLarge):
        check_factors(a_OR, b_RI, bias_O, base, max_rank=1, names=names)
    with pytest.raises(WrongShape, match="swapped"):
        check_factors(torch.ones(2, 6), torch.ones(4, 2), None, base, max_rank=2, names=names)
