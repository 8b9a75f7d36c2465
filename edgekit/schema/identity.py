"""A device's identity: what it and the fleet server say to each other when a certificate is asked for.

A claim is a word that is used once; with it a device that nobody knows yet gets its first certificate. Later ones it asks for
with the key of the one that it has, by a signature in the request itself: that holds behind any proxy that ends TLS.

>>> Enrolment(claim="a.b", request="…").site
''
"""

from __future__ import annotations

import hashlib

from edgekit.schema.base import Moment, Record

MAX_REQUEST_BYTES = 32 << 10
"""A longer body is no request for a certificate."""
SEPARATOR = "/"
"""Between site and device in a certificate's common name, which a broker takes for the user name."""
MAX_COMMON_NAME = 64
"""As X.520 has it (ub-common-name)."""
_RENEWAL = b"edgekit renewal v1\0"


class Enrolment(Record, frozen=True, kw_only=True):
    """``POST /api/v1/enroll``. ``site`` and ``device`` are given by a device that was told its name otherwise, too."""

    claim: str
    """``ID.SECRET``."""
    request: str
    """PKCS#10 in PEM; its subject does not count, the claim's does."""
    site: str = ""
    device: str = ""


class Renewal(Record, frozen=True, kw_only=True):
    """``POST /api/v1/renew``: a request for a new key's certificate, vouched for by the present one."""

    certificate: str
    """The present one, PEM."""
    request: str
    """PKCS#10 in PEM, with another key."""
    signature: bytes
    """ECDSA with SHA-256 by the present key over :func:`renewal_bytes`, DER."""


class Issued(Record, frozen=True, kw_only=True):
    """The answer to both."""

    site: str
    device: str
    certificate: str
    """PEM."""
    authorities: str
    """Those by which the fleet's own servers are known, PEM, one or several."""
    not_before: Moment
    not_after: Moment
    labels: dict[str, str] = {}
    broker: str = ""
    """Where the fleet's broker is, for a device that was not told otherwise."""
    repository: str = ""


class ClaimMade(Record, frozen=True, kw_only=True):
    """``POST /api/v1/claims``: the only time that the claim's secret is seen."""

    id: str
    claim: str
    site: str
    device: str
    expires_at: Moment
    fingerprint: str
    """Of the authority of the fleet's servers: ``sha256:…``."""


class DeviceIdentity(Record, frozen=True, kw_only=True):
    """What a device keeps of its enrolment beside key and certificate, for the agent to read."""

    site: str
    device: str
    fleet: str
    """The server that gave it, to which renewals go."""
    labels: dict[str, str] = {}
    broker: str = ""
    repository: str = ""
    has_public_server: bool = False
    """The fleet server is known by the system's authorities, not by the fleet's own."""


def common_name(site: str, device: str) -> str:
    """What a device's certificate is made out to.

    >>> common_name("lab", "cam-7")
    'lab/cam-7'
    """
    return f"{site}{SEPARATOR}{device}"


def renewal_bytes(certificate: bytes, request: bytes) -> bytes:
    """What the present key signs.

    Args:
        certificate: the present certificate, DER.
        request: the new PKCS#10 request, DER.
    """
    return _RENEWAL + hashlib.sha256(certificate).digest() + hashlib.sha256(request).digest()
