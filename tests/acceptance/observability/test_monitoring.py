"""Alerts and dashboard: sound by Prometheus' own tools, and about metrics that there are."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from app.http.host_policy import HostPolicy
from app.observability.metrics.definitions import DEFINITIONS
from scripts.kubernetes import ADAPTER
from tests.acceptance.observability.monitoring_files import (
    ALERTS,
    DASHBOARD,
    GRAFANA,
    PROMETHEUS,
    expressions,
    metrics_in,
    panels,
)
from tests.support.external_programs import program

pytestmark = pytest.mark.slow

SECONDS = 60
NOT_SHOWN = {
    "loraplex_base_info",
    "loraplex_fast_path_fallbacks_total",
    "loraplex_process_start_time_seconds",
    "loraplex_resident_adapters",
    "loraplex_scrub_finished_timestamp_seconds",
    "loraplex_trashed_bytes",
}
"""Of use in other people's queries."""


@pytest.mark.parametrize(
    "arguments",
    [["check", "config", "prometheus.yml"], ["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]],
    ids=" ".join,
)
def test_promtool_finds_nothing_wrong(arguments: list[str]) -> None:
    run = subprocess.run(
        [program("promtool"), *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_metric_that_is_asked_for_exists() -> None:
    asked = {metric for expression in expressions().values() for metric in metrics_in(expression)}
    asked |= {metric for rule in ALERTS for metric in metrics_in(rule["expr"])}
    assert asked - set(DEFINITIONS) == set()
    assert set(DEFINITIONS) - asked == NOT_SHOWN, "a metric that nobody looks at"


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"].endswith(".")
        assert len(rule["annotations"]["runbook"]) > 60
        assert f"Loraplex{rule['alert'].removeprefix('Loraplex')}" == rule["alert"]


def test_every_alert_is_tried_on_a_bad_day() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    (bad,) = [test for test in tests if test["name"] == "everything is wrong"]
    fired = {sample["labels"] for check in bad["promql_expr_test"] for sample in check["exp_samples"]}
    assert fired == {f'{{alertname="{rule["alert"]}"}}' for rule in ALERTS}


def test_the_dashboard_is_provisioned_and_its_panels_do_not_overlap() -> None:
    provider = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "loraplex.yml").read_text())
    compose = yaml.safe_load((Path(__file__).parents[3] / "docker-compose.yml").read_text())
    mounted = [volume.split(":") for volume in compose["services"]["grafana"]["volumes"]]
    assert ["./monitoring/grafana/dashboards", provider["providers"][0]["options"]["path"], "ro"] in mounted
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in panels():
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"].get("unit") or panel["options"]["yAxis"]["unit"]


def test_the_service_answers_to_the_name_by_which_prometheus_asks_in_the_stack() -> None:
    compose = yaml.safe_load((Path(__file__).parents[3] / "docker-compose.yml").read_text())
    configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    (target,) = configuration["scrape_configs"][0]["static_configs"][0]["targets"]
    service = target.partition(":")[0]
    # Compose replaces the variable with the person's own list, which is empty by default.
    allowed, _, _ = compose["services"][service]["environment"]["LORAPLEX_ALLOWED_HOSTS"].partition("${")
    assert HostPolicy("0.0.0.0", allowed).accepts(target.encode())


def test_what_the_stack_pulls_is_pinned_and_listens_on_this_machine_alone() -> None:
    compose = yaml.safe_load((Path(__file__).parents[3] / "docker-compose.yml").read_text())
    observing = {name: service for name, service in compose["services"].items() if "profiles" in service}
    assert set(observing) == {"prometheus", "grafana"}
    for service in observing.values():
        assert service["profiles"] == ["obs"]
        assert service["image"].rpartition(":")[2][0] in "v0123456789"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["read_only"] is True


def test_the_time_that_kubernetes_scales_by_is_that_of_each_pod(tmp_path: Path) -> None:
    (rule,) = yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]
    # As the adapter fills it in, for the pods of a namespace.
    parts = {"Series": "loraplex_queue_seconds_bucket", "LabelMatchers": 'namespace="loraplex"', "GroupBy": "pod"}
    query = re.sub(r"<<\.(\w+)>>", lambda match: parts[match[1]], rule["metricsQuery"])
    # Of the requests of a pod, half wait for less than 10 ms, and the other half for up to 50 ms; or none arrive.
    rates = {"busy": {"0.01": 300, "0.05": 600, "+Inf": 600}, "idle": {"0.01": 0, "0.05": 0, "+Inf": 0}}
    series = [
        {
            "series": f'loraplex_queue_seconds_bucket{{namespace="loraplex", pod="{pod}", le="{bound}"}}',
            "values": f"0+{rate}x20",
        }
        for pod, buckets in rates.items()
        for bound, rate in buckets.items()
    ]
    samples = [{"labels": '{pod="busy"}', "value": 0.042}, {"labels": '{pod="idle"}', "value": 0}]
    check = {"expr": query, "eval_time": "10m", "exp_samples": samples}
    test = {"interval": "1m", "input_series": series, "promql_expr_test": [check]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [test]}))
    run = subprocess.run(
        [program("promtool"), "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
