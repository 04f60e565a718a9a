"""Three times the load that the service can bear: how much of it is still answered, and how the rest is refused."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from app.settings import Settings
from benchmarks.offering import offer
from benchmarks.plan import RANK, WIDE, Plan
from benchmarks.processes import get, start_service
from benchmarks.progress import say
from benchmarks.requests import Mix, write_requests
from benchmarks.stores import base_name, make_store
from benchmarks.wrk import load

SHAPE = WIDE
FACTOR = 3
_PEAK_CONNECTIONS = 64
_CONNECTIONS = 512
_QUEUE_ROWS = _PEAK_CONNECTIONS
"""As much in flight as at the peak, and the other connections come on top."""


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """Return a record for each round: the peak rate, and the outcome of three times that rate."""
    folder.mkdir(parents=True)
    store = make_store(folder / "store", SHAPE, tenants=plan.tenants, rank=RANK)
    requests = write_requests(folder / "requests", SHAPE, Mix(plan.tenants), binary=False)
    queue: dict[str, Any] = {"queue_rows": _QUEUE_ROWS} if "queue_rows" in Settings.model_fields else {}
    if not queue:
        say("overload: this service has no LORAPLEX_QUEUE_ROWS, and so no bound")
    rounds = []
    with ExitStack() as stack:
        server = start_service(store, base_name(SHAPE), **queue)
        stack.callback(server.stop)
        server.wait_until(get("/readyz"))
        load(server.port, requests, connections=_PEAK_CONNECTIONS, seconds=2)
        for number in range(plan.overload_rounds):
            peak = load(
                server.port, requests, connections=_PEAK_CONNECTIONS, seconds=plan.load_seconds, start=number * 7_919
            ).requests_per_second
            told = offer(
                server.port, requests, rate=FACTOR * peak, connections=_CONNECTIONS, seconds=plan.overload_seconds
            )
            goodput = told["good_in_time"] / plan.overload_seconds
            rounds.append({"round": number, "peak": peak, "goodput": goodput, **told})
            say(f"overload: peak {peak:.0f}/s, goodput {goodput:.0f}/s of {FACTOR * peak:.0f}/s, {told['answered']}")
    return {"layer": str(SHAPE), "queue_rows": queue.get("queue_rows"), "connections": _CONNECTIONS, "rounds": rounds}
