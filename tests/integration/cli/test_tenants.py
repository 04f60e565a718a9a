"""`usage`, `tenants show`, `tenants set`, and `--tenant`."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from adapters.access.keys import Scope
from adapters.access.tenants import DEFAULT_TENANT
from app.service import Service
from app.settings import Auth, Settings
from tests.integration.cli.conftest import Ended, invoke
from tests.support.keys import bearer, make_key
from tests.support.service import serving

Run = Callable[..., Ended]
PREDICT = {"adapter": None, "inputs": [[1.0] * 4] * 3}


class World(NamedTuple):
    """A service that requires keys."""

    client: httpx.Client
    service: Service


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("tenants") / "data"
    with serving(Settings(data_dir=folder, base="random:4,2,3", auth=Auth.KEYS)) as (client, service):
        client.headers.update(bearer(make_key(service.keys, DEFAULT_TENANT, Scope.OPERATOR)))
        yield World(client, service)


@pytest.fixture
def run(world: World) -> Run:
    """Run a command of an operator."""

    def runs(*arguments: object, status: int = 0) -> Ended:
        key = world.client.headers["Authorization"].removeprefix("Bearer ")
        ended = invoke(*arguments, url=str(world.client.base_url), variables={"LORAPLEX_KEY": key})
        assert ended.returncode == status, ended.stdout + ended.stderr
        return ended

    return runs


def _limits(run: Run, *arguments: object) -> dict[str, Any]:
    tenant = json.loads(run("tenants", *arguments, "--json").stdout)
    return {name: limit for name, limit in tenant["limits"].items() if limit is not None}


def test_limits_are_set_one_by_one(run: Run) -> None:
    assert _limits(run, "set", "acme", "--requests-per-second", "0.5", "--stored-bytes", 10**10) == {
        "requests_per_second": 0.5,
        "stored_bytes": 10**10,
    }
    assert _limits(run, "set", "acme", "--queued-jobs", 3, "--stored-bytes", "none") == {
        "requests_per_second": 0.5,
        "queued_jobs": 3,
    }
    assert _limits(run, "show", "acme") == {"requests_per_second": 0.5, "queued_jobs": 3}
    shown = run("tenants", "show", "acme").stdout.splitlines()
    assert [line.split() for line in shown if "jobs" in line] == [
        ["concurrent", "jobs", "no", "limit"],
        ["queued", "jobs", "3"],
    ]


def test_a_limit_or_a_tenant_that_is_not_valid_is_refused(run: Run) -> None:
    assert "--adapters is a number" in run("tenants", "set", "acme", "--adapters", "many", status=2).stderr
    assert "adapters" in run("tenants", "set", "acme", "--adapters", "1.5", status=1).stderr
    assert "tenant" in run("tenants", "show", "nobody", status=1).stderr


def test_usage_is_shown_for_the_tenant_that_is_named(world: World, run: Run) -> None:
    run("tenants", "set", "globex")
    world.client.post("/predict", json=PREDICT, headers={"X-Tenant": "globex"}).raise_for_status()
    world.service.observer.close()
    [hour] = json.loads(run("usage", "--tenant", "globex", "--json").stdout)
    assert (set(hour), hour["requests"], hour["rows"]) == ({"hour", "requests", "rows"}, 1, 3)
    [line] = json.loads(run("--tenant", "globex", "usage", "--by", "adapter", "--json").stdout)
    assert (set(line) - set(hour), line["adapter"]) == ({"adapter"}, None)
    head, *_, last = run("usage", "--tenant", "globex", "--by", "adapter").stdout.splitlines()
    assert (head.split(), last.split()[2:]) == (["hour", "adapter", "requests", "rows"], ["–", "1", "3"])
    none = run("usage", "--tenant", "globex", "--to", "2020-01-31T12:00:00Z").stdout
    assert none == "No prediction was answered in this time.\n"
    assert run("usage").stdout == none
    assert "adapter" in run("usage", "--by", "row", status=1).stderr


def test_the_audit_log_is_shown(run: Run) -> None:
    run("tenants", "set", "initech")
    [entry] = json.loads(run("audit", "--tenant", "initech", "--json").stdout)
    assert (entry["action"], entry["resource"], entry["client_address"]) == (
        "tenant.create",
        "tenants/initech",
        "127.0.0.1",
    )
    head, *_, last = run("audit", "--tenant", "initech", "--since", "2020-01-31T12:00:00Z").stdout.splitlines()
    assert head.split() == ["time", "key", "action", "resource", "from"]
    assert last.split()[-4:] == [entry["key_id"], "tenant.create", "tenants/initech", "127.0.0.1"]
    assert run("audit", "--actor", "nobody", "--limit", 3).stdout == "There are none.\n"
