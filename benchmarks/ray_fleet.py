"""A fleet on a Ray cluster beside the same fleet in a local process: `python -m benchmarks.ray_fleet`, or `make ray`.

The cluster has two nodes of one core each, all on this machine. First, whole jobs run, and a node is killed when half
of the groups are published. Then the request of one job runs through both fitters in turns, without publishing, on the
node that is left: this is the overhead of a fit. It writes `benchmarks/RAY.md`.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]

from adapters.catalog.catalog import Catalog
from adapters.jobs.queue import JobQueue
from adapters.storage.blob_location import BlobLocation
from adapters.training.execution.fit_client import ChildFitter, Done, Failed, FitRequest, Fitter
from adapters.training.execution.fit_task import FitProcess
from adapters.training.execution.publisher import Publisher
from benchmarks import machine
from benchmarks.failures import BenchFailed
from benchmarks.fleet_table import make_table
from benchmarks.jobs import JSON, columns_of, read, seconds_of, upload
from benchmarks.processes import ROOT, Server, exchange, get, start_service
from benchmarks.progress import say
from benchmarks.report import table
from benchmarks.requests import Shape, message
from benchmarks.stores import base_name, load_base
from tests.support.process_tree import TrainerProcess
from tests.support.ray_cluster import RayCluster

SHAPE = Shape(64, 10)
ROWS, RANK = 20, 4
TRAININGS = {
    "closed_form": {"method": "closed_form", "ridge": 1.0},
    "adamw, 50 steps": {"method": "adamw", "epochs": 50, "batch_size": None, "learning_rate": 0.01},
    "adamw, 200 steps": {"method": "adamw", "epochs": 200, "batch_size": None, "learning_rate": 0.01},
}
# Its fits take longer than publishing them, so that a node that is killed half-way has something left to fit.
JOB_STEPS = 500
JOB_TRAINING = {"method": "adamw", "epochs": JOB_STEPS, "batch_size": None, "learning_rate": 0.01}
_FITS = 20_000
"""Groups that are fitted without publishing."""
_MEMORY_BYTES = 4 * 2**30
_LEASE_SECONDS = 15.0
_DEADLINE_SECONDS = 900.0
_PACKAGES = ("ray", "torch", "numpy", "sqlalchemy")


class _Time(NamedTuple):
    """Time of a fit of a fleet, per group, in microseconds."""

    wall: float
    cpu: float


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ray_fleet", description=__doc__.partition(":")[0])
    parser.add_argument("--groups", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=2, help="rounds of the fits without publishing")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-fleet-")))
        server = start_service(folder / "store", base_name(SHAPE))
        stack.callback(server.stop)
        server.wait_until(get("/readyz"))
        for name, groups in (("fleet", options.groups), ("fits", _FITS)):
            upload(server, name, make_table(SHAPE, tenants=groups, rows=ROWS, rank=RANK).arrow())
        cluster = RayCluster()
        stack.callback(cluster.close)
        os.environ |= cluster.environment
        jobs = _measure_jobs(server, folder / "store", cluster, options.groups)
        overheads: list[tuple[str, str, str, str]] = []
        _write_page(options.groups, options.rounds, jobs, overheads)
        fitters = stack.enter_context(_open_fitters(folder / "store", cluster))
        for name in TRAININGS:
            overheads += _measure_fits(server, folder / "store", cluster, name, options.rounds, fitters)
            _write_page(options.groups, options.rounds, jobs, overheads)


def _write_page(
    groups: int, rounds: int, jobs: list[tuple[str, str]], overheads: list[tuple[str, str, str, str]]
) -> None:
    """Write what has been measured so far."""
    facts = {name: text for name, text in machine.describe(_PACKAGES).items() if name != "wrk"}
    parts = [
        "# A fleet on Ray",
        f"Written by `make ray`. Groups of {ROWS} rows, layer {SHAPE}, rank {RANK}; nodes of one core each on one "
        f"machine. Measured {machine.moment()}.",
        f"A job of {groups:,} groups, AdamW with {JOB_STEPS:,} steps, published by a trainer. Nodes are asked twice a "
        "second whether they live:",
        table(["", ""], jobs),
    ]
    if overheads:
        parts += [
            f"Time of a fit without publishing, per group of {_FITS:,}, on one node and in one local process, in "
            f"turns: the median of {rounds} rounds. CPU time is that of all processes of the fitter, with Ray's own.",
            table(["", "local, µs", "Ray, µs", "Ray / local"], overheads),
        ]
    (ROOT / "benchmarks" / "RAY.md").write_text("\n\n".join([*parts, table(["", ""], facts.items())]) + "\n")


@contextmanager
def _open_fitters(store: Path, cluster: RayCluster) -> Iterator[dict[str, Fitter]]:
    """Yield the two fitters. One connection to the cluster serves all trainings, as it does in a trainer."""
    # Not at the top: ray reads the variables of the cluster's token when it is imported.
    from adapters.training.execution.ray_fitter import RayFitter

    blobs = BlobLocation(folder=store)
    process = FitProcess(
        base={"source": base_name(SHAPE)}, blobs=blobs, threads=1, memory_bytes=_MEMORY_BYTES, stopped_seconds=60.0
    )
    local, on_ray = process.open(), RayFitter(process, address=cluster.address)
    try:
        yield {"local": local, "Ray": on_ray}
    finally:
        local.kill()
        on_ray.close()


def _measure_fits(
    server: Server, store: Path, cluster: RayCluster, name: str, rounds_in_all: int, fitters: Mapping[str, Fitter]
) -> Iterator[tuple[str, str, str, str]]:
    """Yield the lines of wall time and CPU time of one kind of training."""
    rounds: dict[str, list[_Time]] = {"local": [], "Ray": []}
    contents: dict[str, dict[int, bytes]] = {}
    with _claimed_request(server, store, TRAININGS[name]) as request:
        for number in range(rounds_in_all + 1):
            for kind, fitter in fitters.items():
                spent, contents[kind] = _time_fit(fitter, request, server, cluster)
                # The first round starts the processes.
                if number:
                    rounds[kind].append(spent)
                    say(f"{name}, {kind}: {spent.wall:.0f} µs a fit, {spent.cpu:.0f} µs of CPU time")
    if contents["local"] != contents["Ray"]:
        raise BenchFailed("the bytes of a fit on Ray differ from those of a local one")
    for index, unit in enumerate(_Time._fields):
        ours, theirs = (median(spent[index] for spent in rounds[kind]) for kind in ("local", "Ray"))
        ratio = median(b[index] / a[index] for a, b in zip(rounds["local"], rounds["Ray"], strict=True))
        yield f"{name}: {unit} time", f"{ours:,.0f}", f"{theirs:,.0f}", f"{ratio:.2f}"


@contextmanager
def _claimed_request(server: Server, store: Path, training: Mapping[str, Any]) -> Iterator[FitRequest]:
    """Queue a fleet, and yield the request that a trainer makes for it; cancel it afterwards."""
    job_id = _submit(server, "unpublished-{tenant}", training, dataset="fits")
    base = load_base(SHAPE)
    with closing(Catalog(store, now=time.time)) as catalog:
        queue = JobQueue(catalog.database, catalog.writer, now=time.time, lease_seconds=3600.0)
        claim = queue.claim(base=base.fingerprint)
        if claim is None or claim.id != job_id:
            raise BenchFailed("another job was claimed")
        publisher = Publisher(catalog, queue, base, claim, on_storage_failure=_refuse)
        yield publisher.request(checkpoint_seconds=60.0, times_epochs=False)
        exchange(server.port, message(f"/jobs/{job_id}/cancel", b"{}", JSON))


def _refuse(error: Exception) -> None:
    raise error


def _time_fit(
    fitter: Fitter, request: FitRequest, server: Server, cluster: RayCluster
) -> tuple[_Time, dict[int, bytes]]:
    """Return the time per group, and the bytes of each adapter by its position."""
    while not fitter.is_ready(1.0):
        pass
    is_local, contents = isinstance(fitter, ChildFitter), dict[int, bytes]()
    before, began = _cpu_seconds(server, cluster, is_local=is_local), time.perf_counter()
    fitter.begin(request)
    frame = None
    while not isinstance(frame, Done | Failed):
        frame = fitter.next_frame(1.0)
        if frame is not None and (trained := getattr(frame, "trained", None)):
            contents |= {one.position: content for one, content in zip(trained, frame.contents, strict=False)}
    wall, after = time.perf_counter() - began, _cpu_seconds(server, cluster, is_local=is_local)
    # Those of processes that have ended meanwhile are in neither.
    cpu = sum(seconds - before.get(process, 0.0) for process, seconds in after.items())
    if isinstance(frame, Failed) or len(contents) != request.job.adapters:
        raise BenchFailed(f"{len(contents)} of {request.job.adapters} adapters were fitted: {frame}")
    return _Time(1e6 * wall / len(contents), 1e6 * cpu / len(contents)), contents


def _cpu_seconds(server: Server, cluster: RayCluster, *, is_local: bool) -> dict[Any, float]:
    """Return the CPU times of this process and of those that fit: its children, or all of the cluster's."""
    of_cluster = {process for node in cluster.processes for process in _tree(node.pid)}
    others = set(_tree(os.getpid())) - of_cluster - set(server.tree())
    found = {}
    for process in others if is_local else others | of_cluster:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[process] = times.user + times.system
    return found


