"""The contract of the seam `Blobs`, on a folder and on a bucket."""

import hashlib
import os
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest

from adapters.errors import BlobCorrupt, StorageFailed
from adapters.storage import object_blobs
from adapters.storage.blob_location import BLOB_CACHE, BlobLocation
from adapters.storage.blobs import BlobPart, Blobs
from tests.support.object_server import bucket_of

CONTENT = bytes(range(256)) * 40
NAME = f"{10:012x}-{1:032x}"
OTHER = f"{11:012x}-{2:032x}"


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _part(offset: int, length: int, *, name: str = NAME) -> BlobPart:
    return BlobPart(name, offset, length, _digest(CONTENT[offset : offset + length]))


@pytest.fixture
def blobs(location: BlobLocation) -> Blobs:
    opened = location.open()
    opened.create_folder()
    opened.write(NAME, CONTENT)
    return opened


@pytest.fixture(params=["warm", "cold"])
def read(request: pytest.FixtureRequest, blobs: Blobs, location: BlobLocation) -> Blobs:
    """Return the blobs, with local copies of their bytes (`warm`) or without (`cold`)."""
    if request.param == "cold":
        _forget_copies(location)
    return blobs


def _forget_copies(location: BlobLocation) -> None:
    if location.url is not None:
        for path in (location.folder / BLOB_CACHE).iterdir():
            path.unlink()


def _damage(location: BlobLocation, content: bytes | None, *, name: str = NAME) -> None:
    """Replace, or remove, what is stored under a name, as no program of this project does."""
    _forget_copies(location)
    if location.url is not None:
        bucket = bucket_of(location)
        bucket.delete(f"blobs/{name}")
        if content is not None:
            bucket.put(f"blobs/{name}", content, attributes={"sha256": hashlib.sha256(CONTENT).hexdigest()})
        return
    path = location.folder / "blobs" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def test_what_was_written_is_read_whole_and_in_parts(read: Blobs) -> None:
    assert read.read(NAME) == CONTENT
    assert read.read(NAME, offset=300, length=5, digest=_digest(CONTENT[300:305])) == CONTENT[300:305]
    assert read.read(NAME, digest=_digest(CONTENT)) == CONTENT
    assert read.local(NAME, size=len(CONTENT), digest=_digest(CONTENT)).read_bytes() == CONTENT
    assert read.has_digest(NAME, _digest(CONTENT))
    assert read.has_digest(NAME, _digest(CONTENT[7:9]), offset=7, length=2)


def test_parts_come_in_the_order_of_the_request_and_each_with_its_own_error(read: Blobs) -> None:
    read.write(OTHER, CONTENT[::-1])
    wrong, beyond = _part(0, 9)._replace(offset=1), _part(len(CONTENT) - 3, 10)
    parts = [_part(5000, 70), _part(0, 10), wrong, beyond, _part(2, 2, name=f"{0:032x}"), _part(5000, 70)]
    reverse = BlobPart(OTHER, 1, 4, _digest(CONTENT[::-1][1:5]))
    first, second, *errors, again, other = read.read_parts([*parts, reverse])
    assert (first, second, again, other) == (CONTENT[5000:5070], CONTENT[:10], first, CONTENT[::-1][1:5])
    assert [type(error) for error in errors] == [BlobCorrupt] * 3


def test_a_writer_is_called_with_a_file_and_its_error_leaves_nothing(blobs: Blobs) -> None:
    blobs.write(OTHER, lambda file: file.write(CONTENT[:4]))
    assert blobs.read(OTHER) == CONTENT[:4]
    name = f"{12:012x}-{3:032x}"

    def fail(file: BinaryIO) -> None:
        file.write(CONTENT)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        blobs.write(name, fail)
    assert set(blobs.names(with_temporary=True)) == {NAME, OTHER}
    with pytest.raises(BlobCorrupt):
        blobs.read(name)


@pytest.mark.parametrize(
    "content",
    [None, CONTENT[:-1], b"", CONTENT + b"x", bytes(len(CONTENT))],
    ids=["gone", "cut", "empty", "longer", "other"],
)
def test_damage_is_found_by_every_read(blobs: Blobs, location: BlobLocation, content: bytes | None) -> None:
    _damage(location, content)
    assert not blobs.has_digest(NAME, _digest(CONTENT))
    with pytest.raises(BlobCorrupt):
        blobs.read(NAME, digest=_digest(CONTENT))
    with pytest.raises(BlobCorrupt):
        blobs.local(NAME, size=len(CONTENT), digest=_digest(CONTENT))
    tail = _part(len(CONTENT) - 5, 5)
    if content != CONTENT + b"x":
        with pytest.raises(BlobCorrupt):
            blobs.read(NAME, offset=tail.offset, length=5, digest=tail.digest)
        (error,) = blobs.read_parts([tail])
        assert isinstance(error, BlobCorrupt)


