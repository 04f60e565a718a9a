"""Words that the style guide bans do not appear in the documents."""

import re
from pathlib import Path

import pytest

from tests.acceptance.docs.executable_pages import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    ROOT / "client" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *(ROOT / "docs").rglob("*.md"),
]
BANNED = (
    r"crowd|door|house|trick|rooms?",  # metaphors
    r"nobody|somebody|everybody|whoever",  # instead of the person or program that acts
    r"(?:is|are|be) told|knows?|wants?",  # personification
    r"comes? to|goes on|gone on|at hand|for good",  # idioms
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_has_no_banned_words(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`|<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    found = re.findall(rf"\b(?:{'|'.join(BANNED)})\b", text, re.IGNORECASE)
    assert found == []
