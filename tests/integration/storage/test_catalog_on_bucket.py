"""The tests of publishing and of pending blobs once more, with the blobs in a bucket."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from adapters.catalog.catalog import Catalog
from adapters.jobs.queue import JobQueue
from adapters.storage.blob_location import BlobLocation
from tests.integration.catalog import test_pending_blobs, test_publish
from tests.support.object_server import objects_in

_SUITES = (test_pending_blobs, test_publish)
# It puts a file into the folder of blobs.
_ABOUT_FILES = {"test_a_sweep_removes_what_no_row_refers_to_and_nothing_else"}

for _suite in _SUITES:
    globals().update({name: test for name, test in vars(_suite).items() if name.startswith("test_") or name == "other"})
for _name in _ABOUT_FILES:
    del globals()[_name]


@pytest.fixture(autouse=True)
def _in_bucket(in_bucket: BlobLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests open catalogues on the bucket, and look into it."""
    stand_ins = {
        "Catalog": partial(Catalog, blobs=in_bucket),
        "stored_files": lambda _folder: objects_in(in_bucket, "blobs"),
        "quarantined_files": lambda _folder: {name.partition("-")[2] for name in objects_in(in_bucket, "quarantine")},
    }
    for suite in _SUITES:
        for name, stand_in in stand_ins.items():
            if hasattr(suite, name):
                monkeypatch.setattr(suite, name, stand_in)


@pytest.fixture
def folder(in_bucket: BlobLocation) -> Path:
    return in_bucket.folder


@pytest.fixture
def queue(catalog: Catalog) -> JobQueue:
    return JobQueue(catalog.database, catalog.writer, now=time.time, lease_seconds=15)


@pytest.fixture
def catalog(in_bucket: BlobLocation) -> Iterator[Catalog]:
    opened = Catalog(in_bucket.folder, now=time.time, blobs=in_bucket)
    yield opened
    opened.close()
