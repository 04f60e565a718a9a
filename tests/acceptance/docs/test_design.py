"""The rooms of docs/design.md, held against the files that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ROOMS = (ROOT / "docs" / "design.md").read_text().partition("## Rooms\n")[2].partition("\n## ")[0]
FOLDERS = ("adapters", "adapters/training", "app", "client/loraplex", "client/loraplex/cli")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_of_a_folder_has_one_room_and_no_room_is_empty(folder: str) -> None:
    section = re.search(rf"^`{folder}/`(.*?)(?=^`|\Z)", ROOMS, re.M | re.S)
    assert section is not None
    named = [name for row in re.findall(r"^\| (`.*?) \|", section[1], re.M) for name in re.findall(r"`(.+?)`", row)]
    here = ROOT / folder
    assert [name for name in named if not (here / name).exists()] == []
    files = {each.name for each in here.glob("*.py")} | {f"{each.parent.name}/" for each in here.glob("*/__init__.py")}
    assert files - {"__init__.py"} - set(named) == set()
    assert len(named) == len(set(named))
