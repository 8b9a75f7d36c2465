"""The update repository on disk: TUF metadata, release manifests and content-addressed blobs; any HTTP server can serve it.

    metadata/   1.root.json  N.targets.json  N.snapshot.json  timestamp.json
    targets/    models/<name>/<version>/<sha256>.manifest.json
    blobs/      sha256/<hex>
    publishers/ *.pub           whose bundles may be published
    repository.json             where the keys are; never served

The keys lie elsewhere: root, targets, snapshot and timestamp, Ed25519, mode 0600. Everything is written durably, in an order
that keeps the repository servable at every moment: blobs, manifest, targets, snapshot, and last the timestamp, which makes it
all visible at once. A version number is never used twice. Metadata is extended only where our own root's keys signed it; the
root's public key lies with the private keys, since what lies in the served folders may have been exchanged, the root too.

    >>> init_repository(Path("repository"), keys_dir=Path("keys"))             # doctest: +SKIP
    >>> publish(Path("repository"), Path("fashion-1.0.0.edgekit")).info.counter  # doctest: +SKIP
    1
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from tuf.api.exceptions import RepositoryError as TufRepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from edgekit.bundle.layout import blob_name
from edgekit.bundle.reader import Bundle, parse_manifest, verify_bundle
from edgekit.durable import make_folder, write_durably
from edgekit.errors import ArtifactError, RepositoryError, TrustError, UsageError
from edgekit.schema.base import SCHEMA_VERSION, Record, decode_json, encode_json
from edgekit.schema.digest import digest_bytes, digest_file, hex_of
from edgekit.schema.release import Release, ReleaseInfo
from edgekit.trust.keys import PublicKey, load_public_key, load_public_keys, save_public_key
from edgekit.trust.signer import Signer, generate_signer, load_signer, save_signer

Role = Literal["root", "targets", "snapshot", "timestamp"]
ROLES: tuple[Role, ...] = ("root", "targets", "snapshot", "timestamp")
CONFIG_FILE = "repository.json"
PRODUCTION = "production"
_CHANNEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?\Z")
_MANIFEST_PATH = re.compile(r"models/[^/]+/[^/]+/manifest\.json\Z")
_SERIALIZER = JSONSerializer(compact=True)
S = TypeVar("S", Root, Targets, Snapshot, Timestamp)


class Expiry(Record, frozen=True, kw_only=True):
    """For how long each role's signature holds, days."""

    root: float = 365.0
    targets: float = 90.0
    snapshot: float = 7.0
    timestamp: float = 1.0


class RepositoryConfig(Record, frozen=True, kw_only=True):
    """What commands must know of a repository between their runs."""

    keys_dir: str
    """Relative to the repository's folder."""
    expiry: Expiry
    schema_version: int = SCHEMA_VERSION


class RoleStatus(Record, frozen=True, kw_only=True):
    """One role: its version, when it expires, and its keys."""

    role: str
    version: int
    expires_at: datetime
    is_expired: bool
    keyids: tuple[str, ...]
    threshold: int


class RepositoryStatus(Record, frozen=True, kw_only=True):
    """What ``edgekit repo status`` shows."""

    folder: str
    keys_dir: str
    roles: tuple[RoleStatus, ...]
    releases: tuple[Release, ...]
    publishers: tuple[str, ...]
    """Key ids whose bundles may be published."""


@dataclass(frozen=True)
class _Chain:
    """The metadata that the current timestamp makes visible, verified against our root."""

    root: Root
    targets: Targets
    snapshot: Snapshot
    timestamp: Timestamp


def _now(now: datetime | None) -> datetime:
    return (now or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)


