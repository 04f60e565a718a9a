"""A fit that wants more memory than it may have: its job fails, and nothing else does."""

# I in_features · O out_features
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from adapters.training.execution.fit_client import ChildFitter, FitterDied, _log_lines, is_allocation_failure
from app.bootstrap import open_child_fitter
from app.settings import Settings
from tests.conftest import Serve
from tests.support.fork_server import own_starts
from tests.support.process_tree import FIT, Process, TrainerProcess, is_running, the
from tests.support.service import ServiceProcess, eventually, serving, wait_for_job

pytestmark = pytest.mark.slow

WIDTH = 2000
BASE = f"identity:{WIDTH}"
LITTLE = 2**29
"""The least that a trainer may be given. A closed form on this layer has several matrices of 32 MB at once."""
_ROW = [1.0] + [0.0] * (WIDTH - 1)


@pytest.fixture(autouse=True, scope="module")
def _own_starts() -> Iterator[None]:
    with own_starts():
        yield


def _body(name: str, **training: Any) -> dict[str, Any]:
    data = {"inputs": [_ROW, _ROW[::-1]], "targets": [_ROW[::-1], _ROW]}
    return {"name": name, "rank": 2, "data": data, "training": {"method": "adamw"} | training}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """It believes its trainers to have the usual memory."""
    with ServiceProcess(tmp_path_factory.mktemp("memory") / "data", base=BASE, trainers=0) as started:
        yield started


@pytest.fixture(scope="module")
def trainer(service: ServiceProcess) -> Iterator[TrainerProcess]:
    """It has less."""
    with TrainerProcess(service.data_dir, base=BASE, trainer_memory_bytes=LITTLE, forks=False) as started:
        yield started


def test_a_fit_that_runs_out_of_memory_fails_alone(service: ServiceProcess, trainer: TrainerProcess) -> None:
    client = service.client
    client.put("/adapters/served", json={"A": [[1.0]] * WIDTH, "B": [_ROW]}).raise_for_status()
    question = {"adapter": "served", "inputs": [[2.0] * WIDTH]}
    answer = client.post("/predict", json=question).raise_for_status().json()
    np.testing.assert_allclose(answer["outputs"], [[4.0] * WIDTH])
    small = client.post("/adapters", json=_body("small", epochs=2)).json()["id"]
    assert wait_for_job(client, small)["status"] == "succeeded"
    fit = the(trainer.process.pid, FIT)
    large = client.post("/adapters", json=_body("large", method="closed_form")).json()["id"]
    next_one = client.post("/adapters", json=_body("small", epochs=2)).json()["id"]
    asked = 0
    while (job := client.get(f"/jobs/{large}").json())["status"] in ("queued", "running"):
        assert client.post("/predict", json=question).json() == answer
        asked += 1
    assert asked > 1
    assert (job["status"], job["error"]["code"], job["attempt"]) == ("failed", "out_of_memory", 1)
    assert client.get("/adapters/large").status_code == 404
    # The next one gets a process whose heap is not in pieces.
    assert wait_for_job(client, next_one)["status"] == "succeeded"
    assert not is_running(fit)
    assert trainer.process.poll() is None
    assert client.post("/predict", json=question).json() == answer


def test_a_training_that_is_estimated_to_need_more_is_refused_with_the_numbers(tmp_path: Path) -> None:
    settings = Settings(base=BASE, data_dir=tmp_path, trainer_memory_bytes=LITTLE)
    with serving(settings) as (client, _):
        for query in ("", "?dry_run=true"):
            answer = client.post(f"/adapters{query}", json=_body("large", method="closed_form"))
            problem = answer.json()
            assert (answer.status_code, problem["code"]) == (422, "estimate_too_large")
            # At the very least the sums of the rows and their decomposition, in float64.
            assert int(problem["given"]) > max(LITTLE, 3 * 8 * WIDTH**2)
            assert str(LITTLE) in problem["expected"]
            assert "LORAPLEX_TRAINER_MEMORY_BYTES" in problem["detail"]
        assert _stored(client, tmp_path) == ([], [])
        assert client.post("/adapters", json=_body("small")).status_code == 202


def _stored(client: httpx.Client, folder: Path) -> tuple[list[Any], list[str]]:
    """Jobs, and files of the data folder beside the catalogue and the processes' figures."""
    kept = {"catalog.sqlite3", "catalog.sqlite3-journal", "writers", "migrate.lock", "metrics"}
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    files = [str(path) for path in paths if path.parts[0] not in kept and path.name != "store-id"]
    return client.get("/jobs").json()["data"], files


