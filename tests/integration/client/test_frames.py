"""DataFrames and columns of vectors, as data sets and as rows of a training."""

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from loraplex import InvalidDataset, InvalidInput, NotFinite, WrongShape, WrongType, to_polars, training_rows
from loraplex.arrays import rows_of
from loraplex.tables import write_table
from loraplex.training_rows import rows_of_table, values_of

from tests.integration.client.conftest import Start

RNG = np.random.default_rng(3)
X, Y = RNG.normal(size=(40, 10)).astype(np.float32), RNG.normal(size=40).astype(np.float32)
CLOSED = {"method": "closed_form"}
VECTORS = [[0.5, 1.0], [1.5, 2.0], [2.5, 3.0]]
PANDAS = pd.DataFrame(
    {
        "whole": pd.array([1, 2, None], dtype="Int64"),
        "real": [0.5, float("nan"), 1.5],
        "yes": pd.array([True, None, False], dtype="boolean"),
        "text": ["a", None, "c"],
        "kind": pd.Categorical(["u", "v", "u"]),
        "vector": VECTORS,
        "array": [np.array(row, np.float32) for row in VECTORS],
        "tags": [["x"], ["x", "y"], []],
        "day": pd.to_datetime(["2026-01-02"] * 3),
    },
    index=[7, 8, 9],
)
POLARS = pl.DataFrame(
    {
        "whole": [1, 2, None],
        "real": [0.5, None, 1.5],
        "yes": [True, None, False],
        "text": ["a", None, "c"],
        "kind": pl.Series(["u", "v", "u"], dtype=pl.Categorical),
        "vector": VECTORS,
        "array": pl.Series(VECTORS, dtype=pl.Array(pl.Float32, 2)),
        "tags": pl.Series([["x"], ["x", "y"], []], dtype=pl.List(pl.String)),
        "day": pl.Series(["2026-01-02"] * 3).str.to_date().cast(pl.Datetime("us")),
    }
)
TYPES = {
    "whole": ("int64", None),
    "real": ("float64", None),
    "yes": ("bool", None),
    "text": ("string", None),
    "kind": ("string", None),
    "vector": ("list<double>", 2),
    "array": ("list<float>", 2),
    "tags": ("list<string>", None),
    "day": ("string", None),
}

ONE_CLIENT = pytest.mark.parametrize("connect", ["sync"], indirect=True)
"""What both clients share, the reading of rows and tables, is tried with the one that blocks."""


@pytest.mark.parametrize("frame", [PANDAS, POLARS], ids=["pandas", "polars"])
def test_a_data_frame_is_a_data_set_with_its_missing_values(start: Start, frame: Any) -> None:
    client = start()
    version = client.put_dataset("frame", frame)
    found = {column.name: (column.type, column.width) for column in version.columns}
    nulls = {column.name: column.nulls for column in version.columns if column.nulls}
    assert {name: width for name, (_, width) in found.items()} == {name: width for name, (_, width) in TYPES.items()}
    assert {name: kind.split("<")[0] for name, (kind, _) in found.items()} == {
        name: kind.split("<")[0] for name, (kind, _) in TYPES.items()
    }
    assert nulls == {"whole": 1, "real": 1, "yes": 1, "text": 1}
    rows = client.preview("frame").rows
    assert [row["kind"] for row in rows] == ["u", "v", "u"]
    assert [row["vector"] for row in rows] == [row["array"] for row in rows] == VECTORS
    assert rows[2]["text"] == "c"


@ONE_CLIENT
def test_pandas_and_polars_give_the_same_rows(start: Start) -> None:
    client = start()
    assert client.put_dataset("frame", PANDAS).version == 1
    assert client.put_dataset("frame", POLARS).version == 1


@ONE_CLIENT
def test_whatever_gives_arrow_streams_is_a_table(start: Start) -> None:
    client = start()
    table = pa.table({"a": [1, 2], "b": ["x", "y"]})

    class Giver:
        def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
            return table.__arrow_c_stream__(requested_schema)

    given = [table, Giver(), table.to_reader(), table.to_batches()[0]]
    assert {client.put_dataset("table", source).digest for source in given} == {client.dataset("table").newest.digest}


@ONE_CLIENT
def test_empty_chunks_of_a_table_are_no_rows(start: Start) -> None:
    table = pa.table({"a": pa.chunked_array([[], [1.0, 2.0]], pa.float64()), "b": pa.chunked_array([["x"], [], ["y"]])})
    client = start()
    assert client.put_dataset("table", table).rows == 2
    assert [row["b"] for row in client.preview("table").rows] == ["x", "y"]


