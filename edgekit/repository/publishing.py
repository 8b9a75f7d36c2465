"""Releases: publish a bundle, go back, recall, and check what is published.

>>> publish(Path("repository"), Path("fashion-1.0.0.edgekit")).info.counter  # doctest: +SKIP
1
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

import msgspec
from tuf.api.metadata import TargetFile, Targets  # type: ignore[attr-defined]

from edgekit.bundle.layout import blob_name
from edgekit.bundle.provenance.check import check_evidence
from edgekit.bundle.reader import Bundle, parse_manifest, verify_bundle
from edgekit.durable import make_folder, write_durably
from edgekit.errors import ArtifactError, RepositoryError, TrustError, UsageError
from edgekit.repository import audit
from edgekit.repository.changes import Settled, Workbench
from edgekit.repository.listing import (
    head_of,
    manifest_path,
    recalls_of,
    release_of,
    releases_of,
    role_for,
    target_of,
)
from edgekit.repository.signatures import keep_envelope
from edgekit.repository.store import Chain, Store, whole_second
from edgekit.schema.base import encode_json
from edgekit.schema.digest import digest_bytes, digest_file, hex_of
from edgekit.schema.manifest import Manifest
from edgekit.schema.release import RECALLS_PATH, DeltaRef, Fallback, Recall, RecallList, Release, ReleaseInfo
from edgekit.trust.keys import PublicKey, load_public_key, load_public_keys, save_public_key

PRODUCTION = "production"
PRUNE_ACTION = "prune"
"""In the audit log: its details name each removed ``name@version`` and its manifest."""
_CHANNEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


class DeltaMaker(Protocol):
    """Makes and stores the deltas of a release whose blobs are stored."""

    def __call__(self, folder: Path, manifest: Manifest, releases: Sequence[Release], *, channel: str) -> tuple[DeltaRef, ...]:
        """The deltas, by what they begin with and lead to."""


def add_publisher(folder: Path, path: Path) -> PublicKey:
    """Trust a publisher: bundles that this key signed may be published from now on.

    Raises:
        RepositoryError: ``repository.not_found``.
        UsageError: ``key.not_found``, ``key.private`` or ``key.malformed``.
    """
    store = Store.open(folder)
    key = load_public_key(path)
    if key not in load_public_keys(store.publishers):
        with store.locked():
            Workbench.open(store, now=whole_second(None))
            make_folder(store.publishers)
            save_public_key(key, store.publishers / f"{key.keyid[:16]}.pub")
            audit.append(folder, "trust publisher", key.keyid, now=whole_second(None))
    return key


def publish(
    folder: Path,
    bundle_path: Path,
    *,
    channel: str = PRODUCTION,
    keys: Sequence[PublicKey] = (),
    is_again: bool = False,
    notes: str = "",
    allows_contract_change: bool = False,
    valid_until: datetime | None = None,
    fallback: Fallback = "report",
    delta_maker: DeltaMaker | None = None,
    role_keys: Sequence[str] = (),
    now: datetime | None = None,
) -> Release:
    """Verify a bundle and publish it as a release.

    Args:
        folder: of the repository.
        bundle_path: the bundle.
        channel: where devices look for it.
        keys: publisher keys to trust for this once, beside those of the repository.
        is_again: publish the same manifest again under a higher counter, which is how to roll devices back.
        notes: for people.
        allows_contract_change: clients are ready for other inputs, outputs or labels; devices refuse such a release else.
        valid_until: from then on devices do what ``fallback`` says.
        fallback: what devices do then.
        delta_maker: makes ways from earlier models to this release's (``edgekit.repository.deltas.make_deltas``); None: none.
        role_keys: private keys to sign the metadata with, beside those in the keys folder.
        now: the time, UTC.

    Returns:
        The release; the existing one when the same manifest is on the channel already and ``is_again`` is not set. Where keys
        are elsewhere it is not visible yet: ``repository_status`` says whose signatures are waited for.

    Raises:
        TrustError: the bundle was refused (see ``verify_bundle`` and ``check_evidence``), or ``repository.foreign_metadata``.
        RepositoryError: ``repository.version_exists``, ``repository.locked``, ``repository.not_found``, ``repository.damaged``,
            ``repository.recalled``.
        UsageError: ``repository.channel``, ``repository.gated`` or ``repository.no_publisher``.
    """
    _check_channel(channel)
    store = Store.open(folder)
    trusted = (*load_public_keys(store.publishers), *keys)
    if not trusted:
        raise UsageError(
            "repository.no_publisher",
            f"{folder}: no publisher is trusted here, so no bundle can be published.",
            hint=f'Trust one: "edgekit repo trust {folder} PUBKEY", or give --key PUBKEY.',
        )
    if store.config.is_gated and channel != store.config.channels[0]:
        raise UsageError(
            "repository.gated",
            f"{channel}: is promoted to, not published to; releases enter on {store.config.channels[0]}.",
            hint=f'Publish with --channel {store.config.channels[0]}, then "edgekit repo promote".',
        )
    bundle = verify_bundle(bundle_path, trusted, is_hashed=False)
    check_evidence(bundle)
    moment = whole_second(now)
    with store.locked():
        store.give(role_keys)
        bench = Workbench.open(store, now=moment)
        existing = _existing(bench, bundle.manifest, bundle.manifest_digest, channel, is_again=is_again)
        if existing is not None:
            keep_envelope(store, bundle)  # it may bring a further publisher's signature
            return existing
        check_recalls(bench, bundle.manifest, bundle.manifest_digest)
        store_blobs(store, bundle)
        keep_envelope(store, bundle)
        info = new_info(bench, bundle.manifest, channel, now=moment)
        info = msgspec.structs.replace(
            info, notes=notes, allows_contract_change=allows_contract_change, valid_until=valid_until, fallback=fallback
        )
        if delta_maker is not None:
            deltas = delta_maker(folder, bundle.manifest, all_releases(bench), channel=channel)
            info = msgspec.structs.replace(info, deltas=deltas)
        return add_release(bench, info, bundle.manifest_bytes, action="publish")


def _check_channel(channel: str) -> None:
    if not _CHANNEL.match(channel):
        raise UsageError("repository.channel", f"--channel {channel!r}: not a channel.", hint="For example: production.")


def all_releases(bench: Workbench) -> tuple[Release, ...]:
    """What is visible, and what waits for signatures."""
    found = {release.manifest_path: release for release in releases_of(bench.chain)}
    for metadata in bench.pending.values():
        if isinstance(metadata.signed, Targets):
            found |= {
                path: release_of(path, target) for path, target in metadata.signed.targets.items() if path != RECALLS_PATH
            }
    return tuple(sorted(found.values(), key=lambda release: (release.info.name, release.info.counter)))


def _existing(bench: Workbench, manifest: Manifest, digest: str, channel: str, *, is_again: bool) -> Release | None:
    what = f"{manifest.name}@{manifest.version}"
    same = [r for r in all_releases(bench) if (r.info.name, r.info.version) == (manifest.name, manifest.version)]
    for release in same:
        if release.manifest_digest != digest:
            raise _other_content(what)
    if _pruned(bench.store.folder).get(what, digest) != digest:
        raise _other_content(what)
    if is_again:
        return None
    return next((release for release in same if release.info.channel == channel), None)


def _other_content(what: str) -> RepositoryError:
    return RepositoryError(
        "repository.version_exists",
        f"{what}: was published before with another content.",
        hint="A version never changes; pack it under a new --version.",
    )


def _pruned(folder: Path) -> dict[str, str]:
    """The manifests of releases that were removed, by ``name@version``, as the audit log has them."""
    found: dict[str, str] = {}
    for entry in audit.read_log(folder):
        if entry.action == PRUNE_ACTION:
            found |= {what: digest for what, digest in entry.details.items() if "@" in what}
    return found


def check_recalls(bench: Workbench, manifest: Manifest, digest: str) -> None:
    """A recalled model is not published again under another name.

    Raises:
        RepositoryError: ``repository.recalled``.
    """
    visible = bench.look("targets")
    recalled = {recall.digest: recall for recall in recalls_of(visible).recalls} if visible else {}
    for found in (digest, *(variant.model for variant in manifest.variants)):
        if found in recalled:
            raise RepositoryError(
                "repository.recalled",
                f"{manifest.name}@{manifest.version}: {found} was recalled: {recalled[found].reason}.",
                hint='If the recall was a mistake: "edgekit repo recall DIR DIGEST --lift".',
            )


def new_info(bench: Workbench, manifest: Manifest, channel: str, *, now: datetime) -> ReleaseInfo:
    """The description of a new release: the next counter of its model, and what it replaces on the channel."""
    releases = all_releases(bench)
    counters = [release.info.counter for release in releases if release.info.name == manifest.name]
    head = head_of(releases, manifest.name, channel)
    return ReleaseInfo(
        name=manifest.name,
        version=manifest.version,
        channel=channel,
        counter=1 + max(counters, default=0),
        published_at=now,
        installed_bytes=_installed_bytes(manifest),
        runtimes=tuple(dict.fromkeys(variant.requires.runtime for variant in manifest.variants)),
        parent=f"{head.info.name}@{head.info.version}" if head else "",
    )


def _installed_bytes(manifest: Manifest) -> int:
    """What the largest variant takes on a device."""
    size = {ref.digest: ref.sealed.size_bytes if ref.sealed else ref.size_bytes for ref in manifest.blobs}
    return max(size.get(variant.model, 0) + size.get(variant.golden, 0) for variant in manifest.variants)


def add_release(
    bench: Workbench, info: ReleaseInfo, manifest_bytes: bytes, *, action: str, details: dict[str, str] | None = None
) -> Release:
    """Write a release's manifest, list it in the role that signs it, write it down, and publish what has its signatures."""
    path = manifest_path(info.name, info.version, info.channel)
    release = Release(
        info=info,
        manifest_path=path,
        manifest_digest=digest_bytes(manifest_bytes),
        manifest_size_bytes=len(manifest_bytes),
    )
    place = bench.store.folder / "targets" / path
    write_durably(place.with_name(f"{hex_of(release.manifest_digest)}.{place.name}"), [manifest_bytes])
    visible = bench.look("targets") or bench.chain.targets
    targets = bench.targets(role_for(visible, path))
    targets.targets[path] = target_of(release)
    bench.sign(bench.store.find_signers(bench.wanted()))
    notes = {"channel": info.channel, "counter": str(info.counter), "manifest": release.manifest_digest}
    entry = audit.append(
        bench.store.folder, action, f"{info.name}@{info.version}", now=bench.now, details=notes | (details or {})
    )
    bench.settle(entry)
    return release


