"""The cache on the local disk: its bound, several processes, and processes that are killed in the middle of a write."""

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.errors import StorageFull
from adapters.storage.blob_cache import BlobCache
from adapters.storage.blob_location import BLOB_CACHE, BlobLocation
from tests.support.hostile_proxy import HostileProxy, refuse, trickle
from tests.support.service import eventually

_FORK = multiprocessing.get_context("fork")
HOUR = 3600.0


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    opened = BlobCache(tmp_path / "cache", budget_bytes=200_000)
    opened.create_folder()
    return opened


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def _used(path: Path, *, seconds_ago: float) -> None:
    now = time.time()
    os.utime(path, (now - seconds_ago, now - seconds_ago))


def _fill(cache: BlobCache, name: str, content: bytes) -> Path:
    with cache.filling(name) as file:
        assert file is not None
        file.write(content)
    return cache.folder / name


def test_parts_are_read_back_at_their_offsets_and_a_hole_is_zeros(cache: BlobCache) -> None:
    cache.add_part("a", b"later", offset=100_000)
    cache.add_part("a", b"early", offset=10)
    assert cache.read("a", offset=100_000, length=5) == b"later"
    assert cache.read("a", offset=10, length=5) == b"early"
    assert cache.read("a", offset=50_000, length=4) == bytes(4)
    assert cache.read("a", offset=100_003, length=5) is None
    assert cache.read("b", offset=0, length=1) is None
    assert _bytes_in(cache.folder) < 20_000


def test_the_files_that_were_not_used_for_longest_are_evicted(cache: BlobCache) -> None:
    for number in range(4):
        cache.add_part(f"{number}", bytes([number]) * 40_000, offset=0)
        _used(cache.folder / f"{number}.part", seconds_ago=HOUR - number)
    cache.read("0", offset=0, length=1)
    for number in range(4, 7):
        cache.add_part(f"{number}", bytes([number]) * 40_000, offset=0)
    assert _bytes_in(cache.folder) <= 200_000
    left = [number for number in range(7) if cache.read(f"{number}", offset=0, length=1) is not None]
    assert left == [0, 4, 5, 6]


def test_a_whole_file_is_kept_for_a_minute_after_its_use(cache: BlobCache) -> None:
    path = _fill(cache, "data", b"x" * 150_000)
    for number in range(6):
        cache.add_part(f"{number}", bytes(40_000), offset=0)
    assert cache.whole("data") == path
    _used(path, seconds_ago=61)
    cache.add_part("last", bytes(60_000), offset=0)
    assert cache.whole("data") is None
    assert _bytes_in(cache.folder) <= 200_000


