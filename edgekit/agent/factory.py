"""The factory model: a signed bundle that came with the device, for the day when no slot can serve.

It lies outside the slots and is only read. What a worker loads of it is copied, read-only, into ``factory/`` of the state
folder; signature and digests are checked each time it is needed.
"""

from __future__ import annotations

from pathlib import Path

from edgekit.agent.config import AgentConfig
from edgekit.agent.link import Model
from edgekit.agent.plan import DeviceFacts, choose_variant, needed_blobs
from edgekit.durable import write_durably
from edgekit.errors import ArtifactError, DeviceError
from edgekit.schema.digest import digest_file, hex_of

FACTORY_DIR = "factory"
READ_ONLY = 0o400


def open_factory(config: AgentConfig, facts: DeviceFacts) -> Model:
    """Verify the factory bundle and lay its blobs out for a worker.

    Raises:
        UsageError: the bundle or a key cannot be read.
        TrustError: it is not signed by a key of ``factory_keys``, or damaged.
        ArtifactError: ``factory.other_model``.
        DeviceError: ``factory.sealed``, or nothing in it runs on this device.
        OSError: when the disk refuses.
    """
    from edgekit.bundle.reader import verify_bundle  # noqa: PLC0415 - needed on a bad day only
    from edgekit.trust.keys import load_public_keys  # noqa: PLC0415 - the same

    path = Path(config.factory)
    bundle = verify_bundle(path, load_public_keys(Path(config.factory_keys)), is_hashed=False)
    manifest = bundle.manifest
    if manifest.name != config.model:
        raise ArtifactError("factory.other_model", f"{path}: it holds {manifest.name}; {config.model} is wanted.")
    variant = choose_variant(manifest, facts)
    folder = config.state_path / FACTORY_DIR
    for ref in needed_blobs(manifest, variant):
        if ref.sealed is not None:
            raise DeviceError("factory.sealed", f"{path}: a factory bundle must not be sealed.")
        target = folder / hex_of(ref.digest)
        if not (target.is_file() and not target.is_symlink() and digest_file(target) == ref.digest):
            write_durably(target, bundle.chunks(ref.digest), mode=READ_ONLY)
    return Model(manifest=manifest, variant=variant, blob_dir=str(folder))