def store_blobs(store: Store, bundle: Bundle) -> None:
    """Copy a bundle's blobs into the repository; each is hashed on the way, and a damaged one leaves none of them.

    Raises:
        TrustError: ``bundle.digest_mismatch``.
    """
    written: list[Path] = []
    try:
        for ref in bundle.manifest.blobs:
            path = store.folder / blob_name(ref.digest)
            if path.is_file() and path.stat().st_size == ref.size_bytes and digest_file(path) == ref.digest:
                bundle.check(ref.digest)
                continue
            is_new = not path.exists()
            write_durably(path, bundle.chunks(ref.digest))
            written += [path] if is_new else []
    except TrustError:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def find_release(chain: Chain, name: str, version: str, channel: str = "") -> Release:
    """A release by name and version, the newest counter where it is on several channels.

    Raises:
        RepositoryError: ``repository.no_release`` naming what there is.
    """
    releases = releases_of(chain)
    found = [
        release
        for release in releases
        if (release.info.name, release.info.version) == (name, version) and channel in {"", release.info.channel}
    ]
    if not found:
        known = sorted({f"{r.info.name}@{r.info.version} ({r.info.channel})" for r in releases if r.info.name == name})
        where = f" on {channel}" if channel else ""
        raise RepositoryError(
            "repository.no_release",
            f"{name}@{version}: no such release{where}.",
            hint=f"There are: {', '.join(known)}." if known else f"No release of {name} was published.",
        )
    return max(found, key=lambda release: release.info.counter)


