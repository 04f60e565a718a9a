"""Checkpoints that a trainer on any machine can continue from: files of this machine, and their copies in a bucket.

A fit writes its checkpoints to a file, whether or not the bucket answers. The trainer uploads a file that has changed
in a thread of its own, so that an upload delays no heartbeat.
"""

import logging
from collections.abc import Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from adapters.errors import LoraplexError
from adapters.storage.object_blobs import ObjectBlobs
from adapters.training.gradient.checkpoint import CheckpointFolder

# Longest time that a trainer which stops waits for its last upload.
_SECONDS_TO_UPLOAD = 5.0

log = logging.getLogger(__name__)


class CheckpointObjects(CheckpointFolder):
    """Folder of checkpoints with copies in a bucket: one object, `{job}.{fence}`, for each claim of a job."""

    def __init__(self, folder: Path, blobs: ObjectBlobs) -> None:
        super().__init__(folder)
        self._blobs = blobs
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._upload: Future[None] | None = None
        # Path and time of the last change of the file that was uploaded last.
        self._uploaded: tuple[Path, int] | None = None

    def take_over(self, job_id: str, fence: int) -> Path:
        """Return the path of a claim's checkpoint, after moving the latest checkpoint of earlier claims there.

        That of another machine is fetched. If the bucket does not answer, the fit continues from what is here.
        """
        here = max((earlier for earlier, _ in self._earlier(job_id, fence)), default=-1)
        path = super().take_over(job_id, fence)
        try:
            copied = max((earlier for earlier in self._copies(job_id) if earlier < fence), default=-1)
            if copied > here:
                path.parent.mkdir(exist_ok=True)
                self._blobs.fetch_checkpoint(f"{job_id}.{copied}", path)
        except (LoraplexError, OSError) as error:
            log.warning("job %s continues without the checkpoints of other machines: %s", job_id, error)
        return path

    def save(self, job_id: str, fence: int, *, waits: bool = False) -> None:
        """Upload a claim's checkpoint in the background if it has changed; with `waits`, wait for some seconds.

        An upload that fails is repeated with the next checkpoint.
        """
        path = self.path_of(job_id, fence)
        with suppress(FileNotFoundError):
            version = (path, path.stat().st_mtime_ns)
            if version != self._uploaded and (waits or self._upload is None or self._upload.done()):
                self._uploaded = version
                self._upload = self._thread.submit(self._put, f"{job_id}.{fence}", path)
        if waits and self._upload is not None:
            with suppress(TimeoutError):
                self._upload.result(_SECONDS_TO_UPLOAD)

    def _put(self, name: str, path: Path) -> None:
        try:
            self._blobs.put_checkpoint(name, path)
        except (LoraplexError, OSError) as error:
            log.warning("the checkpoint %s is not uploaded: %s", name, error)

    def drop(self, job_id: str) -> None:
        """Remove the checkpoints of a job, here and in the bucket; those that cannot be removed now stay."""
        super().drop(job_id)
        with suppress(LoraplexError):
            self._blobs.remove_checkpoints([f"{job_id}.{fence}" for fence in self._copies(job_id)])

    def jobs(self) -> Set[str]:
        """Return the ids of the jobs that have checkpoints: only those here if the bucket does not answer."""
        jobs = super().jobs()
        with suppress(LoraplexError):
            return jobs | {name.rpartition(".")[0] for name in self._blobs.checkpoints()}
        return jobs

    def _copies(self, job_id: str) -> list[int]:
        """Return the fences of a job's checkpoints in the bucket."""
        fences = (name.rpartition(".")[2] for name in self._blobs.checkpoints() if name.startswith(f"{job_id}."))
        return [int(fence) for fence in fences if fence.isdecimal()]
