"""One refresh of TUF metadata through python-tuf's client, with what that client leaves open.

What is added, each for a failure that was tried against python-tuf 7 (docs/adr/0002):

- the bootstrap root is always given, so that a lost or damaged cache is rebuilt from it;
- expiry is judged by a time that never goes back;
- the cache is fsynced after a refresh;
- one public key that is listed under two keyids does not count twice towards a threshold;
- every error becomes one of ours.

This module imports tuf (and through it ``cryptography``, where that is installed); programs load it when they refresh.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import msgspec
from tuf.api import exceptions
from tuf.api.metadata import Root, TargetFile  # type: ignore[attr-defined]
from tuf.ngclient import Updater, UpdaterConfig  # type: ignore[attr-defined]

from edgekit.errors import DeviceError, RepositoryError, TrustError
from edgekit.schema.release import Release
from edgekit.trust.fetcher import BoundedFetcher
from edgekit.trust.floors import RoleVersions
from edgekit.trust.transport import Transport

logger = logging.getLogger(__name__)

MANIFEST_PATH = re.compile(r"models/([^/]+)/([^/]+)/manifest\.json\Z")
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_CURED_BY_A_NEW_CACHE = _FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@dataclass(frozen=True, kw_only=True)
class VerifiedMetadata:
    """What signed, fresh and consistent metadata says."""

    versions: RoleVersions
    releases: tuple[Release, ...]
    expires_at: datetime
    """When the first of the roles expires."""
    received_bytes: int


def refresh_metadata(
    metadata_dir: Path, metadata_url: str, *, root: bytes, time: datetime, transport: Transport
) -> VerifiedMetadata:
    """Refresh root, timestamp, snapshot and targets, and list the releases.

    Args:
        metadata_dir: the cache; made where missing, rebuilt where damaged.
        metadata_url: where ``timestamp.json`` is.
        root: the root metadata that the device was provisioned with.
        time: by which expiry is judged, UTC.
        transport: the connections.

    Raises:
        RepositoryError: ``repository.unreachable``, ``repository.not_found``, ``repository.slow``, ``repository.interrupted``.
        TrustError: ``trust.root``, ``trust.signature``, ``trust.expired``, ``trust.rollback``, ``trust.digest``,
            ``trust.length``, ``trust.duplicate_key``, ``trust.metadata``.
        DeviceError: ``device.disk_full`` or ``device.storage``.
    """
    fetcher = BoundedFetcher(transport)
    try:
        updater = _refresh(metadata_dir, metadata_url, root, time, fetcher)
    except OSError as error:
        if error.errno in _NOT_CURED_BY_A_NEW_CACHE:
            _raise_storage(error, metadata_dir)
        logger.warning("metadata cache is damaged, making a new one: path=%s error=%s", metadata_dir, error)
        _remove(metadata_dir)
        try:
            updater = _refresh(metadata_dir, metadata_url, root, time, fetcher)
        except OSError as second:
            _raise_storage(second, metadata_dir)
    trusted = updater._trusted_set  # noqa: SLF001 - python-tuf has no public view of it; tuf is pinned below 8
    _refuse_duplicate_keys(trusted.root)
    try:
        _sync_tree(metadata_dir)
    except OSError as error:
        _raise_storage(error, metadata_dir)
    roles = (trusted.root, trusted.timestamp, trusted.snapshot, trusted.targets)
    return VerifiedMetadata(
        versions=RoleVersions(
            root=trusted.root.version,
            timestamp=trusted.timestamp.version,
            snapshot=trusted.snapshot.version,
            targets=trusted.targets.version,
        ),
        releases=_releases(trusted.targets.targets),
        expires_at=min(role.expires for role in roles),
        received_bytes=fetcher.received_bytes,
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _refresh(metadata_dir: Path, url: str, root: bytes, time: datetime, fetcher: BoundedFetcher) -> Updater:
    metadata_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
    try:
        updater = Updater(str(metadata_dir), url, fetcher=fetcher, config=UpdaterConfig(), bootstrap=root)
    except exceptions.RepositoryError as error:
        raise TrustError(
            "trust.root",
            f"the root metadata that this device was given is not valid: {error}.",
            hint="Provision the repository's metadata/1.root.json, unchanged.",
        ) from error
    updater._trusted_set.reference_time = time  # noqa: SLF001 - the only way to set it; a test holds it
    try:
        updater.refresh()
    except exceptions.DownloadError as error:
        _raise_download(error, url)
    except exceptions.RepositoryError as error:
        _raise_refused(error)
    return updater


def _raise_download(error: exceptions.DownloadError, url: str) -> NoReturn:
    cause = f"{error}"
    match error:
        case exceptions.DownloadHTTPError(status_code=404 | 403):
            raise RepositoryError(
                "repository.not_found",
                f"{url}: no update repository answers here ({cause}).",
                hint="Check the repository's address.",
            ) from error
        case exceptions.DownloadLengthMismatchError():
            raise TrustError("trust.length", f"metadata is longer than it may be: {cause}.") from error
        case exceptions.SlowRetrievalError():
            raise RepositoryError("repository.slow", f"the repository is too slow: {cause}.") from error
        case exceptions.DownloadHTTPError():
            raise RepositoryError("repository.unreachable", f"the repository failed: {cause}.") from error
        case _:
            raise RepositoryError(
                "repository.unreachable",
                f"the repository cannot be reached: {cause}.",
                hint="Check the address and the network; the device keeps what it has.",
            ) from error


def _raise_refused(error: exceptions.RepositoryError) -> NoReturn:
    match error:
        case exceptions.ExpiredMetadataError():
            raise TrustError(
                "trust.expired",
                f"{error}: somebody holds back newer metadata, or nobody signed it again.",
                hint='On the repository: "edgekit repo refresh DIR". On the device: check its clock.',
            ) from error
        case exceptions.BadVersionNumberError():
            raise TrustError(
                "trust.rollback",
                f"metadata versions do not fit: {str(error).rstrip('.')}.",
                hint="Somebody may replay an old repository; if it was restored from a backup, publish again.",
            ) from error
        case exceptions.UnsignedMetadataError():
            raise TrustError(
                "trust.signature",
                f"metadata is not signed by enough trusted keys: {str(error).rstrip('.')}.",
                hint="Do not use this repository until its owner explains it.",
            ) from error
        case exceptions.LengthOrHashMismatchError():
            raise TrustError("trust.digest", f"metadata was changed on the way: {str(error).rstrip('.')}.") from error
        case _:
            raise TrustError("trust.metadata", f"metadata was refused: {str(error).rstrip('.')}.") from error


def _raise_storage(error: OSError, folder: Path) -> NoReturn:
    if error.errno in _FULL:
        raise DeviceError(
            "device.disk_full", f"{folder}: the disk is full; the metadata could not be kept.", hint="Free some space."
        ) from error
    raise DeviceError("device.storage", f"{folder}: cannot keep metadata: {error.strerror or error}.") from error


def _refuse_duplicate_keys(root: Root) -> None:
    """python-tuf counts keyids; thresholds are about different keys."""
    for name, role in root.roles.items():
        material = [str(root.keys[keyid].keyval.get("public")) for keyid in role.keyids if keyid in root.keys]
        if len(set(material)) != len(material):
            raise TrustError(
                "trust.duplicate_key",
                f"the root metadata lists one key of the role {name} twice: its threshold means nothing.",
                hint="The owner of the repository must sign a new root.",
            )


def _releases(targets: dict[str, TargetFile]) -> tuple[Release, ...]:
    found = [release for path, target in targets.items() if (release := _release(path, target)) is not None]
    return tuple(sorted(found, key=lambda release: (release.info.name, release.info.counter)))


def _release(path: str, target: TargetFile) -> Release | None:
    """The release that a target describes; None for other targets, and, with a warning, for what does not fit."""
    match = MANIFEST_PATH.match(path)
    if match is None:
        return None
    digest = target.hashes.get("sha256", "")
    record = {
        "info": target.custom,
        "manifest_path": path,
        "manifest_digest": f"sha256:{digest}",
        "manifest_size_bytes": target.length,
    }
    try:
        release = msgspec.convert(record, Release)
    except msgspec.ValidationError as error:
        logger.warning("release cannot be read, passed over: path=%s error=%s", path, error)
        return None
    if (release.info.name, release.info.version) != match.groups() or target.length > MAX_MANIFEST_BYTES:
        logger.warning("release contradicts its path or is too long, passed over: path=%s", path)
        return None
    return release


def _sync_tree(folder: Path) -> None:
    """Make the cache durable: python-tuf writes and renames without fsync."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
