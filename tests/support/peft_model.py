"""What a tenant has: a model with a linear layer somewhere inside, and PEFT to adapt it.

PEFT is imported where it is used, here and in the tests: every worker imports every test, and PEFT takes seconds. Tests
that use it are marked `uses_peft`, so that only one worker imports it.
"""

# N rows · I in_features · O out_features
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.dense_oracle import Float64

uses_peft = pytest.mark.xdist_group("peft")
FILES = ("adapter_model.safetensors", "adapter_config.json")


class Net(nn.Module):
    """A linear layer with these numbers at `path`, and whatever else stands beside it."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, path: str = "linear", **others: nn.Module) -> None:
        super().__init__()
        outputs, inputs = weight_OI.shape
        linear = nn.Linear(inputs, outputs, bias=bias_O is not None)
        linear.load_state_dict({"weight": weight_OI} | ({} if bias_O is None else {"bias": bias_O}))
        *parents, last = path.split(".")
        node: nn.Module = self
        for name in parents:
            child = nn.Module()
            node.add_module(name, child)
            node = child
        node.add_module(last, linear)
        for name, other in others.items():
            self.add_module(name, other)
        self._path = path

    def forward(self, x_NI: Tensor) -> Any:
        return self.get_submodule(self._path)(x_NI)


def save_adapter(
    model: nn.Module, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> dict[str, bytes]:
    """Let PEFT adapt `model` and save it, every factor drawn at random; returns its files by name."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    adapted.save_pretrained(str(folder))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def peft_answer(model: nn.Module, folder: Path, x_NI: Tensor) -> Float64:
    """(N, O): what PEFT answers with the adapter in `folder` loaded onto `model`, computed in float64."""
    from peft import PeftModel

    # The model inside: a task type's wrapper would pass it what only language models take.
    adapted = PeftModel.from_pretrained(model, str(folder)).get_base_model().double()
    with torch.no_grad():
        outputs: Float64 = adapted(x_NI.double()).numpy()
    return outputs


def as_parts(files: Mapping[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    """The two files as the parts of a form, whose fields have names of no meaning."""
    return [(f"part{number}", (name, files[name])) for number, name in enumerate(FILES)]


def as_zip(files: Mapping[str, bytes], *, folder: str = "", compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """All files in a zip, at its root or in one folder."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        if folder:
            archive.mkdir(folder)
        for name, content in files.items():
            archive.writestr(f"{folder}/{name}" if folder else name, content)
    return buffer.getvalue()
