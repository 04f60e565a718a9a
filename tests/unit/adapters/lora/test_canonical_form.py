"""The canonical bytes are what safetensors itself would write."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from adapters.lora.adapter import Adapter

LABELS = [None, ("ant", "bée", 'q"\\\n\t\x1f\x7f\u2028😀'), (1, -2, 3)]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("feature_space", [None, 'minilm "é"\\\x00\x7f@1'])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "rank", "inputs"), [(1, 1, 1), (10, 4, 64), (3, 7, 5), (1000, 2, 33)])
def test_the_canonical_bytes_are_those_of_safetensors(
    outputs: int, rank: int, inputs: int, bias: bool, feature_space: str | None, labels: Any
) -> None:
    generator = torch.Generator().manual_seed(outputs)
    tensors = {
        "A": torch.randn(outputs, rank, generator=generator),
        "B": torch.randn(rank, inputs, generator=generator),
    }
    if bias:
        tensors["bias"] = torch.randn(outputs, generator=generator)
    about: dict[str, Any] = {"alpha": 1e-7, "format": 1, "rslora": bias}
    about |= {} if feature_space is None else {"feature_space": feature_space}
    about |= {} if labels is None else {"labels": list(labels)}
    adapter = Adapter(tensors["A"], tensors["B"], tensors.get("bias"), 1e-7, bias, feature_space, labels)
    metadata = {"loraplex": json.dumps(about, separators=(",", ":"), sort_keys=True)}
    assert adapter.canonical_bytes == save(tensors, metadata=metadata)


def test_factors_that_do_not_lie_row_by_row_are_written_row_by_row() -> None:
    left, right = torch.arange(6.0).view(2, 3).T, torch.arange(8.0).view(4, 2).T
    found = load(Adapter(left, right, None, 1.0).canonical_bytes)
    assert torch.equal(found["A"], left)
    assert torch.equal(found["B"], right)
