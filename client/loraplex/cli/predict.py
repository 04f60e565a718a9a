"""Command `predict`, and its answers: as a table, as JSON, or in a file."""

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from loraplex.cli.columns import Selection, columns_of, has_columns, infer_inputs, listed, selected
from loraplex.cli.errors import BadFile, WrongUsage
from loraplex.cli.output import Table, plural
from loraplex.cli.rows import Rows, read_rows, rows_of_options
from loraplex.cli.session import Session, argument, command, complete_adapter, option
from loraplex.errors import AdapterNotLive, AliasNotFound
from loraplex.results import Base, Label, Version

# N rows · I in_features · O out_features

_EXAMPLES = "loraplex predict acme tickets.csv --limit 5; loraplex predict acme@2 - --out answers.csv < rows.csv"
_CLASS_LOSSES = ("cross_entropy", "binary_cross_entropy")
_TOP_K = 3
_MAX_OUTPUTS = 10
_OUT_KINDS = (".csv", ".jsonl", ".ndjson", ".npy")
# The column with the correct labels: its cells by its name; empty if the rows have none.
Truth = Mapping[str, list[Any]]

app = typer.Typer()


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One answer per row: its most probable classes, or the outputs of the layer."""

    labels: Sequence[Sequence[Label]] | None = None
    outputs_NO: Any = None

    def rows(self) -> list[dict[str, Any]]:
        """Return each row as a JSON object."""
        if self.labels is None:
            return [{"row": row, "outputs": outputs} for row, outputs in enumerate(self.outputs_NO.tolist())]
        rows = ([label._asdict() for label in labels] for labels in self.labels)
        return [{"row": row, "labels": labels} for row, labels in enumerate(rows)]

    def cells(self, truth: Truth) -> tuple[list[str], list[list[Any]]]:
        """Return headings and rows of cells, with the correct label before the answer."""
        if self.labels is not None:
            headings = ["label", "probability"]
            for rank in range(2, max(map(len, self.labels)) + 1):
                headings += [f"label_{rank}", f"probability_{rank}"]
            answers = [list(chain.from_iterable(labels)) for labels in self.labels]
        else:
            headings = [f"output_{index}" for index in range(self.outputs_NO.shape[1])]
            answers = self.outputs_NO.tolist()
        rows = [[row, *(labels[row] for labels in truth.values()), *cells] for row, cells in enumerate(answers)]
        return ["row", *truth, *headings], rows

    def shown(self, truth: Truth) -> Iterator[Any]:
        """Yield a table, and the accuracy if the labels are known."""
        headings, rows = self.cells(truth)
        left_out = 0 if self.outputs_NO is None else max(self.outputs_NO.shape[1] - _MAX_OUTPUTS, 0)
        headings = headings[: len(headings) - left_out]
        right = [heading for heading in headings if heading != "label"]
        # All columns after the first of the answer may be dropped, from the last on.
        least = headings[: len(truth) + 1 : -1]
        yield Table(headings, [row[: len(headings)] for row in rows], right=right, least=least)
        if left_out:
            yield f"{left_out} more outputs a row: --json or --out has all"
        for name, cells in truth.items():
            if self.labels is not None and not any(isinstance(cell, list) for cell in cells):
                hits = sum(_is_same(labels[0].label, cell) for labels, cell in zip(self.labels, cells, strict=True))
                yield f"{name} is right in {plural(hits, 'row')} of {len(cells)}"


@dataclass(kw_only=True)
class Options:
    """Arguments and options of `predict`."""

    name: Annotated[
        str | None, argument("NAME", "The adapter: acme, or acme@3 for a version.", autocompletion=complete_adapter)
    ] = None
    file: Annotated[
        str | None, argument("FILE", "Rows in CSV, Parquet, Arrow, JSON lines, NPZ or NPY, or - for standard input.")
    ] = None
    row: Annotated[list[str] | None, option('One row, such as "1,2,3"; again for more.')] = None
    base: Annotated[bool, option("Use the base layer instead of an adapter.", "--base")] = False
    inputs: Annotated[str | None, option("Input columns, as a,b,c.")] = None
    input_prefix: Annotated[str | None, option("Prefix of the names of the input columns.")] = None
    input_column: Annotated[str | None, option("Input column that contains lists, such as embeddings.")] = None
    limit: Annotated[int | None, option("Predict only this number of rows.", min=1)] = None
    labels: Annotated[
        bool | None,
        option(
            "Classes and their probabilities, or the layer's numbers.",
            "--labels/--outputs",
            show_default="labels of a classifier",
        ),
    ] = None
    top_k: Annotated[
        int | None, option("Number of classes per row, most probable first; implies --labels.", min=1, show_default="3")
    ] = None
    out: Annotated[Path | None, option("Write the predictions to this .csv, .jsonl or .npy file.")] = None

    def __post_init__(self) -> None:
        if self.base and self.name is not None:
            if self.file is not None:
                raise WrongUsage("--base asks the bare base layer: leave the adapter out, or --base.")
            self.name, self.file = None, self.name
        if self.name is None and not self.base:
            raise WrongUsage("Say which adapter, or --base for the bare base layer.")
        if self.top_k is not None and self.labels is False:
            raise WrongUsage("--top-k counts classes: leave it out, or --outputs.")
        if (self.file is None) == (not self.row):
            raise WrongUsage('Give the rows: a file, - for standard input, or --row "1,2,3". One of them.')
        if self.out is not None:
            _check_out(self.out, self.file, classes=bool(self.labels) or self.top_k is not None)
        self.selection = selected(self.inputs, self.input_prefix, self.input_column)


@command(app, "predict", panel="Train and ask", example=f"Examples: {_EXAMPLES}")
def predict(session: Session, options: Options) -> None:
    """Predict rows: classes with probabilities if the adapter is a classifier, otherwise the layer's outputs."""
    version = None if options.name is None else _find_version(session, options.name)
    reference = None if version is None else version.reference
    lineage = (version and version.lineage) or {}
    data = lineage.get("data") or {}
    if options.file is None:
        rows = rows_of_options((options.row or [])[: options.limit])
    else:
        expected = options.selection or data.get("inputs")
        rows = read_rows(options.file, limit=options.limit, expected=expected)
    layer = session.client.base()
    x_NI = rows.numbers(_inputs(session, rows, data, layer, options.selection))
    with_labels, out = options.labels, options.out
    if with_labels is None:
        is_classifier = version is not None and (version.labels is not None or lineage.get("loss") in _CLASS_LOSSES)
        with_labels = options.top_k is not None or bool(is_classifier and not (out and _takes_numbers(out)))
    if with_labels:
        top_k = min(options.top_k or _TOP_K, layer.out_features)
        answers = Answers(labels=session.client.classify(reference, x_NI, top_k=top_k))
    else:
        answers = Answers(outputs_NO=session.client.predict(reference, x_NI).outputs)
    truth = _truth(rows, data)
    if out is not None:
        _write(answers, truth, out)
        session.give({"file": out, "rows": len(x_NI), "adapter": reference}, f"{len(x_NI)} rows are in {out}")
    else:
        session.give({"adapter": reference, "predictions": answers.rows()}, *answers.shown(truth))


