"""Injects an error into every storage call of a change, one call at a time, with strace.

`python -m tests.acceptance.fault.storage_faults FOLDER SEED POINTS CHANGE…` first lists the calls of an undisturbed
change. For each call and each error, a child process then makes the change while that call fails, and another one looks
at what is stored. There is one line of JSON for each. If POINTS is not 0, only that many are drawn for each change.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adapters.catalog.adapter_cache import read_adapter
from adapters.datasets.ingest import Format, Ingestion, upload_file
from adapters.datasets.store import Datasets
from adapters.errors import NotFound
from adapters.maintenance.doctor import diagnose
from adapters.training.gradient.checkpoint import load_checkpoint, save_checkpoint
from app.http.errors import STATUS, known_failure
from tests.acceptance.crash.crash_points import FLEET, House, make_start
from tests.acceptance.crash.first_start_crashes import make_older
from tests.support.catalog_factories import make_adapter, referenced_files, stored_files
from tests.support.external_programs import program

CALLS = ("write", "writev", "pwrite64", "fsync", "fdatasync", "ftruncate", "rename")
ERRORS = ("ENOSPC", "EIO", "EINTR")
_SECONDS = 60
"""A child that takes longer has not ended."""
_TRAINING = "a training"


class Change(NamedTuple):
    """A change of a data folder."""

    make: Callable[[House], object]
    is_stored: Callable[[House], bool]
    start: Callable[[Path], None] = make_start
    is_reported: bool = True
    """Whether an error of the disk is raised; otherwise the change is left out and logged."""
    opens: bool = False
    """Whether the change is the opening of the folder."""


def _count(house: House, prefix: str) -> int:
    return len(house.catalog.adapters(tenant="default", prefix=prefix, limit=1000))


def _whole(count: int, most: int) -> bool:
    assert count in (0, most), f"{count} of {most} are there"
    return count == most


def _is_finished(house: House) -> bool:
    job = house.queue.get("claimed", tenant="default")
    versions = house.catalog.adapter("acme", tenant="default").versions
    assert (job.status == "succeeded") == (versions == 2), (job.status, versions)
    return versions == 2


def _exists(look: Callable[[], object]) -> bool:
    try:
        look()
    except NotFound:
        return False
    return True


def _datasets(house: House) -> Datasets:
    return Datasets(house.catalog.database, house.catalog.writer, now=time.time)


def _add_dataset(house: House) -> None:
    with upload_file(house.folder / "tmp") as raw:
        raw.write(b"a,b\n" + b"1,2\n" * 100)
        reading = Ingestion(raw, Format.CSV, memory_bytes=2**28, max_bytes=2**20)
        _datasets(house).add("rows", reading, content_type="text/csv", tenant="default")


def _write_checkpoint(house: House, step: int) -> None:
    path = house.folder / "checkpoints" / "claimed.1.safetensors"
    save_checkpoint(path, {"a": torch.full((1000,), float(step))}, {"step": step}, of=_TRAINING)


def _has_new_checkpoint(house: House) -> bool:
    loaded = load_checkpoint(house.folder / "checkpoints" / "claimed.1.safetensors", of=_TRAINING)
    assert loaded is not None, "there is no checkpoint that can be read"
    tensors, metadata = loaded
    assert (tensors["a"] == metadata["step"]).all(), "the checkpoint is torn"
    return bool(metadata["step"] == 2)


def _start_with_checkpoint(folder: Path) -> None:
    make_start(folder)
    house = House(folder)
    _write_checkpoint(house, 1)
    house.catalog.close()


CHANGES: Mapping[str, Change] = {
    "publish": Change(House.replace, lambda house: house.catalog.adapter("acme", tenant="default").versions == 2),
    "publish a fleet": Change(House.fleet, lambda house: _whole(_count(house, "device-"), 150)),
    "publish a part of a fleet": Change(
        House.publish_a_batch, lambda house: _whole(_count(house, FLEET[0][:-2]) - 20, len(FLEET) - 20)
    ),
    "delete": Change(House.delete, lambda house: not _exists(lambda: house.catalog.adapter("acme", tenant="default"))),
    "queue a job": Change(
        House.submit_another, lambda house: _exists(lambda: house.queue.get("another", tenant="default"))
    ),
    "finish a job": Change(House.finish, _is_finished),
    "cancel a job": Change(
        House.cancel, lambda house: house.queue.get("claimed", tenant="default").status == "cancelled"
    ),
    "upload a data set": Change(
        _add_dataset, lambda house: _exists(lambda: _datasets(house).get("rows", tenant="default"))
    ),
    "write a checkpoint": Change(
        lambda house: _write_checkpoint(house, 2), _has_new_checkpoint, start=_start_with_checkpoint, is_reported=False
    ),
    "migrate": Change(lambda _: None, lambda _: True, start=make_older, opens=True),
}


class Point(NamedTuple):
    """A storage call that fails."""

    call: str
    number: int
    """Of the calls of this name in its process, from 1."""
    error: str
    arguments: str


def in_child(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a child process, as JSON; None if the child has not ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        # strace inherits it: the end of the pipe is the end of both, so that the log of strace is complete.
        os.set_inheritable(writing, True)
        signal.alarm(_SECONDS)
        try:
            result = work()
        except BaseException as error:
            result = {"raised": f"{type(error).__name__}: {error}"}
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def make(change: Change, folder: Path, *, before: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Make the change, after `before`; return the error that a client would see."""
    house = None if change.opens else House(folder)
    before()
    try:
        change.make(house or House(folder))
    except Exception as error:
        known = known_failure(error)
        if known is None:
            return {"code": "error", "status": 500, "detail": f"{type(error).__name__}: {error}"}
        return {
            "code": known.code,
            "status": STATUS.get(known.code),
            "unknown": known.outcome_unknown,
            "detail": known.detail,
        }
    return {"code": None}


