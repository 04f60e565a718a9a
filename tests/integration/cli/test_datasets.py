"""`dataset put`, `list`, `show`, `preview`, `delete`."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.integration.cli.conftest import Run
from tests.support.service import ServiceProcess

Ask = Callable[..., Any]
PEOPLE = "age,height,class\n31,1.71,a\n,1.80,b\nold,1.65,a\n40,1.77,b\n28,1.62,a\n"


@pytest.fixture
def people(run: Run, tmp_path: Path) -> Iterator[Path]:
    """A small data set with holes."""
    file = tmp_path / "people.csv"
    file.write_text(PEOPLE)
    run("dataset", "put", file)
    yield file
    run("dataset", "delete", "people", "--yes")


def test_an_upload_says_what_was_found(run: Run, people: Path) -> None:
    said = run("dataset", "put", people).stderr.splitlines()
    assert re.match(r"data set: people@\d+, 5 rows, 3 columns", said[0])
    assert "  row 2, column age: not a number: old" in said


def test_it_may_be_called_something_else(run: Run, ask: Ask, people: Path) -> None:
    assert ask("dataset", "put", people, "--name", "others")["dataset"] == "others"
    assert [found["name"] for found in ask("dataset", "list")].count("others") == 1
    assert ask("dataset", "delete", "others", "--yes") == {"deleted": "others"}
    assert "`loraplex dataset list`" in run("dataset", "show", "others", status=1).stderr


def test_its_columns_and_bad_rows_are_shown(run: Run, ask: Ask, people: Path) -> None:
    text = run("dataset", "show", "people").stdout
    assert "Rows that cannot be trained on" in text
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("height")] == [["height", "float64"]]
    found = ask("dataset", "show", "people")
    assert found["columns"][0]["nulls"] == 2
    assert ask("dataset", "show", f"people@{found['version']}") == found
    assert "name@3" in run("dataset", "show", "people@first", status=2).stderr


def test_some_of_its_rows_are_shown(run: Run, ask: Ask, people: Path) -> None:
    assert [row["class"] for row in ask("dataset", "preview", "people", "--offset", 3)["rows"]] == ["b", "a"]
    head, _, *rows = run("dataset", "preview", "people", "--limit", 2).stdout.splitlines()
    assert head.split() == ["row", "age", "height", "class"]
    assert rows[1].split() == ["1", "–", "1.8", "b"]
    run("dataset", "preview", "people", "--limit", 1000, status=2)


def test_nothing_is_deleted_unless_somebody_says_yes(run: Run, ask: Ask, people: Path) -> None:
    assert "add --yes" in run("dataset", "delete", "people", status=2).stderr
    assert ask("dataset", "show", "people")["rows"] == 5


def test_a_list_is_as_the_api_has_it(ask: Ask, people: Path, service: ServiceProcess) -> None:
    assert ask("dataset", "list") == service.client.get("/datasets").json()["data"]


def test_arrow_comes_as_a_stream_and_an_arrow_file_is_told_apart(run: Run, ask: Ask, tmp_path: Path) -> None:
    table = pa.table({"a": [1.0, 2.0]})
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    assert ask("dataset", "put", tmp_path / "stream.arrow")["rows"] == 2
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    said = run("dataset", "put", tmp_path / "file.arrow", status=1).stderr
    assert "is an Arrow file, and the service reads Arrow streams" in said
    run("dataset", "delete", "stream", "--yes")
