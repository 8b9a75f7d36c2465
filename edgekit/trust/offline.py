"""Releases on a stick: verified without a network, from the root chain and the targets metadata alone.

A stick has no fresh timestamp, so snapshot and timestamp are left out (Uptane calls it partial verification): what is on it was
signed by keys that are kept offline, is not older than what this device has seen, and has not expired. Protection against a
stick that was held back is weaker than online: it ends with the expiry of the targets, not of the timestamp.

The checks, in order; the first that fails refuses the stick:

1. Root: from the provisioned root on, each next version is signed by the one before and by itself; the last one is not older
   than this device has seen, and not expired.
2. Targets: the newest on the stick, signed by enough different keys of that root; not older than seen; not expired.
3. Delegated roles: the newest of each on the stick, signed as the targets say; not older than seen; not expired.

    >>> found = read_stick(Path("/media/usb"), root=root, floors=floors, now=now)  # doctest: +SKIP
    >>> [release.info.version for release in found.releases]                         # doctest: +SKIP
    ['2.0.0']
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from tuf.api.exceptions import RepositoryError as TufRepositoryError
from tuf.api.metadata import Metadata, Root, Targets  # type: ignore[attr-defined]

from edgekit.errors import DeviceError, TrustError
from edgekit.schema.release import Recall, Release
from edgekit.schema.state import Floors
from edgekit.trust.floors import reference_time
from edgekit.trust.metadata import MAX_DELEGATED_ROLES, fingerprint, list_releases, recalls_of, refuse_duplicate_keys
from edgekit.trust.stick_files import read_bounded, unreadable

MAX_ROOT_BYTES = 512_000
MAX_TARGETS_BYTES = 5_000_000
MAX_ROOTS = 1024
S = TypeVar("S", Root, Targets)


@dataclass(frozen=True, kw_only=True)
class StickContents:
    """What a stick offers, verified; ``floors`` are to be kept durably before anything is done with it."""

    releases: tuple[Release, ...]
    recalls: tuple[Recall, ...]
    floors: Floors
    expires_at: datetime


def read_stick(folder: Path, *, root: bytes, floors: Floors, now: datetime, model: str = "") -> StickContents:
    """Verify a stick's metadata and list its releases.

    Args:
        folder: of the stick: ``metadata/``, ``targets/`` and ``blobs/`` are in it.
        root: the provisioned root metadata.
        floors: what this device has seen.
        now: the device's clock, UTC and aware.
        model: delegated roles that may not speak of this model are not looked into; empty looks into all.

    Raises:
        TrustError: ``trust.root``, ``trust.signature``, ``trust.rollback``, ``trust.expired``, ``trust.duplicate_key``,
            ``trust.length``, ``trust.metadata``.
        DeviceError: ``stick.unreadable`` or ``stick.incomplete``.
    """
    time = reference_time(floors, now)
    metadata = folder / "metadata"
    trusted = _follow_roots(metadata, root)
    if trusted.version < floors.root:
        raise _older("root", trusted.version, floors.root)
    _check_expiry("root", trusted, time)
    refuse_duplicate_keys(trusted)
    targets = _newest(metadata, "targets", trusted)
    if targets.version < floors.targets:
        raise _older("targets", targets.version, floors.targets)
    _check_expiry("targets", targets, time)
    refuse_duplicate_keys(targets)
    delegated = _delegated(metadata, targets, floors, time, model)
    versions = {fingerprint(targets, role): found.version for role, found in delegated.items()}
    return StickContents(
        releases=list_releases(targets, delegated),
        recalls=recalls_of(targets),
        floors=_raised(floors, trusted.version, targets.version, versions),
        expires_at=min(role.expires for role in (trusted, targets, *delegated.values())),
    )


def _follow_roots(metadata: Path, provisioned: bytes) -> Root:
    trusted = _parse(Root, provisioned, "the provisioned root", code="trust.root")
    root: Root = trusted.signed
    _verify(root, "root", trusted)
    for _ in range(MAX_ROOTS):
        path = metadata / f"{root.version + 1}.root.json"
        if not path.exists():
            return root
        following = _parse(Root, read_bounded(path, MAX_ROOT_BYTES), path.name)
        if following.signed.version != root.version + 1:
            raise TrustError("trust.rollback", f"{path.name}: says version {following.signed.version}.")
        _verify(root, "root", following)
        _verify(following.signed, "root", following)
        root = following.signed
    raise TrustError("trust.metadata", f"{metadata}: more than {MAX_ROOTS} root versions.")


def _newest(metadata: Path, role: str, delegator: Root | Targets) -> Targets:
    """The highest version of a role on the stick, signed as its delegator says."""
    try:
        found = [path for path in metadata.glob(f"*.{role}.json") if path.name.split(".", 1)[0].isdecimal()]
    except OSError as error:
        raise unreadable(metadata, error) from error
    if not found:
        raise DeviceError(
            "stick.incomplete", f"{metadata}: no {role} metadata here.", hint='Make the stick with "edgekit repo stick".'
        )
    path = max(found, key=lambda path: int(path.name.split(".", 1)[0][:18]))
    parsed = _parse(Targets, read_bounded(path, MAX_TARGETS_BYTES), path.name)
    _verify(delegator, role, parsed)
    signed: Targets = parsed.signed
    return signed


def _delegated(metadata: Path, targets: Targets, floors: Floors, time: datetime, model: str) -> dict[str, Targets]:
    roles = (targets.delegations.roles if targets.delegations else None) or {}
    if len(roles) > MAX_DELEGATED_ROLES:
        raise TrustError("trust.metadata", f"targets delegates to {len(roles)} roles; a device follows {MAX_DELEGATED_ROLES}.")
    probe = f"models/{model}/0/0/manifest.json"
    found: dict[str, Targets] = {}
    for name, role in roles.items():
        if model and not role.is_delegated_path(probe):
            continue
        signed = _newest(metadata, name, targets)
        floor = floors.delegated.get(fingerprint(targets, name), 0)
        if signed.version < floor:
            raise _older(name, signed.version, floor)
        _check_expiry(name, signed, time)
        found[name] = signed
    return found


def _raised(floors: Floors, root: int, targets: int, delegated: dict[str, int]) -> Floors:
    """A new root resets the online roles' floors, as online; the time is not raised: nobody fresh vouched for it.

    The floor of targets stays, other than online: here no snapshot vouches for them, and a new root is a public file that
    anybody could put beside old targets.
    """
    is_new_root = root > floors.root
    higher = {name: int(max(version, floors.delegated.get(name, 0))) for name, version in delegated.items()}
    return msgspec.structs.replace(
        floors,
        root=int(max(floors.root, root)),  # int(): as online, a version may be true
        targets=int(max(floors.targets, targets)),
        timestamp=0 if is_new_root else floors.timestamp,
        snapshot=0 if is_new_root else floors.snapshot,
        delegated=floors.delegated | higher,
    )


def _parse(kind: type[S], data: bytes, name: str, *, code: str = "trust.metadata") -> Metadata[S]:
    try:
        metadata: Metadata[S] = Metadata[S].from_bytes(data)
    except (TufRepositoryError, RecursionError) as error:
        raise TrustError(code, f"{name}: cannot be read as metadata: {error}.") from error
    if not isinstance(metadata.signed, kind):
        raise TrustError(code, f"{name}: holds {metadata.signed.type}, expected {kind.type}.")
    return metadata


def _verify(delegator: Root | Targets, role: str, metadata: Metadata[Any]) -> None:
    try:
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (TufRepositoryError, ValueError) as error:
        raise TrustError(
            "trust.signature",
            f"{role} version {metadata.signed.version} on the stick is not signed by enough trusted keys: {error}.",
            hint="A key of it may have been revoked since the stick was made; make it again.",
        ) from error


def _check_expiry(role: str, signed: Root | Targets, time: datetime) -> None:
    if signed.is_expired(time):
        raise TrustError(
            "trust.expired",
            f"{role} on the stick expired at {signed.expires:%Y-%m-%d %H:%M} UTC.",
            hint="Make the stick again; if it is new, check this device's clock.",
        )


def _older(role: str, version: int, floor: int) -> TrustError:
    return TrustError(
        "trust.rollback",
        f"{role} version {version} on the stick is older than {floor}, which this device has already seen.",
        hint="Make the stick again from today's repository.",
    )
