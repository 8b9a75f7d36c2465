"""Features in a release: the declaration in the manifest, golden features in every variant's golden set.

A bundle knows nothing of how features are computed: who packs gives the golden ones (see
:mod:`edgekit.evaluation.feature_parity`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from edgekit.bundle.sampling import OpenedModel
from edgekit.bundle.writer import Draft, SessionOpener
from edgekit.schema.base import decode_msgpack, encode_msgpack
from edgekit.schema.contract import Contract
from edgekit.schema.features import FeatureSet
from edgekit.schema.manifest import GoldenFeatures, GoldenSet


def with_contract(draft: Draft, contract: Contract) -> Draft:
    """The release with another input contract; the embedded candidate keeps the one that it was measured with."""
    return Draft(msgspec.structs.replace(draft.manifest, contract=contract), draft.blobs)


def add_features(
    draft: Draft, features: FeatureSet, *, make: Callable[[OpenedModel], GoldenFeatures], open_session: SessionOpener
) -> Draft:
    """The release with features.

    Args:
        draft: not sealed yet.
        features: the declaration.
        make: golden features of one variant's model.
        open_session: the runtime.
    """
    variants, replaced = [], {}
    merged = draft
    for variant in draft.manifest.variants:
        model, golden = draft.blobs[variant.model], draft.blobs[variant.golden]
        assert isinstance(model, Path), "models are files until a release is sealed"
        session = open_session(model, threads=1, is_optimized=True)
        try:
            made = make(session)
        finally:
            session.close()
        data = golden if isinstance(golden, bytes) else golden.read_bytes()
        known = decode_msgpack(data, GoldenSet, name="golden samples")
        path = next(ref.path for ref in draft.manifest.blobs if ref.digest == variant.golden)
        merged = merged.with_blob(path, "golden", encode_msgpack(msgspec.structs.replace(known, features=made)))
        digest = next(ref.digest for ref in reversed(merged.manifest.blobs) if ref.path == path)
        replaced[variant.golden] = digest
        variants.append(msgspec.structs.replace(variant, golden=digest))
    refs = tuple(ref for ref in merged.manifest.blobs if ref.digest not in replaced)
    manifest = msgspec.structs.replace(merged.manifest, features=features, variants=tuple(variants), blobs=refs)
    return Draft(manifest, {digest: content for digest, content in merged.blobs.items() if digest not in replaced})
