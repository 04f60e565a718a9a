"""What the figures are held against: each bar is computed from the run, and says whether it is met."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

Results = Mapping[str, Any]
_CONNECTIONS = 16


@dataclass(frozen=True, slots=True)
class Bar:
    """One promise about speed."""

    title: str
    figure: Callable[[Results], float | None]
    """None where the run has not measured it."""
    at_most: float | None = None
    at_least: float | None = None
    unit: str = ""

    def met(self, figure: float) -> bool:
        """Whether the figure keeps the promise."""
        return (self.at_most is None or figure <= self.at_most) and (self.at_least is None or figure >= self.at_least)

    @property
    def text(self) -> str:
        """The bar as it is printed; a figure without a bar is there to be seen."""
        if self.at_most is not None:
            return f"≤ {self.at_most:g}{self.unit}"
        return "none" if self.at_least is None else f"≥ {self.at_least:g}{self.unit}"


def over_base(results: Results, layer: str, case: str, contender: str) -> float | None:
    """Median over repetitions of the time over that of the base GEMM in the same repetition."""
    times = {
        record["contender"]: record["seconds"]
        for record in results.get("engine", [])
        if (record["layer"], record["case"]) == (layer, case)
    }
    if contender not in times:
        return None
    pairs = zip(times[contender], times["base"], strict=True)
    return float(median(own / base for own, base in pairs if own is not None))


def rates(results: Results, layer: str, row: str, connections: int = _CONNECTIONS) -> dict[int, float]:
    """Return the requests per second by round."""
    wanted = (layer, row, connections)
    return {
        record["round"]: record["requests_per_second"]
        for record in results.get("service", [])
        if (record["layer"], record["row"], record["connections"]) == wanted
    }


def rate_over(results: Results, layer: str, row: str, other: str) -> float | None:
    """Median over rounds of one row's requests a second over another's in the same round."""
    ours, theirs = rates(results, layer, row), rates(results, layer, other)
    ratios = [ours[number] / theirs[number] for number in ours if number in theirs]
    return median(ratios) if ratios else None


def training_ratio(results: Results) -> float | None:
    """Median over rounds of p99 beside a trainer over p99 idle."""
    rounds = results.get("training", {}).get("rounds", [])
    return median(each["training"]["p99_ms"] / each["idle"]["p99_ms"] for each in rounds) if rounds else None


def limit_beside_loop_ratio(results: Results) -> float | None:
    """Return the same for the limit beside a loop of the trainer's scheduling class, which shows the machine's part."""
    rounds = [each for each in results.get("training", {}).get("rounds", []) if "limit_loop" in each]
    return median(each["limit_loop"]["p99_ms"] / each["limit_idle"]["p99_ms"] for each in rounds) if rounds else None


def goodput_ratio(results: Results) -> float | None:
    """Median over rounds of what was answered under overload over the peak just before."""
    rounds = results.get("overload", {}).get("rounds", [])
    return median(each["goodput"] / each["peak"] for each in rounds) if rounds else None


def key_ratios(results: Results, form: str) -> list[float]:
    """Return the rate with keys over the rate without, of each pair."""
    return [record["keys"] / record["open"] for record in results.get("keys", []) if record["form"] == form]


def beside_busy_ratios(results: Results, figure: str, over: str) -> list[float]:
    """Return a figure of the quiet tenant beside the busy one over the same in another phase, of each round."""
    rounds = results.get("tenants", {}).get("rounds", [])
    return [record["busy"]["quiet"][figure] / record[over]["quiet"][figure] for record in rounds]


def quiet_goodput(results: Results) -> float | None:
    """Return the share of the quiet tenant's requests that were answered with 200 beside the busy one."""
    outcomes = [record["busy"]["quiet"] for record in results.get("tenants", {}).get("rounds", [])]
    offered = sum(outcome["offered"] for outcome in outcomes)
    return sum(outcome["answered"].get("200", 0) for outcome in outcomes) / offered if offered else None


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % confidence interval of the median from order statistics (Conover 1999, section 3.2)."""
    ordered, count = sorted(values), len(values)
    below, rank = 0.0, 0
    while (below := below + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[count - rank]


def _median(ratios: Sequence[float]) -> float | None:
    return median(ratios) if ratios else None


def refused_otherwise(results: Results) -> float | None:
    """Return how many requests of all rounds ended in something other than 200 or 429 with Retry-After."""
    rounds = results.get("overload", {}).get("rounds", [])
    if not rounds:
        return None
    others = (
        sum(count for status, count in each["answered"].items() if status not in ("200", "429"))
        + each["refused_without_retry_after"]
        + each["broken"]
        for each in rounds
    )
    return float(sum(others))


def cold_milliseconds(results: Results, percent: float, kind: str = "cached") -> float | None:
    """Return the cost of a cold load: an adapter's first answer minus the median of warm ones."""
    cold = results.get("start", {}).get("cold", {}).get(kind)
    return float(np.percentile(cold["cold_ms"], percent)) - median(cold["warm_ms"]) if cold else None


