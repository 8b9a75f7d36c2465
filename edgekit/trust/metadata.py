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

import base64
import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import msgspec
from tuf.api import exceptions
from tuf.api.metadata import DelegatedRole, Key, Role, Root, TargetFile, Targets  # type: ignore[attr-defined]
from tuf.ngclient import Updater, UpdaterConfig  # type: ignore[attr-defined]

from edgekit.errors import DeviceError, RepositoryError, TrustError
from edgekit.schema.base import encode_json
from edgekit.schema.release import RECALLS_PATH, Recall, RecallList, Release
from edgekit.trust.fetcher import BoundedFetcher
from edgekit.trust.floors import RoleVersions
from edgekit.trust.transport import Transport

logger = logging.getLogger(__name__)

ROOTS_A_STEP = 256
MAX_STEPS = 16
MANIFEST_PATH = re.compile(r"models/([^/]+)/([^/]+)/(?:([^/]+)/)?manifest\.json\Z")
MAX_DELEGATED_ROLES = 64
MAX_RECALLS = 4096
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_CURED_BY_A_NEW_CACHE = _FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@dataclass(frozen=True, kw_only=True)
class VerifiedMetadata:
    """What signed, fresh and consistent metadata says."""

    versions: RoleVersions
    releases: tuple[Release, ...]
    recalls: tuple[Recall, ...]
    expires_at: datetime
    """When the first of the roles expires."""
    received_bytes: int


