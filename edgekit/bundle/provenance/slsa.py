"""How a variant was made: an in-toto Statement (v1) with SLSA Provenance (v1, https://slsa.dev/spec/v1.0/provenance).

One statement a variant. The subject is the model file; what the user asked for are external parameters; the source model, the
data and the target profile are resolved dependencies; the evaluation and the reports are byproducts. No SLSA level is claimed:
the statement is made by who packs, and the signatures that cover it say who that was.

A data set's digest is SHA-256 over names, types, shapes and bytes of its arrays, a target's over its profile's canonical JSON:
neither is of one file, so both say so in an annotation.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from edgekit.bundle.provenance.facts import ReleaseFacts, VariantFacts
from edgekit.bundle.provenance.statement import STATEMENT_TYPE, Document, ResourceDescriptor, digest_set
from edgekit.schema.base import Scalar, encode_json
from edgekit.schema.digest import digest_bytes, hex_of
from edgekit.schema.measurement import EvalReport

PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:edgekit:build:optimize:v1"
"""``edgekit optimize``: external parameters as :class:`Parameters`."""
BUILDER_ID = "pkg:generic/edgekit"
DATA_DIGEST = "names, types, shapes and little-endian bytes of the arrays (edgekit dataset 1)"
TARGET_DIGEST = "the target profile's canonical JSON"
_JSON = "application/json"


class BudgetTerm(Document, frozen=True, kw_only=True):
    """One term of the budget as the user gave it."""

    name: str
    operator: str
    limit: float


class PassParameters(Document, frozen=True, kw_only=True):
    """One pass with its settings, in the order of the lineage."""

    name: str
    settings: dict[str, Scalar]
    versions: dict[str, str]


class Parameters(Document, frozen=True, kw_only=True):
    """What decides the result, as far as the user decides it."""

    source: str
    target: str
    budget: tuple[BudgetTerm, ...]
    metric: str
    seed: int
    passes: tuple[PassParameters, ...]


class Release(Document, frozen=True, kw_only=True):
    """What the release decided."""

    release: str
    variant: str
    candidate: str


class BuildDefinition(Document, frozen=True, kw_only=True):
    """SLSA's."""

    build_type: str
    external_parameters: Parameters
    internal_parameters: Release
    resolved_dependencies: tuple[ResourceDescriptor, ...]


class Builder(Document, frozen=True, kw_only=True):
    """SLSA's."""

    id: str
    version: dict[str, str]
    builder_dependencies: tuple[ResourceDescriptor, ...] = ()


class BuildMetadata(Document, frozen=True, kw_only=True):
    """SLSA's; when the optimization began is not recorded."""

    invocation_id: str
    finished_on: datetime


class RunDetails(Document, frozen=True, kw_only=True):
    """SLSA's."""

    builder: Builder
    metadata: BuildMetadata
    byproducts: tuple[ResourceDescriptor, ...] = ()


class Provenance(Document, frozen=True, kw_only=True):
    """SLSA's predicate."""

    build_definition: BuildDefinition
    run_details: RunDetails


class ProvenanceStatement(Document, frozen=True, kw_only=True):
    """The whole document."""

    type_: str = msgspec.field(name="_type")
    subject: tuple[ResourceDescriptor, ...]
    predicate_type: str
    predicate: Provenance


def provenance_path(index: int) -> str:
    """The blob's path of the variant at this place, from 0."""
    return f"provenance.{index + 1}.intoto.json" if index else "provenance.intoto.json"


def state_provenance(facts: ReleaseFacts, each: VariantFacts) -> bytes:
    """The statement of one variant, canonical JSON."""
    candidate, manifest = each.candidate, facts.manifest
    definition = BuildDefinition(
        build_type=BUILD_TYPE,
        external_parameters=_parameters(each),
        internal_parameters=Release(
            release=f"{manifest.name}@{manifest.version}", variant=each.variant.name, candidate=candidate.name
        ),
        resolved_dependencies=_dependencies(each),
    )
    invocation = hex_of(digest_bytes(encode_json(candidate)))
    details = RunDetails(
        builder=_builder(each),
        metadata=BuildMetadata(invocation_id=f"urn:edgekit:candidate:{invocation}", finished_on=candidate.created_at),
        byproducts=_byproducts(facts, each),
    )
    statement = ProvenanceStatement(
        type_=STATEMENT_TYPE,
        subject=(ResourceDescriptor(name=each.model.path, digest=digest_set(each.model.digest)),),
        predicate_type=PREDICATE_TYPE,
        predicate=Provenance(build_definition=definition, run_details=details),
    )
    return encode_json(statement)


