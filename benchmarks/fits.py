"""Fleets through the service beside the same fits one after another in plain torch; and the exact minimum."""

# K rows of one tenant · I in_features · O out_features
import json
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters.catalog.catalog import Catalog
from adapters.lora.adapter import Adapter, from_canonical_bytes
from adapters.names import Reference
from app.settings import Settings
from benchmarks.exact import measure_exact
from benchmarks.failures import BenchFailed
from benchmarks.fleet_table import Table, make_table
from benchmarks.plain_torch import train_alone
from benchmarks.plan import SMALL, Plan
from benchmarks.processes import Server, exchange, get, start_service
from benchmarks.progress import say
from benchmarks.requests import message
from benchmarks.stores import base_name, load_base
from benchmarks.tenants import name_of

SHAPE = SMALL
ROWS, STEPS, RANK = 100, 50, 4
_TRAINING = {"method": "adamw", "epochs": STEPS, "batch_size": None, "learning_rate": 0.01}
_JSON, _ARROW = "Content-Type: application/json", "Content-Type: application/vnd.apache.arrow.stream"
_DEADLINE_SECONDS = 600.0
_ALIKE = 1e-3
"""Plain torch and the service round otherwise, and AdamW lets that grow; other fits would differ by far more."""


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """Measure a fleet in rounds, a large one once, some of its groups alone, and `closed_form` beside AdamW."""
    folder.mkdir(parents=True)
    store = folder / "store"
    with ExitStack() as stack:
        server = start_service(store, base_name(SHAPE), trainers=1)
        stack.callback(server.stop)
        server.wait_until(get("/readyz"))
        # So that neither the process that fits nor what it is measured against has just started.
        _upload(server, "first", make_table(SHAPE, tenants=10, rows=ROWS, rank=RANK))
        _train(server, "first-{tenant}", "first")
        many = _measure_many(server, plan)
        fleet = _measure_fleet(server, plan, store)
    return {
        "layer": str(SHAPE),
        "rows": ROWS,
        "steps": STEPS,
        "rank": RANK,
        "fleet": fleet,
        "many": many,
        "exact": measure_exact(plan),
    }


