"""The two pictures of `RESULTS.md`, as SVG."""

from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot

from benchmarks.bars import Results, over_base, rates
from benchmarks.engine import CASES
from benchmarks.engine_contenders import TITLES as CONTENDERS
from benchmarks.service_rows import TITLES as ROWS

_LAYER = "768×768"
_OURS, _LIMIT, _PEER = "#1f77b4", "#7f7f7f", "#ff9f5a"


def draw(results: Results, folder: Path) -> None:
    """`service.svg` and `engine.svg`, as far as the results have them."""
    # Text as text, and ids that do not change from run to run.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "loraplex", "font.size": 9})
    if results.get("service"):
        _draw_service(results, folder / "service.svg")
    if results.get("engine"):
        _draw_engine(results, folder / "engine.svg")


def _draw_service(results: Results, path: Path) -> None:
    figures = {row: rates(results, _LAYER, row) for row in ROWS}
    heights = {row: median(found.values()) for row, found in figures.items() if found and row != "echo"}
    rows = sorted(heights, key=heights.__getitem__)
    colours = [_OURS if row.startswith("ours") else _LIMIT if row.startswith("bare") else _PEER for row in rows]
    figure, axes = pyplot.subplots(figsize=(10, 0.6 + 0.32 * len(rows)))
    bars = axes.barh([_plain(ROWS[row]) for row in rows], [heights[row] for row in rows], color=colours)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    figure.suptitle(f"requests/s, {_LAYER}, 16 connections, one worker")
    axes.margins(x=0.15)
    _save(figure, path)


def _draw_engine(results: Results, path: Path) -> None:
    counts = {case.adapters: case.key for case in CASES if case.key in ("1", "4", "32", "128")}
    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    for contender, title in CONTENDERS.items():
        points = {count: over_base(results, _LAYER, key, contender) for count, key in counts.items()}
        known = {count: value for count, value in points.items() if value is not None}
        axes.plot(list(known), list(known.values()), marker="o", label=_plain(title))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(counts), [str(count) for count in counts])
    axes.set_xlabel("distinct adapters in the batch (32 rows; 128 rows for 128)")
    axes.set_title(f"time over the base GEMM alone, {_LAYER}, rank 8, one thread")
    axes.legend()
    _save(figure, path)


def _save(figure: pyplot.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _plain(title: str) -> str:
    return title.replace("*", "").replace("`", "")