def refresh_metadata(
    metadata_dir: Path, metadata_url: str, *, root: bytes, time: datetime, transport: Transport, model: str = ""
) -> VerifiedMetadata:
    """Refresh root, timestamp, snapshot, targets and the roles that it delegates to, and list the releases.

    Args:
        metadata_dir: the cache; made where missing, rebuilt where damaged.
        metadata_url: where ``timestamp.json`` is.
        root: the root metadata that the device was provisioned with.
        time: by which expiry is judged, UTC.
        transport: the connections.
        model: delegated roles that may not speak of this model are not fetched; empty fetches all.

    Raises:
        RepositoryError: ``repository.unreachable``, ``repository.not_found``, ``repository.slow``, ``repository.interrupted``.
        TrustError: ``trust.root``, ``trust.signature``, ``trust.expired``, ``trust.rollback``, ``trust.digest``,
            ``trust.length``, ``trust.duplicate_key``, ``trust.metadata``.
        DeviceError: ``device.disk_full`` or ``device.storage``.
    """
    fetcher = BoundedFetcher(transport)
    updater = open_metadata(metadata_dir, metadata_url, root=root, time=time, fetcher=fetcher)
    with translated(metadata_url):
        delegated = _load_delegated(updater, model)
    trusted = updater._trusted_set  # noqa: SLF001 - python-tuf has no public view of it; tuf is pinned below 8
    try:
        _sync_tree(metadata_dir)
    except OSError as error:
        _raise_storage(error, metadata_dir)
    roles = (trusted.root, trusted.timestamp, trusted.snapshot, trusted.targets, *delegated.values())
    return VerifiedMetadata(
        versions=RoleVersions(
            root=trusted.root.version,
            timestamp=trusted.timestamp.version,
            snapshot=trusted.snapshot.version,
            targets=trusted.targets.version,
            delegated={fingerprint(trusted.targets, role): found.version for role, found in delegated.items()},
        ),
        releases=list_releases(trusted.targets, delegated),
        recalls=recalls_of(trusted.targets),
        expires_at=min(role.expires for role in roles),
        received_bytes=fetcher.received_bytes,
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def open_metadata(metadata_dir: Path, url: str, *, root: bytes, time: datetime, fetcher: BoundedFetcher) -> Updater:
    """Refresh the top roles, and give python-tuf's client that did; a damaged cache is made anew.

    Raises:
        RepositoryError, TrustError, DeviceError: as :func:`refresh_metadata`.
    """
    try:
        return _catch_up(metadata_dir, url, root, time=time, fetcher=fetcher)
    except OSError as error:
        if error.errno in _NOT_CURED_BY_A_NEW_CACHE:
            _raise_storage(error, metadata_dir)
        logger.warning("metadata cache is damaged, making a new one: path=%s error=%s", metadata_dir, error)
    _remove(metadata_dir)
    try:
        return _catch_up(metadata_dir, url, root, time=time, fetcher=fetcher)
    except OSError as second:
        _raise_storage(second, metadata_dir)


def _catch_up(metadata_dir: Path, url: str, root: bytes, *, time: datetime, fetcher: BoundedFetcher) -> Updater:
    """Refresh; a device that slept through more new roots than one step may take goes on from where the step ended.

    A step takes ``ROOTS_A_STEP`` new roots (TUF 5.3.3 asks for a bound), each verified by the one before and kept; only
    ``MAX_STEPS`` of them are taken at once, the rest with the next refresh.
    """
    for _ in range(MAX_STEPS - 1):
        before = _known_roots(metadata_dir)
        try:
            return _refresh(metadata_dir, url, root, time=time, fetcher=fetcher)
        except TrustError:
            if _known_roots(metadata_dir) - before < ROOTS_A_STEP:
                raise
            logger.info("event=roots_followed count=%d", _known_roots(metadata_dir))
    return _refresh(metadata_dir, url, root, time=time, fetcher=fetcher)


def _known_roots(metadata_dir: Path) -> int:
    """How many roots were verified and kept."""
    try:
        return sum(path.name.endswith(".root.json") for path in (metadata_dir / "root_history").iterdir())
    except FileNotFoundError:
        return 0


def _refresh(metadata_dir: Path, url: str, root: bytes, *, time: datetime, fetcher: BoundedFetcher) -> Updater:
    metadata_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
    config = UpdaterConfig(max_root_rotations=_known_roots(metadata_dir) + ROOTS_A_STEP)
    try:
        updater = Updater(str(metadata_dir), url, fetcher=fetcher, config=config, bootstrap=root)
    except exceptions.RepositoryError as error:
        raise TrustError(
            "trust.root",
            f"the root metadata that this device was given is not valid: {error}.",
            hint="Provision the repository's metadata/1.root.json, unchanged.",
        ) from error
    updater._trusted_set.reference_time = time  # noqa: SLF001 - the only way to set it; a test holds it
    with translated(url):
        updater.refresh()
        refuse_duplicate_keys(updater._trusted_set.root)  # noqa: SLF001 - no public view of it
    return updater


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Errors of python-tuf as ours."""
    try:
        yield
    except exceptions.DownloadError as error:
        _raise_download(error, url)
    except exceptions.RepositoryError as error:
        _raise_refused(error)


def _load_delegated(updater: Updater, model: str) -> dict[str, Targets]:
    """The roles that the targets role delegates to directly, in its order, as far as they may speak of the model."""
    targets = updater._trusted_set.targets  # noqa: SLF001 - no public view of it
    roles = (targets.delegations.roles if targets.delegations else None) or {}
    if len(roles) > MAX_DELEGATED_ROLES:
        raise TrustError("trust.metadata", f"targets delegates to {len(roles)} roles; a device follows {MAX_DELEGATED_ROLES}.")
    refuse_duplicate_keys(targets)
    probe = f"models/{model}/0/0/manifest.json"
    wanted = [name for name, role in roles.items() if not model or role.is_delegated_path(probe)]
    return {name: updater._load_targets(name, "targets") for name in wanted}  # noqa: SLF001 - the public way is one path at a time


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


def refuse_duplicate_keys(delegator: Root | Targets) -> None:
    """python-tuf counts key ids; thresholds are about different keys.

    Raises:
        TrustError: ``trust.duplicate_key``, or ``trust.metadata`` when a name or a key id is no text.
    """
    roles: Mapping[str, Role] = {}
    keys: Mapping[str, Key] = {}
    if isinstance(delegator, Root):
        roles, keys = delegator.roles, delegator.keys
    elif delegator.delegations is not None:
        succinct = delegator.delegations.succinct_roles
        roles = delegator.delegations.roles or ({"bins": succinct} if succinct else {})
        keys = delegator.delegations.keys
    for name, role in roles.items():
        if not all(_is_text(word) for word in (name, *role.keyids)):
            raise TrustError("trust.metadata", f"a role's name or one of its key ids is no text: {name!r:.80}.")
        found = [_material(keys[keyid]) for keyid in role.keyids if keyid in keys]
        if len(set(found)) != len(found):
            raise TrustError(
                "trust.duplicate_key",
                f"the {delegator.type} metadata lists one key of the role {name} twice: its threshold means nothing.",
                hint=f"The owner of the repository must sign new {delegator.type} metadata.",
            )


def _is_text(word: object) -> bool:
    """Whether it can be written to a file: JSON may hold half a character, and python-tuf does not look at key ids."""
    if not isinstance(word, str):
        return False
    try:
        word.encode()
    except UnicodeError:
        return False
    return True


def _material(key: Key) -> bytes:
    """The bytes of a public key, however they are written down."""
    text = str(key.keyval.get("public", ""))
    try:
        if text.startswith("-----BEGIN"):
            return base64.b64decode("".join(line for line in text.split("\n") if not line.startswith("-----")))
        return bytes.fromhex(text)
    except ValueError:
        return text.encode(errors="surrogatepass")


def fingerprint(targets: Targets, role: str) -> str:
    """A delegated role and its keys, as the floors name it."""
    keyids = sorted(targets.get_delegated_role(role).keyids)
    return f"{role}:{hashlib.sha256(' '.join(keyids).encode()).hexdigest()[:16]}"


def list_releases(targets: Targets, delegated: Mapping[str, Targets]) -> tuple[Release, ...]:
    """Every release that the targets role and its delegated roles may speak of; for one path the most trusted role decides.

    Args:
        targets: the targets role.
        delegated: metadata of the roles that it delegates to; those not given are not looked into.
    """
    files = dict(targets.targets)
    roles = (targets.delegations.roles if targets.delegations else None) or {}
    for name, found in delegated.items():
        for path, target in found.targets.items():
            if _may_speak(roles, name, path, delegated):
                files.setdefault(path, target)
    releases = [release for path, target in files.items() if (release := _release(path, target)) is not None]
    return tuple(sorted(releases, key=lambda release: (release.info.name, release.info.counter)))


def _may_speak(roles: Mapping[str, DelegatedRole], name: str, path: str, delegated: Mapping[str, Targets]) -> bool:
    """Whether a role decides a path: it is delegated to it, and no role before it has it or ends the search (TUF 5.6.7)."""
    for other, role in roles.items():
        if role.is_delegated_path(path):
            if other == name:
                return True
            if role.terminating or (other in delegated and path in delegated[other].targets):
                return False
    return False


def recalls_of(targets: Targets) -> tuple[Recall, ...]:
    """The signed deny-list. One that cannot be read must not be taken for an empty one.

    Raises:
        TrustError: ``trust.metadata``.
    """
    target = targets.targets.get(RECALLS_PATH)
    if target is None:
        return ()
    try:
        found = msgspec.convert(target.custom, RecallList)
        encode_json(found)  # python-tuf's JSON may hold half a character, which no state file can keep
    except (msgspec.ValidationError, UnicodeError) as error:
        raise TrustError("trust.metadata", f"{RECALLS_PATH}: the list of recalled models cannot be read: {error}.") from error
    if len(found.recalls) > MAX_RECALLS:
        raise TrustError("trust.metadata", f"{RECALLS_PATH}: more than {MAX_RECALLS} recalls.")
    return found.recalls


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
        encode_json(release)  # as above
    except (msgspec.ValidationError, UnicodeError) as error:
        logger.warning("release cannot be read, passed over: path=%s error=%s", path, error)
        return None
    name, version, channel = match.groups()
    said = (release.info.name, release.info.version, release.info.channel)
    if said != (name, version, channel or release.info.channel) or target.length > MAX_MANIFEST_BYTES:
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
