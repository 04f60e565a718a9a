"""The README does what it says."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from app.settings import PREFIX, Settings, description_of
from tests.acceptance.docs.executable_pages import ROOT, blocks
from tests.acceptance.docs.terminal_sessions import Reader

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """Somebody who has cloned the project and has said `make serve`."""
    with ExitStack() as stack:
        reader = Reader(tmp_path, stack)
        reader.serve("loraplex serve")
        yield reader


def test_the_quick_start_and_the_client_run_as_written(reader: Reader) -> None:
    reader.follow(blocks(README))


def test_a_prediction_takes_five_commands_at_most() -> None:
    section = README.partition("\n## Install\n")[2].partition("\n## Complete example\n")[0]
    typed = re.findall(r"^    (?!\s)(.+)$", section, re.MULTILINE)
    for block in blocks(section):
        typed += block.code.splitlines()
    assert [line.split()[0] for line in typed[:2]] == ["git", "make"]
    assert " predict " in typed[-1]
    assert len(typed) <= 5


def test_make_serve_is_what_the_quick_start_was_run_on() -> None:
    (recipe,) = re.findall(r"^serve:.*\n\t@(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe == "$(BIN)/loraplex serve"


def test_the_settings_table_is_the_settings() -> None:
    def shown(value: object) -> str:
        return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    expected = {
        f"{PREFIX}{name.upper()}": (shown(field.default), description_of(name))
        for name, field in Settings.model_fields.items()
    }
    page = (ROOT / "docs" / "settings.md").read_text()
    listed = {name: (default, text) for name, default, text in re.findall(r"\| `(\w+)` \| (\S+) \| (.+) \|", page)}
    assert listed == expected


def test_compose_passes_every_setting_on() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    passed = set(re.findall(r"^    LORAPLEX_(\w+):", compose, re.MULTILINE))
    set_by_the_image_or_command = {"DATA_DIR", "PORT", "TRAINERS"}
    assert passed == {name.upper() for name in Settings.model_fields} - set_by_the_image_or_command


def _anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)) for heading in headings)
    return {each.strip().lower().replace(" ", "-") for each in words}


def test_every_page_and_heading_that_a_page_links_to_exists() -> None:
    for page in [ROOT / "README.md", ROOT / "client" / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name} links to {target}"
            if heading:
                assert heading in _anchors(linked), f"{page.name} links to {target}#{heading}"


def test_the_pictures_are_there() -> None:
    shown = re.findall(r'src(?:set)?="(.*?)"', README)
    assert shown
    assert all((ROOT / picture).exists() for picture in shown)


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    listed = set(re.findall(r"\]\(([^)#]+)\)", index))
    assert {page for page in pages if not page.startswith("decisions/")} - listed == {"README.md"}