def _measure_fleet(server: Server, plan: Plan, store: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    table = make_table(SHAPE, tenants=plan.fleet_groups, rows=ROWS, rank=RANK)
    _upload(server, "fleet", table)
    rounds = []
    for number in range(plan.fit_rounds):
        plain, factors = _plain_seconds(table, plan.plain_fits)
        job = _train(server, f"round-{number}-{{tenant}}", "fleet")
        rounds.append({"plain_seconds_a_fit": plain, "groups": plan.fleet_groups, **job})
        say(
            f"fits: {plan.fleet_groups:,} groups in {job['seconds']:.2f} s, plain torch {1e3 * plain:.2f} ms a fit: "
            f"{plain * plan.fleet_groups / job['seconds']:.1f} times the rate"
        )
    published = _Published(store)
    for tenant, (a_OR, b_RI) in enumerate(factors):
        ours = published.adapter(f"round-{plan.fit_rounds - 1}-{name_of(tenant)}")
        if _difference(ours.a_OR @ ours.b_RI, a_OR @ b_RI) > _ALIKE:
            raise BenchFailed(f"{name_of(tenant)}: plain torch trained another adapter than the service")
    alone = _measure_alone(server, table, plan, published)
    return {"rounds": rounds, "alone": alone}


def _plain_seconds(table: Table, fits: int) -> tuple[float, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Seconds a fit, and the factors of the first fits; they are trained one after the other."""
    weight_OI = load_base(SHAPE).weight_OI
    rows = [tuple(map(torch.from_numpy, table.rows_of(tenant))) for tenant in range(fits)]
    found = []
    begin = time.perf_counter()
    for x_KI, y_KO in rows:
        found.append(train_alone(weight_OI, x_KI, y_KO, rank=RANK, epochs=STEPS, batch_size=ROWS))
    return (time.perf_counter() - begin) / fits, found[:10]


def _measure_alone(server: Server, table: Table, plan: Plan, published: "_Published") -> dict[str, Any]:
    """Train some groups as jobs of their own; return whether digests are equal, and the largest difference of ΔW."""
    equal, largest = 0, 0.0
    tenants = np.random.default_rng(5).permutation(plan.fleet_groups)[: plan.fits_alone].tolist()
    for tenant in tenants:
        x_KI, y_KO = table.rows_of(tenant)
        data = {"inputs": x_KI.astype(float).tolist(), "targets": y_KO.astype(float).tolist()}
        _wait(server, _post(server, f"alone-{tenant}", data))
        fleet = published.adapter(f"round-0-{name_of(tenant)}")
        alone = published.adapter(f"alone-{tenant}")
        equal += fleet.digest == alone.digest
        largest = max(largest, _difference(fleet.a_OR @ fleet.b_RI, alone.a_OR @ alone.b_RI))
    say(f"fits: {equal} of {len(tenants)} groups have the digest that they get alone; the others differ by {largest:g}")
    return {"groups": len(tenants), "equal": equal, "largest_difference": largest}


def _measure_many(server: Server, plan: Plan) -> dict[str, Any]:
    """Measure the large fleet first, while the fit process has only torch in memory."""
    _upload(server, "many", make_table(SHAPE, tenants=plan.large_fleet_groups, rows=ROWS, rank=RANK))
    before = _peak_bytes(server)
    job = _train(server, "many-{tenant}", "many")
    peak = _peak_bytes(server)
    say(f"fits: {plan.large_fleet_groups:,} groups in {job['seconds']:.1f} s, at most {peak / 2**20:,.0f} MiB")
    limit = Settings.model_fields["trainer_memory_bytes"].default
    return {"groups": plan.large_fleet_groups, "peak_bytes": peak, "idle_bytes": before, "limit_bytes": limit, **job}


def _peak_bytes(server: Server) -> int:
    """Return the peak memory of the fit process, including mapped file pages."""
    fits = [process.pid for process in server.tree() if "adapters.training.execution.fit_child" in process.cmdline()]
    if len(fits) != 1:
        raise BenchFailed(f"there are {len(fits)} processes that fit")
    told = Path(f"/proc/{fits[0]}/status").read_text().splitlines()
    (line,) = [line for line in told if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


def _upload(server: Server, name: str, table: Table) -> None:
    content = table.arrow()
    head = f"PUT /datasets/{name} HTTP/1.1\r\nHost: 127.0.0.1\r\n{_ARROW}\r\nContent-Length: {len(content)}\r\n\r\n"
    status, _, body = exchange(server.port, head.encode() + content, seconds=_DEADLINE_SECONDS)
    if status != 201:
        raise BenchFailed(f"PUT /datasets/{name} answered {status}: {body[:500]!r}")


def _train(server: Server, name: str, dataset: str) -> dict[str, float]:
    """Seconds of the job, and from the request on until it had ended."""
    data = {"dataset": dataset, "inputs": {"column": "x"}, "targets": {"column": "y"}, "group_by": "tenant"}
    sent = time.time()
    job = _wait(server, _post(server, name, data))
    if job["metrics"]["failed"]:
        raise BenchFailed(f"{job['metrics']['failed']} groups of the fleet failed")
    started, finished = (datetime.fromisoformat(job[at]).timestamp() for at in ("started_at", "finished_at"))
    return {"seconds": finished - started, "seconds_from_request": finished - sent}


def _post(server: Server, name: str, data: dict[str, Any]) -> str:
    body = {"name": name, "rank": RANK, "data": data, "training": _TRAINING}
    status, _, answer = exchange(server.port, message("/adapters", json.dumps(body).encode(), _JSON), seconds=120)
    if status != 202:
        raise BenchFailed(f"POST /adapters answered {status}: {answer[:500]!r}")
    return str(json.loads(answer)["id"])


def _wait(server: Server, job_id: str) -> dict[str, Any]:
    give_up = time.monotonic() + _DEADLINE_SECONDS
    while time.monotonic() < give_up:
        status, _, answer = exchange(server.port, get(f"/jobs/{job_id}"))
        job: dict[str, Any] = json.loads(answer)
        if status != 200 or job["status"] in ("failed", "cancelled"):
            raise BenchFailed(f"the training ended otherwise than it should: {answer[:500]!r}")
        if job["status"] == "succeeded":
            return job
        # Seldom enough to cost the job nothing: the service notes the time itself.
        time.sleep(0.2)
    raise BenchFailed(f"the training did not end: {job}")


def _difference(given_OI: torch.Tensor, wanted_OI: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected number."""
    return float((given_OI - wanted_OI).abs().max() / wanted_OI.abs().max())


class _Published:
    """What lies in the service's folder."""

    def __init__(self, store: Path) -> None:
        self._catalog = Catalog(store, now=time.time)

    def adapter(self, name: str) -> Adapter:
        """Return the live version of an adapter."""
        version = self._catalog.find(Reference(name))
        return from_canonical_bytes(self._catalog.blobs.read(version.file, offset=version.offset, length=version.bytes))
