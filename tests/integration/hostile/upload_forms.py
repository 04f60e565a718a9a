"""The two forms in which PEFT's files come in."""

from collections.abc import Mapping, Sequence
from typing import Any

from tests.integration.hostile.bodies import CONFIG_FILE, MULTIPART, TENSOR_FILE, ZIP, config, multipart_of, zip_of
from tests.integration.hostile.case import Case

Both = tuple[Case, Case]
"""A case as a zip, and in the parts of a multipart body."""


def upload(
    title: str, code: str, files: Mapping[str, bytes], /, *says: str, field: str | None = None, row: int | None = None
) -> Both:
    """The upload of these files."""

    def case(form: str, body: bytes, kind: str) -> Case:
        return Case(
            name=f"{title}, {form}",
            method="PUT",
            path="/adapters/fresh",
            code=code,
            says=says,
            field=field,
            row=row,
            body=body,
            headers={"Content-Type": kind},
        )

    return case("zipped", zip_of(files), ZIP), case("in parts", multipart_of(files), MULTIPART)


def tensors(title: str, code: str, file: bytes, /, *says: str, row: int | None = None, **keys: Any) -> Both:
    """The upload of this file of tensors, with a config that has these keys."""
    return upload(title, code, {CONFIG_FILE: config(**keys), TENSOR_FILE: file}, *says, row=row)


def cases(pairs: Sequence[Both]) -> list[Case]:
    """All of them zipped, and every seventh in parts: both forms end in the same two files."""
    return [zipped for zipped, _ in pairs] + [in_parts for _, in_parts in pairs[::7]]
