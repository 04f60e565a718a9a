"""Changes catalogues while their disk fails: `python -m tests.integration.catalog.change_on_failing_disk`.

A line on standard input, `["FOLDER", "CHANGE"]`, forks a process that makes one change; a start for each would import
torch each time. `acme` has version 1. A line on standard output asks for the fault, and a line on standard input says
that it is there. The next line says how the change ended, and the one after it what the catalogue has once the disk has
healed. The last one says that the process has ended: it would read the next change, too, if that came earlier.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from adapters.catalog.catalog import Catalog
from adapters.datasets.ingest import Format, Ingestion, upload_file
from adapters.datasets.store import Datasets
from adapters.errors import DatasetNotFound, JobNotFound, LoraplexError
from adapters.jobs.queue import JobQueue
from tests.support.catalog_factories import put, submit
from tests.support.service_templates import copy_new_catalogs


class _World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalog = Catalog(folder, now=time.time)
        self.queue = JobQueue(self.catalog.database, self.catalog.writer, now=time.time, lease_seconds=15)
        self.datasets = Datasets(self.catalog.database, self.catalog.writer, now=time.time)

    def publish(self) -> None:
        put(self.catalog, "acme", 2)

    def delete(self) -> None:
        self.catalog.delete("acme", tenant="default")

    def train(self) -> None:
        submit(self.queue)

    def add(self) -> None:
        with upload_file(self.folder / "tmp") as raw:
            raw.write(b"a,b\n1,2\n")
            reading = Ingestion(raw, Format.CSV, memory_bytes=2**28, max_bytes=2**20)
            self.datasets.add("rows", reading, content_type="text/csv", tenant="default")

    def is_stored(self, change: str) -> bool:
        try:
            if change == "publish":
                return self.catalog.adapter("acme", tenant="default").versions == 2
            if change == "delete":
                return self.catalog.adapters(tenant="default") == []
            if change == "train":
                return self.queue.get("j", tenant="default").id == "j"
            return self.datasets.get("rows", tenant="default").versions == 1
        except (JobNotFound, DatasetNotFound):
            return False


def main() -> None:
    """See above."""
    copy_new_catalogs()
    # A fork has none of the threads that torch would start.
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        practice = _World(Path(scratch))
        practice.publish()
        practice.catalog.close()
    for line in iter(sys.stdin.readline, ""):
        if os.fork() == 0:
            folder, change = json.loads(line)
            _change(_World(Path(folder)), change)
            # Without the second in which Python would take torch apart.
            os._exit(0)
        os.wait()
        print("{}", flush=True)


def _change(world: _World, change: str) -> None:
    changes: dict[str, Callable[[], None]] = {
        "publish": world.publish,
        "delete": world.delete,
        "train": world.train,
        "add": world.add,
    }
    put(world.catalog, "acme", 1)
    _say({})
    try:
        changes[change]()
        error: LoraplexError | None = None
    except LoraplexError as raised:
        error = raised
    # The error is held until the end, as a server's handler may: it must hold no lock.
    _say({"error": None if error is None else error.members()})
    stored = world.is_stored(change)
    world.catalog.set_live("acme", 1, tenant="default")
    _say({"stored": stored, "is_writable": True})


def _say(members: dict[str, Any]) -> None:
    print(json.dumps(members), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
