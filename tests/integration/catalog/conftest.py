"""A catalogue of its own for each test."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.catalog.catalog import Catalog
from adapters.jobs.queue import JobQueue
from tests.support.databases import open_catalog


@pytest.fixture
def folder(data_folder: Path) -> Path:
    """Where the catalogue lies."""
    return data_folder


@pytest.fixture
def catalog(folder: Path) -> Iterator[Catalog]:
    """An empty catalogue."""
    opened = open_catalog(folder, now=time.time)
    yield opened
    opened.database.close()


@pytest.fixture
def queue(catalog: Catalog) -> JobQueue:
    """Its queue."""
    return JobQueue(catalog.database, catalog.writer, now=time.time, lease_seconds=15)
