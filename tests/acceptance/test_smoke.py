"""The service as its users start it: start, upload, predict, train, cancel, stop. `make test` runs no other service."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.catalog_factories import BASE, INPUTS_NI, as_upload, dense_answer
from tests.support.dense_oracle import random_adapter
from tests.support.long_jobs import submit_endless, versions, wait_until_it_steps
from tests.support.service import ServiceProcess, train


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder that holds packages of our packages' names."""
    for package in ("app", "adapters"):
        (tmp_path / "elsewhere" / package).mkdir(parents=True)
        (tmp_path / "elsewhere" / package / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    return tmp_path / "elsewhere"


def test_a_service_starts_trains_cancels_and_stops(tmp_path: Path, elsewhere: Path) -> None:
    adapter = random_adapter(BASE.out_features, BASE.in_features, 2)
    rows = INPUTS_NI.tolist()
    targets = dense_answer(adapter).tolist()
    with ServiceProcess(tmp_path / "data", base=BASE.source, cwd=elsewhere) as service:
        client = service.client
        client.put("/adapters/uploaded", json=as_upload(adapter)).raise_for_status()
        answer = client.post("/predict", json={"adapter": "uploaded", "inputs": rows}).raise_for_status()
        np.testing.assert_allclose(answer.json()["outputs"], targets, rtol=1e-4, atol=1e-4)

        data = {"inputs": rows, "targets": targets}
        job = train(client, name="trained", rank=2, data=data, training={"method": "closed_form", "ridge": 1e-6})
        assert job["status"] == "succeeded", job
        assert versions(client, "trained") == [1]

        endless = submit_endless(client, "cancelled")
        wait_until_it_steps(client, endless)
        assert client.post(f"/jobs/{endless}/cancel").json()["status"] == "cancelled"
        assert client.get("/adapters/cancelled").status_code == 404

        service.process.terminate()
        assert service.process.wait(60) == 0
        assert "Traceback" not in service.log.read_text()
    with ServiceProcess(tmp_path / "data", base=BASE.source, trainers=0) as again:
        answer = again.client.post("/predict", json={"adapter": "uploaded@1", "inputs": rows}).raise_for_status()
        np.testing.assert_allclose(answer.json()["outputs"], targets, rtol=1e-4, atol=1e-4)
