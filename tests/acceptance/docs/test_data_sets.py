"""The page on data sets does what it says."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from adapters.datasets.columns import MAX_COLUMNS, MAX_NAME_CHARACTERS
from adapters.datasets.ingest import CONTENT_TYPES
from tests.conftest import Serve

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[3] / "docs" / "data-sets.md").read_text()


def test_the_session_with_curl_runs_as_written(serve: Serve, tmp_path: Path) -> None:
    client, _ = serve()
    found = re.search(r"<!-- session:.*?-->\n```bash\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    script = found[1].replace("http://127.0.0.1:8000", str(client.base_url).rstrip("/"), 1)
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    put, listed, shown, version, preview, deleted = done.stdout.splitlines()
    assert json.loads(put) == json.loads(version) == json.loads(shown)["newest"]
    assert json.loads(listed)["data"][0]["name"] == "people"
    assert json.loads(preview)["rows"] == [
        {"age": None, "height": 1.8, "class": "b"},
        {"age": None, "height": 1.65, "class": "a"},
    ]
    assert deleted == "204"
    report = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert report is not None
    promised = json.loads(report[1].replace(", …]", "]"))
    assert json.loads(put)["bad_rows"] == promised["bad_rows"]
    assert json.loads(put)["columns"][0] == promised["columns"][0]
    assert json.loads(put).keys() == promised.keys()


def test_the_table_of_formats_is_the_code_s() -> None:
    rows = re.findall(r"^\| (`\w+/.*?`) \|", PAGE, re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"`(.*?)`", row)] == list(CONTENT_TYPES)


def test_the_bounds_are_the_code_s() -> None:
    assert f"| columns | {MAX_COLUMNS:,};" in PAGE
    assert f"1 to {MAX_NAME_CHARACTERS} printable characters" in PAGE
