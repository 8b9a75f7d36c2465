"""The update repository on disk: TUF metadata, release manifests and content-addressed blobs; any HTTP server can serve it.

    metadata/   N.root.json  N.targets.json  N.<role>.json  N.snapshot.json  timestamp.json
    targets/    models/<name>/<version>/<channel>/<sha256>.manifest.json  <sha256>.recalls.json
    blobs/      sha256/<hex>
    publishers/ *.pub           whose bundles may be published
    pending/    <role>.json     changes that still wait for signatures
    timestamp.version           the highest that a device may have seen
    audit.jsonl                 who did what, each line bound to the one before
    repository.json             where the keys are; never served, like everything above but the first three

The keys lie elsewhere, with ``root.json``, the newest root that was published from here: what lies in the served folders may
have been exchanged, the root too, so metadata is extended only where a chain from that copy leads to it. Everything is
written durably, in an order that keeps the repository servable at every moment: blobs, manifest, targets, snapshot, and last
the timestamp, which makes it all visible at once. A version number is never used twice.

    >>> store = Store.open(Path("repository"))  # doctest: +SKIP
    >>> store.chain().targets.version           # doctest: +SKIP
    3
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from securesystemslib.signer import Key  # type: ignore[attr-defined]
from securesystemslib.signer import Signer as RoleSigner  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError as TufRepositoryError
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]
from tuf.api.serialization.json import JSONSerializer

from edgekit.durable import make_folder, sync_folder, write_durably
from edgekit.errors import EdgekitError, RepositoryError, TrustError, UsageError
from edgekit.schema.base import SCHEMA_VERSION, Record, decode_json, encode_json
from edgekit.trust.role_keys import load_role_key, material, open_role_signer
from edgekit.trust.signer import load_signer

TOP_ROLES = ("root", "targets", "snapshot", "timestamp")
CONFIG_FILE = "repository.json"
ANCHOR_FILE = "root.json"
RESERVED_FILE = "timestamp.version"
SERVED = ("metadata", "targets", "blobs")
PRIVATE_FOLDER = 0o700
_SERIALIZER = JSONSerializer(compact=True)
S = TypeVar("S", Root, Targets, Snapshot, Timestamp)
Signed = Root | Targets | Snapshot | Timestamp


class Expiry(Record, frozen=True, kw_only=True):
    """For how long each role's signature holds, days; ``targets`` holds for delegated roles, too."""

    root: float = 365.0
    targets: float = 90.0
    snapshot: float = 7.0
    timestamp: float = 1.0

    def days(self, role: str) -> float:
        """Of one role."""
        return float(getattr(self, role if role in TOP_ROLES else "targets"))


class Gates(Record, frozen=True, kw_only=True):
    """What a release must show before it is promoted."""

    max_drop: float = 0.01
    """Of the metric against the release that it replaces, on the same data."""
    max_latency_ratio: float = 1.1
    min_publishers: int = 1
    """Different publishers that must have signed the bundle."""
    min_hours: float = 0.0
    """On the channel before."""


class RepositoryConfig(Record, frozen=True, kw_only=True):
    """What commands must know of a repository between their runs."""

    keys_dir: str
    """Relative to the repository's folder."""
    expiry: Expiry
    key_names: dict[str, str] = {}  # noqa: RUF012 - msgspec copies it
    """What people call a key, by key id."""
    key_uris: dict[str, str] = {}  # noqa: RUF012 - the same
    """Where keys are that are not files, by key id."""
    channels: tuple[str, ...] = ("dev", "staging", "production")
    """From the first on, in the order of promotion."""
    is_gated: bool = False
    """Only the first channel is published to; the others are promoted to."""
    gates: Gates = Gates()
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Chain:
    """The metadata that the current timestamp makes visible, verified from our root on."""

    root: Root
    targets: Targets
    snapshot: Snapshot
    timestamp: Timestamp
    delegated: Mapping[str, Targets] = field(default_factory=dict)

    def role(self, name: str) -> Targets:
        """The targets role of that name."""
        return self.targets if name == "targets" else self.delegated[name]


