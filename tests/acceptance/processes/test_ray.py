"""Fits on a real Ray cluster of two nodes: what local fits give, also after the death of a node."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from adapters.lora.base_layer import load_base_layer
from adapters.storage.blob_location import BlobLocation
from adapters.storage.blobs import BLOBS
from adapters.training.data_file import Column, write_data_file
from adapters.training.execution.fit_client import FitRequest
from adapters.training.execution.fit_task import FitProcess
from adapters.training.settings import TrainingSpec
from tests.support.catalog_factories import training_job
from tests.support.long_jobs import submit_endless, versions, wait_until_it_steps
from tests.support.object_server import new_url, object_server
from tests.support.process_tree import FIT, Process, TrainerProcess, is_running
from tests.support.ray_cluster import RayCluster
from tests.support.service import ServiceProcess, eventually, train, wait_for_job

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

LEASE_SECONDS = 6
GROUPS = 24
"""Of sizes so different that most are a stack of their own."""
WIDTH = 2000
"""Of a base layer for which a closed form needs more than `LITTLE`."""
LITTLE = 2**29
SORTED_ROWS, SORTED_WIDTH = 40_000, 256
"""Three blocks of Ray Data."""
SETTINGS: dict[str, Any] = {"base": "random:5,3,1", "lease_seconds": LEASE_SECONDS, "trainers": 0}


def _fits(cluster: RayCluster) -> list[Process]:
    """The processes on all nodes that fit."""
    found = []
    for node in cluster.processes:
        for process in psutil.Process(node.pid).children(recursive=True):
            try:
                if FIT in process.cmdline():
                    found.append(process)
            except psutil.NoSuchProcess:
                pass
    return found


def _busy_fits(cluster: RayCluster) -> list[Process]:
    """Those that are at work; on a busy machine, such a process can wait for a core for a while."""

    def busy() -> list[Process]:
        return [process for process in _fits(cluster) if process.cpu_percent(0.2) > 1]

    fits: list[Process] = eventually(busy, what="a fit at work")
    return fits


def _rows(sizes: list[int]) -> dict[str, Any]:
    generator = np.random.default_rng(7)
    groups = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    inputs, targets = (generator.normal(size=(len(groups), width)).round(3).tolist() for width in (5, 3))
    return {"inputs": inputs, "targets": targets, "groups": groups.tolist()}


def _submit_fleet(client: httpx.Client, name: str, *, epochs: int = 1200) -> str:
    body = {
        "name": f"{name}-{{group}}",
        "rank": 2,
        "data": _rows([16 * (1 + number) for number in range(GROUPS)]),
        "split": {"by": "rows", "fraction": 0.25},
        "training": {"method": "adamw", "epochs": epochs, "batch_size": None},
    }
    answer = client.post("/adapters", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def _published(client: httpx.Client, job_id: str) -> dict[str, tuple[int, str]]:
    query: dict[str, Any] = {"status": "published", "limit": 1000}
    page = client.get(f"/jobs/{job_id}/adapters", params=query).raise_for_status().json()
    return {entry["group"]: (entry["version"], entry["digest"]) for entry in page["data"]}


def _fit(client: httpx.Client, name: str, **training: Any) -> dict[str, Any]:
    data = _rows([60])
    del data["groups"]
    return train(client, name=name, rank=2, data=data, training={"epochs": 30, "batch_size": 16} | training)


def _comparable(job: dict[str, Any]) -> dict[str, Any]:
    """A job without its name, its times and what differs from run to run."""
    ignored = {"id", "adapter", "created_at", "started_at", "finished_at", "spec", "result", "log", "seconds"}
    progress = {name: value for name, value in job["progress"].items() if name != "seconds_left"}
    return {name: value for name, value in job.items() if name not in ignored} | {"progress": progress}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables that a server of buckets is found by."""
    with object_server(tmp_path_factory.mktemp("bucket")) as server:
        yield server.environment


@pytest.fixture(scope="module")
def cluster(bucket: dict[str, str]) -> Iterator[RayCluster]:
    cluster = RayCluster(environment=bucket)
    try:
        cluster.add_node()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path_factory.mktemp("ray") / "data", **SETTINGS) as started:
        yield started


