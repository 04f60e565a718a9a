"""The two forms in which PEFT's files come in."""

from collections.abc import Mapping

from tests.hostile.bodies import MULTIPART, ZIP, multipart_of, zip_of
from tests.hostile.case import Case

FORMS = ("zipped", "in parts")


def upload(
    title: str,
    form: str,
    files: Mapping[str, bytes],
    code: str,
    /,
    *says: str,
    field: str | None = None,
    row: int | None = None,
) -> Case:
    """The upload of these files in one of the forms."""
    zipped = form == "zipped"
    return Case(
        name=title,
        method="PUT",
        path="/adapters/fresh",
        code=code,
        says=says,
        field=field,
        row=row,
        body=zip_of(files) if zipped else multipart_of(files),
        headers={"Content-Type": ZIP if zipped else MULTIPART},
    )
