"""One service for all tests of this folder that leave it as they found it."""

import time
from collections.abc import Iterator

import pytest

from tests.harness import ServiceProcess

_READY_SECONDS = 60


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Two workers and a trainer, started in a folder that holds packages of our packages' names."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for package in ("app", "adapters"):
        (elsewhere / package).mkdir()
        (elsewhere / package / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    folder = tmp_path_factory.mktemp("service") / "data"
    begin = time.monotonic()
    with ServiceProcess(folder, cwd=elsewhere, workers=2, lease_seconds=1) as started:
        assert time.monotonic() - begin < _READY_SECONDS
        yield started
