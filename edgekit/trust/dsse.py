"""DSSE envelopes (Dead Simple Signing Envelope, v1.0.2): a payload, its type, and signatures over both.

Verification only; signing is in :mod:`edgekit.trust.signer`, which a device never loads. Rules beyond the specification: the
envelope's JSON must be canonical, one public key counts once whatever it is called, and a payload is returned only after its
signatures were checked.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from edgekit.errors import ArtifactError, TrustError
from edgekit.schema.base import encode_json
from edgekit.trust.keys import PublicKey, unique_keys

MAX_SIGNATURES = 64
_SIGNATURE_BYTES = 64


class EnvelopeSignature(msgspec.Struct, frozen=True, kw_only=True):
    """One signature; ``keyid`` says which key claims to have made it."""

    keyid: str
    sig: bytes


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """The envelope; in JSON ``payload`` and ``sig`` are base64."""

    payload_type: str = msgspec.field(name="payloadType")
    payload: bytes
    signatures: tuple[EnvelopeSignature, ...]


def signed_bytes(payload: bytes, payload_type: str) -> bytes:
    """The pre-authentication encoding: what a signature covers."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def encode_envelope(envelope: Envelope) -> bytes:
    """The canonical JSON of an envelope."""
    return encode_json(envelope)


def decode_envelope(data: bytes, *, name: str = "envelope") -> Envelope:
    """Read an envelope without checking its signatures.

    Raises:
        ArtifactError: ``envelope.malformed`` when it is not DSSE JSON in canonical form.
    """
    try:
        envelope = msgspec.json.decode(data, type=Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError("envelope.malformed", f"{name}: not a DSSE envelope: {error}.") from error
    if encode_envelope(envelope) != data:
        raise ArtifactError("envelope.malformed", f"{name}: not in canonical form; it was changed after signing.")
    if len(envelope.signatures) > MAX_SIGNATURES:
        raise ArtifactError("envelope.malformed", f"{name}: more than {MAX_SIGNATURES} signatures.")
    return envelope


def valid_keys(envelope: Envelope, keys: Iterable[PublicKey]) -> tuple[PublicKey, ...]:
    """Those of ``keys`` that signed the envelope; the same key material counts once."""
    covered = signed_bytes(envelope.payload, envelope.payload_type)
    return tuple(
        key
        for key in unique_keys(keys)
        if any(
            signature.keyid == key.keyid and len(signature.sig) == _SIGNATURE_BYTES and key.is_valid(signature.sig, covered)
            for signature in envelope.signatures
        )
    )


def verify_envelope(data: bytes, keys: Iterable[PublicKey], *, payload_type: str, threshold: int = 1) -> bytes:
    """Verify an envelope.

    Args:
        data: the envelope's JSON.
        keys: the trusted keys.
        payload_type: the type that is expected; a signature for another purpose is not accepted.
        threshold: how many different keys must have signed.

    Returns:
        The payload.

    Raises:
        ArtifactError: ``envelope.malformed``.
        TrustError: ``trust.payload_type`` or ``trust.signature``.
    """
    if threshold < 1:
        raise ValueError("threshold must be at least 1")
    envelope = decode_envelope(data)
    if envelope.payload_type != payload_type:
        raise TrustError("trust.payload_type", f"the envelope holds {envelope.payload_type}, expected {payload_type}.")
    signers = valid_keys(envelope, keys)
    if len(signers) < threshold:
        raise TrustError("trust.signature", f"{len(signers)} of {threshold} needed signatures by trusted keys are valid.")
    return envelope.payload
