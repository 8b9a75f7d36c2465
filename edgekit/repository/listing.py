"""The releases that verified metadata lists: of the targets role and of the roles that it delegates to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
from tuf.api.metadata import TargetFile, Targets  # type: ignore[attr-defined]

from edgekit.errors import RepositoryError
from edgekit.repository.store import Chain, delegated_roles
from edgekit.schema.release import RECALLS_PATH, RecallList, Release

_MANIFEST_PATH = re.compile(r"models/[^/]+/[^/]+/(?:[^/]+/)?manifest\.json\Z")


def manifest_path(name: str, version: str, channel: str) -> str:
    """Where a release's manifest is, below ``targets/``."""
    return f"models/{name}/{version}/{channel}/manifest.json"


def role_for(targets: Targets, path: str) -> str:
    """The role that signs a path: the first that it is delegated to, else the targets role itself."""
    for role in delegated_roles(targets):
        if targets.delegations.roles[role].is_delegated_path(path):  # type: ignore[index, union-attr]
            return role
    return "targets"


def target_files(chain: Chain) -> Iterator[tuple[str, str, TargetFile]]:
    """Role, path and target of everything that the metadata offers, the most trusted role first, each path once."""
    seen: set[str] = set()
    for role in ("targets", *delegated_roles(chain.targets)):
        if role != "targets" and role not in chain.delegated:
            continue
        for path, target in chain.role(role).targets.items():
            if path not in seen and (role == "targets" or role_for(chain.targets, path) == role):
                seen.add(path)
                yield role, path, target


def release_of(path: str, target: TargetFile) -> Release:
    """The release that a target describes.

    Raises:
        RepositoryError: ``repository.damaged``.
    """
    record: dict[str, Any] = {
        "info": target.custom,
        "manifest_path": path,
        "manifest_digest": f"sha256:{target.hashes.get('sha256')}",
        "manifest_size_bytes": target.length,
    }
    try:
        return msgspec.convert(record, Release)
    except msgspec.ValidationError as error:
        raise RepositoryError(
            "repository.damaged", f"{path}: this release cannot be read: {error}.", hint="Use the edgekit that wrote it."
        ) from error


def releases_of(chain: Chain) -> tuple[Release, ...]:
    """Every release, by model and counter.

    Raises:
        RepositoryError: ``repository.damaged`` when one cannot be read.
    """
    found = [release_of(path, target) for _, path, target in target_files(chain) if _MANIFEST_PATH.match(path)]
    return tuple(sorted(found, key=lambda release: (release.info.name, release.info.counter)))


def target_of(release: Release) -> TargetFile:
    """What metadata says of a release."""
    return TargetFile(
        length=release.manifest_size_bytes,
        hashes={"sha256": release.manifest_digest.removeprefix("sha256:")},
        path=release.manifest_path,
        unrecognized_fields={"custom": msgspec.to_builtins(release.info)},
    )


def recalls_of(targets: Targets) -> RecallList:
    """The deny-list that the targets role carries."""
    target = targets.targets.get(RECALLS_PATH)
    return msgspec.convert(target.custom, RecallList) if target is not None and target.custom else RecallList()


def head_of(releases: tuple[Release, ...], name: str, channel: str) -> Release | None:
    """The newest release of a model on a channel."""
    found = [release for release in releases if release.info.name == name and release.info.channel == channel]
    return max(found, key=lambda release: release.info.counter, default=None)
