"""Private keys: generate, keep and sign. Needs the ``cryptography`` package; a device and the fleet server never load this.

Key files are PKCS8 PEM, created with mode 0600 (never narrowed afterwards), encrypted when a passphrase is given or set in
``EDGEKIT_KEY_PASSPHRASE``. A key that others can read is refused. Keys and passphrases are never logged.

    >>> signer = generate_signer()
    >>> signer.public_key.is_valid(signer.sign(b"hello"), b"hello")
    True
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]

from edgekit.errors import UsageError
from edgekit.trust.dsse import Envelope, EnvelopeSignature, encode_envelope, signed_bytes
from edgekit.trust.keys import MAX_KEY_FILE_BYTES, PublicKey, create_file

PASSPHRASE_VARIABLE = "EDGEKIT_KEY_PASSPHRASE"  # noqa: S105 - the variable's name
KEY_MODE = 0o600
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Signer:
    """An Ed25519 private key."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self._public = PublicKey(private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    def __repr__(self) -> str:
        return f"Signer({self._public.keyid})"

    @property
    def public_key(self) -> PublicKey:
        """The public half."""
        return self._public

    @property
    def keyid(self) -> str:
        """The public key's id."""
        return self._public.keyid

    def sign(self, data: bytes) -> bytes:
        """The 64-byte signature over ``data``."""
        return self._private.sign(data)

    def tuf_signer(self) -> CryptoSigner:
        """The same key for python-tuf's Metadata API."""
        return CryptoSigner(self._private)

    def to_pem(self, passphrase: str = "") -> bytes:
        """PKCS8 PEM, encrypted where there is a passphrase."""
        protection: KeySerializationEncryption = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
        return self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)


def generate_signer() -> Signer:
    """A new key."""
    return Signer(Ed25519PrivateKey.generate())


def _passphrase(given: str | None) -> str:
    return os.environ.get(PASSPHRASE_VARIABLE, "") if given is None else given


def save_signer(signer: Signer, path: Path, *, passphrase: str | None = None) -> None:
    """Write a new key file, mode 0600 from its creation on.

    Args:
        signer: the key.
        path: a file that does not exist yet.
        passphrase: encrypts the file; None takes ``EDGEKIT_KEY_PASSPHRASE``, an empty text does not encrypt.

    Raises:
        UsageError: ``key.exists`` or ``key.unwritable``.
    """
    create_file(path, signer.to_pem(_passphrase(passphrase)), mode=KEY_MODE)


def load_signer(path: Path, *, passphrase: str | None = None) -> Signer:
    """Read a key file.

    Raises:
        UsageError: ``key.not_found``, ``key.mode`` when others may read it, ``key.passphrase`` when it is encrypted and the
            passphrase is missing or wrong, ``key.public`` when it is a public key, ``key.malformed`` when it is not an
            Ed25519 private key.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_KEY_FILE_BYTES)
    except OSError as error:
        raise UsageError(
            "key.not_found",
            f"{path}: cannot read this private key: {error.strerror}.",
            hint='Make one with "edgekit bundle keygen --out NAME".',
        ) from error
    if b"PUBLIC KEY" in data and b"PRIVATE KEY" not in data:
        raise UsageError(
            "key.public", f"{path}: this is a public key; a private key is wanted.", hint="Give the .pem file beside it."
        )
    if mode & _OTHERS:
        raise UsageError(
            "key.mode",
            f"{path}: this private key has mode {stat.S_IMODE(mode):04o}: others can use it.",
            hint=f"chmod 600 {path}; if others did read it, make a new key.",
        )
    return Signer(_parse_private(path, data, _passphrase(passphrase)))


def _parse_private(path: Path, data: bytes, passphrase: str) -> Ed25519PrivateKey:
    if not data:
        raise UsageError(
            "key.malformed", f"{path}: the key file is empty.", hint="An interrupted command left it; delete it, make it again."
        )
    is_encrypted = b"ENCRYPTED PRIVATE KEY" in data
    if is_encrypted and not passphrase:
        raise UsageError("key.passphrase", f"{path}: the key is encrypted.", hint=f"Set {PASSPHRASE_VARIABLE}.")
    try:
        key = load_pem_private_key(data, passphrase.encode() if is_encrypted else None)
    except Exception as error:  # noqa: BLE001 - the parser raises many types, and their texts may name key material
        if is_encrypted:
            raise UsageError(
                "key.passphrase", f"{path}: the passphrase does not open this key.", hint=f"Check {PASSPHRASE_VARIABLE}."
            ) from None
        raise UsageError(
            "key.malformed",
            f"{path}: not a private key in PEM ({type(error).__name__}).",
            hint='Make one with "edgekit bundle keygen".',
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError("key.malformed", f"{path}: not an Ed25519 key.", hint='Make one with "edgekit bundle keygen".')
    return key


def sign_envelope(payload: bytes, signers: Sequence[Signer], *, payload_type: str) -> bytes:
    """A DSSE envelope with one signature per key, by keyid."""
    covered = signed_bytes(payload, payload_type)
    by_keyid = {signer.keyid: signer for signer in signers}
    signatures = tuple(EnvelopeSignature(keyid=keyid, sig=by_keyid[keyid].sign(covered)) for keyid in sorted(by_keyid))
    return encode_envelope(Envelope(payload_type=payload_type, payload=payload, signatures=signatures))
