"""Entries of the audit log as clients see them."""

from pydantic import Field

from app.http.schemas.fields import AnswerBody, PageBody


class AuditEntryBody(AnswerBody):
    """One change of one resource, and who made it."""

    time: str
    key_id: str | None = Field(
        description="Id of the key; `cli` for a command on the data folder, `service` for the service itself, and null "
        "for a request without a key."
    )
    tenant: str
    action: str = Field(description="What was done, such as `adapter.publish` or `key.revoke`.")
    resource: str = Field(description="Path of the resource, such as `adapters/acme`.")
    digest_before: str | None = Field(description="Digest of what was live before, or of the newest data set.")
    digest_after: str | None = Field(description="Digest of what is live afterwards, or of the version that was added.")
    request_id: str | None = Field(description="`X-Request-Id` of the request; of a job, of the one that submitted it.")
    client_address: str | None = Field(description="Address that the request came from.")


class AuditPage(PageBody[AuditEntryBody]):
    """Page of the audit log."""
