"""Results as DataFrames and as tables in notebooks, and DataFrames in place of rows."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from loraplex import AsyncClient, Client, InvalidCombination, InvalidInput, WrongType, to_pandas, to_polars

from tests.integration.client.conftest import Connect, Start

RNG = np.random.default_rng(3)
X = RNG.normal(size=(40, 3)).astype(np.float32)
KINDS = np.array(["a", "b"])[(X[:, 0] > 0).astype(int)]
NAMES = ["x", "y", "z"]
BASE = "zeros:3,2"
BRIEF = {"method": "adamw", "loss": "cross_entropy", "epochs": 1}
TABLE: dict[str, Any] = {name: X[:, column] for column, name in enumerate(NAMES)} | {"kind": KINDS}


class _Cells(HTMLParser):
    """Texts of the cells of a table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:  # noqa: ARG002  # the parser gives them
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def connect() -> Iterator[Connect]:
    """The blocking client alone: what it gives are values, the same for both."""
    with ExitStack() as stack:
        yield lambda url, **arguments: stack.enter_context(Client(url, **arguments))


@pytest.fixture
def client(start: Start) -> Any:
    client = start(base=BASE)
    factors = {"A": np.ones((2, 1)), "B": np.ones((1, 3))}
    client.upload("acme", **factors, labels=["<b>cat</b>", "dog"])
    client.upload("acme", **factors | {"B": np.zeros((1, 3))})
    client.upload("zoo", **factors, labels=[7, 8])
    return client


@pytest.mark.parametrize("frames", [to_pandas, to_polars])
def test_a_list_of_results_is_a_data_frame(client: Any, frames: Any) -> None:
    frame = frames(list(client.adapters()))
    assert frame["name"].to_list() == ["acme", "zoo"]
    assert frame["live.version"].to_list() == [2, 1]
    assert frame["live.effect.relative_norm"].to_list() == [None, None]
    times = frame["created_at"]
    years = times.dt.year if frames is to_pandas else times.dt.year()
    assert years.to_list() == [pd.Timestamp.now(tz="UTC").year] * 2
    versions = frames(client.versions("acme"))
    assert versions["version"].to_list() == [2, 1]
    assert [labels is None for labels in versions["labels"].to_list()] == [True, False]
    one = frames(client.adapter("zoo"))
    assert (len(one), one["live.rank"].to_list()) == (1, [1])


def test_a_list_of_the_asynchronous_client_is_a_data_frame_that_is_awaited(client: Any) -> None:
    async def names() -> list[list[str]]:
        async with AsyncClient(client.url) as other:
            frames = [await other.adapters().to_pandas(), await other.adapters().to_polars()]
        return [frame["name"].to_list() for frame in frames]

    assert asyncio.run(names()) == [["acme", "zoo"]] * 2


def test_jobs_and_their_adapters_are_data_frames(client: Any) -> None:
    job = client.train("fleet-{group}", rank=1, inputs=X, targets=X[:, :2], groups=KINDS, training={"method": "sgd"})
    frame = job.to_pandas()
    assert frame.loc[0, ["id", "status", "spec.training.method"]].to_list() == [job.id, "queued", "sgd"]
    assert "client" not in frame
    assert "history" not in frame
    assert to_pandas(list(client.jobs()))["id"].to_list() == [job.id]
    adapters = to_polars(list(client.job_adapters(job.id)))
    assert adapters["name"].to_list() == ["fleet-a", "fleet-b"]
    assert adapters["rows"].sum() == len(X)
    assert job.id in _Cells(job._repr_html_()).texts


def test_predictions_keep_the_index_of_the_rows(client: Any) -> None:
    rows = pd.DataFrame(X, columns=NAMES, index=[f"row {row}" for row in range(len(X))])
    prediction = client.predict("acme@1", rows[10:12])
    frame = prediction.to_pandas()
    assert (list(frame.index), list(frame.columns)) == (["row 10", "row 11"], ["output_0", "output_1"])
    np.testing.assert_allclose(frame.to_numpy(), X[10:12].sum(1, keepdims=True) @ np.ones((1, 2)), rtol=1e-6)
    mixed = client.predict(["zoo", None], X[:2]).to_polars()
    assert mixed["adapter"].to_list() == ["zoo@1", None]
    assert client.predict(None, X[0]).to_pandas().shape == (1, 2)


def test_classes_are_data_frames(client: Any) -> None:
    classes = client.classify("zoo", X[:3])
    assert classes.to_pandas()["label"].to_list() == [row[0].label for row in classes]
    both = client.classify("zoo", X[:3], top_k=2).to_polars()
    assert both.columns == ["label_1", "probability_1", "label_2", "probability_2"]


