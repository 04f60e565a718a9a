"""Whether a blob has the bytes that were stored, or cannot be read now, which is something else."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from adapters.errors import StorageFailed
from adapters.storage.blobs import FolderBlobs
from adapters.storage.quarantine import Quarantine

CONTENT = b"0123456789"


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    folder = FolderBlobs(tmp_path, quarantine=Quarantine(tmp_path, now=lambda: 0.0))
    folder.create_folder()
    folder.write("a", CONTENT)
    return folder


def test_a_digest_is_that_of_the_whole_blob_or_of_a_part(blobs: FolderBlobs) -> None:
    assert blobs.has_digest("a", _digest(CONTENT))
    assert blobs.has_digest("a", _digest(CONTENT[2:5]), offset=2, length=3)
    assert not blobs.has_digest("a", _digest(CONTENT[2:5]), offset=3, length=3)
    assert not blobs.has_digest("a", _digest(b"other"))


def test_a_blob_that_is_missing_or_no_file_does_not_have_the_digest(blobs: FolderBlobs, tmp_path: Path) -> None:
    (tmp_path / "blobs" / "folder").mkdir()
    os.mkfifo(tmp_path / "blobs" / "pipe")
    for name in ("missing", "folder", "pipe"):
        assert not blobs.has_digest(name, _digest(CONTENT))


@pytest.mark.parametrize("call", ["open", "stat"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE])
def test_a_blob_that_cannot_be_read_now_is_not_called_corrupt(
    blobs: FolderBlobs, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, call, fail)
    kind = OSError if code in (errno.EMFILE, errno.ENFILE) else StorageFailed
    with pytest.raises(kind, match=os.strerror(code)):
        blobs.has_digest("a", _digest(CONTENT))
