"""`RESULTS.md` from `results.json`: every number on the page is computed here."""

from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.bars import BARS, Results, beside_busy_ratios, cold_milliseconds, key_ratios, median_interval, over_base
from benchmarks.engine import CASES
from benchmarks.engine_contenders import TITLES as CONTENDERS
from benchmarks.exact import ADAMW
from benchmarks.service_rows import TITLES as ROWS

ALTERNATIVES = {
    "base": "base layer",
    "auto": "**`auto`**",
    "before": "the defaults before",
    "head": "scikit-learn's own head",
    "ridge": "ridge alone",
    "ridge_in_base_metric": "ridge in the metric of W alone",
    "own_head": "own head alone",
    "fleet_mean": "fleet mean alone",
    "cluster_mean": "k fleet means alone",
}
WORLDS = {
    "A": "A five industries",
    "B": "B one shared shift",
    "C": "C unrelated remaps",
    "D": "D no change wanted",
    "E": "E classes the base never saw",
    "F": "F labels unrelated to the base's",
}
NEWCOMER_FIGURES = {
    "base": "base layer",
    "prior": "fleet prior",
    "alone": "30 rows, trained alone",
    "fleet": "30 rows, in the fleet",
}
LARGE_FIGURES = {"base": "base layer", "auto": "`auto`", "peft": "PEFT + AdamW, tuned", "cv": "LogisticRegressionCV"}


def page(results: Results) -> str:
    """Return the whole page."""
    parts = [
        _head(results),
        _bars(results),
        *_service(results),
        *_engine(results),
        *_training(results),
        *_overload(results),
        *_limits(results),
        *_start(results),
        *_fits(results),
        *_quality(results),
        *_keys(results),
        *_tenants(results),
    ]
    return "\n\n".join(parts) + "\n"


def _head(results: Results) -> str:
    lines = [[name, value] for name, value in results["machine"].items()]
    lines += [[f"measured: {section}", when] for section, when in results["measured"].items()]
    mode = "" if results["mode"] == "full" else f"\n\n**This is the {results['mode']} mode: a look, not a result.**"
    return (
        "# Results\n\n"
        "Written by `make bench`; [README.md](README.md) says how each figure is measured. All servers have one worker "
        "process and one thread for linear algebra, and share the machine with the load generator. Ratios are medians "
        f"of ratios within a round, rates are medians over rounds.{mode}\n\n{table(['', ''], lines)}"
    )


def _bars(results: Results) -> str:
    lines = []
    for bar in BARS:
        figure = bar.figure(results)
        if figure is None:
            lines.append([bar.title, "not measured", bar.text, ""])
            continue
        verdict = "" if bar.text == "none" else "met" if bar.met(figure) else "**not met**"
        lines.append([bar.title, f"{_short(figure)}{bar.unit}", bar.text, verdict])
    return "## The bars\n\n" + table(["figure", "measured", "bar", ""], lines)


def _service(results: Results) -> Iterable[str]:
    records = results.get("service", [])
    if not records:
        return
    yield "## Service\n\nOne row a request, requests/s (p50 / p99 in ms), by connections.\n\n![requests/s](service.svg)"
    for layer in dict.fromkeys(record["layer"] for record in records):
        ours = [record for record in records if record["layer"] == layer]
        connections = sorted({record["connections"] for record in ours})
        lines = [
            [ROWS[row], *(_cell(ours, row, count) for count in connections), *_shares(ours, row)]
            for row in ROWS
            if any(record["row"] == row for record in ours)
        ]
        head = ["", *(f"{count}" for count in connections), "CPU of wrk", "CPU of the server"]
        yield f"### {layer}\n\n" + table(head, lines)


def _cell(records: Sequence[Any], row: str, connections: int) -> str:
    found = [record for record in records if (record["row"], record["connections"]) == (row, connections)]
    if not found:
        return ""
    rate, p50, p99 = (median(record[key] for record in found) for key in ("requests_per_second", "p50_ms", "p99_ms"))
    return f"{rate:,.0f} ({_short(p50)} / {_short(p99)})"


def _shares(records: Sequence[Any], row: str) -> list[str]:
    """At 16 connections; 100 % is one core."""
    found = [record for record in records if (record["row"], record["connections"]) == (row, 16)]
    return (
        [f"{median(record[key] for record in found):.0%}" for key in ("wrk_cpu", "server_cpu")] if found else ["", ""]
    )


