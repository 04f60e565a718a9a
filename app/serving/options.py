"""What a predict request wants to be answered with: its `return` and `top_k`."""

from typing import NamedTuple

from adapters.errors import InvalidCombination, OutOfRange, WrongType, shorten

OUTPUTS, PROBABILITIES, LABELS = MEMBERS = ("outputs", "probabilities", "labels")
"""What `return` may ask for, in the order in which the answer has it."""
_EXPECTED = f"1 to {len(MEMBERS)} of {', '.join(MEMBERS)}, each once"


class PredictOptions(NamedTuple):
    """What an answer shall have, where that is not the outputs alone."""

    members: tuple[str, ...]
    """Some of `MEMBERS`, in their order."""
    top_k: int | None
    """So many of the most probable classes; None is all probabilities, and one label a row."""


def read_options(given: object, top_k: int | None, *, out_features: int) -> PredictOptions | None:
    """What `return` and `top_k`, at least 1, ask for; None where that is the outputs alone.

    Raises `WrongType`, `OutOfRange` and `InvalidCombination`, naming the field and the position.
    """
    members = _members(given)
    if top_k is not None and members == (OUTPUTS,):
        raise InvalidCombination(
            "top_k is given, and return asks for neither probabilities nor labels",
            field="top_k",
            given=top_k,
            expected="probabilities or labels in return, or no top_k",
        )
    if top_k is not None and top_k > out_features:
        raise OutOfRange(
            f"top_k is {shorten(top_k)}; the layer has {out_features} outputs",
            field="top_k",
            given=top_k,
            expected=f"a whole number from 1 to {out_features}",
        )
    return None if members == (OUTPUTS,) else PredictOptions(members, top_k)


def _members(given: object) -> tuple[str, ...]:
    if not isinstance(given, list):
        raise WrongType("return must be a list of strings", field="return", given=given, expected=_EXPECTED)
    if not given:
        raise OutOfRange("return is empty", field="return", given=given, expected=_EXPECTED)
    seen: set[str] = set()
    for position, name in enumerate(given):
        place = f"return, position {position}"
        if not isinstance(name, str):
            raise WrongType(f"{place}: not a string", field="return", given=name, expected=_EXPECTED)
        if name not in MEMBERS:
            detail = f"{place}: there is no {shorten(name)} to answer with"
            raise OutOfRange(detail, field="return", given=name, expected=_EXPECTED)
        if name in seen:
            raise InvalidCombination(f"{place}: {name} twice", field="return", given=name, expected=_EXPECTED)
        seen.add(name)
    return tuple(name for name in MEMBERS if name in seen)
