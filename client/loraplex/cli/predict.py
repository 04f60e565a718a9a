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
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraplex.cli.columns import Selection, has_columns, infer_inputs, listed, names_in, selected
from loraplex.cli.errors import BadFile, WrongUsage
from loraplex.cli.output import Table, plural
from loraplex.cli.rows import Rows, read_rows, rows_of_options
from loraplex.cli.session import Session, command, complete_adapter, option
from loraplex.errors import AdapterNotLive, AliasNotFound
from loraplex.results import Base, Label, Version

if TYPE_CHECKING:
    pass

# N rows · I in_features · O out_features

PANEL = "Train and ask"
_EXAMPLE = (
    "Examples: loraplex predict acme tickets.csv --limit 5; loraplex predict acme@2 - --out answers.csv < rows.csv"
)
_CLASS_LOSSES = ("cross_entropy", "binary_cross_entropy")
_LIVE = "live"
_TOP_K = 3
_MAX_OUTPUTS = 10
_OUT_KINDS = (".csv", ".jsonl", ".ndjson", ".npy")
# The column with the correct labels: its cells by its name; empty if the rows have none.
Truth = Mapping[str, list[Any]]

app = typer.Typer()


@dataclass(kw_only=True)
class Answers:
    """One answer per row: its most probable classes, or the outputs of the layer."""

    labels: Sequence[Sequence[Label]] | None = None
    outputs_NO: Any = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Return each row as a JSON object."""
        if self.labels is not None:
            for row, labels in enumerate(self.labels):
                yield {"row": row, "labels": [label._asdict() for label in labels]}
        else:
            for row, outputs in enumerate(self.outputs_NO.tolist()):
                yield {"row": row, "outputs": outputs}

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
        yield Table(
            headings, [row[: len(headings)] for row in rows], right=right, least=headings[: len(truth) + 1 : -1]
        )
        if left_out:
            yield f"{left_out} more outputs a row: --json or --out has all"
        for name, cells in truth.items():
            if self.labels is not None and not any(isinstance(cell, list) for cell in cells):
                hits = sum(_is_same(labels[0].label, cell) for labels, cell in zip(self.labels, cells, strict=True))
                yield f"{name} is right in {plural(hits, 'row')} of {len(cells)}"


@command(app, "predict", panel=PANEL, example=_EXAMPLE)
def predict(
    session: Session,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="The adapter: acme, or acme@3 for a version.",
            autocompletion=complete_adapter,
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            help="Rows in CSV, Parquet, Arrow, JSON lines, NPZ or NPY, or - for standard input.",
            show_default=False,
        ),
    ] = None,
    *,
    row: Annotated[list[str] | None, option('One row, such as "1,2,3"; again for more.')] = None,
    base: Annotated[bool, option("Use the base layer instead of an adapter.", "--base")] = False,
    inputs: Annotated[str | None, option("Input columns, as a,b,c.")] = None,
    input_prefix: Annotated[str | None, option("Prefix of the names of the input columns.")] = None,
    input_column: Annotated[str | None, option("Input column that contains lists, such as embeddings.")] = None,
    limit: Annotated[int | None, option("Predict only this number of rows.", min=1)] = None,
    labels: Annotated[
        bool | None,
        option(
            "Classes and their probabilities, or the layer's numbers.",
            "--labels/--outputs",
            show_default="labels of a classifier",
        ),
    ] = None,
    top_k: Annotated[
        int | None, option("Number of classes per row, most probable first; implies --labels.", min=1, show_default="3")
    ] = None,
    out: Annotated[Path | None, option("Write the predictions to this .csv, .jsonl or .npy file.")] = None,
) -> None:
    """Predict rows: classes with probabilities if the adapter is a classifier, otherwise the layer's outputs."""
    if base and name is not None:
        if file is not None:
            raise WrongUsage("--base asks the bare base layer: leave the adapter out, or --base.")
        name, file = None, name
    if name is None and not base:
        raise WrongUsage("Say which adapter, or --base for the bare base layer.")
    if top_k is not None and labels is False:
        raise WrongUsage("--top-k counts classes: leave it out, or --outputs.")
    if (file is None) == (not row):
        raise WrongUsage('Give the rows: a file, - for standard input, or --row "1,2,3". One of them.')
    if out is not None:
        _check_out(out, file, classes=bool(labels) or top_k is not None)
    selection = selected(inputs, input_prefix, input_column)
    version = None if name is None else _find_version(session, name)
    reference = None if version is None else version.reference
    expected = selection or _trained_on(version).get("inputs")
    rows = rows_of_options((row or [])[:limit]) if file is None else read_rows(file, limit=limit, expected=expected)
    layer = session.client.base()
    x_NI = rows.numbers(_inputs(session, rows, version, layer, selection))
    if labels is None:
        labels = top_k is not None or (_is_classifier(version) and not (out and _takes_numbers(out)))
    answers = Answers()
    if labels:
        answers.labels = session.client.classify(reference, x_NI, top_k=min(top_k or _TOP_K, layer.out_features))
    else:
        answers.outputs_NO = session.client.predict(reference, x_NI).outputs
    truth = _truth(rows, version)
    if out is not None:
        _write(answers, truth, out)
        session.give({"file": out, "rows": len(x_NI), "adapter": reference}, f"{len(x_NI)} rows are in {out}")
    else:
        session.give({"adapter": reference, "predictions": list(answers.rows())}, *answers.shown(truth))


