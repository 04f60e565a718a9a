"""The pages that explain say what was measured and what is tested."""

import re

import pytest
import torch

from adapters.lora.adapter import Adapter
from adapters.training.candidates import choice, descent, fleet_mean, small, task
from adapters.training.evaluation import judgement
from adapters.training.planning.split import FEW_ROWS
from tests.acceptance.crash.crash_points import POINTS
from tests.acceptance.docs.executable_pages import ROOT

pytestmark = pytest.mark.slow

EXPLANATION = ROOT / "docs" / "explanation"
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text()


def _rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


def test_the_figures_of_the_batch_are_the_measured_ones() -> None:
    told = [row for row in _rows((EXPLANATION / "the-batch.md").read_text()) if row[0] not in ("figure", "---")]
    measured = [row[:2] for row in _rows(RESULTS)]
    assert len(told) > 10
    assert [row for row in told if row not in measured] == []


def test_what_is_not_met_is_said() -> None:
    missed = [row[0] for row in _rows(RESULTS) if row[-1] == "**not met**"]
    page = (EXPLANATION / "the-batch.md").read_text()
    assert "**not met**" in page
    assert all(figure in page for figure in missed)


def test_the_figures_of_coherence_are_the_measured_ones() -> None:
    page = (EXPLANATION / "coherence.md").read_text().partition("\n## Measured\n")[2]
    measured = _rows((ROOT / "benchmarks" / "COHERENCE.md").read_text())
    assert len(_rows(page)) > 10
    assert [row for row in _rows(page) if row not in measured] == []


def test_the_readme_s_figures_are_the_measured_ones() -> None:
    readme = (ROOT / "README.md").read_text()
    rates = {row[0]: row[1:] for row in _rows(readme) if row[-1].endswith("/s")}
    lines = {
        "loraplex, binary": "**loraplex**, 1,000 adapters, uniform, binary",
        "loraplex, JSON": "**loraplex**, 1,000 adapters, uniform",
        "a bare ASGI function, the base layer alone, JSON": "**the limit**: bare ASGI, orjson, one base GEMM a request",
        "FastAPI and pydantic, the base layer alone, JSON": "FastAPI + pydantic, base only",
    }
    assert rates.keys() == lines.keys()
    service = RESULTS.partition("## Service")[2].partition("## Engine")[0]
    for column, layer in enumerate(("64×10", "768×768")):
        table = {row[0]: row[2] for row in _rows(service.partition(f"### {layer}\n")[2].partition("###")[0])}
        for name, line in lines.items():
            measured = float(table[line].split()[0].replace(",", ""))
            said = float(rates[name][column].removesuffix("/s").replace(",", ""))
            assert said == pytest.approx(measured, rel=0.005), (name, layer)


def test_the_comparison_has_the_measured_figures() -> None:
    page = (EXPLANATION / "when-to-use-loraplex.md").read_text()
    engine = RESULTS.partition("\n## Engine\n")[2].partition("\n## ")[0]
    service = RESULTS.partition("\n## Service\n")[2].partition("\n## ")[0]
    for marker, results, column in (("engine", engine, 3), ("service", service, 2)):
        table = _rows(page.partition(f"<!-- results: {marker}")[2].partition("\n\n")[0])
        layers = table[0][1:]
        assert len(table) > 3
        for name, *figures in table[1:]:
            for layer, figure in zip(layers, figures, strict=True):
                measured = {row[0]: row for row in _rows(results.partition(f"### {layer}\n")[2].partition("###")[0])}
                assert measured[name][column].split()[0] == figure, (name, layer)


def test_the_sizing_page_has_the_measured_figures() -> None:
    page = (ROOT / "docs" / "sizing.md").read_text()
    cache = _rows(page.partition("\n## The cache\n")[2].partition("\n## ")[0])[2:]
    assert len(cache) == 5
    assert [row for row in cache if row not in [line[:2] for line in _rows(RESULTS)]] == []
    service = RESULTS.partition("\n## Service\n")[2].partition("\n## ")[0]
    for layer, *rates in _rows(page.partition("\n## Throughput\n")[2].partition("\n## ")[0])[1:]:
        measured = {row[0]: row for row in _rows(service.partition(f"### {layer}\n")[2].partition("###")[0])}
        lines = ("**loraplex**, 1,000 adapters, uniform", "**loraplex**, 1,000 adapters, uniform, binary")
        column = 2 if len(measured[""]) > 4 else 1
        assert [measured[line][column].split()[0] for line in lines] == rates, layer


@pytest.mark.parametrize(
    "phrase",
    [
        f"{choice.PSEUDO_ROWS}·the other groups' mean loss",
        f"a fleet of {fleet_mean.MIN_CLUSTERED_GROUPS} groups or more",
        f"Above {task.MAX_LEFT_OUT_ROWS} training rows",
        f"from {FEW_ROWS} rows per adapter on",
        f"stopping after {descent._PATIENCE} evaluations",
    ],
)
def test_the_page_on_auto_has_the_constants(phrase: str) -> None:
    assert phrase in (EXPLANATION / "how-auto-chooses.md").read_text()


def test_the_page_on_the_evaluation_has_the_constants() -> None:
    page = (EXPLANATION / "the-evaluation.md").read_text()
    assert f"by {judgement.PSEUDO_ROWS} rows of their mean gain" in page
    assert f"| {FEW_ROWS} or more |" in page
    assert f"({small.FOLDS} folds)" in page


def test_every_crash_point_is_counted() -> None:
    assert f"{len(POINTS)} of them" in (EXPLANATION / "the-storage-promises.md").read_text()


def test_the_files_that_pages_name_exist() -> None:
    for page in EXPLANATION.glob("*.md"):
        for name in re.findall(r"`((?:tests|adapters|app)/[\w/]+\.py)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_digest_of_the_format_page_is_that_of_the_adapter() -> None:
    adapter = Adapter(a_OR=torch.zeros(2, 1), b_RI=torch.ones(1, 3), bias_O=None, alpha=1.0)
    assert adapter.digest in (ROOT / "docs" / "adapter-format.md").read_text()
