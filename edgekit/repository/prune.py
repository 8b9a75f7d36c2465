"""Prune: old releases leave the metadata, then the files that nothing names any more leave the disk.

A release stays when it is the newest of its channel, or what a rollback of one step goes back to; when it is among the newest
few of its channel, or young; when a device has it in a slot; when a release that stays has a delta that begins at it. That is
decided by :func:`choose_kept`, which is pure, for a dry run and for a real one alike.

Files go last, when the metadata without them is visible, so that a power cut leaves files too many and never one too few; the
next run finds them. A removal that waits for signatures deletes nothing yet. Old snapshots and targets stay until no timestamp
that a client may still hold leads to them; the highest number of each role stays for ever, since no number is used twice; and
roots stay, every one of them.

    >>> prune(Path("repository"), Policy(keep=5), is_dry_run=True).size_bytes  # doctest: +SKIP
    1048576
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tuf.api.metadata import Metadata, Targets  # type: ignore[attr-defined]

from edgekit.bundle.layout import blob_name
from edgekit.durable import TEMPORARY_PREFIX
from edgekit.errors import RepositoryError, UsageError
from edgekit.repository import audit
from edgekit.repository.changes import Waiting, Workbench
from edgekit.repository.publishing import PRUNE_ACTION, all_releases, load_manifest, manifest_file
from edgekit.repository.signatures import SIGNATURES_FOLDER, SUFFIX, envelope_file
from edgekit.repository.store import SERVED, Chain, Store, delegated_roles, whole_second
from edgekit.schema.base import SCHEMA_VERSION, Record
from edgekit.schema.release import RECALLS_PATH, Release

KEEP = 3
KEEP_DAYS = 90.0
GRACE = timedelta(days=1)
"""Younger files that nobody names may be on their way into a release: a delta is made before it is published."""
_METADATA = re.compile(r"([0-9]{1,18})\.([a-z][a-z0-9_-]{0,63})\.json\Z")
_HEX_FILES = {
    "blobs/sha256": re.compile(r"[0-9a-f]{64}\Z"),
    "targets": re.compile(r"[0-9a-f]{64}\.(?:manifest|recalls)\.json\Z"),
    SIGNATURES_FOLDER: re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}\Z"),
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What stays beside what must: the newest ``keep`` of each channel, what is younger, and ``in_use`` (name, version)."""

    keep: int = KEEP
    keep_days: float = KEEP_DAYS
    in_use: frozenset[tuple[str, str]] = frozenset()

    def __post_init__(self) -> None:
        if self.keep < 1 or not 0 <= self.keep_days < 1e5:
            raise UsageError(
                "prune.policy",
                f"--keep {self.keep} --keep-days {self.keep_days:g}: not possible.",
                hint="At least one release of each channel stays; days are 0 or more.",
            )


class Kept(Record, frozen=True, kw_only=True):
    """A release that stays, and why."""

    release: str
    channel: str
    counter: int
    reason: str


class PrunedFile(Record, frozen=True, kw_only=True):
    """A file that was deleted; ``path`` is relative to the repository."""

    path: str
    size_bytes: int


class PruneReport(Record, frozen=True, kw_only=True):
    """What ``edgekit repo prune`` shows; of a dry run, what it would do once every signature is there."""

    removed: tuple[Release, ...]
    """From the metadata; while ``waiting`` is not empty they are still visible."""
    kept: tuple[Kept, ...]
    files: tuple[PrunedFile, ...]
    size_bytes: int
    is_dry_run: bool
    waiting: tuple[Waiting, ...] = ()
    schema_version: int = SCHEMA_VERSION


# --- which releases stay ----------------------------------------------------------------------------------------------------


