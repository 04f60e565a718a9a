"""What `import loraplex` brings, and what it leaves until it is asked for."""

import subprocess
import sys

import loraplex
import pytest


def loaded_after(code: str) -> set[str]:
    """The top packages that a fresh Python has loaded once it has run this."""
    code += "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("package", ["loraplex", "loraplex.cli"])
def test_a_client_brings_what_it_needs_when_it_is_asked_for(package: str) -> None:
    slow = {"httpx", "numpy", "rich"}
    assert not slow & loaded_after(f"import {package}")
    assert {"httpx", "numpy"} <= loaded_after(f"import {package}\nfrom loraplex import Client")


def test_every_public_name_is_there_and_is_listed() -> None:
    everything: dict[str, object] = {}
    exec("from loraplex import *", everything)
    assert set(loraplex.__all__) <= set(dir(loraplex)) & set(everything)
    with pytest.raises(AttributeError, match="has no attribute 'Clients'"):
        loraplex.Clients  # type: ignore[attr-defined]  # noqa: B018  # there is none, and type checkers say so
