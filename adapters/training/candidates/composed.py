"""Updates of the base layer before they are adapters: of one group, or of a stack of groups."""

# C outputs of the task · I in_features · N rows · R rank · G groups · O out_features
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adapters.errors import Diverged
from adapters.lora.adapter import Adapter
from adapters.training.closed_form.solver import balanced_factors

# Share of the energy of the change of the outputs that a smaller rank may lose.
_LOST_ENERGY = 1e-4


class Composed(NamedTuple):
    """Update of the base layer, (C, I), or of each group of a stack, (G, C, I), in float64."""

    delta_CI: Tensor
    bias_C: Tensor | None

    def outputs(self, x_NI: Tensor) -> Tensor:
        """Return the change of the outputs, (…, N, C)."""
        change_NC = x_NI @ self.delta_CI.mT
        return change_NC if self.bias_C is None else change_NC + self.bias_C[..., None, :]

    def bounded(self, covariance_II: Tensor, max_rank: int) -> "Composed":
        """Return the update at the rank that its adapter has."""
        basis_CR, _ = self._basis(covariance_II, max_rank)
        return Composed(basis_CR @ (basis_CR.mT @ self.delta_CI), self.bias_C)

    def _basis(self, covariance_II: Tensor, max_rank: int) -> tuple[Tensor, Tensor]:
        """Return a basis of the outputs of each update, (…, C, R), and its rank, (…); further columns are 0.

        The rank is the smallest that loses no visible part of the update, measured by the change of the outputs for
        inputs of this covariance.
        """
        spread = covariance_II.diagonal().mean() * 0.1
        moved_CI = self.delta_CI @ covariance_II + spread * self.delta_CI
        values_C, vectors_CC = torch.linalg.eigh(moved_CI @ self.delta_CI.mT)
        values_C, vectors_CC = values_C.flip(-1).clamp_min(0), vectors_CC.flip(-1)
        total_1 = values_C.sum(-1, keepdim=True)
        is_visible_C = total_1 - values_C.cumsum(-1) > _LOST_ENERGY * total_1
        ranks = (is_visible_C.sum(-1) + 1).clamp_max(min(max_rank, values_C.shape[-1]))
        R = int(ranks.max())
        return vectors_CC[..., :R] * (torch.arange(R) < ranks[..., None])[..., None, :], ranks

    def adapters(self, covariance_II: Tensor, max_rank: int, outputs: int, **names: Any) -> list[Adapter | Diverged]:
        """Return the adapter of each group of a stack, with alpha equal to its rank, or why there is none."""
        basis_GCR, ranks_G = self._basis(covariance_II, max_rank)
        a_GCR, b_GRI = balanced_factors(self.delta_CI.mT, basis_GCR, scaling=1.0)
        padding = outputs - a_GCR.shape[1]
        a_GOR, bias_GO = functional.pad(a_GCR, (0, 0, 0, padding)), None
        if self.bias_C is not None:
            bias_GO = functional.pad(self.bias_C.float(), (0, padding))
        results: list[Adapter | Diverged] = []
        for index, rank in enumerate(ranks_G.tolist()):
            # Clones, because a view would keep the whole stack in memory.
            a_OR, b_RI = a_GOR[index, :, :rank].contiguous().clone(), b_GRI[index, :rank].contiguous().clone()
            bias_O = None if bias_GO is None else bias_GO[index].clone()
            if all(bool(part.isfinite().all()) for part in (a_OR, b_RI, bias_O) if part is not None):
                results.append(Adapter(a_OR, b_RI, bias_O, float(rank), **names))
            else:
                expected = "inputs and targets of smaller magnitude"
                detail = "the adapter has factors past what float32 holds"
                results.append(Diverged(detail, step=1, expected=expected))
        return results

    def adapter(self, covariance_II: Tensor, max_rank: int, outputs: int, **names: Any) -> Adapter:
        """Return the adapter of one update; raise `Diverged`."""
        stack = Composed(self.delta_CI[None], None if self.bias_C is None else self.bias_C[None])
        (result,) = stack.adapters(covariance_II, max_rank, outputs, **names)
        if isinstance(result, Diverged):
            raise result
        return result
