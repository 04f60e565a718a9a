"""A tenant with a training script of its own: plain torch, and files as PEFT writes them.

It knows loraplex only by the base layer's file.
"""

# N rows · I in_features · O out_features · R rank
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from demo.digits import Digits

BASE_FILE = Path(__file__).resolve().parent.parent / "adapters" / "bundled" / "digits.safetensors"
STEPS = 200
LEARNING_RATE = 0.01


def train_elsewhere(digits: Digits, folder: Path, *, rank: int) -> None:
    """Train a LoRA adapter on the frozen layer, all rows in every step, and save it in `folder`."""
    torch.set_num_threads(1)
    base = load_file(BASE_FILE)
    x_NI = torch.tensor(digits.images, dtype=torch.float32)
    target_N = torch.tensor(digits.labels)
    frozen_NO = x_NI @ base["weight"].T + base["bias"]

    out_features, in_features = base["weight"].shape
    generator = torch.Generator().manual_seed(0)
    down_RI = (torch.randn(rank, in_features, generator=generator) / in_features**0.5).requires_grad_()
    up_OR = torch.zeros(out_features, rank, requires_grad=True)
    optimizer = torch.optim.AdamW([down_RI, up_OR], lr=LEARNING_RATE, weight_decay=0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(frozen_NO + x_NI @ down_RI.T @ up_OR.T, target_N)
        loss.backward()
        optimizer.step()
    _save_as_peft_does(folder, down_RI.detach(), up_OR.detach())


def _save_as_peft_does(folder: Path, down_RI: torch.Tensor, up_OR: torch.Tensor) -> None:
    folder.mkdir()
    module = "base_model.model.linear"
    factors = {f"{module}.lora_A.weight": down_RI, f"{module}.lora_B.weight": up_OR}
    save_file(factors, folder / "adapter_model.safetensors")
    rank = down_RI.shape[0]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["linear"]}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
