"""A service that may open no more files says so, and that the request may be sent again."""

import errno
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from adapters.datasets.table import Table
from adapters.storage.blobs import FolderBlobs
from tests.conftest import Serve
from tests.integration.serving.test_fast_path import THROUGH_ASGI

UPLOAD = {"A": [[1.0]] * 2, "B": [[1.0] * 10]}
QUESTION = {"adapter": "acme", "inputs": [[0.0] * 10]}
NUMBERS = [errno.EMFILE, errno.ENFILE]


def failing(number: int) -> Any:
    """A function that fails as the system does."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", NUMBERS)
def test_an_upload_without_a_file_to_write_can_be_sent_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    client, _ = serve()
    with monkeypatch.context() as patched:
        patched.setattr(FolderBlobs, "write", failing(number))
        refused = client.put("/adapters/acme", json=UPLOAD)

    assert (refused.status_code, refused.json()["code"]) == (503, "too_many_open_files")
    assert refused.headers["retry-after"] == "1"
    assert client.put("/adapters/acme", json=UPLOAD).status_code == 201


@pytest.mark.parametrize("headers", [{}, THROUGH_ASGI])
def test_a_prediction_without_a_file_to_read_can_be_sent_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    client, _ = serve()
    client.put("/adapters/acme", json=UPLOAD).raise_for_status()
    with monkeypatch.context() as patched:
        patched.setattr("adapters.storage.blobs.os.open", failing(errno.EMFILE))
        refused = client.post("/predict", json=QUESTION, headers=headers)

    assert (refused.status_code, refused.json()["code"]) == (503, "too_many_open_files")
    assert client.post("/predict", json=QUESTION, headers=headers).status_code == 200


def test_a_data_set_that_cannot_be_opened_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pa, "memory_map", failing(errno.EMFILE))
    with pytest.raises(OSError, match="Too many open files"):
        Table.open(tmp_path / "a")