TIME = pd.Timestamp("2026-01-01", tz="Europe/Zurich")


@pytest.mark.parametrize(
    ("frame", "error", "words"),
    [
        (pd.DataFrame([[1, 2, 3]], columns=["a", "a", "y"]), InvalidInput, "two columns 'a'"),
        (pd.DataFrame([[1, 2, 3]], columns=["1", 1, "y"]), InvalidInput, "two columns '1'"),
        (pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["y", "y"]), InvalidInput, "two columns 'y'"),
        (pd.DataFrame({"a": [1, 2], "y": ["u", None]}), WrongType, "targets, row 1: .* cannot be used"),
        (pd.DataFrame({"a": [1, 2], "y": pd.array([True, None], "boolean")}), WrongType, "targets, row 1"),
        (pl.DataFrame({"a": [1, 2], "y": [None, "u"]}), WrongType, "targets, row 0: None"),
        (pd.DataFrame({"a": [1, 2], "y": [TIME, TIME]}), WrongType, "targets, row 0: 2026"),
        (pd.DataFrame({"a": [1], "y": np.array(["2026-01-01"], "M8[ns]")}), WrongType, "type datetime64"),
        (pd.DataFrame({"a": [1, 2], "y": np.array(["u", 1], object)}), WrongType, "several kinds"),
        (pl.LazyFrame({"a": [1], "y": ["u"]}), WrongType, "LazyFrame has no rows yet"),
    ],
)
def test_a_table_that_is_no_training_is_refused_with_the_row(frame: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        values_of(rows_of_table({"targets": "y"}, frame)[0]["targets"], field="targets")


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pa.table])
def test_a_table_with_one_column_of_inputs_has_a_row_for_each_number(make: Any) -> None:
    rows, _ = rows_of_table({"targets": "y"}, make({"a": [1.0, 2.0, 3.0], "y": ["u", "v", "u"]}))
    np.testing.assert_array_equal(rows_of(rows["inputs"]).x_NI, [[1], [2], [3]])


def test_whole_numbers_among_others_stay_numbers_in_polars() -> None:
    assert to_polars([{"figure": 1}, {"figure": 0.5}, {"figure": None}])["figure"].to_list() == [1, 0.5, None]


@ONE_CLIENT
@pytest.mark.parametrize(
    ("frame", "error", "column"),
    [
        (pd.DataFrame({"ok": [1, 2], "mixed": [1, "a"]}), WrongType, "mixed"),
        (pd.DataFrame({"ok": [1, 2], "things": [object(), object()]}), WrongType, "things"),
        (pd.DataFrame([[1, 2]], columns=["twice", "twice"]), WrongType, "twice"),
        (pd.DataFrame({"ok": [1], "huge": np.array([2**70], object)}), WrongType, "huge"),
        (pd.DataFrame({"ok": [1, 2], "took": pd.to_timedelta([1, 2])}), InvalidDataset, "took"),
        (pl.DataFrame({"ok": [1, 2], "took": pl.Series([1, 2]).cast(pl.Duration("us"))}), InvalidDataset, "took"),
        (pl.DataFrame({"ok": [1], "pair": [{"x": 1}]}), InvalidDataset, "pair"),
        (pd.Series([1, 2]), WrongType, None),
    ],
    ids=["mixed", "objects", "twice", "huge", "pandas duration", "polars duration", "struct", "series"],
)
def test_what_cannot_be_a_column_is_named(start: Start, frame: Any, error: type[Exception], column: str | None) -> None:
    client = start()
    with pytest.raises(error) as caught:
        client.put_dataset("frame", frame)
    if column is not None:
        assert getattr(caught.value, "field", None) == column
        assert column in str(caught.value)
    assert list(client.datasets()) == []


def test_polars_needs_no_pyarrow_and_pandas_says_that_it_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "import pathlib, polars, pandas, loraplex\n"
        "from loraplex.tables import write_table\n"
        f"file = pathlib.Path({str(tmp_path / 'table')!r})\n"
        "print(write_table(polars.DataFrame({'a': [1]}), file), file.stat().st_size > 0)\n"
        "try: write_table(pandas.DataFrame({'a': [1]}), file)\n"
        "except loraplex.WrongType as error: print(error.detail, error.expected)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "application/vnd.apache.arrow.stream True"
    assert "by way of pyarrow, which is not installed" in second
    assert "loraplex[arrow]" in second


