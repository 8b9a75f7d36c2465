"""A stick for devices without a network: every root, the targets metadata, and one release's manifest and blobs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekit.bundle.layout import blob_name
from edgekit.durable import write_durably
from edgekit.errors import RepositoryError, UsageError
from edgekit.repository.listing import head_of, releases_of
from edgekit.repository.publishing import find_release, load_manifest, manifest_file
from edgekit.repository.store import SERVED, Chain, Store, delegated_roles
from edgekit.schema.digest import CHUNK_BYTES
from edgekit.schema.release import Release

_NEEDED = frozenset({"model", "golden", "baseline"})
"""What a device fetches; evidence stays in the repository."""


@dataclass(frozen=True, kw_only=True)
class StickMade:
    """What was written."""

    releases: tuple[Release, ...]
    files: int
    size_bytes: int


def make_stick(folder: Path, out: Path, *, names: tuple[str, ...], channel: str = "production") -> StickMade:
    """Write what a device needs to install releases offline; nothing but offline keys vouches for it.

    Args:
        folder: of the repository.
        out: folder on the stick; what an earlier call wrote there is replaced.
        names: ``name@version``, or ``name`` for the newest on the channel.
        channel: where a name without a version is looked up, and the releases' channel.

    Raises:
        RepositoryError: ``repository.no_release``, ``repository.damaged``.
        UsageError: ``stick.occupied`` when the folder holds something else.
    """
    store = Store.open(folder)
    chain = store.chain()
    releases = tuple(_resolve(chain, text, channel) for text in names)
    _check_place(out)
    files: dict[Path, Path] = {}
    for release in releases:
        manifest, _ = load_manifest(folder, release)
        path = manifest_file(folder, release)
        needed = [ref for ref in manifest.blobs if ref.role in _NEEDED]
        files |= {blob.relative_to(folder): blob for blob in (folder / blob_name(ref.digest) for ref in needed)}
        files[path.relative_to(folder)] = path
    files |= {path.relative_to(folder): path for path in sorted((folder / "metadata").glob("*.root.json"))}
    for role in delegated_roles(chain.targets):
        if role in chain.delegated:
            path = folder / "metadata" / f"{chain.delegated[role].version}.{role}.json"
            files[path.relative_to(folder)] = path
    path = folder / "metadata" / f"{chain.targets.version}.targets.json"
    files[path.relative_to(folder)] = path  # last: a stick that was pulled out too early offers nothing
    size = 0
    for relative, source in files.items():
        try:
            write_durably(out / relative, _chunks(source))
        except FileNotFoundError as error:
            raise RepositoryError(
                "repository.damaged", f"{source}: is missing.", hint=f'"edgekit repo check {folder}" says what else is.'
            ) from error
        size += source.stat().st_size
    return StickMade(releases=releases, files=len(files), size_bytes=size)


def _resolve(chain: Chain, text: str, channel: str) -> Release:
    name, _, version = text.partition("@")
    if version:
        return find_release(chain, name, version, channel)
    head = head_of(releases_of(chain), name, channel)
    if head is None:
        raise RepositoryError("repository.no_release", f"{name}: no release on {channel}.", hint='See "edgekit repo status".')
    return head


def _check_place(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError("stick.occupied", f"{out}: is not a folder.", hint="Give a folder on the stick.")
    foreign = sorted(path.name for path in out.iterdir() if path.name not in SERVED and not path.name.startswith("."))
    if foreign and not (out / "metadata").is_dir():
        raise UsageError(
            "stick.occupied",
            f"{out}: holds other files ({foreign[0]}).",
            hint="Give a folder of its own, for example USB/edgekit.",
        )
    for name in SERVED:
        if (out / name).is_dir():
            shutil.rmtree(out / name)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
