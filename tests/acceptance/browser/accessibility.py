"""What axe-core finds on a page."""

from collections.abc import Sequence

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

_AXE = Axe()


def axe(page: Page, *, without: Sequence[str] = ()) -> None:
    """Fails with what axe-core's rules find on the page as it is now, each with its place and what to do.

    `without` names rules that others' code on the page cannot keep. The script is evaluated by the debugger's protocol,
    which no content security policy stands in the way of.
    """
    found = _AXE.run(
        page, options={"resultTypes": ["violations"], "rules": {rule: {"enabled": False} for rule in without}}
    )
    assert not found.violations_count, f"{page.url}: {found.generate_report()}"


def axe_contrast(page: Page) -> None:
    """Fail with what is hard to read on the page: the only rule that depends on its colours."""
    found = _AXE.run(page, options={"resultTypes": ["violations"], "runOnly": ["color-contrast"]})
    assert not found.violations_count, f"{page.url}: {found.generate_report()}"
