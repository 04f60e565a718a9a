"""Compare `/predict` with that of another commit: `python -m benchmarks.pairs COMMIT`, or `make pairs COMMIT=…`.

Both services run with the same installed packages and take turns: within a pair each is loaded once while the other is
stopped (SIGSTOP), and the order alternates from pair to pair. The figure is the median over pairs of this commit's rate
over the other's, with a distribution-free 95 % interval. It writes `benchmarks/PAIRS.md`.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from benchmarks import machine
from benchmarks.bars import median_interval
from benchmarks.layer_servers import touch
from benchmarks.plan import RANK, SMALL, WIDE
from benchmarks.processes import ROOT, Server, get, start_service
from benchmarks.progress import say
from benchmarks.report import table
from benchmarks.requests import Mix, Shape, write_requests
from benchmarks.stores import base_name, make_store_of
from benchmarks.wrk import rate_alone

_CONNECTIONS = 16
_TENANTS = 1_000
_WARM_SECONDS = 2.0
_PACKAGES = ("torch", "numpy", "uvicorn", "uvloop", "httptools")


def main() -> None:
    """Measure the pairs and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairs", description="/predict beside another commit's.")
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument("--pairs", type=int, default=24, help="pairs for each layer and form")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of each load")
    options = parser.parse_args()
    with _checkout(options.commit) as other, tempfile.TemporaryDirectory(prefix="loraplex-pairs-") as folder:
        lines = [
            [f"{shape}, {'binary' if binary else 'JSON'}", *_summary(ratios)]
            for shape in (SMALL, WIDE)
            for binary, ratios in _measure(shape, other, Path(folder) / str(shape), options.pairs, options.seconds)
        ]
    page = (
        "# `/predict` beside the commit before\n\nWritten by `make pairs`: requests/s of this commit over those of "
        f"{_short_commit(options.commit)}, one row a request, {_TENANTS:,} adapters of rank {RANK}, {_CONNECTIONS} "
        f"connections. Measured {machine.moment()}.\n\n"
        + table(["", "pairs", "median ratio", "95 % interval", "smallest", "largest"], lines)
        + "\n\n"
        + table(["", ""], machine.describe(_PACKAGES).items())
        + "\n"
    )
    (ROOT / "benchmarks" / "PAIRS.md").write_text(page)
    print(page)


def _summary(ratios: Sequence[float]) -> list[str]:
    low, high = median_interval(ratios)
    figures = f"{median(ratios):.3f}", f"{low:.3f} – {high:.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}"
    return [str(len(ratios)), *figures]


def _measure(
    shape: Shape, other: Path, folder: Path, pairs: int, seconds: float
) -> Iterator[tuple[bool, Sequence[float]]]:
    """Yield, for JSON and then for binary, this commit's rate over the other's in each pair."""
    with ExitStack() as stack:
        servers = [_start(root, shape, folder / name, stack) for name, root in (("this", ROOT), ("other", other))]
        for binary in (False, True):
            requests = write_requests(folder / f"requests-{binary}", shape, Mix(_TENANTS), binary=binary)
            for server in servers:
                rate_alone(server, requests, connections=_CONNECTIONS, seconds=_WARM_SECONDS, start=0)
            ratios = []
            for number in range(pairs):
                rates = [0.0, 0.0]
                for which in (0, 1) if number % 2 else (1, 0):
                    rates[which] = rate_alone(
                        servers[which], requests, connections=_CONNECTIONS, seconds=seconds, start=7_919 * number
                    )
                ratios.append(rates[0] / rates[1])
                form = "binary" if binary else "JSON"
                say(f"{shape} {form} {number + 1}: {rates[0]:,.0f} / {rates[1]:,.0f} requests/s")
            yield binary, ratios


def _start(root: Path, shape: Shape, folder: Path, stack: ExitStack) -> Server:
    """Start the service of the checkout in `root`, every adapter in memory, and stop it with SIGSTOP."""
    folder.mkdir(parents=True)
    make_store_of(root, folder / "store", shape, tenants=_TENANTS, rank=RANK)
    server = start_service(folder / "store", base_name(shape), root=root, log_requests="none")
    stack.callback(server.stop)
    server.wait_until(get("/readyz"))
    touch(server.port, shape, range(_TENANTS))
    server.pause()
    return server


@contextmanager
def _checkout(commit: str) -> Iterator[Path]:
    """Check `commit` out into a temporary folder beside this one's packages."""
    with tempfile.TemporaryDirectory(prefix="loraplex-commit-") as folder:
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=ROOT, check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def _short_commit(commit: str) -> str:
    command = ["git", "rev-parse", "--short=12", commit]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
