"""Latency of `/predict` at half the peak rate: while nothing trains, and while a trainer runs without a pause."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.failures import BenchFailed
from benchmarks.offering import offer
from benchmarks.plan import MIDDLE, RANK, Plan
from benchmarks.processes import Server, exchange, get, start_service
from benchmarks.progress import say
from benchmarks.requests import Mix, message, nth_request, write_requests
from benchmarks.stores import base_name, make_store
from benchmarks.wrk import load

SHAPE = MIDDLE
_CONNECTIONS = 16
_OPEN_CONNECTIONS = 128
_ROWS = 1_000
_EPOCHS = 200_000
_DEADLINE_SECONDS = 60.0
_JSON = "Content-Type: application/json"


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """The peak, and a record for each round: idle, then training."""
    folder.mkdir(parents=True)
    store = make_store(folder / "store", SHAPE, tenants=plan.tenants, rank=RANK)
    requests = write_requests(folder / "requests", SHAPE, Mix(plan.tenants), binary=False)
    rounds = []
    with ExitStack() as stack:
        server = start_service(store, base_name(SHAPE), trainers=1)
        stack.callback(server.stop)
        server.wait_until(get("/readyz"))
        server.wait_until(nth_request(requests, 0))
        load(server.port, requests, connections=_CONNECTIONS, seconds=2)
        peak = load(server.port, requests, connections=_CONNECTIONS, seconds=plan.load_seconds).requests_per_second
        for number in range(plan.training_rounds):
            idle = _offer_half(server, requests, peak, plan)
            job = _start_job(server)
            busy = _offer_half(server, requests, peak, plan)
            _end_job(server, job)
            rounds.append({"round": number, "idle": idle, "training": busy})
            say(f"training: p99 {idle['p99_ms']:.2f} ms idle, {busy['p99_ms']:.2f} ms beside a trainer")
    return {"layer": str(SHAPE), "peak": peak, "rounds": rounds}


def _offer_half(server: Server, requests: Path, peak: float, plan: Plan) -> dict[str, Any]:
    told = offer(server.port, requests, rate=peak / 2, connections=_OPEN_CONNECTIONS, seconds=plan.training_seconds)
    if set(told["answered"]) != {"200"} or told["broken"]:
        raise BenchFailed(f"at half the peak not every request was answered with 200: {told}")
    return told


def _start_job(server: Server) -> str:
    """A job that trains for minutes; returns its id once it runs."""
    generator = np.random.default_rng(5)
    inputs_NI = generator.standard_normal((_ROWS, SHAPE.in_features)).round(3)
    targets_NO = generator.standard_normal((_ROWS, SHAPE.out_features)).round(3)
    body = {
        "name": "trained",
        "rank": RANK,
        "data": {"inputs": inputs_NI.tolist(), "targets": targets_NO.tolist()},
        "training": {"method": "adamw", "epochs": _EPOCHS, "batch_size": 64, "learning_rate": 1e-4},
        "publish": "never",
    }
    status, _, answer = exchange(server.port, message("/adapters", json.dumps(body).encode(), _JSON))
    if status != 202:
        raise BenchFailed(f"POST /adapters answered {status}: {answer[:500]!r}")
    job = str(json.loads(answer)["id"])
    give_up = time.monotonic() + _DEADLINE_SECONDS
    while not _has_begun(_job(server, job)):
        if time.monotonic() > give_up:
            raise BenchFailed(f"the training did not begin: {_job(server, job)}")
        time.sleep(0.2)
    return job


def _has_begun(job: dict[str, Any]) -> bool:
    return job["status"] == "running" and bool(job["progress"] and job["progress"]["step"])


def _job(server: Server, job: str) -> dict[str, Any]:
    status, _, answer = exchange(server.port, get(f"/jobs/{job}"))
    if status != 200:
        raise BenchFailed(f"GET /jobs/{job} answered {status}")
    told: dict[str, Any] = json.loads(answer)
    return told


def _end_job(server: Server, job: str) -> None:
    """Cancel it, having seen that it ran until now."""
    if _job(server, job)["status"] != "running":
        raise BenchFailed(f"the training ended before the measurement did: {_job(server, job)}")
    exchange(server.port, message(f"/jobs/{job}/cancel", b"", _JSON))
    # The process that fits may need a moment to notice.
    time.sleep(2)
