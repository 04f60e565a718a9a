"""Checkpoint files. After its process has died, a training resumes from one with bit-identical results."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_METADATA_KEY = "loraplex"
_SUFFIX, _TEMPORARY = ".safetensors", ".tmp"

log = logging.getLogger(__name__)


class CheckpointFolder:
    """Folder with one checkpoint file for each claim of a job, `{job}.{fence}.safetensors`.

    The fit of a trainer that was stopped and lost its claim may still write. It writes to its own file, never to that
    of the next claim.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take_over(self, job_id: str, fence: int) -> Path:
        """Return the path of a claim's checkpoint, after moving the latest checkpoint of earlier claims there."""
        path = self.path_of(job_id, fence)
        earlier = self._earlier(job_id, fence)
        while earlier and not path.exists():
            with suppress(FileNotFoundError):
                earlier.pop()[1].rename(path)
        return path

    def path_of(self, job_id: str, fence: int) -> Path:
        """Return the path of a claim's checkpoint."""
        return self._folder / f"{job_id}.{fence}{_SUFFIX}"

    def save(self, job_id: str, fence: int, *, waits: bool = False) -> None:
        """Let trainers elsewhere find a claim's checkpoint; every trainer on this folder finds the file as it is."""

    def drop(self, job_id: str) -> None:
        """Remove the checkpoints of a job."""
        for owner, _, file in self._files():
            if owner == job_id:
                file.unlink(missing_ok=True)

    def jobs(self) -> Set[str]:
        """Return the ids of the jobs that have checkpoints."""
        return {owner for owner, _, _ in self._files()}

    def _earlier(self, job_id: str, fence: int) -> list[tuple[int, Path]]:
        """Return fence and path of the checkpoints of earlier claims, in the order of the claims."""
        return sorted(
            (earlier_fence, file)
            for owner, earlier_fence, file in self._files()
            if owner == job_id and earlier_fence < fence and file.suffix == _SUFFIX
        )

    def _files(self) -> Iterator[tuple[str, int, Path]]:
        """Yield job, fence and path of each file, complete or being written."""
        with suppress(FileNotFoundError):
            for path in self._folder.iterdir():
                job_id, _, fence = path.stem.rpartition(".")
                if path.suffix in (_SUFFIX, _TEMPORARY) and fence.isdecimal():
                    yield job_id, int(fence), path


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, of: str) -> None:
    """Replace the checkpoint atomically. `of` identifies the training.

    If it cannot be written, for example on a full disk, a warning is logged and the training continues.
    """
    temporary = path.with_suffix(_TEMPORARY)
    text = json.dumps({**metadata, "of": of})
    content = save({name: t.contiguous() for name, t in tensors.items()}, metadata={_METADATA_KEY: text})
    try:
        path.parent.mkdir(exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        log.warning("no checkpoint is written: %s", error)
        with suppress(OSError):
            temporary.unlink()


def load_checkpoint(path: Path, *, of: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and metadata of this training's checkpoint, or None without a readable one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = json.loads(file.metadata()[_METADATA_KEY])
            if metadata["of"] != of:
                return None
            # Copied, because the file may be replaced while the tensors are in use.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, metadata  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