def manifest_file(folder: Path, release: Release) -> Path:
    """Where a release's manifest lies."""
    path = folder / "targets" / release.manifest_path
    return path.with_name(f"{hex_of(release.manifest_digest)}.{path.name}")


def load_manifest(folder: Path, release: Release) -> tuple[Manifest, bytes]:
    """A release's manifest and its bytes, compared with the signed digest.

    Raises:
        RepositoryError: ``repository.damaged``.
    """
    path = manifest_file(folder, release)
    try:
        data = path.read_bytes()
        manifest = parse_manifest(data, name=str(path))
    except (OSError, ArtifactError) as error:
        raise RepositoryError("repository.damaged", f"{path}: {error}.", hint="Publish the bundle again.") from error
    if digest_bytes(data) != release.manifest_digest:
        raise RepositoryError("repository.damaged", f"{path}: changed after it was published.", hint="Publish it again.")
    return manifest, data


def rollback(
    folder: Path,
    name: str,
    *,
    to: str = "",
    channel: str = PRODUCTION,
    reason: str = "",
    role_keys: Sequence[str] = (),
    now: datetime | None = None,
) -> Release:
    """Publish an earlier release of a channel again, under a new counter: devices go back to it by going forward.

    Args:
        folder: of the repository.
        name: of the model.
        to: the version; empty is what the present release of the channel replaced.
        channel: whose devices go back.
        reason: for the audit log and the release's notes.
        role_keys: private keys to sign the metadata with, beside those in the keys folder.
        now: the time, UTC.

    Raises:
        RepositoryError: ``repository.no_release``, ``repository.no_parent``, ``repository.damaged``, ``repository.recalled``.
    """
    store, moment = Store.open(folder), whole_second(now)
    with store.locked():
        store.give(role_keys)
        bench = Workbench.open(store, now=moment)
        head = head_of(releases_of(bench.chain), name, channel)
        version = to or _parent_version(head, name, channel)
        old = find_release(bench.chain, name, version)
        manifest, data = load_manifest(folder, old)
        check_recalls(bench, manifest, old.manifest_digest)
        info = new_info(bench, manifest, channel, now=moment)
        text = reason or f"rollback to {version}"
        info = msgspec.structs.replace(
            info,
            notes=text,
            allows_contract_change=head.info.allows_contract_change if head else False,  # the way there was allowed
            valid_until=old.info.valid_until,
            fallback=old.info.fallback,
            deltas=old.info.deltas,
        )
        return add_release(bench, info, data, action="rollback", details={"reason": reason})


