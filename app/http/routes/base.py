"""`GET /base`."""

from app.http.dependencies import ServiceOf
from app.http.schemas.adapters import BaseBody


def show_base(service: ServiceOf) -> BaseBody:
    """The frozen layer that every adapter adds to: its shape, fingerprint and feature space."""
    return BaseBody.of(service.base, service.settings.feature_space)