def whole_second(now: datetime | None) -> datetime:
    """A time as metadata has it: UTC, without fractions; None is now."""
    return (now or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)


def signed_by(keys: Mapping[str, Key], metadata: Metadata[Any]) -> dict[str, Key]:
    """Those of the keys that signed, by id; the same key material counts once."""
    found: dict[bytes, tuple[str, Key]] = {}
    payload = metadata.signed_bytes
    for keyid, key in keys.items():
        signature = metadata.signatures.get(keyid)
        if signature is None:
            continue
        try:
            key.verify_signature(signature, payload)
        except Exception:  # noqa: BLE001, S112 - whatever is wrong with a signature, it does not count
            continue
        found.setdefault(material(key), (keyid, key))
    return dict(found.values())


def add_signature(metadata: Metadata[Any], signer: RoleSigner) -> None:
    """Sign, beside those who have signed already.

    Raises:
        UsageError: ``key.unusable``, or what the key's owner is asked for (``key.pin``).
    """
    try:
        metadata.sign(signer, append=True)
    except UnsignedMetadataError as error:
        if isinstance(error.__cause__, EdgekitError):
            raise error.__cause__ from None
        raise UsageError(
            "key.unusable",
            f"key {signer.public_key.keyid[:12]}…: cannot sign: {error.__cause__ or error}.",
            hint="Check the token or service that holds it.",
        ) from error


@dataclass(frozen=True)
class Delegation:
    """Who must sign a role: keys by id, how many of them, and by whose word."""

    role: str
    keys: Mapping[str, Key]
    threshold: int

    def is_met(self, metadata: Metadata[Any]) -> bool:
        """Whether enough different keys signed."""
        return len(signed_by(self.keys, metadata)) >= self.threshold


def delegation_of(delegator: Root | Targets, role: str) -> Delegation:
    """Who must sign ``role``, as root metadata (for the top roles) or targets metadata (for delegated ones) say.

    Raises:
        ValueError: the delegator knows no such role.
    """
    found = delegator.get_delegated_role(role)
    keys = {}
    for keyid in found.keyids:
        with contextlib.suppress(ValueError):
            keys[keyid] = delegator.get_key(keyid)
    return Delegation(role, keys, found.threshold)


def delegated_roles(targets: Targets) -> tuple[str, ...]:
    """The names of the roles that targets metadata delegates to, the most trusted first."""
    roles = targets.delegations.roles if targets.delegations else None
    return tuple(roles or ())


