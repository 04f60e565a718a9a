"""A service that trains, shared by the tests of this folder."""

from collections.abc import Iterator

import httpx
import pytest
from safetensors.torch import save_file

from app.service import Service
from app.settings import Settings
from tests.support import training_oracle as world
from tests.support.service import serving

Running = tuple[httpx.Client, Service]


@pytest.fixture(scope="package")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A client and the service behind it: `training_world`'s base layer, from a file, and a trainer."""
    folder = tmp_path_factory.mktemp("service")
    save_file({"weight": world.WEIGHT, "bias": world.BIAS}, folder / "base.safetensors")
    settings = Settings(base=str(folder / "base.safetensors"), data_dir=folder / "data")
    with serving(settings, trainer=True) as both:
        yield both


@pytest.fixture
def trained(running: Running) -> httpx.Client:
    """A client of the shared service; every test trains under names of its own."""
    return running[0]
