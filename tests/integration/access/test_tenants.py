"""Two tenants with the same names: neither meets anything of the other on any route."""

import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import torch

from adapters.access.keys import Scope
from adapters.lora.adapter import Adapter
from app.http.endpoints import ENDPOINTS, Endpoint
from app.service import Service
from app.settings import Auth, Settings
from tests.conftest import NewFolder
from tests.integration.access.test_every_route import PAGES
from tests.support.catalog_factories import as_upload, referenced_files, stored_files
from tests.support.dense_oracle import answer, random_adapter, relative_error
from tests.support.keys import ALL_OF_A_TENANT, bearer, make_key, told
from tests.support.service import serving, train, wait_for_job

I, O = 4, 2
# Of the same length, so that answers about them are too.
SECRET, NOWHERE = "secret-name", "nobody-name"
CSV = {"Content-Type": "text/csv"}
ROWS: dict[str, Any] = {
    "inputs": [[float(n % 5), float(n % 3), 1.0, float(n)] for n in range(30)],
    "targets": [n % 2 for n in range(30)],
}
TABLE = "a,b,c,d,class\n" + "".join(
    f"{','.join(map(str, x))},{y}\n" for x, y in zip(ROWS["inputs"], ROWS["targets"], strict=True)
)
INPUTS_NI = torch.randn(3, I, generator=torch.Generator().manual_seed(1))
FITS = {"method": "adamw", "loss": "cross_entropy", "epochs": 1}
# Calls with a name of the caller's own choice, or about tenants and keys, which have tests of their own.
NAMED_ANEW = {"upload_adapter", "upload_dataset", "show_tenant", "put_tenant", "revoke_key"}


class Pair(NamedTuple):
    """A service with two tenants; each client has a key of one of them."""

    service: Service
    owner: httpx.Client
    other: httpx.Client
    jobs: Mapping[str, str]
    """Ids of the owner's jobs by kind."""
    own: Mapping[str, Adapter]
    """The adapter of each tenant that is named `shared`."""

    @property
    def marks(self) -> list[str]:
        """Texts that only answers to the owner may have."""
        digests = (version["digest"] for version in self.owner.get("/adapters/shared/versions").json()["data"])
        return [SECRET, *self.jobs.values(), *digests]


def _table(seed: int) -> dict[str, Any]:
    return as_upload(random_adapter(O, I, 2, seed=seed))


@pytest.fixture(scope="module")
def pair(new_folder: NewFolder) -> Iterator[Pair]:
    """A worker with a trainer, and two tenants; one has adapters, data sets and jobs that the other does not."""
    settings = Settings(data_dir=new_folder("tenants"), base=f"random:{I},{O},3", auth=Auth.KEYS)
    with serving(settings, trainer=True) as (client, service):
        headers = [bearer(make_key(service.keys, tenant, *ALL_OF_A_TENANT)) for tenant in ("owner", "other")]
        with (
            httpx.Client(base_url=client.base_url, headers=headers[0], timeout=60) as owner,
            httpx.Client(base_url=client.base_url, headers=headers[1], timeout=60) as other,
        ):
            own = {name: random_adapter(O, I, 2, seed=seed) for seed, name in enumerate(("owner", "other"))}
            for name, one in (("owner", owner), ("other", other)):
                one.put("/adapters/shared", json=as_upload(own[name])).raise_for_status()
            owner.put(f"/datasets/{SECRET}", content=TABLE, headers=CSV).raise_for_status()
            columns = {"dataset": SECRET, "inputs": {"columns": list("abcd")}, "targets": {"column": "class"}}
            trained = train(owner, name=SECRET, rank=1, data=columns, training=FITS)
            evaluation = {"adapters": [SECRET, "shared"], "data": ROWS}
            evaluated = owner.post("/evaluations", json=evaluation).raise_for_status().json()
            jobs = {"train": trained["id"], "evaluation": wait_for_job(owner, evaluated["id"])["id"]}
            yield Pair(service, owner, other, jobs, own)


