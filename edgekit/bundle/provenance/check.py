"""Does the evidence in a bundle speak of this bundle? Digests that it names are compared with the manifest's.

Who wrote it is the publisher's signature's business (the manifest binds every blob); whether it is true is nobody's but the
writer's. What is checked is that a bill, statement, card or model signature of another release was not packed with this one.

1. The bill names the release, and per role exactly the digests of the manifest: models, golden samples, candidates, reports,
   sources, targets, evaluation data.
2. Each statement's subject is a model of this release; each model has one; its source and target are its candidate's.
3. Each form of the card names every model's digest.
4. The model signature lists exactly the files of the bundle.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import msgspec

from edgekit.bundle.opening import content_of
from edgekit.bundle.provenance import oms
from edgekit.bundle.provenance.bom import ROLE_PROPERTY
from edgekit.bundle.provenance.facts import VariantFacts, gather_variants
from edgekit.bundle.provenance.intent import INTENT_PATH
from edgekit.bundle.provenance.producer_key import ProducerPublicKey
from edgekit.bundle.provenance.slsa import PREDICATE_TYPE, ProvenanceStatement
from edgekit.bundle.provenance.statement import STATEMENT_TYPE
from edgekit.bundle.reader import MAX_RECORD_BYTES, Bundle
from edgekit.errors import TrustError
from edgekit.schema.digest import hex_of, short
from edgekit.schema.manifest import BlobRef, BlobRole, Manifest

_REPACK = "It is evidence of another release; ask who packed it."


class _Property(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    value: str = ""


class _Hash(msgspec.Struct, frozen=True, kw_only=True):
    alg: str
    content: str


class _Component(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    type: str
    version: str = ""
    hashes: tuple[_Hash, ...] = ()
    properties: tuple[_Property, ...] = ()

    @property
    def role(self) -> str:
        """What it stands for, as edgekit writes it; empty for anything else."""
        return next((item.value for item in self.properties if item.name == ROLE_PROPERTY), "")


class _Metadata(msgspec.Struct, frozen=True, kw_only=True):
    component: _Component


class _Bom(msgspec.Struct, frozen=True, kw_only=True):
    bom_format: str = msgspec.field(name="bomFormat")
    spec_version: str = msgspec.field(name="specVersion")
    serial_number: str = msgspec.field(name="serialNumber", default="")
    metadata: _Metadata
    components: tuple[_Component, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BomSummary:
    """A bill that belongs to the bundle."""

    path: str
    spec_version: str
    serial_number: str
    components: int
    models: int
    tools: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ProvenanceSummary:
    """A statement that belongs to the bundle."""

    path: str
    subject: str
    source: str
    source_digest: str
    passes: tuple[str, ...]
    builder: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What evidence a bundle has; all of it fits the bundle."""

    boms: tuple[BomSummary, ...] = ()
    provenance: tuple[ProvenanceSummary, ...] = ()
    cards: tuple[str, ...] = ()
    signature: oms.ModelSignature | None = None
    is_signature_verified: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is none."""
        return not (self.boms or self.provenance or self.cards or self.signature)


def check_evidence(bundle: Bundle, oms_key: ProducerPublicKey | None = None) -> Evidence:
    """Read a bundle's evidence and check that it speaks of this bundle.

    Args:
        bundle: a bundle that was read.
        oms_key: the producer's key; without it the model signature's files are compared, and who made it is not looked at.

    Raises:
        TrustError: ``evidence.mismatch``, ``evidence.malformed``, ``evidence.too_large``, ``oms.missing`` when a key is given
            and there is no signature, and the errors of :func:`edgekit.bundle.provenance.oms.verify_signature`.
    """
    manifest = bundle.manifest
    documents = {
        role: [(ref.path, _read(bundle, ref)) for ref in manifest.blobs if ref.role == role]
        for role in ("bom", "provenance", "card", "signature")
    }
    variants = gather_variants(manifest, bundle.blob) if any(documents.values()) else ()
    signature = _check_signature(bundle, documents["signature"], oms_key)
    provenance = tuple(_check_statement(bundle, path, data, variants) for path, data in documents["provenance"])
    if missing := {each.model.path for each in variants} - {item.subject for item in provenance} if provenance else set():
        raise _mismatch(bundle, "provenance", f"there is no statement of how {min(missing)} was made")
    return Evidence(
        boms=tuple(_check_bom(bundle, path, data, variants) for path, data in documents["bom"]),
        provenance=provenance,
        cards=tuple(_check_card(bundle, path, data, variants) for path, data in documents["card"] if path != INTENT_PATH),
        signature=signature,
        is_signature_verified=signature is not None and oms_key is not None,
    )


def _read(bundle: Bundle, ref: BlobRef) -> bytes:
    if ref.size_bytes > MAX_RECORD_BYTES:
        text = f"{bundle.path.name}: {ref.path} has {ref.size_bytes} bytes; evidence has at most {MAX_RECORD_BYTES}."
        raise TrustError("evidence.too_large", text)
    return bundle.blob(ref.digest)


def _mismatch(bundle: Bundle, path: str, why: str) -> TrustError:
    return TrustError("evidence.mismatch", f"{bundle.path.name}: {path}: {why}.", hint=_REPACK)


def _decode(bundle: Bundle, path: str, data: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrustError("evidence.malformed", f"{bundle.path.name}: {path}: cannot be read: {error}.", hint=_REPACK) from error


# --- model signature --------------------------------------------------------------------------------------------------------


def _check_signature(
    bundle: Bundle, found: list[tuple[str, bytes]], key: ProducerPublicKey | None
) -> oms.ModelSignature | None:
    name = bundle.path.name
    if not found:
        if key is not None:
            text = f"{name}: no model signature in this bundle."
            raise TrustError("oms.missing", text, hint='Pack it with "edgekit bundle pack --oms-key KEY.pem".')
        return None
    if len(found) > 1:
        raise _mismatch(bundle, found[1][0], "a bundle has one model signature")
    path, data = found[0]
    label = f"{name}: {path}"
    signature = oms.verify_signature(data, key, name=label) if key else oms.parse_signature(data, name=label)
    oms.check_files(signature, oms.covered_files(bundle.manifest), name=label)
    return signature


# --- bill of materials ------------------------------------------------------------------------------------------------------


def _expected(manifest: Manifest, variants: tuple[VariantFacts, ...]) -> dict[str, set[str]]:
    """The digests that a bill must name, by role."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for ref in map(content_of, manifest.blobs):
        if ref.role in _BLOB_ROLES:
            found[ref.role].add(ref.digest)
    for each in variants:
        found["source"].add(each.candidate.source.digest)
        found["target"].add(each.candidate.target_digest)
        if each.candidate.evaluation:
            found["evaluation-data"].add(each.candidate.evaluation.data)
    return found


