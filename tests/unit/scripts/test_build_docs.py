"""The documentation site is built from the README, docs/ and the files that they link to."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import build_docs

CONFIGURATION = """\
site_name: test
docs_dir: build/docs
site_dir: build/site
theme: mkdocs
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build_docs, "ROOT", tmp_path)
    monkeypatch.setattr(build_docs, "SOURCE", tmp_path / "build" / "docs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "properdocs.yml").write_text(CONFIGURATION)
    (tmp_path / "docs" / "page.md").write_text("# Page\n\n[code](../code.py) ![chart](chart.svg)\n")
    (tmp_path / "docs" / "chart.svg").write_text("<svg/>")
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "unlinked.md").write_text("# Not linked\n")
    return tmp_path


def test_the_site_has_the_files_that_its_pages_link_to(root: Path) -> None:
    (root / "README.md").write_text("# Readme\n\n[page](docs/page.md#page) [site](https://example.com)\n")
    names = {file.relative_to(root).as_posix() for file in build_docs.site_files()}
    assert names == {"README.md", "docs/page.md", "docs/chart.svg", "code.py"}
    assert build_docs.main() == 0
    assert (root / "build" / "site" / "docs" / "page" / "index.html").is_file()


@pytest.mark.parametrize("target", ["docs/missing.md", "missing.svg"])
def test_a_link_to_a_missing_file_fails_the_build(root: Path, target: str) -> None:
    (root / "README.md").write_text(f"# Readme\n\n[missing]({target})\n")
    assert build_docs.main() == 1


def test_a_link_in_a_fenced_block_is_no_link(root: Path) -> None:
    (root / "README.md").write_text("# Readme\n\n```text\n[code](code.py)\n```\n")
    assert root / "code.py" not in build_docs.linked_files(root / "README.md")


def test_two_diagrams_of_a_page_have_different_ids() -> None:
    page = SimpleNamespace()
    first, second = (build_docs.mermaid_fence("flowchart LR\n  a --> b", "mermaid", "", {}, page) for _ in range(2))
    assert 'id="diagram-1"' in first
    assert 'id="diagram-2"' in second
    with pytest.raises(RuntimeError, match="Parse error"):
        build_docs.mermaid_fence("flowchart LR\n  a -->", "mermaid", "", {}, page)