# A body for each call that needs one to get as far as what its path names.
BODIES: Mapping[str, Any] = {
    "set_live": {"version": 1},
    "update_adapter": {"add": ROWS},
    "retry_job": {},
    "infer": {"inputs": [{"name": "inputs", "shape": [1, I], "datatype": "FP32", "data": [1.0] * I}]},
}
BODIES = {**BODIES, "infer_version": BODIES["infer"]}


def _call(client: httpx.Client, endpoint: Endpoint, place: str) -> httpx.Response:
    url = re.sub(r"{(\w+)}", lambda match: "1" if match[1] == "version" else place, endpoint.path)
    body = BODIES[endpoint.operation_id] if endpoint.body else None
    return client.request(endpoint.method, url, json=body)


def _told(response: httpx.Response, place: str) -> Any:
    """What an answer tells apart from the name or id that the request had."""
    status, headers, content = told(response)
    return status, headers, content.decode().replace(place, "PLACE")


def _is_named(endpoint: Endpoint) -> bool:
    return "{" in endpoint.path and endpoint.operation_id not in NAMED_ANEW


@pytest.mark.parametrize(
    "call", [pytest.param(one, id=f"{one.method} {one.path}") for one in ENDPOINTS if _is_named(one)]
)
def test_a_call_on_what_another_tenant_has_is_answered_as_one_on_nothing(pair: Pair, call: Endpoint) -> None:
    places = [(SECRET, NOWHERE)]
    if "{job_id}" in call.path:
        places = [(job, job[::-1]) for job in pair.jobs.values()]
    for theirs, nothing in places:
        answers = [_told(_call(pair.other, call, place), place) for place in (theirs, nothing)]
        assert answers[0] == answers[1]
        assert answers[0][0] == 404


@pytest.mark.parametrize("path", [one.path for one in ENDPOINTS if one.method == "GET" and "{" not in one.path])
def test_no_list_has_what_another_tenant_has(pair: Pair, path: str) -> None:
    shown = pair.other.get(path).text
    assert [mark for mark in pair.marks if mark in shown] == []
    if path in ("/adapters", "/datasets", "/jobs", "/v2/repository/index"):
        assert SECRET in pair.owner.get(path).text


@pytest.mark.parametrize("path", PAGES)
def test_no_page_has_what_another_tenant_has(pair: Pair, path: str) -> None:
    for place in (SECRET, pair.jobs["train"]):
        shown = pair.other.get(re.sub(r"{(\w+)(:path)?}", place, path))
        assert [mark for mark in pair.marks if mark != place and mark in shown.text] == []
        assert shown.status_code == (404 if "{" in path else 200) or path.startswith("/ui/try/row")


def test_the_traffic_of_all_tenants_is_shown_to_those_who_may_read_metrics(pair: Pair) -> None:
    for scopes, status in (([Scope.READ], 403), ([Scope.READ, Scope.METRICS], 200)):
        headers = bearer(make_key(pair.service.keys, "other", *scopes))
        assert pair.other.get("/ui/throughput", headers=headers).status_code == status
        assert ('id="traffic"' in pair.other.get("/", headers=headers).text) == (status == 200)


def test_the_overview_counts_what_the_tenant_has(pair: Pair) -> None:
    operator = {**bearer(make_key(pair.service.keys, "default", Scope.OPERATOR)), "X-Tenant": "default"}
    shown = pair.other.get("/", headers=operator).text
    figures = re.findall(r'<b class="number">(\d+)</b> <span>(?:adapter|version|data set|job)', shown)
    assert figures == ["0"] * len(figures) != []
    assert "Tenant: <b>default</b>" in shown


