"""The table of errors says what the code says."""

import re
from pathlib import Path

from adapters.errors import LoraplexError
from app.http.errors import JOB_CODES, STATUS

PAGE = (Path(__file__).parents[3] / "docs" / "errors.md").read_text()


def _all(kind: type[LoraplexError] = LoraplexError) -> dict[str, type[LoraplexError]]:
    found = {kind.code: kind}
    for child in kind.__subclasses__():
        found |= _all(child)
    return found


def test_every_error_has_a_code_of_its_own() -> None:
    def count(kind: type[LoraplexError]) -> int:
        return 1 + sum(count(child) for child in kind.__subclasses__())

    assert count(LoraplexError) == len(_all())


def test_every_error_has_a_status_or_is_a_job_s() -> None:
    assert set(_all()) == set(STATUS) | JOB_CODES
    assert not set(STATUS) & JOB_CODES


def test_the_page_lists_every_code_with_its_status_and_title() -> None:
    listed = {code: (int(status), title) for code, status, title in re.findall(r"\| `(\w+)` \| (\d+) \| (.+) \|", PAGE)}
    titles = {code: kind.title() for code, kind in _all().items()}
    assert listed == {code: (status, titles[code]) for code, status in STATUS.items()}


def test_the_page_lists_what_a_job_can_end_in() -> None:
    listed = dict(re.findall(r"\| `(\w+)` \| ([A-Z].+) \|", PAGE))
    assert set(listed) == JOB_CODES
