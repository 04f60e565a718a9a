"""The lines of the service's tables: which server, and what is asked of it."""

from dataclasses import dataclass

from benchmarks.plan import Plan
from benchmarks.requests import Mix


@dataclass(frozen=True, slots=True)
class Row:
    """One line."""

    key: str
    server: str
    """One of `layer_servers`; several lines may ask the same one."""
    mix: Mix
    binary: bool = False


TITLES = {
    "echo": "echo: sends the body back, parses nothing",
    "bare": "**the limit**: bare ASGI, orjson, one base GEMM a request",
    "ours-1": "**loraplex**, 1 adapter",
    "ours-1000": "**loraplex**, 1,000 adapters, uniform",
    "ours-1000-zipf": "**loraplex**, 1,000 adapters, Zipf 1.0",
    "ours-10000-zipf": "**loraplex**, 10,000 adapters, Zipf 1.0, all in memory",
    "ours-10000-zipf-short": "**loraplex**, 10,000 adapters, Zipf 1.0, memory for 1,000",
    "fastapi": "FastAPI + pydantic, base only",
    "fastapi-peft": "FastAPI + pydantic + PEFT, 1,000 adapters, uniform",
    "litserve": "LitServe with batching, base only",
    "ray": "Ray Serve with batching, base only",
    "ray-haproxy": "Ray Serve with batching and HAProxy, base only",
    "bare-binary": "**the limit**, binary",
    "ours-1-binary": "**loraplex**, 1 adapter, binary",
    "ours-1000-binary": "**loraplex**, 1,000 adapters, uniform, binary",
}
"""Of each key, in the order of the tables. The numbers are those of the full mode."""


def rows_of(plan: Plan, *, every: bool) -> list[Row]:
    """Return the measurements of a layer: all, or the few that depend on the layer's width."""
    base, one = Mix(None), Mix(1)
    uniform, zipf = Mix(plan.tenants), Mix(plan.tenants, zipf=True)
    many = Mix(plan.many_tenants, zipf=True)
    rows = [
        Row("echo", "echo", base),
        Row("bare", "bare_asgi", base),
        Row("ours-1000", "ours-some", uniform),
        Row("fastapi", "fastapi_base", base),
        Row("bare-binary", "bare_asgi", base, binary=True),
        Row("ours-1000-binary", "ours-some", uniform, binary=True),
    ]
    if every:
        rows += [
            Row("ours-1", "ours-one", one),
            Row("ours-1-binary", "ours-one", one, binary=True),
            Row("ours-1000-zipf", "ours-some", zipf),
            Row("ours-10000-zipf", "ours-many", many),
            Row("ours-10000-zipf-short", "ours-short", many),
            Row("fastapi-peft", "fastapi_peft", uniform),
            Row("litserve", "litserve_base", base),
            Row("ray", "ray_serve_base", base),
            Row("ray-haproxy", "ray_serve_haproxy", base),
        ]
    return rows
