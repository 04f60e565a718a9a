"""Where a training stands, on disk: an attempt after a death goes on from here, to the same last bit."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_METADATA_KEY = "loraplex"


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], *, of: str) -> None:
    """Replace the file by a new one, whole or not at all. `of` says of which training it is."""
    temporary = path.with_suffix(".tmp")
    text = json.dumps({**about, "of": of})
    content = save({name: t.contiguous() for name, t in tensors.items()}, metadata={_METADATA_KEY: text})
    path.parent.mkdir(exist_ok=True)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path, *, of: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `save_checkpoint` wrote last of this training; None where that cannot be read: it begins again."""
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()[_METADATA_KEY])
            if about["of"] != of:
                return None
            # Copies: the file may be replaced while they are in use.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, about  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
