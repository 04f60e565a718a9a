"""The containers of deploy/kubernetes as processes: their commands, variables, probes and ends, with real storage."""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.lora.base_layer import load_base_layer
from app.settings import BUNDLED, Settings
from scripts import kubernetes
from tests.support.catalog_factories import as_upload, make_adapter
from tests.support.deadlines import scaled
from tests.support.external_programs import skip_or_fail
from tests.support.keys import bearer
from tests.support.object_server import new_url, object_server
from tests.support.postgres_server import PostgresServer
from tests.support.service import LORAPLEX, environment, eventually, free_port, wait_for_job

pytestmark = pytest.mark.slow
PORT = Settings.model_fields["port"].default


class Pod:
    """The container of a Deployment, as a process with its variables, arguments and data folder."""

    def __init__(self, name: str, manifests: list[kubernetes.Manifest], *, folder: Path, **own: str) -> None:
        (workload,) = (each for each in manifests if each["kind"] == "Deployment" and each["metadata"]["name"] == name)
        self.spec: Mapping[str, Any] = workload["spec"]["template"]["spec"]
        (self.container,) = self.spec["containers"]
        self.folder = folder / name
        variables = kubernetes.environment(workload, manifests)
        self.variables = environment() | variables | own | {"LORAPLEX_DATA_DIR": str(self.folder)}
        self.log = folder / f"{name}.log"
        with self.log.open("ab") as log:
            command = [LORAPLEX, *self.container["args"]]
            self.process = subprocess.Popen(command, env=self.variables, stdout=log, stderr=log)

    def run(self, *arguments: str) -> bytes:
        """Run a command in the container, and return its output."""
        return subprocess.run([LORAPLEX, *arguments], env=self.variables, check=True, stdout=subprocess.PIPE).stdout

    def is_alive(self) -> bool:
        """Run the command of the liveness probe on the data folder of this pod."""
        assert self.process.poll() is None, self.log.read_text()
        command = self.container["livenessProbe"]["exec"]["command"]
        return not subprocess.run(
            [part.replace("/data/", f"{self.folder}/") for part in command], check=False
        ).returncode

    def end(self) -> int:
        """End it as Kubernetes does, without the pause of preStop, and return its exit status."""
        self.process.terminate()
        return self.process.wait(scaled(self.spec["terminationGracePeriodSeconds"]))

    def close(self) -> None:
        """End it however it is doing."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def pods(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[tuple[Pod, Pod, httpx.Client]]:
    """A pod of api and one of trainer, and a client that uses the address of the pod, as Prometheus does."""
    try:
        manifests = list(kubernetes.build(kubernetes.FOLDER / "overlays" / "small"))
    except SystemExit as error:
        skip_or_fail(str(error))
    with ExitStack() as stack:
        bucket = stack.enter_context(object_server(tmp_path / "s3"))
        port = free_port()
        own = bucket.environment | {
            "LORAPLEX_DATABASE_URL": postgres_server.new_database(),
            "LORAPLEX_BLOB_URL": new_url(),
            "LORAPLEX_HOST": "127.0.0.1",
            "LORAPLEX_PORT": str(port),
        }
        api, trainer = (
            stack.enter_context(closing(Pod(name, manifests, folder=tmp_path, **own))) for name in ("api", "trainer")
        )
        host = {"Host": f"{kubernetes.POD_IP}:{PORT}"}
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=host, timeout=scaled(60))
        yield api, trainer, stack.enter_context(client)


def test_pods_start_pass_their_probes_work_and_end_in_time(pods: tuple[Pod, Pod, httpx.Client]) -> None:
    api, trainer, client = pods

    def passes(probe: str) -> bool:
        assert api.process.poll() is None, api.log.read_text()
        try:
            return client.get(api.container[probe]["httpGet"]["path"]).status_code == 200
        except httpx.TransportError:
            return False

    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        eventually(lambda probe=probe: passes(probe), what=probe)  # type: ignore[misc]
    eventually(trainer.is_alive, what="the liveness of the trainer")

    # As `kubectl exec deployment/api -- loraplex keys create` runs it.
    created = api.run("keys", "create", "--scope", "predict,write,read,train,metrics")
    client.headers.update(bearer(json.loads(created)["key"]))
    assert (
        client.put("/adapters/acme", json=as_upload(make_adapter(1, base=load_base_layer(BUNDLED)))).status_code == 201
    )
    assert client.post("/predict", json={"adapter": "acme", "inputs": [[0.0] * 64]}).status_code == 200
    data = {"inputs": [[float(row == column) for column in range(64)] for row in range(20)], "targets": [0] * 20}
    training = {"method": "adamw", "loss": "cross_entropy", "epochs": 1}
    job = client.post("/adapters", json={"name": "globex", "data": data, "training": training}).raise_for_status()
    assert wait_for_job(client, job.json()["id"])["status"] == "succeeded"
    metrics = client.get("/metrics").raise_for_status().text
    assert set(re.findall(r"^loraplex_queue_seconds_count \S+", metrics, re.MULTILINE))

    assert trainer.is_alive()
    assert (trainer.end(), api.end()) == (0, 0)
