"""Where a training stands, on disk: an attempt after a death goes on from here, to the same last bit."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_METADATA_KEY = "loraplex"
_SUFFIX, _TEMPORARY = ".safetensors", ".tmp"

log = logging.getLogger(__name__)


class _File(NamedTuple):
    """One file of the folder: a checkpoint, or one that was being written."""

    job_id: str
    fence: int
    path: Path


class CheckpointFolder:
    """The folder of them: a file for each claim of a job, `{job}.{fence}.safetensors`.

    A trainer that lost its claim while it stood still may have a fit that goes on writing: into its own file, never
    into that of the next claim.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take_over(self, job_id: str, fence: int) -> Path:
        """Where a claim's checkpoint goes; what the claims before it had reached lies there when this returns."""
        mine = self._folder / f"{job_id}.{fence}{_SUFFIX}"
        earlier = sorted(
            (file.fence, file.path)
            for file in self._files()
            if file.job_id == job_id and file.fence < fence and file.path.suffix == _SUFFIX
        )
        while earlier and not mine.exists():
            with suppress(FileNotFoundError):
                earlier.pop()[1].rename(mine)
        return mine

    def drop(self, job_id: str) -> None:
        """Remove those of a job that has ended."""
        for file in self._files():
            if file.job_id == job_id:
                file.path.unlink(missing_ok=True)

    def jobs(self) -> Set[str]:
        """The jobs that have any."""
        return {file.job_id for file in self._files()}

    def _files(self) -> Iterator[_File]:
        with suppress(FileNotFoundError):
            for path in self._folder.iterdir():
                job_id, _, fence = path.stem.rpartition(".")
                if path.suffix in (_SUFFIX, _TEMPORARY) and fence.isdecimal():
                    yield _File(job_id, int(fence), path)


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], *, of: str) -> None:
    """Replace the file by a new one, whole or not at all. `of` says of which training it is.

    Where it cannot be written, as on a full disk, the training goes on: only a death costs more then.
    """
    temporary = path.with_suffix(_TEMPORARY)
    text = json.dumps({**about, "of": of})
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
