"""The bundle writer: what ``edgekit optimize`` found becomes one signed file with canonical bytes.

``pack_bundle`` reads an output folder, makes golden samples on the runtime and packs; ``write_bundle`` packs any manifest with
its blobs. Both check every digest on the way in, and read the finished file back with the strict reader before it gets its
name. The same arguments give the same bytes.

The runtime is an argument (see :class:`edgekit.bundle.sampling.ModelOpener`): a bundle knows nothing of what runs it.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from edgekit import __version__
from edgekit.bundle.layout import MANIFEST_NAME, SIGNATURE_NAME, Entry, arrange, blob_name
from edgekit.bundle.parity import MAX_SAMPLES as MAX_PARITY_SAMPLES
from edgekit.bundle.parity import check_contract, check_parity, measure_parity
from edgekit.bundle.reader import parse_manifest, read_bundle
from edgekit.bundle.sampling import OpenedModel, Samples, make_golden, sample_feeds
from edgekit.bundle.selection import RUNTIME_OF, requires_of
from edgekit.durable import sync_folder, write_durably
from edgekit.errors import ArtifactError, UsageError
from edgekit.schema.artifact import ModelArtifact
from edgekit.schema.base import decode_json, encode_json, encode_msgpack
from edgekit.schema.candidate import Candidate
from edgekit.schema.digest import CHUNK_BYTES, digest_bytes, digest_file, short
from edgekit.schema.manifest import (
    MANIFEST_MEDIA_TYPE,
    BlobRef,
    BlobRole,
    Manifest,
    ModelName,
    ModelVersion,
    Requires,
    Variant,
)
from edgekit.schema.target import TargetProfile
from edgekit.trust.signer import Signer, sign_envelope

Content = bytes | Path
GOLDEN_PATH = "golden.msgpack"
CANDIDATE_FILE = "candidate.json"
REPORT_FILES = ("report.html", "report.json")
DEFAULT_GOLDEN_SAMPLES = 8


class SessionOpener(Protocol):
    """Opens a model file on its runtime."""

    def __call__(self, path: Path, *, threads: int, is_optimized: bool) -> OpenedModel:
        """A new session."""


@dataclass(frozen=True)
class _Sized:
    """A content with what the layout needs of it."""

    content: Content
    size_bytes: int
    crc32: int
    digest: str


def _chunks(content: Content) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _measure(content: Content) -> _Sized:
    state, crc32, size = hashlib.sha256(), 0, 0
    for chunk in _chunks(content):
        state.update(chunk)
        crc32 = zlib.crc32(chunk, crc32)
        size += len(chunk)
    return _Sized(content=content, size_bytes=size, crc32=crc32, digest="sha256:" + state.hexdigest())


def write_bundle(manifest: Manifest, blobs: Mapping[str, Content], *, signer: Signer | Sequence[Signer], out: Path) -> Path:
    """Sign a manifest and pack it with its blobs.

    Args:
        manifest: lists every blob.
        blobs: content, or the file that has it, by digest; exactly the manifest's.
        signer: the publisher's key, or several.
        out: the file to write or replace.

    Returns:
        ``out``.

    Raises:
        ArtifactError: ``bundle.missing_blob``, ``bundle.digest_mismatch``, ``bundle.too_large`` or ``manifest.malformed``.
    """
    manifest_bytes = encode_json(manifest)
    parse_manifest(manifest_bytes)
    signers = [signer] if isinstance(signer, Signer) else list(signer)
    contents: dict[str, _Sized] = {
        MANIFEST_NAME: _measure(manifest_bytes),
        SIGNATURE_NAME: _measure(sign_envelope(manifest_bytes, signers, payload_type=MANIFEST_MEDIA_TYPE)),
    }
    wanted = {ref.digest: ref for ref in manifest.blobs}
    if missing := sorted(wanted.keys() ^ blobs.keys()):
        raise ArtifactError("bundle.missing_blob", f"{missing[0]}: manifest and blobs do not name the same digests.")
    for digest, ref in wanted.items():
        contents[blob_name(digest)] = _checked(_measure(blobs[digest]), ref)
    layout = arrange(Entry(name=name, size_bytes=item.size_bytes, crc32=item.crc32) for name, item in contents.items())

    def stream() -> Iterator[bytes]:
        for placed in layout.placed:
            yield placed.header
            yield from _chunks(contents[placed.entry.name].content)
        yield layout.directory

    candidate = out.with_name(f".{out.name}.unchecked")
    try:
        write_durably(candidate, stream())
        read_bundle(candidate)
        candidate.replace(out)
        sync_folder(out.parent)
    finally:
        candidate.unlink(missing_ok=True)
    return out


def _checked(item: _Sized, ref: BlobRef) -> _Sized:
    if (item.digest, item.size_bytes) != (ref.digest, ref.size_bytes):
        raise ArtifactError(
            "bundle.digest_mismatch",
            f"{ref.path}: sha256:{short(item.digest)}… ({item.size_bytes} bytes), the manifest says "
            f"sha256:{short(ref.digest)}… ({ref.size_bytes} bytes).",
        )
    return item


@dataclass(frozen=True)
class Draft:
    """A release that is not signed yet: the manifest, and the content, or the file that has it, of each blob by digest.

    What adds to a release takes a draft and gives a new one (:meth:`with_blob`), until :func:`write_bundle` signs it.
    """

    manifest: Manifest
    blobs: Mapping[str, Content]

    def with_blob(self, path: str, role: BlobRole, content: Content) -> Draft:
        """The draft with one more blob; the same content again changes nothing."""
        item = _measure(content)
        if item.digest in self.blobs:
            return self
        ref = BlobRef(path=path, role=role, digest=item.digest, size_bytes=item.size_bytes)
        manifest = msgspec.structs.replace(self.manifest, blobs=(*self.manifest.blobs, ref))
        return Draft(manifest, {**self.blobs, item.digest: content})


def pack_bundle(
    candidate_dir: Path,
    out: Path,
    *,
    name: str,
    version: str,
    signer: Signer | Sequence[Signer],
    open_session: SessionOpener,
    data: Samples | None = None,
    golden_samples: int = DEFAULT_GOLDEN_SAMPLES,
    profile: TargetProfile | None = None,
    ram_mb: float | None = None,
    created_at: datetime | None = None,
    threads: int = 2,
    seed: int = 0,
) -> Path:
    """Pack and sign the output folder of ``edgekit optimize``; arguments and errors as :func:`draft_bundle`.

    Args:
        candidate_dir: holds ``candidate.json``, the model it names and the reports.
        out: the file to write or replace.
        name: the model's name, lower case.
        version: the release's version.
        signer: the publisher's key, or several.
        open_session: the runtime, to make golden samples on.
        data: real samples for the golden set.
        golden_samples: how many to keep.
        profile: the target that it was made for, which says what a device must have; None asks for the runtime only.
        ram_mb: memory that a device must have.
        created_at: for bytes that can be made again; None is now.
        threads: the largest number of threads that the tolerance is measured with.
        seed: for drawn golden inputs.
    """
    draft = draft_bundle(
        candidate_dir,
        name=name,
        version=version,
        open_session=open_session,
        data=data,
        golden_samples=golden_samples,
        profile=profile,
        ram_mb=ram_mb,
        created_at=created_at,
        threads=threads,
        seed=seed,
    )
    return write_bundle(draft.manifest, draft.blobs, signer=signer, out=out)


def draft_bundle(
    candidate_dir: Path,
    *,
    name: str,
    version: str,
    open_session: SessionOpener,
    data: Samples | None = None,
    golden_samples: int = DEFAULT_GOLDEN_SAMPLES,
    profile: TargetProfile | None = None,
    rules: Requires | None = None,
    ram_mb: float | None = None,
    created_at: datetime | None = None,
    threads: int = 2,
    seed: int = 0,
) -> Draft:
    """Make a release, not signed yet, of the output folder of ``edgekit optimize``.

    Args:
        candidate_dir: holds ``candidate.json``, the model it names and the reports.
        name: the model's name, lower case.
        version: the release's version.
        open_session: the runtime, to make golden samples on.
        data: real samples for the golden set.
        golden_samples: how many to keep.
        profile: the target that it was made for, which says what a device must have; None asks for the runtime only.
        rules: architecture and instructions as the run for several targets wrote them down; they count before the profile.
        ram_mb: memory that a device must have; None: the measured peak, where there is one.
        created_at: for bytes that can be made again; None is now.
        threads: the largest number of threads that the tolerance is measured with.
        seed: for drawn golden inputs.

    Raises:
        UsageError: ``bundle.name``, ``bundle.version``, ``bundle.golden_samples``, ``candidate.not_found``.
        ArtifactError: ``candidate.failed``, ``candidate.digest_mismatch``, or an error of the golden samples.
    """
    _check_names(name, version)
    if golden_samples < 1:
        raise UsageError("bundle.golden_samples", f"{golden_samples} golden samples: at least 1 is needed.")
    candidate, candidate_bytes = read_candidate(candidate_dir)
    artifact, model = _find_model(candidate, candidate_dir)

    def open_model(*, threads: int, is_optimized: bool) -> OpenedModel:
        return open_session(model, threads=threads, is_optimized=is_optimized)

    made = make_golden(
        open_model,
        candidate.contract,
        samples=data,
        precision=artifact.precision,
        count=golden_samples,
        threads=threads,
        seed=seed,
    )
    golden = encode_msgpack(made.golden)
    refs, blobs = _gather(candidate_dir, artifact, model, golden, candidate_bytes)
    requires = requires_of(
        profile,
        precision=artifact.precision,
        runtime=RUNTIME_OF[artifact.format],
        runtime_version=made.runtime_version,
        ram_mb=ram_mb if ram_mb is not None else _measured_ram_mb(candidate),
    )
    if rules is not None:
        requires = msgspec.structs.replace(requires, arch=rules.arch, isa=rules.isa, isa_any=rules.isa_any)
    manifest = Manifest(
        name=name,
        version=version,
        created_at=(created_at or datetime.now(UTC)).replace(microsecond=0),
        target=candidate.target,
        contract=candidate.contract,
        variants=(_variant(candidate.name, artifact, digest_bytes(golden), requires),),
        blobs=refs,
        candidate=candidate,
        edgekit_version=__version__,
    )
    return Draft(manifest, blobs)


def add_variant(
    draft: Draft,
    candidate_dir: Path,
    *,
    open_session: SessionOpener,
    data: Samples | None = None,
    golden_samples: int = DEFAULT_GOLDEN_SAMPLES,
    profile: TargetProfile | None = None,
    rules: Requires | None = None,
    limit: str = "",
    data_digest: str | None = None,
    threads: int = 2,
    seed: int = 0,
) -> Draft:
    """Add one more form of the model, when it answers as the first one does.

    Args:
        draft: a release with one variant or more.
        candidate_dir: output folder of ``edgekit optimize`` for another target.
        open_session: the runtime, for golden samples and parity.
        data: real samples for both; without them parity is measured on drawn inputs.
        golden_samples: how many to keep.
        profile: the target that it was made for.
        rules: architecture and instructions as the run for several targets wrote them down; they count before the profile.
        limit: of parity, for example ``agreement>=0.98``; empty takes the task's default.
        data_digest: of the samples' data set.
        threads: the largest number of threads that the tolerance is measured with.
        seed: for drawn inputs.

    Raises:
        ArtifactError: ``variant.contract``, ``variant.parity``, or as :func:`draft_bundle`.
    """
    other = draft_bundle(
        candidate_dir,
        name=draft.manifest.name,
        version=draft.manifest.version,
        open_session=open_session,
        data=data,
        golden_samples=golden_samples,
        profile=profile,
        rules=rules,
        created_at=draft.manifest.created_at,
        threads=threads,
        seed=seed,
    )
    added, first = other.manifest, draft.manifest.variants[0]
    variant = added.variants[0]
    name = variant.name if variant.name not in {each.name for each in draft.manifest.variants} else ""
    name = name or f"{variant.name}-{added.target}"
    check_contract(draft.manifest.contract, added.contract, name)
    feeds = list(sample_feeds(draft.manifest.contract, data, count=MAX_PARITY_SAMPLES, seed=seed))
    with _opened(draft, first.model, open_session) as left, _opened(other, variant.model, open_session) as right:
        parity = measure_parity(
            left, right, feeds, reference=first.name, contract=added.contract, limit=limit, data=data_digest
        )
    check_parity(parity, name)
    merged = draft
    for ref in added.blobs:
        if ref.role in {"model", "golden", "candidate"}:
            merged = merged.with_blob(f"{name}/{ref.path}", ref.role, other.blobs[ref.digest])
    found = next(ref.digest for ref in added.blobs if ref.role == "candidate")
    joined = msgspec.structs.replace(variant, name=name, target=added.target, candidate=found, parity=parity)
    manifest = msgspec.structs.replace(merged.manifest, variants=(*merged.manifest.variants, joined))
    return Draft(manifest, merged.blobs)


@contextmanager
def _opened(draft: Draft, digest: str, open_session: SessionOpener) -> Iterator[OpenedModel]:
    content = draft.blobs[digest]
    assert isinstance(content, Path), "models are files until a release is sealed"
    session = open_session(content, threads=1, is_optimized=True)
    try:
        yield session
    finally:
        session.close()


def _measured_ram_mb(candidate: Candidate) -> float | None:
    """Peak memory where it was measured, in whole MB."""
    peak = candidate.latency.peak_rss_mb if candidate.latency else None
    return float(math.ceil(peak)) if peak is not None else None


def _variant(name: str, artifact: ModelArtifact, golden: str, requires: Requires) -> Variant:
    return Variant(
        name=name,
        format=artifact.format,
        precision=artifact.precision,
        model=artifact.digest,
        golden=golden,
        requires=requires,
    )


def _gather(
    folder: Path, artifact: ModelArtifact, model: Path, golden: bytes, candidate_bytes: bytes
) -> tuple[tuple[BlobRef, ...], dict[str, Content]]:
    """Every blob of the release; a content that occurs twice is listed once."""
    found: list[tuple[str, BlobRole, Content]] = [
        (f"model.{artifact.format}", "model", model),
        (GOLDEN_PATH, "golden", golden),
        (CANDIDATE_FILE, "candidate", candidate_bytes),
    ]
    found += [(name, "report", folder / name) for name in REPORT_FILES if (folder / name).is_file()]
    refs, blobs = [], {}
    for path, role, content in found:
        item = _measure(content)
        if item.digest not in blobs:
            blobs[item.digest] = content
            refs.append(BlobRef(path=path, role=role, digest=item.digest, size_bytes=item.size_bytes))
    return tuple(refs), blobs


def _check_names(name: str, version: str) -> None:
    rules: list[tuple[Literal["name", "version"], str, object, str]] = [
        ("name", name, ModelName, "lower-case letters, digits, dots, dashes and underscores, at most 64"),
        ("version", version, ModelVersion, "letters, digits and . + - _, at most 64, for example 1.0.0"),
    ]
    for what, value, kind, rule in rules:
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError:
            raise UsageError(f"bundle.{what}", f"--{what} {value!r}: not a {what}; expected {rule}.") from None


def read_candidate(folder: Path) -> tuple[Candidate, bytes]:
    """The candidate of an output folder, with the record's bytes.

    Raises:
        UsageError: ``candidate.not_found``.
        ArtifactError: ``record.malformed``.
    """
    path = folder / CANDIDATE_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            "candidate.not_found",
            f"{folder}: no {CANDIDATE_FILE} here; expected the output folder of edgekit optimize.",
            hint="edgekit optimize MODEL --target NAME --data CALIB --out DIR",
        ) from error
    return decode_json(data, Candidate, name=str(path)), data


def _find_model(candidate: Candidate, folder: Path) -> tuple[ModelArtifact, Path]:
    artifact = candidate.artifact
    if artifact is None or candidate.verdict.status == "failed":
        raise ArtifactError(
            "candidate.failed",
            f"{candidate.name}: this candidate has no model ({candidate.verdict.reason}).",
            hint="Pack the chosen candidate: the folder itself, not one under candidates/.",
        )
    path = folder / artifact.path
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError("candidate.outside", f"{artifact.path}: the candidate names a model outside its folder.")
    if not path.is_file():
        raise UsageError("candidate.not_found", f"{path}: the model that {CANDIDATE_FILE} names is not here.")
    found = digest_file(path)
    if found != artifact.digest:
        raise ArtifactError(
            "candidate.digest_mismatch",
            f"{path}: sha256:{short(found)}…, {CANDIDATE_FILE} says sha256:{short(artifact.digest)}…; "
            "it is not the model that was evaluated.",
            hint="Run edgekit optimize again.",
        )
    return artifact, path