def _engine(results: Results) -> Iterable[str]:
    records = results.get("engine", [])
    if not records:
        return
    yield (
        "## Engine\n\nOne batch in one process on one thread: time over that of the base GEMM alone for the same rows, "
        "by how many adapters share the rows.\n\n![time over the base GEMM](engine.svg)"
    )
    for layer in dict.fromkeys(record["layer"] for record in records):
        base = {
            record["case"]: f"{1e6 * median(record['seconds']):,.0f} µs"
            for record in records
            if (record["layer"], record["contender"]) == (layer, "base")
        }
        lines = [[CONTENDERS["base"], *(base[case.key] for case in CASES)]]
        for contender, title in CONTENDERS.items():
            if contender != "base":
                figures = (over_base(results, layer, case.key, contender) for case in CASES)
                lines.append([title, *("" if figure is None else _short(figure) for figure in figures)])
        yield f"### {layer}\n\n" + table(["", *(case.title for case in CASES)], lines)


def _training(results: Results) -> Iterable[str]:
    if "training" not in results:
        return
    found = results["training"]
    lines = []
    titles = {
        "idle": "idle",
        "training": "while a trainer runs",
        "limit_idle": "the limit, idle",
        "limit_loop": "the limit, beside a loop of the trainer's scheduling class that does nothing",
    }
    for kind, title in titles.items():
        each = [one[kind] for one in found["rounds"] if kind in one]
        if not each:
            continue
        rate = median(one["rate"] for one in each)
        lines.append(
            [title, f"{rate:,.0f}", *(_short(median(one[key] for one in each)) for key in ("p50_ms", "p99_ms"))]
        )
    yield (
        f"## Beside training\n\n`/predict` on {found['layer']}, 1,000 adapters, requests at fixed times at half the "
        f"peak of {found['peak']:,.0f}/s; a latency counts from when its request was due. The limit's lines, at half "
        "its own peak, show what the machine does to a service whose other core is not idle.\n\n"
        + table(["", "requests/s", "p50, ms", "p99, ms"], lines)
    )


def _overload(results: Results) -> Iterable[str]:
    if "overload" not in results:
        return
    found = results["overload"]
    lines = []
    for one in found["rounds"]:
        answered = one["answered"]
        counts = [one["offered"], one["sent"], answered.get("200", 0), answered.get("429", 0)]
        others = sum(count for status, count in answered.items() if status not in ("200", "429")) + one["broken"]
        rates = [f"{one[key]:,.0f}" for key in ("peak", "rate", "goodput")]
        lines.append([*rates, *(f"{n:,}" for n in counts), f"{one['refused_without_retry_after']:,}", f"{others:,}"])
    bound = f", with LORAPLEX_QUEUE_ROWS={found['queue_rows']}" if found["queue_rows"] else ""
    yield (
        f"## Overload\n\nThree times the peak, at fixed times over {found['connections']:,} connections, on "
        f"{found['layer']}{bound}. A request that is due while no connection is free waits in the client; what is then "
        "never sent was kept out by TCP.\n\n"
        + table(
            ["peak/s", "offered/s", "goodput/s", "offered", "sent", "200", "429", "429 without Retry-After", "others"],
            lines,
        )
    )


def _limits(results: Results) -> Iterable[str]:
    if "limits" not in results:
        return
    found = results["limits"]
    lines = [
        [f"`{one['limit']}`", *(f"{one[key]:,.1f}" for key in ("rate", "load", "accepted"))] for one in found["records"]
    ]
    yield (
        f"## Limits\n\nOne tenant, {found['workers']} workers, requests of one row at fixed times, up to ten times the "
        "limit.\n\n" + table(["limit", "limit, 1/s", "offered, 1/s", "answered with 200, 1/s"], lines)
    )


def _keys(results: Results) -> Iterable[str]:
    records = results.get("keys", [])
    if not records:
        return
    lines = []
    for form in ("JSON", "binary"):
        rates = [median(record[key] for record in records if record["form"] == form) for key in ("open", "keys")]
        lines.append([form, *(f"{rate:,.0f}" for rate in rates), *_ratio(key_ratios(results, form))])
    yield (
        f"## Keys\n\nTwo services of one layer, {records[0]['layer']}, take turns: one without keys (`AUTH=open`), and "
        "one in which every request has a key (`AUTH=keys`). The ratio is that of the rates of a pair.\n\n"
        + table(["", "requests/s without", "with", "pairs", "median ratio", "95 % interval"], lines)
    )


