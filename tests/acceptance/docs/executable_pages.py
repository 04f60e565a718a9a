"""Pages that run: their blocks in order, and what stands below each as its output."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ADDRESS = "127.0.0.1:8000"
"""Where pages find the service."""
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
_RUN = {"bash", "python"}
_OUTPUT = "text"
_NUMBER = r"-?\d+\.\d+(?:e[+-]?\d+)?"
_NEAR = 0.03
"""How far a number with a fraction may be from the page's, relatively or, below 1, absolutely: another processor rounds
otherwise. Whole numbers and words may not."""


@dataclass(frozen=True, slots=True)
class Block:
    """Code that a page tells its reader to run, and what the page shows below it: nothing where nothing is printed."""

    language: str
    code: str
    output: str

    @property
    def is_service(self) -> bool:
        """Whether it starts the service, which stays in the foreground of a terminal of its own."""
        return self.language == "bash" and re.match(r"(\w+=\S+ )*(\.venv/bin/)?loraplex serve\b", self.code) is not None


def blocks(text: str) -> list[Block]:
    """The blocks of bash and Python in a page's text, in order, each with the block of text that follows it."""
    found = [(match[1], match[2]) for match in _FENCE.finditer(text)]
    after = [*found, ("", "")][1:]
    return [
        Block(language, code, following if kind == _OUTPUT else "")
        for (language, code), (kind, following) in zip(found, after, strict=True)
        if language in _RUN
    ]


def check_output(printed: str, said: str) -> None:
    """What was printed is what a page says: `…` is anything on a line, or, alone on one, any lines.

    How wide a table's columns are is not looked at: it depends on the digits in them.
    """
    clean = _narrow(printed)
    found = re.fullmatch("".join(map(_as_pattern, _narrow(said).splitlines())), clean)
    assert found is not None, f"printed:\n{clean}\nsaid:\n{said}"
    for one, other in zip(found.groups(), re.findall(_NUMBER, said), strict=True):
        assert float(one) == pytest.approx(float(other), rel=_NEAR, abs=_NEAR), f"{one}, not {other}, in:\n{clean}"


def _narrow(text: str) -> str:
    lines = (re.sub("─+", "─", re.sub(" +", " ", line.strip())) for line in text.strip().splitlines())
    return "".join(f"{line}\n" for line in lines)


def _as_pattern(line: str) -> str:
    if line == "…":
        return r"(?:.*\n)*?"
    parts = re.split(f"({_NUMBER}|…)", line)
    return "".join(_part(part) for part in parts) + r"\n"


def _part(part: str) -> str:
    if part == "…":
        return ".*?"
    return f"({_NUMBER})" if re.fullmatch(_NUMBER, part) else re.escape(part)
