"""The servers that the replicas of these tests share."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster
from tests.support.object_server import ObjectServer, object_server
from tests.support.postgres_server import PostgresServer


@pytest.fixture(scope="package")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """An S3 server."""
    with object_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


Start = Callable[..., Cluster]


@pytest.fixture
def start(s3: ObjectServer, postgres_server: PostgresServer, tmp_path: Path) -> Iterator[Start]:
    """Start two replicas behind HAProxy with these settings: on a new database, and on an empty prefix of a bucket."""
    with ExitStack() as stack:

        def begin(**options: Any) -> Cluster:
            shared: dict[str, Any] = {"postgres": postgres_server, "objects": s3}
            usual = {"trainers": 0, "log_requests": "none", "lease_seconds": 60}
            return stack.enter_context(Cluster(tmp_path / "cluster", **(shared | usual | options)))

        yield begin
