"""A blob made from one that is on the disk already: the delta's and the result's digests are signed, the result is verified.

The file gets its name only when it is whole, right and durable; a failure leaves nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from edgekit.agent.disk import FULL, disk_full
from edgekit.agent.vitals import disk_free_bytes
from edgekit.durable import sync_folder
from edgekit.errors import ArtifactError
from edgekit.schema.release import DeltaRef

MAX_FAILED_DELTAS = 32


def make_from_delta(delta: Path, base: Path, out: Path, ref: DeltaRef, *, size_bytes: int) -> None:
    """Apply a delta that was downloaded and verified.

    Args:
        delta: the file.
        base: the blob that it begins with.
        out: the file to make.
        ref: what signed metadata says of the delta.
        size_bytes: of the result.

    Raises:
        ArtifactError: ``delta.malformed``.
        TrustError: ``delta.digest_mismatch``.
        DeviceError: ``delta.base_changed``, ``delta.unsupported``, ``device.disk_full``.
    """
    from edgekit.bundle.delta.apply import apply_delta  # noqa: PLC0415 - numpy and lzma, for the moment of an update

    temporary = out.with_name(f"{out.name}.made")
    try:
        with delta.open("rb") as source, temporary.open("wb") as target:
            apply_delta(source, base, target, ref=ref, size_bytes=size_bytes)
            target.flush()
            os.fsync(target.fileno())
        temporary.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        if error.errno in FULL:
            raise disk_full(out.parent, size_bytes, disk_free_bytes(out.parent)) from error
        raise ArtifactError("delta.malformed", f"{delta.name}: cannot be applied: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