def fleet_ratio(results: Results) -> float | None:
    """Median over rounds of a fleet's groups a second over the same fits a second in plain torch."""
    rounds = results.get("fits", {}).get("fleet", {}).get("rounds", [])
    return median(each["groups"] * each["plain_seconds_a_fit"] / each["seconds"] for each in rounds) if rounds else None


def unlike_alone(results: Results) -> float | None:
    """How far a group's ΔW in a fleet is from the same group's alone, at most, relative to its largest number."""
    alone = results.get("fits", {}).get("fleet", {}).get("alone")
    return float(alone["largest_difference"]) if alone else None


def fleet_memory_ratio(results: Results) -> float | None:
    """Return the largest memory of the fit process, relative to its limit."""
    many = results.get("fits", {}).get("many")
    return float(many["peak_bytes"] / many["limit_bytes"]) if many else None


def exact_ratio(results: Results, what: str, other: str) -> float | None:
    """Median over rounds of `loss` or `seconds` of closed_form over those of an AdamW at its best rate."""
    rounds = results.get("fits", {}).get("exact", {}).get("rounds", [])
    return (
        median(each[what] / min(each[other], key=lambda run: run["loss"])[what] for each in rounds) if rounds else None
    )


def _worlds(results: Results) -> list[Any]:
    return list(results.get("quality", {}).get("worlds", []))


def over_contenders(results: Results, contenders: Collection[str], kinds: str = "ABCDEF") -> float | None:
    """Return the accuracy of `auto` minus that of the best of these: the least over the worlds and seeds."""
    return min(
        (
            world["figures"]["auto"]["accuracy"] - max(world["figures"][name]["accuracy"] for name in contenders)
            for world in _worlds(results)
            if world["kind"] in kinds
        ),
        default=None,
    )


def largest_harm(results: Results) -> float | None:
    """Return the largest share of harmed tenants in a world, over its data sets and seeds."""
    shares: dict[str, list[float]] = defaultdict(list)
    for world in _worlds(results):
        shares[world["kind"]].append(world["figures"]["auto"]["harmed"])
    return max(map(fmean, shares.values()), default=None)


def overall_harm(results: Results, contender: str = "auto") -> float | None:
    """Return the share of harmed tenants in all worlds."""
    shares = [world["figures"][contender]["harmed"] for world in _worlds(results)]
    return fmean(shares) if shares else None


def newcomer_share(results: Results) -> float | None:
    """Return the gain of tenants without rows over that of their own 30 rows: the least over data sets and seeds."""
    found = [record["accuracy"] for record in results.get("quality", {}).get("newcomers", [])]
    gains = ((own["prior"] - own["base"]) / (max(own["alone"], own["fleet"]) - own["base"]) for own in found)
    return min(gains, default=None)


def large_difference(results: Results, contender: str) -> float | None:
    """Return the accuracy of `auto` minus the contender's, the mean over seeds: the least over the data sets."""
    differences: dict[str, list[float]] = defaultdict(list)
    for record in results.get("quality", {}).get("large", []):
        differences[record["data"]].append(record["accuracy"]["auto"] - record["accuracy"][contender])
    return min(map(fmean, differences.values()), default=None)