class _Store:
    """One repository's folder, with its configuration."""

    def __init__(self, folder: Path, config: RepositoryConfig) -> None:
        self.folder, self.config = folder, config
        self.keys_dir = Path(os.path.normpath(folder / config.keys_dir))

    @classmethod
    def open(cls, folder: Path) -> _Store:
        path = folder / CONFIG_FILE
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RepositoryError(
                "repository.not_found", f"{folder}: no repository here.", hint=f'Create one: "edgekit repo init {folder}".'
            ) from error
        return cls(folder, decode_json(data, RepositoryConfig, name=str(path)))

    @property
    def metadata(self) -> Path:
        return self.folder / "metadata"

    @property
    def publishers(self) -> Path:
        return self.folder / "publishers"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time; the lock ends with the process, however that ends."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RepositoryError(
                    "repository.locked", f"{self.folder}: another command is writing here.", hint="Wait for it to end."
                ) from error
            yield
        finally:
            os.close(descriptor)

    def signers(self, role: Role, root: Root | None = None) -> list[Signer]:
        """The role's private keys on this machine, those that the root lists."""
        paths = sorted(self.keys_dir.glob(f"{role}*.pem"))
        if not paths:
            raise UsageError(
                "repository.no_key",
                f"{self.keys_dir}: no key for the role {role} ({role}.pem).",
                hint="Run this where the repository's keys are, or put the key back.",
            )
        signers = [load_signer(path) for path in paths]
        if root is None:
            return signers
        known = [signer for signer in signers if signer.keyid in root.roles[role].keyids]
        if not known:
            raise TrustError(
                "repository.foreign_key", f"{self.keys_dir}: the key of the role {role} is not the one that the root lists."
            )
        return known

    def root_keys(self) -> tuple[PublicKey, ...]:
        """The root's public keys as they lie with the private ones, out of the reach of whoever serves the repository."""
        found = [load_public_key(path) for path in sorted(self.keys_dir.glob("root*.pub"))]
        return tuple(found) or tuple(load_signer(path).public_key for path in sorted(self.keys_dir.glob("root*.pem")))

    def chain(self, *, is_to_be_extended: bool = False) -> _Chain:
        """The current metadata.

        Args:
            is_to_be_extended: something will be signed on top: then the root's public key must be here.

        Raises:
            RepositoryError: ``repository.damaged`` when a file is missing or does not parse.
            TrustError: ``repository.foreign_metadata`` when our keys did not sign it.
            UsageError: ``repository.no_key``.
        """
        name = f"{_highest(self.metadata, 'root')}.root.json"
        root = self._load(Root, name, None)
        self._check_root(self.metadata / name, is_needed=is_to_be_extended)
        timestamp = self._load(Timestamp, "timestamp.json", root)
        snapshot = self._load(Snapshot, f"{timestamp.snapshot_meta.version}.snapshot.json", root)
        targets = self._load(Targets, f"{snapshot.meta['targets.json'].version}.targets.json", root)
        return _Chain(root=root, targets=targets, snapshot=snapshot, timestamp=timestamp)

    def _check_root(self, path: Path, *, is_needed: bool) -> None:
        """The root vouches for everything else, so it must not vouch for itself alone: one of our own keys signed it."""
        keys = self.root_keys()
        if not keys and is_needed:
            raise UsageError(
                "repository.no_key",
                f"{self.keys_dir}: no public key of the role root (root.pub).",
                hint="Put root.pub beside the other keys; the private root key may stay away.",
            )
        metadata: Metadata[Root] = Metadata[Root].from_bytes(path.read_bytes())
        signed = metadata.signed_bytes
        signatures = [bytes.fromhex(signature.signature) for signature in metadata.signatures.values()]
        if keys and not any(key.is_valid(signature, signed) for key in keys for signature in signatures):
            raise _foreign(path)

    def _load(self, kind: type[S], name: str, root: Root | None) -> S:
        path = self.metadata / name
        try:
            metadata: Metadata[S] = Metadata[S].from_bytes(path.read_bytes())
        except (OSError, TufRepositoryError) as error:
            raise RepositoryError(
                "repository.damaged", f"{path}: cannot be read: {error}.", hint="Restore the repository from its backup."
            ) from error
        if not isinstance(metadata.signed, kind):
            raise RepositoryError("repository.damaged", f"{path}: holds {metadata.signed.type}, not {kind.type}.")
        signed: S = metadata.signed
        try:
            (root or signed).verify_delegate(kind.type, metadata.signed_bytes, metadata.signatures)  # type: ignore[union-attr]
        except (TufRepositoryError, ValueError) as error:
            raise _foreign(path) from error
        return signed

    def write(self, signed: Root | Targets | Snapshot | Timestamp, name: str, signers: Sequence[Signer]) -> bytes:
        """Sign and write one role's file."""
        metadata: Metadata[Any] = Metadata(signed)
        for signer in signers:
            metadata.sign(signer.tuf_signer(), append=True)
        data: bytes = metadata.to_bytes(_SERIALIZER)
        write_durably(self.metadata / name, [data])
        return data

    def expires(self, role: Role, now: datetime) -> datetime:
        return now + timedelta(days=getattr(self.config.expiry, role))

    def commit(self, chain: _Chain, *, now: datetime, is_targets_new: bool) -> None:
        """Make changed targets visible: targets, snapshot, timestamp, in this order."""
        root = chain.root
        keys = {role: self.signers(role, root) for role in ROLES if role != "root" and (is_targets_new or role != "targets")}
        if is_targets_new:
            chain.targets.version = 1 + max(chain.targets.version, _highest(self.metadata, "targets"))
            chain.targets.expires = self.expires("targets", now)
            data = self.write(chain.targets, f"{chain.targets.version}.targets.json", keys["targets"])
            chain.snapshot.meta["targets.json"] = MetaFile.from_data(chain.targets.version, data, ["sha256"])
        chain.snapshot.version = 1 + max(chain.snapshot.version, _highest(self.metadata, "snapshot"))
        chain.snapshot.expires = self.expires("snapshot", now)
        data = self.write(chain.snapshot, f"{chain.snapshot.version}.snapshot.json", keys["snapshot"])
        chain.timestamp.snapshot_meta = MetaFile.from_data(chain.snapshot.version, data, ["sha256"])
        chain.timestamp.version += 1
        chain.timestamp.expires = self.expires("timestamp", now)
        self.write(chain.timestamp, "timestamp.json", keys["timestamp"])


