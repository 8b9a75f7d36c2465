"""Public keys: Ed25519, read from PEM or JSON, and a verdict on a signature.

Needs no ``cryptography``: a PEM public key is a fixed prefix and 32 bytes, and securesystemslib verifies in pure Python where
that package is missing. Its modules are imported when a signature is looked at, not before: a program that only carries keys
stays small.

    >>> key = PublicKey(bytes(32))
    >>> key.keyid[:12]
    '7f7373360bc9'
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgekit.durable import create_durably
from edgekit.errors import TrustError, UsageError

KEY_BYTES = 32
MAX_KEY_FILE_BYTES = 64 * 1024
_SPKI_PREFIX = bytes.fromhex("302a300506032b6570032100")
"""DER of SubjectPublicKeyInfo for Ed25519 (RFC 8410, section 4) up to the 32 key bytes."""
_PEM_BEGIN, _PEM_END = "-----BEGIN PUBLIC KEY-----", "-----END PUBLIC KEY-----"


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 public key: equal when the key material is equal."""

    public: bytes

    def __post_init__(self) -> None:
        if len(self.public) != KEY_BYTES:
            raise TrustError(
                "key.malformed", f"a public key of {len(self.public)} bytes: an Ed25519 public key has {KEY_BYTES} bytes."
            )

    @property
    def keyid(self) -> str:
        """The SHA-256 of the key's canonical JSON, as securesystemslib and TUF compute it."""
        record = {"keytype": "ed25519", "keyval": {"public": self.public.hex()}, "scheme": "ed25519"}
        return hashlib.sha256(json.dumps(record, separators=(",", ":"), sort_keys=True).encode()).hexdigest()

    def is_valid(self, signature: bytes, data: bytes) -> bool:
        """Whether ``signature`` (64 bytes) over ``data`` was made by this key."""
        from securesystemslib.exceptions import UnverifiedSignatureError  # noqa: PLC0415 - see the module's docstring
        from securesystemslib.signer import Signature, SSlibKey  # type: ignore[attr-defined]  # noqa: PLC0415

        key = SSlibKey(self.keyid, "ed25519", "ed25519", {"public": self.public.hex()})
        try:
            key.verify_signature(Signature(self.keyid, signature.hex()), data)
        except UnverifiedSignatureError:
            return False
        return True

    def to_pem(self) -> str:
        """The key as PEM (SubjectPublicKeyInfo)."""
        return f"{_PEM_BEGIN}\n{base64.b64encode(_SPKI_PREFIX + self.public).decode()}\n{_PEM_END}\n"


class _KeyValue(msgspec.Struct, frozen=True):
    public: str


class _KeyRecord(msgspec.Struct, frozen=True):
    keytype: str
    scheme: str
    keyval: _KeyValue
    keyid: str = ""


def parse_public_key(text: str, *, name: str = "key") -> PublicKey:
    """Read a public key from PEM or securesystemslib's JSON.

    Args:
        text: the file's text.
        name: what it is, for the error message.

    Raises:
        UsageError: ``key.private`` when it is a private key, ``key.malformed`` when it is not an Ed25519 public key.
    """
    if "PRIVATE KEY-----" in text:
        raise UsageError(
            "key.private", f"{name}: this is a private key; a public key is wanted.", hint="Give the .pub file beside it."
        )
    if text.lstrip().startswith("{"):
        return _parse_json(text, name)
    body = text.strip()
    if not (body.startswith(_PEM_BEGIN) and body.endswith(_PEM_END)):
        raise _malformed(name, "it is neither PEM (BEGIN PUBLIC KEY) nor JSON")
    try:
        der = base64.b64decode("".join(body[len(_PEM_BEGIN) : -len(_PEM_END)].split()), validate=True)
    except (binascii.Error, ValueError):
        raise _malformed(name, "its base64 is damaged") from None
    if len(der) != len(_SPKI_PREFIX) + KEY_BYTES or not der.startswith(_SPKI_PREFIX):
        raise _malformed(name, "it is not an Ed25519 key")
    return PublicKey(der[len(_SPKI_PREFIX) :])


def _parse_json(text: str, name: str) -> PublicKey:
    try:
        record = msgspec.json.decode(text, type=_KeyRecord)
        key = PublicKey(bytes.fromhex(record.keyval.public))
    except (msgspec.DecodeError, ValueError, RecursionError, TrustError) as error:
        raise _malformed(name, f"it is not a key record: {error}") from None
    if (record.keytype, record.scheme) != ("ed25519", "ed25519"):
        raise _malformed(name, f"it is a {record.keytype}/{record.scheme} key")
    if record.keyid not in {"", key.keyid}:
        raise _malformed(name, f"its keyid is {record.keyid[:12]}…, computed {key.keyid[:12]}…")
    return key


def _malformed(name: str, why: str) -> UsageError:
    return UsageError(
        "key.malformed", f"{name}: not an Ed25519 public key: {why}.", hint='Make one with "edgekit bundle keygen".'
    )


def load_public_key(path: Path) -> PublicKey:
    """Read a public key file, PEM or JSON.

    Raises:
        UsageError: ``key.not_found``, ``key.private`` or ``key.malformed``.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_FILE_BYTES)
    except OSError as error:
        raise UsageError(
            "key.not_found", f"{path}: cannot read this public key: {error.strerror}.", hint="Give the .pub file of the key."
        ) from error
    return parse_public_key(data.decode("ascii", errors="replace"), name=str(path))


def load_public_keys(folder: Path) -> tuple[PublicKey, ...]:
    """Every ``*.pub`` of a folder, by name; the same key material counts once. Empty where there is no folder."""
    return unique_keys(load_public_key(path) for path in sorted(folder.glob("*.pub"))) if folder.is_dir() else ()


def unique_keys(keys: Iterable[PublicKey]) -> tuple[PublicKey, ...]:
    """The keys in order, each key material once."""
    return tuple(dict.fromkeys(keys))


def save_public_key(key: PublicKey, path: Path) -> None:
    """Write a new PEM file, durably.

    Raises:
        UsageError: ``key.exists`` when the file is there already.
    """
    create_file(path, key.to_pem().encode(), mode=0o644)


def create_file(path: Path, data: bytes, *, mode: int) -> None:
    """Create a file with its final mode from the first moment on, whole or not at all, durably; never replaces one.

    Raises:
        UsageError: ``key.exists`` when the file is there already, ``key.unwritable`` when it cannot be made.
    """
    try:
        create_durably(path, data, mode=mode)
    except FileExistsError:
        raise UsageError(
            "key.exists", f"{path}: exists already and is not replaced.", hint="Give another name, or move the old key away."
        ) from None
    except OSError as error:
        raise UsageError("key.unwritable", f"{path}: cannot be written: {error.strerror}.") from error