def choose_kept(
    releases: Sequence[Release], policy: Policy, *, blobs_of: Mapping[str, frozenset[str]], now: datetime
) -> dict[str, str]:
    """Why each release stays that stays, by the path of its manifest.

    Args:
        releases: visible ones, and those that wait for signatures.
        policy: what stays.
        blobs_of: the digests of the blobs of releases, by the path of their manifest.
        now: the time, UTC.
    """
    kept: dict[str, str] = {}
    rows: dict[tuple[str, str], list[Release]] = {}
    for release in sorted(releases, key=lambda each: -each.info.counter):
        rows.setdefault((release.info.name, release.info.channel), []).append(release)
    for row in rows.values():
        kept[row[0].manifest_path] = f"the newest on {row[0].info.channel}"
    for row in rows.values():
        parent = _parent_of(row[0], releases)
        if parent is not None:
            kept.setdefault(parent.manifest_path, f"a rollback of {row[0].info.channel} goes back to it")
    for row in rows.values():
        for release in row[: policy.keep]:
            kept.setdefault(release.manifest_path, f"among the newest {policy.keep}")
    for release in releases:
        if (release.info.name, release.info.version) in policy.in_use:
            kept.setdefault(release.manifest_path, "a device has it")
        elif now - release.info.published_at < timedelta(days=policy.keep_days):
            kept.setdefault(release.manifest_path, f"younger than {policy.keep_days:g} days")
    bases = {delta.base for release in releases if release.manifest_path in kept for delta in release.info.deltas}
    for release in releases:
        if release.manifest_path not in kept and blobs_of.get(release.manifest_path, frozenset()) & bases:
            kept[release.manifest_path] = "a delta begins at it"
    return kept


def _parent_of(head: Release, releases: Sequence[Release]) -> Release | None:
    """What a rollback publishes again: preferably from the same channel."""
    found = [each for each in releases if f"{each.info.name}@{each.info.version}" == head.info.parent]
    return max(found, key=lambda each: (each.info.channel == head.info.channel, each.info.counter), default=None)


# --- the whole --------------------------------------------------------------------------------------------------------------


def prune(
    folder: Path,
    policy: Policy,
    *,
    is_dry_run: bool = False,
    role_keys: Sequence[str] = (),
    now: datetime | None = None,
) -> PruneReport:
    """Remove old releases, and delete the files that nothing names.

    Args:
        folder: of the repository.
        policy: what stays.
        is_dry_run: say it only.
        role_keys: private keys to sign the metadata with, beside those in the keys folder.
        now: the time, UTC.

    Raises:
        RepositoryError: ``repository.damaged`` when a release that stays cannot be read: nothing is deleted then.
        UsageError: ``repository.no_key``; the removal is kept, and a later run deletes the files.
    """
    store, moment = Store.open(folder), whole_second(now)
    with store.locked():
        store.give(role_keys)
        bench = Workbench.open(store, now=moment)
        releases = all_releases(bench)
        has_deltas = any(release.info.deltas for release in releases)
        blobs_of = {release.manifest_path: _blobs(folder, release) for release in releases} if has_deltas else {}
        kept = choose_kept(releases, policy, blobs_of=blobs_of, now=moment)
        doomed = tuple(release for release in releases if release.manifest_path not in kept)
        waiting: tuple[Waiting, ...] = ()
        if doomed and not is_dry_run:
            waiting = _remove(bench, doomed)
        chain = store.chain()
        rest = all_releases(Workbench(store, chain, moment, store.pending()))
        if is_dry_run:
            rest = tuple(release for release in rest if release not in doomed)
        files = _Files(store, chain, rest, doomed, moment).superfluous()
        if not is_dry_run:
            _delete(folder, files)
    found = tuple(PrunedFile(path=str(path.relative_to(folder)), size_bytes=size) for path, size in sorted(files.items()))
    return PruneReport(
        removed=doomed,
        kept=tuple(_kept(release, kept) for release in releases if release.manifest_path in kept),
        files=found,
        size_bytes=sum(file.size_bytes for file in found),
        is_dry_run=is_dry_run,
        waiting=waiting,
    )


def _blobs(folder: Path, release: Release) -> frozenset[str]:
    """The blobs of a release; none where its manifest is damaged: then no delta of another is kept for it."""
    try:
        manifest, _ = load_manifest(folder, release)
    except RepositoryError:
        return frozenset()
    return frozenset(ref.digest for ref in manifest.blobs)


def _kept(release: Release, kept: Mapping[str, str]) -> Kept:
    info = release.info
    return Kept(
        release=f"{info.name}@{info.version}",
        channel=info.channel,
        counter=info.counter,
        reason=kept[release.manifest_path],
    )