def _tenants(results: Results) -> Iterable[str]:
    if "tenants" not in results:
        return
    found, lines = results["tenants"], []
    rounds = found["rounds"]
    phases = {"alone": "alone", "busy": "beside the busy tenant", "control": "beside as many health checks"}
    for phase, title in phases.items():
        quiet = [record[phase]["quiet"] for record in rounds]
        beside = [record[phase]["beside"] for record in rounds if record[phase]["beside"] is not None]
        figures = [_short(median(one[key] for one in quiet)) for key in ("p50_ms", "p99_ms")]
        sums = [
            f"{sum(one['answered'].get(status, 0) for one in outcomes):,}"
            for outcomes, status in ((quiet, "200"), (beside, "200"), (beside, "429"))
        ]
        lines.append([title, *figures, f"{sum(one['offered'] for one in quiet):,}", *sums])
    compared = [
        [title, *_ratio(beside_busy_ratios(results, figure, over))]
        for title, figure, over in (
            ("p50 beside the busy tenant over alone", "p50_ms", "alone"),
            ("p99 beside the busy tenant over that beside health checks", "p99_ms", "control"),
        )
    ]
    yield (
        f"## Tenants\n\nA quiet tenant sends {found['rate']:g} requests/s to one worker, on {found['layer']}: alone, "
        f"beside a busy tenant that sends {found['times_quota']} times its limit of {found['quota']:g} requests/s, and "
        "beside as many `GET /healthz` with the same headers and bodies. The phases of a round follow each other, in "
        "an order that changes. Latencies count from when a request is due.\n\n"
        + table(["", "p50, ms", "p99, ms", "offered", "200", "200 beside", "429 beside"], lines)
        + "\n\n"
        + table(["", "rounds", "median ratio", "95 % interval"], compared)
    )


def _ratio(values: Sequence[float]) -> list[str]:
    """Return the cells of paired ratios: their number, their median and its interval."""
    low, high = median_interval(values)
    return [f"{len(values)}", f"{median(values):.3f}", f"{low:.3f} – {high:.3f}"]


def _start(results: Results) -> Iterable[str]:
    if "start" not in results:
        return
    found = results["start"]
    lines = [[f"start to ready, {found['published']:,} adapters published", f"{median(found['ready_seconds']):.2f} s"]]
    for kind, title in (("cached", "file in the page cache"), ("evicted", "file on the disk only")):
        for percent in (50, 99):
            figure = cold_milliseconds(results, percent, kind)
            lines.append([f"cold load, {title}, p{percent}", f"{_short(figure or 0.0)} ms"])
    warm = np.percentile(found["cold"]["cached"]["warm_ms"], [50, 99])
    lines.append(["a warm answer on the same connection, p50 / p99", f"{warm[0]:.2f} / {warm[1]:.2f} ms"])
    lines.append(["an adapter in memory, as the service counts it", f"{found['memory_bytes']:,} bytes"])
    lines.append(["what an adapter adds to the resident memory of the process", f"{found['rss_bytes']:,.0f} bytes"])
    yield (
        f"## Start\n\nOn {found['layer']}, rank 8. A cold load is an adapter's first answer less the median of "
        "warm ones.\n\n" + table(["", ""], lines)
    )


def _fits(results: Results) -> Iterable[str]:
    if "fits" not in results:
        return
    found = results["fits"]
    fleet, many, exact = found["fleet"], found["many"], found["exact"]
    lines = []
    for one in fleet["rounds"]:
        figures = (one["groups"] / one["seconds"], 1 / one["plain_seconds_a_fit"])
        ratio = one["groups"] * one["plain_seconds_a_fit"] / one["seconds"]
        from_request = one["groups"] / one["seconds_from_request"]
        lines.append([*(f"{figure:,.0f}" for figure in (*figures, from_request)), _short(ratio)])
    alone = fleet["alone"]
    yield (
        f"## Fits\n\nA fleet of {fleet['rounds'][0]['groups']:,} adapters from one data set, {found['layer']}, "
        f"{found['rows']} rows each, rank {found['rank']}, {found['steps']} steps of AdamW on all rows, everything "
        "published; beside it the same fits one after another with autograd and `torch.optim`. "
        f"Of {alone['groups']} groups that were trained again as jobs of their own, {alone['equal']} came out with the "
        f"same digest; the largest difference of a ΔW is {alone['largest_difference']:g} of its largest number.\n\n"
        + table(["adapters/s by the job's times", "plain torch", "from the request on", "ratio"], lines)
    )
    peak, idle, limit = (f"{many[name] / 2**20:,.0f} MiB" for name in ("peak_bytes", "idle_bytes", "limit_bytes"))
    yield (
        f"{many['groups']:,} adapters in {many['seconds']:.1f} s. The process that fits had at most {peak} in memory, "
        f"pages of the data's file among them; {idle} before, and it may use {limit}."
    )
    lines = []
    for one in exact["rounds"]:
        lines.append(["closed_form", f"{one['loss']:.6f}", f"{one['seconds']:.2f}"])
        for name, title in ADAMW.items():
            lines += [[f"{title}, {run['rate']:g}", f"{run['loss']:.6f}", f"{run['seconds']:.2f}"] for run in one[name]]
    yield (
        f"`closed_form` and {exact['epochs']} epochs of AdamW by learning rate, {exact['layer']}, {exact['rows']:,} "
        f"rows, rank {exact['rank']}, in one process on one thread; without an adapter the loss is "
        f"{exact['rounds'][0]['base_loss']:.6f}.\n\n" + table(["", "loss", "seconds"], lines)
    )