_BLOB_ROLES: frozenset[BlobRole] = frozenset({"model", "golden", "candidate", "report"})
_BOM_ROLES = frozenset({*_BLOB_ROLES, "source", "target", "evaluation-data"})


def _check_bom(bundle: Bundle, path: str, data: bytes, variants: tuple[VariantFacts, ...]) -> BomSummary:
    bom: _Bom = _decode(bundle, path, data, _Bom)
    about, manifest = bom.metadata.component, bundle.manifest
    if bom.bom_format != "CycloneDX":
        raise _mismatch(bundle, path, f"it is a {bom.bom_format[:40]}, expected CycloneDX")
    if (about.name, about.version) != (manifest.name, manifest.version):
        raise _mismatch(bundle, path, f"it is about {about.name[:80]}@{about.version[:80]}")
    named: defaultdict[str, set[str]] = defaultdict(set)
    for item in bom.components:
        if item.role in _BOM_ROLES:
            named[item.role].update("sha256:" + each.content for each in item.hashes if each.alg == "SHA-256")
    expected = _expected(manifest, variants)
    for role in sorted(_BOM_ROLES):
        if different := sorted(named[role] ^ expected[role]):
            where = "names" if different[0] in named[role] else "does not name"
            raise _mismatch(bundle, path, f"it {where} the {role} sha256:{short(different[0])}…, unlike the manifest")
    return BomSummary(
        path=path,
        spec_version=bom.spec_version,
        serial_number=bom.serial_number,
        components=len(bom.components),
        models=len(named["model"]),
        tools=tuple(f"{item.name} {item.version}" for item in bom.components if item.role == "tool"),
    )


# --- provenance and card ----------------------------------------------------------------------------------------------------


def _check_statement(bundle: Bundle, path: str, data: bytes, variants: tuple[VariantFacts, ...]) -> ProvenanceSummary:
    statement: ProvenanceStatement = _decode(bundle, path, data, ProvenanceStatement)
    if (statement.type_, statement.predicate_type) != (STATEMENT_TYPE, PREDICATE_TYPE) or len(statement.subject) != 1:
        raise _mismatch(bundle, path, f"it is not a statement of {PREDICATE_TYPE} about one model")
    digest = "sha256:" + statement.subject[0].digest.get("sha256", "")
    each = next((each for each in variants if each.model.digest == digest), None)
    if each is None:
        raise _mismatch(bundle, path, f"it is about the model sha256:{short(digest)[:12]}…, which is not in this bundle")
    definition, details = statement.predicate.build_definition, statement.predicate.run_details
    named = {item.digest.get("sha256", "") for item in definition.resolved_dependencies}
    needed = [each.candidate.source.digest, each.candidate.target_digest]
    needed += [each.candidate.evaluation.data] if each.candidate.evaluation else []
    if absent := [digest for digest in needed if hex_of(digest) not in named]:
        raise _mismatch(bundle, path, f"it does not name sha256:{short(absent[0])}…, which the candidate was made from")
    listed = {hex_of(content_of(ref).digest) for ref in bundle.manifest.blobs}
    for item in details.byproducts:
        if item.digest.get("sha256", "") not in listed:
            raise _mismatch(bundle, path, f"it names {item.name[:80]}, with a digest that is not in this bundle")
    versions = details.builder.version
    return ProvenanceSummary(
        path=path,
        subject=each.model.path,
        source=each.candidate.source.spec,
        source_digest=each.candidate.source.digest,
        passes=tuple(item.name for item in definition.external_parameters.passes),
        builder=" ".join(f"{name} {version}" for name, version in versions.items()) or details.builder.id,
    )


def _check_card(bundle: Bundle, path: str, data: bytes, variants: tuple[VariantFacts, ...]) -> str:
    for each in variants:
        if hex_of(each.model.digest).encode() not in data:
            raise _mismatch(bundle, path, f"it does not name the digest of {each.model.path}")
    return path