@pytest.fixture(scope="module")
def local(service: ServiceProcess) -> dict[str, Any]:
    """What a local trainer makes of the same requests: a job of one adapter, and the digests of a fleet."""
    with TrainerProcess(service.data_dir, **SETTINGS):
        fleet = _submit_fleet(service.client, "local")
        job = _fit(service.client, "local")
        assert wait_for_job(service.client, fleet)["status"] == "succeeded"
    return {"job": job, "fleet": _published(service.client, fleet)}


def _trainer(data_dir: Path, cluster: RayCluster, **settings: Any) -> TrainerProcess:
    patch = pytest.MonkeyPatch()
    with patch.context() as environment:
        for name, value in cluster.environment.items():
            environment.setenv(name, value)
        of_cluster = {"executor": cluster.address, "allow_mixed_storage": True}
        return TrainerProcess(data_dir, forks=False, **SETTINGS | of_cluster | settings)


@pytest.fixture(scope="module")
def trainer(service: ServiceProcess, cluster: RayCluster, local: dict[str, Any]) -> Iterator[TrainerProcess]:
    with _trainer(service.data_dir, cluster) as started:
        yield started


def _both_nodes(cluster: RayCluster) -> None:
    if len(cluster.processes) < 2:
        cluster.add_node()


@pytest.mark.usefixtures("trainer")
def test_a_fit_gives_the_same_job_and_the_same_bytes(service: ServiceProcess, local: dict[str, Any]) -> None:
    job = _fit(service.client, "ray")
    assert job["result"]["digest"] == local["job"]["result"]["digest"]
    assert _comparable(job) == _comparable(local["job"])