def _quality(results: Results) -> Iterable[str]:
    if "quality" not in results:
        return
    found = results["quality"]
    yield (
        "## Quality\n\nAccuracy on test rows, the mean over tenants and seeds. In brackets: the share of tenants that "
        "are harmed, which is more than a percentage point below the base layer with a paired z below -1.64. Each "
        f"world has {found['worlds'][0]['tenants']} tenants with 10 to 50 rows. `auto` and the defaults before "
        "(AdamW, rank 8, 50 epochs, always published) are what the tenants' names answer after one fleet was trained "
        "through the service. The candidates are each measured alone. The ceiling is a head that was trained on all "
        "rows."
    )
    for data in dict.fromkeys(world["data"] for world in found["worlds"]):
        yield f"### {data.capitalize()}\n\n" + table(["", *WORLDS.values()], _world_lines(found["worlds"], data))
    lines = [
        [f"{one['data']}, seed {one['seed']}", *(f"{one['accuracy'][key]:.3f}" for key in NEWCOMER_FIGURES)]
        for one in found["newcomers"]
    ]
    yield "Tenants without rows, in the world with one shared shift:\n\n" + table(
        ["", *NEWCOMER_FIGURES.values()], lines
    )
    lines = [
        [
            f"{one['data']}, {one['rows']:,} rows, seed {one['seed']}",
            *(f"{one['accuracy'][key]:.4f}" for key in LARGE_FIGURES),
            one["taken"],
        ]
        for one in found["large"]
    ]
    yield "One adapter, half of the classes renamed; accuracy on test rows:\n\n" + table(
        ["", *LARGE_FIGURES.values(), "taken"], lines
    )
    yield from _quality_of_numbers(found)


def _world_lines(worlds: Sequence[Any], data: str) -> Iterable[Sequence[str]]:
    """Return a line for each contender, with a cell for each world."""
    by_kind = {kind: [world for world in worlds if (world["kind"], world["data"]) == (kind, data)] for kind in WORLDS}
    for name, title in ALTERNATIVES.items():
        cells = []
        for records in by_kind.values():
            accuracy, harmed = (fmean(one["figures"][name][key] for one in records) for key in ("accuracy", "harmed"))
            cells.append(f"{accuracy:.3f}" if name == "base" else f"{accuracy:.3f} ({harmed:.0%})")
        yield [title, *cells]
    for name, title in (("job", "live adapters, as the jobs report"), ("test", "the same on the test rows")):
        yield [title, *(f"{fmean(one['reported'][name] for one in records):.3f}" for records in by_kind.values())]
    yield ["ceiling", *(f"{fmean(one['ceiling'] for one in records):.3f}" for records in by_kind.values())]
    yield ["live", *(f"{fmean(one['reported']['live'] for one in records):.0f}" for records in by_kind.values())]


def _quality_of_numbers(found: Any) -> Iterable[str]:
    lines = [
        [
            f"{one['data']}, {one['base']} base",
            f"{one['auto']:.4f}",
            f"{one['ridge']:.4f}",
            f"{one['live']} of {one['folds']}",
        ]
        for one in found["regression"]
    ]
    yield "Regression, R² on test rows that neither had:\n\n" + table(["", "`auto`", "RidgeCV", "live"], lines)
    fleet = found["fleet"]
    lines = [[f"{one['auto_seconds']:.1f}", f"{one['adamw_seconds']:.1f}"] for one in fleet["rounds"]]
    peak, idle = (f"{fleet[name] / 2**20:,.0f} MiB" for name in ("peak_bytes", "idle_bytes"))
    yield (
        f"A fleet of {fleet['groups']:,} adapters, {fleet['layer']}, 10 to 50 rows each, published. The process "
        f"that fits had at most {peak} in memory; {idle} before. Digests that differ between runs: "
        f"{fleet['different_digests']}.\n\n" + table(["`auto`, seconds", "AdamW with its defaults, seconds"], lines)
    )
    lines = [
        [
            f"{one['data']}, seed {one['seed']}",
            *(f"{one[name]['area']:.3f}" for name in ("trained", "zero", "cleanlab")),
            *(f"{seconds:.2f}" for seconds in (one["suspect_seconds"], one["seconds"], one["cleanlab"]["seconds"])),
        ]
        for one in found["label_errors"]
    ]
    yield "Wrong labels, area under the ROC:\n\n" + table(
        ["", "suspects", "zero base", "cleanlab", "suspects alone, seconds", "with the fit", "cleanlab"], lines
    )


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, with numbers right-aligned after the first column."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _short(figure: float) -> str:
    if 0 < abs(figure) < 0.1:
        return f"{figure:.2g}"
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.1f}" if figure >= 10 else f"{figure:.2f}"