REFERENCES: Mapping[str, tuple[str, Any]] = {
    "predict": ("/predict", {"adapter": SECRET, "inputs": [[1.0] * I]}),
    "predict a version": ("/predict", {"adapter": f"{SECRET}@1", "inputs": [[1.0] * I]}),
    "predict by row": ("/predict", {"adapters": [None, SECRET], "inputs": [[1.0] * I] * 2}),
    "predict with options": ("/predict", {"adapter": SECRET, "inputs": [[1.0] * I], "return": ["labels"]}),
    "data set": (
        "/adapters",
        {"name": "a", "data": {"dataset": SECRET, "inputs": {"column": "a"}, "targets": "class"}},
    ),
    "initial adapter": ("/adapters", {"name": "a", "data": ROWS, "training": FITS | {"init": {"adapter": SECRET}}}),
    "evaluated adapter": ("/evaluations", {"adapters": [SECRET], "data": ROWS}),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_a_reference_to_what_another_tenant_has_is_one_to_nothing(pair: Pair, case: str) -> None:
    url, body = REFERENCES[case]
    answers = []
    for place in (SECRET, NOWHERE):
        # Twice: the owner's predictions have made the service remember what the name means.
        pair.owner.post("/predict", json={"adapter": SECRET, "inputs": [[1.0] * I]}).raise_for_status()
        text = json.dumps(body).replace(SECRET, place)
        response = pair.other.post(url, content=text, headers={"Content-Type": "application/json"})
        answers.append(_told(response, place))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404, answers[0]


def test_a_filter_finds_nothing_of_another_tenant(pair: Pair) -> None:
    for query in ({"adapter": SECRET}, {"prefix": pair.jobs["train"][:8]}):
        assert len(pair.owner.get("/jobs", params=query).json()["data"]) >= 1
        assert pair.other.get("/jobs", params=query).json()["data"] == []
    assert pair.other.get("/adapters", params={"prefix": SECRET[:3]}).json()["data"] == []


def test_both_are_answered_with_their_own_weights_at_the_same_time(pair: Pair) -> None:
    clients = {"owner": pair.owner, "other": pair.other}
    body = {"adapter": "shared", "inputs": INPUTS_NI.tolist()}
    wanted = {name: answer(pair.service.base, INPUTS_NI, adapter) for name, adapter in pair.own.items()}

    def predict(number: int) -> float:
        name = ("owner", "other")[number % 2]
        # Some of them change the catalogue, so that names are resolved again meanwhile.
        if number % 20 == 0:
            clients[name].put(f"/adapters/noise-{name}", json=_table(number)).raise_for_status()
        given = clients[name].post("/predict", json=body).raise_for_status().json()
        assert given["adapter"]["digest"] == pair.own[name].digest
        return relative_error(np.array(given["outputs"], np.float32), wanted[name])

    with ThreadPoolExecutor(8) as threads:
        assert max(threads.map(predict, range(200))) < 1e-5


def test_what_one_does_with_a_name_leaves_the_other_as_it_was(pair: Pair) -> None:
    for client in (pair.owner, pair.other):
        client.put("/adapters/both", json=_table(5), headers={"If-None-Match": "*"}).raise_for_status()
        client.put("/datasets/both", content=TABLE, headers=CSV | {"If-None-Match": "*"}).raise_for_status()
    before = {path: pair.other.get(path).json() for path in ("/adapters/both", "/datasets/both")}
    job = train(pair.owner, name="both", rank=1, data=ROWS, training=FITS, publish="always")
    assert (job["status"], job["result"]["version"]) == ("succeeded", 2), job["error"]
    pair.owner.post(f"/jobs/{job['id']}/revert").raise_for_status()
    assert pair.owner.get("/adapters/both").json()["aliases"] == {"live": 1}
    pair.owner.put("/adapters/both/aliases/live", json={"version": 2}).raise_for_status()
    for path in before:
        pair.owner.delete(path).raise_for_status()
    assert {path: pair.other.get(path).json() for path in before} == before
    # What is in the trash of one is not in that of the other.
    pair.other.delete("/adapters/both").raise_for_status()
    pair.other.post("/adapters/both/restore").raise_for_status()
    assert pair.other.get("/adapters/both").json() == before["/adapters/both"]
    assert pair.other.delete(f"/adapters/{SECRET}?purge=true").status_code == 404
    restored = pair.owner.post("/adapters/both/restore").raise_for_status().json()
    assert (restored["versions"], restored["aliases"]) == (2, {"live": 2})


def test_a_restart_keeps_both_and_the_sweep_removes_the_files_of_neither(data_folder: Path) -> None:
    settings = Settings(data_dir=data_folder, base=f"random:{I},{O},3")
    own = {name: random_adapter(O, I, 2, seed=seed) for seed, name in enumerate(("default", "other"))}
    with serving(settings) as (client, _):
        assert client.put("/tenants/other", json={"limits": {}}).status_code == 201
        for name, adapter in own.items():
            client.put("/adapters/shared", json=as_upload(adapter), headers={"X-Tenant": name}).raise_for_status()
        client.put("/adapters/gone", json=_table(9), headers={"X-Tenant": "other"}).raise_for_status()
        client.delete("/adapters/gone?purge=true", headers={"X-Tenant": "other"}).raise_for_status()
    with serving(settings) as (client, service):
        assert service.catalog.sweep() == 0
        assert stored_files(data_folder) == referenced_files(data_folder)
        for name, adapter in own.items():
            body = {"adapter": "shared", "inputs": INPUTS_NI.tolist()}
            given = client.post("/predict", json=body, headers={"X-Tenant": name}).raise_for_status().json()
            wanted = answer(service.base, INPUTS_NI, adapter)
            assert relative_error(np.array(given["outputs"], np.float32), wanted) < 1e-5


def test_a_tenant_is_made_shown_and_given_other_limits(pair: Pair) -> None:
    operator = bearer(make_key(pair.service.keys, "default", Scope.OPERATOR))
    none = dict.fromkeys(
        ("requests_per_second", "rows_per_second", "concurrent_jobs", "queued_jobs", "adapters", "stored_bytes")
    ) | {"dataset_bytes": None}
    call = pair.owner.request
    assert call("GET", "/tenants/default", headers=operator).json()["limits"] == none
    assert call("GET", "/tenants/initech", headers=operator).json()["code"] == "tenant_not_found"
    limits = {"requests_per_second": 0.5, "adapters": 0}
    made = call("PUT", "/tenants/initech", headers=operator, json={"limits": limits})
    assert (made.status_code, made.json()["limits"]) == (201, none | limits)
    changed = call("PUT", "/tenants/initech", headers=operator, json={"limits": {"queued_jobs": 3}})
    assert (changed.status_code, changed.json()["limits"]) == (200, none | {"queued_jobs": 3})
    assert call("GET", "/tenants/initech", headers=operator).json() == changed.json()
    assert pair.owner.get("/tenants/owner").status_code == 403


@pytest.mark.parametrize(
    ("name", "body", "code"),
    [
        ("Acme", {}, "invalid_name"),
        ("-acme", {}, "invalid_name"),
        ("a" * 64, {}, "invalid_name"),
        ("acme", {"limits": {"requests_per_second": 0}}, "out_of_range"),
        ("acme", {"limits": {"adapters": -1}}, "out_of_range"),
        ("acme", {"limits": {"adapters": 1.5}}, "wrong_type"),
        ("acme", {"limits": {"jobs": 1}}, "unknown_field"),
        ("acme", {"limits": None}, "wrong_type"),
    ],
)
def test_a_name_or_a_limit_that_is_not_valid_is_refused(pair: Pair, name: str, body: Any, code: str) -> None:
    operator = bearer(make_key(pair.service.keys, "default", Scope.OPERATOR))
    refused = pair.owner.put(f"/tenants/{name}", json=body, headers=operator)
    assert (refused.status_code, refused.json()["code"]) == (422, code), refused.text
