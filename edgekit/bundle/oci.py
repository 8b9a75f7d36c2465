"""A bundle as an OCI image layout with ModelPack media types, and back to the identical bytes.

Every blob of the bundle is a layer, uncompressed and named as in the bundle, so that tools which know ModelPack (the CNCF
model-spec) find the model; the bundle's manifest and its signature are layers, too, under ``.edgekit/``, a folder that no blob
can be in. Nothing is made anew: what the publisher signed is what comes back, and the same bundle gives the same layout.

The layout is no statement of trust: :func:`import_oci` checks what the bundle reader checks, and who signed is asked of the
bundle afterwards.

    >>> export_oci(Path("kws-1.0.0.edgekit"), Path("kws-oci"))        # doctest: +SKIP
    'sha256:6b1d…'
    >>> import_oci(Path("kws-oci"), Path("again.edgekit"))            # doctest: +SKIP
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar, assert_never

import msgspec

from edgekit.bundle.layout import BLOB_PREFIX, MANIFEST_NAME, SIGNATURE_NAME, Entry, arrange, blob_name
from edgekit.bundle.reader import Bundle, read_bundle
from edgekit.durable import make_folder, sync_folder, write_durably
from edgekit.errors import ArtifactError, EnvironmentFault, UsageError
from edgekit.schema.digest import CHUNK_BYTES, Digest, digest_bytes, hex_of, short
from edgekit.schema.manifest import BlobRole, Manifest
from edgekit.trust.dsse import encode_envelope

ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
DATASET = "application/vnd.cncf.model.dataset.v1.raw"
DOC = "application/vnd.cncf.model.doc.v1.raw"
FILEPATH = "org.cncf.model.filepath"
REF_NAME = "org.opencontainers.image.ref.name"
OWN_FOLDER = ".edgekit"
MAX_JSON_BYTES = 16 << 20
LAYOUT_VERSION = b'{"imageLayoutVersion":"1.0.0"}'
_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8", "int16": "int16"}
_NOT_A_TAG = re.compile(r"[^A-Za-z0-9._-]")


class _Json(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of what the OCI and ModelPack specifications define; fields that are not known here are passed over."""


J = TypeVar("J", bound=_Json)


class _Descriptor(_Json, frozen=True, kw_only=True, omit_defaults=True):
    media_type: str
    digest: Digest
    size: int
    artifact_type: str = ""
    annotations: dict[str, str] = {}


class _ImageManifest(_Json, frozen=True, kw_only=True):
    schema_version: int
    media_type: str
    artifact_type: str = ""
    config: _Descriptor
    layers: tuple[_Descriptor, ...]
    annotations: dict[str, str] = {}


class _Index(_Json, frozen=True, kw_only=True):
    schema_version: int
    media_type: str = INDEX_TYPE
    manifests: tuple[_Descriptor, ...]


class _About(_Json, frozen=True, kw_only=True):
    created_at: datetime
    name: str
    version: str


class _Technical(_Json, frozen=True, kw_only=True, omit_defaults=True):
    format: str
    precision: str = ""


class _LayerDigests(_Json, frozen=True, kw_only=True):
    type: str = "layers"
    diff_ids: tuple[str, ...]


class _Config(_Json, frozen=True, kw_only=True):
    descriptor: _About
    config: _Technical
    modelfs: _LayerDigests


def _media_type(role: BlobRole) -> str:
    """The ModelPack media type of a blob; all are ``.raw``: readers decode by that ending, and weights do not compress."""
    match role:
        case "model":
            return WEIGHT
        case "golden" | "baseline":
            return DATASET
        case "candidate" | "report" | "card" | "bom" | "provenance" | "signature":
            return DOC
        case _:
            assert_never(role)


# --- export