def _foreign(path: Path) -> TrustError:
    return TrustError(
        "repository.foreign_metadata",
        f"{path}: not signed by this repository's keys; it was exchanged.",
        hint="Restore the repository from its backup; nothing was signed on top of it.",
    )


def _highest(folder: Path, role: str) -> int:
    """The highest version of a role that lies on disk, whether it is visible or not."""
    versions = [path.name.split(".", 1)[0] for path in folder.glob(f"*.{role}.json")]
    return max((int(version) for version in versions if version.isascii() and version.isdigit()), default=0)


def init_repository(
    folder: Path, *, keys_dir: Path | None = None, expiry: Expiry | None = None, now: datetime | None = None
) -> RepositoryStatus:
    """Create a repository and its keys; goes on where an interrupted call stopped.

    Args:
        folder: of the repository; made where missing.
        keys_dir: for the private keys; None is ``keys`` beside the folder.
        expiry: of the roles.
        now: the time, UTC.

    Raises:
        UsageError: ``repository.exists``, ``repository.keys_inside``, or an error of the keys that are there already.
    """
    if (folder / CONFIG_FILE).exists():
        raise UsageError("repository.exists", f"{folder}: a repository is here already.", hint="Give another folder.")
    keys = keys_dir or folder.absolute().parent / "keys"
    served = [folder.absolute() / name for name in ("metadata", "targets", "blobs")]
    if any(keys.absolute().is_relative_to(path) for path in served):
        raise UsageError("repository.keys_inside", f"{keys}: this folder is served to everybody; keys must lie elsewhere.")
    relative = os.path.relpath(keys.absolute(), folder.absolute())
    store = _Store(folder, RepositoryConfig(keys_dir=relative, expiry=expiry or Expiry()))
    for path in (*served, folder.absolute() / "blobs" / "sha256", folder.absolute() / "publishers"):
        make_folder(path)
    make_folder(keys, mode=0o700)
    with store.locked():
        signers = {role: _role_signers(keys, role) for role in ROLES}
        for number, signer in enumerate(signers["root"], 1):
            name = "root.pub" if number == 1 else f"root-{number}.pub"
            write_durably(keys / name, [signer.public_key.to_pem().encode()])
        _write_first_metadata(store, signers, _now(now))
        write_durably(folder / CONFIG_FILE, [encode_json(store.config)])
    return repository_status(folder, now=now)


def _role_signers(keys: Path, role: Role) -> list[Signer]:
    """The role's keys that are there already (an interrupted init), else a new one."""
    found = [load_signer(path) for path in sorted(keys.glob(f"{role}*.pem"))]
    if found:
        return found
    signer = generate_signer()
    save_signer(signer, keys / f"{role}.pem")
    return [signer]


