"""A request that is repeated with its idempotency key: one job, whichever worker answers."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.access.idempotency import KEPT_SECONDS, IdempotencyKeys, IdempotentRequest, fingerprint_of, remove_expired
from adapters.catalog.catalog import Catalog
from adapters.errors import IdempotencyInProgress, IdempotencyKeyReused
from adapters.storage.pending_blobs import BlobWriter
from app.bootstrap import open_catalog, open_queue
from app.service import Service
from app.settings import Settings
from tests.conftest import NewFolder
from tests.support.catalog_factories import submit
from tests.support.concurrent_clients import check_duplicates, post_duplicates
from tests.support.databases import database_settings
from tests.support.fork_server import run_code
from tests.support.service import serving, train
from tests.support.storage_kinds import on_both_storages

pytestmark = on_both_storages

I = 4
ROWS = {"inputs": [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]], "targets": [[1.0, 0.0], [0.0, 1.0]]}
TRAINING: dict[str, Any] = {"name": "acme", "rank": 1, "data": ROWS, "training": {"method": "adamw", "epochs": 1}}
EVALUATION: dict[str, Any] = {"adapters": [None], "data": ROWS}
REQUESTS: dict[str, dict[str, Any]] = {"/adapters": TRAINING, "/evaluations": EVALUATION}
DUPLICATES = 50


class Pair:
    """Two workers on one data folder, each with a client."""

    def __init__(self, one: tuple[httpx.Client, Service], other: tuple[httpx.Client, Service]) -> None:
        self.one, self.service = one
        self.other = other[0]

    def jobs(self, adapter: str) -> list[str]:
        """The ids of the jobs of an adapter."""
        return [job["id"] for job in self.one.get("/jobs", params={"adapter": adapter}).json()["data"]]


@pytest.fixture(scope="module")
def pair(new_folder: NewFolder) -> Iterator[Pair]:
    """Two workers."""
    settings = Settings(data_dir=new_folder("idempotency"), base=f"random:{I},2,3", max_queued_jobs=1000)
    with serving(settings) as one, serving(settings) as other:
        yield Pair(one, other)


def post(client: httpx.Client, path: str, key: str, body: Any, **headers: str) -> httpx.Response:
    """`POST` with an idempotency key."""
    return client.post(path, json=body, headers={"Idempotency-Key": key, **headers})


@pytest.mark.parametrize("path", REQUESTS)
def test_a_repeated_request_returns_the_same_job_from_every_worker(pair: Pair, path: str) -> None:
    body = REQUESTS[path] | ({"name": "repeated"} if path == "/adapters" else {})
    first, *again = [post(client, path, f"key of {path}", body) for client in (pair.one, pair.one, pair.other)]
    for answer in (first, *again):
        assert answer.status_code == 202, answer.text
        assert answer.json() == first.json()
        assert answer.headers["Location"] == f"/jobs/{first.json()['id']}"
    assert [answer.headers.get("Idempotent-Replayed") for answer in (first, *again)] == [None, "true", "true"]
    without = pair.one.post(path, json=body)
    assert without.json()["id"] != first.json()["id"]
    assert "Idempotent-Replayed" not in without.headers


def test_a_repetition_shows_the_job_as_it_is_then(pair: Pair) -> None:
    body = TRAINING | {"name": "cancelled"}
    job_id = post(pair.one, "/adapters", "cancelled", body).json()["id"]
    pair.other.post(f"/jobs/{job_id}/cancel").raise_for_status()
    answer = post(pair.one, "/adapters", "cancelled", body)
    assert (answer.status_code, answer.json()["id"], answer.json()["status"]) == (202, job_id, "cancelled")


def test_an_update_is_queued_once(data_folder: Path) -> None:
    settings = Settings(data_dir=data_folder, base=f"random:{I},2,3")
    data = ROWS
    with serving(settings, trainer=True) as (client, _):
        train(client, name="acme", rank=1, data=data, training={"method": "closed_form", "keep_statistics": True})
        answers = [post(client, "/adapters/acme/update", "k", {"add": data}) for _ in range(2)]
        reused = post(client, "/adapters/acme/update", "k", {"forget": data})
        assert len(client.get("/jobs").json()["data"]) == 2
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    assert answers[1].headers["Idempotent-Replayed"] == "true"
    assert (reused.status_code, reused.json()["code"]) == (422, "idempotency_key_reused")


def test_a_key_goes_with_one_body_and_one_route(pair: Pair) -> None:
    first = post(pair.one, "/adapters", "reused", TRAINING | {"name": "reused"})
    others = [
        post(pair.one, "/adapters", "reused", TRAINING | {"name": "reused", "rank": 2}),
        # The same JSON in other bytes.
        post(pair.other, "/adapters", "reused", {**REQUESTS["/adapters"], "rank": 1, "name": "reused "}),
        post(pair.one, "/evaluations", "reused", EVALUATION),
        post(pair.one, "/adapters/reused/update", "reused", TRAINING | {"name": "reused"}),
    ]
    for answer in others:
        assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused"), answer.text
        assert answer.json()["field"] == "Idempotency-Key"
    assert pair.jobs("reused") == [first.json()["id"]]


def test_tenants_have_keys_of_their_own(pair: Pair) -> None:
    pair.one.put("/tenants/globex", json={}).raise_for_status()
    body = TRAINING | {"name": "shared"}
    answers = [post(pair.one, "/adapters", "shared", body, **{"X-Tenant": who}) for who in ("default", "globex")]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json()["id"] != answers[1].json()["id"]
    assert not any("Idempotent-Replayed" in answer.headers for answer in answers)
    # Another body: what the other tenant sent with the key does not matter.
    pair.one.put("/tenants/initech", json={}).raise_for_status()
    assert post(pair.one, "/adapters", "shared", body | {"rank": 2}, **{"X-Tenant": "initech"}).status_code == 202


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"{", "not_json"), (b'{"name": "refused"}', "missing_field"), (b'{"name": 1, "data": {}}', None)],
)
def test_a_request_that_fails_releases_its_key(pair: Pair, content: bytes, code: str | None) -> None:
    headers, key = {"Content-Type": "application/json"}, f"fails with {code}"
    failed = pair.one.post("/adapters", content=content, headers=headers | {"Idempotency-Key": key})
    assert failed.status_code in (400, 422)
    assert code in (None, failed.json()["code"])
    answer = post(pair.other, "/adapters", key, TRAINING | {"name": "after-a-failure"})
    assert answer.status_code == 202, answer.text
    assert "Idempotent-Replayed" not in answer.headers


def test_a_dry_run_takes_no_key(pair: Pair) -> None:
    body = TRAINING | {"name": "dry"}
    assert post(pair.one, "/adapters?dry_run=true", "dry", body).status_code == 200
    assert "Idempotent-Replayed" not in post(pair.one, "/adapters", "dry", body).headers


@pytest.mark.parametrize("key", ["", "k" * 256, "k\xe9y", "tab\tkey"])
def test_a_key_that_is_not_printable_ascii_or_too_long_is_refused(pair: Pair, key: str) -> None:
    answer = pair.one.post("/adapters", json=TRAINING, headers=[(b"Idempotency-Key", key.encode("latin-1"))])
    assert (answer.status_code, answer.json()["code"]) == (422, "out_of_range")
    assert answer.json()["field"] == "Idempotency-Key"


def test_two_keys_are_refused_and_the_longest_key_is_accepted(pair: Pair) -> None:
    answer = pair.one.post("/adapters", json=TRAINING, headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "b")])
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_combination")
    assert post(pair.one, "/adapters", "~" * 255, TRAINING | {"name": "longest"}).status_code == 202


def test_while_the_first_request_runs_its_repetitions_are_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()
    queue_job = pair.service.queue.submit

    def wait_before(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        assert go_on.wait(60)
        return queue_job(*args, **kwargs)

    monkeypatch.setattr(pair.service.queue, "submit", wait_before)
    body = TRAINING | {"name": "running"}
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=pair.one.base_url, timeout=60) as client:
        first = pool.submit(post, client, "/adapters", "running", body)
        try:
            assert entered.wait(60)
            for other in (pair.one, pair.other):
                answer = post(other, "/adapters", "running", body)
                assert (answer.status_code, answer.json()["code"]) == (409, "idempotency_in_progress")
                assert int(answer.headers["Retry-After"]) >= 1
                answer = post(other, "/adapters", "running", body | {"rank": 2})
                assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")
        finally:
            go_on.set()
        job_id = first.result().json()["id"]
    assert [post(other, "/adapters", "running", body).json()["id"] for other in (pair.one, pair.other)] == [job_id] * 2
    assert pair.jobs("running") == [job_id]


def test_many_duplicates_at_once_make_one_job(pair: Pair) -> None:
    urls = [pair.one.base_url, pair.other.base_url]
    answers = post_duplicates(urls, TRAINING | {"name": "many"}, key="many", count=DUPLICATES)
    (job_id,) = pair.jobs("many")
    check_duplicates(answers, job_id)


# --- without HTTP: the clock, and processes that die


class Keys(IdempotencyKeys):
    """The keys of one process, with a clock that a test sets."""

    def __init__(self, catalog: Catalog, writer: BlobWriter | None = None) -> None:
        self.time = 1e9
        super().__init__(catalog.database, writer or catalog.writer, now=lambda: self.time)


@pytest.fixture
def catalog(data_folder: Path) -> Iterator[Catalog]:
    """An empty catalogue."""
    with closing(open_catalog(Settings(data_dir=data_folder, **database_settings(data_folder)))) as opened:
        yield opened


def request_with(body: bytes = b"{}", *, key: str = "k", tenant: str = "default") -> IdempotentRequest:
    """A request to train."""
    return IdempotentRequest(tenant, key, fingerprint_of("POST", "/adapters", body))


def complete(catalog: Catalog, keys: IdempotencyKeys, request: IdempotentRequest, job_id: str) -> None:
    """Store the job of a request, and nothing else."""
    with catalog.database.write() as connection:
        keys.complete(request, connection, job_id)


def test_a_key_is_kept_for_a_day(catalog: Catalog) -> None:
    keys, first = Keys(catalog), request_with()
    assert keys.claim(first) is None
    keys.time += 5
    complete(catalog, keys, first, "j1")
    keys.time += KEPT_SECONDS - 1
    assert keys.find(request_with()) == keys.claim(request_with()) == "j1"
    assert remove_expired(catalog.database, now=keys.time) == 0
    keys.time += 1
    assert keys.find(request_with(b"another")) is None
    assert remove_expired(catalog.database, now=keys.time) == 1
    assert remove_expired(catalog.database, now=keys.time) == 0


def test_an_expired_key_can_be_used_again_before_it_is_removed(catalog: Catalog) -> None:
    keys, first, second = Keys(catalog), request_with(), request_with(b"another")
    keys.claim(first)
    complete(catalog, keys, first, "j1")
    keys.time += KEPT_SECONDS
    assert keys.claim(second) is None
    complete(catalog, keys, second, "j2")
    assert keys.find(request_with(b"another")) == "j2"


def test_a_request_that_lost_its_claim_stores_nothing(catalog: Catalog, data_folder: Path) -> None:
    with closing(open_catalog(Settings(data_dir=data_folder, **database_settings(data_folder)))) as elsewhere:
        one, other = Keys(catalog), Keys(elsewhere)
        slow, quick = request_with(), request_with()
        assert one.claim(slow) is None
        with pytest.raises(IdempotencyInProgress):
            other.claim(quick)
        # Longer than a living process holds a claim.
        other.time = one.time + 3600
        assert other.claim(quick) is None
        with pytest.raises(IdempotencyInProgress):
            complete(catalog, one, slow, "j1")
        one.release(slow)
        complete(elsewhere, other, quick, "j2")
        one.time = other.time
        assert one.find(request_with()) == "j2"
        with pytest.raises(IdempotencyKeyReused):
            one.find(request_with(b"another"))


def test_a_claim_that_could_not_be_released_does_not_block_its_own_process(catalog: Catalog) -> None:
    keys = Keys(catalog)
    assert keys.claim(request_with()) is None
    assert keys.claim(request_with(b"another")) is None


def test_a_key_ends_with_the_process_that_claimed_it(tmp_path: Path) -> None:
    """`kill -9` after the claim, while the job's data are written, and before the commit."""
    steps = ("claim", "data", "commit")
    run_code(_DYING, tmp_path, *steps).check_returncode()
    for step in steps:
        settings = Settings(data_dir=tmp_path / step)
        with closing(open_catalog(settings)) as catalog:
            keys, queue, again = Keys(catalog), open_queue(catalog, settings), request_with(b"another")
            assert queue.list(tenant="default") == []
            assert keys.find(request_with()) is None
            assert keys.claim(again) is None
            submit(queue, "j2", on_submit=partial(keys.complete, again))
            assert keys.find(request_with(b"another")) == "j2"
            assert [job.id for job in queue.list(tenant="default")] == ["j2"]


# Claims a key in a process of its own for each step, which dies there.
_DYING = """
import os, signal, sys
from pathlib import Path
from app.bootstrap import open_catalog, open_queue
from app.settings import Settings
from tests.integration.access.test_idempotency import Keys, request_with
from tests.support.catalog_factories import submit

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def claim(folder, last_step):
    settings, request = Settings(data_dir=folder), request_with()
    catalog = open_catalog(settings)
    keys = Keys(catalog)
    assert keys.claim(request) is None
    if last_step == "claim":
        die()

    def store(connection, job_id):
        keys.complete(request, connection, job_id)
        die()

    submit(open_queue(catalog, settings), "j1", data=die if last_step == "data" else b"rows", on_submit=store)

folder, *steps = sys.argv[1:]
for step in steps:
    pid = os.fork()
    if pid == 0:
        try:
            claim(Path(folder) / step, step)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
"""
