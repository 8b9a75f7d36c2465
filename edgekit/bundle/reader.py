"""The strict bundle reader: nothing is extracted, nothing is written, every byte of the file is accounted for.

The checks, in order; the first that fails refuses the bundle:

1. The end record and the directory parse, and name only ``manifest.json``, ``signature.dsse.json`` and ``blobs/sha256/<hex>``.
2. The bytes that :mod:`edgekit.bundle.layout` would write for these entries equal the file's, headers and directory.
3. Manifest and envelope are canonical JSON; the envelope's payload is the manifest.
4. The manifest's blobs and the file's blobs are the same set, and each blob has the size and digest that it is listed with.
5. (``verify_bundle``) A trusted key signed the manifest.

Memory stays at one chunk whatever the size of the model. Blobs are hashed again when they are read later, so a file that is
exchanged between the check and the use is noticed.

    >>> bundle = verify_bundle(Path("fashion-1.0.0.edgekit"), keys)  # doctest: +SKIP
    >>> bundle.manifest.version                                      # doctest: +SKIP
    '1.0.0'
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from edgekit.bundle.layout import (
    BLOB_PREFIX,
    END_BYTES,
    MANIFEST_NAME,
    MAX_ENTRIES,
    SIGNATURE_NAME,
    Layout,
    Placed,
    arrange,
    blob_name,
    directory_records_size,
    parse_directory,
    parse_end,
)
from edgekit.errors import ArtifactError, EdgekitError, TrustError, UsageError
from edgekit.schema.base import decode_json, is_canonical_json
from edgekit.schema.digest import CHUNK_BYTES, digest_bytes, short
from edgekit.schema.manifest import MANIFEST_MEDIA_TYPE, BlobRef, Manifest
from edgekit.trust.dsse import Envelope, decode_envelope, valid_keys
from edgekit.trust.keys import PublicKey, unique_keys

MAX_RECORD_BYTES = 16 * 1024 * 1024
"""Bound of the manifest and of the envelope, which are read into memory."""
_CHUNKS_AHEAD = 3
_MAX_DIRECTORY_BYTES = MAX_ENTRIES * 512
_BLOB_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(?:/[A-Za-z0-9][A-Za-z0-9._+-]*)*\Z")
_REFETCH = "Fetch the file again; if it is still refused, it was changed on the way."


class _Sums:
    """SHA-256 and CRC-32 of the same bytes, one of them in a thread beside: both leave the interpreter's lock alone.

    Args:
        beside: the thread.
        is_hash_beside: for who does something else with the chunks meanwhile. Otherwise the checksum goes there: it is the
            cheaper one, and the hash never waits for a thread to wake up.
    """

    def __init__(self, beside: ThreadPoolExecutor, *, is_hash_beside: bool) -> None:
        self._state, self._crc32 = hashlib.sha256(), 0
        self._beside, self._is_hash_beside = beside, is_hash_beside
        self._waiting: deque[Future[None]] = deque()

    def _sum(self, chunk: bytes) -> None:
        self._crc32 = zlib.crc32(chunk, self._crc32)

    def update(self, chunk: bytes) -> None:
        """More bytes; at most a few chunks wait for the thread beside."""
        here, there = (self._sum, self._state.update) if self._is_hash_beside else (self._state.update, self._sum)
        self._waiting.append(self._beside.submit(there, chunk))
        here(chunk)
        if len(self._waiting) > _CHUNKS_AHEAD:
            self._waiting.popleft().result()

    def finish(self) -> tuple[str, int]:
        """Digest and checksum of everything."""
        while self._waiting:
            self._waiting.popleft().result()
        return "sha256:" + self._state.hexdigest(), self._crc32


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read. ``keyids`` are the keys that claim to have signed; after ``verify_bundle`` those that did."""

    path: Path
    manifest: Manifest
    manifest_bytes: bytes
    manifest_digest: str
    keyids: tuple[str, ...]
    envelope: Envelope
    is_verified: bool
    _places: dict[str, tuple[int, int]]
    """Offset and CRC-32 of each blob by digest."""

    def chunks(self, digest: str) -> Iterator[bytes]:
        """A blob's content, chunk by chunk; whoever writes it must do so under a temporary name.

        It is hashed in a thread beside, so that hashing costs no time where the chunks are written meanwhile.

        Raises:
            UsageError: ``bundle.no_such_blob``.
            TrustError: ``bundle.digest_mismatch`` at the end, when the file has changed since it was read.
        """
        return self._read(digest, is_hash_beside=True)

    def _read(self, digest: str, *, is_hash_beside: bool) -> Iterator[bytes]:
        ref = next((ref for ref in self.manifest.blobs if ref.digest == digest), None)
        if ref is None:
            raise UsageError("bundle.no_such_blob", f"{self.path.name}: no blob {digest} in this bundle.")
        offset, expected_crc = self._places[digest]
        with self.path.open("rb") as file, ThreadPoolExecutor(1) as beside:
            sums = _Sums(beside, is_hash_beside=is_hash_beside)
            file.seek(offset)
            for chunk in _read_chunks(file, ref.size_bytes):
                sums.update(chunk)
                yield chunk
            found = sums.finish()
        if found != (digest, expected_crc):
            raise TrustError(
                "bundle.digest_mismatch", f"{self.path.name}: {ref.path} changed after it was checked.", hint=_REFETCH
            )

    def check(self, digest: str) -> None:
        """Hash a blob without keeping it; errors as :meth:`chunks`."""
        for _ in self._read(digest, is_hash_beside=False):
            pass

    def blob(self, digest: str) -> bytes:
        """A blob's content; errors as :meth:`chunks`."""
        return b"".join(self.chunks(digest))