def _write_first_metadata(store: _Store, keys: dict[Role, list[Signer]], now: datetime) -> None:
    root = Root(version=1, expires=store.expires("root", now), consistent_snapshot=True)
    for role in ROLES:
        for signer in keys[role]:
            root.add_key(signer.tuf_signer().public_key, role)
    targets = Targets(version=1, expires=store.expires("targets", now))
    snapshot = Snapshot(version=1, expires=store.expires("snapshot", now))
    timestamp = Timestamp(version=1, expires=store.expires("timestamp", now))
    store.write(root, "1.root.json", keys["root"])
    data = store.write(targets, "1.targets.json", keys["targets"])
    snapshot.meta["targets.json"] = MetaFile.from_data(1, data, ["sha256"])
    data = store.write(snapshot, "1.snapshot.json", keys["snapshot"])
    timestamp.snapshot_meta = MetaFile.from_data(1, data, ["sha256"])
    store.write(timestamp, "timestamp.json", keys["timestamp"])


def add_publisher(folder: Path, path: Path) -> PublicKey:
    """Trust a publisher: bundles that this key signed may be published from now on.

    Raises:
        RepositoryError: ``repository.not_found``.
        UsageError: ``key.not_found``, ``key.private`` or ``key.malformed``.
    """
    store = _Store.open(folder)
    key = load_public_key(path)
    if key not in load_public_keys(store.publishers):
        make_folder(store.publishers)
        save_public_key(key, store.publishers / f"{key.keyid[:16]}.pub")
    return key


