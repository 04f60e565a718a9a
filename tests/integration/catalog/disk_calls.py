"""The order in which a test's files and folders are synced and renamed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SYNC, RENAME = "sync", "rename"


class _Call(NamedTuple):
    name: str
    inode: int
    size: int


class DiskCalls:
    """Records the syncs and renames of this process, by inode: a rename keeps it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._calls: list[_Call] = []
        monkeypatch.setattr(os, "fsync", self._recorded(SYNC, os.fsync))
        monkeypatch.setattr(os, "fdatasync", self._recorded(SYNC, os.fdatasync))
        monkeypatch.setattr(os, "rename", self._recorded(RENAME, os.rename))
        monkeypatch.setattr(os, "replace", self._recorded(RENAME, os.replace))

    def assert_durable(self, path: Path) -> None:
        """Assert that the whole file was synced, then renamed to `path`, then that its folder was synced."""
        file, folder = path.stat(), path.parent.stat()
        synced_file, renamed = _Call(SYNC, file.st_ino, file.st_size), _Call(RENAME, file.st_ino, file.st_size)
        of_file = [call for call in self._calls if call.inode == file.st_ino]
        assert of_file == [synced_file, renamed], f"calls on {path}: {of_file}"
        later = self._calls[self._calls.index(renamed) :]
        assert [call for call in later if (call.name, call.inode) == (SYNC, folder.st_ino)], f"{path.parent}: no sync"

    def _recorded(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            # Before the call: a rename takes the name away.
            status = os.stat(target)
            result = real(target, *arguments, **options)
            self._calls.append(_Call(name, status.st_ino, status.st_size))
            return result

        return call
