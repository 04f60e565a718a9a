"""One linear layer with many adapters as PEFT has it: `LoraLayer` and the mixed batch of `adapter_names=`."""

# I in_features · O out_features · R rank
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from benchmarks.tenants import Factors


class PeftLayer:
    """PEFT's own layer, called directly: the wrappers that a whole `PeftModel` puts around it are left out."""

    def __init__(self, linear: nn.Linear, tenants: Iterable[Factors]) -> None:
        self._layer: Any = None
        self._linear = linear
        for tenant in tenants:
            self._add(tenant)

    def _add(self, tenant: Factors) -> None:
        config = LoraConfig(r=tenant.rank, lora_alpha=tenant.rank)
        if self._layer is None:
            self._layer = LoraLinear(self._linear, tenant.name, config, r=tenant.rank, lora_alpha=tenant.rank)
            self._layer.eval()
        else:
            self._layer.update_layer(tenant.name, tenant.rank, lora_alpha=tenant.rank, config=config)
        with torch.no_grad():
            # PEFT's names are the other way round.
            for part, numbers in ((self._layer.lora_A, tenant.b_RI), (self._layer.lora_B, tenant.a_OR)):
                part[tenant.name].weight.copy_(torch.from_numpy(numbers))

    def __call__(self, x_NI: Tensor, names: Sequence[str]) -> Tensor:
        """(N, I) → (N, O), row n by the adapter `names[n]`."""
        outputs: Tensor = self._layer(x_NI, adapter_names=list(names))
        return outputs