def test_the_index_of_a_data_frame_is_no_column(tmp_path: Any) -> None:
    write_table(PANDAS[PANDAS["kind"] == "u"], tmp_path / "table")
    assert pa.ipc.open_stream((tmp_path / "table").read_bytes()).schema.names == list(PANDAS.columns)


@ONE_CLIENT
@pytest.mark.parametrize("inline", [True, False], ids=["inline", "data set"])
def test_one_number_a_row_is_a_target_of_a_layer_with_one_output(
    start: Start, monkeypatch: pytest.MonkeyPatch, inline: bool
) -> None:
    monkeypatch.setattr(training_rows, "INLINE_NUMBERS", 10**6 if inline else 10)
    client = start(base="random:10,1,42")
    forms: list[Any] = [Y.reshape(-1, 1), Y, Y.tolist(), pd.Series(Y), pl.Series(Y)]
    jobs = [client.train("acme", rank=1, inputs=X, targets=targets, training=CLOSED) for targets in forms]
    assert len({job.spec["data"]["digest"] for job in jobs}) == 1
    assert ("dataset" in jobs[0].spec["data"]) is not inline


def test_a_training_on_one_number_a_row_learns_it(start: Start) -> None:
    client = start(base="random:10,1,42", trainer=True)
    targets = X @ np.arange(10)
    client.train("acme", rank=1, inputs=X, targets=targets, training=CLOSED).wait(timeout=60)
    np.testing.assert_allclose(client.predict("acme", X).outputs[:, 0], targets, rtol=1e-3, atol=1e-3)


@ONE_CLIENT
@pytest.mark.parametrize("inline", [True, False], ids=["inline", "data set"])
def test_a_column_of_vectors_is_rows(start: Start, monkeypatch: pytest.MonkeyPatch, inline: bool) -> None:
    monkeypatch.setattr(training_rows, "INLINE_NUMBERS", 10**6 if inline else 10)
    client = start()
    pairs = X[:, :2]
    objects = np.empty(len(X), object)
    objects[:] = list(X)
    forms: list[Any] = [
        X,
        objects,
        list(X),
        pd.Series(list(X)),
        pd.Series(X.tolist()),
        pl.Series(X.tolist()),
        pl.Series(X.tolist(), dtype=pl.Array(pl.Float32, 10)),
        pd.DataFrame(X),
        pl.DataFrame(X),
    ]
    jobs = [client.train("acme", rank=1, inputs=rows, targets=pairs, training=CLOSED) for rows in forms]
    jobs += [client.train("acme", rank=1, inputs=X, targets=pd.Series(list(pairs)), training=CLOSED)]
    assert len({job.spec["data"]["digest"] for job in jobs}) == 1
    assert client.put_dataset("d", {"x": pd.Series(list(X))}).columns[0].width == 10
    np.testing.assert_array_equal(client.predict(None, pd.Series(list(X))).outputs, client.predict(None, X).outputs)


@ONE_CLIENT
def test_columns_of_several_types_of_numbers_are_rows(start: Start) -> None:
    client = start(base="random:3,2,42")
    frame = pd.DataFrame({"a": pd.array([1, 2], dtype="Int64"), "b": pd.array([0.5, 1.5], dtype="Float64"), "c": 1.0})
    np.testing.assert_array_equal(
        client.predict(None, frame).outputs, client.predict(None, [[1, 0.5, 1], [2, 1.5, 1]]).outputs
    )


@ONE_CLIENT
def test_a_column_of_lists_of_labels_is_a_target(start: Start) -> None:
    client = start()
    training = {"loss": "binary_cross_entropy", "epochs": 1}
    tags = [["a"], ["a", "b"], []] * 5
    listed, framed = (
        client.train("acme", rank=1, inputs=X[:15], targets=targets, training=training)
        for targets in (tags, pd.Series(tags))
    )
    assert listed.spec["data"]["digest"] == framed.spec["data"]["digest"]


@ONE_CLIENT
def test_vectors_that_do_not_fit_are_named(start: Start) -> None:
    client = start()
    with pytest.raises(WrongShape, match="inputs is no array: its rows differ in length"):
        client.predict(None, pd.Series([[1.0] * 10, [1.0] * 9]))
    with pytest.raises(WrongType, match="inputs, row 1: None is no vector"):
        client.predict(None, pd.Series([[1.0] * 10, None]))
    with pytest.raises(NotFinite, match="inputs, row 1, column 0"):
        client.predict(None, pd.Series([[1.0] * 10, [float("nan")] * 10]))
