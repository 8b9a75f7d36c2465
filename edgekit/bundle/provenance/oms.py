"""The OpenSSF Model Signing (v1.0) signature of a release's files: ``model.sig``, a Sigstore bundle.

    Sigstore bundle (JSON) > DSSE envelope > in-toto Statement, whose predicate lists every file with its SHA-256

It covers every blob of the release but itself, by path and digest as they travel (sealed blobs sealed), so it is the last
thing that is added. ``edgekit bundle unpack`` gives the folder that other tools verify it over:
``model_signing verify key DIR --signature DIR/model.sig --public_key PUB``.

Rules beyond the specification: exactly one signature; every file must be listed, whatever the signature says may be ignored;
only SHA-256 of whole files. The specification: https://github.com/ossf/model-signing-spec (v1.0); the key's hint and the order
of files are those of https://github.com/sigstore/model-transparency.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import msgspec

from edgekit.bundle.provenance.producer_key import ProducerKey, ProducerPublicKey
from edgekit.bundle.provenance.statement import PAYLOAD_TYPE, STATEMENT_TYPE, Document, ResourceDescriptor
from edgekit.errors import TrustError, UsageError
from edgekit.schema.base import encode_json
from edgekit.schema.digest import digest_file, hex_of
from edgekit.schema.manifest import Manifest
from edgekit.trust.dsse import Envelope, EnvelopeSignature, signed_bytes

if TYPE_CHECKING:
    from edgekit.bundle.writer import Draft

SIGNATURE_PATH = "model.sig"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
MAX_SIGNATURE_BYTES = 16 * 1024 * 1024
_HEX = re.compile(r"[0-9a-f]{64}\Z")


class Resource(msgspec.Struct, frozen=True, kw_only=True):
    """One file: its path below the release's folder, and its digest in hex."""

    name: str
    digest: str
    algorithm: str = "sha256"


class Serialization(msgspec.Struct, frozen=True, kw_only=True):
    """How the files were listed."""

    method: str = "files"
    hash_type: str = "sha256"
    allow_symlinks: bool = False
    ignore_paths: tuple[str, ...] = ()


class _Predicate(msgspec.Struct, frozen=True, kw_only=True):
    serialization: Serialization
    resources: tuple[Resource, ...]


class _Statement(Document, frozen=True, kw_only=True):
    type_: str = msgspec.field(name="_type")
    subject: tuple[ResourceDescriptor, ...]
    predicate_type: str
    predicate: _Predicate


class _KeyHint(Document, frozen=True, kw_only=True):
    hint: str


