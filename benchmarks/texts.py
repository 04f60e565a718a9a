"""Texts of 20 classes, encoded: paragraphs of the docstrings of installed packages; the package is the class."""

# N texts · I embedding width
import ast
import random
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.processes import ROOT

# `requirements.lock` and `benchmarks/requirements.lock` pin them, so that the texts are the same everywhere.
PACKAGES = (
    *("cleanlab", "fontTools", "google", "huggingface_hub", "matplotlib", "mpmath", "networkx", "numba", "numpy"),
    *("pandas", "peft", "pydantic", "ray", "scipy", "setuptools", "sklearn", "sqlalchemy", "sympy", "torch"),
    "transformers",
)
CACHE = ROOT / "build" / "benchmarks" / "texts.npz"
_MOST_OF_A_CLASS = 800
_LENGTHS = range(60, 401)


def encoded_texts() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return (N, I) embeddings of length 1 and (N,) classes, in random order; `build/` keeps them."""
    if not CACHE.exists():
        texts = [(text, code) for code, package in enumerate(PACKAGES) for text in _paragraphs(package)]
        random.Random(0).shuffle(texts)
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        np.savez(CACHE, x=_encode([text for text, _ in texts]), y=[code for _, code in texts])
    with np.load(CACHE) as stored:
        return stored["x"], stored["y"]


def describe() -> str:
    """Return the encoder, and the number of texts."""
    return f"wordllama {version('wordllama')}, {len(encoded_texts()[1]):,} paragraphs"


def _encode(texts: list[str]) -> NDArray[np.float32]:
    # Only here: the cache can be read without the encoder.
    import wordllama

    folder = Path(wordllama.__file__).parent
    encoder = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
    return np.asarray(encoder.embed(texts, norm=True), dtype=np.float32)


def _paragraphs(package: str) -> list[str]:
    """Return distinct paragraphs of a package's docstrings, from its files in random order until there are enough."""
    spec = find_spec(package)
    assert spec is not None
    found: dict[str, None] = {}
    files = [path for folder in spec.submodule_search_locations or () for path in sorted(Path(folder).rglob("*.py"))]
    random.Random(package).shuffle(files)
    for path in files:
        if "test" not in path.stem:
            found |= dict.fromkeys(_prose(path))
        if len(found) >= _MOST_OF_A_CLASS:
            break
    return list(found)[:_MOST_OF_A_CLASS]


def _prose(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(path.read_text(errors="replace"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                text = " ".join(paragraph.split())
                if len(text) in _LENGTHS and ">>>" not in text and "----" not in text:
                    yield text
