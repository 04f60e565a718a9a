"""Texts in the place of inputs, where the client has an encoder."""

from collections.abc import Callable
from typing import Any

import numpy as np

from loraplex.arrays import Rows, is_text, rows
from loraplex.effects import Steps, work
from loraplex.errors import WrongShape, WrongType

Encode = Callable[[list[str]], Any]
"""Texts → one row of numbers for each, such as `SentenceTransformer.encode`."""


def read_rows(inputs: Any, encode: Encode | None, *, field: str = "inputs") -> Steps[Rows]:
    """Rows from numbers, or from texts by way of the encoder."""
    if not is_text(inputs):
        return rows(inputs, field=field)
    if encode is None:
        raise WrongType(
            f"{field} are texts, and this client has no encoder",
            field=field,
            given="text",
            expected="numbers, or a Client(url, encode=model.encode)",
        )
    texts = [inputs] if isinstance(inputs, str) else np.asarray(inputs, dtype=object).ravel().tolist()
    found = rows((yield from work(lambda: encode(texts))), field=field)
    if found.one or len(found.x_NI) != len(texts):
        raise WrongShape(
            f"the encoder made {found.x_NI.shape} numbers of {len(texts)} texts",
            field=field,
            given=found.x_NI.shape,
            expected=f"({len(texts)}, columns)",
        )
    return Rows(found.x_NI, isinstance(inputs, str), None)


def plain(values: Any) -> list[Any]:
    """A list that JSON takes."""
    return np.asarray(values).tolist()  # type: ignore[no-any-return]
