"""Where a release comes from and where it went: from the source model to the devices, put together from signed records.

Releases and parents are read from the metadata, variants with their passes from the manifest and its blobs, who acted from the
audit log, who signed from the kept envelope. Which devices run it is for the fleet server to say; its answers are handed in.

    >>> trace(Path("repository"), "fashion", "1.1.0").variants[0].source.spec  # doctest: +SKIP
    'fashion.onnx'
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from edgekit.bundle.layout import blob_name
from edgekit.errors import RepositoryError
from edgekit.repository import audit
from edgekit.repository.listing import head_of, recalls_of, releases_of
from edgekit.repository.publishing import find_release, load_manifest
from edgekit.repository.signatures import signed_publishers
from edgekit.repository.store import Chain, Store
from edgekit.schema.base import SCHEMA_VERSION, Record, decode_json
from edgekit.schema.candidate import Candidate, PassStep, SourceModel
from edgekit.schema.digest import Digest, digest_bytes
from edgekit.schema.manifest import BlobRef, Manifest, Parity, Requires, Variant
from edgekit.schema.measurement import EvalReport, LatencyReport
from edgekit.schema.release import Fallback, Recall, Release

EVIDENCE = ("report", "card", "bom", "provenance", "signature")
Use = Literal["runs", "holds", "ran"]
"""``runs``: it serves it now; ``holds``: it lies in its other slot; ``ran``: it installed it once."""


class DeviceUse(Record, frozen=True, kw_only=True):
    """One device and one release, as the fleet server knows it."""

    site: str
    device: str
    use: Use
    model: str
    version: str
    counter: int
    at_ms: int = 0
    """When it was seen last, or installed it; Unix milliseconds."""


class Ancestor(Record, frozen=True, kw_only=True):
    """A release that this one replaced, directly or not; counter and date are None where it was removed since."""

    release: str
    counter: int | None = None
    published_at: datetime | None = None


class Placement(Record, frozen=True, kw_only=True):
    """The release on one channel; ``parents`` are what it replaced there, the nearest first."""

    channel: str
    counter: int
    published_at: datetime
    is_newest: bool
    parents: tuple[Ancestor, ...] = ()
    valid_until: datetime | None = None
    fallback: Fallback = "report"
    deltas: int = 0


class VariantLineage(Record, frozen=True, kw_only=True):
    """One form of the model and how it was made."""

    name: str
    format: str
    precision: str
    target: str
    target_digest: Digest
    requires: Requires
    model: BlobRef
    source: SourceModel
    passes: tuple[PassStep, ...]
    seed: int
    created_at: datetime
    edgekit_version: str
    evaluation: EvalReport | None = None
    latency: LatencyReport | None = None
    parity: Parity | None = None


class Lineage(Record, frozen=True, kw_only=True):
    """Everything about one release, as ``edgekit repo lineage --json`` prints it."""

    name: str
    version: str
    manifest: Digest
    created_at: datetime
    edgekit_version: str
    placements: tuple[Placement, ...]
    publishers: tuple[str, ...]
    """Key ids of the trusted publishers whose signatures are kept."""
    acts: tuple[audit.AuditEntry, ...]
    variants: tuple[VariantLineage, ...]
    evidence: tuple[BlobRef, ...] = ()
    recalls: tuple[Recall, ...] = ()
    devices: tuple[DeviceUse, ...] | None = None
    """None where no fleet server was asked."""
    schema_version: int = SCHEMA_VERSION


def trace(folder: Path, name: str, version: str, *, uses: Sequence[DeviceUse] | None = None) -> Lineage:
    """Put a release's lineage together.

    Args:
        folder: of the repository.
        name: of the model.
        version: of the release.
        uses: what the fleet server knows; None where it was not asked.

    Raises:
        RepositoryError: ``repository.no_release``, ``repository.damaged``.
        TrustError: ``audit.broken``, or as :meth:`Store.chain`.
    """
    store = Store.open(folder)
    chain = store.chain()
    release = find_release(chain, name, version)
    manifest, _ = load_manifest(folder, release)
    what = f"{name}@{version}"
    digests = {release.manifest_digest, *(variant.model for variant in manifest.variants)}
    return Lineage(
        name=name,
        version=version,
        manifest=release.manifest_digest,
        created_at=manifest.created_at,
        edgekit_version=manifest.edgekit_version,
        placements=_placements(chain, name, version),
        publishers=tuple(key.keyid for key in signed_publishers(store, release.manifest_digest)),
        acts=tuple(entry for entry in audit.read_log(folder) if entry.subject == what or entry.subject in digests),
        variants=tuple(_variant(folder, manifest, variant) for variant in manifest.variants),
        evidence=tuple(ref for role in EVIDENCE for ref in manifest.blobs if ref.role == role),
        recalls=tuple(recall for recall in recalls_of(chain.targets).recalls if recall.digest in digests),
        devices=None if uses is None else tuple(use for use in uses if (use.model, use.version) == (name, version)),
    )


def _placements(chain: Chain, name: str, version: str) -> tuple[Placement, ...]:
    releases = releases_of(chain)
    found = [release for release in releases if (release.info.name, release.info.version) == (name, version)]
    return tuple(
        Placement(
            channel=release.info.channel,
            counter=release.info.counter,
            published_at=release.info.published_at,
            is_newest=head_of(releases, name, release.info.channel) == release,
            parents=_parents(releases, release),
            valid_until=release.info.valid_until,
            fallback=release.info.fallback,
            deltas=len(release.info.deltas),
        )
        for release in found
    )


def _parents(releases: Sequence[Release], release: Release) -> tuple[Ancestor, ...]:
    """The chain of what was replaced; it ends where a release was removed, or comes back to itself after a rollback."""
    channel = release.info.channel
    by_name = {f"{each.info.name}@{each.info.version}": each for each in releases if each.info.channel == channel}
    found: list[Ancestor] = []
    seen = {f"{release.info.name}@{release.info.version}"}
    parent = release.info.parent
    while parent:
        each = by_name.get(parent)
        info = each.info if each else None
        found.append(
            Ancestor(release=parent, counter=info.counter if info else None, published_at=info.published_at if info else None)
        )
        if parent in seen or info is None:
            break
        seen.add(parent)
        parent = info.parent
    return tuple(found)


def _variant(folder: Path, manifest: Manifest, variant: Variant) -> VariantLineage:
    candidate = manifest.candidate if variant.candidate is None else _candidate(folder, variant.candidate)
    return VariantLineage(
        name=variant.name,
        format=variant.format,
        precision=variant.precision,
        target=variant.target or manifest.target,
        target_digest=candidate.target_digest,
        requires=variant.requires,
        model=next(ref for ref in manifest.blobs if ref.digest == variant.model),
        source=candidate.source,
        passes=candidate.lineage,
        seed=candidate.seed,
        created_at=candidate.created_at,
        edgekit_version=candidate.edgekit_version,
        evaluation=candidate.evaluation,
        latency=candidate.latency,
        parity=variant.parity,
    )


def _candidate(folder: Path, digest: str) -> Candidate:
    path = folder / blob_name(digest)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RepositoryError("repository.damaged", f"{path}: cannot be read: {error.strerror}.") from error
    if digest_bytes(data) != digest:
        raise RepositoryError("repository.damaged", f"{path}: changed after it was published.", hint="Publish it again.")
    return decode_json(data, Candidate, name=str(path))
