"""Hypothesis state machine that drives the whole catalogue over HTTP and compares every answer with a dictionary.

Each example has a tenant of its own on one running service. Meanwhile two threads predict with any of its names.
"""

# N rows · I in_features · O out_features
import json
import random
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any

import httpx
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.acceptance.crash.oracle import Upload, answer, inputs_of, make_upload, recipes
from tests.support.service import ServiceProcess, wait_for_job

NAMES = st.sampled_from(["acme", "acme-2", "Zeta", "b.c_d"])
UPLOADS = 5
TABLES = [b"x,y\n1,2\n", b"x,y\n1,2\n3,4\n", b"x\n0.5\n"]
_OTHER_TAG = '"sha256:' + "0" * 64 + '"'
_TENANTS = count()


@cache
def pool() -> list[Upload]:
    """Return the adapters that are uploaded."""
    draw = random.Random(1)
    return [make_upload(draw) for _ in range(UPLOADS)]


@cache
def _deltas() -> Mapping[str, Any]:
    return {upload.digest: upload.delta for upload in pool()}


def check_rows(body: Mapping[str, Any], references: list[str | None]) -> None:
    """Assert that each row is answered by the version that the answer names."""
    x_NI = inputs_of(len(references))
    for x_I, output, position in zip(x_NI, body["outputs"], body["row_adapters"], strict=True):
        delta_OI = None
        if position is not None:
            # The only adapter that is trained is the exact minimum.
            delta_OI = _deltas().get(body["adapters"][position]["digest"], recipes()["exact"].delta)
        np.testing.assert_allclose(output, answer(x_I, delta_OI), rtol=1e-3, atol=1e-2)


@dataclass
class AdapterModel:
    """What is known about one name."""

    versions: dict[int, str] = field(default_factory=dict)
    live: int | None = None
    trash: dict[int, str] = field(default_factory=dict)
    trashed_live: int | None = None
    next_number: int = 1

    @property
    def exists(self) -> bool:
        """Return whether the adapter exists."""
        return bool(self.versions)

    @property
    def live_digest(self) -> str | None:
        """Return the digest of the live version."""
        return None if self.live is None else self.versions[self.live]

    def add(self, digest: str) -> int:
        """Add a version and make it live; return its number."""
        number, self.next_number = self.next_number, self.next_number + 1
        self.versions[number], self.live = digest, number
        return number


@dataclass
class TableModel:
    """What is known about one data set."""

    versions: dict[int, bytes] = field(default_factory=dict)
    next_number: int = 1


class Predictors:
    """Threads that predict with the names of a tenant, and check each answer against the version that it names."""

    def __init__(self, service: ServiceProcess, tenant: str, names: list[str]) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[BaseException] = []
        self._seen: dict[tuple[str, int], str] = {}
        self._stop = threading.Event()
        self._service, self._tenant, self._names = service, tenant, names
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(2)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads, and raise what they found wrong."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        self.check()

    def check(self) -> None:
        """Raise what the threads have found wrong."""
        if self.failures:
            raise self.failures[0]

    def _run(self, seed: int) -> None:
        draw = random.Random(seed)
        try:
            with self._service.connect() as client:
                client.headers["X-Tenant"] = self._tenant
                while not self._stop.is_set():
                    self._ask(client, [draw.choice([*self._names, None]) for _ in range(draw.choice((1, 1, 3)))])
        except BaseException as error:
            self.failures.append(error)

    def _ask(self, client: httpx.Client, references: list[str | None]) -> None:
        body = {"adapters": references, "inputs": inputs_of(len(references)).tolist()}
        answered = client.post("/predict", json=body)
        self.counts[f"concurrent predictions: {answered.status_code}"] += 1
        if answered.status_code == 404:
            assert answered.json()["code"] == "adapter_not_found", answered.text
            return
        assert answered.status_code == 200, answered.text
        check_rows(answered.json(), references)
        for version in answered.json()["adapters"]:
            key = (version["name"], version["version"])
            digest = self._seen.setdefault(key, version["digest"])
            assert digest == version["digest"], f"{key} was {digest}"


