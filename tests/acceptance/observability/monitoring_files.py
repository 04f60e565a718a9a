"""The files of `monitoring/`, and what they ask of metrics."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MONITORING = Path(__file__).parents[3] / "monitoring"
PROMETHEUS, GRAFANA = MONITORING / "prometheus", MONITORING / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "loraplex.json").read_text())
ALERTS: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]


def panels() -> Iterator[dict[str, Any]]:
    """Those that show something."""
    return (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def expressions() -> dict[str, str]:
    """The queries of the dashboard, by panel and letter, with its variables as a viewer has them at first."""
    return {
        f"{panel['title']}: {target['refId']}": target["expr"]
        .replace("$__rate_interval", "10s")
        .replace("$instance", ".*")
        for panel in panels()
        for target in panel["targets"]
    }


def metrics_in(expression: str) -> set[str]:
    """The metrics that a query names, a histogram by its own name."""
    return {re.sub("_(bucket|count|sum)$", "", name) for name in re.findall(r"\bloraplex_[a-z0-9_]+", expression)}
