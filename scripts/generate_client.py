"""Generate the blocking client, client/loraplex/client.py, from the asynchronous one.

`--check` writes nothing, and fails if the file is not up to date.
"""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "client" / "loraplex"
SOURCE, TARGET = FOLDER / "async_client.py", FOLDER / "client.py"
DOCSTRING = '''"""Blocking client and job.

Generated from `async_client.py` by `scripts/generate_client.py`: do not edit.
"""
'''
REPLACEMENTS = {
    r"\bawait ": "",
    r"\basync (def|for|with)\b": r"\1",
    r"\b__a(enter|exit)__\b": r"__\1__",
    r"\bAsync(Client|Driver|Job|Iterator|BaseTransport)\b": r"\1",
    r"\basync_driver\b": "driver",
    r"Tasks of one event loop": "Threads",
    r"# ruff: noqa: ASYNC109.*\n\n": "",
}


def generate() -> str:
    """Return the source of the blocking client."""
    text = re.sub(r'\A""".*?"""\n', lambda _: DOCSTRING, SOURCE.read_text(), flags=re.DOTALL)
    for pattern, replacement in REPLACEMENTS.items():
        text = re.sub(pattern, replacement, text)
    # The names are shorter, so that imports sort and lines wrap differently.
    for command in (["check", "--quiet", "--select", "I", "--fix"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(TARGET), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


def main() -> None:
    """Write the file, or compare it."""
    text = generate()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text)
    elif text != TARGET.read_text():
        sys.exit(f"{TARGET.name} is not up to date: run python -m scripts.generate_client")


if __name__ == "__main__":
    main()