def test_a_dry_run_says_what_would_be_trained_and_stores_nothing(serve: Serve, tmp_path: Path) -> None:
    client, service = serve()
    rows, held_out = 40, 10
    data = {"inputs": [[float(n)] * 10 for n in range(rows)], "targets": [[1.0, float(n)] for n in range(rows)]}
    training = {"method": "adamw", "epochs": 30, "batch_size": 8}
    body = {"name": "acme", "rank": 2, "data": data, "training": training, "split": {"by": "rows", "fraction": 0.25}}
    answer = client.post("/adapters?dry_run=true", json=body)
    plan = answer.json()
    assert (answer.status_code, answer.headers.get("Location")) == (200, None)
    assert set(plan["spec"]["training"]) >= {"method", "loss", "epochs", "learning_rate", "batch_size", "seed", "init"}
    assert plan["spec"]["alpha"] == 2
    assert plan["spec"]["split"]["train"]["rows"] == rows - held_out
    assert plan["spec"]["split"]["held_out"]["rows"] == held_out
    assert plan["adapters"] == 1
    assert 2**27 < plan["estimate"]["memory_bytes"] < service.settings.trainer_memory_bytes
    assert 0 < plan["estimate"]["seconds"] < 60
    fleet = body | {"name": "acme-{group}", "data": {**data, "groups": [n % 4 for n in range(rows)]}}
    assert client.post("/adapters?dry_run=true", json=fleet).json()["adapters"] == 4
    assert _stored(client, tmp_path / "data") == ([], [])
    assert client.get("/adapters").json()["data"] == []
    # What is queued then is what was said.
    job = client.post("/adapters", json=body).json()
    assert job["spec"] == plan["spec"]
    claim = service.queue.claim(base=service.base.fingerprint)
    assert claim is not None
    assert claim.training.memory_bytes == plan["estimate"]["memory_bytes"]


@pytest.mark.parametrize("query", ["dry_run=maybe", "dry_run=", "dryrun=true"])
def test_a_dry_run_that_is_misspelt_is_refused_and_not_trained(serve: Serve, tmp_path: Path, query: str) -> None:
    client, _ = serve()
    data = {"inputs": [[1.0] * 10], "targets": [[1.0] * 2]}
    answer = client.post(f"/adapters?{query}", json={"name": "acme", "rank": 1, "data": data})
    assert answer.status_code == 422, answer.text
    assert _stored(client, tmp_path / "data") == ([], [])


@pytest.mark.parametrize(
    ("last_words", "expected"),
    [
        ("terminate called after throwing an instance of 'std::bad_alloc'\\n  what():  std::bad_alloc", True),
        ("libgomp: Thread creation failed: Resource temporarily unavailable", True),
        ("Traceback (most recent call last):\\nMemoryError", True),
        ("Segmentation fault", False),
        ("", False),
    ],
)
def test_a_fit_whose_process_aborts_for_want_of_memory_is_known_by_its_last_words(
    last_words: str, expected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    dying = f'import os, sys; sys.stderr.write("early\\n" * 100 + "{last_words}\\n"); sys.stderr.flush(); os.abort()'
    words: deque[bytes] = deque(maxlen=20)
    with subprocess.Popen([sys.executable, "-c", dying], stderr=subprocess.PIPE) as process:
        _log_lines(process, words)
    assert any(is_allocation_failure(line.decode()) for line in words) is expected
    # Whoever reads the trainer's log reads it there too.
    assert caplog.text.count("early") == 100


def test_its_threads_begin_before_its_limit_and_all_of_them_have_what_others_leave() -> None:
    counted = []
    for threads in (1, 3):
        with _fit_process(threads) as (_, process):
            assert process.rlimit(psutil.RLIMIT_DATA) == (LITTLE, LITTLE)
            assert {os.sched_getscheduler(thread.id) for thread in process.threads()} == {os.SCHED_IDLE}
            counted.append(process.num_threads())
    # It has had no job yet. Some threads are Python's and numpy's; of torch's the main thread is one.
    assert counted[1] - counted[0] >= 2


def test_it_is_what_the_kernel_ends_first_and_that_is_no_fault_of_its_job() -> None:
    with _fit_process(1) as (fitter, process):
        assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "1000\n"
        assert Path("/proc/self/oom_score_adj").read_text() != "1000\n"
        process.kill()
        with pytest.raises(FitterDied) as death:
            eventually(lambda: fitter.next_frame(0.1), what="its death")
        assert not death.value.out_of_memory


@contextmanager
def _fit_process(threads: int) -> Iterator[tuple[ChildFitter, Process]]:
    fitter = open_child_fitter(Settings(base="zeros:2,2", trainer_threads=threads, trainer_memory_bytes=LITTLE))
    try:
        assert eventually(lambda: fitter.is_ready(0.1), what="a process that fits")
        yield fitter, psutil.Process(fitter.start().pid)
    finally:
        fitter.kill()
