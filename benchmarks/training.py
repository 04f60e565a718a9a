"""Latency of `/predict` at half the peak rate: while nothing trains, and while a trainer runs without a pause.

Beside it, what the machine itself does to a service whose other cores are not idle: the limit at half its own peak,
alone and beside a loop that has the trainer's scheduling class and does nothing.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.failures import BenchFailed
from benchmarks.offering import offer
from benchmarks.plan import MIDDLE, RANK, Plan
from benchmarks.processes import Server, exchange, get, start_peer, start_service
from benchmarks.progress import say
from benchmarks.requests import Mix, json_request, message, nth_request, write_requests
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
    """Return the peak rate, and a record for each round: idle, then beside training."""
    folder.mkdir(parents=True)
    store = make_store(folder / "store", SHAPE, tenants=plan.tenants, rank=RANK)
    requests = write_requests(folder / "requests", SHAPE, Mix(plan.tenants), binary=False)
    rounds = []
    with ExitStack() as stack:
        server = start_service(store, base_name(SHAPE), trainers=1)
        stack.callback(server.stop)
        server.wait_until(get("/readyz"))
        server.wait_until(nth_request(requests, 0))
        peak = _peak(server, requests, plan)
        limit = start_peer("bare_asgi", folder, in_features=SHAPE.in_features, out_features=SHAPE.out_features)
        stack.callback(limit.stop)
        limit.wait_until(json_request([0.5] * SHAPE.in_features, None))
        limit_peak = _peak(limit, requests, plan)
        for number in range(plan.training_rounds):
            idle = _offer_half(server, requests, peak, plan)
            job = _start_job(server)
            busy = _offer_half(server, requests, peak, plan)
            _end_job(server, job)
            limit_idle = _offer_half(limit, requests, limit_peak, plan)
            with _loop_of_the_idle_class():
                limit_busy = _offer_half(limit, requests, limit_peak, plan)
            measured = {"idle": idle, "training": busy, "limit_idle": limit_idle, "limit_loop": limit_busy}
            rounds.append({"round": number} | measured)
            say("training: p99 in ms " + ", ".join(f"{name} {one['p99_ms']:.2f}" for name, one in measured.items()))
    return {"layer": str(SHAPE), "peak": peak, "limit_peak": limit_peak, "rounds": rounds}


def _peak(server: Server, requests: Path, plan: Plan) -> float:
    load(server.port, requests, connections=_CONNECTIONS, seconds=2)
    return load(server.port, requests, connections=_CONNECTIONS, seconds=plan.load_seconds).requests_per_second


@contextmanager
def _loop_of_the_idle_class() -> Iterator[None]:
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with suppress(AttributeError, OSError):
            os.sched_setscheduler(loop.pid, os.SCHED_IDLE, os.sched_param(0))
        yield
    finally:
        loop.kill()
        loop.wait()


def _offer_half(server: Server, requests: Path, peak: float, plan: Plan) -> dict[str, Any]:
    told = offer(server.port, requests, rate=peak / 2, connections=_OPEN_CONNECTIONS, seconds=plan.training_seconds)
    if set(told["answered"]) != {"200"} or told["broken"]:
        raise BenchFailed(f"at half the peak not every request was answered with 200: {told}")
    return told


def _start_job(server: Server) -> str:
    """Queue a job that trains for minutes, and return its id once it runs."""
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
