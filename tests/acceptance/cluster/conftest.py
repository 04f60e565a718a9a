"""The replicas that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.support.cluster import Cluster
from tests.support.postgres_server import PostgresServer


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer) -> Iterator[Cluster]:
    """Two replicas that answer and two that train, behind HAProxy. A test leaves all of them running."""
    with Cluster(tmp_path_factory.mktemp("cluster"), postgres=postgres_server) as started:
        yield started
