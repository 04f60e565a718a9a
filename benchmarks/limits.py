"""The rates of a tenant, held against what it was given, over two workers and at ten times the rate."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.failures import BenchFailed
from benchmarks.offering import offer
from benchmarks.plan import SMALL, Plan
from benchmarks.processes import exchange, get, start_service
from benchmarks.progress import say
from benchmarks.requests import Mix, write_requests
from benchmarks.stores import base_name

WORKERS = 2
_FACTOR = 10
_CONNECTIONS = 16
# Each request has one row, so that both limits are rates of requests here.
_LIMITS = (
    ("requests_per_second", 50),
    ("requests_per_second", 200),
    ("rows_per_second", 200),
    ("rows_per_second", 1000),
)
_HIGHEST_LOAD = 4000


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """Return a record for each round and limit: the limit, and the rate that was answered with 200."""
    folder.mkdir(parents=True)
    requests = write_requests(folder / "requests", SMALL, Mix(None), binary=False)
    records = []
    with ExitStack() as stack:
        server = start_service(folder / "store", base_name(SMALL), workers=WORKERS)
        stack.callback(server.stop)
        server.wait_until(get("/readyz"))
        for number in range(plan.overload_rounds):
            for limit, rate in _LIMITS:
                _set_limit(server.port, limit, rate)
                load = min(_FACTOR * rate, _HIGHEST_LOAD)
                seconds = plan.overload_seconds
                told = offer(server.port, requests, rate=load, connections=_CONNECTIONS, seconds=seconds)
                accepted = told["good_in_time"] / seconds
                others = {status: n for status, n in told["answered"].items() if status not in ("200", "429")}
                if others or told["refused_without_retry_after"]:
                    raise BenchFailed(f"answers other than 200, and 429 with Retry-After: {others}")
                records.append({"round": number, "limit": limit, "rate": rate, "load": load, "accepted": accepted})
                say(f"limits: {limit} {rate}: {accepted:.1f}/s of {load}/s")
    return {"workers": WORKERS, "records": records}


def _set_limit(port: int, limit: str, rate: float) -> None:
    body = json.dumps({"limits": {limit: rate}}).encode()
    head = "PUT /tenants/default HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
    status, _, answer = exchange(port, f"{head}{len(body)}\r\n\r\n".encode() + body)
    if status != 200:
        raise BenchFailed(f"the limit was answered with {status}: {answer[:200]!r}")
