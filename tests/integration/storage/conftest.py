"""One S3 server for all tests of this folder, and places of blobs in it and in a folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.storage.blob_location import BlobLocation
from tests.support.hostile_proxy import HostileProxy
from tests.support.object_server import ObjectServer, new_url, object_server


@pytest.fixture(scope="package")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """The server; the variables of this process name it."""
    with object_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def in_bucket(s3: ObjectServer, tmp_path: Path) -> BlobLocation:
    """An empty prefix of a bucket."""
    return BlobLocation(folder=tmp_path / "data", url=new_url())


@pytest.fixture(params=["folder", "bucket"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> BlobLocation:
    """An empty place of each kind."""
    if request.param == "folder":
        return BlobLocation(folder=tmp_path / "data")
    place: BlobLocation = request.getfixturevalue("in_bucket")
    return place


@pytest.fixture
def proxy(s3: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileProxy]:
    """A proxy in front of the server, which the variables of this process name for this test."""
    opened = HostileProxy(s3.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", opened.url)
    yield opened
    opened.close()