def test_a_cut_off_blob_still_gives_the_parts_before_the_cut(blobs: Blobs, location: BlobLocation) -> None:
    _damage(location, CONTENT[:1000])
    early, late = blobs.read_parts([_part(0, 100), _part(990, 100)])
    assert early == CONTENT[:100]
    assert isinstance(late, BlobCorrupt)


def test_the_copy_for_a_check_is_what_is_stored_now(blobs: Blobs, location: BlobLocation) -> None:
    _damage(location, CONTENT[:9])
    with blobs.stored_copy(NAME) as path:
        assert path.read_bytes() == CONTENT[:9]
    with blobs.stored_copy(OTHER) as path:
        assert not path.exists()


def test_names_are_listed_and_those_after_a_revision(blobs: Blobs) -> None:
    old = f"{3:032x}"
    for name in (OTHER, old):
        blobs.write(name, b"x")
    assert set(blobs.names()) == {old, NAME, OTHER}
    assert (blobs.names_after(10), blobs.names_after(11), set(blobs.names_after(9))) == ([OTHER], [], {NAME, OTHER})


def test_a_removed_blob_is_gone_and_its_bytes_are_returned(blobs: Blobs) -> None:
    assert blobs.remove([NAME, OTHER]) == len(CONTENT)
    assert blobs.names() == []
    with pytest.raises(BlobCorrupt):
        blobs.local(NAME)


def test_blobs_in_quarantine_are_removed_after_their_days(location: BlobLocation) -> None:
    now = [1_800_000_000.0]
    blobs = replace(location, quarantine_days=7).open(now=lambda: now[0])
    blobs.create_folder()
    for name in (NAME, OTHER):
        blobs.write(name, CONTENT)
    blobs.set_aside([NAME, f"{9:032x}"])
    assert blobs.names() == [OTHER]
    now[0] += 6 * 86_400
    assert blobs.purge() == 0
    assert blobs.discard([OTHER]) == 1
    now[0] += 2 * 86_400
    assert blobs.purge() == len(CONTENT)
    now[0] += 7 * 86_400
    assert blobs.purge() == len(CONTENT)


def test_what_is_kept_aside_is_never_purged(location: BlobLocation, blobs: Blobs) -> None:
    place = blobs.keep_aside([NAME])
    assert blobs.names() == []
    assert replace(location, quarantine_days=0).open(now=lambda: 4e9).purge() == 0
    if location.url is None:
        assert (Path(place) / NAME).read_bytes() == CONTENT
    else:
        key = place.removeprefix(location.url).strip("/")
        assert bytes(bucket_of(location).get(f"{key}/{NAME}").bytes()) == CONTENT


def test_the_store_id_is_what_was_written_last(blobs: Blobs) -> None:
    assert blobs.read_store_id() is None
    for store_id in ("a" * 32, "b" * 32):
        blobs.write_store_id(store_id)
        assert blobs.read_store_id() == store_id
    assert blobs.names() == [NAME]


def test_of_machines_that_write_one_name_one_succeeds(in_bucket: BlobLocation, tmp_path: Path) -> None:
    """A name is random, so that this never happens: a PUT is create-only all the same."""
    contents = [bytes([number]) * 50_000 for number in range(6)]
    machines = [replace(in_bucket, folder=tmp_path / str(number)).open() for number in range(len(contents))]
    barrier, written = threading.Barrier(len(contents)), []

    def write(number: int) -> None:
        machines[number].create_folder()
        barrier.wait()
        with suppress(StorageFailed):
            machines[number].write(OTHER, contents[number])
            written.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(contents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = written
    for number, machine in enumerate(machines):
        assert machine.read(OTHER) == contents[winner], number


def test_a_large_blob_is_uploaded_in_parts(in_bucket: BlobLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_blobs, "_SINGLE_PUT_BYTES", 1000)
    monkeypatch.setattr(object_blobs, "_MIN_PART_BYTES", 5 * 2**20)
    blobs, content = in_bucket.open(), os.urandom(11 * 2**20)
    blobs.create_folder()
    blobs.write(NAME, content)
    _forget_copies(in_bucket)
    assert blobs.local(NAME, digest=_digest(content)).read_bytes() == content
    # S3's tag of an object says how many parts it came in.
    assert str(bucket_of(in_bucket).head(f"blobs/{NAME}")["e_tag"]).strip('"').endswith("-3")


def test_a_mapped_blob_stays_readable_after_it_was_removed(blobs: Blobs) -> None:
    with blobs.local(NAME).open("rb") as file:
        blobs.remove([NAME])
        assert file.read() == CONTENT
        assert os.fstat(file.fileno()).st_nlink == 0
