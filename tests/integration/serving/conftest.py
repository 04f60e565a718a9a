"""A service with a few adapters, shared by the tests of this folder."""

from collections.abc import Iterator

import httpx
import pytest

from adapters.catalog.versions import Publication, Source
from app.service import Service
from app.settings import Settings
from tests.support.dense_oracle import random_adapter
from tests.support.service import serving

Running = tuple[httpx.Client, Service]


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A client and the service behind it: a 10 → 2 base layer, `acme` with versions 1 and 2, `globex` with another
    rank, scaling and a bias, and `draft`, of which no version is live."""
    settings = Settings(base="random:10,2,42", data_dir=tmp_path_factory.mktemp("models") / "data", max_rows=64)
    made = {
        "acme": [random_adapter(2, 10, 1, seed=1), random_adapter(2, 10, 3, seed=2)],
        "globex": [random_adapter(2, 10, 4, alpha=-2.0, bias=True, seed=3)],
        "draft": [random_adapter(2, 10, 1, seed=4)],
    }
    with serving(settings) as (client, service):
        for name, adapters in made.items():
            for adapter in adapters:
                publication = Publication(
                    name=name, adapter=adapter, base=service.base, source=Source.UPLOAD, moves_live=name != "draft"
                )
                service.catalog.publish([publication], tenant="default")
        yield client, service
