"""Any target of a TUF repository, by its path: delegations followed as far as they go, length and hashes checked.

The agent does not use this: it takes manifests and blobs of releases. It is the same client and the same download underneath,
for tools that fetch other targets, and for the TUF conformance suite (``scripts/conformance``). The floors are those of the top
roles; a delegated role is held by the snapshot alone.

    >>> updater, floors = refresh_top_roles(cache, url, root=root, floors=old, now=now, transport=transport)  # doctest: +SKIP
    >>> fetch_targets(updater, ["keys/a.pub"], targets_url=url, out=Path("in"), transport=transport)          # doctest: +SKIP
    (PosixPath('in/keys%2Fa.pub'),)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import TargetFile, Targets  # type: ignore[attr-defined]
from tuf.ngclient import Updater  # type: ignore[attr-defined]

from edgekit.durable import sync_folder
from edgekit.errors import DeviceError, RepositoryError, TrustError
from edgekit.schema.state import Floors
from edgekit.trust.download import Algorithm, SignedFile, download_file
from edgekit.trust.fetcher import BoundedFetcher
from edgekit.trust.floors import RoleVersions, check_roles, raise_roles, reference_time
from edgekit.trust.metadata import open_metadata, refuse_duplicate_keys, translated
from edgekit.trust.transport import Transport

_PARTS = ".parts"
_ALGORITHMS: dict[Algorithm, re.Pattern[str]] = {
    "sha256": re.compile(r"[0-9a-f]{64}\Z"),
    "sha512": re.compile(r"[0-9a-f]{128}\Z"),
}


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
    updater: Updater,
    paths: Sequence[str],
    *,
    targets_url: str,
    out: Path,
    transport: Transport,
    attempts: int = 3,
    retry_s: float = 0.5,
) -> tuple[Path, ...]:
    """Fetch targets by path, in order; one that is here already and right is not fetched again.

    Args:
        updater: from :func:`refresh_top_roles`.
        paths: of the targets.
        targets_url: what the paths are below.
        out: where they are put, each under its quoted path; what came of an interrupted one is kept in ``out/.parts``.
        transport: the connections.
        attempts: requests in a row that may break without a new byte.
        retry_s: pause before another request.

    Raises:
        RepositoryError: ``repository.no_target``, or as :func:`edgekit.trust.download.download_blob`.
        TrustError: ``trust.digest``, ``trust.length``, or what a delegated role is refused for.
        DeviceError: ``device.disk_full`` or ``device.storage``.
    """
    found = []
    for path in paths:
        target = _find(updater, path, targets_url)
        final = out / quote(path, safe="")
        if not _is_right(final, target):
            wanted = _wanted(updater, path, target, targets_url.rstrip("/"))
            part = download_file(wanted, out / _PARTS, transport=transport, attempts=attempts, retry_s=retry_s)
            _accept(part, final, path, target)
        found.append(final)
    return tuple(found)


def _find(updater: Updater, path: str, url: str) -> TargetFile:
    """What the most trusted role that speaks of a path says of it."""
    with translated(url):
        target = updater.get_targetinfo(path)
    for role in updater._trusted_set:  # noqa: SLF001 - no public view of it
        if isinstance(role, Targets):
            refuse_duplicate_keys(role)
    if target is None:
        raise RepositoryError("repository.no_target", f"{path}: no trusted role lists it.", hint="Check its spelling.")
    return target


def _wanted(updater: Updater, path: str, target: TargetFile, targets_url: str) -> SignedFile:
    """Where a target is; with consistent snapshots its name begins with one of its hashes."""
    for algorithm, form in _ALGORITHMS.items():
        digest = target.hashes.get(algorithm, "")
        if form.match(digest):
            folder, slash, name = path.rpartition("/")
            is_prefixed = updater._trusted_set.root.consistent_snapshot  # noqa: SLF001 - no public view of it
            remote = f"{folder}{slash}{digest}.{name}" if is_prefixed else path
            url = f"{targets_url}/{quote(remote, safe='/+')}"
            return SignedFile(url=url, name=path, size_bytes=target.length, digest_hex=digest, algorithm=algorithm)
    kinds = ", ".join(sorted(target.hashes))
    raise TrustError("trust.digest", f"{path}: signed with {kinds[:80]}; expected a sha256 or sha512 digest.")


def _accept(part: Path, final: Path, path: str, target: TargetFile) -> None:
    """Give a target its name when its other hashes are right, too."""
    try:
        if len(target.hashes) > 1 and not _is_right(part, target):
            part.unlink()
            raise TrustError("trust.digest", f"{path}: one of its digests fits, another does not; it was signed wrongly.")
        part.replace(final)
        sync_folder(final.parent)
        with contextlib.suppress(OSError):  # parts of other targets are kept
            part.parent.rmdir()
    except OSError as error:
        raise DeviceError("device.storage", f"{final}: cannot keep it: {error.strerror or error}.") from error


def _is_right(path: Path, target: TargetFile) -> bool:
    """Whether a file is what was signed."""
    try:
        with path.open("rb") as file:
            target.verify_length_and_hashes(file)
    except (LengthOrHashMismatchError, OSError):
        return False
    return True
