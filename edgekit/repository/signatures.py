"""The publishers' signatures of what is published: the bundles' envelopes, kept beside the repository and never served.

Devices do not need them: they trust the repository's metadata. Who promotes a release does, to count the publishers who stand
for it. A bundle that is published again with a further signature adds it.

    >>> len(signed_publishers(store, release.manifest_digest))  # doctest: +SKIP
    2
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgekit.bundle.reader import Bundle
from edgekit.durable import make_folder, write_durably
from edgekit.repository.store import PRIVATE_FOLDER, Store
from edgekit.schema.digest import digest_bytes, hex_of
from edgekit.schema.manifest import MANIFEST_MEDIA_TYPE
from edgekit.trust.dsse import Envelope, decode_envelope, encode_envelope, valid_keys
from edgekit.trust.keys import PublicKey, load_public_keys

SIGNATURES_FOLDER = "signatures"
SUFFIX = ".dsse.json"


def envelope_file(folder: Path, manifest_digest: str) -> Path:
    """Where the envelope of a manifest lies."""
    return folder / SIGNATURES_FOLDER / f"{hex_of(manifest_digest)}{SUFFIX}"


def keep_envelope(store: Store, bundle: Bundle) -> None:
    """Keep a verified bundle's envelope: the signatures that counted, beside those that are kept of the same manifest."""
    path = envelope_file(store.folder, bundle.manifest_digest)
    kept = _read(path)
    known = kept.signatures if kept is not None else ()
    fresh = tuple(each for each in bundle.envelope.signatures if each.keyid in bundle.keyids and each not in known)
    if kept is not None and not fresh:
        return
    merged = msgspec.structs.replace(bundle.envelope, signatures=(*known, *fresh))
    make_folder(path.parent, mode=PRIVATE_FOLDER)
    write_durably(path, encode_envelope(merged))


def signed_publishers(store: Store, manifest_digest: str) -> tuple[PublicKey, ...]:
    """The publishers, of those that the repository trusts now, who signed a manifest; none where no envelope is kept.

    Raises:
        ArtifactError: ``envelope.malformed`` when the kept file was damaged.
    """
    envelope = _read(envelope_file(store.folder, manifest_digest))
    if envelope is None or envelope.payload_type != MANIFEST_MEDIA_TYPE or digest_bytes(envelope.payload) != manifest_digest:
        return ()
    return valid_keys(envelope, load_public_keys(store.publishers))


def _read(path: Path) -> Envelope | None:
    return decode_envelope(path.read_bytes(), name=str(path)) if path.is_file() else None
