"""A `kill -9` at each step of the first start, the first upload and the migration: the next start works."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapters.catalog.adapter_cache import find_adapter
from adapters.catalog.catalog import Catalog
from adapters.names import Reference
from tests.support.catalog_factories import make_adapter, put, quarantined_files, referenced_files, stored_files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The folders of processes that died at each step, in order."""
    folder = tmp_path_factory.mktemp("crashed")
    # One thread: a process with more should not be forked.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.acceptance.crash.first_start_crashes", str(folder)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    steps = json.loads(ended.stdout)
    return {kind: [folder / kind / str(step) for step in range(1, count + 1)] for kind, count in steps.items()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["new", "old"])
def test_a_store_whose_first_start_was_killed_starts(crashed: dict[str, list[Path]], kind: str) -> None:
    folders = crashed[kind]
    assert len(folders) > 20
    for folder in folders:
        for _ in range(2):
            opened = Catalog(folder, now=time.time)
            opened.sweep()
            names = [adapter.name for adapter in opened.adapters(tenant="default")]
            assert [name for name in names if name != "first"] == (["acme", "zeta"] if kind == "old" else []), folder
            for name in names:
                seed = {"acme": 0, "zeta": 1, "first": 7}[name]
                assert find_adapter(opened, Reference(name), tenant="default")[1].digest == make_adapter(seed).digest, (
                    folder
                )
            assert stored_files(folder) == referenced_files(folder), folder
            opened.database.close()
        assert ("0" * 32 in quarantined_files(folder)) == (kind == "old"), folder


def test_a_new_store_that_was_killed_takes_its_first_upload(crashed: dict[str, list[Path]]) -> None:
    for folder in crashed["new"]:
        opened = Catalog(folder, now=time.time)
        assert put(opened, "another", 3).version == 1
        opened.database.close()