def _parent_version(head: Release | None, name: str, channel: str) -> str:
    if head is None:
        raise RepositoryError("repository.no_release", f"{name}: no release on {channel}.", hint='See "edgekit repo status".')
    if not head.info.parent:
        raise RepositoryError(
            "repository.no_parent",
            f"{name}@{head.info.version}: replaced no release on {channel}, so there is nothing to go back to.",
            hint="Name one with --to VERSION.",
        )
    return head.info.parent.partition("@")[2]


def recall(
    folder: Path,
    digest: str,
    *,
    deadline: datetime,
    reason: str,
    fallback: Fallback = "previous",
    is_lifted: bool = False,
    role_keys: Sequence[str] = (),
    now: datetime | None = None,
) -> Settled:
    """Put a model file or a release on the signed deny-list, or take it off.

    Args:
        folder: of the repository.
        digest: ``sha256:...`` of a model blob or a manifest, or ``name@version`` for a release's manifest.
        deadline: from then on no device serves it; from now on none installs it.
        reason: for people.
        fallback: what devices that serve it do at the deadline.
        is_lifted: take it off the list.
        role_keys: private keys to sign the metadata with, beside those in the keys folder.
        now: the time, UTC.

    Raises:
        UsageError: ``recall.digest`` or ``recall.not_listed``.
        RepositoryError: ``repository.no_release``.
    """
    store, moment = Store.open(folder), whole_second(now)
    with store.locked():
        store.give(role_keys)
        bench = Workbench.open(store, now=moment)
        wanted = _recalled_digest(bench.chain, digest)
        targets = bench.targets("targets")
        kept = [item for item in recalls_of(targets).recalls if item.digest != wanted]
        if is_lifted and len(kept) == len(recalls_of(targets).recalls):
            raise UsageError("recall.not_listed", f"{digest}: is not on the deny-list.")
        if not is_lifted:
            kept.append(Recall(digest=wanted, deadline=deadline, reason=reason, fallback=fallback))
        _write_recalls(store, targets, RecallList(recalls=tuple(kept)))
        bench.sign(store.find_signers(bench.wanted()))
        details = {"reason": reason, "deadline": deadline.isoformat(), "fallback": fallback}
        entry = audit.append(folder, "lift recall" if is_lifted else "recall", wanted, now=moment, details=details)
        return bench.settle(entry)


