"""docs/metrics-reference.md, held against the code."""

import re
from pathlib import Path

from app.observability.metrics.definitions import DEFINITIONS

PAGE = (Path(__file__).parents[3] / "docs" / "metrics-reference.md").read_text()
ROW = re.compile(r"\| `(loraplex_[a-z_]+)` \| (counter|gauge|histogram) \| (.*?) \| (.+) \|")


def test_the_page_has_every_metric_as_the_code_defines_it() -> None:
    written = {
        name: (kind, re.findall(r"`(\w+)`", labels), meaning) for name, kind, labels, meaning in ROW.findall(PAGE)
    }
    assert written == {name: (metric.kind, list(metric.labels), metric.meaning) for name, metric in DEFINITIONS.items()}
