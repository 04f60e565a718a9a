"""What product code may not contain: unpickling, and assertions that `python -O` would remove although they matter."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MODULES = sorted(path for folder in ("adapters", "app", "client/loraplex") for path in (ROOT / folder).rglob("*.py"))
UNPICKLING_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNPICKLING_CALLS = {"torch.load", "pd.read_pickle", "yaml.load", "torch.jit.load", "torch.hub.load"}


Nodes = list[tuple[Path, ast.AST]]


@pytest.fixture(scope="module")
def nodes() -> Nodes:
    """All nodes of the modules that the tests look at, which are those of calls, their arguments, and statements."""
    kinds = (ast.Assert, ast.Call, ast.Import, ast.ImportFrom, ast.keyword)
    return [
        (path.relative_to(ROOT), node)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds)
    ]


def test_no_module_imports_or_calls_what_unpickles(nodes: Nodes) -> None:
    found = []
    for path, node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [(path, name) for name in names if name.partition(".")[0] in UNPICKLING_MODULES]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in UNPICKLING_CALLS:
            found.append((path, ast.unparse(node)))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += [] if ast.unparse(node.value) == "False" else [(path, "allow_pickle")]
    assert not found


def test_numpy_reads_files_only_without_pickle(nodes: Nodes) -> None:
    calls = [(path, ast.unparse(node)) for path, node in nodes if isinstance(node, ast.Call)
             and ast.unparse(node.func) in ("np.load", "numpy.load")]  # fmt: skip
    assert calls
    assert all("allow_pickle=False" in call for _, call in calls)


_NARROWS = re.compile(r"[\w.]+ is not None|isinstance\([\w.]+, \w+\)")


def test_an_assertion_only_tells_the_type_checker_what_holds(nodes: Nodes) -> None:
    asserted = [(path, ast.unparse(node.test)) for path, node in nodes if isinstance(node, ast.Assert)]
    assert asserted
    assert not [found for found in asserted if not _NARROWS.fullmatch(found[1])]


@pytest.mark.parametrize("condition", ["x.dtype is y", "a is not None and b", "len(x) == 1", "f(x) is not None"])
def test_other_conditions_are_found(condition: str) -> None:
    assert not _NARROWS.fullmatch(condition)
