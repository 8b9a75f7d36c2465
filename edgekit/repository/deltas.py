"""Deltas of a release: ways from the models that devices run now to the models of the new one.

They are made when a release is published, for model files of the same format in the newest releases of the channel, and
served as blobs like any other. Sealed models have none: their bytes have nothing in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from edgekit.bundle.delta.make import make_delta
from edgekit.bundle.layout import blob_name
from edgekit.durable import write_durably
from edgekit.errors import RepositoryError
from edgekit.repository.publishing import load_manifest
from edgekit.schema.digest import digest_bytes
from edgekit.schema.manifest import Manifest, Variant
from edgekit.schema.release import DeltaRef, Release

BASES = 3
"""Releases to begin with, the newest first."""
SMALLEST_BYTES = 64 << 10
"""A model below this is fetched whole."""
Progress = Callable[[str], None]


def make_deltas(
    folder: Path, manifest: Manifest, releases: Sequence[Release], *, channel: str, on_progress: Progress = lambda _: None
) -> tuple[DeltaRef, ...]:
    """Make and store the deltas of a release whose blobs are in the repository already.

    Args:
        folder: of the repository.
        manifest: of the new release.
        releases: what is published.
        channel: whose devices will take it.
        on_progress: told what is being made.
    """
    models = {ref.digest: ref for ref in manifest.blobs if ref.role == "model" and ref.sealed is None}
    bases = [release for release in releases if (release.info.name, release.info.channel) == (manifest.name, channel)]
    made: dict[tuple[str, str], DeltaRef] = {}
    for release in sorted(bases, key=lambda release: -release.info.counter)[:BASES]:
        try:
            old, _ = load_manifest(folder, release)
        except RepositoryError:
            continue  # a damaged old release is no reason not to publish a new one
        for variant in manifest.variants:
            ref = models.get(variant.model)
            if ref is None or ref.size_bytes < SMALLEST_BYTES:
                continue
            twin = _twin(old, variant)
            if twin is None or twin in models or (twin, ref.digest) in made:
                continue
            on_progress(f"delta from {old.name}@{old.version} ({variant.name})")
            found = _make(folder, twin, ref.digest)
            if found is not None:
                made[twin, ref.digest] = found
    return tuple(made.values())


def _twin(old: Manifest, variant: Variant) -> str | None:
    """The model of an older release that a device of this variant most likely has."""
    open_models = {ref.digest for ref in old.blobs if ref.role == "model" and ref.sealed is None}
    same = [each for each in old.variants if each.format == variant.format and each.model in open_models]
    keys: list[Callable[[Variant], object]] = [
        lambda each: (each.name, each.requires),
        lambda each: each.requires,
        lambda each: each.precision,
    ]
    for key in keys:
        for each in same:
            if key(each) == key(variant):
                return each.model
    return same[0].model if same else None


def _make(folder: Path, base: str, target: str) -> DeltaRef | None:
    old, new = folder / blob_name(base), folder / blob_name(target)
    if not old.is_file():
        return None
    made = make_delta(old, new)
    if made is None:
        return None
    digest = digest_bytes(made.content)
    path = folder / blob_name(digest)
    if not path.is_file() or path.stat().st_size != len(made.content):
        write_durably(path, made.content)
    return DeltaRef(base=base, target=target, digest=digest, size_bytes=len(made.content), codec=made.codec)
