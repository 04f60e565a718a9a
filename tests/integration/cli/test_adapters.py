"""`adapters`, `adapter`, `upload`, `download`, `rollback`, `delete`."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Serve
from tests.integration.cli.conftest import Ended, Run, invoke
from tests.support.service import ServiceProcess

Ask = Callable[..., Any]
_COUNT = itertools.count(1)


@pytest.fixture
def kept(service: ServiceProcess) -> Iterator[str]:
    """An adapter of three versions, the last of them live; of a name of its own, as a deleted one goes on counting."""
    name = f"kept-{next(_COUNT)}"
    for value in (1, 2, 3):
        body = {"A": [[value]] * 10, "B": [[1] * 64]}
        service.client.put(f"/adapters/{name}", json=body).raise_for_status()
    yield name
    service.client.delete(f"/adapters/{name}")


def test_the_list_has_what_begins_so(run: Run, ask: Ask, kept: str, trained: Ended) -> None:
    names = [found["name"] for found in ask("adapters")]
    assert {"acme", kept} <= set(names)
    assert names == sorted(names)
    assert [found["name"] for found in ask("adapters", "ke")] == [kept]
    head, _, row = run("adapters", "ac").stdout.splitlines()
    assert head.split() == ["name", "live", "versions", "rank", "how", "good", "made"]
    assert row.startswith("acme ")
    assert " @" in row
    assert "accuracy 0." in row
    assert "loraplex train FILE" in run("adapters", "no-such").stdout


def test_an_adapter_shows_its_versions_newest_first(run: Run, ask: Ask, kept: str) -> None:
    found = ask("adapter", kept)
    assert [version["version"] for version in found["versions"]] == [3, 2, 1]
    assert found["adapter"]["live"]["version"] == 3
    text = run("adapter", kept).stdout
    assert "3 (live)" in text
    assert "upload" in text


def test_a_roll_back_without_a_version_goes_to_the_one_before(run: Run, ask: Ask, kept: str) -> None:
    assert run("rollback", kept).stdout == f"{kept}@2 is live (before: 3)\n"
    assert ask("rollback", kept)["aliases"] == {"live": 1}
    assert "there is none before it" in run("rollback", kept, status=1).stderr
    assert run("rollback", kept, 3).stdout == f"{kept}@3 is live (before: 1)\n"
    assert "99" in run("rollback", kept, 99, status=1).stderr


def test_what_is_downloaded_can_be_uploaded_again(run: Run, ask: Ask, kept: str, tmp_path: Path) -> None:
    assert run("download", kept, tmp_path / "here", "--version", 2).stdout == f"{kept} is in {tmp_path / 'here'}\n"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (tmp_path / "here").iterdir()}
    again = ask("upload", "again", tmp_path / "here")
    assert again["digest"] == ask("adapter", kept)["versions"][1]["digest"]
    assert "again@1 is live (rank 1" in run("upload", "again", tmp_path / "here").stdout
    assert "cannot be read: No such file" in run("upload", "again", tmp_path / "nowhere", status=1).stderr
    run("delete", "again", "--yes")


def test_nothing_is_deleted_unless_somebody_says_yes(run: Run, ask: Ask, kept: str) -> None:
    assert "add --yes" in run("delete", kept, status=2).stderr
    assert ask("adapter", kept)["adapter"]["name"] == kept
    assert ask("delete", kept, "--yes") == {"deleted": kept}
    ended = run("delete", kept, "--yes", status=1)
    assert ended.stderr == f"loraplex: there is no adapter '{kept}'\n`loraplex adapters` lists the existing ones.\n"


def test_an_error_for_machines_is_a_problem(run: Run) -> None:
    ended = run("adapter", "nobody", "--json", status=1)
    assert ended.stdout == ""
    problem = json.loads(ended.stderr)
    assert problem["code"] == "adapter_not_found"
    assert problem["status"] == 404
    assert problem["type"] == "urn:loraplex:adapter_not_found"


def test_an_adapter_that_was_made_for_another_base_layer_is_marked(serve: Serve) -> None:
    factors = {"A": [[1.0], [2.0]], "B": [[1.0] * 10]}
    serve(base="random:10,2,42")[0].put("/adapters/old", json=factors).raise_for_status()
    client, _ = serve(base="random:10,2,43")
    client.put("/adapters/own", json=factors).raise_for_status()

    def run(*arguments: str) -> str:
        ended = invoke(*arguments, url=str(client.base_url).rstrip("/"))
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    head, _, old, own = run("adapters").splitlines()
    assert "problem" in head.split()
    assert ("base_mismatch" in old, "base_mismatch" in own) == (True, False)
    assert [(one["name"], one["problem"]) for one in json.loads(run("adapters", "--json"))] == [
        ("old", "base_mismatch"),
        ("own", None),
    ]
    assert "base_mismatch" in run("adapter", "old")
    assert "problem" not in run("adapter", "own") + run("adapters", "ow")
