"""The tutorial, the how-tos and the maths run as written, block by block, and print what their pages show.

Their services run in the process of the tests, with the settings that the commands give them: a start takes six seconds
of a core. Only that of the README is started by its command.
"""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.acceptance.docs.executable_pages import ROOT, blocks
from tests.acceptance.docs.terminal_sessions import Reader

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs"
TUTORIAL = DOCS / "tutorial.md"
PROXY = DOCS / "how-to" / "behind-a-proxy.md"
"""It wants nginx, a certificate and a host name: test_proxy.py."""
MACHINES = DOCS / "how-to" / "more-than-one-machine.md"
"""It wants PostgreSQL, a bucket and HAProxy: test_more_than_one_machine.py."""
MOVE = DOCS / "how-to" / "move-to-postgresql-and-s3.md"
"""Its commands name servers that do not exist: tests/acceptance/test_move.py runs them on others."""
PAGES = [
    page
    for page in [
        TUTORIAL,
        DOCS / "adapter-format.md",
        DOCS / "reference" / "domain.md",
        *sorted((DOCS / "how-to").glob("*.md")),
        *sorted((DOCS / "explanation").glob("*.md")),
    ]
    if page not in (PROXY, MACHINES) and blocks(page.read_text())
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.timeout(240)
def test_a_page_runs_as_written_and_prints_what_it_shows(page: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        Reader(tmp_path, stack, starts_processes=False).follow(blocks(page.read_text()))


def test_no_how_to_is_left_out() -> None:
    assert {*(DOCS / "how-to").glob("*.md"), TUTORIAL} - {PROXY, MACHINES, MOVE} <= set(PAGES)
