"""What a field that is none was probably meant to be."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel


def known_fields(model: type[BaseModel], place: Sequence[int | str]) -> tuple[list[str], str | None]:
    """The fields that there are where another was found, and the one that was probably meant, by its whole path."""
    *above, given = map(str, place)
    for name in above:
        model = _model_in(model.model_fields[name].annotation) or model
    here = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    paths = {name: name for name in here}
    for name, annotation in here.items():
        below = _model_in(annotation)
        paths |= (
            {} if below is None else {inner: f"{name}.{inner}" for inner in below.model_fields if inner not in paths}
        )
    close = get_close_matches(given, paths, n=1, cutoff=0.75)
    return list(here), ".".join([*above, paths[close[0]]]) if close else None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field's type is, or has among its alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
