"""The load generator: wrk in a process of its own, one thread, on requests made beforehand."""

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.failures import BenchFailed
from benchmarks.processes import Server

_SCRIPT = Path(__file__).with_name("wrk.lua")
_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of wrk measured."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    wrk_cpu: float
    """wrk's own CPU time over the wall time: at 1.0 it would have been the bottleneck."""


def require_wrk() -> str:
    """Return the path of wrk; raise `BenchFailed` if it is missing."""
    path = shutil.which("wrk")
    if path is None:
        raise BenchFailed(
            "wrk is missing: install it (Debian and Ubuntu: apt-get install wrk; macOS: brew install wrk)"
        )
    return path


def load(port: int, folder: Path, *, connections: int, seconds: float, start: int = 0) -> Load:
    """Keep `connections` requests in flight for `seconds`; `start` says where in the draws to begin.

    Raises `BenchFailed` where any answer was an error, or no answer came.
    """
    command = [require_wrk(), "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "20s"]
    command += ["-s", str(_SCRIPT), f"http://127.0.0.1:{port}/", "--", str(folder), str(start)]
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    # wait4 and not wait: it is the one that tells this child's CPU time.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - begin
    if process.returncode != 0 or wall > seconds + _PATIENCE_SECONDS + 20:
        raise BenchFailed(f"wrk ended with {process.returncode} after {wall:.0f} s: {output[-500:]}")
    return _read(output.strip().splitlines()[-1], (usage.ru_utime + usage.ru_stime))


def rate_alone(server: Server, requests: Path, *, connections: int, seconds: float, start: int) -> float:
    """Return the requests a second of a stopped server, which continues for that long."""
    server.resume()
    try:
        return load(server.port, requests, connections=connections, seconds=seconds, start=start).requests_per_second
    finally:
        server.pause()


def _read(line: str, cpu_seconds: float) -> Load:
    told = json.loads(line)
    if told["bad_status"] or told["bad_socket"] or not told["requests"]:
        raise BenchFailed(f"not every request was answered with 200: {line}")
    seconds = told["duration_us"] / 1e6
    return Load(
        requests_per_second=told["requests"] / seconds,
        p50_ms=told["p50_us"] / 1e3,
        p99_ms=told["p99_us"] / 1e3,
        wrk_cpu=cpu_seconds / seconds,
    )
