"""Commands about the base layer: show that of the service, and make the file of one."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from loraplex.cli.columns import listed, split_names
from loraplex.cli.errors import BadFile, WrongUsage
from loraplex.cli.output import pairs
from loraplex.cli.session import Session, argument, command, option

_LABELS_FILE = ".json"


class _BaseGroup(TyperGroup):
    """Group whose first command runs if none is named, so that `loraplex base` shows the base layer."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Insert the first command before options alone, except those that ask for help."""
        if all(text.startswith("-") for text in args[:1]) and not set(args[:1]) & set(ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_BaseGroup, help="Show the base layer, or make the file of one.")


@command(app, "show")
def show(session: Session) -> None:
    """Show the base layer of the service, as `loraplex base` does."""
    layer = session.client.base()
    about = {
        "source": layer.source,
        "numbers in": layer.in_features,
        "numbers out": layer.out_features,
        "bias": "yes" if layer.bias else "no",
        "held in": f"{layer.dtype} on {layer.device}",
        "labels": None if layer.labels is None else listed(list(map(str, layer.labels)), "labels"),
        "encoder": layer.feature_space,
        "fingerprint": layer.fingerprint,
    }
    session.give(layer, pairs(about))


_SOURCE = "A .safetensors or .npz file of arrays, or a 2_Dense folder of sentence-transformers."
_MAKE_EXAMPLE = "Example: loraplex base make head.npz head.safetensors --weight coef --bias intercept --labels cat,dog"


@command(app, "make", example=_MAKE_EXAMPLE)
def make(
    session: Session,
    source: Annotated[Path, argument("SOURCE", _SOURCE)],
    file: Annotated[Path, argument("FILE", "The base layer file to write, for `loraplex serve --base FILE`.")],
    weight: Annotated[str, option("Name of the weight, of shape (out, in).", metavar="NAME")] = "weight",
    bias: Annotated[str | None, option("Name of the bias; default: bias, if there is one.", metavar="NAME")] = None,
    transpose: Annotated[bool, option("The weight is of shape (in, out).", "--transpose")] = False,
    labels: Annotated[
        str | None, option("Labels of the outputs, in order: a,b,c, or a .json file with a list.", metavar="LABELS")
    ] = None,
    check: Annotated[
        Path | None,
        option("A .safetensors or .npz file with `inputs` and the expected `outputs`, which the layer must give."),
    ] = None,
) -> None:
    """Make a base layer file. Fitted estimators and torch modules: `loraplex.make_base` in Python."""
    from loraplex.base_file import make_base, read_arrays  # imports numpy

    examples = None if check is None else read_arrays(check)
    names = None if labels is None else _labels(labels)
    make_base(source, file, labels=names, check=examples, weight=weight, bias=bias, transpose=transpose)
    layer = read_arrays(file)
    outputs, inputs = layer["weight"].shape
    made = {"file": str(file), "in_features": inputs, "out_features": outputs, "bias": "bias" in layer, "labels": names}
    session.give(made, f"{file}: {inputs} numbers in, {outputs} out. Serve it: loraplex serve --base {file}")


def _labels(text: str) -> list[str | int]:
    """Return the labels in `a,b,c`, where whole numbers are labels of that kind, or those in a JSON file."""
    if not text.endswith(_LABELS_FILE):
        names = split_names(text)
        return list(map(int, names)) if all(name.lstrip("-").isdecimal() for name in names) else list(names)
    try:
        labels = json.loads(Path(text).read_text("utf-8"))
    except ValueError as error:
        raise BadFile(f"{text} is not JSON: {error}") from None
    if not isinstance(labels, list):
        raise WrongUsage(f"{text} must hold a list of labels.")
    return labels