def _parameters(each: VariantFacts) -> Parameters:
    candidate = each.candidate
    return Parameters(
        source=candidate.source.spec,
        target=candidate.target,
        budget=tuple(
            BudgetTerm(name=check.name, operator=check.operator, limit=check.limit) for check in candidate.verdict.checks
        ),
        metric=candidate.evaluation.metric if candidate.evaluation else "",
        seed=candidate.seed,
        passes=tuple(
            PassParameters(name=step.name, settings=step.settings, versions=step.versions) for step in candidate.lineage
        ),
    )


def _dependencies(each: VariantFacts) -> tuple[ResourceDescriptor, ...]:
    candidate = each.candidate
    found = [
        ResourceDescriptor(
            name=candidate.source.spec,
            digest=digest_set(candidate.source.digest),
            annotations={"role": "source model", "kind": candidate.source.kind, "size_bytes": candidate.source.size_bytes},
        ),
        ResourceDescriptor(
            name=candidate.target,
            digest=digest_set(candidate.target_digest),
            annotations={"role": "target profile", "digest_of": TARGET_DIGEST},
        ),
    ]
    if evaluation := candidate.evaluation:
        role = "evaluation and calibration data" if _is_calibrated_on(each, evaluation) else "evaluation data"
        found.append(
            ResourceDescriptor(
                name="data",
                digest=digest_set(evaluation.data),
                annotations={"role": role, "samples": evaluation.samples, "digest_of": DATA_DIGEST},
            )
        )
    return tuple(found)


def _is_calibrated_on(each: VariantFacts, evaluation: EvalReport) -> bool:
    """Whether a pass took its ranges from the data that the model was evaluated on."""
    return any(hex_of(evaluation.data).startswith(prefix) for prefix in calibration_digests(each))


def calibration_digests(each: VariantFacts) -> tuple[str, ...]:
    """The beginnings of the digests of calibration data, as the passes noted them."""
    noted = (step.settings.get("calibration") for step in each.candidate.lineage)
    return tuple(dict.fromkeys(text for text in noted if isinstance(text, str) and len(text) >= 12))


def tool_versions(each: VariantFacts) -> dict[str, str]:
    """Version by package that took part in the making; where passes differ, the last one's."""
    found: dict[str, str] = {}
    for step in each.candidate.lineage:
        found.update(step.versions)
    return dict(sorted(found.items()))


def _builder(each: VariantFacts) -> Builder:
    candidate = each.candidate
    versions = {"edgekit": candidate.edgekit_version}
    if candidate.latency:
        versions["python"] = candidate.latency.host.python
    tools = tuple(
        ResourceDescriptor(name=name, uri=f"pkg:pypi/{name}@{version}") for name, version in tool_versions(each).items()
    )
    return Builder(id=BUILDER_ID, version=versions, builder_dependencies=tools)


def _byproducts(facts: ReleaseFacts, each: VariantFacts) -> tuple[ResourceDescriptor, ...]:
    found = []
    if each.record:
        figures = _figures(each.candidate.evaluation) if each.candidate.evaluation else {}
        found.append(
            ResourceDescriptor(
                name=each.record.path, digest=digest_set(each.record.digest), media_type=_JSON, annotations=figures
            )
        )
    if each is facts.first:
        for ref in facts.contents:
            if ref.role == "report":
                kind = _JSON if ref.path.endswith(".json") else "text/html"
                found.append(ResourceDescriptor(name=ref.path, digest=digest_set(ref.digest), media_type=kind))
    return tuple(found)


def _figures(evaluation: EvalReport) -> dict[str, str | float | int | bool]:
    return {
        "metric": evaluation.metric,
        "value": evaluation.value,
        "baseline": evaluation.baseline,
        "drop": evaluation.drop,
        "samples": evaluation.samples,
    }