class Store:
    """One repository's folder, with its configuration."""

    def __init__(self, folder: Path, config: RepositoryConfig) -> None:
        self.folder, self.config = folder, config
        self.keys_dir = Path(os.path.normpath(folder / config.keys_dir))
        self._given: dict[str, RoleSigner] = {}

    @classmethod
    def open(cls, folder: Path) -> Store:
        """The repository that is in a folder.

        Raises:
            RepositoryError: ``repository.not_found``.
            ArtifactError: ``record.malformed``.
        """
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
        """The folder of the signed metadata."""
        return self.folder / "metadata"

    @property
    def publishers(self) -> Path:
        """The folder of the publishers' public keys."""
        return self.folder / "publishers"

    @property
    def pending_dir(self) -> Path:
        """The folder of what waits for signatures."""
        return self.folder / "pending"

    @property
    def anchor(self) -> Path:
        """Our copy of the newest root."""
        return self.keys_dir / ANCHOR_FILE

    def save_config(self, config: RepositoryConfig) -> None:
        """Change the configuration."""
        self.config = config
        write_durably(self.folder / CONFIG_FILE, encode_json(config))

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

    # --- keys

    def name_of(self, keyid: str) -> str:
        """What people call a key."""
        name = self.config.key_names.get(keyid, "")
        return f"{name} ({keyid[:8]}…)" if name else f"{keyid[:12]}…"

    def give(self, specs: Sequence[str]) -> tuple[str, ...]:
        """Take private keys from elsewhere into use, files or URIs, for as long as this object lives; their key ids."""
        signers = [open_role_signer(spec) for spec in specs]
        self._given |= {signer.public_key.keyid: signer for signer in signers}
        return tuple(signer.public_key.keyid for signer in signers)

    def find_signers(self, wanted: Mapping[str, Key]) -> dict[str, RoleSigner]:
        """Those private keys of ``wanted`` that are at hand, by key id: given ones, files of the keys folder, named tokens.

        Raises:
            UsageError: a file that is at hand cannot be used (see ``load_signer``), or a token refuses.
        """
        found = {keyid: signer for keyid, signer in self._given.items() if keyid in wanted}
        for path in sorted(self.keys_dir.glob("*.pem")):
            public = path.with_suffix(".pub")
            keyid = load_role_key(public).keyid if public.is_file() else load_signer(path).keyid
            if keyid in wanted and keyid not in found:
                found[keyid] = self._checked(path, keyid)
        for keyid, uri in self.config.key_uris.items():
            if keyid in wanted and keyid not in found:
                found[keyid] = open_role_signer(uri, wanted[keyid])
        return found

    @staticmethod
    def _checked(path: Path, keyid: str) -> RoleSigner:
        """The private key of a file, if it is the one that the public key beside it belongs to."""
        signer = load_signer(path)
        if signer.keyid != keyid:
            raise TrustError(
                "repository.foreign_key",
                f"{path}: is key {signer.keyid[:12]}…, the public key beside it is {keyid[:12]}…; it was exchanged.",
                hint="Put the right key back.",
            )
        return signer.tuf_signer()

    # --- reading

    def chain(self, *, is_to_be_extended: bool = False) -> Chain:
        """The current metadata.

        Args:
            is_to_be_extended: something will be signed on top: then our copy of the root must be here.

        Raises:
            RepositoryError: ``repository.damaged`` when a file is missing or does not parse.
            TrustError: ``repository.foreign_metadata`` when our keys did not sign it.
            UsageError: ``repository.no_anchor``.
        """
        root, before = self._roots(is_anchor_needed=is_to_be_extended)
        delegators = [root, before] if before is not None else [root]
        timestamp = self._load(Timestamp, "timestamp.json", "timestamp", delegators)
        snapshot = self._load(Snapshot, f"{timestamp.snapshot_meta.version}.snapshot.json", "snapshot", delegators)
        targets = self._load(Targets, f"{snapshot.meta['targets.json'].version}.targets.json", "targets", delegators)
        delegated = {
            role: self._load(Targets, f"{snapshot.meta[f'{role}.json'].version}.{role}.json", role, [targets])
            for role in delegated_roles(targets)
            if f"{role}.json" in snapshot.meta
        }
        return Chain(root=root, targets=targets, snapshot=snapshot, timestamp=timestamp, delegated=delegated)

    def _roots(self, *, is_anchor_needed: bool) -> tuple[Root, Root | None]:
        """The newest root; and the one before it, where its publication was interrupted and is to be gone on with."""
        newest = highest(self.metadata, "root")
        path = self.metadata / f"{newest}.root.json"
        if not self.anchor.is_file():
            if is_anchor_needed:
                raise UsageError(
                    "repository.no_anchor",
                    f"{self.anchor}: our copy of the root metadata is missing, so nothing tells whether {path} was exchanged.",
                    hint=f"If you know that it was not: cp {path} {self.anchor}",
                )
            root = self._read(Root, path)
            self._check(path, root, [root.signed], "root")
            return root.signed, None
        trusted = self._read(Root, self.anchor)
        previous: Root | None = None
        current: Metadata[Root] = trusted
        for version in range(trusted.signed.version + 1, newest + 1):
            step = self.metadata / f"{version}.root.json"
            following = self._read(Root, step)
            if following.signed.version != version:
                raise foreign(step)
            self._check(step, following, [current.signed], "root")
            self._check(step, following, [following.signed], "root")
            previous, current = current.signed, following
        if newest < trusted.signed.version or (
            newest == trusted.signed.version and path.read_bytes() != self.anchor.read_bytes()
        ):
            raise foreign(path)
        is_interrupted = previous is not None and (self.pending_dir / "root.json").is_file()
        return current.signed, previous if is_interrupted else None

    def _read(self, kind: type[S], path: Path) -> Metadata[S]:
        try:
            metadata: Metadata[S] = Metadata[S].from_bytes(path.read_bytes())
        except (OSError, TufRepositoryError) as error:
            raise RepositoryError(
                "repository.damaged", f"{path}: cannot be read: {error}.", hint="Restore the repository from its backup."
            ) from error
        if not isinstance(metadata.signed, kind):
            raise RepositoryError("repository.damaged", f"{path}: holds {metadata.signed.type}, not {kind.type}.")
        return metadata

    @staticmethod
    def _check(path: Path, metadata: Metadata[Any], delegators: Sequence[Root | Targets], role: str) -> None:
        for delegator in delegators:
            with contextlib.suppress(ValueError):
                if delegation_of(delegator, role).is_met(metadata):
                    return
        raise foreign(path)

    def _load(self, kind: type[S], name: str, role: str, delegators: Sequence[Root | Targets]) -> S:
        path = self.metadata / name
        metadata = self._read(kind, path)
        self._check(path, metadata, delegators, role)
        signed: S = metadata.signed
        return signed

    # --- what waits for signatures

    def pending(self) -> dict[str, Metadata[Any]]:
        """Changes that are not published yet, by role, with the signatures that they have."""
        found: dict[str, Metadata[Any]] = {}
        for path in sorted(self.pending_dir.glob("*.json")):
            try:
                found[path.stem] = Metadata.from_bytes(path.read_bytes())
            except TufRepositoryError as error:
                raise RepositoryError(
                    "repository.damaged", f"{path}: cannot be read: {error}.", hint="Delete it and make the change again."
                ) from error
        return found

    def save_pending(self, role: str, metadata: Metadata[Any]) -> None:
        """Keep a change until it has its signatures."""
        make_folder(self.pending_dir, mode=PRIVATE_FOLDER)
        write_durably(self.pending_dir / f"{role}.json", metadata.to_bytes(_SERIALIZER), mode=0o600)

    def drop_pending(self, roles: Sequence[str]) -> None:
        """Forget changes that are published or given up."""
        for role in roles:
            (self.pending_dir / f"{role}.json").unlink(missing_ok=True)
        if self.pending_dir.is_dir():
            sync_folder(self.pending_dir)

    # --- writing

    def reserved_timestamp(self) -> int:
        """The highest version of the timestamp that a device may have seen, whatever a power cut took back."""
        try:
            text = (self.folder / RESERVED_FILE).read_text()
        except OSError:
            return 0
        return int(text) if text.strip().isdecimal() else 0

    def reserve_timestamp(self, version: int) -> None:
        """Remember a version before anybody can see it: its file has one name, and a power cut may take the newest back."""
        write_durably(self.folder / RESERVED_FILE, f"{version}\n".encode())

    def write(self, name: str, metadata: Metadata[Any]) -> bytes:
        """Write one role's signed file."""
        data: bytes = metadata.to_bytes(_SERIALIZER)
        write_durably(self.metadata / name, data)
        return data

    def save_anchor(self, data: bytes) -> None:
        """Keep our copy of the root."""
        make_folder(self.keys_dir, mode=PRIVATE_FOLDER)
        write_durably(self.anchor, data)

    def expires(self, role: str, now: datetime) -> datetime:
        """When a signature of now will expire."""
        return now + timedelta(days=self.config.expiry.days(role))


def copy_of(signed: S) -> S:
    """A copy that can be changed."""
    return deepcopy(signed)


def foreign(path: Path) -> TrustError:
    """Metadata that our keys did not sign."""
    return TrustError(
        "repository.foreign_metadata",
        f"{path}: not signed by this repository's keys; it was exchanged.",
        hint="Restore the repository from its backup; nothing was signed on top of it.",
    )


def highest(folder: Path, role: str) -> int:
    """The highest version of a role that lies on disk, whether it is visible or not."""
    versions = [path.name.split(".", 1)[0] for path in folder.glob(f"*.{role}.json")]
    return max((int(version) for version in versions if version.isascii() and version.isdigit()), default=0)
