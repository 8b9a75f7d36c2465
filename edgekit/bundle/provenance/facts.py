"""What the evidence is made of: the draft's records, gathered once, so that bill, provenance and card agree.

Digests here are of contents: of a sealed blob, what is in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.bundle.opening import content_of, opened_variant
from edgekit.bundle.provenance.intent import Intent
from edgekit.bundle.provenance.reliability import Reliability, Unmeasured
from edgekit.errors import ArtifactError
from edgekit.schema.base import decode_json
from edgekit.schema.candidate import Candidate
from edgekit.schema.manifest import BlobRef, Manifest, Variant
from edgekit.schema.measurement import EvalReport

if TYPE_CHECKING:
    from edgekit.bundle.writer import Content, Draft

EVIDENCE_ROLES = frozenset({"bom", "provenance", "card", "signature"})
SHARES = frozenset({"top1", "top5", "agreement"})
"""Metrics that are the share of samples that were answered rightly: their interval follows from the number of samples."""
_Z = 1.959964
"""97.5 % point of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class VariantFacts:
    """One variant with its candidate; ``model`` and ``golden`` are the contents, ``record`` the candidate's blob."""

    variant: Variant
    candidate: Candidate
    model: BlobRef
    golden: BlobRef
    record: BlobRef | None


@dataclass(frozen=True, kw_only=True)
class ReleaseFacts:
    """Everything that evidence is written from; ``data_source`` is where the packer's samples came from, empty without."""

    manifest: Manifest
    variants: tuple[VariantFacts, ...]
    intent: Intent
    reliability: Reliability | Unmeasured
    data_source: str = ""
    data_digest: str = ""

    @property
    def first(self) -> VariantFacts:
        """The preferred variant."""
        return self.variants[0]

    @property
    def contents(self) -> tuple[BlobRef, ...]:
        """Every blob that is not evidence itself, opened."""
        return tuple(content_of(ref) for ref in self.manifest.blobs if ref.role not in EVIDENCE_ROLES)


def gather_variants(manifest: Manifest, read: Callable[[str], bytes]) -> tuple[VariantFacts, ...]:
    """The variants with their candidates.

    Args:
        manifest: of a draft or of a bundle.
        read: the content of a blob by digest.

    Raises:
        ArtifactError: ``record.malformed`` when a candidate's record cannot be read, ``manifest.malformed`` when a variant's
            blob is not listed.
    """
    contents = {content_of(ref).digest: content_of(ref) for ref in manifest.blobs}
    records = [ref for ref in manifest.blobs if ref.role == "candidate"]
    found = []
    for index, variant in enumerate(manifest.variants):
        opened = opened_variant(manifest, variant)
        if index == 0 and variant.candidate is None:
            candidate, record = manifest.candidate, _record_of(manifest, records, read)
        else:
            record = next((ref for ref in records if ref.digest == variant.candidate), None)
            if record is None:
                text = f"the variant {variant.name} names a candidate that is not among the blobs."
                raise ArtifactError("manifest.malformed", text)
            candidate = decode_json(read(record.digest), Candidate, name=record.path)
        model, golden = contents[opened.model], contents[opened.golden]
        found.append(VariantFacts(variant=opened, candidate=candidate, model=model, golden=golden, record=record))
    return tuple(found)


def _record_of(manifest: Manifest, records: list[BlobRef], read: Callable[[str], bytes]) -> BlobRef | None:
    """The blob that holds the embedded candidate."""
    named = {variant.candidate for variant in manifest.variants}
    for ref in records:
        if ref.digest not in named and decode_json(read(ref.digest), Candidate, name=ref.path) == manifest.candidate:
            return ref
    return None


def reader_of(draft: Draft) -> Callable[[str], bytes]:
    """Reads a draft's blob by digest."""

    def read(digest: str) -> bytes:
        content: Content = draft.blobs[digest]
        return content if isinstance(content, bytes) else content.read_bytes()

    return read


def share_interval(value: float, samples: int) -> tuple[float, float]:
    """95 % interval of a share of samples (Wilson 1927, "Probable Inference, the Law of Succession").

    >>> [round(bound, 3) for bound in share_interval(0.9, 300)]
    [0.861, 0.929]
    """
    if samples < 1:
        return 0.0, 1.0
    spread = _Z * _Z / samples
    center = (value + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(value * (1 - value) / samples + spread / (4 * samples))
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True, kw_only=True)
class ClassRecall:
    """One class of the evaluation; samples and interval are None where they are not known."""

    name: str
    recall: float
    samples: int | None = None
    low: float | None = None
    high: float | None = None


def class_recalls(facts: ReleaseFacts, each: VariantFacts) -> tuple[ClassRecall, ...]:
    """The recall of each class, in the order of the model's classes.

    The number of samples is known where the packer gave the data of the evaluation, and all of it was run.
    """
    evaluation = each.candidate.evaluation
    if evaluation is None:
        return ()
    counts = _class_counts(facts, each.candidate.contract.labels, evaluation)
    places = {name: index for index, name in enumerate(each.candidate.contract.labels)}
    names = sorted(
        evaluation.per_class, key=lambda name: (places.get(name, len(places)), len(name) if name.isdigit() else 0, name)
    )
    found = []
    for name in names:
        recall, count = evaluation.per_class[name], counts.get(name)
        low, high = share_interval(recall, count) if count else (None, None)
        found.append(ClassRecall(name=name, recall=recall, samples=count, low=low, high=high))
    return tuple(found)


def _class_counts(facts: ReleaseFacts, labels: tuple[str, ...], evaluation: EvalReport) -> dict[str, int]:
    """Samples by class; empty where they are not known."""
    measured = facts.reliability
    if not isinstance(measured, Reliability) or measured.data != evaluation.data or measured.samples != measured.of:
        return {}
    total = len(measured.class_counts)
    names = labels if len(labels) == total else tuple(str(index) for index in range(total))
    found = {name: count for name, count in zip(names, measured.class_counts, strict=True) if count}
    return found if found.keys() == evaluation.per_class.keys() else {}