def _recalled_digest(chain: Chain, text: str) -> str:
    if _DIGEST.match(text):
        return text
    name, at, version = text.partition("@")
    if not at:
        raise UsageError(
            "recall.digest",
            f"{text}: neither a digest nor NAME@VERSION.",
            hint="sha256: and 64 hex digits, of a model or manifest.",
        )
    return find_release(chain, name, version).manifest_digest


def _write_recalls(store: Store, targets: Targets, recalls: RecallList) -> None:
    """The list is a file of its own, and in the metadata: a device needs no further request for it."""
    data = encode_json(recalls)
    digest = digest_bytes(data)
    write_durably(store.folder / "targets" / f"{hex_of(digest)}.{RECALLS_PATH}", [data])
    targets.targets[RECALLS_PATH] = TargetFile(
        length=len(data),
        hashes={"sha256": hex_of(digest)},
        path=RECALLS_PATH,
        unrecognized_fields={"custom": msgspec.to_builtins(recalls)},
    )


def check_repository(folder: Path) -> tuple[str, ...]:
    """What is wrong with the files that the metadata names: manifests, blobs, the deny-list. Empty when all is well.

    Raises:
        RepositoryError, TrustError: as :meth:`Store.chain`.
    """
    store = Store.open(folder)
    faults: list[str] = []
    seen: set[str] = set()
    chain = store.chain()
    if (listed := chain.targets.targets.get(RECALLS_PATH)) is not None:
        path = folder / "targets" / f"{listed.hashes['sha256']}.{RECALLS_PATH}"
        if not path.is_file() or hex_of(digest_file(path)) != listed.hashes["sha256"]:
            faults.append(f"{path}: the deny-list is missing or damaged")
    for release in releases_of(chain):
        try:
            manifest, _ = load_manifest(folder, release)
        except RepositoryError as error:
            faults.append(error.message)
            continue
        wanted = [(ref.digest, ref.size_bytes) for ref in manifest.blobs]
        wanted += [(delta.digest, delta.size_bytes) for delta in release.info.deltas]
        for digest, _size in wanted:
            if digest in seen:
                continue
            seen.add(digest)
            blob = folder / blob_name(digest)
            if not blob.is_file():
                faults.append(f"{blob}: missing, {release.info.name}@{release.info.version} needs it")
            elif digest_file(blob) != digest:
                faults.append(f"{blob}: damaged, {release.info.name}@{release.info.version} needs it")
    return tuple(faults)
