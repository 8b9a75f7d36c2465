"""The machine-learning bill of materials: CycloneDX 1.6 JSON (https://cyclonedx.org/docs/1.6/json/) with model cards.

The component that the bill is about is the release; each variant's model file is a component with its digest, its model card
and what it depends on: the runtime (required) and the tools that made it (excluded from the device). Every component that
stands for a digest has the property ``edgekit:role``, which is how ``edgekit bundle verify`` finds it again.

The same draft gives the same bytes: the serial number is derived from the digests, the time is the release's.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

import msgspec

from edgekit import __version__
from edgekit.bundle.provenance.facts import SHARES, ReleaseFacts, VariantFacts, class_recalls, share_interval
from edgekit.bundle.provenance.reliability import Reliability
from edgekit.bundle.provenance.slsa import DATA_DIGEST, TARGET_DIGEST, calibration_digests, provenance_path, tool_versions
from edgekit.schema.digest import hex_of
from edgekit.schema.manifest import BlobRef

BOM_PATH = "bom.cdx.json"
SPEC_VERSION = "1.6"
ROLE_PROPERTY = "edgekit:role"
_PYPI = {"onnxruntime": "onnxruntime", "litert": "ai-edge-litert"}
Json = dict[str, Any]


def write_bom(facts: ReleaseFacts, attestations: Iterable[BlobRef]) -> bytes:
    """The bill of a release, JSON.

    Args:
        facts: the release.
        attestations: the provenance statements, which the bill refers to by digest.
    """
    manifest = facts.manifest
    components = _unique(
        [
            *(_variant(facts, each, index) for index, each in enumerate(facts.variants)),
            *(_source(each) for each in facts.variants),
            *(_target(each) for each in facts.variants),
            *(item for each in facts.variants for item in _data(facts, each)),
            *(_file(ref) for ref in facts.contents if ref.role in {"golden", "candidate", "report"}),
            *(_runtime(each) for each in facts.variants),
            *(item for each in facts.variants for item in _tools(each)),
        ]
    )
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{_serial(facts)}",
        "version": 1,
        "metadata": {
            "timestamp": manifest.created_at.isoformat().replace("+00:00", "Z"),
            "lifecycles": [{"phase": "post-build"}],
            "tools": {"components": [{"type": "application", "name": "edgekit", "version": __version__}]},
            "component": _release(facts),
        },
        "components": components,
        "externalReferences": [{"type": "attestation", "url": ref.path, "hashes": _hashes(ref.digest)} for ref in attestations],
        "dependencies": _dependencies(facts, components),
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def _serial(facts: ReleaseFacts) -> uuid.UUID:
    """The same for the same release, another for any other."""
    manifest = facts.manifest
    parts = [manifest.name, manifest.version, *sorted(ref.digest for ref in facts.contents)]
    return uuid.uuid5(uuid.NAMESPACE_OID, "edgekit\n" + "\n".join(parts))


def _unique(components: Iterable[Json]) -> list[Json]:
    """Each bom-ref once, in order."""
    return list({item["bom-ref"]: item for item in components}.values())


def _hashes(digest: str) -> list[Json]:
    return [{"alg": "SHA-256", "content": hex_of(digest)}]


def _properties(**values: object) -> list[Json]:
    """Named ``edgekit:...``; what is empty is left out."""
    return [
        {"name": f"edgekit:{name.replace('_', '-')}", "value": str(value)}
        for name, value in values.items()
        if value not in {"", None}
    ]


def _ref(kind: str, digest: str) -> str:
    return f"{kind}:sha256:{hex_of(digest)}"


def _owner(facts: ReleaseFacts) -> Json:
    """Supplier and licence, where the owner gave them."""
    intent = facts.intent
    found: Json = {}
    if intent.owner:
        found["supplier"] = {"name": ", ".join(intent.owner)}
    if intent.licence:
        found["licenses"] = [{"license": {"name": text}} for text in intent.licence]
    return found


def _release(facts: ReleaseFacts) -> Json:
    manifest = facts.manifest
    return {
        "type": "machine-learning-model",
        "bom-ref": "release",
        **_owner(facts),
        "name": manifest.name,
        "version": manifest.version,
        **({"description": " ".join(facts.intent.description)} if facts.intent.description else {}),
        "modelCard": _model_card(facts, facts.first) | {"considerations": _considerations(facts)},
        "properties": _properties(
            release=f"{manifest.name}@{manifest.version}", target=manifest.target, variants=len(facts.variants)
        ),
    }


def _variant(facts: ReleaseFacts, each: VariantFacts, index: int) -> Json:
    variant, artifact = each.variant, each.candidate.artifact
    return {
        "type": "machine-learning-model",
        "bom-ref": _ref("model", each.model.digest),
        **_owner(facts),
        "name": each.model.path,
        "version": facts.manifest.version,
        "hashes": _hashes(each.model.digest),
        "pedigree": {"ancestors": [_source(each) | {"bom-ref": f"{_ref('ancestor', each.model.digest)}"}]},
        "externalReferences": [{"type": "attestation", "url": provenance_path(index)}],
        "modelCard": _model_card(facts, each),
        "properties": _properties(
            role="model",
            variant=variant.name,
            format=variant.format,
            precision=variant.precision,
            size_bytes=each.model.size_bytes,
            parameters=artifact.parameters if artifact else None,
            target=variant.target or facts.manifest.target,
            runtime=f"{variant.requires.runtime} >= {variant.requires.runtime_version or 'any'}",
            arch=" ".join(variant.requires.arch),
            isa=" ".join(variant.requires.isa),
            ram_mb=variant.requires.ram_mb,
            seed=each.candidate.seed,
        ),
    }


def _source(each: VariantFacts) -> Json:
    source = each.candidate.source
    return {
        "type": "machine-learning-model",
        "bom-ref": _ref("source", source.digest),
        "name": source.spec,
        "hashes": _hashes(source.digest),
        "properties": _properties(role="source", kind=source.kind, size_bytes=source.size_bytes),
    }


def _target(each: VariantFacts) -> Json:
    return {
        "type": "platform",
        "bom-ref": _ref("target", each.candidate.target_digest),
        "name": each.candidate.target,
        "scope": "excluded",
        "hashes": _hashes(each.candidate.target_digest),
        "properties": _properties(role="target", digest_of=TARGET_DIGEST),
    }


def _data(facts: ReleaseFacts, each: VariantFacts) -> list[Json]:
    """The evaluation data, by digest; it is not in the bundle."""
    evaluation = each.candidate.evaluation
    if evaluation is None:
        return []
    note = " ".join(facts.intent.evaluation_data)
    component = {
        "type": "data",
        "bom-ref": _ref("data", evaluation.data),
        "name": "evaluation data",
        **({"description": note} if note else {}),
        "scope": "excluded",
        "hashes": _hashes(evaluation.data),
        "data": [{"type": "dataset", "name": "evaluation data", "description": f"{evaluation.samples} samples"}],
        "properties": _properties(role="evaluation-data", samples=evaluation.samples, digest_of=DATA_DIGEST),
    }
    return [component]


def _file(ref: BlobRef) -> Json:
    return {
        "type": "data" if ref.role == "golden" else "file",
        "bom-ref": _ref(ref.role, ref.digest),
        "name": ref.path,
        "hashes": _hashes(ref.digest),
        "properties": _properties(role=ref.role, size_bytes=ref.size_bytes),
    }


def _runtime(each: VariantFacts) -> Json:
    """What runs it; the version is the least that is allowed."""
    requires = each.variant.requires
    version = requires.runtime_version
    package = _PYPI.get(requires.runtime)
    return {
        "type": "library",
        "bom-ref": f"runtime:{requires.runtime}@{version or 'any'}",
        "name": requires.runtime,
        **({"version": version} if version else {}),
        "scope": "required",
        **({"purl": f"pkg:pypi/{package}" + (f"@{version}" if version else "")} if package else {}),
        "properties": _properties(role="runtime", version_is="the least that is allowed" if version else ""),
    }


def _tools(each: VariantFacts) -> list[Json]:
    versions = {"edgekit": each.candidate.edgekit_version, **tool_versions(each)}
    return [
        {
            "type": "application" if name == "edgekit" else "library",
            "bom-ref": f"tool:{name}@{version}",
            "name": name,
            "version": version,
            "scope": "excluded",
            "purl": f"pkg:{'generic' if name == 'edgekit' else 'pypi'}/{name}@{version}",
            "properties": _properties(role="tool"),
        }
        for name, version in versions.items()
    ]


def _dependencies(facts: ReleaseFacts, components: list[Json]) -> list[Json]:
    known = [item["bom-ref"] for item in components]
    needs: dict[str, list[str]] = {"release": [_ref("model", each.model.digest) for each in facts.variants]}
    for each in facts.variants:
        needed = [_runtime(each), *_tools(each)]
        needs[_ref("model", each.model.digest)] = [item["bom-ref"] for item in needed]
    return [
        {"ref": ref, **({"dependsOn": list(dict.fromkeys(needs[ref]))} if ref in needs else {})} for ref in ["release", *known]
    ]


def _model_card(facts: ReleaseFacts, each: VariantFacts) -> Json:
    candidate, contract = each.candidate, facts.manifest.contract
    parameters: Json = {
        "task": contract.task,
        "inputs": [{"format": f"{spec.name}: {spec.dtype}{list(spec.shape)}"} for spec in contract.inputs],
        "outputs": [{"format": f"{spec.name}: {spec.dtype}{list(spec.shape)}"} for spec in contract.outputs],
        "datasets": [],
    }
    if candidate.evaluation:
        parameters["datasets"].append({"ref": _ref("data", candidate.evaluation.data)})
    if facts.intent.training_data:
        training = {"type": "dataset", "name": "training data", "description": " ".join(facts.intent.training_data)}
        parameters["datasets"].append(training)
    parameters["datasets"] += [
        {"type": "dataset", "name": "calibration data", "description": f"sha256:{prefix}… (the digest's beginning)"}
        for prefix in calibration_digests(each)
        if not (candidate.evaluation and hex_of(candidate.evaluation.data).startswith(prefix))
    ]
    return {"modelParameters": parameters, "quantitativeAnalysis": {"performanceMetrics": _metrics(facts, each)}}


def _metric(kind: str, value: float, *, low: float | None = None, high: float | None = None, place: str = "") -> Json:
    found: Json = {"type": kind, "value": _text(value)}
    if place:
        found["slice"] = place
    if low is not None and high is not None:
        found["confidenceInterval"] = {"lowerBound": _text(low), "upperBound": _text(high)}
    return found


def _text(value: float) -> str:
    return f"{value:.6g}"


def _metrics(facts: ReleaseFacts, each: VariantFacts) -> list[Json]:
    """Every figure with its 95 % interval, where there is one."""
    found = []
    if evaluation := each.candidate.evaluation:
        low, high = share_interval(evaluation.value, evaluation.samples) if evaluation.metric in SHARES else (None, None)
        found.append(_metric(evaluation.metric, evaluation.value, low=low, high=high))
        found.append(_metric(f"{evaluation.metric} of the source model", evaluation.baseline))
        drop = _metric(f"{evaluation.metric} drop", evaluation.drop, low=evaluation.drop_low, high=evaluation.drop_high)
        found.append(drop)
        for name, value in evaluation.extra.items():
            low, high = share_interval(value, evaluation.samples) if name in SHARES else (None, None)
            found.append(_metric(name, value, low=low, high=high))
        found += [
            _metric("recall", part.recall, low=part.low, high=part.high, place=f"class {part.name}")
            for part in class_recalls(facts, each)
        ]
    if each is facts.first and isinstance(facts.reliability, Reliability):
        found.append(_metric("expected calibration error", facts.reliability.error))
    if latency := each.candidate.latency:
        place = f"{latency.host.cpu}, {latency.host.runtime} {latency.host.runtime_version}, {latency.threads} thread(s)"
        found.append(_metric("latency p50 (ms)", latency.p50_ms, low=latency.p50_low_ms, high=latency.p50_high_ms, place=place))
        found.append(_metric("latency p99 (ms)", latency.p99_ms, place=place))
    if parity := each.variant.parity:
        found.append(_metric(f"sqnr_db against {parity.reference}", parity.sqnr_db))
        if parity.agreement is not None:
            low, high = share_interval(parity.agreement, parity.samples)
            found.append(_metric(f"agreement with {parity.reference}", parity.agreement, low=low, high=high))
    return found


def _considerations(facts: ReleaseFacts) -> Json:
    intent = facts.intent
    found: Json = {}
    for name, texts in (
        ("users", intent.users),
        ("useCases", intent.intended_use),
        ("technicalLimitations", (*intent.limitations, *(f"Out of scope: {text}" for text in intent.out_of_scope))),
        ("performanceTradeoffs", tuple(_tradeoff(each) for each in facts.variants)),
    ):
        if texts:
            found[name] = list(texts)
    if intent.ethical_considerations:
        found["ethicalConsiderations"] = [{"name": text} for text in intent.ethical_considerations]
    return found


def _tradeoff(each: VariantFacts) -> str:
    return f"{each.variant.name}: {each.candidate.verdict.reason}"
