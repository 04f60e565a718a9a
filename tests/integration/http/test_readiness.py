"""`/readyz` answers 503 if the catalogue cannot be read, and does not hide a defect of the service."""

import logging

import pytest
from sqlalchemy.exc import SQLAlchemyError

from adapters.catalog.catalog import Catalog
from adapters.errors import StorageFailed
from tests.conftest import Serve


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (SQLAlchemyError("no connection"), 503, "not_ready"),
        (OSError("no disk"), 503, "not_ready"),
        (StorageFailed("no disk"), 503, "storage_failed"),
        (RuntimeError("a defect"), 500, "internal_error"),
    ],
)
def test_only_a_catalogue_that_cannot_be_read_means_not_ready(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: int,
    code: str,
) -> None:
    client, _ = serve()

    def fail(_: Catalog) -> int:
        raise error

    monkeypatch.setattr(Catalog, "revision", fail)
    with caplog.at_level(logging.ERROR):
        answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert ("a defect" in caplog.text) == (status == 500)