def _malformed(name: str, why: str) -> ArtifactError:
    return ArtifactError("bundle.malformed", f"{name}: not a valid bundle: {why}.", hint=_REFETCH)


def _read_chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """``size`` bytes from here on; fewer when the file ends."""
    left = size
    while left and (chunk := file.read(min(CHUNK_BYTES, left))):
        left -= len(chunk)
        yield chunk


def parse_manifest(data: bytes, *, name: str = MANIFEST_NAME) -> Manifest:
    """Read a manifest and check that it holds together: what a device does with a manifest that it fetched.

    Raises:
        ArtifactError: ``manifest.malformed`` when it is not canonical JSON, names a blob twice, or a variant names a blob
            that is not listed.
    """
    if not is_canonical_json(data):
        raise ArtifactError("manifest.malformed", f"{name}: not canonical JSON.", hint=_REFETCH)
    manifest = decode_json(data, Manifest, name=name)
    why = _inconsistency(manifest)
    if why:
        raise ArtifactError("manifest.malformed", f"{name}: {why}.", hint="It was not made by edgekit; pack it again.")
    return manifest


def _inconsistency(manifest: Manifest) -> str:
    """What contradicts itself in a manifest; empty when nothing does."""
    digests, paths = [ref.digest for ref in manifest.blobs], [ref.path for ref in manifest.blobs]
    if len(set(digests)) != len(digests) or len(set(paths)) != len(paths):
        return "it lists a blob twice"
    for ref in manifest.blobs:
        if not _BLOB_PATH.match(ref.path) or ref.size_bytes < 0:
            return f"the blob {ref.path[:64]!r} has a path or size that is not allowed"
    return _variant_fault(manifest) or _sealing_fault(manifest) or _threshold_fault(manifest)


def _variant_fault(manifest: Manifest) -> str:
    """What is wrong with the variants; empty when nothing is."""
    if not manifest.variants:
        return "it has no variant"
    names = [variant.name for variant in manifest.variants]
    if len(set(names)) != len(names):
        return "two variants have one name"
    role_of = {ref.digest: ref.role for ref in manifest.blobs}
    for variant in manifest.variants:
        if role_of.get(variant.model) != "model" or role_of.get(variant.golden) != "golden":
            return f"the variant {variant.name} names a model or golden samples that are not among its blobs"
        if variant.candidate is not None and role_of.get(variant.candidate) != "candidate":
            return f"the variant {variant.name} names a candidate that is not among its blobs"
    return ""


def _sealing_fault(manifest: Manifest) -> str:
    """What is wrong with the sealed blobs; empty when nothing is."""
    sealed = [(ref, ref.sealed) for ref in manifest.blobs if ref.sealed is not None]
    for ref, how in sealed:
        if ref.role not in {"model", "golden"} or not how.recipients or how.size_bytes < 0:
            return f"the blob {ref.path[:64]!r} is sealed in a way that is not allowed"
    contents = [how.digest for _, how in sealed]
    if len(set(contents)) != len(contents) or set(contents) & {ref.digest for ref in manifest.blobs}:
        return "it seals a content twice, or lists it open, too"
    return ""


def _threshold_fault(manifest: Manifest) -> str:
    """Which threshold is for nothing; empty when none is."""
    unknown = sorted(manifest.contract.thresholds.keys() - set(manifest.contract.labels))
    return f"it has a threshold for {unknown[0][:64]!r}, which is not one of its labels" if unknown else ""


