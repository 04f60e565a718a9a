"""The commands on the data folder, beside a service under load."""

import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.fork_server import ForkedPopen
from tests.support.service import LORAPLEX, ServiceProcess, environment

pytestmark = pytest.mark.slow


def _run(*arguments: Any, status: int = 0) -> str:
    command = [str(LORAPLEX), *map(str, arguments)]
    with ForkedPopen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        output, errors = (text.decode() for text in process.communicate(timeout=120))
    assert process.returncode == status, output + errors
    return output


def _body(number: int) -> dict[str, Any]:
    return {"A": [[float(number)]] * 2, "B": [[0.5] * 10]}


def test_a_backup_under_load_restores_to_a_service_with_all_that_was_acknowledged(tmp_path: Path) -> None:
    acknowledged: dict[str, str] = {}
    stop = threading.Event()
    with ServiceProcess(tmp_path / "data", base="random:10,2,42", workers=2, trainers=0) as service:

        def churn(thread: int) -> None:
            with service.connect() as client:
                for number in range(1, 100_000):
                    if stop.is_set():
                        break
                    name = f"t{thread}-{number}"
                    answer = client.put(f"/adapters/{name}", json=_body(number)).raise_for_status()
                    acknowledged[name] = answer.json()["digest"]
                    client.put(f"/adapters/gone-{thread}", json=_body(number)).raise_for_status()
                    client.delete(f"/adapters/gone-{thread}?purge={'true' if number % 2 else 'false'}")

        threads = [threading.Thread(target=churn, args=(thread,)) for thread in range(3)]
        for thread in threads:
            thread.start()
        try:
            while len(acknowledged) < 60:
                stop.wait(0.01)
            before = dict(acknowledged)
            assert "0 findings" in _run("doctor", "--data-dir", tmp_path / "data")
            _run("backup", tmp_path / "backup.tar", "--data-dir", tmp_path / "data")
            assert "bytes freed" in _run("gc", "--data-dir", tmp_path / "data")
            assert "0 findings" in _run("doctor", "--data-dir", tmp_path / "data")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    _run("restore", tmp_path / "backup.tar", "--data-dir", tmp_path / "restored")
    assert "0 findings" in _run("doctor", "--data-dir", tmp_path / "restored")
    with ServiceProcess(tmp_path / "restored", base="random:10,2,42", trainers=0) as service:
        for name, digest in before.items():
            answer = service.client.post("/predict", json={"adapter": name, "inputs": [[1.0] * 10]}).raise_for_status()
            assert answer.json()["adapter"]["digest"] == digest
    _run("restore", tmp_path / "backup.tar", "--data-dir", tmp_path / "restored", status=1)
