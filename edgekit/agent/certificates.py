"""Requests for certificates, and what the agent must know of one that it was given; no package is needed for either.

>>> from edgekit.trust.p256 import PrivateKey
>>> make_request(PrivateKey.generate(), "lab/cam-7").startswith("-----BEGIN CERTIFICATE REQUEST-----")
True
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime

from edgekit.errors import ArtifactError
from edgekit.trust import der
from edgekit.trust.p256 import PrivateKey, public_key_info

REQUEST, CERTIFICATE = "CERTIFICATE REQUEST", "CERTIFICATE"
_COMMON_NAME = der.oid("2.5.4.3")
_ECDSA_SHA256 = der.sequence(der.oid("1.2.840.10045.4.3.2"))
_VERSION = 0xA0


@dataclass(frozen=True, kw_only=True)
class CertificateFacts:
    """One certificate. ``key_info`` is its SubjectPublicKeyInfo."""

    common_name: str
    not_before: datetime
    not_after: datetime
    key_info: bytes
    fingerprint: str
    raw: bytes


def make_request(key: PrivateKey, common_name: str) -> str:
    """PKCS#10 (RFC 2986) in PEM, signed with the key that it is for."""
    subject = der.sequence(der.set_of(der.sequence(_COMMON_NAME, der.utf8(common_name)))) if common_name else der.sequence()
    body = der.sequence(der.integer(0), subject, public_key_info(key.public), der.element(_VERSION, b""))
    return der.to_pem(der.sequence(body, _ECDSA_SHA256, der.bits(key.sign(body))), REQUEST)


def read_certificates(pem: str | bytes) -> tuple[CertificateFacts, ...]:
    """The certificates of a file, in order; who signed them is OpenSSL's business.

    Raises:
        ArtifactError: ``certificate.malformed``.
    """
    return tuple(_read(raw) for raw in der.from_pem(pem, CERTIFICATE))


def _read(raw: bytes) -> CertificateFacts:
    try:
        (whole,) = der.read_all(raw)
        fields = whole.children()[0].children()
        fields = fields[1:] if fields[0].tag == _VERSION else fields
        _serial, _algorithm, _issuer, validity, subject, key_info = fields[:6]
        begin, end = validity.children()
        names = [part.children() for group in subject.children() for part in group.children()]
        common = [value.content.decode() for kind, value in names if kind.raw == _COMMON_NAME]
    except (ValueError, IndexError) as error:
        raise ArtifactError("certificate.malformed", "this is no X.509 certificate.") from error
    return CertificateFacts(
        common_name=common[-1] if common else "",
        not_before=begin.time(),
        not_after=end.time(),
        key_info=key_info.raw,
        fingerprint=f"sha256:{hashlib.sha256(raw).hexdigest()}",
        raw=raw,
    )
