"""What a field that is none was probably meant to be."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel

_LONGEST_FIELD = 100
"""Characters that are compared: what is longer was meant to be no field, and takes long to compare."""


def known_fields(model: type[BaseModel], place: Sequence[int | str]) -> tuple[list[str], str | None]:
    """The fields that there are where another was found, and the one that was probably meant, by its whole path."""
    *above, given = map(str, place)
    given = given[:_LONGEST_FIELD]
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


def without_more_unknown(value: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return an object as `model` takes it, of its unknown fields only the first: pydantic makes an error of each."""
    known = {field.alias or name: _model_in(field.annotation) for name, field in model.model_fields.items()}
    unknown = next((key for key in value if key not in known), None)
    kept = {key: entry for key, entry in value.items() if key in known or key == unknown}
    for key, below in known.items():
        if below is not None and isinstance(kept.get(key), dict):
            kept[key] = without_more_unknown(kept[key], below)
    return kept
