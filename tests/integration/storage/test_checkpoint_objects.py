"""Checkpoints in a bucket: a trainer on another machine continues from the latest one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.storage.blob_location import BlobLocation
from adapters.storage.object_blobs import ObjectBlobs
from adapters.training.execution.checkpoint_objects import CheckpointObjects
from tests.support.hostile_proxy import HostileProxy, refuse
from tests.support.object_server import bucket_of, objects_in

Machine = Callable[[str], CheckpointObjects]


@pytest.fixture
def machine(in_bucket: BlobLocation, proxy: HostileProxy, tmp_path: Path) -> Machine:
    """Open the checkpoints of one bucket on a machine of this name."""

    def _machine(name: str) -> CheckpointObjects:
        blobs = replace(in_bucket, folder=tmp_path / name).open()
        assert isinstance(blobs, ObjectBlobs)
        blobs.create_folder()
        return CheckpointObjects(tmp_path / name / "checkpoints", blobs)

    return _machine


def _write(checkpoints: CheckpointObjects, fence: int, content: bytes) -> None:
    path = checkpoints.take_over("job", fence)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    checkpoints.save("job", fence, waits=True)


def test_another_machine_continues_from_the_latest_claim(machine: Machine, in_bucket: BlobLocation) -> None:
    a, b, c = machine("a"), machine("b"), machine("c")
    _write(a, 1, b"first")
    assert b.take_over("job", 2).read_bytes() == b"first"
    _write(b, 2, b"second")
    # A trainer that lost its claim writes to its own.
    _write(a, 1, b"late")
    assert c.take_over("job", 3).read_bytes() == b"second"
    assert a.take_over("job", 4).read_bytes() == b"second"
    assert not b.take_over("other", 1).exists()
    assert objects_in(in_bucket, "checkpoints") == {"job.1", "job.2"}
    assert a.jobs() == c.jobs() == {"job"}


def test_what_is_here_is_preferred_to_an_older_copy(machine: Machine) -> None:
    a, b = machine("a"), machine("b")
    _write(a, 1, b"first")
    b.take_over("job", 2).write_bytes(b"not uploaded yet")
    assert b.take_over("job", 3).read_bytes() == b"not uploaded yet"


def test_a_checkpoint_is_uploaded_once_for_each_change(machine: Machine, proxy: HostileProxy) -> None:
    a = machine("a")
    _write(a, 1, b"first")
    with proxy.failing(refuse):
        a.save("job", 1, waits=True)
        a.save("another", 1, waits=True)
    assert proxy.faults == 0


def test_without_the_bucket_a_fit_continues_from_what_is_here(machine: Machine, proxy: HostileProxy) -> None:
    a, b = machine("a"), machine("b")
    _write(a, 1, b"first")
    with proxy.failing(refuse):
        assert not b.take_over("job", 2).exists()
        assert a.take_over("job", 2).read_bytes() == b"first"
        _write(a, 2, b"second")
        assert a.jobs() == {"job"}
        a.drop("job")
    assert a.jobs() == {"job"}
    a.drop("job")
    assert a.jobs() == b.jobs() == set()


def test_a_damaged_copy_is_not_used(machine: Machine, in_bucket: BlobLocation) -> None:
    a, b = machine("a"), machine("b")
    _write(a, 1, b"first")
    bucket_of(in_bucket).put("checkpoints/job.1", b"other", attributes={"sha256": "0" * 64})
    assert not b.take_over("job", 2).exists()
