"""The client's page of examples runs as it is written."""

import re
from pathlib import Path

import pytest

from app.settings import Settings
from tests.conftest import Serve

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "client" / "README.md").read_text()


def test_the_examples_run_one_after_the_other(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    http, _ = serve(trainer=True, base=Settings.model_fields["base"].default)
    monkeypatch.setenv("LORAPLEX_URL", str(http.base_url))
    monkeypatch.chdir(ROOT)
    examples = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(examples) == 8
    code = "\n".join(examples).replace("/tmp/acme", str(tmp_path / "acme"))
    exec(compile(code, "client/README.md", "exec"), {"__name__": "readme"})
    shown = capsys.readouterr().out.splitlines()
    name, metric, accuracy, base = shown[0].split()
    assert (name, metric) == ("acme@1", "accuracy")
    assert float(accuracy) > 0.8 > float(base)
    assert shown[1].startswith("True ")
    assert shown[5] == "(0, None, 0)"
    assert any(line.startswith("adapter_not_found 404") for line in shown)
    assert any("status {'status': 'succeeded'" in line for line in shown)
