"""A bucket that is slow, lies, or does not answer: an error says so, and wrong bytes are never returned."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from adapters.errors import BlobCorrupt, LoraplexError, StorageFailed
from adapters.storage.blob_location import BLOB_CACHE, BlobLocation
from adapters.storage.blobs import BlobPart, Blobs
from tests.support.deadlines import scaled
from tests.support.hostile_proxy import Fault, HostileProxy, answer, cut_after, refuse, stall, swallow_answer, trickle
from tests.support.object_server import bucket_of, objects_in

CONTENT = bytes(range(256)) * 400
NAME, OTHER = f"{1:012x}-{1:032x}", f"{1:012x}-{2:032x}"
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
PART = BlobPart(NAME, 100, 50, f"sha256:{hashlib.sha256(CONTENT[100:150]).hexdigest()}")
_XML = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>no</Message></Error>"


@pytest.fixture
def blobs(proxy: HostileProxy, in_bucket: BlobLocation) -> Blobs:
    opened = in_bucket.open()
    opened.create_folder()
    opened.write(NAME, CONTENT)
    for path in (in_bucket.folder / BLOB_CACHE).iterdir():
        path.unlink()
    return opened


READS: dict[str, Callable[[Blobs], object]] = {
    "part": lambda blobs: blobs.read(NAME, offset=PART.offset, length=PART.length, digest=PART.digest),
    "parts": lambda blobs: list(blobs.read_parts([PART])),
    "whole": lambda blobs: blobs.local(NAME, digest=DIGEST).read_bytes(),
    "check": lambda blobs: blobs.has_digest(NAME, DIGEST),
}
FAULTS: dict[str, Fault] = {
    "refused": refuse,
    "cut off in the head": cut_after(20),
    "cut off in the body": cut_after(700),
    "forbidden": answer("403 Forbidden", _XML % b"AccessDenied"),
    "clock skew": answer("403 Forbidden", _XML % b"RequestTimeTooSkewed"),
    "server error": answer("500 Internal Server Error", _XML % b"InternalError"),
    "slow down": answer("503 Slow Down", _XML % b"SlowDown"),
    "not http": lambda client, _server: client.sendall(b"hello\r\n\r\n"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
@pytest.mark.parametrize("read", READS.values(), ids=list(READS))
def test_a_bucket_that_fails_is_not_a_corrupt_blob(
    blobs: Blobs, proxy: HostileProxy, fault: Fault, read: Callable[[Blobs], object]
) -> None:
    with proxy.failing(fault):
        try:
            outcome = read(blobs)
        except LoraplexError as error:
            outcome = error
    if isinstance(outcome, list):
        (outcome,) = outcome
    # An answer may be shorter than the cut.
    if outcome != CONTENT[100:150]:
        assert type(outcome) is StorageFailed
        assert "127.0.0.1" not in outcome.detail
    assert read(blobs) in ([CONTENT[100:150]], CONTENT[100:150], CONTENT, True)


@pytest.mark.parametrize(
    "body",
    [bytes(50), CONTENT[100:149], CONTENT[100:151], b""],
    ids=["other bytes", "one byte too few", "one byte too many", "nothing"],
)
def test_wrong_bytes_are_never_returned_or_kept(blobs: Blobs, proxy: HostileProxy, body: bytes) -> None:
    content_range = f"Content-Range: bytes 100-149/{len(CONTENT)}"
    last_modified = "Last-Modified: Mon, 30 Nov 2026 12:00:00 GMT"
    with proxy.failing(answer("206 Partial Content", body, content_range, 'ETag: "x"', last_modified)):
        with pytest.raises((BlobCorrupt, StorageFailed)):
            READS["part"](blobs)
        with pytest.raises((BlobCorrupt, StorageFailed)):
            READS["whole"](blobs)
    assert READS["part"](blobs) == CONTENT[100:150]
    assert READS["whole"](blobs) == CONTENT


def test_a_whole_answer_in_place_of_a_part_is_refused(blobs: Blobs, proxy: HostileProxy) -> None:
    last_modified = "Last-Modified: Mon, 30 Nov 2026 12:00:00 GMT"
    with proxy.failing(answer("200 OK", CONTENT, 'ETag: "x"', last_modified)):
        with pytest.raises((BlobCorrupt, StorageFailed)):
            READS["part"](blobs)
        (error,) = blobs.read_parts([PART])
        assert isinstance(error, BlobCorrupt | StorageFailed)


@pytest.mark.parametrize("fault", [refuse, cut_after(700), answer("500 Internal Server Error")], ids=["a", "b", "c"])
def test_a_single_failure_is_tried_again(blobs: Blobs, proxy: HostileProxy, fault: Fault) -> None:
    with proxy.failing(fault, times=1):
        assert READS["whole"](blobs) == CONTENT
    assert proxy.faults == 1


def test_a_write_whose_answer_was_lost_has_succeeded(
    blobs: Blobs, proxy: HostileProxy, in_bucket: BlobLocation
) -> None:
    with proxy.failing(swallow_answer, times=1):
        blobs.write(OTHER, CONTENT)
    assert proxy.faults == 1
    assert objects_in(in_bucket, "blobs") == {NAME, OTHER}
    assert bytes(bucket_of(in_bucket).get(f"blobs/{OTHER}").bytes()) == CONTENT


@pytest.mark.parametrize("fault", [refuse, FAULTS["forbidden"], FAULTS["server error"]], ids=["a", "b", "c"])
def test_a_write_that_fails_stores_nothing(
    blobs: Blobs, proxy: HostileProxy, in_bucket: BlobLocation, fault: Fault
) -> None:
    with proxy.failing(fault), pytest.raises(StorageFailed):
        blobs.write(OTHER, CONTENT)
    assert objects_in(in_bucket, "blobs") == {NAME}
    assert list((in_bucket.folder / BLOB_CACHE).iterdir()) == []


def test_a_slow_bucket_is_waited_for_as_long_as_it_makes_progress(blobs: Blobs, proxy: HostileProxy) -> None:
    with proxy.failing(trickle(0.02)):
        assert READS["whole"](blobs) == CONTENT


@pytest.mark.slow
def test_a_bucket_that_never_answers_is_given_up(blobs: Blobs, proxy: HostileProxy) -> None:
    with proxy.failing(stall):
        for read in ("part", "parts"):
            began = time.monotonic()
            try:
                (error,) = READS[read](blobs)  # type: ignore[misc]
            except StorageFailed as raised:
                error = raised
            assert isinstance(error, StorageFailed)
            assert time.monotonic() - began < scaled(12)


def test_blobs_that_cannot_be_removed_now_are_left(blobs: Blobs, proxy: HostileProxy, in_bucket: BlobLocation) -> None:
    with proxy.failing(refuse):
        assert blobs.remove([NAME]) == 0
        blobs.set_aside([NAME])
        assert blobs.purge() == 0
    assert objects_in(in_bucket, "blobs") == {NAME}


@pytest.mark.parametrize(
    "read",
    [lambda blobs: blobs.names(), lambda blobs: blobs.read_store_id(), READS["part"], READS["whole"], READS["check"]],
    ids=["names", "store id", "part", "whole", "check"],
)
def test_an_error_says_that_the_bucket_does_not_exist(in_bucket: BlobLocation, read: Callable[[Blobs], object]) -> None:
    blobs = replace(in_bucket, url="s3://there-is-no-such-bucket/store").open()
    blobs.create_folder()
    with pytest.raises(StorageFailed, match="the bucket does not exist"):
        read(blobs)
