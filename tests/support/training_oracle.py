"""A small base layer, rows to train on, and what a trained layer's loss is, computed apart from the service."""

# N rows · I in_features · O out_features · R rank
import json
import zipfile
from io import BytesIO
from typing import Any

import httpx
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

INPUTS, OUTPUTS, RANK, ROWS = 5, 3, 2, 24
_DRAW = torch.Generator().manual_seed(21)
WEIGHT = torch.randn(OUTPUTS, INPUTS, generator=_DRAW)
BIAS = torch.randn(OUTPUTS, generator=_DRAW)
X = torch.randn(ROWS, INPUTS, generator=_DRAW)
Y = torch.randn(ROWS, OUTPUTS, generator=_DRAW)
CLASSES = torch.randint(0, OUTPUTS, (ROWS,), generator=_DRAW)
A = torch.randn(OUTPUTS, RANK, generator=_DRAW)
B = torch.randn(RANK, INPUTS, generator=_DRAW)
NUMBERS: dict[str, Any] = {"inputs": X.tolist(), "targets": Y.tolist()}
LABELS: dict[str, Any] = {"inputs": X.tolist(), "targets": CLASSES.tolist()}


def outputs(delta_OI: Tensor | None = None, x_NI: Tensor = X) -> Tensor:
    """(N, O) in float64: `x·(W + ΔW)ᵀ + b`."""
    weight_OI = WEIGHT.double() + (0 if delta_OI is None else delta_OI.double())
    return x_NI.double() @ weight_OI.T + BIAS.double()


def mse(delta_OI: Tensor | None = None) -> float:
    """Over all elements of all rows."""
    return float(((outputs(delta_OI) - Y.double()) ** 2).mean())


def cross_entropy(delta_OI: Tensor | None = None) -> float:
    """Over all rows."""
    return float(functional.cross_entropy(outputs(delta_OI), CLASSES))


def published_delta(client: httpx.Client, name: str, version: int | None = None) -> Tensor:
    """(O, I) in float64: s·A·B of a version, from its download."""
    query = {} if version is None else {"version": version}
    content = client.get(f"/adapters/{name}/download", params=query).raise_for_status().content
    with zipfile.ZipFile(BytesIO(content)) as archive:
        tensors = load(archive.read("adapter_model.safetensors"))
        config = json.loads(archive.read("adapter_config.json"))
    left, right = (tensors[f"base_model.model.linear.lora_{kind}.weight"].double() for kind in "BA")
    divisor = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
    product: Tensor = left @ right * (config["lora_alpha"] / divisor)
    return product


def rslora_zip(alpha: float) -> bytes:
    """A and B as PEFT saves them with rsLoRA, where s = alpha / √r."""
    path = "base_model.model.linear"
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "use_rslora": True, "target_modules": ["linear"]}
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("adapter_config.json", json.dumps(config))
        tensors = {f"{path}.lora_A.weight": B, f"{path}.lora_B.weight": A}
        archive.writestr("adapter_model.safetensors", save(tensors))
    return buffer.getvalue()
