"""Any target of a TUF repository, by its path: delegations followed as far as they go, length and hashes checked.

The agent does not use this: it takes manifests and blobs of releases. It is the same client underneath, for tools that fetch
other targets, and for the TUF conformance suite (``scripts/conformance``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]
from tuf.ngclient import Updater  # type: ignore[attr-defined]

from edgekit.durable import write_durably
from edgekit.errors import RepositoryError, TrustError
from edgekit.schema.state import Floors
from edgekit.trust.fetcher import BoundedFetcher
from edgekit.trust.floors import RoleVersions, check_roles, raise_roles, reference_time
from edgekit.trust.metadata import open_metadata, translated
from edgekit.trust.repository_client import repository_error
from edgekit.trust.transport import Transport, TransportError

_IN_MEMORY = 1 << 20


def refresh_top_roles(
    metadata_dir: Path, metadata_url: str, *, root: bytes, floors: Floors, now: datetime, transport: Transport
) -> tuple[Updater, Floors]:
    """Refresh, and check what was seen against the floors.

    Returns:
        The client, and the floors to keep.

    Raises:
        RepositoryError, TrustError, DeviceError: as :func:`edgekit.trust.metadata.refresh_metadata`.
    """
    time = reference_time(floors, now)
    fetcher = BoundedFetcher(transport)
    updater = open_metadata(metadata_dir, metadata_url, root=root, time=time, fetcher=fetcher)
    trusted = updater._trusted_set  # noqa: SLF001 - no public view of it
    versions = RoleVersions(
        root=trusted.root.version,
        timestamp=trusted.timestamp.version,
        snapshot=trusted.snapshot.version,
        targets=trusted.targets.version,
    )
    check_roles(floors, versions)
    return updater, raise_roles(floors, versions, now)


def fetch_targets(
    updater: Updater, paths: Sequence[str], *, targets_url: str, out: Path, transport: Transport
) -> tuple[Path, ...]:
    """Fetch targets by path, in order; one that is here already and right is not fetched again.

    Raises:
        RepositoryError: ``repository.no_target``, or a transport's.
        TrustError: ``trust.digest``, ``trust.length``, or what a delegated role is refused for.
    """
    return tuple(_fetch(updater, path, targets_url.rstrip("/"), out, transport) for path in paths)


def _fetch(updater: Updater, path: str, targets_url: str, out: Path, transport: Transport) -> Path:
    with translated(targets_url):
        target = updater.get_targetinfo(path)
    if target is None:
        raise RepositoryError("repository.no_target", f"{path}: no trusted role lists it.", hint="Check its spelling.")
    final = out / quote(path, safe="")
    if final.is_file() and _is_right(final, target):
        return final
    url = f"{targets_url}/{_remote_name(updater, path, target)}"
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as file:
        try:
            with transport.get(url, ok=frozenset({200})) as answer:
                for chunk in answer.chunks(max_bytes=target.length):
                    file.write(chunk)
        except TransportError as error:
            raise repository_error(error) from error
        file.seek(0)
        try:
            target.verify_length_and_hashes(file)
        except LengthOrHashMismatchError as error:
            raise TrustError("trust.digest", f"{path}: what came is not what was signed: {error}.") from error
        file.seek(0)
        write_durably(final, iter(lambda: file.read(_IN_MEMORY), b""))
    return final


def _is_right(path: Path, target: TargetFile) -> bool:
    with path.open("rb") as file:
        try:
            target.verify_length_and_hashes(file)
        except LengthOrHashMismatchError:
            return False
    return True


def _remote_name(updater: Updater, path: str, target: TargetFile) -> str:
    """With consistent snapshots a target's name begins with one of its hashes."""
    if not updater._trusted_set.root.consistent_snapshot:  # noqa: SLF001 - no public view of it
        return path
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{next(iter(target.hashes.values()))}.{name}"
