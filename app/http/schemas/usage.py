"""Usage as clients see it."""

from pydantic import Field

from app.http.schemas.fields import AnswerBody, PageBody


class HourUsageBody(AnswerBody):
    """Answered predictions of a tenant in one hour."""

    hour: str = Field(description="Begin of the hour.")
    requests: int
    rows: int


class AdapterUsageBody(HourUsageBody):
    """Answered predictions in one hour that named an adapter. A request counts once for each adapter that it names."""

    adapter: str | None = Field(description="Null for the bare base layer; `*` for several that were counted together.")


class KeyUsageBody(HourUsageBody):
    """Answered predictions of a key in one hour."""

    key: str | None = Field(description="Id of the key; null without keys.")


class UsagePage(PageBody[AdapterUsageBody | KeyUsageBody | HourUsageBody]):
    """Page of the hours, oldest first."""