def _find_version(session: Session, reference: str) -> Version:
    """Return the version that `acme`, `acme@3` or `acme@live` means, so that the same version answers all requests."""
    name, _, which = reference.partition("@")
    if which.isdecimal():
        numbered: Version = session.client.version(name, int(which))
        return numbered
    adapter = session.client.adapter(name)
    if which not in ("", _LIVE):
        raise AliasNotFound(
            f"{name} has no alias {which}: write {name}, or a version such as {name}@{adapter.versions}"
        )
    if adapter.live is None:
        raise AdapterNotLive(f"none of the versions of {name} is live: name one, such as {name}@{adapter.versions}")
    return adapter.live


def _inputs(
    session: Session, rows: Rows, version: Version | None, layer: Base, selection: Selection | None
) -> Selection | None:
    """Return the input columns: those of the options, of the adapter's training, or those that `train` infers."""
    if rows.names is None:
        if selection is not None:
            raise WrongUsage(
                f"{rows.source} has no names of columns: leave --inputs, --input-prefix and --input-column out."
            )
        return None
    trained = _trained_on(version).get("inputs")
    if selection is None and trained is not None and has_columns(rows.names, trained):
        selection = trained
    if selection is None:
        taken = set(rows.names) & set(_targets(version))
        selection, _ = infer_inputs(rows.described(), layer, taken=taken)
    used = rows.used(selection)
    unused = [name for name in rows.names if name not in used]
    session.note(f"inputs: {listed(used)}" + (f"; not used: {listed(unused)}" if unused else ""))
    return selection


def _trained_on(version: Version | None) -> Mapping[str, Any]:
    lineage = {} if version is None or version.lineage is None else version.lineage
    return lineage.get("data") or {}


def _targets(version: Version | None) -> list[str]:
    return names_in(_trained_on(version).get("targets") or {})


def _truth(rows: Rows, version: Version | None) -> Truth:
    """Return the correct labels, if the file has the target column of the adapter's training."""
    targets = _targets(version)
    if rows.names is None or len(targets) != 1 or targets[0] not in rows.names:
        return {}
    return {targets[0]: rows.column(targets[0])}


def _is_classifier(version: Version | None) -> bool:
    if version is None:
        return False
    return version.labels is not None or (version.lineage or {}).get("loss") in _CLASS_LOSSES


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
        yield file  # a pipe or a device, which take things as they come; else opening it says what is wrong
        return
    part = file.with_name(f".loraplex-{os.getpid()}")
    try:
        yield part
        if file.exists():
            shutil.copymode(file, part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