def _tree(pid: int) -> list[Any]:
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


def _measure_jobs(server: Server, store: Path, cluster: RayCluster, groups: int) -> list[tuple[str, str]]:
    """Return the lines about whole jobs: a local one, and one on two nodes of which one is killed."""
    settings: dict[str, Any] = {"base": base_name(SHAPE), "lease_seconds": _LEASE_SECONDS, "device": "cpu"}
    on_cluster = settings | {"executor": cluster.address, "allow_mixed_storage": True}
    with TrainerProcess(store, forks=False, **settings):
        local, expected = _run_job(server, "local-{tenant}", groups)
    node = cluster.add_node()
    with TrainerProcess(store, forks=False, **on_cluster) as trainer:
        job_id = _submit(server, "killed-{tenant}", JOB_TRAINING)
        before = _kill_half_way(server, job_id, cluster, node, groups)
        killed, published = _wait(server, job_id), _published(server, job_id)
        deaths = trainer.log.read_text().count("a task died")
    say(f"killed: {seconds_of(killed):.1f} s, {deaths} tasks died after {before} adapters")
    if not deaths:
        raise BenchFailed("the node had nothing to fit any more when it was killed")
    if published != expected:
        raise BenchFailed("the job whose node was killed published other bytes than the local one")
    if (killed["attempt"], killed["metrics"]) != (1, {"published": groups, "failed": 0, "total": groups}):
        raise BenchFailed(f"the job whose node was killed ended otherwise than it should: {killed}")
    versions = {version for version, _ in published.values()}
    if versions != {1}:
        raise BenchFailed(f"some groups were published more than once: their versions are {versions}")
    return [
        ("local: time of the job", f"{seconds_of(local):.1f} s"),
        ("two nodes, one killed half-way: time of the job", f"{seconds_of(killed):.1f} s"),
        ("published before the kill", f"{before:,} of {groups:,}"),
        ("tasks that died with the node, and were given to the other", f"{deaths}"),
        ("published at the end, in one attempt", f"{len(published):,}"),
        ("versions of each name", ", ".join(map(str, sorted(versions)))),
        ("adapters with other bytes than the local run's", "0"),
    ]