def _remove(bench: Workbench, doomed: Sequence[Release]) -> tuple[Waiting, ...]:
    """Take releases out of the roles that list them; who they were goes into the audit log."""
    is_changed = False
    for role in ("targets", *delegated_roles(bench.look("targets") or bench.chain.targets)):
        visible = bench.look(role)
        listed = [release.manifest_path for release in doomed if visible and release.manifest_path in visible.targets]
        if not listed:
            continue
        targets = bench.targets(role)
        for path in listed:
            del targets.targets[path]
        is_changed = True
    if not is_changed:  # an earlier removal of the same releases waits for signatures, and keeps those that it has
        return tuple(bench.waiting_for(role) for role in bench.pending)
    bench.sign(bench.store.find_signers(bench.wanted()))
    details = {f"{each.info.name}@{each.info.version}": each.manifest_digest for each in doomed}
    entry = audit.append(bench.store.folder, PRUNE_ACTION, f"{len(doomed)} releases", now=bench.now, details=details)
    return bench.settle(entry).waiting


# --- which files are superfluous --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    """The repository's files, and what names them."""

    store: Store
    chain: Chain
    releases: tuple[Release, ...]
    doomed: tuple[Release, ...]
    now: datetime

    def superfluous(self) -> dict[Path, int]:
        """Files that can go, with their sizes."""
        named = self._named(self.releases)
        leaving = self._named(self.doomed, is_damaged_allowed=True) - named
        found: dict[Path, int] = {}
        for path in self._known():
            status = path.stat()
            age = self.now - datetime.fromtimestamp(status.st_mtime, UTC)
            if path not in named and (path in leaving or age >= GRACE):
                found[path] = status.st_size
        found |= {path: path.stat().st_size for path in self._old_metadata()}
        return found

    def _named(self, releases: Sequence[Release], *, is_damaged_allowed: bool = False) -> set[Path]:
        """Manifests, blobs and signatures of releases, and the deny-lists."""
        folder = self.store.folder
        named = set(self._recall_files())
        for release in releases:
            named |= {manifest_file(folder, release), envelope_file(folder, release.manifest_digest)}
            named |= {folder / blob_name(delta.digest) for delta in release.info.deltas}
            try:
                manifest, _ = load_manifest(folder, release)
            except RepositoryError:
                if not is_damaged_allowed:
                    raise
                continue
            named |= {folder / blob_name(ref.digest) for ref in manifest.blobs}
        return named

    def _recall_files(self) -> Iterator[Path]:
        pending: list[Metadata[Targets]] = [item for item in self.store.pending().values() if isinstance(item.signed, Targets)]
        for targets in (self.chain.targets, *(item.signed for item in pending)):
            target = targets.targets.get(RECALLS_PATH)
            if target is not None:
                yield self.store.folder / "targets" / f"{target.hashes['sha256']}.{RECALLS_PATH}"

    def _known(self) -> Iterator[Path]:
        """Files that this package writes under their digests, and temporary ones; whatever else lies around stays."""
        folder = self.store.folder
        for name, pattern in _HEX_FILES.items():
            for path in (folder / name).rglob("*"):
                if pattern.match(path.name) and path.is_file() and not path.is_symlink():
                    yield path
        for place in (folder, *(folder / name for name in (*SERVED, SIGNATURES_FOLDER, "pending", "publishers"))):
            found = place.glob(f"{TEMPORARY_PREFIX}*") if place == folder else place.rglob(f"{TEMPORARY_PREFIX}*")
            yield from (path for path in found if path.is_file() and not path.is_symlink())

    def _old_metadata(self) -> Iterator[Path]:
        """Versions that were replaced so long ago that no timestamp that was valid since leads to them."""
        versions: dict[str, dict[int, Path]] = {}
        for path in self.store.metadata.iterdir():
            match = _METADATA.match(path.name)
            if match and match[2] != "root" and not path.is_symlink():
                versions.setdefault(match[2], {})[int(match[1])] = path
        life = timedelta(days=self.store.config.expiry.days("timestamp"))
        limit = self.now - max(life, self.chain.timestamp.expires - self.now) - GRACE
        for role, paths in versions.items():
            ordered = sorted(paths)
            for number, following in itertools.pairwise(ordered):
                replaced = datetime.fromtimestamp(paths[following].stat().st_mtime, UTC)
                if number != self._visible(role) and replaced <= limit:
                    yield paths[number]

    def _visible(self, role: str) -> int:
        meta = self.chain.snapshot.meta.get(f"{role}.json")
        return self.chain.snapshot.version if role == "snapshot" else meta.version if meta else 0


def _delete(folder: Path, files: Mapping[Path, int]) -> None:
    for path in files:
        path.unlink(missing_ok=True)
    for place in sorted((folder / "targets" / "models").rglob("*"), reverse=True):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