def _read_layout(file: BinaryIO, name: str) -> Layout:
    """Checks 1 and 2 but for the contents' own bytes."""
    size = file.seek(0, 2)
    file.seek(max(0, size - END_BYTES))
    count, offset, records_size = parse_end(file.read(END_BYTES))
    if offset + records_size + END_BYTES != size or records_size > _MAX_DIRECTORY_BYTES or count > MAX_ENTRIES:
        raise _malformed(name, "its directory does not fit the file's size; it is cut off, or something was added")
    file.seek(offset)
    entries = parse_directory(file.read(records_size), count)
    if directory_records_size([entry.name for entry in entries]) != records_size:
        raise _malformed(name, "its directory holds more than its entries")
    layout = arrange(entries)
    if layout.size_bytes != size:
        raise _malformed(name, f"it has {size} bytes, its entries make {layout.size_bytes}")
    for placed in layout.placed:
        file.seek(placed.header_offset)
        if file.read(len(placed.header)) != placed.header:
            raise _malformed(name, f"the header of {placed.entry.name} is not as the writer makes it")
    file.seek(layout.directory_offset)
    if file.read(len(layout.directory)) != layout.directory:
        raise _malformed(name, "its directory is not as the writer makes it")
    return layout


def _read_record(file: BinaryIO, placed: Placed, name: str) -> bytes:
    """The content of a small entry, its checksum checked."""
    if placed.entry.size_bytes > MAX_RECORD_BYTES:
        raise _malformed(name, f"{placed.entry.name} is larger than {MAX_RECORD_BYTES} bytes")
    file.seek(placed.data_offset)
    data = file.read(placed.entry.size_bytes)
    if zlib.crc32(data) != placed.entry.crc32:
        raise _malformed(name, f"the checksum of {placed.entry.name} is wrong")
    return data


def _check_size(placed: Placed, ref: BlobRef, name: str) -> None:
    """Check 4 without the content."""
    if placed.entry.size_bytes != ref.size_bytes:
        raise TrustError(
            "bundle.digest_mismatch",
            f"{name}: {ref.path} has {placed.entry.size_bytes} bytes, the manifest says {ref.size_bytes}.",
            hint=_REFETCH,
        )


def _check_blob(file: BinaryIO, placed: Placed, ref: BlobRef, name: str) -> None:
    """Check 4 for one blob's content."""
    file.seek(placed.data_offset)
    with ThreadPoolExecutor(1) as beside:
        sums = _Sums(beside, is_hash_beside=False)
        for chunk in _read_chunks(file, ref.size_bytes):
            sums.update(chunk)
        found, crc32 = sums.finish()
    if found != ref.digest:
        raise TrustError(
            "bundle.digest_mismatch",
            f"{name}: the digest of {ref.path} is sha256:{short(found)}…, the manifest says sha256:{short(ref.digest)}…; "
            "the file changed after signing.",
            hint=_REFETCH,
        )
    if crc32 != placed.entry.crc32:
        raise _malformed(name, f"the checksum of {ref.path} is wrong")


def _check_blobs(
    file: BinaryIO, layout: Layout, manifest: Manifest, name: str, *, is_hashed: bool
) -> dict[str, tuple[int, int]]:
    """Check 4: offset and checksum of the blobs by digest."""
    placed_of = {placed.entry.name: placed for placed in layout.placed if placed.entry.name.startswith(BLOB_PREFIX)}
    refs = {blob_name(ref.digest): ref for ref in manifest.blobs}
    missing, extra = sorted(refs.keys() - placed_of.keys()), sorted(placed_of.keys() - refs.keys())
    if missing:
        raise _malformed(name, f"{refs[missing[0]].path} is in the manifest and not in the file")
    if extra:
        raise _malformed(name, f"{extra[0]} is in the file and not in the manifest")
    for blob, ref in refs.items():
        _check_size(placed_of[blob], ref, name)
        if is_hashed:
            _check_blob(file, placed_of[blob], ref, name)
    return {ref.digest: (placed_of[blob].data_offset, placed_of[blob].entry.crc32) for blob, ref in refs.items()}