def over_records(
    results: Results, part: str, figure: Callable[[Any], float], choose: Callable[[Iterable[float]], float] = min
) -> float | None:
    """Return the least of a figure over the records of a part of the section on quality, or what `choose` returns."""
    records = results.get("quality", {}).get(part)
    return choose(map(figure, records)) if records else None


def wide_fleet(results: Results, figure: Callable[[Any], float]) -> float | None:
    """Return a figure of the fleet of a thousand tenants with few rows."""
    found = results.get("quality", {}).get("fleet")
    return figure(found) if found else None


def _auto_over_adamw(fleet: Any) -> float:
    return float(median(each["auto_seconds"] / each["adamw_seconds"] for each in fleet["rounds"]))


def _area_over_cleanlab(record: Any) -> float:
    return min(float(record[base]["area"]) for base in ("trained", "zero")) - float(record["cleanlab"]["area"])


def _engine(case: str) -> Callable[[Results], float | None]:
    return lambda results: over_base(results, "768×768", case, "ours")


def _service(layer: str, row: str, other: str) -> Callable[[Results], float | None]:
    return lambda results: rate_over(results, layer, row, other)


def rate_difference(results: Results) -> float | None:
    """Return the largest difference of an accepted rate to its limit, over the limit."""
    records = results.get("limits", {}).get("records", [])
    return max((abs(one["accepted"] / one["rate"] - 1) for one in records), default=None)


