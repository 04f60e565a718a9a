"""The S3 server is gone for some time: what is in memory answers, and no version is stored without its bytes.

`FAULT_BUCKET_SECONDS` is the length of the outage.
"""

import time
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path

import psycopg
import pytest

from adapters.storage.blob_location import BlobLocation
from tests.acceptance.replicas.conftest import Start
from tests.acceptance.replicas.replica_load import PREDICT, ReplicaLoad
from tests.support.deadlines import scaled
from tests.support.fault_results import chosen_count, chosen_seed, recorded
from tests.support.object_server import object_server, objects_in
from tests.support.replica_client import Answer, Connection, question, sample
from tests.support.service import eventually

SECONDS = chosen_count("FAULT_BUCKET_SECONDS", 3)
_COLD = 2
_PAUSE_SECONDS = 0.05

pytestmark = [pytest.mark.slow, pytest.mark.timeout(scaled(240 + 3 * SECONDS))]


def test_without_the_bucket_adapters_in_memory_answer_and_no_version_lacks_its_bytes(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = chosen_seed()
    with ExitStack() as stack, recorded("outage of S3", seed) as counts:
        with object_server(tmp_path / "s3") as server:
            for name, text in server.environment.items():
                monkeypatch.setenv(name, text)
            cluster = start(objects=server)
            replicas = cluster.apis
            connections = [stack.enter_context(closing(Connection(replicas[number].port))) for number in range(2)]
            for number in range(_COLD):
                # The replica that publishes has a copy, and the other has none.
                assert connections[0].ask("PUT", f"/adapters/cold-{number}", sample(20 + number).body).status == 201
            load = stack.enter_context(ReplicaLoad(replicas, seed=seed, publishes=False))
            load.wait(0.2)
            server.process.kill()
            server.process.wait()
        began_at = time.monotonic()
        while time.monotonic() < began_at + SECONDS:
            for number, connection in enumerate(connections):
                _check_refused(
                    connection.ask("PUT", f"/adapters/new-{number}", sample(30 + number).body), "publish", counts
                )
            for number in range(_COLD):
                _check_refused(
                    connections[1].ask("POST", "/predict", question(f"cold-{number}")), "cold adapter", counts
                )
            load.wait(_PAUSE_SECONDS)
        ended_at = time.monotonic()
        with object_server(tmp_path / "s3", port=server.port):
            for number in range(_COLD):
                _wait_for_answer(connections[1], f"cold-{number}")
            assert connections[1].ask("PUT", "/adapters/new-0", sample(30).body).status == 201
            with psycopg.connect(cluster.database_url.replace("+psycopg", "")) as database:
                files = {file for (file,) in database.execute("SELECT file FROM versions")}
            stored = objects_in(BlobLocation(folder=tmp_path, url=cluster.blob_url), "blobs")
            assert files <= stored, files - stored
            counts["versions whose bytes are stored"] = len(files)
        meanwhile = [one for one in load.outcomes if one.sent_at > began_at and one.ended_at < ended_at]
        assert {(one.kind, one.status) for one in meanwhile} == {(PREDICT, 200)}
        assert load.unanswered == 0
        counts["seconds"] = SECONDS
        counts["warm adapters: answers 200"] = len(meanwhile)


def _wait_for_answer(connection: Connection, name: str) -> None:
    eventually(
        lambda: connection.ask("POST", "/predict", question(name)).status == 200, what="the answer with a cold adapter"
    )


def _check_refused(answer: Answer, what: str, counts: Counter[str]) -> None:
    assert (answer.status, answer.body["code"]) == (503, "storage_failed"), answer
    assert int(answer.headers["retry-after"]) >= 1
    counts[f"{what}: 503"] += 1
