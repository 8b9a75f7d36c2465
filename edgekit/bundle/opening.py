"""Sealed blobs on the side that opens them: an age file becomes the content that the manifest promises.

The rules: a content is kept only when its digest and length are the manifest's, and nothing stays of one that was refused.
Identities are read from a file that nobody else can read, and no message or log line holds any part of one. Memory stays at
one chunk whatever the size of the blob. The library (``pyrage``, optional on a device) is imported when something is sealed.

Every code that begins with ``device.sealed_`` can be cured on the device: a key or a package is missing there.

    >>> identities = load_identities(Path("/etc/edgekit/device.age"))        # doctest: +SKIP
    >>> open_sealed(Path("parts/77c1"), Path("blobs/9f2a"), ref, identities)  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import importlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from edgekit.durable import PRIVATE_FILE
from edgekit.errors import ArtifactError, DeviceError
from edgekit.schema.digest import CHUNK_BYTES, digest_file, is_same_digest, short
from edgekit.schema.manifest import BlobRef, Manifest, Sealed, Variant

CURABLE_PREFIX = "device.sealed_"
DAMAGED_CODE = "bundle.sealed_damaged"
IDENTITY_PREFIX = "AGE-SECRET-KEY-1"
MAX_IDENTITY_FILE_BYTES = 64 * 1024
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_NO_MATCH = "No matching keys"


def content_of(ref: BlobRef) -> BlobRef:
    """The blob as it is once it is opened: digest and size of the content; a blob that is not sealed is its own content."""
    if ref.sealed is None:
        return ref
    return msgspec.structs.replace(ref, digest=ref.sealed.digest, size_bytes=ref.sealed.size_bytes, sealed=None)


def opened_variant(manifest: Manifest, variant: Variant) -> Variant:
    """The variant with the digests of its contents: those of the files that a runtime loads."""
    contents = {ref.digest: content_of(ref).digest for ref in manifest.blobs}
    model, golden = (contents.get(digest, digest) for digest in (variant.model, variant.golden))
    return msgspec.structs.replace(variant, model=model, golden=golden)


@dataclass(frozen=True)
class Identities:
    """The private keys of a file. ``recipients`` are their public halves, in the same order."""

    recipients: tuple[str, ...]
    keys: tuple[Any, ...] = field(repr=False)


def load_identities(path: Path) -> Identities:
    """Read an identity file: one ``AGE-SECRET-KEY-1...`` a line, comments with ``#``; a device's key and those of its groups.

    Raises:
        DeviceError: ``device.sealed_no_library`` without pyrage, ``device.sealed_no_identity`` when the file cannot be read,
            ``device.sealed_identity`` when others can read it too or a line of it is no identity.
    """
    age = _library()
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(MAX_IDENTITY_FILE_BYTES).decode("ascii", errors="replace")
    except OSError as error:
        raise DeviceError(
            f"{CURABLE_PREFIX}no_identity",
            f"{path}: cannot read this age identity: {error.strerror}.",
            hint='Make one with "edgekit bundle keygen --scheme age --out NAME".',
        ) from error
    check_mode(path, mode)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    try:
        keys = tuple(age.x25519.Identity.from_str(line) for line in lines)
    except age.IdentityError:
        keys = ()
    if not keys:
        message = f"{path}: not an age identity file; expected one {IDENTITY_PREFIX}... a line."
        raise DeviceError(f"{CURABLE_PREFIX}identity", message, hint='"edgekit bundle keygen --scheme age" makes one.')
    return Identities(recipients=tuple(str(key.to_public()) for key in keys), keys=keys)


def is_credential(path: Path) -> bool:
    """Whether systemd handed the file over: for this service alone, though the mode of an access list looks wider."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    return bool(folder) and path.parent == Path(folder)


def check_mode(path: Path, mode: int) -> None:
    """Refuse an identity that others can read.

    Raises:
        DeviceError: ``device.sealed_identity``.
    """
    if mode & _OTHERS and not is_credential(path):
        raise DeviceError(
            f"{CURABLE_PREFIX}identity",
            f"{path}: this age identity has mode {stat.S_IMODE(mode):04o}: others can use it; expected 0600.",
            hint=f"chmod 600 {path}; if others did read it, make a new one.",
        )