_SINGLE = ("base", "ridge", "ridge_in_base_metric", "own_head", "fleet_mean", "cluster_mean")
_OURS = "768-wide JSON, 16 connections, 1,000 adapters uniform"
BARS = (
    Bar("engine, 768×768, 32 rows, 32 adapters, rank 8: time over the base GEMM alone", _engine("32"), at_most=1.4),
    Bar("the same with 4 adapters × 8 rows", _engine("4"), at_most=1.2),
    Bar(f"service, {_OURS}: requests/s over the limit", _service("768×768", "ours-1000", "bare"), at_least=1.3),
    Bar("the same over FastAPI + pydantic without adapters", _service("768×768", "ours-1000", "fastapi"), at_least=4),
    Bar("the same over LitServe", _service("768×768", "ours-1000", "litserve"), at_least=10),
    Bar("the same over Ray Serve as it comes", _service("768×768", "ours-1000", "ray"), at_least=25),
    Bar("the same over Ray Serve with HAProxy", _service("768×768", "ours-1000", "ray-haproxy")),
    Bar("the same on 64×10: over the limit", _service("64×10", "ours-1000", "bare"), at_least=0.9),
    Bar("binary over our own JSON, 768 wide", _service("768×768", "ours-1000-binary", "ours-1000"), at_least=1.3),
    Bar("1,000 adapters over 1 adapter", _service("768×768", "ours-1000", "ours-1"), at_least=0.95),
    Bar(
        "10,000 adapters, memory for 1,000, Zipf 1.0: over all resident",
        _service("768×768", "ours-10000-zipf-short", "ours-10000-zipf"),
        at_least=0.7,
    ),
    Bar("cold load of an adapter, p99", lambda results: cold_milliseconds(results, 99), at_most=10, unit=" ms"),
    Bar("at half the peak rate: p99 while a trainer runs over p99 idle", training_ratio, at_most=2),
    Bar("the limit, at half its own: p99 beside a loop of the trainer's class over p99 idle", limit_beside_loop_ratio),
    Bar("overload at 3× capacity: goodput over peak", goodput_ratio, at_least=0.9),
    Bar("the same: ends that are neither 200 nor 429 with Retry-After", refused_otherwise, at_most=0),
    Bar("rates of a tenant over two workers: largest difference to the limit", rate_difference, at_most=0.05),
    Bar("fast path with keys over without, JSON", lambda results: _median(key_ratios(results, "JSON")), at_least=0.95),
    Bar(
        "fast path with keys over without, binary",
        lambda results: _median(key_ratios(results, "binary")),
        at_least=0.95,
    ),
    Bar(
        "beside a tenant at ten times its quota: p50 over alone",
        lambda results: _median(beside_busy_ratios(results, "p50_ms", "alone")),
        at_most=1.2,
    ),
    Bar(
        "the same: p99 over that beside as many health checks",
        lambda results: _median(beside_busy_ratios(results, "p99_ms", "control")),
        at_most=1.2,
    ),
    Bar("the same: goodput over the load", quiet_goodput, at_least=0.98),
    Bar("a fleet of 1,000 (64×10, 100 rows, 50 steps), published: rate over plain torch", fleet_ratio, at_least=15),
    Bar("the same: largest difference of a group's ΔW to that of the group alone", unlike_alone, at_most=1e-5),
    Bar("a fleet of 10,000: most memory of the process that fits, over its limit", fleet_memory_ratio, at_most=1),
    Bar(
        "closed_form, 768×768, 5,000 rows, rank 8: loss over that of 20 epochs of AdamW",
        lambda results: exact_ratio(results, "loss", "adamw"),
        at_most=1,
    ),
    Bar(
        "the same: time over AdamW in plain torch",
        lambda results: exact_ratio(results, "seconds", "plain"),
        at_most=0.5,
    ),
    Bar("the same: time over the service's own", lambda results: exact_ratio(results, "seconds", "adamw")),
    Bar(
        "tenants with few rows: accuracy of `auto` minus that of the best single candidate, least over all worlds",
        lambda results: over_contenders(results, _SINGLE),
        at_least=-0.015,
    ),
    Bar(
        "the same: minus that of scikit-learn's own head",
        lambda results: over_contenders(results, ("head",)),
        at_least=0,
    ),
    Bar(
        "the same, where no change is wanted: minus that of the base layer",
        lambda results: over_contenders(results, ("base",), kinds="D"),
        at_least=0,
    ),
    Bar("the same: share of harmed tenants in the worst world", largest_harm, at_most=0.08),
    Bar("the same: share of harmed tenants in all worlds", overall_harm, at_most=0.03),
    Bar("the same with the defaults before", lambda results: overall_harm(results, "before")),
    Bar(
        "a tenant without rows, served by the fleet prior: gain over that of its own 30 rows",
        newcomer_share,
        at_least=0.5,
    ),
    Bar(
        "1,000 rows or more: accuracy of `auto` minus that of PEFT with AdamW at the best of four rates",
        lambda results: large_difference(results, "peft"),
        at_least=-0.01,
    ),
    Bar(
        "the same: minus that of LogisticRegressionCV", lambda results: large_difference(results, "cv"), at_least=-0.01
    ),
    Bar(
        "regression: R² of the defaults minus that of RidgeCV, least over tables and base layers",
        lambda results: over_records(results, "regression", lambda one: one["auto"] - one["ridge"]),
        at_least=-0.01,
    ),
    Bar(
        "the same: jobs that lost to the mean, and moved live or did not warn",
        lambda results: over_records(results, "regression", lambda one: one["unsafe"], sum),
        at_most=0,
    ),
    Bar(
        "a fleet of 1,000 (384×20, 10 to 50 rows), published: time of `auto` over AdamW with its defaults",
        lambda results: wide_fleet(results, _auto_over_adamw),
        at_most=5,
    ),
    Bar(
        "the same: most memory of the process that fits, over its limit",
        lambda results: wide_fleet(results, lambda fleet: fleet["peak_bytes"] / fleet["limit_bytes"]),
        at_most=1,
    ),
    Bar(
        "the same: digests that differ in another run",
        lambda results: wide_fleet(results, lambda fleet: fleet["different_digests"]),
        at_most=0,
    ),
    Bar(
        "40 wrong labels of 400, texts and digits: area under the ROC of the suspects",
        lambda results: over_records(results, "label_errors", lambda one: one["trained"]["area"]),
        at_least=0.92,
    ),
    Bar(
        "the same: minus that of cleanlab, with a base layer or without",
        lambda results: over_records(results, "label_errors", _area_over_cleanlab),
        at_least=-0.01,
    ),
    Bar(
        "the same: seconds of the suspects",
        lambda results: over_records(results, "label_errors", lambda one: one["suspect_seconds"], max),
        at_most=0.5,
        unit=" s",
    ),
    Bar(
        "the same: seconds of the whole fit with its suspects, without AdamW",
        lambda results: over_records(results, "label_errors", lambda one: one["seconds"], max),
        unit=" s",
    ),
)
