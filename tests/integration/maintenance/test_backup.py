"""Backups are consistent under load, and are restored completely or not at all."""

import io
import os
import signal
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.catalog.adapter_cache import read_adapter
from adapters.catalog.catalog import Catalog
from adapters.errors import BackupFailed, CatalogNotLoadable
from adapters.maintenance import backup as backing_up
from adapters.maintenance.backup import back_up, remove_abandoned_links
from adapters.maintenance.doctor import diagnose
from adapters.maintenance.restore import restore
from adapters.names import Reference
from tests.integration.maintenance.conftest import Filled
from tests.support.catalog_factories import make_adapter, put, stored_files, write_orphan
from tests.support.fork_server import run_code


def test_a_backup_has_the_catalogue_and_the_blobs_and_nothing_else(filled: Filled, tmp_path: Path) -> None:
    orphan = write_orphan(filled.catalog, b"no row ever came")
    file = tmp_path / "backup.tar"
    made = back_up(filled.folder, file)
    assert (made.blobs, made.revision, made.damages) == (6, filled.catalog.revision(), ())
    assert made.bytes == file.stat().st_size
    assert file.stat().st_mode & 0o777 == 0o600
    with tarfile.open(file) as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert names == stored_files(filled.folder) - {orphan} | {
        "backup.json",
        "catalog.sqlite3",
        "SHA256SUMS",
        "store-id",
    }
    assert not (filled.folder / "blobs" / ".backup").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "data"]
    # Any tar program reads it, and sha256sum checks it.
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "-xf", file, "-C", tmp_path / "unpacked"], check=True)
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path / "unpacked", check=True)


@pytest.mark.parametrize("exists", [False, True])
def test_a_restored_folder_opens_and_is_whole(filled: Filled, tmp_path: Path, exists: bool) -> None:
    back_up(filled.folder, tmp_path / "backup.tar")
    target = tmp_path / "restored"
    if exists:
        target.mkdir()
    restored = restore(tmp_path / "backup.tar", target)
    assert (restored.blobs, restored.findings) == (6, ())
    assert diagnose(target).findings == []
    opened = Catalog(target, now=lambda: 0.0)
    assert opened.sweep() == 0
    assert opened.find(Reference("acme"), tenant="default") == filled.acme
    assert read_adapter(filled.acme, opened.blobs).digest == make_adapter(1).digest
    assert opened.restore("c", tenant="default").live == filled.pack[2]
    assert put(opened, "acme", 9).version == 2
    opened.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "data", "restored"]