def traced(change: Change, folder: Path, log: Path, *options: str) -> Any:
    """Make the change in a child that strace watches from the moment at which the folder is open."""

    def attach() -> None:
        watched = ["-f", "-y", "-qq", "-e", "signal=none", "-o", str(log), "-p", str(os.getpid())]
        tracer = subprocess.Popen([program("strace"), *watched, *options], close_fds=False)
        status = Path("/proc/self/status")
        while "TracerPid:\t0" in status.read_text():
            assert tracer.poll() is None, "strace cannot attach"
            time.sleep(0.001)

    return in_child(lambda: make(change, folder, before=attach))


def calls_of(log: Path, folder: Path) -> Iterator[tuple[str, int, str]]:
    """Yield name, number in its process, and arguments of each call on a file in the folder."""
    numbers: Counter[tuple[str, str]] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        process, _, call = line.partition(" ")
        name, _, arguments = call.strip().partition("(")
        if name not in CALLS:
            continue
        numbers[process, name] += 1
        if str(folder) in arguments:
            yield name, numbers[process, name], arguments


def look(change: Change, folder: Path, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Look at a folder after a change that may have failed, and make the change again if it is not stored."""
    house = House(folder)
    is_stored = change.is_stored(house)
    if change.is_reported and not change.opens and not outcome.get("unknown"):
        assert is_stored == (outcome["code"] is None), f"stored: {is_stored}, but the answer was {outcome}"
    if not is_stored:
        change.make(house)
        assert change.is_stored(house), "the change cannot be made once the disk works"
    house.catalog.sweep()
    stored, referenced = stored_files(folder), referenced_files(folder)
    assert stored == referenced, f"only stored: {stored - referenced}, only referenced: {referenced - stored}"
    for adapter in house.catalog.adapters(tenant="default", limit=1000):
        for version in house.catalog.versions(adapter.name, tenant="default"):
            assert read_adapter(version, house.catalog.blobs).digest == version.digest
            if (adapter.name, version.version) == ("acme", 1):
                assert version.digest == make_adapter(0 if change.opens else 1).digest
    house.catalog.close()
    findings = diagnose(folder).findings
    assert not findings, f"the doctor finds {findings}"
    return {"stored": is_stored}


def try_point(change: Change, start: Path, folder: Path, point: Point) -> dict[str, Any]:
    """Make the change while one call fails; return the point, what was answered and what was found wrong."""
    shutil.copytree(start, folder)
    log = folder.with_suffix(".log")
    inject = f"inject={point.call}:error={point.error}:when={point.number}"
    outcome = traced(change, folder, log, "-e", f"trace={','.join(CALLS)}", "-e", inject)
    injected = [line for line in log.read_text(errors="replace").splitlines() if "(INJECTED)" in line]
    result: dict[str, Any] = {"point": point._asdict(), "outcome": outcome, "wrong": None}
    result["is_injected"] = bool(injected) and all(str(folder) in line for line in injected)
    if outcome is None or "raised" in outcome:
        result["wrong"] = f"the change did not end: {outcome}"
    elif outcome["code"] is not None and outcome["status"] == 500:
        result["wrong"] = f"an error without a code: {outcome['detail']}"
    else:
        found = in_child(lambda: look(change, folder, outcome))
        if found is None or "raised" in found:
            result["wrong"] = f"{found}; the answer was {outcome}"
    shutil.rmtree(folder)
    log.unlink()
    return result


def points_of(change: Change, start: Path, folder: Path) -> list[Point]:
    """Return every storage call of the change with every error."""
    shutil.copytree(start, folder)
    log = folder.with_suffix(".log")
    outcome = traced(change, folder, log, "-e", f"trace={','.join(CALLS)}")
    assert outcome == {"code": None}, outcome
    calls = list(dict.fromkeys((name, number) for name, number, _ in calls_of(log, folder)))
    texts = {(name, number): text for name, number, text in calls_of(log, folder)}
    shutil.rmtree(folder)
    return [
        Point(name, number, error, texts[name, number][:120].replace(str(folder), ""))
        for name, number in calls
        for error in ERRORS
    ]


def main() -> None:
    """See above."""
    folder, seed, most = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for name in sys.argv[4:]:
        try_change(name, folder / name.replace(" ", "-"), seed=seed, most=most)


def try_change(name: str, folder: Path, *, seed: int, most: int) -> None:
    """Print what comes of each point of a change."""
    change, start = CHANGES[name], folder / "start"
    folder.mkdir()
    in_child(lambda: change.start(start))
    points = points_of(change, start, folder / "undisturbed")
    print(json.dumps({"change": name, "points": len(points)}), flush=True)
    if most:
        points = random.Random(seed).sample(points, min(most, len(points)))
    for number, point in enumerate(points):
        print(json.dumps(try_point(change, start, folder / f"point-{number}", point)), flush=True)


if __name__ == "__main__":
    main()
