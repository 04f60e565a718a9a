"""Measure the cost of keys on the fast path, and of a tenant far over its quota for another tenant."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from adapters.access.keys import Keys, Scope
from adapters.access.tenants import DEFAULT_TENANT, Limits, Tenants
from adapters.storage.sqlite_database import SqliteDatabase
from benchmarks.offering import offer
from benchmarks.plan import RANK, SMALL, WIDE, Plan
from benchmarks.processes import exchange, get, start_service
from benchmarks.progress import say
from benchmarks.requests import Mix, nth_request, write_health_checks, write_requests
from benchmarks.stores import base_name, make_store
from benchmarks.wrk import load, rate_alone

_CONNECTIONS = 16
_WARM_SECONDS = 3.0
_TENANT_SHAPE = WIDE
_ADAPTERS = 100
_QUOTA = 100.0
_TIMES_QUOTA = 10
_QUIET_RATE = 100.0


def measure_keys(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """Return the rates without keys and with keys of each pair, for JSON and for binary."""
    shape, mix, records = SMALL, Mix(plan.tenants), []
    with ExitStack() as stack:
        servers = []
        for auth in ("open", "keys"):
            store = make_store(folder / auth / "store", shape, tenants=plan.tenants, rank=RANK)
            server = start_service(store, base_name(shape), auth=auth, log_requests="none")
            stack.callback(server.stop)
            server.wait_until(get("/readyz"))
            server.pause()
            servers.append(server)
        key = _create_key(store, DEFAULT_TENANT)
        for binary in (False, True):
            requests = [
                write_requests(folder / f"{name}-{binary}", shape, mix, binary=binary, key=text)
                for name, text in (("open", None), ("keys", key))
            ]
            for which in (0, 1):
                rate_alone(servers[which], requests[which], connections=_CONNECTIONS, seconds=_WARM_SECONDS, start=0)
            for number in range(plan.key_pairs):
                rates = [0.0, 0.0]
                for which in (0, 1) if number % 2 else (1, 0):
                    rates[which] = rate_alone(
                        servers[which],
                        requests[which],
                        connections=_CONNECTIONS,
                        seconds=plan.load_seconds,
                        start=7_919 * number,
                    )
                form = "binary" if binary else "JSON"
                records.append({"layer": str(shape), "form": form, "pair": number, "open": rates[0], "keys": rates[1]})
                say(f"keys: {form} {number + 1}: {rates[1]:,.0f} with and {rates[0]:,.0f} without, requests/s")
    return records


def measure_tenants(plan: Plan, folder: Path) -> dict[str, Any]:
    """Return, for each round, what a quiet tenant gets alone, beside a busy one, and beside as many health checks."""
    shape, tenants = _TENANT_SHAPE, ("quiet", "busy")
    store = make_store(folder / "store", shape, tenants=_ADAPTERS, rank=RANK, owners=tenants)
    keys = {tenant: _create_key(store, tenant) for tenant in tenants}
    _limit(store, "busy", Limits(requests_per_second=_QUOTA))
    requests = {
        tenant: write_requests(folder / tenant, shape, Mix(_ADAPTERS), binary=False, key=key)
        for tenant, key in keys.items()
    }
    beside: Mapping[str, Path | None] = {
        "alone": None,
        "busy": requests["busy"],
        "control": write_health_checks(folder / "control", requests["busy"]),
    }
    rounds = []
    with ExitStack() as stack:
        server = start_service(store, base_name(shape), auth="keys")
        stack.callback(server.stop)
        server.wait_until(get("/readyz"))
        load(server.port, requests["quiet"], connections=_CONNECTIONS, seconds=_WARM_SECONDS)
        exchange(server.port, nth_request(requests["busy"], 0))
        for number in range(plan.tenant_rounds):
            order = list(beside)[number % 3 :] + list(beside)[: number % 3]
            record: dict[str, Any] = {"round": number}
            for phase in order:
                record[phase] = _offer_both(server.port, requests["quiet"], beside[phase], plan.tenant_seconds)
            rounds.append(record)
            say(f"tenants, {number + 1}: " + ", ".join(_describe(phase, record[phase]["quiet"]) for phase in beside))
    return {"layer": str(shape), "quota": _QUOTA, "times_quota": _TIMES_QUOTA, "rate": _QUIET_RATE, "rounds": rounds}


def _offer_both(port: int, quiet: Path, other: Path | None, seconds: float) -> dict[str, Any]:
    """Offer the quiet tenant's requests, and meanwhile another load."""
    with ThreadPoolExecutor(1) as thread:
        beside = None
        if other is not None:
            # A second longer, so that it does not end first.
            rate, longer = _TIMES_QUOTA * _QUOTA, seconds + 1
            beside = thread.submit(offer, port, other, rate=rate, connections=_CONNECTIONS, seconds=longer)
        outcome = offer(port, quiet, rate=_QUIET_RATE, connections=_CONNECTIONS, seconds=seconds)
        return {"quiet": outcome, "beside": None if beside is None else beside.result()}


def _describe(phase: str, outcome: Mapping[str, Any]) -> str:
    return f"{phase} {outcome['p50_ms']:.2f} / {outcome['p99_ms']:.2f} ms"


def _create_key(store: Path, tenant: str) -> str:
    with closing(SqliteDatabase(store)) as database:
        issued = Keys(database, now=time.time).create(
            tenant=tenant, name="benchmark", scopes=[Scope.PREDICT], creates_tenant=True
        )
    return issued.text


def _limit(store: Path, tenant: str, limits: Limits) -> None:
    with closing(SqliteDatabase(store)) as database:
        Tenants(database, now=time.time).put(tenant, limits)
