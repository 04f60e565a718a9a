"""The README does what it says."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from app.settings import PREFIX, Settings
from tests.conftest import Serve

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def _block(name: str) -> str:
    found = re.search(rf"<!-- {name}:.*?-->\n```bash\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


def _run(script: str, folder: Path) -> list[str]:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()


def test_the_session_with_curl_runs_as_written(serve: Serve, tmp_path: Path) -> None:
    client, _ = serve(trainer=True, base="random:4,2,42")
    script = _block("session").replace("http://127.0.0.1:8000", str(client.base_url).rstrip("/"), 1)
    job, acme, base, both, uploaded, globex, rolled_back, again = _run(script, tmp_path)
    assert '"status":"succeeded"' in job
    assert '"name":"acme","version":1' in acme
    assert '"adapter":null' in base
    assert '"row_adapters":[0,null]' in both
    assert '"version":2' in uploaded
    assert '"adapter":"globex","version":1' in globex
    assert '"live":1' in rolled_back
    assert again == acme
    first, second = (
        client.get(f"/adapters/{name}/versions/1").raise_for_status().json() for name in ("acme", "globex")
    )
    assert first["digest"] == second["digest"]


def test_the_training_runs_as_written_on_the_session_s_service(serve: Serve, tmp_path: Path) -> None:
    client, _ = serve(trainer=True, base="random:4,2,42")
    uploaded, *events, labels = _run(f"URL={str(client.base_url).rstrip('/')}\n{_block('training')}", tmp_path)
    assert '"rows":400' in uploaded
    assert '"bad_rows":[]' in uploaded
    assert {"event: log", "event: progress", "event: metrics", "event: status"} <= set(events)
    assert any('"status":"succeeded"' in line for line in events)
    (metrics,) = [line for line in events if '"gate":' in line]
    assert '"moves_live":true' in metrics
    assert '"labels":[["shipping"]]' in labels


def test_the_lines_for_nvidias_client_run_as_written(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    client, _ = serve(base="zeros:4,2")
    client.put("/adapters/acme", json={"A": [[1], [2]], "B": [[3, 0, 0, 0]]}).raise_for_status()
    found = re.search(r"<!-- triton:.*?-->\n```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    address = f"{client.base_url.host}:{client.base_url.port}"
    names: dict[str, Any] = {}
    exec(found[1].replace("127.0.0.1:8000", address, 1), names)
    names["client"].close()
    assert capsys.readouterr().out == "[[3. 6.]]\n"


def test_the_settings_table_is_the_settings() -> None:
    def shown(value: object) -> str:
        return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    expected = {
        f"{PREFIX}{name.upper()}": (shown(field.default), field.description)
        for name, field in Settings.model_fields.items()
    }
    listed = {name: (default, text) for name, default, text in re.findall(r"\| `(\w+)` \| (\S+) \| (.+) \|", README)}
    assert listed == expected


def test_compose_passes_every_setting_on() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    passed = set(re.findall(r"^    LORAPLEX_(\w+):", compose, re.MULTILINE))
    set_by_the_image_or_command = {"DATA_DIR", "PORT", "TRAINERS"}
    assert passed == {name.upper() for name in Settings.model_fields} - set_by_the_image_or_command


def test_every_page_that_a_page_links_to_exists() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
