"""Replicas behind HAProxy: what one has acknowledged holds on the others, and one that stops fails no request."""

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support.cluster import HAPROXY_CONFIG, Cluster, Replica
from tests.support.concurrent_clients import outputs
from tests.support.long_jobs import submit_endless
from tests.support.service import eventually, train

pytestmark = pytest.mark.slow

CLIENTS = 4
PAUSE_SECONDS = 0.01
"""Of each client after a request: the replicas that start need a part of the cores too."""
NAMES = [f"name-{number}" for number in range(24)]
X = [[0.5] * 10]
TENSOR = {"name": "inputs", "shape": [1, 10], "datatype": "FP32", "data": X[0]}


def _upload(client: httpx.Client, name: str, value: float) -> dict[str, object]:
    """Make a version that adds `value` to both outputs of `X`; return it."""
    answer = client.put(f"/adapters/{name}", json={"A": [[value], [value]], "B": [[0.2] * 10]})
    assert answer.status_code in (200, 201), answer.text
    version: dict[str, object] = answer.json()
    return version


def test_a_training_through_the_proxy_answers_on_every_replica(cluster: Cluster) -> None:
    x_NI = np.random.default_rng(0).standard_normal((120, 10)).round(3)
    rows = {"inputs": x_NI.tolist(), "targets": (x_NI[:, :2] * 3).tolist()}
    job = train(cluster.client, name="trained", data=rows, rank=2, training={"method": "closed_form"})
    assert job["status"] == "succeeded", job["error"]
    request = {"adapter": "trained", "inputs": rows["inputs"][:2]}
    answers = [api.client.post("/predict", json=request).json() for api in cluster.apis]
    assert answers[0]["adapter"]["digest"] == job["result"]["digest"]
    assert answers[0] == answers[1] == cluster.client.post("/predict", json=request).json()


def test_what_one_replica_has_acknowledged_the_other_answers_with(cluster: Cluster) -> None:
    one, other = cluster.apis[0].client, cluster.apis[1].client
    base_NO = outputs(other.post("/predict", json={"adapter": None, "inputs": X}))
    for number in range(1, 11):
        version = _upload(one, "alternating", float(number))
        answer = other.post("/predict", json={"adapter": "alternating", "inputs": X})
        assert answer.headers["x-served-by"] == "api-2"
        assert answer.json()["adapter"]["digest"] == version["digest"]
        np.testing.assert_allclose(outputs(answer) - base_NO, number, rtol=1e-5)
        one, other = other, one
        assert other.get("/adapters/alternating").json()["live"]["version"] == number
        one, other = other, one
    assert one.delete("/adapters/alternating").status_code == 204
    assert other.post("/predict", json={"adapter": "alternating", "inputs": X}).status_code == 404


def test_each_name_has_its_replica_under_v2_and_both_replicas_have_some(cluster: Cluster) -> None:
    for name in NAMES:
        _upload(cluster.client, name, 1.0)
    by_name: dict[str, set[str]] = {name: set() for name in NAMES}
    for _ in range(3):
        with cluster.connect() as client:
            for name in NAMES:
                for answer in (
                    client.post(f"/v2/models/{name}/infer", json={"inputs": [TENSOR]}),
                    client.get(f"/v2/models/{name}"),
                    client.get(f"/v2/models/{name}/ready"),
                ):
                    assert answer.status_code == 200, answer.text
                    by_name[name].add(answer.headers["x-served-by"])
    assert all(len(replicas) == 1 for replicas in by_name.values()), by_name
    spread = Counter(replica for replicas in by_name.values() for replica in replicas)
    assert spread.keys() == {"api-1", "api-2"}
    print(f"names by replica: {dict(spread)}")


