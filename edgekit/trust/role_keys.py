"""Keys of TUF roles: files or tokens that sign metadata. Needs ``cryptography``; a device and the fleet server never load this.

A private key is named by a file (PKCS8 PEM, 0600, encrypted where there is a passphrase) or by a URI of securesystemslib, for
keys that never leave a token or a key service: ``hsm:2?label=yubikey``, ``awskms:ARN``, ``gcpkms:PATH``, ``azurekms:ID``,
``hv:NAME``. A public key is named by its ``.pub`` file (PEM). The PIN of a token is read from ``EDGEKIT_HSM_PIN``.

    >>> from edgekit.trust.signer import generate_signer
    >>> key = generate_signer().tuf_signer().public_key
    >>> material(key) == bytes.fromhex(key.keyval["public"])
    True
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from securesystemslib.signer import Key, SSlibKey  # type: ignore[attr-defined]
from securesystemslib.signer import Signer as RoleSigner  # type: ignore[attr-defined]

from edgekit.errors import EnvironmentFault, TrustError, UsageError
from edgekit.trust.keys import MAX_KEY_FILE_BYTES
from edgekit.trust.signer import load_signer

PIN_VARIABLE = "EDGEKIT_HSM_PIN"
SCHEMES = ("hsm", "awskms", "gcpkms", "azurekms", "hv")
_EXTRA = {"hsm": "hsm", "awskms": "awskms", "gcpkms": "gcpkms", "azurekms": "azurekms", "hv": "vault"}


def is_uri(spec: str) -> bool:
    """Whether a key is named by a URI of a token or key service."""
    return spec.partition(":")[0] in SCHEMES and not Path(spec).exists()


def load_role_key(path: Path) -> Key:
    """Read a public key: PEM of Ed25519, ECDSA or RSA.

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
    if b"PRIVATE KEY-----" in data:
        raise UsageError(
            "key.private", f"{path}: this is a private key; a public key is wanted.", hint="Give the .pub file beside it."
        )
    try:
        return SSlibKey.from_crypto(load_pem_public_key(data))
    except (ValueError, TypeError) as error:
        raise UsageError("key.malformed", f"{path}: not a public key in PEM.", hint="Give the .pub file of the key.") from error


def public_pem(key: Key) -> bytes:
    """The PEM of a public key."""
    if key.keytype == "ed25519":
        from edgekit.trust.keys import PublicKey  # noqa: PLC0415 - of this kind only

        return PublicKey(bytes.fromhex(key.keyval["public"])).to_pem().encode()
    return str(key.keyval["public"]).encode()


def material(key: Key) -> bytes:
    """What makes a key that key, whatever its id says: the bytes of its public half."""
    public = str(key.keyval.get("public", ""))
    if key.keytype == "ed25519":
        return bytes.fromhex(public)
    try:
        return load_pem_public_key(public.encode()).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, TypeError):
        return public.encode()


def refuse_duplicates(keys: Iterable[Key], role: str) -> None:
    """Two names for one key must not count as two.

    Raises:
        TrustError: ``trust.duplicate_key``.
    """
    seen: dict[bytes, str] = {}
    for key in keys:
        other = seen.setdefault(material(key), key.keyid)
        if other != key.keyid:
            raise TrustError(
                "trust.duplicate_key",
                f"{role}: the keys {other[:12]}… and {key.keyid[:12]}… are the same key under two ids.",
                hint="A threshold needs different keys, best of different people.",
            )


def open_role_signer(spec: str, key: Key | None = None) -> RoleSigner:
    """Open a private key.

    Args:
        spec: a PEM file, or a URI.
        key: the public half, where it is known; a token is asked for it otherwise.

    Raises:
        UsageError: an error of ``load_signer``, or ``key.unusable`` when the token or service refuses.
        EnvironmentFault: ``key.no_driver`` when the package for this kind of key is not installed.
    """
    if not is_uri(spec):
        return load_signer(Path(spec)).tuf_signer()
    scheme = spec.partition(":")[0]
    try:
        if key is None:
            spec, key = _import(scheme, spec)
        return RoleSigner.from_priv_key_uri(spec, key, _secret)
    except Exception as error:
        if type(error).__name__ == "UnsupportedLibraryError" or isinstance(error, ImportError):
            raise EnvironmentFault(
                "key.no_driver",
                f"{spec}: the driver for {scheme} keys is not installed: {error}.",
                hint=f"pip install 'securesystemslib[{_EXTRA[scheme]}]'",
            ) from error
        raise UsageError(
            "key.unusable", f"{spec}: this key cannot be used: {error}.", hint="Check the token and its PIN."
        ) from error


def resolve_role_key(spec: str) -> tuple[str, Key]:
    """The public key that a ``.pub`` file, a PEM private key or a URI names, and the URI to sign with (empty for files).

    Raises:
        UsageError, EnvironmentFault: as :func:`open_role_signer` and :func:`load_role_key`.
    """
    if is_uri(spec):
        scheme = spec.partition(":")[0]
        try:
            return _import(scheme, spec)
        except Exception:  # noqa: BLE001 - the drivers raise anything; the next line says it in our words
            return spec, open_role_signer(spec).public_key
    path = Path(spec)
    if path.suffix == ".pem":
        return "", load_signer(path).tuf_signer().public_key
    return "", load_role_key(path)


def _import(scheme: str, spec: str) -> tuple[str, Key]:
    """Ask a token or service for the public key; the URI that it gives is the one to sign with."""
    from securesystemslib import signer as drivers  # noqa: PLC0415 - the drivers load their own libraries

    body = spec.partition(":")[2]
    kinds: dict[str, Any] = {
        "awskms": drivers.AWSSigner,  # type: ignore[attr-defined]
        "gcpkms": drivers.GCPSigner,  # type: ignore[attr-defined]
        "hv": drivers.VaultSigner,  # type: ignore[attr-defined]
    }
    if scheme in kinds:
        uri, key = kinds[scheme].import_(body)
    elif scheme == "azurekms":
        vault, _, name = body.rpartition("/")
        uri, key = drivers.AzureSigner.import_(vault, name)  # type: ignore[attr-defined]
    else:
        slot, _, query = body.partition("?")
        label = dict(part.partition("=")[::2] for part in query.split("&")).get("label")
        uri, key = drivers.HSMSigner.import_(int(slot) if slot else None, label, _secret)  # type: ignore[attr-defined]
    return uri, key


def _secret(name: str) -> str:
    value = os.environ.get(PIN_VARIABLE, "")
    if not value:
        raise UsageError("key.pin", f"the token asks for its {name}.", hint=f"Set {PIN_VARIABLE}.")
    return value
