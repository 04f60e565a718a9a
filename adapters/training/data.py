"""The rows that an adapter is trained on, on their way from the request to the fit."""

# N rows · I in_features · O out_features · R rank
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from adapters.adapter import digest_of


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """Inputs and targets, and the factors to start from where they were given.

    inputs_NI: (N, I) float32. targets: (N, O) float32, or (N,) int64 class indices. start_OR: (O, R) and
    start_RI: (R, I) float32, or both None.
    """

    inputs_NI: Tensor
    targets: Tensor
    start_OR: Tensor | None = None
    start_RI: Tensor | None = None

    @property
    def rows(self) -> int:
        """N."""
        return self.inputs_NI.shape[0]

    def digest(self) -> str:
        """`sha256:` + hex over inputs and targets."""
        return digest_of(save({"inputs": self.inputs_NI, "targets": self.targets}))

    def to_bytes(self) -> bytes:
        """A safetensors file of everything."""
        tensors = {"inputs": self.inputs_NI, "targets": self.targets}
        if self.start_OR is not None and self.start_RI is not None:
            tensors |= {"A": self.start_OR, "B": self.start_RI}
        return save(tensors)

    @classmethod
    def from_bytes(cls, content: bytes) -> "TrainingData":
        """What `to_bytes` made."""
        tensors = load(content)
        return cls(tensors["inputs"], tensors["targets"], tensors.get("A"), tensors.get("B"))

    def split(self, held_out: int, generator: torch.Generator) -> "tuple[TrainingData, TrainingData | None]":
        """The rows to train on and, drawn at random, those held out (None where `held_out` is 0)."""
        if held_out == 0:
            return self, None
        order_N = torch.randperm(self.rows, generator=generator)
        return self._take(order_N[held_out:].sort().values), self._take(order_N[:held_out].sort().values)

    def to(self, device: torch.device) -> "TrainingData":
        """The same rows on a device."""
        moved = (None if t is None else t.to(device) for t in (self.start_OR, self.start_RI))
        return TrainingData(self.inputs_NI.to(device), self.targets.to(device), *moved)

    def _take(self, rows_K: Tensor) -> "TrainingData":
        return TrainingData(self.inputs_NI[rows_K], self.targets[rows_K], self.start_OR, self.start_RI)