class _Load:
    """Requests of each kind from several clients, one after the other, and what became of them."""

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, int]] = Counter()
        """By replica and status."""
        self.failed: list[str] = []
        self._stop = threading.Event()

    @contextmanager
    def on(self, cluster: Cluster) -> Iterator["_Load"]:
        """Send them until the end of the block."""
        threads = [threading.Thread(target=self._run, args=(cluster, index)) for index in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def wait_for(self, more: int) -> None:
        """Wait for that many more answers."""
        goal = self.answers.total() + more
        eventually(lambda: self.answers.total() >= goal, what=f"{goal} answers")

    def _run(self, cluster: Cluster, index: int) -> None:
        with cluster.connect() as client:
            while not self._stop.is_set():
                for name in NAMES[index::CLIENTS]:
                    self._send(client, "POST", "/predict", {"adapter": name, "inputs": X})
                    self._send(client, "POST", f"/v2/models/{name}/infer", {"inputs": [TENSOR]})
                    self._send(client, "GET", f"/adapters/{name}")
                    self._send(client, "PUT", "/adapters/same", {"A": [[1.0], [1.0]], "B": [[1.0] * 10]})

    def _send(self, client: httpx.Client, method: str, path: str, body: object = None) -> None:
        try:
            answer = client.request(method, path, json=body)
        except httpx.TransportError as error:
            self.failed.append(f"{method} {path}: {error!r}")
            return
        self.answers[answer.headers.get("x-served-by", "haproxy"), answer.status_code] += 1
        if answer.status_code >= 300:
            self.failed.append(f"{method} {path}: {answer.status_code} {answer.text}")
        self._stop.wait(PAUSE_SECONDS)


def _restart_each(cluster: Cluster) -> _Load:
    """Restart one replica after the other under load."""
    for name in NAMES:
        _upload(cluster.client, name, 1.0)
    with _Load().on(cluster) as load:
        load.wait_for(100)
        for api in cluster.apis:
            assert api.stop() == 0
            load.wait_for(50)
            api.start()
            api.wait_until_ready()
            cluster.wait_until_balanced(api)
            load.wait_for(50)
    print(f"answers: {dict(load.answers)}")
    return load


def test_a_rolling_restart_fails_no_request(cluster: Cluster) -> None:
    assert _restart_each(cluster).failed == []


def test_the_drain_alone_is_enough_for_a_rolling_restart(cluster: Cluster, tmp_path: Path) -> None:
    config = HAPROXY_CONFIG.read_text()
    for line in ("    option redispatch 1\n", "    retry-on conn-failure empty-response\n"):
        assert line in config
        config = config.replace(line, "")
    (tmp_path / "haproxy.cfg").write_text(config.replace("    retries 3\n", "    retries 0\n"))
    # With a drain of 0 s, such a proxy answers many of the requests with 503.
    with cluster.another_proxy(tmp_path / "haproxy.cfg"):
        assert _restart_each(cluster).failed == []


def test_a_killed_replica_costs_at_most_the_changes_that_it_had(cluster: Cluster) -> None:
    for name in NAMES:
        _upload(cluster.client, name, 1.0)
    killed, other = cluster.apis
    with _Load().on(cluster) as load:
        load.wait_for(100)
        before = load.answers[other.name, 200]
        killed.kill()
        eventually(lambda: load.answers[other.name, 200] > before + 100, what="answers of the other replica")
        killed.start()
        killed.wait_until_ready()
        cluster.wait_until_balanced(killed)
        load.wait_for(50)
    print(f"answers: {dict(load.answers)}, failed: {load.failed}")
    # Predictions and reads are repeated. A client that loses a change loses no other one before the replica has ended.
    assert all(failure.startswith("PUT ") for failure in load.failed), load.failed
    assert len(load.failed) <= CLIENTS


def test_a_replica_starts_with_an_empty_folder_and_with_that_of_another(cluster: Cluster) -> None:
    version = _upload(cluster.client, "kept", 2.0)
    emptied, source = cluster.apis
    assert emptied.stop() == 0
    shutil.rmtree(emptied.folder)
    emptied.start()
    third = cluster.new_replica("api-3", "serve")
    # Files are made and removed there meanwhile.
    shutil.copytree(source.folder, third.folder, ignore=shutil.ignore_patterns("tmp"))
    third.start()
    for replica in (emptied, third):
        replica.wait_until_ready()
        answer = replica.client.post("/predict", json={"adapter": "kept", "inputs": X})
        assert answer.headers["x-served-by"] == replica.name
        assert answer.json()["adapter"]["digest"] == version["digest"]
    assert third.stop() == 0
    cluster.wait_until_balanced()


def test_a_trainer_that_stops_hands_its_job_to_the_other_with_its_checkpoint(cluster: Cluster) -> None:
    job_id = submit_endless(cluster.client, "endless")

    def holders() -> list[Replica]:
        name = f"{job_id}.1.safetensors"
        return [trainer for trainer in cluster.trainers if (trainer.folder / "checkpoints" / name).exists()]

    (holder,) = eventually(holders, what="a checkpoint")
    assert holder.stop() == 0
    # A lease that has to run out would count as an attempt.
    job = cluster.client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["attempt"]) in (("queued", 0), ("running", 1))

    def log() -> list[str]:
        return [line["text"] for line in cluster.client.get(f"/jobs/{job_id}").json()["log"]]

    text = "continues from the checkpoint at step "
    eventually(lambda: any(line.startswith(text) for line in log()), what="the other trainer's attempt")
    assert cluster.client.get(f"/jobs/{job_id}").json()["attempt"] == 1
    cluster.client.post(f"/jobs/{job_id}/cancel").raise_for_status()
    holder.start()