def test_a_file_larger_than_the_bound_can_be_used(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", budget_bytes=0)
    cache.create_folder()
    with _fill(cache, "data", b"x" * 5000).open("rb") as file:
        _used(cache.folder / "data", seconds_ago=HOUR)
        cache.add_part("other", b"y", offset=0)
        assert cache.whole("data") is None
        assert file.read() == b"x" * 5000
    assert _bytes_in(cache.folder) == 0


def test_a_file_that_two_fill_is_written_once(cache: BlobCache) -> None:
    writers, begun = [], threading.Event()

    def first() -> None:
        with cache.filling("data") as file:
            assert file is not None
            begun.set()
            file.write(b"first")
            eventually(lambda: len(waiting) == 1, what="the second writer")
            writers.append("first")

    def second() -> None:
        begun.wait()
        waiting.append(1)
        with cache.filling("data") as file:
            assert file is None
            writers.append("second")

    waiting: list[int] = []
    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writers == ["first", "second"]
    assert {path.name for path in cache.folder.iterdir()} == {"data"}


def _fail_to_fill(cache: BlobCache) -> None:
    with cache.filling("data") as file:
        assert file is not None
        file.write(b"half")
        raise KeyboardInterrupt


def test_an_error_of_the_first_lets_the_second_fill_it(cache: BlobCache) -> None:
    with pytest.raises(KeyboardInterrupt):
        _fail_to_fill(cache)
    assert list(cache.folder.iterdir()) == []
    assert _fill(cache, "data", b"whole").read_bytes() == b"whole"


def _write_until_killed(folder: Path, begun: Path) -> None:
    cache = BlobCache(folder, budget_bytes=200_000)
    with cache.filling("data") as file:
        assert file is not None
        file.write(b"half of it")
        file.flush()
        begun.touch()
        signal.pause()


def test_a_process_that_is_killed_in_the_middle_of_a_write_leaves_nothing_that_is_read(
    cache: BlobCache, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    process = _FORK.Process(target=_write_until_killed, args=(cache.folder, begun))
    process.start()
    eventually(begun.exists, what="the write")
    # Another process does not take the file of one that writes for abandoned.
    for number in range(8):
        cache.add_part(f"{number}", bytes(40_000), offset=0)
    assert (cache.folder / "data.tmp").exists()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert cache.whole("data") is None
    _used(cache.folder / "data.tmp", seconds_ago=HOUR)
    for number in range(8):
        cache.add_part(f"again-{number}", bytes(40_000), offset=0)
    assert not (cache.folder / "data.tmp").exists()
    assert _fill(cache, "data", b"whole").read_bytes() == b"whole"


def _content(name: str) -> bytes:
    return hashlib.shake_128(name.encode()).digest(20_000)


def _use(folder: Path, seed: int, failures: "multiprocessing.SimpleQueue[str]") -> None:
    """Fill and read the same names as other processes; report a whole file with other bytes."""
    cache = BlobCache(folder, budget_bytes=200_000)
    for step in range(150):
        name = f"blob-{(step * 7 + seed * 3) % 25}"
        expected = _content(name)
        if step % 2:
            with cache.filling(name) as file:
                if file is not None:
                    file.write(expected)
            continue
        part = cache.read(name, offset=512, length=1024)
        if part is None or part != expected[512:1536]:
            cache.add_part(name, expected[512:1536], offset=512)
        if (path := cache.whole(name)) is not None and path.read_bytes() != expected:
            failures.put(name)
    failures.put("")


def test_processes_share_one_cache_and_keep_its_bound(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    BlobCache(folder, budget_bytes=200_000).create_folder()
    failures = _FORK.SimpleQueue()
    processes = [_FORK.Process(target=_use, args=(folder, seed, failures)) for seed in range(3)]
    for process in processes:
        process.start()
    assert [failures.get() for _ in processes] == [""] * 3
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for path in folder.iterdir():
        _used(path, seconds_ago=HOUR)
    BlobCache(folder, budget_bytes=200_000).create_folder()
    assert _bytes_in(folder) <= 200_000


@pytest.fixture
def stored(in_bucket: BlobLocation, proxy: HostileProxy) -> tuple[BlobLocation, str, bytes]:
    """A place, and a blob that is in its bucket but not in its cache."""
    name, content = f"{1:012x}-{1:032x}", _content("data") * 20
    blobs = in_bucket.open()
    blobs.create_folder()
    blobs.write(name, content)
    (in_bucket.folder / BLOB_CACHE / name).unlink()
    return in_bucket, name, content


def test_a_blob_is_fetched_once_for_all_who_need_it(
    stored: tuple[BlobLocation, str, bytes], proxy: HostileProxy
) -> None:
    place, name, content = stored
    found: list[bytes] = []
    opened = [place.open() for _ in range(5)]
    threads = [
        threading.Thread(target=lambda blobs=blobs: found.append(blobs.local(name).read_bytes())) for blobs in opened
    ]
    with proxy.failing(trickle(0.01)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [content] * 5
    assert proxy.faults == 1


def test_a_damaged_copy_is_fetched_again(stored: tuple[BlobLocation, str, bytes], proxy: HostileProxy) -> None:
    place, name, content = stored
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    blobs = place.open()
    path = blobs.local(name)
    path.write_bytes(content[:-1] + b"x")
    assert blobs.local(name, digest=digest).read_bytes() == content
    path.write_bytes(content[:-1])
    assert blobs.local(name, size=len(content)).read_bytes() == content
    part = f"sha256:{hashlib.sha256(content[:9]).hexdigest()}"
    path.write_bytes(b"y" * len(content))
    assert blobs.read(name, offset=0, length=9, digest=part) == content[:9]
    path.write_bytes(content)
    with proxy.failing(refuse):
        assert blobs.local(name, digest=digest).read_bytes() == content


def test_a_full_local_disk_empties_the_cache_and_then_says_so(
    stored: tuple[BlobLocation, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name, content = stored
    blobs = replace(place, cache_bytes=10**9).open()
    other = place.folder / BLOB_CACHE / "other.part"
    other.write_bytes(b"x")
    fsync, fails = os.fsync, [1]

    def full(file: int) -> None:
        if fails:
            fails.pop()
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    assert blobs.local(name).read_bytes() == content
    assert not other.exists()
    (place.folder / BLOB_CACHE / name).unlink()
    fails.extend([1] * 9)
    with pytest.raises(StorageFull):
        blobs.local(name)
