"""The parts of an infer request's JSON, one by one: objects, fields, parameters.

Each raises `WrongType`, naming the field, where a value is of another type.
"""

from collections.abc import Mapping

from adapters.errors import MissingField, UnknownField, WrongType, shorten


def parameters_of(holder: Mapping[str, object], field: str) -> dict[str, object]:
    """The parameters of a request or tensor: strings, numbers and booleans; which ones is free, by the protocol."""
    parameters = object_of(holder.get("parameters", {}), field)
    for key, value in parameters.items():
        if not isinstance(value, str | int | float):
            raise wrong(f"{field}.{key}", value, "a string, a number or a boolean")
    return parameters


def flag(parameters: Mapping[str, object], within: str, key: str) -> bool | None:
    """A parameter that is true or false; None where it is not there."""
    value = parameters.get(key)
    if value is not None and not isinstance(value, bool):
        raise wrong(f"{within}.{key}", value, "true or false")
    return value


def object_of(value: object, field: str, known: tuple[str, ...] | None = None) -> dict[str, object]:
    """`value` itself where it is an object with no other fields than the known ones."""
    if not isinstance(value, dict):
        raise wrong(field, value, "an object")
    for key in value:
        if known is not None and key not in known:
            raise UnknownField(
                f"{shorten(key)} is not a field of {field}; the fields are {', '.join(known)}",
                field=key,
                given=key,
                expected=f"one of {', '.join(known)}",
            )
    return value


def required(holder: Mapping[str, object], field: str, expected: str, *, within: str = "") -> object:
    """The value of a field; raises `MissingField`."""
    if field not in holder:
        raise MissingField(f"{within}{field} is missing", field=f"{within}{field}", expected=expected)
    return holder[field]


def wrong(field: str, given: object, expected: str) -> WrongType:
    """The error for a value of another type than is expected."""
    return WrongType(f"{shorten(field)} must be {expected}", field=field, given=given, expected=expected)
