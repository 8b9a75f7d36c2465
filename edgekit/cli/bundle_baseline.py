"""The reference profile of a release: the packer's data and the first variant's answers, counted over bins that are shared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.cli.console import note

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.bundle.reader import Bundle
    from edgekit.bundle.writer import Draft
    from edgekit.dataset.data import Dataset
    from edgekit.runtime.session import Session
    from edgekit.schema.baseline import ReferenceProfile
    from edgekit.schema.contract import Contract

BASELINE_PATH = "baseline.json"
MAX_SAMPLES = 20_000


def add_baseline(draft: Draft, data: Dataset | None, open_model: Callable[[], Session]) -> Draft:
    """The draft with its reference profile; unchanged without data.

    Args:
        draft: not sealed yet.
        data: samples as the model is fed, with labels or without.
        open_model: opens the first variant's model.
    """
    from edgekit.monitor.sketch import MIN_SAMPLES
    from edgekit.schema.base import encode_json

    if data is None or not len(data):
        return draft
    model = open_model()
    try:
        profile = profile_of(draft.manifest.contract, data, model)
    finally:
        model.close()
    if profile.samples < MIN_SAMPLES:
        note(
            f"drift baseline of {profile.samples} samples: below {MIN_SAMPLES} devices see drift late; give more --data",
            "yellow",
        )
    return draft.with_blob(BASELINE_PATH, "baseline", encode_json(profile))


def baseline_line(bundle: Bundle) -> list[tuple[str, str]]:
    """What ``bundle inspect`` says of the reference profile."""
    from edgekit.schema.base import decode_json
    from edgekit.schema.baseline import ReferenceProfile

    ref = next((ref for ref in bundle.manifest.blobs if ref.role == "baseline"), None)
    if ref is None:
        return [("baseline", "none: devices cannot see drift; pack with --data")]
    profile = decode_json(bundle.blob(ref.digest), ReferenceProfile, name=ref.path)
    names = [stream.name for stream in profile.streams]
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return [("baseline", f"{profile.samples} samples of {profile.source or 'unnamed data'}: {shown}")]


def profile_of(contract: Contract, data: Dataset, model: Session) -> ReferenceProfile:
    """The profile of at most ``MAX_SAMPLES`` samples, evenly spread."""
    import numpy as np

    from edgekit.evaluation.evaluate import predict
    from edgekit.monitor.sketch import build_profile

    chosen = np.unique(np.linspace(0, len(data) - 1, num=min(MAX_SAMPLES, len(data))).round().astype(int))
    some = data.select(chosen)
    scores = contract.outputs[0].name if contract.task == "classification" and contract.outputs else ""
    outputs = {scores: predict(model, some)[scores]} if scores else {}
    labels = some.labels
    is_indices = labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu"
    return build_profile(
        {spec.name: some.inputs[spec.name] for spec in contract.inputs if spec.name in some.inputs},
        outputs,
        columns=data.columns,
        scores=scores,
        labels=labels if is_indices else None,
        data=data.digest,
        source=data.source,
    )
