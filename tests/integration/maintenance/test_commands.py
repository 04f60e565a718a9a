"""The commands on a data folder: what they print, and their exit status."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from app import cli_maintenance
from tests.integration.maintenance.conftest import Filled
from tests.support.catalog_factories import put, quarantined_files, stored_files, write_orphan

Run = Callable[..., Result]


@pytest.fixture
def run(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command on the filled folder."""
    monkeypatch.setenv("LORAPLEX_DATA_DIR", str(filled.folder))

    def call(name: str, *arguments: Any) -> Result:
        app = typer.Typer()
        app.command()(getattr(cli_maintenance, name))
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


def test_the_doctor_says_what_is_wrong_and_what_it_repaired(run: Run, filled: Filled) -> None:
    healthy = run("doctor")
    assert (healthy.exit_code, healthy.stdout) == (
        0,
        "checked 6 blobs: 0 findings\nscrub: none was completed yet; 0 damaged blobs\n",
    )
    orphan = write_orphan(filled.catalog, b"no row ever came")
    filled.blob(filled.acme.file).unlink()
    found = run("doctor")
    assert found.exit_code == 1
    assert f"missing_blob         adapter acme@1: the file {filled.acme.file} cannot be opened" in found.stdout
    assert f"orphan               blobs/{orphan}: no row refers to it" in found.stdout
    repaired = run("doctor", "--repair")
    assert repaired.exit_code == 1
    assert "left       adapter acme@1: there is no other copy of its bytes" in repaired.stdout
    assert f"repaired   blobs/{orphan}: moved to" in repaired.stdout
    assert run("doctor", "--repair", "--remove-lost").exit_code == 0
    assert run("doctor").exit_code == 0
    assert run("doctor", "--remove-lost").exit_code == 2
    assert _entries(filled, "cli") == [("adapter.lose", "adapters/acme")]


def test_a_backup_is_made_and_restored(run: Run, filled: Filled, tmp_path: Path) -> None:
    file, target = tmp_path / "backup.tar", tmp_path / "restored"
    made = run("backup", file)
    assert (made.exit_code, made.stdout) == (
        0,
        f"{file}: revision {filled.catalog.revision()}, 6 blobs, {file.stat().st_size:,} bytes\n",
    )
    assert run("restore", file, "--data-dir", target).exit_code == 0
    assert run("doctor", "--data-dir", target).exit_code == 0
    again = run("restore", file, "--data-dir", target)
    assert (again.exit_code, "is not an empty folder" in again.stderr) == (1, True)
    filled.blob(filled.acme.file).unlink()
    damaged = run("backup", tmp_path / "damaged.tar")
    assert (damaged.exit_code, "missing_blob         adapter acme@1" in damaged.stdout) == (1, True)
    assert run("restore", tmp_path / "damaged.tar", "--data-dir", tmp_path / "other").exit_code == 1


def test_gc_frees_what_is_due(run: Run, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    put(filled.catalog, "gone", 30)
    filled.catalog.delete("gone", tenant="default")
    orphan = write_orphan(filled.catalog, b"no row ever came")
    before = run("gc")
    assert before.exit_code == 0
    assert before.stdout.splitlines() == [
        "trash: 0 bytes freed",
        "usage: 0 entries removed",
        "quarantine: 0 bytes freed, 1 files moved into it or removed",
        "idempotency keys: 0 expired ones removed",
    ]
    assert quarantined_files(filled.folder) == {orphan}
    monkeypatch.setenv("LORAPLEX_TRASH_DAYS", "0")
    monkeypatch.setenv("LORAPLEX_QUARANTINE_DAYS", "0")
    files = stored_files(filled.folder)
    after = run("gc", "--vacuum")
    assert after.exit_code == 0, after.output
    nothing = ("trash: 0 ", "usage: 0 ", "quarantine: 0 ", "idempotency keys: 0 ")
    freed = sum(1 for line in after.stdout.splitlines() if not line.startswith(nothing))
    assert freed == 3
    assert len(stored_files(filled.folder)) == len(files) - 1
    assert run("doctor").exit_code == 0
    assert _entries(filled, "cli") == [("adapter.purge", "adapters/c"), ("adapter.purge", "adapters/gone")]
    entries = len(_entries(filled))
    assert run("gc", "--audit-days", "1").stdout.endswith("audit log: 0 entries removed\n")
    assert run("gc", "--audit-days", "0").stdout.endswith(f"audit log: {entries} entries removed\n")
    assert _entries(filled) == [("audit.remove", "audit")]


def _entries(filled: Filled, actor: str = "%") -> list[tuple[object, ...]]:
    """The changes in the audit log, oldest first."""
    return filled.execute("SELECT action, resource FROM audit WHERE key_id LIKE ? ORDER BY sequence", actor)


@pytest.mark.parametrize("name", ["doctor", "backup", "gc"])
def test_a_folder_that_does_not_exist_is_refused_and_not_created(run: Run, tmp_path: Path, name: str) -> None:
    file = [tmp_path / "backup.tar"] if name == "backup" else []
    refused = run(name, *file, "--data-dir", tmp_path / "missing")
    assert (refused.exit_code, "there is no data folder" in refused.stderr) == (78, True)
    assert not (tmp_path / "missing").exists()