def export_oci(path: Path, out: Path) -> str:
    """Write a bundle as an OCI image layout with one artifact, tagged with the version.

    Args:
        path: the bundle; its structure and digests are checked.
        out: a folder that does not exist yet, or is empty; it gets its name when it is whole.

    Returns:
        The digest of the artifact's manifest.

    Raises:
        UsageError: ``oci.exists``, ``bundle.not_found``.
        ArtifactError, TrustError: as :func:`edgekit.bundle.reader.read_bundle`.
        EnvironmentFault: ``oci.unwritable``.
    """
    bundle = read_bundle(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("oci.exists", f"{out}: exists already and is not empty.", hint="Give another folder.")
    try:
        with _new_folder(out) as folder:
            digest = _write_layout(bundle, folder)
    except OSError as error:
        raise EnvironmentFault("oci.unwritable", f"{out}: cannot be written: {error.strerror or error}.") from error
    return digest


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes it when nothing failed."""
    make_folder(out.parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.replace(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_layout(bundle: Bundle, folder: Path) -> str:
    records = {
        MANIFEST_NAME: (WEIGHT_CONFIG, bundle.manifest_bytes),
        SIGNATURE_NAME: (DOC, encode_envelope(bundle.envelope)),
    }
    layers = []
    for ref in bundle.manifest.blobs:
        write_durably(folder / blob_name(ref.digest), bundle.chunks(ref.digest))
        annotations = {FILEPATH: ref.path}
        layers.append(
            _Descriptor(media_type=_media_type(ref.role), digest=ref.digest, size=ref.size_bytes, annotations=annotations)
        )
    for name, (kind, data) in records.items():
        layers.append(_store(folder, kind, data, annotations={FILEPATH: f"{OWN_FOLDER}/{name}"}))
    manifest = bundle.manifest
    config = _store(folder, CONFIG_TYPE, _encode(_config(manifest, tuple(layer.digest for layer in layers))))
    image = _ImageManifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        artifact_type=ARTIFACT_TYPE,
        config=config,
        layers=tuple(layers),
        annotations={
            "org.opencontainers.image.created": manifest.created_at.isoformat().replace("+00:00", "Z"),
            "org.opencontainers.image.title": manifest.name,
            "org.opencontainers.image.version": manifest.version,
        },
    )
    tag = {REF_NAME: _NOT_A_TAG.sub("_", manifest.version)}
    entry = _store(folder, MANIFEST_TYPE, _encode(image), artifact_type=ARTIFACT_TYPE, annotations=tag)
    write_durably(folder / "index.json", _encode(_Index(schema_version=2, manifests=(entry,))))
    write_durably(folder / "oci-layout", LAYOUT_VERSION)
    return entry.digest


def _config(manifest: Manifest, digests: tuple[str, ...]) -> _Config:
    first = manifest.variants[0]
    return _Config(
        descriptor=_About(created_at=manifest.created_at, name=manifest.name, version=manifest.version),
        config=_Technical(format=first.format, precision=_PRECISIONS.get(first.precision, "")),
        modelfs=_LayerDigests(diff_ids=digests),
    )


def _encode(record: _Json) -> bytes:
    return msgspec.json.encode(record, order="deterministic")


def _store(
    folder: Path, kind: str, data: bytes, *, artifact_type: str = "", annotations: dict[str, str] | None = None
) -> _Descriptor:
    """Write a small blob; its descriptor."""
    digest = digest_bytes(data)
    write_durably(folder / blob_name(digest), data)
    return _Descriptor(
        media_type=kind, digest=digest, size=len(data), artifact_type=artifact_type, annotations=annotations or {}
    )


# --- import


def import_oci(folder: Path, out: Path) -> Bundle:
    """Make the bundle that was exported, byte for byte.

    Args:
        folder: an OCI image layout with one artifact that :func:`export_oci` made, perhaps copied by other tools since.
        out: the file to write or replace.

    Returns:
        The bundle, structure and digests checked; who signed it was not looked at.

    Raises:
        UsageError: ``oci.not_found``.
        ArtifactError: ``oci.malformed`` when it is no such layout, or ``bundle.malformed``.
        TrustError: ``bundle.digest_mismatch`` when a layer changed.
        EnvironmentFault: ``oci.unwritable``.
    """
    image = _read_image(folder)
    files = {layer.annotations.get(FILEPATH, ""): layer for layer in image.layers}
    own = {name: files.pop(f"{OWN_FOLDER}/{name}", None) for name in (MANIFEST_NAME, SIGNATURE_NAME)}
    sources = {name: _blob(folder, layer.digest) for name, layer in own.items() if layer is not None}
    if len(sources) != len(own):
        raise _malformed(folder, f"its layers do not hold {OWN_FOLDER}/{MANIFEST_NAME} and {OWN_FOLDER}/{SIGNATURE_NAME}")
    sources |= {blob_name(layer.digest): _blob(folder, layer.digest) for layer in files.values()}
    candidate = out.with_name(f".{out.name}.unchecked")
    try:
        write_durably(candidate, _bundle_bytes(sources))
        bundle = read_bundle(candidate)
        candidate.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        raise EnvironmentFault("oci.unwritable", f"{out}: cannot be written: {error.strerror or error}.") from error
    finally:
        candidate.unlink(missing_ok=True)
    return replace(bundle, path=out)


def _read_image(folder: Path) -> _ImageManifest:
    """The one artifact of a layout."""
    index = _decode(_read_json(folder, folder / "index.json"), _Index, folder)
    if len(index.manifests) != 1:
        raise _malformed(folder, f"it has {len(index.manifests)} artifacts, 1 is expected; copy the one you want out of it")
    entry = index.manifests[0]
    data = _read_json(folder, _blob(folder, entry.digest))
    if digest_bytes(data) != entry.digest:
        raise _malformed(folder, f"the manifest is not the sha256:{short(entry.digest)}… that the index names")
    image = _decode(data, _ImageManifest, folder)
    if ARTIFACT_TYPE not in {image.artifact_type, entry.artifact_type} and image.config.media_type != CONFIG_TYPE:
        raise _malformed(folder, f"it holds no model: its type is {image.artifact_type or image.config.media_type}")
    return image


def _blob(folder: Path, digest: str) -> Path:
    return folder / BLOB_PREFIX / hex_of(digest)


def _read_json(folder: Path, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size) if size <= MAX_JSON_BYTES else None
    except OSError as error:
        raise UsageError("oci.not_found", f"{folder}: not an OCI image layout: {path.name}: {error.strerror}.") from error
    if data is None:
        raise _malformed(folder, f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
    return data


def _decode(data: bytes, kind: type[J], folder: Path) -> J:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(folder, f"{kind.__name__.strip('_')}: {error}") from error


def _bundle_bytes(sources: dict[str, Path]) -> Iterator[bytes]:
    """The bundle's bytes from the files of its entries; each file is read twice and never held."""
    layout = arrange(_measure(name, path) for name, path in sources.items())
    for placed in layout.placed:
        yield placed.header
        yield from _chunks(sources[placed.entry.name])
    yield layout.directory


def _measure(name: str, path: Path) -> Entry:
    crc32, size = 0, 0
    for chunk in _chunks(path):
        crc32 = zlib.crc32(chunk, crc32)
        size += len(chunk)
    return Entry(name=name, size_bytes=size, crc32=crc32)


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise ArtifactError("oci.malformed", f"{path}: a layer cannot be read: {error.strerror}.") from error
    with file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _malformed(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "oci.malformed", f"{folder}: not a layout of a bundle: {why}.", hint='"edgekit bundle export" makes one.'
    )
