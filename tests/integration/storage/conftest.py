"""Places of blobs in an S3 server and in a folder, and a proxy in front of the server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.storage.blob_location import BlobLocation
from tests.support.hostile_proxy import HostileProxy
from tests.support.object_server import ObjectServer, new_url


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
