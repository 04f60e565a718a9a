"""Figures of one process and of many, against what `prometheus_client` makes of the same."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from app.observability.metrics.definitions import (
    BATCH_ROWS,
    DEFINITIONS,
    PUBLISHED,
    QUEUE_ROWS,
    REQUEST_SECONDS,
    REQUESTS,
    Kind,
)
from app.observability.metrics.exposition import exposition
from app.observability.metrics.metric_values import MetricValues, sum_values
from tests.support.metrics_exposition import read, series, shown_of

OBSERVED = st.lists(
    st.one_of(st.sampled_from(REQUEST_SECONDS.bounds), st.floats(0, 100), st.just(0.0)), min_size=1, max_size=40
)


@given(parts=st.lists(OBSERVED, min_size=1, max_size=4))
def test_many_observations_at_once_are_as_many_one_by_one(parts: Sequence[Sequence[float]]) -> None:
    registry = CollectorRegistry()
    oracle = Histogram(REQUEST_SECONDS.name, "", ["route"], buckets=REQUEST_SECONDS.bounds, registry=registry).labels(
        "/predict"
    )
    processes = []
    for part in parts:
        processes.append(MetricValues())
        processes[-1].observe(REQUEST_SECONDS, part, "/predict")
        for value in part:
            oracle.observe(value)
    wanted = {key: value for key, value in read(generate_latest(registry).decode()).items() if "_created" not in key[0]}
    assert shown_of(sum_values(processes)) == pytest.approx(wanted)


def test_counters_and_gauges_of_processes_are_added_up_label_by_label() -> None:
    one, other = MetricValues(), MetricValues()
    one.add(REQUESTS, 2, "/predict", "POST", "200")
    other.add(REQUESTS, 3, "/predict", "POST", "200")
    other.add(REQUESTS, 1, "/predict", "POST", "429")
    for each in (one, other):
        each.put(QUEUE_ROWS, 5)
    assert shown_of(sum_values([one, other])) == {
        series("requests_total", route="/predict", method="POST", status="200"): 5,
        series("requests_total", route="/predict", method="POST", status="429"): 1,
        series("queue_rows"): 10,
    }


def test_what_is_written_is_read_again() -> None:
    figures = MetricValues()
    figures.add(PUBLISHED, 7, "job")
    figures.observe(BATCH_ROWS, [1, 3, 256, 10**6])
    assert shown_of(MetricValues.from_json(figures.to_json())) == shown_of(figures)


def test_a_metric_that_another_release_defined_otherwise_is_left_out() -> None:
    stored = {
        "numbers": [["loraplex_gone_total", [], 1.0], [PUBLISHED.name, [], 1.0], [PUBLISHED.name, ["job"], 2.0]],
        "tallies": [[BATCH_ROWS.name, [], [1, 2, 3], 4.0]],
    }
    assert shown_of(MetricValues.from_json(stored)) == {series("adapters_published_total", source="job"): 2}


def test_both_formats_say_the_same() -> None:
    figures = MetricValues()
    figures.add(REQUESTS, 2, '/"odd"\\\n', "POST", "200")
    figures.observe(REQUEST_SECONDS, [0.1], "/predict")
    body, content_type = exposition(figures, "application/openmetrics-text; version=1.0.0, text/plain;q=0.5")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    families = text_string_to_metric_families(body.decode())  # type: ignore[no-untyped-call]
    samples = [sample for family in families for sample in family.samples]
    assert {(each.name, frozenset(each.labels.items())): each.value for each in samples} == shown_of(figures)


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=x\x80", "*/*", "", "text/plain; version=99"])
def test_an_accept_of_any_kind_has_an_answer(accept: str) -> None:
    _, content_type = exposition(MetricValues(), accept)
    assert content_type.split(";")[0] in ("text/plain", "application/openmetrics-text")
    assert "\x80" not in content_type


def test_names_are_as_prometheus_wants_them() -> None:
    """A prefix, base units, `_total` for what only goes up; and no label that grows with what is stored."""
    for name, metric in DEFINITIONS.items():
        assert name.startswith("loraplex_")
        assert name.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert bool(metric.bounds) == (metric.kind is Kind.HISTOGRAM)
        assert list(metric.bounds) == sorted(set(metric.bounds))
        assert not {"adapter", "name", "tenant", "job", "dataset", "version_id"} & set(metric.labels)
        assert not name.removesuffix("_total").endswith(("_ms", "_milliseconds", "_kb", "_mb"))
