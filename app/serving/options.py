"""Options of a predict request: the members `return` and `top_k`."""

from typing import NamedTuple

from adapters.errors import InvalidCombination, OutOfRange, WrongType, shorten

# Values of `return`, in the order of the answer's members.
OUTPUTS, PROBABILITIES, LABELS = MEMBERS = ("outputs", "probabilities", "labels")
_EXPECTED = f"1 to {len(MEMBERS)} of {', '.join(MEMBERS)}, each once"


class PredictOptions(NamedTuple):
    """Options of a request that asks for more than its outputs."""

    members: tuple[str, ...]
    """Subset of `MEMBERS`, in their order."""
    top_k: int | None
    """Number of most probable classes. None means all probabilities, and one label for each row."""


def read_options(given: object, top_k: int | None, *, out_features: int) -> PredictOptions | None:
    """Check `return` and `top_k` (at least 1); return None if they ask for the outputs alone.

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
        location = f"return, position {position}"
        if not isinstance(name, str):
            raise WrongType(f"{location}: not a string", field="return", given=name, expected=_EXPECTED)
        if name not in MEMBERS:
            detail = f"{location}: there is no {shorten(name)} to answer with"
            raise OutOfRange(detail, field="return", given=name, expected=_EXPECTED)
        if name in seen:
            raise InvalidCombination(f"{location}: {name} twice", field="return", given=name, expected=_EXPECTED)
        seen.add(name)
    return tuple(name for name in MEMBERS if name in seen)
