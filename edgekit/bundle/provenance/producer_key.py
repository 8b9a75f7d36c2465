"""A producer's key: ECDSA on NIST P-256, for OpenSSF Model Signing (its tools refuse Ed25519).

The publisher's Ed25519 key says "this bundle may be published"; the producer's key says "these are the files that I made" and
is understood outside edgekit. Private keys are PKCS8 PEM, mode 0600 from their creation on, encrypted where
``EDGEKIT_KEY_PASSPHRASE`` is set. Signatures are deterministic (RFC 6979): the same files give the same bytes.

Needs ``cryptography``, which is imported when a key is used.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.errors import EnvironmentFault, UsageError
from edgekit.trust.keys import MAX_KEY_FILE_BYTES, create_file

PASSPHRASE_VARIABLE = "EDGEKIT_KEY_PASSPHRASE"  # noqa: S105 - the variable's name
KEYGEN = "edgekit bundle keygen --scheme ecdsa-p256 --out NAME"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class ProducerPublicKey:
    """The public half: PEM, and ``keyid``, the SHA-256 of that PEM, as model signatures name their key."""

    pem: bytes
    _key: Any = field(repr=False, compare=False)

    @property
    def keyid(self) -> str:
        """What a signature's hint says."""
        return hashlib.sha256(self.pem).hexdigest()

    def is_valid(self, signature: bytes, data: bytes) -> bool:
        """Whether this DER signature over ``data`` was made by this key."""
        crypto = _crypto()
        try:
            self._key.verify(signature, data, crypto.ec.ECDSA(crypto.hashes.SHA256()))
        except crypto.InvalidSignature:
            return False
        return True


class ProducerKey:
    """The private half."""

    def __init__(self, private: Any) -> None:
        self._private = private
        self.public_key = _public(private.public_key())

    def __repr__(self) -> str:
        return f"ProducerKey({self.public_key.keyid})"

    def sign(self, data: bytes) -> bytes:
        """The DER signature over ``data``, the same each time (RFC 6979)."""
        crypto = _crypto()
        signature: bytes = self._private.sign(data, crypto.ec.ECDSA(crypto.hashes.SHA256(), deterministic_signing=True))
        return signature

    def to_pem(self, passphrase: str = "") -> bytes:
        """PKCS8 PEM, encrypted where there is a passphrase."""
        forms = _crypto().serialization
        protection = forms.BestAvailableEncryption(passphrase.encode()) if passphrase else forms.NoEncryption()
        pem: bytes = self._private.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, protection)
        return pem


@dataclass(frozen=True)
class _Crypto:
    ec: Any
    hashes: Any
    serialization: Any
    InvalidSignature: Any


def _crypto() -> _Crypto:
    try:
        base = "cryptography.hazmat.primitives."
        return _Crypto(
            ec=importlib.import_module(base + "asymmetric.ec"),
            hashes=importlib.import_module(base + "hashes"),
            serialization=importlib.import_module(base + "serialization"),
            InvalidSignature=importlib.import_module("cryptography.exceptions").InvalidSignature,
        )
    except ImportError as error:
        raise EnvironmentFault(
            "cryptography.missing",
            "model signatures need the package cryptography.",
            hint="pip install 'securesystemslib[crypto]'; the publisher's signature can be verified without it.",
        ) from error


def _public(key: Any) -> ProducerPublicKey:
    forms = _crypto().serialization
    pem = key.public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    return ProducerPublicKey(pem, key)


def generate_producer_key() -> ProducerKey:
    """A new key.

    Raises:
        EnvironmentFault: ``cryptography.missing``, here and in all of this module.
    """
    ec = _crypto().ec
    return ProducerKey(ec.generate_private_key(ec.SECP256R1()))


def make_producer_key(private: Path, public: Path) -> str:
    """Make a key pair in two new files.

    Returns:
        The key's id.

    Raises:
        UsageError: ``key.exists`` or ``key.unwritable``.
    """
    if public.exists():
        raise UsageError("key.exists", f"{public}: exists already and is not replaced.", hint="Give another name.")
    key = generate_producer_key()
    create_file(private, key.to_pem(os.environ.get(PASSPHRASE_VARIABLE, "")), mode=0o600)
    create_file(public, key.public_key.pem, mode=0o644)
    return key.public_key.keyid


def load_producer_key(path: Path) -> ProducerKey:
    """Read a private key.

    Raises:
        UsageError: ``key.not_found``, ``key.mode`` when others may read it, ``key.public``, ``key.passphrase`` when it is
            encrypted and the passphrase is missing or wrong, ``key.malformed`` when it is not a P-256 private key.
    """
    data, mode = _read(path, "private")
    if b"PRIVATE KEY-----" not in data:
        if b"PUBLIC KEY-----" in data:
            raise UsageError(
                "key.public", f"{path}: this is a public key; a private key is wanted.", hint="Give the .pem file."
            )
        raise _malformed(path, "private")
    if mode & _OTHERS:
        raise UsageError(
            "key.mode",
            f"{path}: this private key has mode {stat.S_IMODE(mode):04o}: others can use it.",
            hint=f"chmod 600 {path}; if others did read it, make a new key.",
        )
    passphrase = os.environ.get(PASSPHRASE_VARIABLE, "")
    is_encrypted = b"ENCRYPTED PRIVATE KEY" in data
    if is_encrypted and not passphrase:
        raise UsageError("key.passphrase", f"{path}: the key is encrypted.", hint=f"Set {PASSPHRASE_VARIABLE}.")
    crypto = _crypto()
    try:
        key = crypto.serialization.load_pem_private_key(data, passphrase.encode() if is_encrypted else None)
    except Exception:  # noqa: BLE001 - the parser raises many types, and their texts may name key material
        if is_encrypted:
            text = f"{path}: the passphrase does not open this key."
            raise UsageError("key.passphrase", text, hint=f"Check {PASSPHRASE_VARIABLE}.") from None
        raise _malformed(path, "private") from None
    if not isinstance(key, crypto.ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise _malformed(path, "private")
    return ProducerKey(key)


def load_producer_public_key(path: Path) -> ProducerPublicKey:
    """Read a public key.

    Raises:
        UsageError: ``key.not_found``, ``key.private`` or ``key.malformed``.
    """
    data, _ = _read(path, "public")
    if b"PRIVATE KEY-----" in data:
        text = f"{path}: this is a private key; a public key is wanted."
        raise UsageError("key.private", text, hint="Give the .pub file beside it.")
    crypto = _crypto()
    try:
        key = crypto.serialization.load_pem_public_key(data)
    except (ValueError, TypeError):
        raise _malformed(path, "public") from None
    if not isinstance(key, crypto.ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise _malformed(path, "public")
    return _public(key)


def _read(path: Path, half: str) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            return file.read(MAX_KEY_FILE_BYTES), os.fstat(file.fileno()).st_mode
    except OSError as error:
        text = f"{path}: cannot read this {half} key: {error.strerror}."
        raise UsageError("key.not_found", text, hint=f'Make one with "{KEYGEN}".') from error


def _malformed(path: Path, half: str) -> UsageError:
    text = f"{path}: not a {half} key on the curve P-256 in PEM, which model signatures need."
    return UsageError("key.malformed", text, hint=f'Make one with "{KEYGEN}".')