def _kill_half_way(server: Server, job_id: str, cluster: RayCluster, node: Any, groups: int) -> int:
    """Kill a node as soon as half of the groups are published; return how many are."""
    give_up = time.monotonic() + _DEADLINE_SECONDS
    while time.monotonic() < give_up:
        progress = read(server, f"/jobs/{job_id}")["progress"]
        if (done := (progress.get("adapters") or {}).get("published", 0)) >= groups // 2:
            cluster.kill_node(node)
            return int(done)
        time.sleep(0.05)
    raise BenchFailed("half of the groups were not published in time")


def _run_job(server: Server, name: str, groups: int) -> tuple[dict[str, Any], dict[str, tuple[int, str]]]:
    """Run a job to its end; return it, and version and digest of each group."""
    job_id = _submit(server, name, JOB_TRAINING)
    job = _wait(server, job_id)
    say(f"{name}: {seconds_of(job):.1f} s")
    published = _published(server, job_id)
    if len(published) != groups:
        raise BenchFailed(f"{len(published)} of {groups} groups are published")
    return job, published


def _submit(server: Server, name: str, training: Mapping[str, Any], *, dataset: str = "fleet") -> str:
    body = {"name": name, "rank": RANK, "data": columns_of(dataset, group_by="tenant"), "training": training}
    status, _, answer = exchange(server.port, message("/adapters", json.dumps(body).encode(), JSON), seconds=120)
    if status != 202:
        raise BenchFailed(f"POST /adapters answered {status}: {answer[:500]!r}")
    return str(json.loads(answer)["id"])


def _wait(server: Server, job_id: str) -> dict[str, Any]:
    give_up = time.monotonic() + _DEADLINE_SECONDS
    while time.monotonic() < give_up:
        job: dict[str, Any] = read(server, f"/jobs/{job_id}")
        if job["status"] == "succeeded":
            return job
        if job["status"] in ("failed", "cancelled"):
            raise BenchFailed(f"the job has not succeeded: {job}")
        time.sleep(0.2)
    raise BenchFailed("the job did not end in time")


def _published(server: Server, job_id: str) -> dict[str, tuple[int, str]]:
    """Return version and digest of each group that is published."""
    found: dict[str, tuple[int, str]] = {}
    cursor: str | None = ""
    entries = 0
    while cursor is not None:
        more = f"&cursor={cursor}" if cursor else ""
        page = read(server, f"/jobs/{job_id}/adapters?status=published&limit=1000{more}")
        found |= {entry["group"]: (entry["version"], entry["digest"]) for entry in page["data"]}
        entries += len(page["data"])
        cursor = page["next_cursor"]
    if entries != len(found):
        raise BenchFailed(f"{entries} adapters are published for {len(found)} groups")
    return found


if __name__ == "__main__":
    main()
