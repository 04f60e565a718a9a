"""`loraplex base`: what it shows, and the files that it makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tests.integration.cli.conftest import Run, invoke
from tests.support.service import ServiceProcess

COEF, INTERCEPT = np.arange(6.0).reshape(2, 3), np.array([0.5, -0.5])


def test_base_alone_shows_the_base_layer(run: Run, ask: Callable[..., Any]) -> None:
    assert run("base").stdout == run("base", "show").stdout
    assert "digits" in run("base").stdout
    assert ask("base")["out_features"] == ask("base", "show")["out_features"] == 10
    assert "make" in run("base", "--help").stdout


@pytest.mark.parametrize(
    ("labels", "stored"), [("cat,dog", '["cat", "dog"]'), ("-1,1", "[-1, 1]"), ("labels.json", '["a,b", "c"]')]
)
def test_make_writes_a_file_that_the_service_starts_with(run: Run, tmp_path: Path, labels: str, stored: str) -> None:
    np.savez(tmp_path / "head.npz", coef=COEF.T, intercept=INTERCEPT)
    np.savez(tmp_path / "rows.npz", inputs=np.eye(3), outputs=COEF.T + INTERCEPT)
    (tmp_path / "labels.json").write_text('["a,b", "c"]')
    options = ("--weight", "coef", "--bias", "intercept", "--transpose", "--labels", labels, "--check", "rows.npz")
    said = run("base", "make", "head.npz", "base.safetensors", *options, cwd=tmp_path)
    assert said.stdout.startswith("base.safetensors: 3 numbers in, 2 out.")
    with safe_open(tmp_path / "base.safetensors", framework="np") as file:
        assert file.metadata() == {"labels": stored}
        np.testing.assert_array_equal(file.get_tensor("weight"), COEF)
    if labels == "cat,dog":
        with ServiceProcess(tmp_path / "data", base=str(tmp_path / "base.safetensors"), trainers=0) as service:
            shown = invoke("base", url=str(service.client.base_url)).stdout
            assert "cat, dog" in shown
            assert service.client.get("/base").json()["labels"] == ["cat", "dog"]


def test_make_says_what_is_wrong_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "head.npz", weight=COEF)
    np.savez(tmp_path / "rows.npz", inputs=np.eye(3), outputs=COEF.T + 1)
    (tmp_path / "object.json").write_text("{}")
    for options, status, words in (
        (("--check", "rows.npz"), 1, "row 0, output 0"),
        (("--weight", "coef"), 1, "has no array 'coef'; it has: weight"),
        (("--labels", "a,a"), 1, "a label occurs twice"),
        (("--labels", "object.json"), 2, "must hold a list of labels"),
    ):
        said = run("base", "make", "head.npz", "base.safetensors", *options, status=status, cwd=tmp_path)
        assert words in said.stderr
    assert not (tmp_path / "base.safetensors").exists()
