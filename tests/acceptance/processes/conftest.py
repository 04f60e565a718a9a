"""Services for all tests that leave them as they found them: `serve --trainers 0`, and a trainer apart."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.process_tree import LEASE_SECONDS, TrainerProcess
from tests.support.service import ServiceProcess

_READY_SECONDS = 60


@pytest.fixture(scope="package")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds packages of our packages' names."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for package in ("app", "adapters"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    return folder


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory, elsewhere: Path) -> Iterator[ServiceProcess]:
    """Two workers, on the default base layer."""
    folder = tmp_path_factory.mktemp("service") / "data"
    begin = time.monotonic()
    with ServiceProcess(folder, cwd=elsewhere, workers=2, trainers=0) as started:
        assert time.monotonic() - begin < _READY_SECONDS
        yield started


@pytest.fixture(scope="package")
def trainer(service: ServiceProcess, elsewhere: Path) -> Iterator[TrainerProcess]:
    """One trainer for it."""
    with TrainerProcess(service.data_dir, cwd=elsewhere, lease_seconds=LEASE_SECONDS) as started:
        yield started


@pytest.fixture(scope="package")
def lone_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One worker that nobody trains for, and that logs no requests; a row has 64 numbers."""
    folder = tmp_path_factory.mktemp("lone") / "data"
    with ServiceProcess(folder, base="random:64,10,1", trainers=0, log_requests="none") as started:
        yield started
