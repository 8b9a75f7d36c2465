"""Sealing: the model and its golden samples travel as age files (https://age-encryption.org/v1) that named devices can open.

What is sealed: every blob of the role ``model``, and ``golden`` too, since its samples are the owner's data and show what the
model answers. Evidence (candidate, reports, card, bill of materials) stays readable. One file has all recipients, each the key
of a device or of a group. The seal protects a release on its way and at rest in repositories, caches and sticks; on a device
the opened model lies in its slot.

age draws a new key for each file: the same model sealed twice is two different blobs, so an amended release keeps the sealed
blobs that it has (see :mod:`edgekit.bundle.amend`). Nothing here is loaded on a device; :mod:`edgekit.bundle.opening` is.

    >>> sealed = seal_models(draft, ["age1..."])  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from edgekit.bundle.writer import Content, Draft
from edgekit.durable import PRIVATE_FILE
from edgekit.errors import EnvironmentFault, UsageError
from edgekit.schema.digest import digest_bytes, digest_file, hex_of
from edgekit.schema.manifest import BlobRef, BlobRole, Sealed
from edgekit.trust.keys import create_file

SEALED_ROLES: frozenset[BlobRole] = frozenset({"model", "golden"})
SEALED_SUFFIX = ".age"


@dataclass(frozen=True)
class _SealedBlob:
    ref: BlobRef
    content: Content


def seal_models(draft: Draft, recipients: Sequence[str], *, folder: Path | None = None) -> Draft:
    """The draft with model and golden samples sealed; the variants then name the sealed blobs.

    Args:
        draft: a release that is not signed yet.
        recipients: ``age1...`` of devices and groups; every one of them can open all of it.
        folder: an existing folder for the sealed files, which must stay until the bundle is written; None keeps the sealed
            bytes in memory.

    Raises:
        UsageError: ``sealing.recipient`` when there is none or one is not valid, ``sealing.twice`` when the draft is sealed.
        EnvironmentFault: ``pyrage.missing``.
    """
    names = check_recipients(recipients)
    replaced: dict[str, _SealedBlob] = {}
    for ref in draft.manifest.blobs:
        if ref.sealed is not None:
            raise UsageError("sealing.twice", f"{ref.path}: this draft is sealed already.")
        if ref.role in SEALED_ROLES:
            replaced[ref.digest] = _seal(ref, draft.blobs[ref.digest], names, folder)
    digests = {digest: blob.ref.digest for digest, blob in replaced.items()}
    manifest = msgspec.structs.replace(
        draft.manifest,
        blobs=tuple(replaced[ref.digest].ref if ref.digest in replaced else ref for ref in draft.manifest.blobs),
        variants=tuple(
            msgspec.structs.replace(variant, model=digests[variant.model], golden=digests[variant.golden])
            for variant in draft.manifest.variants
        ),
    )
    kept = {digest: content for digest, content in draft.blobs.items() if digest not in replaced}
    return Draft(manifest, kept | {blob.ref.digest: blob.content for blob in replaced.values()})


def _seal(ref: BlobRef, content: Content, recipients: tuple[str, ...], folder: Path | None) -> _SealedBlob:
    age = _library()
    keys = [age.x25519.Recipient.from_str(name) for name in recipients]
    with _reader(content) as source:
        if folder is None:
            memory = io.BytesIO()
            age.encrypt_io(source, memory, keys)
            made: Content = memory.getvalue()
            digest, size = digest_bytes(memory.getbuffer()), memory.tell()
        else:
            made = folder / f"{hex_of(ref.digest)}{SEALED_SUFFIX}"
            with made.open("wb") as file:
                age.encrypt_io(source, file, keys)
            digest, size = digest_file(made), made.stat().st_size
    sealed = Sealed(digest=ref.digest, size_bytes=ref.size_bytes, recipients=recipients)
    new = msgspec.structs.replace(ref, path=ref.path + SEALED_SUFFIX, digest=digest, size_bytes=size, sealed=sealed)
    return _SealedBlob(new, made)


def _reader(content: Content) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def check_recipients(recipients: Sequence[str]) -> tuple[str, ...]:
    """The recipients in order, each once.

    Raises:
        UsageError: ``sealing.recipient``.
        EnvironmentFault: ``pyrage.missing``.
    """
    age = _library()
    if not recipients:
        raise UsageError("sealing.recipient", "no recipient to seal for.", hint="Give at least one age1... key.")
    for name in recipients:
        if name.upper().startswith("AGE-SECRET-KEY-"):
            text = "a recipient is a private key: give its public half, and make a new key if others saw this one."
            raise UsageError("sealing.recipient", text, hint="The .age.pub file beside the identity has it.")
        try:
            age.x25519.Recipient.from_str(name)
        except age.RecipientError:
            text = f"{name[:80]!r}: not an age recipient; expected age1 and 58 letters and digits."
            raise UsageError("sealing.recipient", text, hint='"edgekit bundle keygen --scheme age" makes one.') from None
    return tuple(dict.fromkeys(recipients))


def read_recipients(values: Iterable[str]) -> tuple[str, ...]:
    """Recipients as given on a command line: ``age1...``, or ``@FILE`` with one a line and comments with ``#``.

    Raises:
        UsageError: ``sealing.recipient``.
    """
    return tuple(name for value in values for name in (_lines(Path(value[1:])) if value.startswith("@") else [value.strip()]))


def _lines(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("sealing.recipient", f"@{path}: cannot read the recipients: {error}.") from error
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        raise UsageError("sealing.recipient", f"@{path}: no recipient in this file.", hint="One age1... a line.")
    yield from lines


def make_identity(private: Path, public: Path) -> str:
    """Make a key pair: the identity file, mode 0600 from its creation on, and the file with its recipient.

    Returns:
        The recipient.

    Raises:
        UsageError: ``key.exists`` or ``key.unwritable``.
        EnvironmentFault: ``pyrage.missing``.
    """
    identity = _library().x25519.Identity.generate()
    recipient = str(identity.to_public())
    create_file(private, f"# public key: {recipient}\n{identity}\n".encode(), mode=PRIVATE_FILE)
    create_file(public, f"{recipient}\n".encode(), mode=0o644)
    return recipient


def _library() -> Any:
    try:
        return importlib.import_module("pyrage")
    except ImportError as error:
        raise EnvironmentFault(
            "pyrage.missing", "sealing needs the package pyrage.", hint='pip install "edgekit[sealed]"'
        ) from error