def find_identities(refs: Iterable[BlobRef], file: str, *, name: str) -> Identities | None:
    """What opens these blobs; None when none of them is sealed. Asked before anything is downloaded.

    Args:
        refs: the blobs that are needed.
        file: the identity file; empty when there is none.
        name: the release, for the error message.

    Raises:
        DeviceError: as :func:`load_identities`; ``device.sealed_not_recipient`` when a blob is sealed for others only.
    """
    sealed = [(ref, ref.sealed) for ref in refs if ref.sealed is not None]
    if not sealed:
        return None
    if not file:
        raise DeviceError(
            f"{CURABLE_PREFIX}no_identity",
            f"{name}: it is sealed, and this device has no identity to open it with.",
            hint="Set age_identity to the file of a key that it is sealed for.",
        )
    identities = load_identities(Path(file))
    for ref, how in sealed:
        if not set(identities.recipients) & set(how.recipients):
            raise _not_recipient(ref, how, identities)
    return identities


def open_sealed(source: Path, target: Path, ref: BlobRef, identities: Identities) -> None:
    """Open a sealed blob into a new file, mode 0600, durable.

    Args:
        source: the sealed blob.
        target: a file that does not exist yet; it does not after an error either.
        ref: what the manifest says of both.
        identities: of whom it is sealed for.

    Raises:
        DeviceError: ``device.sealed_not_recipient``; ``slot.damaged`` when the sealed file changed on this disk.
        ArtifactError: ``bundle.sealed_damaged`` when it is what the manifest lists and does not open, or opens to something
            else than the manifest says.
        OSError: when the disk refuses.
    """
    sealed = _sealed_of(ref)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE_FILE)
    why = "it was interrupted"
    try:
        with source.open("rb") as reader, os.fdopen(descriptor, "wb", buffering=CHUNK_BYTES) as file:
            sink = _Sink(file, sealed.size_bytes)
            why = _decrypt(reader, sink, ref, sealed, identities) or sink.refuse(sealed)
            file.flush()
            os.fsync(file.fileno())
    finally:
        if why:
            target.unlink(missing_ok=True)
    if why:
        raise _damaged(source, ref, why)


class _Sink:
    """Takes the content: counts and hashes it, and stops at the promised length."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._limit = limit
        self._count = 0
        self._state = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self._count += len(data)
        if self._count > self._limit:
            raise OSError("longer than the manifest says")
        self._state.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """The file is flushed at the end."""

    def refuse(self, sealed: Sealed) -> str:
        """Why this is not the content that was promised; empty when it is."""
        digest = "sha256:" + self._state.hexdigest()
        if self._count == sealed.size_bytes and is_same_digest(digest, sealed.digest):
            return ""
        return (
            f"its content has {self._count} bytes and sha256:{short(digest)}…, "
            f"the manifest says {sealed.size_bytes} and sha256:{short(sealed.digest)}…"
        )


def _decrypt(reader: BinaryIO, sink: _Sink, ref: BlobRef, sealed: Sealed, identities: Identities) -> str:
    """Open into the sink; why it does not open, or an empty text."""
    age = _library()
    try:
        age.decrypt_io(reader, sink, list(identities.keys))
    except age.DecryptError as error:
        if _NO_MATCH in str(error):
            raise _not_recipient(ref, sealed, identities) from None
        return f"it does not open: {error}"
    except OSError as error:
        if sink.error is not None:
            raise sink.error from None
        if error.errno is not None:
            raise
        return f"it does not open: {error}"
    return ""


def _sealed_of(ref: BlobRef) -> Sealed:
    assert ref.sealed is not None, "only a sealed blob is opened"
    return ref.sealed


def _damaged(source: Path, ref: BlobRef, why: str) -> ArtifactError | DeviceError:
    """Whose fault it is: this disk's, or the publisher's."""
    if digest_file(source) != ref.digest:
        return DeviceError(
            "slot.damaged", f"{source}: not the blob {ref.digest} ({ref.path}) any more.", hint="Fetch it again."
        )
    return ArtifactError(DAMAGED_CODE, f"{ref.path}: {why}.", hint="Whoever packed it must pack it again.")


def _not_recipient(ref: BlobRef, sealed: Sealed, identities: Identities) -> DeviceError:
    wanted = ", ".join(f"{name[:12]}…" for name in sealed.recipients)
    ours = ", ".join(f"{name[:12]}…" for name in identities.recipients)
    return DeviceError(
        f"{CURABLE_PREFIX}not_recipient",
        f"{ref.path}: sealed for {wanted}; the identity here is of {ours}.",
        hint="Seal the release for this device or its group, too, or give the device the group's identity.",
    )


def _library() -> Any:
    try:
        return importlib.import_module("pyrage")
    except ImportError as error:
        raise DeviceError(
            f"{CURABLE_PREFIX}no_library",
            "opening a sealed blob needs the package pyrage, which is not installed.",
            hint='pip install "edgekit[sealed]"',
        ) from error
