"""Build the documentation site into build/site: `python -m scripts.build_docs`.

The site has the README, the pages of docs/, and every file of the repository that they link to. These files are copied
to build/docs with their paths unchanged, so that one relative link works on the site and in a browser of the
repository. ProperDocs then builds the site in strict mode: a link to a missing page, file or heading fails the build.
"""

import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import mermaidx

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "build" / "docs"
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#\s]+)|\b(?:src|srcset|href)=\"([^\"#]+)\"")


def linked_files(page: Path) -> list[Path]:
    """Return the existing files of the repository that a Markdown page links to."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = (link or attribute for link, attribute in _LINK.findall(text))
    files = ((page.parent / target).resolve() for target in targets if "://" not in target)
    return [file for file in files if file.is_file() and file.is_relative_to(ROOT)]


def site_files() -> set[Path]:
    """Return the README, the pages of docs/, and all files that can be reached from them by links."""
    reached: set[Path] = set()
    queue = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.css")]
    while queue:
        file = queue.pop()
        if file in reached:
            continue
        reached.add(file)
        if file.suffix == ".md":
            queue += linked_files(file)
    return reached


def copy_source() -> None:
    """Copy the files of the site to build/docs, which is emptied first."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    for file in site_files():
        copy = SOURCE / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)


def mermaid_fence(source: str, _language: str, _class: str, _options: dict[str, Any], md: Any, **_: Any) -> str:
    """Return the SVG of a fenced Mermaid diagram, for pymdownx.superfences.

    Raises:
        RuntimeError: Mermaid cannot parse the diagram.
    """
    # Mermaid gives every diagram the same id, and the rules of its style sheet begin with it.
    md.diagrams = getattr(md, "diagrams", 0) + 1
    svg = mermaidx.render(source).svg().replace("my-svg", f"diagram-{md.diagrams}")
    return f'<div class="diagram" role="img" aria-label="{escape(source.splitlines()[0])}">{svg}</div>'


def main() -> int:
    """Build the site and return the exit status, 1 if a link is broken."""
    copy_source()
    command = [sys.executable, "-m", "properdocs", "build", "--strict"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