def test_a_backup_under_load_has_everything_acknowledged_before_it_began(filled: Filled, tmp_path: Path) -> None:
    acknowledged: list[tuple[str, str]] = []
    stop = threading.Event()

    def churn(thread: int) -> None:
        own = Catalog(filled.folder, now=lambda: 0.0)
        for number in range(10_000):
            if stop.is_set():
                break
            version = put(own, f"t{thread}-{number}", number)
            acknowledged.append((version.adapter, version.digest))
            put(own, f"gone-{thread}", number)
            own.delete(f"gone-{thread}", purge=True, tenant="default")
        own.close()

    threads = [threading.Thread(target=churn, args=(thread,)) for thread in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(3):
            while len(acknowledged) < 10 * (number + 1):
                stop.wait(0.01)
            before = list(acknowledged)
            target = tmp_path / f"restored-{number}"
            made = back_up(filled.folder, tmp_path / "backup.tar")
            assert made.damages == ()
            assert restore(tmp_path / "backup.tar", target).findings == ()
            opened = Catalog(target, now=lambda: 0.0)
            for name, digest in before:
                assert opened.find(Reference(name), tenant="default").digest == digest
            opened.close()
        # What processes write meanwhile is not taken for a fault.
        assert diagnose(filled.folder).findings == []
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_blob_that_is_deleted_before_it_is_linked_is_not_in_the_backup(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = backing_up._hold
    calls: list[set[str]] = []

    def delete_then_link(*arguments: object) -> set[str]:
        if not calls:
            filled.catalog.delete("acme", purge=True, tenant="default")
        calls.append(link(*arguments))  # type: ignore[arg-type]
        return calls[-1]

    monkeypatch.setattr(backing_up, "_hold", delete_then_link)
    assert back_up(filled.folder, tmp_path / "backup.tar").damages == ()
    assert calls == [{filled.acme.file}, set()]
    assert restore(tmp_path / "backup.tar", tmp_path / "restored").findings == ()


def test_a_blob_that_is_deleted_while_it_is_copied_stays_until_the_end(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = backing_up._write

    def delete_then_write(*arguments: object) -> object:
        filled.catalog.delete("acme", purge=True, tenant="default")
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(backing_up, "_write", delete_then_write)
    assert back_up(filled.folder, tmp_path / "backup.tar").damages == ()
    assert filled.acme.file not in stored_files(filled.folder)
    restore(tmp_path / "backup.tar", tmp_path / "restored")
    assert (tmp_path / "restored" / "blobs" / filled.acme.file).stat().st_size == filled.acme.bytes


def test_a_damaged_blob_is_reported_and_does_not_replace_a_good_backup(filled: Filled, tmp_path: Path) -> None:
    good, file = tmp_path / "good.tar", tmp_path / "backup.tar"
    back_up(filled.folder, good)
    before = good.read_bytes()
    filled.blob(filled.acme.file).write_bytes(bytes(filled.acme.bytes))
    filled.blob(filled.rows).unlink()
    with pytest.raises(BackupFailed, match="was not replaced, because 2 blobs"):
        back_up(filled.folder, good)
    assert good.read_bytes() == before
    assert sorted(str(damage.part) for damage in back_up(filled.folder, file).damages) == [
        "adapter acme@1",
        "data set rows@1",
    ]
    restored = restore(file, tmp_path / "restored")
    assert sorted(finding.subject for finding in restored.findings) == ["adapter acme@1", "data set rows@1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "data", "good.tar", "restored"]


def test_a_backup_is_refused_beside_another_and_inside_the_folder(filled: Filled, tmp_path: Path) -> None:
    with backing_up._held_blobs(filled.folder, filled.catalog.blobs) as held:
        with pytest.raises(BackupFailed, match="another backup"):
            back_up(filled.folder, tmp_path / "backup.tar")
        remove_abandoned_links(filled.folder, filled.catalog.blobs)
        assert held.exists()
    with pytest.raises(BackupFailed, match="inside the data folder"):
        back_up(filled.folder, filled.folder / "backup.tar")
    with pytest.raises(BackupFailed, match="No such file"):
        back_up(filled.folder, tmp_path / "missing" / "backup.tar")
    with pytest.raises(CatalogNotLoadable):
        back_up(tmp_path / "nothing", tmp_path / "backup.tar")


_KILLED = """
import os, signal, sys
from pathlib import Path
from adapters.maintenance import backup, restore
left = int(sys.argv[1])
copy = backup._copy
def dying(*arguments):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return copy(*arguments)
backup._copy = dying
if sys.argv[2] == "backup":
    backup.back_up(Path(sys.argv[3]), Path(sys.argv[4]))
else:
    restore.restore(Path(sys.argv[4]), Path(sys.argv[3]))
"""


def _killed(step: int, command: str, folder: Path, file: Path) -> bool:
    """Run a command that kills itself before it copies this many files; return whether it was killed."""
    ended = run_code(_KILLED, step, command, folder, file)
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    return ended.returncode != 0


def test_a_killed_backup_leaves_the_file_as_it_was_and_the_next_one_works(filled: Filled, tmp_path: Path) -> None:
    file = tmp_path / "backup.tar"
    file.write_bytes(b"an older backup")
    assert _killed(4, "backup", filled.folder, file)
    assert file.read_bytes() == b"an older backup"
    assert (filled.folder / "blobs" / ".backup").exists()
    assert diagnose(filled.folder).findings == []
    remove_abandoned_links(filled.folder, filled.catalog.blobs)
    assert not (filled.folder / "blobs" / ".backup").exists()
    assert _killed(5, "backup", filled.folder, file)
    back_up(filled.folder, file)
    assert restore(file, tmp_path / "restored").findings == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "data", "restored"]


@pytest.mark.parametrize("step", [0, 1, 5])
def test_a_killed_restore_leaves_nothing_and_can_be_repeated(filled: Filled, tmp_path: Path, step: int) -> None:
    file, target = tmp_path / "backup.tar", tmp_path / "restored"
    back_up(filled.folder, file)
    assert _killed(step, "restore", target, file)
    assert not target.exists()
    assert not _killed(99, "restore", target, file)
    assert diagnose(target).findings == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "data", "restored"]


@pytest.mark.parametrize("content", ["folder", "file"])
def test_a_folder_with_content_is_refused(filled: Filled, tmp_path: Path, content: str) -> None:
    back_up(filled.folder, tmp_path / "backup.tar")
    target = tmp_path / "restored"
    if content == "file":
        target.write_text("a file")
    else:
        target.mkdir()
        (target / "something").touch()
    with pytest.raises(BackupFailed, match="not an empty folder"):
        restore(tmp_path / "backup.tar", target)
    assert content == "file" or [path.name for path in target.iterdir()] == ["something"]


Members = list[tuple[tarfile.TarInfo, bytes]]


def _member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def _position(members: Members, name: str) -> int:
    return next(index for index, (info, _) in enumerate(members) if name in info.name)


def _with(*extra: tuple[tarfile.TarInfo, bytes]) -> Callable[[Members], Members]:
    """Members after the first one."""
    return lambda members: [members[0], *extra, *members[1:]]


def _changed(name: str, change: Callable[[bytes], bytes]) -> Callable[[Members], Members]:
    def changed(members: Members) -> Members:
        index = _position(members, name)
        info, content = members[index]
        return [*members[:index], _member(info.name, change(content)), *members[index + 1 :]]

    return changed


def _without(name: str) -> Callable[[Members], Members]:
    return lambda members: [member for member in members if name not in member[0].name]


HOSTILE: dict[str, Callable[[Members], Members]] = {
    "path above": _with(_member("../evil", b"x")),
    "path above in blobs": _with(_member("blobs/../../evil", b"x")),
    "absolute path": _with(_member("/tmp/evil-of-a-backup", b"x")),
    "symbolic link": _with(_member("blobs/" + "a" * 32, type=tarfile.SYMTYPE, linkname="/etc")),
    "hard link": _with(_member("blobs/" + "a" * 32, type=tarfile.LNKTYPE, linkname="catalog.sqlite3")),
    "folder": _with(_member("blobs", type=tarfile.DIRTYPE)),
    "device": _with(_member("blobs/" + "a" * 32, type=tarfile.CHRTYPE)),
    "extended header": _with(_member("x", b"30 path=blobs/evil\n", type=tarfile.XHDTYPE)),
    "long name": _with(_member("x", b"y" * 1000, type=tarfile.GNUTYPE_LONGNAME)),
    "other file": _with(_member("store-id", b"x")),
    "blob that no row has": _with(_member("blobs/" + "a" * 32, b"x")),
    "file twice": lambda members: [*members[:-1], members[2], members[-1]],
    "wrong digest": _changed("blobs/0", lambda content: b"?" + content[1:]),
    "wrong catalogue": _changed("catalog", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "without a blob": _without("blobs/0"),
    "without the catalogue": _without("catalog"),
    "without the sums": _without("SHA256SUMS"),
    "without the description": _without("backup.json"),
    "sums of others": _changed("SHA256SUMS", lambda content: content[:-70]),
    "description that is no JSON": _changed("backup.json", lambda _: b"[" * 100_000),
    "description of other types": _changed("backup.json", lambda _: b'{"format": 1, "store_id": 3}'),
    "form of the future": _changed("backup.json", lambda _: b'{"format": 2}'),
    "after the sums": lambda members: [*members, _member("blobs/" + "a" * 32, b"x")],
    "huge description": _changed("backup.json", lambda _: b" " * (2**24 + 1)),
}


@pytest.fixture
def members(filled: Filled, tmp_path: Path) -> Members:
    back_up(filled.folder, tmp_path / "backup.tar")
    with tarfile.open(tmp_path / "backup.tar") as archive:
        return [(info, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]


def _refuse(tmp_path: Path, content: bytes) -> str:
    file = tmp_path / "hostile.tar"
    file.write_bytes(content)
    with pytest.raises(BackupFailed) as refused:
        restore(file, tmp_path / "restored")
    file.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "data"]
    return refused.value.detail


def _packed(members: Members) -> bytes:
    buffer = io.BytesIO()
    for info, content in members:
        buffer.write(info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
    buffer.write(bytes(1024))
    return buffer.getvalue()


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(members: Members, tmp_path: Path, attack: str) -> None:
    _refuse(tmp_path, _packed(HOSTILE[attack](members)))
    assert not (tmp_path.parent / "evil").exists()
    assert not Path("/tmp/evil-of-a-backup").exists()


def test_a_size_that_the_disk_does_not_have_is_refused_before_it_is_written(members: Members, tmp_path: Path) -> None:
    info, content = members[1]
    info.size = 2**60
    assert "are free" in _refuse(tmp_path, _packed([members[0], (info, content)]))


@pytest.mark.parametrize("length", [0, 100, 512, 5000, -1024, -1500])
def test_an_archive_that_is_cut_off_is_refused(members: Members, tmp_path: Path, length: int) -> None:
    _refuse(tmp_path, _packed(members)[:length])


def test_a_catalogue_with_a_trigger_is_refused(filled: Filled, members: Members, tmp_path: Path) -> None:
    filled.execute("CREATE TRIGGER t AFTER INSERT ON versions BEGIN DELETE FROM adapters; END")
    file = tmp_path / "with-trigger.tar"
    back_up(filled.folder, file)
    with pytest.raises(BackupFailed, match="more than tables and indexes: t"):
        restore(file, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_a_mounted_folder_is_filled_with_the_catalogue_last(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, target = tmp_path / "backup.tar", tmp_path / "volume"
    back_up(filled.folder, file)
    (target / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    assert restore(file, target).findings == ()
    assert sorted(path.name for path in target.iterdir()) == ["blobs", "catalog.sqlite3", "lost+found"]
    assert diagnose(target).findings == []