def _read_bundle(file: BinaryIO, path: Path, *, is_hashed: bool = True) -> Bundle:
    name = path.name
    layout = _read_layout(file, name)
    by_name = {placed.entry.name: placed for placed in layout.placed}
    if MANIFEST_NAME not in by_name:
        raise _malformed(name, f"{MANIFEST_NAME} is missing")
    if SIGNATURE_NAME not in by_name:
        raise TrustError(
            "bundle.unsigned", f"{name}: the bundle is not signed.", hint='Pack it with "edgekit bundle pack --key KEY".'
        )
    manifest_bytes = _read_record(file, by_name[MANIFEST_NAME], name)
    envelope = decode_envelope(_read_record(file, by_name[SIGNATURE_NAME], name), name=SIGNATURE_NAME)
    manifest = parse_manifest(manifest_bytes)
    if envelope.payload_type != MANIFEST_MEDIA_TYPE or envelope.payload != manifest_bytes:
        raise TrustError(
            "bundle.signature_invalid", f"{name}: its signature is of something else than its manifest.", hint=_REFETCH
        )
    return Bundle(
        path=path,
        manifest=manifest,
        manifest_bytes=manifest_bytes,
        manifest_digest=digest_bytes(manifest_bytes),
        keyids=tuple(signature.keyid for signature in envelope.signatures),
        envelope=envelope,
        is_verified=False,
        _places=_check_blobs(file, layout, manifest, name, is_hashed=is_hashed),
    )


def read_bundle(path: Path, *, is_hashed: bool = True) -> Bundle:
    """Read a bundle and check its structure and digests, checks 1 to 4; who signed it is not looked at.

    Args:
        path: the bundle.
        is_hashed: False leaves the blobs' contents to :meth:`Bundle.chunks`, for who copies all of them anyway.

    Raises:
        UsageError: ``bundle.not_found``.
        ArtifactError: ``bundle.malformed`` or ``bundle.too_large``.
        TrustError: ``bundle.digest_mismatch``, ``bundle.unsigned`` or ``bundle.signature_invalid``.
    """
    try:
        with path.open("rb") as file:
            return _read_bundle(file, path, is_hashed=is_hashed)
    except OSError as error:
        raise UsageError("bundle.not_found", f"{path}: cannot read this bundle: {error.strerror}.") from error
    except ArtifactError as error:
        if error.code.startswith("bundle.") and error.hint:
            raise
        code = error.code if error.code == "bundle.too_large" else "bundle.malformed"
        message = f"{path.name}: not a valid bundle: {error.message.rstrip('.')}."
        raise ArtifactError(code, message, hint=_REFETCH) from error


def _refused(error: EdgekitError) -> TrustError:
    """The same refusal as a verdict on trust: a damaged bundle is not trusted either."""
    return TrustError(error.code, error.message, hint=error.hint)


def verify_bundle(path: Path, keys: Iterable[PublicKey], *, threshold: int = 1, is_hashed: bool = True) -> Bundle:
    """Read a bundle and check everything, the signature too.

    Args:
        path: the bundle.
        keys: publisher keys that are trusted.
        threshold: how many of them must have signed.
        is_hashed: as for :func:`read_bundle`.

    Returns:
        The bundle; its ``keyids`` are those of the trusted keys that signed it.

    Raises:
        UsageError: ``bundle.not_found``, or ``bundle.no_keys`` when no trusted key is given.
        TrustError: ``bundle.malformed``, ``bundle.too_large``, ``bundle.digest_mismatch``, ``bundle.unsigned``,
            ``bundle.untrusted_key`` or ``bundle.signature_invalid``.
        ValueError: a threshold below 1 would accept anybody.
    """
    if threshold < 1:
        raise ValueError("threshold must be at least 1")
    trusted = unique_keys(keys)
    if not trusted:
        raise UsageError("bundle.no_keys", f"{path.name}: no publisher key to verify with.", hint="Give --key PUB.")
    try:
        bundle = read_bundle(path, is_hashed=is_hashed)
    except ArtifactError as error:
        raise _refused(error) from error
    signers = valid_keys(bundle.envelope, trusted)
    if len(signers) < threshold:
        raise _signature_error(bundle, trusted, threshold)
    return replace(bundle, keyids=tuple(key.keyid for key in signers), is_verified=True)


def _signature_error(bundle: Bundle, trusted: tuple[PublicKey, ...], threshold: int) -> TrustError:
    name, claimed = bundle.path.name, bundle.keyids
    if not claimed:
        return TrustError(
            "bundle.unsigned", f"{name}: the bundle is not signed.", hint='Pack it with "edgekit bundle pack --key KEY".'
        )
    expected = ", ".join(f"{key.keyid[:12]}…" for key in trusted)
    if sum(key.keyid in claimed for key in trusted) < threshold:
        found = ", ".join(f"{keyid[:12]}…" for keyid in claimed)
        return TrustError(
            "bundle.untrusted_key",
            f"{name}: signed by key {found}; trusted: {expected} ({threshold} needed).",
            hint="If you trust that publisher, give its .pub file; else do not use this bundle.",
        )
    return TrustError(
        "bundle.signature_invalid", f"{name}: the signature by {expected} does not fit the manifest.", hint=_REFETCH
    )