class _Material(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    public_key: _KeyHint
    tlog_entries: tuple[object, ...] = ()


class _Bundle(Document, frozen=True, kw_only=True):
    media_type: str
    verification_material: _Material
    dsse_envelope: Envelope


@dataclass(frozen=True, kw_only=True)
class ModelSignature:
    """What a signature says; nobody has checked who made it until :func:`verify_signature` returned."""

    keyid: str
    """The hint: SHA-256 of the signing key's PEM."""
    name: str
    files: dict[str, str]
    """Digest by path."""
    _envelope: Envelope


def sign_files(draft: Draft, key: ProducerKey) -> Draft:
    """The draft with ``model.sig`` over all its blobs.

    Args:
        draft: a release that is otherwise complete.
        key: the producer's.

    Raises:
        UsageError: ``oms.twice`` when the draft has a signature already.
    """
    if any(ref.role == "signature" for ref in draft.manifest.blobs):
        raise UsageError("oms.twice", f"{draft.manifest.name}: this draft has a model signature already.")
    name = f"{draft.manifest.name}-{draft.manifest.version}"
    return draft.with_blob(SIGNATURE_PATH, "signature", sign(covered_files(draft.manifest), key, name=name))


def covered_files(manifest: Manifest) -> dict[str, str]:
    """What a release's signature must list: the digest of each blob by path, but for signatures."""
    return {ref.path: ref.digest for ref in manifest.blobs if ref.role != "signature"}


def sign(files: Mapping[str, str], key: ProducerKey, *, name: str) -> bytes:
    """A signature of files.

    Args:
        files: digest by path.
        key: the producer's.
        name: of the model, for people.
    """
    listed = sorted(files.items(), key=lambda item: PurePosixPath(item[0]))
    resources = tuple(Resource(name=path, digest=hex_of(digest)) for path, digest in listed)
    statement = _Statement(
        type_=STATEMENT_TYPE,
        subject=(ResourceDescriptor(name=name, digest={"sha256": _root_digest(resources)}),),
        predicate_type=PREDICATE_TYPE,
        predicate=_Predicate(serialization=Serialization(ignore_paths=(SIGNATURE_PATH,)), resources=resources),
    )
    payload = encode_json(statement)
    made = EnvelopeSignature(keyid="", sig=key.sign(signed_bytes(payload, PAYLOAD_TYPE)))
    bundle = _Bundle(
        media_type=BUNDLE_TYPE,
        verification_material=_Material(public_key=_KeyHint(hint=key.public_key.keyid)),
        dsse_envelope=Envelope(payload_type=PAYLOAD_TYPE, payload=payload, signatures=(made,)),
    )
    return encode_json(bundle)


def _root_digest(resources: tuple[Resource, ...]) -> str:
    """The digest over the files' digests, in their order."""
    return hashlib.sha256(b"".join(bytes.fromhex(resource.digest) for resource in resources)).hexdigest()


def parse_signature(data: bytes, *, name: str = SIGNATURE_PATH) -> ModelSignature:
    """Read a signature without checking who made it.

    Raises:
        TrustError: ``oms.malformed``.
    """
    if len(data) > MAX_SIGNATURE_BYTES:
        raise _malformed(name, f"it is larger than {MAX_SIGNATURE_BYTES} bytes")
    try:
        bundle = msgspec.json.decode(data, type=_Bundle)
        statement = msgspec.json.decode(bundle.dsse_envelope.payload, type=_Statement)
        root = _root_digest(statement.predicate.resources)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _malformed(name, f"it is not a Sigstore bundle with a list of files: {error}") from error
    if why := _fault(bundle, statement, root):
        raise _malformed(name, why)
    files = {resource.name: "sha256:" + resource.digest for resource in statement.predicate.resources}
    if len(files) != len(statement.predicate.resources):
        raise _malformed(name, "it lists a file twice")
    return ModelSignature(
        keyid=bundle.verification_material.public_key.hint,
        name=statement.subject[0].name,
        files=files,
        _envelope=bundle.dsse_envelope,
    )


def _fault(bundle: _Bundle, statement: _Statement, root: str) -> str:
    """Why this is not a signature as the specification has it; empty when it is."""
    form, envelope, resources = statement.predicate.serialization, bundle.dsse_envelope, statement.predicate.resources
    faults = [
        (bundle.media_type != BUNDLE_TYPE, f"its type is {bundle.media_type[:80]}, expected {BUNDLE_TYPE}"),
        (envelope.payload_type != PAYLOAD_TYPE, f"it holds {envelope.payload_type[:80]}, expected {PAYLOAD_TYPE}"),
        (statement.type_ != STATEMENT_TYPE, f"it holds a {statement.type_[:80]}, expected {STATEMENT_TYPE}"),
        (statement.predicate_type != PREDICATE_TYPE, f"it is a {statement.predicate_type[:80]}, expected {PREDICATE_TYPE}"),
        (len(envelope.signatures) != 1, f"it has {len(envelope.signatures)} signatures, expected one"),
        (len(statement.subject) != 1, f"it has {len(statement.subject)} subjects, expected one"),
        ((form.method, form.hash_type) != ("files", "sha256"), f"it lists {form.method[:20]} by {form.hash_type[:20]}"),
        (any(each.algorithm != "sha256" or not _HEX.match(each.digest) for each in resources), "a digest is not SHA-256"),
        (statement.subject[:1] != () and statement.subject[0].digest.get("sha256") != root, "the digest of its list is wrong"),
    ]
    return next((why for is_wrong, why in faults if is_wrong), "")


def verify_signature(data: bytes, key: ProducerPublicKey, *, name: str = SIGNATURE_PATH) -> ModelSignature:
    """Read a signature and check that this key made it.

    Raises:
        TrustError: ``oms.malformed``, ``oms.untrusted_key`` or ``oms.signature``.
    """
    found = parse_signature(data, name=name)
    if found.keyid != key.keyid:
        raise TrustError(
            "oms.untrusted_key",
            f"{name}: made with the key {found.keyid[:12]}…; trusted: {key.keyid[:12]}….",
            hint="If you trust that producer, give its .pub file; else do not use these files.",
        )
    envelope = found._envelope  # noqa: SLF001 - of the same module
    if not key.is_valid(envelope.signatures[0].sig, signed_bytes(envelope.payload, envelope.payload_type)):
        raise TrustError("oms.signature", f"{name}: the signature by {key.keyid[:12]}… does not fit its list of files.")
    return found


def check_files(signature: ModelSignature, files: Mapping[str, str], *, name: str) -> None:
    """Compare what was signed with what is there.

    Args:
        signature: says which files there must be.
        files: digest by path of those that are there.
        name: of the bundle or folder, for the message.

    Raises:
        TrustError: ``oms.files`` naming the first file that is missing, not signed, or changed.
    """
    for path in sorted(signature.files.keys() | files.keys()):
        signed, found = signature.files.get(path), files.get(path)
        if signed == found:
            continue
        what = (
            "is signed and not there"
            if found is None
            else "is not signed"
            if signed is None
            else "is not the file that was signed"
        )
        raise TrustError("oms.files", f"{name}: {path[:200]} {what}.", hint="Fetch it again, or ask its producer.")


def verify_folder(folder: Path, key: ProducerPublicKey, *, signature: Path | None = None) -> ModelSignature:
    """Verify a folder of files, as ``unpack`` writes it or any other tool signed it.

    Args:
        folder: every file in it must be listed.
        key: the producer's.
        signature: default ``model.sig`` in the folder.

    Raises:
        UsageError: ``oms.missing`` when there is no signature.
        TrustError: as :func:`verify_signature` and :func:`check_files`; ``oms.files`` for anything but plain files and folders.
    """
    path = signature or folder / SIGNATURE_PATH
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SIGNATURE_BYTES + 1)
    except OSError as error:
        raise UsageError("oms.missing", f"{path}: cannot read this model signature: {error.strerror}.") from error
    found = verify_signature(data, key, name=path.name)
    files = {}
    for entry in sorted(folder.rglob("*")):
        mode = entry.lstat().st_mode
        if stat.S_ISREG(mode) and not entry.samefile(path):
            files[entry.relative_to(folder).as_posix()] = digest_file(entry)
        elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise TrustError("oms.files", f"{entry}: neither a file nor a folder; a signed folder holds nothing else.")
    check_files(found, files, name=folder.name)
    return found


def _malformed(name: str, why: str) -> TrustError:
    return TrustError("oms.malformed", f"{name}: not a model signature: {why}.")
