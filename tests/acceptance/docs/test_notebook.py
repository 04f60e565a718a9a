"""The notebook runs from the first cell to the last, and its outputs are those that are in it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.docs.executable_pages import ROOT, check_output
from tests.support.service import environment

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT / "notebooks" / "lora_from_scratch.ipynb"


def _cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def _printed(cell: dict[str, Any]) -> str:
    outputs = cell["outputs"]
    assert {(output["output_type"], output["name"]) for output in outputs} <= {("stream", "stdout")}, outputs
    return "".join("".join(output["text"]) for output in outputs)


@pytest.mark.timeout(240)
def test_the_notebook_runs_and_prints_what_is_in_it(tmp_path: Path) -> None:
    executed = tmp_path / "executed.ipynb"
    jupyter = str(Path(sys.executable).with_name("jupyter-execute"))
    # Its kernel is talked to through files, not through ports. PEFT must not ask the network for anything.
    command = [jupyter, str(NOTEBOOK), "--output", str(executed.with_suffix("")), "--KernelManager.transport=ipc"]
    env = environment() | {"HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(_cells(executed), _cells(NOTEBOOK), strict=True):
        check_output(_printed(ours), _printed(theirs))


def test_nothing_of_the_machine_is_kept_in_it() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert not any(cell["metadata"] for cell in notebook["cells"])
    assert [cell["execution_count"] for cell in _cells(NOTEBOOK)] == list(range(1, len(_cells(NOTEBOOK)) + 1))
