"""A call for each operation of the document, to a service on which all of them work."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from tests.support.service import train, wait_for_job

TABLE = Path(__file__).parents[3] / "examples" / "turned-digits.csv"
FROM_TABLE = {"dataset": "turned-digits", "inputs": {"prefix": "pixel_"}, "targets": {"column": "digit"}}
CROSS_ENTROPY = {"method": "adamw", "loss": "cross_entropy", "epochs": 1}


@dataclass
class World:
    """A service with an adapter, data sets and jobs."""

    client: httpx.Client
    done: str
    """Id of a job that has ended."""
    key: str
    """The operator's key, which the client sends."""

    def published(self) -> str:
        """Id of a job that made a new adapter live."""
        done = train(self.client, name="taken-back", rank=1, data=FROM_TABLE, training=CROSS_ENTROPY)
        job: str = done["id"]
        return job

    @cached_property
    def doubted(self) -> str:
        """Id of a job that has found suspects: one for all calls, because it fits for seconds."""
        body = {"rank": "auto", "split": "auto", "training": {"method": "auto", "loss": "cross_entropy"}}
        job: str = train(self.client, name="doubted", data=FROM_TABLE, **body)["id"]
        return job

    def waiting(self) -> str:
        """Id of a job that has not, because it takes long."""
        training = CROSS_ENTROPY | {"epochs": 10_000, "batch_size": 1}
        body = {"name": "waits", "rank": 1, "data": FROM_TABLE, "training": training}
        answer = self.client.post("/adapters", json=body)
        assert answer.status_code == 202, answer.text
        job: str = answer.json()["id"]
        return job


def furnish(client: httpx.Client, key: str) -> World:
    """Store and train what the calls and the examples name, on the bundled base layer, with an operator's key."""
    client.headers["Authorization"] = f"Bearer {key}"
    csv_type = {"Content-Type": "text/csv"}
    for name, table in (("turned-digits", TABLE.read_text()), ("tenants", _with_tenants(TABLE.read_text()))):
        client.put(f"/datasets/{name}", content=table, headers=csv_type).raise_for_status()
    split = {"by": "rows", "fraction": 0.2}
    done = train(client, name="acme", rank=8, data=FROM_TABLE, split=split, training=CROSS_ENTROPY | {"epochs": 30})
    assert done["status"] == "succeeded", done
    targets = {"inputs": [[float(n % 17)] * 64 for n in range(30)], "targets": [[float(n)] * 10 for n in range(30)]}
    kept = train(
        client,
        name="kept",
        rank=2,
        data=targets,
        training={"method": "closed_form", "ridge": 1, "keep_statistics": True},
    )
    assert kept["status"] == "succeeded", kept
    client.put("/adapters/loud", json={"A": [[1e30]] * 10, "B": [[1.0] * 64]}).raise_for_status()
    return World(client, done["id"], key)


def _with_tenants(table: str) -> str:
    rows = list(csv.reader(io.StringIO(table)))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*rows[0], "tenant"])
    writer.writerows([*row, ("eu", "us")[place % 2]] for place, row in enumerate(rows[1:121]))
    return out.getvalue()


def places(operation: str, world: World) -> Mapping[str, str]:
    """What to put into an operation's path."""
    model = {"name": "acme", "version": "1"}
    jobs = {"job_id": _job_for(operation, world)}
    own: Mapping[str, Mapping[str, str]] = {
        "upload_adapter": {"name": "globex"},
        "update_adapter": {"name": "kept"},
        "show_tenant": {"name": "default"},
        "upload_dataset": {"name": "flowers"},
    }
    if operation.startswith("delete_"):
        return {"name": _made_to_be_deleted(operation, world.client)}
    if operation == "restore_adapter":
        name = _made_to_be_deleted("delete_adapter", world.client)
        world.client.delete(f"/adapters/{name}").raise_for_status()
        return {"name": name}
    if "dataset" in operation and operation not in own:
        return {"name": "turned-digits", "version": "1"}
    if operation == "revoke_key":
        made = world.client.post("/keys", json={"name": "gone", "scopes": ["read"]}).raise_for_status()
        return {"key_id": made.json()["id"]}
    return own.get(operation, model | jobs)


def _job_for(operation: str, world: World) -> str:
    match operation:
        case "cancel_job":
            return world.waiting()
        case "revert_job":
            return world.published()
        case "list_suspects":
            return world.doubted
        case _:
            return world.done


def _made_to_be_deleted(operation: str, client: httpx.Client) -> str:
    if operation == "delete_adapter":
        client.put("/adapters/gone", json={"A": [[0.0]] * 10, "B": [[0.0] * 64]}).raise_for_status()
    else:
        client.put("/datasets/gone", content="a,b\n1,2\n", headers={"Content-Type": "text/csv"}).raise_for_status()
    return "gone"


def send(
    world: World, path: str, method: str, operation: Mapping[str, Any], *, kind: str | None = None, body: Any = None
) -> httpx.Response:
    """Send one request as the document says, and, where it queues a job, see that one through."""
    name = operation["operationId"]
    url = path.format(**places(name, world))
    headers = {} if kind is None else {"Content-Type": kind}
    if name == "sign_in":
        body = {"key": world.key}
    given: dict[str, Any] = {"json": body} if kind == "application/json" else {"content": body}
    answer = world.client.request(method, url, headers=headers, **(given if kind else {}))
    if answer.status_code == 202:
        assert wait_for_job(world.client, answer.json()["id"])["status"] == "succeeded"
    return answer
