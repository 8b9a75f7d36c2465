"""What the API tells of identities and claims."""

from __future__ import annotations

from typing import Literal

from edgekit.schema.base import Record

IdentityState = Literal["valid", "due", "expired", "revoked"]
"""``due``: it should have been renewed by now, and still holds."""
ClaimState = Literal["open", "used", "expired", "withdrawn"]


class IdentityView(Record, frozen=True, kw_only=True):
    """A device's newest certificate."""

    site: str
    device: str
    state: IdentityState
    serial: str
    not_before_ms: int
    not_after_ms: int
    issued_ms: int
    enrolled_ms: int
    revoked_ms: int = 0
    reason: str = ""
    labels: dict[str, str] = {}


class IdentityPage(Record, frozen=True, kw_only=True):
    """Identities by site and device; ``next`` is the ``after`` of the page after this one, empty at the end."""

    identities: tuple[IdentityView, ...]
    next: str = ""


class ClaimView(Record, frozen=True, kw_only=True):
    """A claim without its secret."""

    id: str
    site: str
    device: str
    created_ms: int
    created_by: str
    expires_ms: int
    state: ClaimState
    used_ms: int = 0
    labels: dict[str, str] = {}


class BrokerFiles(Record, frozen=True, kw_only=True):
    """What the broker must know: access rules, and the revocation lists in PEM."""

    acl: str
    crl: str