def test_of_a_fleet_whose_node_dies_every_group_is_published_once(
    service: ServiceProcess, cluster: RayCluster, trainer: TrainerProcess, local: dict[str, Any]
) -> None:
    _both_nodes(cluster)
    client = service.client
    job_id = _submit_fleet(client, "killed")
    eventually(lambda: len(_published(client, job_id)) >= GROUPS // 3, what="a third of the adapters")
    before = _published(client, job_id)
    cluster.kill_node(cluster.processes[-1])
    job = wait_for_job(client, job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    assert len(before) < GROUPS
    assert job["metrics"] == {"published": GROUPS, "failed": 0, "total": GROUPS}
    assert "a task died" in trainer.log.read_text()
    # One version each, with the bytes of the local run.
    assert _published(client, job_id) == local["fleet"]
    assert all(versions(client, f"killed-{group}") == [1] for group in range(GROUPS))


@pytest.mark.usefixtures("trainer")
def test_a_fit_whose_node_dies_goes_on_from_its_checkpoint(service: ServiceProcess, cluster: RayCluster) -> None:
    _both_nodes(cluster)
    client = service.client
    job_id = submit_endless(client, "moved")
    wait_until_it_steps(client, job_id)
    eventually((service.data_dir / "checkpoints" / f"{job_id}.1.safetensors").exists, what="a checkpoint")
    (fit,) = _busy_fits(cluster)
    (node,) = [node for node in cluster.processes if psutil.Process(node.pid) in fit.parents()]
    if node is cluster.processes[0]:
        # The head node holds the cluster together.
        fit.kill()
    else:
        cluster.kill_node(node)
    wait_until_it_steps(client, job_id, attempt=2)
    assert "continues from the checkpoint at step" in json.dumps(client.get(f"/jobs/{job_id}").json()["log"])
    client.post(f"/jobs/{job_id}/cancel").raise_for_status()


@pytest.mark.usefixtures("trainer")
def test_a_cancelled_fit_ends_on_its_node(service: ServiceProcess, cluster: RayCluster) -> None:
    client = service.client
    job_id = submit_endless(client, "cancelled")
    wait_until_it_steps(client, job_id)
    busy = _busy_fits(cluster)
    assert client.post(f"/jobs/{job_id}/cancel").raise_for_status().json()["status"] == "cancelled"
    eventually(lambda: not any(map(is_running, busy)), what="the end of its process")
    assert versions(client, "cancelled") == []
    assert _fit(client, "after")["status"] == "succeeded"


def test_nodes_read_a_bucket_and_a_fit_without_memory_fails_alone(
    cluster: RayCluster, bucket: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    url = new_url()
    settings = SETTINGS | {"base": f"identity:{WIDTH}", "blob_url": url, "allow_mixed_storage": True}
    row = [1.0] + [0.0] * (WIDTH - 1)
    data = {"inputs": [row, row[::-1]], "targets": [row[::-1], row]}
    with ExitStack() as stack:
        service = stack.enter_context(ServiceProcess(tmp_path / "data", forks=False, **settings))
        stack.enter_context(_trainer(service.data_dir, cluster, **settings, trainer_memory_bytes=LITTLE))
        large = train(service.client, name="large", rank=2, data=data, training={"method": "closed_form"})
        assert (large["status"], large["error"]["code"], large["attempt"]) == ("failed", "out_of_memory", 1)
        small = train(service.client, name="small", rank=2, data=data, training={"epochs": 2})
        assert (small["status"], small["attempt"]) == ("succeeded", 1)


# Ray Data starts many processes, which takes minutes on a busy machine.
@pytest.mark.timeout(900)
def test_a_fleet_larger_than_memory_is_sorted_by_ray_data(cluster: RayCluster, tmp_path: Path) -> None:
    process = FitProcess(
        base={"source": f"random:{SORTED_WIDTH},2,1"},
        blobs=BlobLocation(folder=tmp_path),
        threads=1,
        memory_bytes=2**30,
        stopped_seconds=60.0,
    )
    rng, blob = np.random.default_rng(3), "0" * 32
    inputs_NI = rng.standard_normal((SORTED_ROWS, SORTED_WIDTH), dtype=np.float32)
    columns: dict[str, np.ndarray] = {
        "inputs_NI": inputs_NI,
        "targets": inputs_NI[:, :2] * 2,
        "key_N": rng.integers(2**62, size=SORTED_ROWS),
        "groups_N": (GROUPS * rng.random(SORTED_ROWS) ** 2).astype(np.int64),
    }
    (tmp_path / BLOBS).mkdir()
    with (tmp_path / BLOBS / blob).open("wb") as file:
        write_data_file({name: Column.of(array) for name, array in columns.items()}, file)
    job = replace(
        training_job(),
        spec=TrainingSpec(rank=2, alpha=2.0, max_steps=5, batch_size=16),
        is_fleet=True,
        adapters=GROUPS,
        positions=GROUPS,
        memory_bytes=2**29,
        scratch_bytes=2**20,
    )
    fingerprint = load_base_layer(**process.base).fingerprint
    request = FitRequest(job=job, base=fingerprint, feature_space=None, data=blob)
    (tmp_path / "process.json").write_text(process.to_json())
    (tmp_path / "request.json").write_text(json.dumps(request.to_json()))

    def fit(address: str) -> tuple[dict[str, Any], str]:
        command = [sys.executable, "-m", "tests.support.ray_fit", address, str(tmp_path)]
        environment = os.environ | cluster.environment
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout), ended.stderr

    local, notes = fit("")
    assert "sorted by group on disk" in notes
    assert sorted(map(int, local["digests"])) == [*range(GROUPS)]
    on_ray, notes = fit(cluster.address)
    assert "sorted by group with Ray Data" in notes
    assert on_ray == local
    # Only the tasks of Ray Data read the last bytes.
    os.truncate(tmp_path / BLOBS / blob, (tmp_path / BLOBS / blob).stat().st_size - 1)
    broken, _ = fit(cluster.address)
    assert broken["error"]["code"] == "fit_failed"
    assert "ends before byte" in broken["error"]["detail"]
    assert "given" not in broken["error"]


def test_a_trainer_starts_a_cluster_of_its_own_and_leaves_nothing_behind(
    local: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The paths of Ray's sockets are in it.
    monkeypatch.setenv("TMPDIR", tempfile.mkdtemp(prefix="ray-"))
    with (
        ServiceProcess(tmp_path / "data", **SETTINGS) as service,
        TrainerProcess(service.data_dir, forks=False, **SETTINGS, executor="ray") as trainer,
    ):
        job = _fit(service.client, "own")
        assert job["result"]["digest"] == local["job"]["result"]["digest"]
        processes = psutil.Process(trainer.process.pid).children(recursive=True)
        assert any("raylet" in process.name() for process in processes)
        assert trainer.stop() == 0
        eventually(lambda: not any(map(is_running, processes)), what="the end of its cluster")
        assert "_ray" not in trainer.log.read_text()
    assert list(Path(os.environ["TMPDIR"]).glob("loraplex-*")) == []
    shutil.rmtree(os.environ["TMPDIR"])
