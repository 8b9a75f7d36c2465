"""Anti-rollback floors, pure: what a device has seen, it never accepts less of again.

TUF's own cache is not fsynced and can be wiped; these floors live in the agent's durable state and decide independently of it.
They never decrease, with the one exception that TUF makes (specification 5.3.11): a new root version resets timestamp,
snapshot and targets, so that the owner can recover from stolen online keys that signed absurdly high versions.

    >>> check_roles(Floors(targets=7), RoleVersions(root=1, timestamp=9, snapshot=8, targets=6))
    Traceback (most recent call last):
    ...
    edgekit.errors.TrustError: targets version 6 is older than 7, which this device has already seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from edgekit.errors import TrustError
from edgekit.schema.release import Release
from edgekit.schema.state import Floors

_REPLAY_HINT = "Somebody may replay an old repository; if the repository was restored from a backup, publish again."


@dataclass(frozen=True, kw_only=True)
class RoleVersions:
    """Versions of the metadata that was verified."""

    root: int
    timestamp: int
    snapshot: int
    targets: int
    delegated: dict[str, int] = field(default_factory=dict)
    """By ``<role>:<fingerprint of its keys>``: new keys begin anew, which is how an owner recovers from a stolen one."""


def check_roles(floors: Floors, seen: RoleVersions) -> None:
    """Refuse metadata that is older than what was seen.

    Raises:
        TrustError: ``trust.rollback`` naming the role and both versions.
    """
    roles = ("root",) if seen.root > floors.root else ("root", "timestamp", "snapshot", "targets")
    for role in roles:
        version, floor = getattr(seen, role), getattr(floors, role)
        if version < floor:
            raise TrustError(
                "trust.rollback",
                f"{role} version {version} is older than {floor}, which this device has already seen.",
                hint=_REPLAY_HINT,
            )
    for role, version in seen.delegated.items():
        floor = floors.delegated.get(role, 0)
        if version < floor:
            raise TrustError(
                "trust.rollback",
                f"{role.partition(':')[0]} version {version} is older than {floor}, which this device has already seen.",
                hint=_REPLAY_HINT,
            )


def raise_roles(floors: Floors, seen: RoleVersions, now: datetime) -> Floors:
    """The floors after this metadata was accepted at ``now``, which is also the least that the clock may say from here on."""
    is_new_root = seen.root > floors.root
    named = {role.partition(":")[0] for role in seen.delegated}
    delegated = {role: version for role, version in floors.delegated.items() if role.partition(":")[0] not in named}
    # int(): python-tuf takes a version of true for 1, and a state file that says true could not be read again
    delegated |= {role: int(max(version, floors.delegated.get(role, 0))) for role, version in seen.delegated.items()}
    return msgspec.structs.replace(
        floors,
        root=int(max(floors.root, seen.root)),
        timestamp=int(seen.timestamp if is_new_root else max(floors.timestamp, seen.timestamp)),
        snapshot=int(seen.snapshot if is_new_root else max(floors.snapshot, seen.snapshot)),
        targets=int(seen.targets if is_new_root else max(floors.targets, seen.targets)),
        time=reference_time(floors, now),
        delegated=delegated,
    )


def reference_time(floors: Floors, now: datetime) -> datetime:
    """The time that expiry is judged by: a clock that was set back does not make old metadata fresh."""
    return now if floors.time is None else max(now, floors.time)


def check_release(floors: Floors, release: Release) -> None:
    """Refuse a release whose counter is below the highest that was committed for its model.

    Raises:
        TrustError: ``trust.rollback``.
    """
    info = release.info
    floor = floors.releases.get(info.name, 0)
    if info.counter < floor:
        raise TrustError(
            "trust.rollback",
            f"{info.name}@{info.version}: release counter {info.counter} is older than {floor}, which was installed before.",
            hint='To go back on purpose, publish the old bundle again: "edgekit repo publish --again".',
        )


def raise_release(floors: Floors, release: Release) -> Floors:
    """The floors after a release was committed."""
    info = release.info
    counter = max(floors.releases.get(info.name, 0), info.counter)
    return msgspec.structs.replace(floors, releases={**floors.releases, info.name: counter})
