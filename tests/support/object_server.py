"""A real S3 server (SeaweedFS) on loopback, as a child process with a temporary folder."""

import json
import os
import random
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import obstore
import pytest
from obstore.store import S3Store

from adapters.storage.blob_location import BlobLocation
from tests.support.deadlines import scaled
from tests.support.external_programs import program
from tests.support.service import eventually

_BUCKET = "loraplex"
_ACCESS_KEY, _SECRET_KEY = "test-access-key", "test-secret-key"
_SECONDS_TO_START = 60.0


class ObjectServer(NamedTuple):
    """Address of a server, and the process that answers there."""

    port: int
    process: "subprocess.Popen[bytes]"

    @property
    def environment(self) -> dict[str, str]:
        """What the service finds the server by."""
        return aws_environment(f"http://127.0.0.1:{self.port}")


def aws_environment(endpoint: str) -> dict[str, str]:
    """The usual variables for a server at this address."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": _ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": _SECRET_KEY,
        "AWS_REGION": "us-east-1",
    }


def new_url() -> str:
    """A prefix of the bucket that no other test uses."""
    return f"s3://{_BUCKET}/{uuid.uuid4().hex}"


def bucket_of(location: BlobLocation) -> S3Store:
    """The objects of a location, without this project's code. The `AWS_*` variables must name the server."""
    assert location.url is not None
    return S3Store.from_url(location.url, client_options={"allow_http": True})


def objects_in(location: BlobLocation, folder: str) -> set[str]:
    """The names of the objects in a folder of the bucket."""
    chunks = bucket_of(location).list(f"{folder}/")
    return {entry["path"].removeprefix(f"{folder}/") for chunk in chunks for entry in chunk}


def copy_objects(source: BlobLocation, target: BlobLocation) -> None:
    """Copy the objects of a location to another one."""
    bucket = bucket_of(target)
    for chunk in bucket_of(source).list():
        for entry in chunk:
            found = bucket_of(source).get(entry["path"])
            bucket.put(entry["path"], bytes(found.bytes()), attributes=found.attributes)


@contextmanager
def object_server(folder: Path, *, port: int | None = None) -> Iterator[ObjectServer]:
    """Start a server whose data is in a folder; skips, or fails, the test if it is not installed."""
    weed = program(str(Path(sys.executable).with_name("weed")), "weed")
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": _ACCESS_KEY, "secretKey": _SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = _free_ports(8)
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    options = [f"-{name}={number}" for name, number in zip((*names, "s3.port.grpc", "s3.port"), ports, strict=True)]
    if port is not None:
        options[-1] = f"-s3.port={port}"
    command = [
        *(weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", *options),
        *(f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
        *("-volume.max=16", "-master.volumeSizeLimitMB=64", "-master.raftHashicorp=false"),
    ]
    with (folder / "log").open("wb") as log:
        # One thread for its work: the tests have few cores.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"GOMAXPROCS": "1"})
    try:
        server = ObjectServer(port or ports[-1], process)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment.items():
                patch.setenv(name, value)
            eventually(lambda: _answers(process), what="the start of the S3 server", seconds=_SECONDS_TO_START)
        yield server
    finally:
        process.kill()
        process.wait()
        for number in ports:
            for path in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                path.unlink()


def _answers(process: "subprocess.Popen[bytes]") -> bool:
    assert process.poll() is None, "the S3 server has ended"
    bucket = S3Store.from_url(
        f"s3://{_BUCKET}/start", client_options={"allow_http": True}, retry_config={"max_retries": 0}
    )
    began = time.monotonic()
    with suppress(obstore.exceptions.BaseError):
        # The first write makes the bucket, and the next ones wait for the volumes that the server creates.
        for number in range(5):
            bucket.put(str(number), b"x")
        return time.monotonic() - began < scaled(0.5)
    return False


def _free_ports(number: int) -> list[int]:
    """Ports that nothing listens on. The server does not accept high ones, so that the system cannot choose them."""
    free: list[int] = []
    while len(free) < number:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            if port not in free:
                free.append(port)
    return free
