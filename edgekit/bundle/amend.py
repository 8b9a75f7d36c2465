"""An amended release: other labels, thresholds or input rules, the same weights.

The new manifest names the same blobs, sealed ones as they are sealed, so a device that has the old release fetches the
manifest and no blob. Labels, thresholds and what is done with inputs out of range or missing change: names, types and
shapes of inputs and outputs and the number of classes belong to the model. The embedded candidate stays what was measured,
with the labels of that day. Evidence that speaks of the old release (bill, card, provenance, model signature) is not taken
along; :mod:`edgekit.bundle.provenance.attach` writes it anew.

    >>> draft = amend_bundle(bundle, version="1.0.1", labels=("cat", "dog"), folder=Path("blobs"))  # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from edgekit import __version__
from edgekit.bundle.provenance.attach import without_evidence
from edgekit.bundle.reader import Bundle
from edgekit.bundle.writer import Content, Draft
from edgekit.errors import UsageError
from edgekit.schema.contract import Contract
from edgekit.schema.digest import hex_of
from edgekit.schema.manifest import ModelVersion


def amend_bundle(
    bundle: Bundle,
    *,
    version: str,
    folder: Path,
    labels: Sequence[str] | None = None,
    thresholds: Mapping[str, float | None] | None = None,
    contract: Contract | None = None,
    created_at: datetime | None = None,
) -> Draft:
    """A release, not signed yet, with the blobs of an old one but for its evidence.

    Args:
        bundle: the old release.
        version: the new one's; must differ.
        folder: an existing folder for the blobs, which must stay until the new bundle is written.
        labels: all class names, in the order of the output; None keeps the old ones. A threshold stays with its class.
        thresholds: the score, 0..1, from which an answer of this (new) label counts; None takes the threshold away. Labels
            that are not named keep theirs.
        contract: the old one with other rules for its inputs; None keeps them.
        created_at: for bytes that can be made again; None is now.

    Raises:
        UsageError: ``amend.version``, ``amend.labels``, ``amend.threshold``, ``amend.contract``, ``amend.nothing``.
        TrustError: ``bundle.digest_mismatch`` when the file changed since it was read.
    """
    old = bundle.manifest
    _check_version(version, old.version)
    if contract is not None and _structure(contract) != _structure(old.contract):
        raise UsageError("amend.contract", "the inputs and outputs of the new contract are not those of the model.")
    contract = amend_contract(contract or old.contract, labels, thresholds or {})
    if contract == old.contract:
        text = f"{old.name}@{old.version} has these labels, thresholds and input rules."
        raise UsageError("amend.nothing", text, hint="Give --labels, --threshold or --contract.")
    manifest = msgspec.structs.replace(
        old,
        version=version,
        contract=contract,
        created_at=(created_at or datetime.now(UTC)).replace(microsecond=0),
        edgekit_version=__version__,
    )
    blobs: dict[str, Content] = {ref.digest: _extract(bundle, ref.digest, folder) for ref in old.blobs}
    return without_evidence(Draft(manifest, blobs))


def _structure(contract: Contract) -> list[tuple[object, ...]]:
    inputs: list[tuple[object, ...]] = [(spec.name, spec.dtype, spec.shape) for spec in contract.inputs]
    return [*inputs, *((spec.name, spec.dtype, spec.shape) for spec in contract.outputs)]


def _check_version(version: str, old: str) -> None:
    try:
        msgspec.convert(version, ModelVersion)
    except msgspec.ValidationError:
        raise UsageError("amend.version", f"--version {version!r}: not a version; expected for example 1.0.1.") from None
    if version == old:
        raise UsageError("amend.version", f"--version {version}: the old release has this one.", hint="Give a new version.")


def amend_contract(old: Contract, labels: Sequence[str] | None, thresholds: Mapping[str, float | None]) -> Contract:
    """The contract with other labels and thresholds; arguments and errors as :func:`amend_bundle`."""
    names = old.labels if labels is None else tuple(labels)
    if labels is not None:
        _check_labels(names, old)
    new_name = dict(zip(old.labels, names, strict=bool(old.labels)))
    scores: dict[str, float | None] = {new_name.get(label, label): score for label, score in old.thresholds.items()}
    for label, score in thresholds.items():
        if label not in names:
            known = ", ".join(names[:8]) or "it has none"
            raise UsageError("amend.threshold", f"--threshold {label}: no such label.", hint=f"Labels: {known}.")
        if score is not None and not (math.isfinite(score) and 0 <= score <= 1):
            raise UsageError("amend.threshold", f"--threshold {label}={score}: a score is between 0 and 1.")
        scores[label] = score
    kept = {label: score for label in names if (score := scores.get(label)) is not None}
    return msgspec.structs.replace(old, labels=names, thresholds=kept)


def _check_labels(labels: tuple[str, ...], old: Contract) -> None:
    classes = len(old.labels) or next((spec.shape[-1] for spec in old.outputs[:1] if spec.shape), None)
    if isinstance(classes, int) and len(labels) != classes:
        raise UsageError(
            "amend.labels",
            f"{len(labels)} labels: the model has {classes} classes.",
            hint="Name every class, in the order of the model's output.",
        )
    if len(set(labels)) != len(labels) or not all(label.strip() for label in labels):
        raise UsageError("amend.labels", "a label is empty, or there twice.", hint="One name a class, each once.")


def _extract(bundle: Bundle, digest: str, folder: Path) -> Path:
    path = folder / hex_of(digest)
    with path.open("wb") as file:
        file.writelines(bundle.chunks(digest))
    return path
