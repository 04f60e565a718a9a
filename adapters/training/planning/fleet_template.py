"""Template of a fleet's names, such as `acme-{tenant}`."""

import re

import numpy as np

from adapters.errors import InvalidCombination, InvalidName, LoraplexError, MissingField, OutOfRange
from adapters.jobs.job_adapters import JobAdapter
from adapters.names import check_name
from adapters.training.planning.rows import Rows

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_INLINE_COLUMN = "group"


def fleet_adapters(template: str, rows: Rows, *, max_groups: int) -> list[JobAdapter]:
    """Return the adapters of a fleet: one for each group, in the order of the group codes.

    Raises the `InvalidInput` that names the field.
    """
    placeholders = _PLACEHOLDER.findall(template)
    if not placeholders:
        check_name(template)
    column = _INLINE_COLUMN if rows.table is None else rows.origin.get("group_by")
    if rows.fleet is None or column is None:
        missing = "data.groups" if rows.table is None else "data.group_by"
        raise MissingField(
            f"name has a placeholder, so each group gets an adapter: say with {missing} which group a row is of",
            field=missing,
            given=template,
            expected="groups, or a name without a placeholder",
        )
    if placeholders != [column]:
        raise InvalidName(
            f"name has to have {{{column}}}, once, and no other placeholder",
            field="name",
            given=template,
            expected=f"a template such as acme-{{{column}}}",
        )
    values = rows.fleet.values
    if len(values) > max_groups:
        raise OutOfRange(
            f"the fleet has {len(values)} groups, at most {max_groups} are accepted (LORAPLEX_MAX_GROUPS)",
            field="data",
            given=f"{len(values)} groups",
            expected=f"at most {max_groups} groups",
        )
    sizes = np.bincount(rows.fleet.codes_N, minlength=len(values))
    return [
        JobAdapter(_expand(template, value), str(value), int(size), position=position)
        for position, (value, size) in enumerate(zip(values, sizes, strict=True))
    ]


def check_not_fleet(rows: Rows) -> None:
    """Raise `InvalidCombination` if rows are grouped for a fleet and the name is that of one adapter."""
    if "group_by" in rows.origin:
        placeholder = f"{{{rows.origin['group_by']}}}"
        raise InvalidCombination(
            f"data.group_by trains an adapter a group: the name has to have {placeholder}",
            field="name",
            expected=f"a template such as acme-{placeholder}",
        )


def _expand(template: str, value: str | int) -> str:
    try:
        return check_name(_PLACEHOLDER.sub(lambda _: str(value), template))
    except LoraplexError as error:
        raise error.explain(before=f"the group {str(value)[:80]!r} makes no name: ") from None
