"""Data of a fit: a cache may evict the file while its rows are sorted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.training.execution import fit_child


def test_a_file_that_the_cache_evicts_during_the_sort_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"12345")

    def sort_by_group(evicted: Path) -> tuple[str, int]:
        evicted.unlink()
        return "sorted", 3

    fit: Any = object.__new__(fit_child._Fit)
    notes: list[str] = []
    fit._blobs = SimpleNamespace(local=lambda _: path)
    fit._request = SimpleNamespace(data="blob", job=SimpleNamespace(scratch_bytes=10))
    fit._share = None
    fit._scratch_folder, fit._memory_bytes = tmp_path, 2**30
    fit._send = lambda note: notes.append(note.text)
    monkeypatch.setattr(fit_child, "Scratch", lambda *_, **__: SimpleNamespace(sort_by_group=sort_by_group))
    monkeypatch.setattr(fit_child, "_set_mapped_from", lambda _: None)
    assert fit._open_data() == "sorted"
    assert "(5 bytes, 3 buckets, " in notes[0]