def _find_version(session: Session, reference: str) -> Version:
    """Return the version that `acme`, `acme@3` or `acme@live` means, so that the same version answers all requests."""
    name, _, which = reference.partition("@")
    if which.isdecimal():
        return session.client.version(name, int(which))
    adapter = session.client.adapter(name)
    if which not in ("", "live"):
        raise AliasNotFound(f"{name} has no alias {which}: write {name}, or a version like {name}@{adapter.versions}")
    if adapter.live is None:
        raise AdapterNotLive(f"none of the versions of {name} is live: name one, such as {name}@{adapter.versions}")
    return adapter.live


def _inputs(
    session: Session, rows: Rows, data: Mapping[str, Any], layer: Base, selection: Selection | None
) -> Selection | None:
    """Return the input columns: those of the options, of the adapter's training `data`, or what `train` infers."""
    if rows.names is None:
        if selection is not None:
            raise WrongUsage(f"{rows.source} has no names of columns: leave --inputs and the like out.")
        return None
    trained = data.get("inputs")
    if selection is None and trained is not None and has_columns(rows.names, trained):
        selection = trained
    if selection is None:
        taken = set(rows.names) & set(_targets(data))
        selection, _ = infer_inputs(rows.described(), layer, taken=taken)
    used = rows.used(selection)
    unused = [name for name in rows.names if name not in used]
    session.note(f"inputs: {listed(used)}" + (f"; not used: {listed(unused)}" if unused else ""))
    return selection


def _targets(data: Mapping[str, Any]) -> list[str]:
    return columns_of(data.get("targets") or {}, ())


def _truth(rows: Rows, data: Mapping[str, Any]) -> Truth:
    """Return the correct labels, if the file has the target column of the adapter's training."""
    targets = _targets(data)
    if rows.names is None or len(targets) != 1 or targets[0] not in rows.names:
        return {}
    index = rows.names.index(targets[0])
    return {targets[0]: [cells[index] for cells in rows.cells]}


def _is_same(label: str | int, cell: Any) -> bool:
    """Return whether a cell is this label; cells of CSV files are text."""
    if isinstance(label, int) and isinstance(cell, str):
        try:
            return float(cell) == label
        except ValueError:
            return False
    return bool(label == cell)


def _check_out(file: Path, rows: str | None, *, classes: bool) -> None:
    """Raise `WrongUsage` if answers (classes or not) cannot be written to `file`, or would overwrite the rows."""
    if file.suffix.lower() not in _OUT_KINDS:
        raise WrongUsage(f"{file}: answers go to .csv, .jsonl or .npy.")
    if classes and _takes_numbers(file):
        raise WrongUsage(f"{file} takes numbers only: leave --labels and --top-k out, or write a .csv or .jsonl.")
    if rows is not None and file.exists() and Path(rows).exists() and file.samefile(rows):
        raise WrongUsage(f"--out would overwrite {rows}, which the rows come from: name another file.")


def _takes_numbers(file: Path) -> bool:
    return file.suffix.lower() == ".npy"


def _write(answers: Answers, truth: Truth, file: Path) -> None:
    """Write a whole .csv, .jsonl or .npy file; raise `BadFile`, and write nothing, if that fails."""
    try:
        with _replacing(file) as part:
            if _takes_numbers(file):
                import numpy as np

                with part.open("wb") as binary:
                    np.save(binary, answers.outputs_NO)
                return
            with part.open("w", encoding="utf-8", newline="") as text:
                if file.suffix.lower() == ".csv":
                    headings, rows = answers.cells(truth)
                    csv.writer(text).writerows([headings, *rows])
                else:
                    text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in answers.rows())
    except OSError as error:
        raise BadFile(f"Cannot write {file}: {error.strerror}") from None


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """Open a temporary file that replaces `file` when it is complete, and leave `file` unchanged after an error."""
    file = file.resolve()
    if file.exists() and not (file.is_file() and os.access(file, os.W_OK)):
        # A pipe or a device, or a file that cannot be written, which opening it reports.
        yield file
        return
    part = file.with_name(f".loraplex-{os.getpid()}")
    try:
        yield part
        if file.exists():
            shutil.copymode(file, part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
