"""The page on labels does what it says."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Serve

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[3] / "docs" / "labels.md").read_text()


def test_the_session_with_labels_runs_as_written(serve: Serve, tmp_path: Path) -> None:
    base = re.search(r"loraplex serve --base (\S+)", PAGE)
    script = re.search(r"<!-- tests/.*?-->\n```bash\n(.*?)```", PAGE, re.DOTALL)
    assert base is not None
    assert script is not None
    client, _ = serve(base=base[1])
    here = script[1].replace("http://127.0.0.1:8000", str(client.base_url).rstrip("/"), 1)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", here], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    uploaded, labels, top, classes = map(json.loads, done.stdout.splitlines())
    assert uploaded["labels"] == ["cat", "dog", "horse"]
    assert labels["labels"] == ["cat", "dog"]
    assert top["labels"] == [["cat", "horse"]]
    assert 1 > top["probabilities"][0][0] > top["probabilities"][0][1] > 0
    assert [element.split(":")[1:] for element in classes["outputs"][0]["data"]] == [["0", "cat"], ["2", "horse"]]
