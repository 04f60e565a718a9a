"""An upload that repairs a corrupt file is seen by every process that answers."""

from pathlib import Path

import pytest

from tests.support.process_tree import workers
from tests.support.service import ServiceProcess, eventually

pytestmark = pytest.mark.slow

BODY = {"A": [[1.0]] * 2, "B": [[1.0] * 10]}


def test_every_worker_answers_after_a_repair(tmp_path: Path) -> None:
    ask = {"adapter": "acme", "inputs": [[0.5] * 10]}
    with ServiceProcess(tmp_path / "data", base="random:10,2,42", workers=2, trainers=0, cache_bytes=0) as service:
        eventually(lambda: len(workers(service)) == 2, what="two workers")
        service.client.put("/adapters/acme", json=BODY).raise_for_status()
        (blob,) = (path for path in (tmp_path / "data" / "blobs").iterdir() if path.stat().st_size > 100)
        blob.write_bytes(bytes(blob.stat().st_size))
        clients = [service.connect() for _ in range(16)]
        answers = [client.post("/predict", json=ask) for client in clients for _ in range(2)]
        assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(503, "blob_corrupt")}
        assert clients[0].put("/adapters/acme", json=BODY).status_code == 200
        for client in clients:
            answer = client.post("/predict", json=ask)
            assert answer.status_code == 200, answer.text
            client.close()
