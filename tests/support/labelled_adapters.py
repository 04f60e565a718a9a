"""A 10 → 5 base layer, and adapters of it whose classes are called something."""

# N rows · I in_features · O out_features
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from adapters.catalog.adapter_cache import find_adapter
from adapters.catalog.versions import Publication, Source
from adapters.lora.adapter import Adapter
from adapters.names import Reference
from app.service import Service
from app.settings import Settings
from tests.support.dense_oracle import Float64, answer, random_adapter

I, O = 10, 5
X_NI = np.random.default_rng(7).normal(size=(6, I)).astype(np.float32)
LABELS: dict[str, tuple[str | int, ...] | None] = {
    "animals": ("cat", "dog", "é:😀"),
    "codes": (40, -7, 2**53, 0, 11),
    "plain": None,
    "tags": ("a", "b", "c", "d"),
}
"""By adapter. `tags` was trained for several labels a row."""


def settings_for(folder: Path) -> Settings:
    """Those of a service with that base layer."""
    return Settings(base=f"random:{I},{O},42", data_dir=folder, max_rows=64)


def fill(service: Service) -> None:
    """Publish the adapters."""
    made: dict[str, Adapter] = {name: random_adapter(O, I, 2, seed=seed) for seed, name in enumerate(LABELS)}
    service.catalog.publish(
        [
            Publication(
                name=name,
                adapter=replace(adapter, labels=LABELS[name]),
                base=service.base,
                source=Source.UPLOAD,
                lineage={"loss": "binary_cross_entropy"} if name == "tags" else None,
            )
            for name, adapter in made.items()
        ],
        tenant="default",
    )


def dense(
    service: Service, name: str | None, x_NI: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = X_NI
) -> Float64:
    """(N, C): what the dense layer answers in float64, for the classes of an adapter."""
    adapter = None if name is None else find_adapter(service.catalog, Reference(name), tenant="default")[1]
    labels = None if name is None else LABELS[name]
    return answer(service.base, torch.from_numpy(x_NI.astype(np.float64)), adapter)[:, : len(labels or range(O))]


def names_of(name: str | None) -> list[str | int]:
    """What the classes of an adapter, or of the base layer, are called in an answer."""
    labels = None if name is None else LABELS[name]
    return list(range(O)) if labels is None else list(labels)
