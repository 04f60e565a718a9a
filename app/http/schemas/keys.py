"""Keys and sessions as clients see them."""

from pydantic import Field

from adapters.access.keys import MAX_NAME_CHARACTERS, Scope
from app.http.schemas.fields import AnswerBody, PageBody, RequestBody


class KeyRequest(RequestBody):
    """A key to create."""

    name: str = Field(description=f"What the key is for: 1 to {MAX_NAME_CHARACTERS} characters.")
    scopes: list[str] = Field(
        description="What the key may do.", json_schema_extra={"items": {"enum": [*Scope]}, "minItems": 1}
    )
    tenant: str | None = Field(None, description="An operator may name another tenant, which is created if needed.")
    expires_at: str | None = Field(None, description="RFC 3339 time after which the key is refused.")


class IssuedKeyBody(AnswerBody):
    """New key. Its text is stored nowhere, and no other answer has it."""

    id: str
    key: str = Field(description="Text of the key, for `Authorization: Bearer`.")
    tenant: str
    scopes: list[Scope]
    expires_at: str | None


class KeyBody(AnswerBody):
    """Key without its text."""

    id: str
    tenant: str
    name: str
    scopes: list[Scope]
    created_at: str
    expires_at: str | None
    revoked_at: str | None


class KeyPage(PageBody[KeyBody]):
    """Page of the list of keys."""


class SessionRequest(RequestBody):
    """A key to sign in with."""

    key: str