def test_rows_of_a_data_set_are_a_data_frame(client: Any) -> None:
    client.put_dataset("rows", TABLE)
    for preview in (client.preview("rows", limit=3), client.preview("rows", limit=1)):
        frame = preview.to_pandas()
        assert frame["kind"].to_list() == KINDS[: len(preview.rows)].tolist()
        np.testing.assert_allclose(frame["x"], X[: len(frame), 0])


def test_a_notebook_shows_tables_whose_texts_are_escaped(client: Any) -> None:
    version = client.version("acme", 1)
    shown = _Cells(version._repr_html_())
    assert "b" not in shown.tags
    assert any("<b>cat</b>" in text for text in shown.texts)
    assert "acme" in shown.texts
    prediction = _Cells(client.predict(None, X)._repr_html_())
    assert prediction.tags.count("tr") == 21
    assert prediction.tags.count("th") == 2
    assert "… and more: to_pandas() has all." in prediction.texts


def test_a_list_in_a_notebook_shows_its_first_items_and_still_has_all(start: Start) -> None:
    client = start(base=BASE)
    for number in range(22):
        client.upload(f"a{number:02}", A=[[1], [1]], B=[[number, 0, 0]])
    listing = client.adapters()
    shown = _Cells(listing._repr_html_())
    assert [f"a{number:02}" in shown.texts for number in (0, 19, 20)] == [True, True, False]
    assert next(listing).name == "a00"
    assert listing.to_pandas()["name"].to_list() == [f"a{number:02}" for number in range(1, 22)]


@pytest.mark.parametrize(
    "make",
    [pd.DataFrame, pl.DataFrame, pa.table, lambda columns: pa.table(columns).to_reader()],
    ids=["pandas", "polars", "arrow", "stream"],
)
def test_a_table_and_the_name_of_its_targets_are_a_training(start: Start, make: Any) -> None:
    client = start(base=BASE)
    by_name = client.train("acme", rank=1, data=make(TABLE), targets="kind", training=BRIEF)
    by_rows = client.train("acme", rank=1, inputs=X, targets=KINDS, training=BRIEF)
    assert by_name.spec["data"]["digest"] == by_rows.spec["data"]["digest"]
    assert by_name.spec["labels"] == ["a", "b"]


def test_columns_of_a_table_are_inputs_weights_and_groups(start: Start) -> None:
    client = start(base=BASE)
    frame = pd.DataFrame({"e": list(X), "one": X[:, 0], "two": X[:, 1], "who": KINDS, "much": np.arange(40) + 1.0})
    columns = {"inputs": "e", "targets": ["one", "two"], "weights": "much", "groups": "who"}
    by_name = client.train("f-{group}", rank=1, data=frame, **columns, training={"method": "sgd"})
    rows = {"inputs": X, "targets": X[:, :2], "weights": frame["much"], "groups": frame["who"]}
    by_rows = client.train("f-{group}", rank=1, **rows, training={"method": "sgd"})
    assert by_name.spec["data"]["digest"] == by_rows.spec["data"]["digest"]
    for wrong, error, words in (
        ({"targets": "kind"}, InvalidInput, "no column 'kind'; it has: e, one, two"),
        ({"inputs": "e"}, InvalidCombination, "say which of its columns are the targets"),
        ({"targets": "one"}, WrongType, "column 'who' has no numbers"),
    ):
        with pytest.raises(error, match=words):
            client.train("acme", rank=1, data=frame, **wrong)


@pytest.mark.parametrize(
    "rows",
    [pa.table(dict(zip(NAMES, X.T, strict=True))), pa.table({"e": X.tolist()}), pl.DataFrame({"e": X.tolist()})],
    ids=["columns", "vectors", "polars vectors"],
)
def test_tables_are_rows_of_a_prediction(client: Any, rows: Any) -> None:
    np.testing.assert_array_equal(client.predict("zoo", rows).outputs, client.predict("zoo", X).outputs)


@pytest.mark.parametrize("make", [pd.Series, pl.Series, pa.array, lambda texts: pd.DataFrame({"text": texts})])
def test_a_column_of_texts_is_encoded(start: Start, make: Any) -> None:
    client = start(base=BASE, client={"encode": lambda many: np.array([[len(text), 0.0, 1.0] for text in many])})
    assert client.predict(None, make(["a", "bb"])).outputs.shape == (2, 2)


def test_a_library_that_is_missing_is_named() -> None:
    code = "import sys; sys.modules['polars'] = None\nimport loraplex\nloraplex.to_polars([])"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert "ImportError: to_polars needs polars, which is not installed: pip install polars" in done.stderr
