"""How jobs end that do not end well. (The service and the trainer are threads of this process; the fits are not.)"""

import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import httpx
import pytest

from adapters.errors import StorageFull
from app.service import Service
from app.settings import Settings
from tests.conftest import Serve
from tests.support.catalog_factories import stored_files
from tests.support.deadlines import scaled
from tests.support.long_jobs import submit, submit_endless, versions, wait_until_it_runs
from tests.support.process_tree import FIT, Process, children, suspended
from tests.support.service import eventually, serving, wait_for_job

pytestmark = pytest.mark.slow


def _fit_process() -> Process | None:
    """The process that fits for the trainer in this process."""
    return next(iter(children(FIT)), None)


def _ready_fit(client: httpx.Client) -> Process:
    """The process that fits, once it has: one that is stopped before it is ready gets no job."""
    wait_for_job(client, submit(client, "first"))
    return eventually(_fit_process, what="the fit")


def _code(job: dict[str, Any]) -> tuple[str, str]:
    return job["status"], job["error"]["code"]


def _stored(service: Service) -> int:
    return len(stored_files(service.settings.data_dir))


def _full(*_: object, **__: object) -> NoReturn:
    raise StorageFull("the disk is full")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Service]]:
    """A service that trains, for the tests that leave it able to."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("training"), base="random:10,2,42", lease_seconds=1)
    with serving(settings, trainer=True, own_fitter=True) as started:
        yield started


def test_a_full_disk_ends_the_job_and_not_the_trainer(
    training: tuple[httpx.Client, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, service = training
    with monkeypatch.context() as patched:
        with suspended(_ready_fit(client)):
            job_id = submit(client, "filled")
            patched.setattr(service.catalog.blobs, "write", _full)
        assert _code(wait_for_job(client, job_id)) == ("failed", "storage_full")
    assert wait_for_job(client, submit(client, "filled"))["status"] == "succeeded"
    assert versions(client, "filled") == [1]


def test_an_end_that_cannot_be_written_is_found_again_when_the_lease_has_run_out(
    training: tuple[httpx.Client, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, service = training
    refused = threading.Event()

    def full(*_: object, **__: object) -> None:
        refused.set()
        _full()

    with monkeypatch.context() as patched:
        patched.setattr(service.queue, "succeed", _full)
        patched.setattr(service.queue, "fail", full)
        job_id = submit(client, "unheard")
        assert refused.wait(scaled(30))
    job = wait_for_job(client, job_id)
    assert job["status"] == "succeeded"
    assert job["attempt"] > 1
    assert versions(client, "unheard") == [1]


@pytest.mark.parametrize("committed", [True, False])
def test_a_publish_of_unknown_outcome_does_not_fail_the_job(
    training: tuple[httpx.Client, Service], monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    client, service = training
    publish, name = service.catalog.publish, f"unsure-{committed}"
    failed = threading.Event()

    def publish_once(*arguments: Any, **also: Any) -> Any:
        if failed.is_set():
            return publish(*arguments, **also)
        failed.set()
        if committed:
            publish(*arguments, **also)
        raise StorageFull("the disk is full", outcome_unknown=True)

    monkeypatch.setattr(service.catalog, "publish", publish_once)
    job = wait_for_job(client, submit(client, name))
    assert (job["status"], job["attempt"]) == ("succeeded", 1 if committed else 2)
    assert versions(client, name) == [1]


def test_a_heartbeat_that_cannot_be_written_does_not_end_a_fit(
    training: tuple[httpx.Client, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, service = training
    refused = threading.Event()

    def full(*_: object, **__: object) -> None:
        refused.set()
        _full()

    with monkeypatch.context() as patched:
        patched.setattr(service.queue, "heartbeat", full)
        with suspended(_ready_fit(client)):
            job_id = submit(client, "breathless")
            assert refused.wait(scaled(30))
    assert wait_for_job(client, job_id)["status"] == "succeeded"
    assert versions(client, "breathless") == [1]


def test_what_changed_since_a_job_was_queued_ends_it(training: tuple[httpx.Client, Service]) -> None:
    client, service = training
    stored = _stored(service)
    with suspended(_ready_fit(client)):
        wait_until_it_runs(client, submit(client, "first"))  # the others wait behind it
        client.put("/adapters/gone", json={"A": [[1.0], [1.0]], "B": [[1.0] * 10]}).raise_for_status()
        deleted, untouched, cancelled = (submit(client, name) for name in ("gone", "other", "other"))
        client.delete("/adapters/gone?purge=true").raise_for_status()
        for _ in range(2):
            answer = client.post(f"/jobs/{cancelled}/cancel")
            assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")

    assert _code(wait_for_job(client, deleted)) == ("failed", "adapter_deleted")
    assert wait_for_job(client, untouched)["status"] == "succeeded"
    assert client.get(f"/jobs/{cancelled}").json()["attempt"] == 0
    for job_id in (deleted, untouched):
        answer = client.post(f"/jobs/{job_id}/cancel")
        assert (answer.status_code, answer.json()["code"]) == (409, "job_ended")
    assert versions(client, "gone") == []
    assert versions(client, "other") == [1]
    assert _stored(service) == stored + 3  # two of `first`, one of `other`


def test_a_fit_that_dies_three_times_ends_its_job(training: tuple[httpx.Client, Service]) -> None:
    client, service = training
    stored = _stored(service)
    job_id = submit_endless(client, "deadly")
    for attempt in (1, 2, 3):
        wait_until_it_runs(client, job_id, attempt=attempt)
        eventually(_fit_process, what="the fit").kill()
    job = wait_for_job(client, job_id)
    assert _code(job) == ("failed", "worker_died")
    assert job["attempt"] == 3
    assert _stored(service) == stored
    assert versions(client, "deadly") == []


def test_two_services_of_different_base_layers_on_one_folder_leave_each_other_s_jobs(serve: Serve) -> None:
    client, _ = serve(base="random:10,2,42")
    job_id = submit(client, "first")
    other, _ = serve(trainer=True, base="random:10,2,43")
    assert wait_for_job(other, submit(other, "second"))["status"] == "succeeded"
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["attempt"], job["error"]) == ("queued", 0, None)
    back, _ = serve(trainer=True, base="random:10,2,42")
    assert wait_for_job(back, job_id)["status"] == "succeeded"
    made = {name: client.get(f"/adapters/{name}").json()["live"]["base"] for name in ("first", "second")}
    assert made == {
        "first": client.get("/base").json()["fingerprint"],
        "second": other.get("/base").json()["fingerprint"],
    }


def test_a_full_queue_says_when_to_come_back(serve: Serve) -> None:
    client, service = serve(max_queued_jobs=2)
    first, _ = submit(client), submit(client)
    stored = _stored(service)
    answer = _refused(client)
    assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
    assert int(answer.headers["Retry-After"]) >= 1
    assert _stored(service) == stored
    client.post(f"/jobs/{first}/cancel").raise_for_status()
    submit(client)


def _refused(client: httpx.Client) -> httpx.Response:
    data = {"inputs": [[1.0] * 10], "targets": [[1.0] * 2]}
    return client.post("/adapters", json={"name": "acme", "rank": 1, "data": data})
