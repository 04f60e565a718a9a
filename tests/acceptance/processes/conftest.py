"""Services for all tests that leave them as they found them: `serve --trainers 0`, and a trainer apart."""

import time
from collections.abc import Iterator

import pytest

from tests.support.deadlines import scaled
from tests.support.process_tree import LEASE_SECONDS, TrainerProcess
from tests.support.service import ServiceProcess

_READY_SECONDS = 60


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Two workers, on the default base layer, that remove at once what is deleted."""
    folder = tmp_path_factory.mktemp("service") / "data"
    begin = time.monotonic()
    with ServiceProcess(folder, workers=2, trainers=0, trash_days=0) as started:
        assert time.monotonic() - begin < scaled(_READY_SECONDS)
        yield started


@pytest.fixture(scope="package")
def trainer(service: ServiceProcess) -> Iterator[TrainerProcess]:
    """One trainer for it."""
    with TrainerProcess(service.data_dir, lease_seconds=LEASE_SECONDS) as started:
        yield started


@pytest.fixture(scope="package")
def lone_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One worker that nobody trains for, and that logs no requests; a row has 64 numbers."""
    folder = tmp_path_factory.mktemp("lone") / "data"
    with ServiceProcess(folder, base="random:64,10,1", trainers=0, log_requests="none", forks=False) as started:
        yield started