def publish(
    folder: Path,
    bundle_path: Path,
    *,
    channel: str = PRODUCTION,
    keys: Sequence[PublicKey] = (),
    is_again: bool = False,
    notes: str = "",
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
        now: the time, UTC.

    Returns:
        The release; the existing one when the same manifest is on the channel already and ``is_again`` is not set.

    Raises:
        TrustError: the bundle was refused (see ``verify_bundle``), or ``repository.foreign_metadata``.
        RepositoryError: ``repository.version_exists``, ``repository.locked``, ``repository.not_found``, ``repository.damaged``.
        UsageError: ``repository.channel`` or ``repository.no_publisher``.
    """
    if not _CHANNEL.match(channel):
        raise UsageError("repository.channel", f"--channel {channel!r}: not a channel.", hint="For example: production.")
    store = _Store.open(folder)
    trusted = (*load_public_keys(store.publishers), *keys)
    if not trusted:
        raise UsageError(
            "repository.no_publisher",
            f"{folder}: no publisher is trusted here, so no bundle can be published.",
            hint=f'Trust one: "edgekit repo trust {folder} PUBKEY", or give --key PUBKEY.',
        )
    bundle = verify_bundle(bundle_path, trusted)
    moment = _now(now)
    with store.locked():
        chain = store.chain(is_to_be_extended=True)
        existing = _existing(chain.targets, bundle, channel, is_again=is_again)
        if existing is not None:
            return existing
        release = _new_release(chain.targets, bundle, channel, notes, moment)
        _store_blobs(store, bundle)
        _add_target(store, chain.targets, bundle, release)
        store.commit(chain, now=moment, is_targets_new=True)
    return release


def _existing(targets: Targets, bundle: Bundle, channel: str, *, is_again: bool) -> Release | None:
    manifest = bundle.manifest
    found = next((release for release in releases_of(targets) if release.manifest_path == _path(bundle)), None)
    if found is None:
        return None
    what = f"{manifest.name}@{manifest.version}"
    if found.manifest_digest != bundle.manifest_digest:
        raise RepositoryError(
            "repository.version_exists",
            f"{what}: was published before with another content.",
            hint="A version never changes; pack it under a new --version.",
        )
    if is_again:
        return None
    if found.info.channel != channel:
        raise RepositoryError(
            "repository.version_exists",
            f"{what}: is on the channel {found.info.channel}, not on {channel}.",
            hint="--again moves it, under a new release counter.",
        )
    return found


def _path(bundle: Bundle) -> str:
    return f"models/{bundle.manifest.name}/{bundle.manifest.version}/manifest.json"


def _new_release(targets: Targets, bundle: Bundle, channel: str, notes: str, now: datetime) -> Release:
    manifest = bundle.manifest
    counters = [release.info.counter for release in releases_of(targets) if release.info.name == manifest.name]
    info = ReleaseInfo(
        name=manifest.name,
        version=manifest.version,
        channel=channel,
        counter=1 + max(counters, default=0),
        published_at=now,
        installed_bytes=sum(ref.size_bytes for ref in manifest.blobs),
        runtimes=tuple(dict.fromkeys(variant.requires.runtime for variant in manifest.variants)),
        notes=notes,
    )
    return Release(
        info=info,
        manifest_path=_path(bundle),
        manifest_digest=bundle.manifest_digest,
        manifest_size_bytes=len(bundle.manifest_bytes),
    )


def _store_blobs(store: _Store, bundle: Bundle) -> None:
    for ref in bundle.manifest.blobs:
        path = store.folder / blob_name(ref.digest)
        if path.is_file() and path.stat().st_size == ref.size_bytes and digest_file(path) == ref.digest:
            continue
        write_durably(path, bundle.chunks(ref.digest))


def _add_target(store: _Store, targets: Targets, bundle: Bundle, release: Release) -> None:
    digest = hex_of(release.manifest_digest)
    path = store.folder / "targets" / release.manifest_path
    write_durably(path.with_name(f"{digest}.{path.name}"), [bundle.manifest_bytes])
    targets.targets[release.manifest_path] = TargetFile(
        length=release.manifest_size_bytes,
        hashes={"sha256": digest},
        path=release.manifest_path,
        unrecognized_fields={"custom": msgspec.to_builtins(release.info)},
    )


def releases_of(targets: Targets) -> tuple[Release, ...]:
    """The releases that targets metadata lists, by model and counter.

    Raises:
        RepositoryError: ``repository.damaged`` when one cannot be read.
    """
    found = []
    for path, target in targets.targets.items():
        if not _MANIFEST_PATH.match(path):
            continue
        record: dict[str, Any] = {
            "info": target.custom,
            "manifest_path": path,
            "manifest_digest": f"sha256:{target.hashes.get('sha256')}",
            "manifest_size_bytes": target.length,
        }
        try:
            found.append(msgspec.convert(record, Release))
        except msgspec.ValidationError as error:
            raise RepositoryError(
                "repository.damaged", f"{path}: this release cannot be read: {error}.", hint="Use the edgekit that wrote it."
            ) from error
    return tuple(sorted(found, key=lambda release: (release.info.name, release.info.counter)))


def refresh_repository(folder: Path, *, is_targets_too: bool = False, now: datetime | None = None) -> RepositoryStatus:
    """Sign timestamp and snapshot again, so that devices go on to trust the repository.

    Args:
        folder: of the repository.
        is_targets_too: also the targets, whose signature holds for longer.
        now: the time, UTC.

    Raises:
        RepositoryError, TrustError, UsageError: as :func:`publish`.
    """
    store = _Store.open(folder)
    with store.locked():
        store.commit(store.chain(is_to_be_extended=True), now=_now(now), is_targets_new=is_targets_too)
    return repository_status(folder, now=now)


def repository_status(folder: Path, *, now: datetime | None = None) -> RepositoryStatus:
    """What the repository offers and when its signatures expire; needs no private key.

    Raises:
        RepositoryError, TrustError: as :func:`publish`.
    """
    store = _Store.open(folder)
    chain, moment = store.chain(), _now(now)
    roles = tuple(
        RoleStatus(
            role=role,
            version=getattr(chain, role).version,
            expires_at=getattr(chain, role).expires,
            is_expired=getattr(chain, role).is_expired(moment),
            keyids=tuple(chain.root.roles[role].keyids),
            threshold=chain.root.roles[role].threshold,
        )
        for role in ROLES
    )
    return RepositoryStatus(
        folder=str(folder),
        keys_dir=str(store.keys_dir),
        roles=roles,
        releases=releases_of(chain.targets),
        publishers=tuple(key.keyid for key in load_public_keys(store.publishers)),
    )


def check_repository(folder: Path) -> tuple[str, ...]:
    """What is wrong with the files that the metadata names: missing or changed manifests and blobs. Empty when all is well.

    Raises:
        RepositoryError, TrustError: as :func:`publish`.
    """
    store = _Store.open(folder)
    faults = []
    for release in releases_of(store.chain().targets):
        path = folder / "targets" / release.manifest_path
        path = path.with_name(f"{hex_of(release.manifest_digest)}.{path.name}")
        try:
            data = path.read_bytes()
            manifest = parse_manifest(data, name=str(path))
        except (OSError, ArtifactError) as error:
            faults.append(f"{path}: {error}")
            continue
        if digest_bytes(data) != release.manifest_digest:
            faults.append(f"{path}: changed after it was published")
        for ref in manifest.blobs:
            blob = folder / blob_name(ref.digest)
            if not blob.is_file():
                faults.append(f"{blob}: missing, {release.info.name}@{release.info.version} needs it")
            elif digest_file(blob) != ref.digest:
                faults.append(f"{blob}: damaged, {release.info.name}@{release.info.version} needs it")
    return tuple(faults)
