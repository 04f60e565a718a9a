"""docs/architecture.md, compared with the files of the packages."""

import re

from tests.acceptance.docs.executable_pages import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGES = ("adapters", "app", "client/loraplex")


def _section(heading: str) -> str:
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_the_page_lists_every_folder_of_the_packages() -> None:
    folders = {
        module.parent.relative_to(ROOT).as_posix() for name in PACKAGES for module in (ROOT / name).rglob("__init__.py")
    }
    listed = [
        name
        for row in re.findall(r"^\| (`.*?) \|", _section("Packages"), re.M)
        for name in re.findall(r"`(.+?)/`", row)
    ]
    assert len(listed) == len(set(listed))
    assert {folder for folder in folders if "migrations" not in folder} == set(listed)


def test_the_spine_is_twelve_files_that_exist() -> None:
    rows = re.findall(r"^\| \d+ \| \[(.+?)\]\(\.\./(.+?)\) \|", _section("The spine"), re.M)
    assert len(rows) == 12
    assert all(name == target and (ROOT / target).is_file() for name, target in rows)


def test_the_diagrams_name_modules_that_exist() -> None:
    diagrams = "".join(re.findall(r"```mermaid\n(.*?)```", PAGE, re.DOTALL))
    modules = {
        path.relative_to(ROOT).with_suffix("").as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")
    }
    named = set(re.findall(r"\b((?:[a-z]+/)+[a-z_]+)\b", diagrams))
    assert len(named) > 10
    missing = {name for name in named if not any(f"/{module}".endswith(f"/{name}") for module in modules)}
    assert missing <= {"http/schemas"}  # a folder
