"""Command `predict`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraplex.cli.errors import WrongUsage
from loraplex.cli.output import Answers, check_out, takes_numbers, write_answers
from loraplex.cli.plugins import complete_adapter
from loraplex.cli.request import Selection, has_columns, infer_inputs, listed, selected
from loraplex.cli.rows import Rows, read_rows, rows_of_options
from loraplex.cli.session import Session, command
from loraplex.errors import AdapterNotLive, AliasNotFound
from loraplex.results import Base, Version

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OF_CLASSES = ("cross_entropy", "binary_cross_entropy")
_LIVE = "live"
_TOP_K = 3


def register(cli: typer.Typer, *, panel: str) -> None:
    """Register the command."""
    example = (
        "Examples: loraplex predict acme tickets.csv --limit 5; loraplex predict acme@2 - --out answers.csv < rows.csv"
    )

    @command(cli, "predict", panel=panel, example=example)
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
        row: Annotated[list[str] | None, typer.Option(help='One row, such as "1,2,3"; again for more.')] = None,
        base: Annotated[bool, typer.Option("--base", help="Use the base layer instead of an adapter.")] = False,
        inputs: Annotated[str | None, typer.Option(help="Input columns, as a,b,c.")] = None,
        input_prefix: Annotated[str | None, typer.Option(help="Prefix of the names of the input columns.")] = None,
        input_column: Annotated[
            str | None, typer.Option(help="Input column that contains lists, such as embeddings.")
        ] = None,
        limit: Annotated[int | None, typer.Option(help="Predict only this number of rows.", min=1)] = None,
        labels: Annotated[
            bool | None,
            typer.Option(
                "--labels/--outputs",
                help="Classes and their probabilities, or the layer's numbers.",
                show_default="labels of a classifier",
            ),
        ] = None,
        top_k: Annotated[
            int | None,
            typer.Option(
                help="Number of classes per row, most probable first; implies --labels.", min=1, show_default="3"
            ),
        ] = None,
        out: Annotated[
            Path | None, typer.Option(help="Write the predictions to this .csv, .jsonl or .npy file.")
        ] = None,
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
            check_out(out, file, classes=bool(labels) or top_k is not None)
        wanted = selected(inputs, input_prefix, input_column)
        version = None if name is None else find_version(session, name)
        reference = None if version is None else version.reference
        expected = wanted or _trained_on(version).get("inputs")
        rows = rows_of_options((row or [])[:limit]) if file is None else read_rows(file, limit=limit, expected=expected)
        layer = session.client.base()
        x_NI = rows.numbers(_selection(session, rows, version, layer, wanted))
        usual = top_k is not None or (_is_classifier(version) and not (out and takes_numbers(out)))
        most = min(top_k or _TOP_K, layer.out_features) if (usual if labels is None else labels) else None
        answers = _ask(session, reference, x_NI, top_k=most)
        truth = _truth(rows, version)
        if out is not None:
            write_answers(answers, truth, out)
            session.give({"file": out, "rows": len(x_NI), "adapter": reference}, f"{len(x_NI)} rows are in {out}")
        else:
            session.give(answers.as_json(reference), *answers.shown(truth))


def find_version(session: Session, reference: str) -> Version:
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


def _selection(
    session: Session, rows: Rows, version: Version | None, layer: Base, wanted: Selection | None
) -> Selection | None:
    """Return the input columns.

    These are those of the options, those that the adapter was trained on, or those that `train` infers.
    """
    if rows.names is None:
        if wanted is not None:
            raise WrongUsage(
                f"{rows.source} has no names of columns: leave --inputs, --input-prefix and --input-column out."
            )
        return None
    if wanted is None:
        trained = _trained_on(version).get("inputs")
        if trained is not None and has_columns(rows.names, trained):
            wanted = trained
        else:
            taken = set(rows.names) & set(_targets(version))
            wanted = infer_inputs(rows.described(), layer, taken=taken).value
    used = rows.used(wanted)
    left = [name for name in rows.names if name not in used]
    session.say(f"inputs: {listed(used)}" + (f"; not used: {listed(left)}" if left else ""))
    return wanted


def _trained_on(version: Version | None) -> dict[str, Any]:
    lineage = {} if version is None or version.lineage is None else version.lineage
    return dict(lineage.get("data") or {})


def _targets(version: Version | None) -> list[str]:
    told = _trained_on(version).get("targets") or {}
    return [told["column"]] if "column" in told else list(told.get("columns", ()))


def _truth(rows: Rows, version: Version | None) -> tuple[str, list[Any]] | None:
    """Return the correct labels, if the file has the target column of the adapter's training."""
    targets = _targets(version)
    if rows.names is None or len(targets) != 1 or targets[0] not in rows.names:
        return None
    return targets[0], rows.column(targets[0])


def _is_classifier(version: Version | None) -> bool:
    if version is None:
        return False
    return version.labels is not None or (version.lineage or {}).get("loss") in _OF_CLASSES


def _ask(session: Session, reference: str | None, x_NI: "NDArray[Any]", *, top_k: int | None) -> Answers:
    if top_k is None:
        return Answers(outputs_NO=session.client.predict(reference, x_NI).outputs)
    return Answers(labels=session.client.classify(reference, x_NI, top_k=top_k))