class CatalogMachine(RuleBasedStateMachine):
    """A tenant, and the dictionaries that its catalogue must equal."""

    service: ServiceProcess
    counts: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, AdapterModel] = {}
        self.tables: dict[str, TableModel] = {}

    @initialize()
    def create_tenant(self) -> None:
        """Begin with an empty tenant."""
        tenant = f"machine-{next(_TENANTS)}"
        self.client = self.service.connect()
        self.client.put(f"/tenants/{tenant}", json={}).raise_for_status()
        self.client.headers["X-Tenant"] = tenant
        self.predictors = Predictors(self.service, tenant, ["acme", "acme-2", "Zeta", "b.c_d"])

    def teardown(self) -> None:
        """Compare everything once more."""
        self.counts["examples"] += 1
        if not hasattr(self, "predictors"):
            return
        try:
            for name in self.adapters:
                self.show_adapter(name)
        finally:
            self.predictors.stop()
            self.counts.update(self.predictors.counts)
            self.client.close()

    def _adapter(self, name: str) -> AdapterModel:
        self.counts["steps"] += 1
        return self.adapters.setdefault(name, AdapterModel())

    def _table(self, name: str) -> TableModel:
        self.counts["steps"] += 1
        return self.tables.setdefault(name, TableModel())

    @rule(name=NAMES, choice=st.integers(0, UPLOADS - 1))
    def upload(self, name: str, choice: int) -> None:
        """Upload a version, or live's bytes again."""
        self._upload(name, self._adapter(name), pool()[choice], {})

    @rule(name=NAMES, choice=st.integers(0, UPLOADS - 1), holds=st.booleans(), is_new=st.booleans())
    def upload_if(self, name: str, choice: int, holds: bool, is_new: bool) -> None:
        """Upload under a condition that holds or does not."""
        model = self._adapter(name)
        if is_new:
            headers, holds = {"If-None-Match": "*"}, not model.exists
        elif holds and model.live_digest is not None:
            headers = {"If-Match": f'"{model.live_digest}"'}
        else:
            headers, holds = {"If-Match": _OTHER_TAG}, False
        if holds:
            self._upload(name, model, pool()[choice], headers)
            return
        answered = self.client.put(f"/adapters/{name}", json=pool()[choice].body(), headers=headers)
        expect(answered, 412, "precondition_failed")

    def _upload(self, name: str, model: AdapterModel, upload: Upload, headers: Mapping[str, str]) -> None:
        is_same = model.live_digest == upload.digest
        answered = self.client.put(f"/adapters/{name}", json=upload.body(), headers=headers)
        expect(answered, 200 if is_same else 201)
        number = model.live if is_same else model.add(upload.digest)
        version = answered.json()
        assert (version["version"], version["digest"]) == (number, upload.digest), version

    @rule(name=NAMES, purge=st.booleans())
    def delete(self, name: str, purge: bool) -> None:
        """Delete an adapter, to the trash or at once."""
        model = self._adapter(name)
        is_there = model.exists or (purge and bool(model.trash))
        answered = self.client.delete(f"/adapters/{name}", params={"purge": "true"} if purge else {})
        expect(answered, *((204,) if is_there else (404, "adapter_not_found")))
        if not is_there:
            return
        if purge:
            model.trash, model.trashed_live = {}, None
        else:
            model.trash, model.trashed_live = model.trash | model.versions, model.live
        model.versions, model.live = {}, None

    @rule(name=NAMES)
    def restore(self, name: str) -> None:
        """Bring an adapter back from the trash."""
        model = self._adapter(name)
        answered = self.client.post(f"/adapters/{name}/restore")
        if model.exists:
            expect(answered, 409, "name_taken")
        elif not model.trash:
            expect(answered, 404, "adapter_not_found")
        else:
            expect(answered, 200)
            model.versions, model.live = model.trash, model.trashed_live
            model.trash, model.trashed_live = {}, None

    @rule(name=NAMES, number=st.integers(1, 6))
    def set_live(self, name: str, number: int) -> None:
        """Roll back or forward."""
        model = self._adapter(name)
        answered = self.client.put(f"/adapters/{name}/aliases/live", json={"version": number})
        if not model.exists:
            expect(answered, 404, "adapter_not_found")
        elif number not in model.versions:
            expect(answered, 404, "version_not_found")
        else:
            expect(answered, 200)
            model.live = number
            assert answered.json()["aliases"] == {"live": number}

    @rule(name=NAMES)
    def train(self, name: str) -> None:
        """Train a small adapter, and wait for it."""
        model = self._adapter(name)
        answered = self.client.post("/adapters", json={"name": name, **recipes()["exact"].body})
        expect(answered, 202)
        job = wait_for_job(self.client, answered.json()["id"])
        assert job["status"] == "succeeded", job
        number = model.add(job["result"]["digest"])
        assert job["result"]["version"] == number, job["result"]
        self.counts["trainings"] += 1

    @rule(name=NAMES, content=st.sampled_from(TABLES))
    def upload_table(self, name: str, content: bytes) -> None:
        """Upload a data set."""
        model = self._table(name)
        newest = max(model.versions, default=0)
        is_same = newest > 0 and model.versions[newest] == content
        answered = self.client.put(f"/datasets/{name}", content=content, headers={"Content-Type": "text/csv"})
        expect(answered, 200 if is_same else 201)
        if not is_same:
            newest, model.next_number = model.next_number, model.next_number + 1
            model.versions[newest] = content
        assert answered.json()["version"] == newest, answered.text

    @rule(name=NAMES)
    def delete_table(self, name: str) -> None:
        """Delete a data set."""
        model = self._table(name)
        answered = self.client.delete(f"/datasets/{name}")
        expect(answered, *((204,) if model.versions else (404, "dataset_not_found")))
        model.versions = {}

    @rule(name=NAMES)
    def preview_table(self, name: str) -> None:
        """Read rows of the newest version of a data set."""
        model = self._table(name)
        answered = self.client.get(f"/datasets/{name}/preview")
        if not model.versions:
            expect(answered, 404, "dataset_not_found")
            return
        expect(answered, 200)
        columns, *rows = [line.split(",") for line in model.versions[max(model.versions)].decode().split()]
        expected = [{column: float(cell) for column, cell in zip(columns, row, strict=True)} for row in rows]
        assert answered.json()["rows"] == expected, answered.text

    @rule(name=NAMES)
    def show_adapter(self, name: str) -> None:
        """Show an adapter and its versions."""
        model = self._adapter(name)
        shown, listed = (self.client.get(f"/adapters/{name}{end}") for end in ("", "/versions"))
        if not model.exists:
            expect(shown, 404, "adapter_not_found")
            expect(listed, 404, "adapter_not_found")
            return
        expect(shown, 200)
        assert shown.json()["aliases"] == ({} if model.live is None else {"live": model.live})
        versions = {version["version"]: version["digest"] for version in listed.json()["data"]}
        assert versions == model.versions, versions

    @rule(name=NAMES, number=st.none() | st.integers(1, 6), with_base=st.booleans())
    def predict(self, name: str, number: int | None, with_base: bool) -> None:
        """Predict with a name or a version: the answer is of what was acknowledged last, on any worker."""
        model = self._adapter(name)
        chosen = model.live if number is None else number
        references = [name if number is None else f"{name}@{number}", *([None] if with_base else [])]
        body = {"adapters": references, "inputs": inputs_of(len(references)).tolist()}
        # On a connection of its own, so that either worker may get it.
        with self.service.connect() as client:
            answered = client.post("/predict", json=body, headers={"X-Tenant": self.client.headers["X-Tenant"]})
        if not model.exists:
            expect(answered, 404, "adapter_not_found")
        elif chosen not in model.versions:
            expect(answered, 404, "version_not_found")
        else:
            expect(answered, 200)
            (version,) = answered.json()["adapters"]
            assert (version["version"], version["digest"]) == (chosen, model.versions[chosen]), version
            check_rows(answered.json(), references)

    @precondition(lambda self: self.adapters or self.tables)
    @invariant()
    def lists_are_equal(self) -> None:
        """The lists of names are those of the dictionaries, in byte order."""
        for path, names in (
            ("/adapters", [name for name, model in self.adapters.items() if model.exists]),
            ("/datasets", [name for name, model in self.tables.items() if model.versions]),
        ):
            answered = self.client.get(path)
            expect(answered, 200)
            assert [entry["name"] for entry in answered.json()["data"]] == sorted(names), path
        self.predictors.check()


def expect(answered: httpx.Response, status: int, code: str | None = None) -> None:
    """Assert the status and the code of an answer."""
    given = json.loads(answered.content)["code"] if answered.status_code >= 400 else None
    call = f"{answered.request.method} {answered.request.url}"
    assert (answered.status_code, given) == (status, code), f"{call}: {answered.status_code} {answered.text[:300]}"
