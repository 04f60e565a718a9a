"""Tenants as clients see them."""

from pydantic import Field

from app.http.schemas.fields import AnswerBody, RequestBody

# A request in 1,000 seconds. The waiting time of a tiny rate would not be a finite number.
_MIN_RATE = 0.001
_MAX_LIMIT = 2**53


def _rate(description: str) -> float | None:
    limit: float | None = Field(None, ge=_MIN_RATE, le=_MAX_LIMIT, description=description)
    return limit


def _count(description: str) -> int | None:
    limit: int | None = Field(None, ge=0, le=_MAX_LIMIT, description=description)
    return limit


class LimitsRequest(RequestBody):
    """Limits of a tenant; null for no limit."""

    requests_per_second: float | None = _rate("Requests, except those that need the scope `operator`.")
    rows_per_second: float | None = _rate("Rows of predict and infer requests.")
    concurrent_jobs: int | None = _count("Jobs that run at the same time.")
    queued_jobs: int | None = _count("Jobs that wait for a trainer.")
    adapters: int | None = _count("Adapters, without those in the trash.")
    stored_bytes: int | None = _count("Bytes of versions, with those in the trash.")
    dataset_bytes: int | None = _count("Bytes of the versions of data sets.")


class TenantRequest(RequestBody):
    """A tenant to create, or the new limits of one."""

    limits: LimitsRequest = Field(default_factory=LimitsRequest)


class LimitsBody(AnswerBody):
    """Limits of a tenant; null for no limit."""

    requests_per_second: float | None
    rows_per_second: float | None
    concurrent_jobs: int | None
    queued_jobs: int | None
    adapters: int | None
    stored_bytes: int | None
    dataset_bytes: int | None


class TenantBody(AnswerBody):
    """Tenant and its limits."""

    name: str
    created_at: str
    limits: LimitsBody
