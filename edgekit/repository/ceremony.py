"""Who may sign what: create a repository with its keys, sign, rotate, revoke, delegate, and see what expires.

Root and targets may be kept by several people with a threshold, each with a key of their own, on a machine of their own:
a change is made here, its file travels to them (a USB stick will do), each adds a signature, and it is published as soon as
enough have signed.

    >>> init_repository(Path("repository"), keys=KeyPlan(root=3, root_threshold=2))   # doctest: +SKIP
    >>> rotate(Path("repository"), "targets", old="targets", new="carol.pub")          # doctest: +SKIP
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
from securesystemslib.signer import Key  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError as TufRepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)

from edgekit.durable import make_folder, write_durably
from edgekit.errors import ArtifactError, EdgekitError, TrustError, UsageError
from edgekit.repository import audit
from edgekit.repository.changes import Settled, Waiting, Workbench
from edgekit.repository.listing import recalls_of, releases_of
from edgekit.repository.store import (
    CONFIG_FILE,
    PRIVATE_FOLDER,
    SERVED,
    TOP_ROLES,
    Chain,
    Expiry,
    RepositoryConfig,
    Store,
    add_signature,
    delegated_roles,
    delegation_of,
    whole_second,
)
from edgekit.schema.base import Record, encode_json
from edgekit.schema.release import Recall, Release
from edgekit.trust.keys import load_public_keys
from edgekit.trust.role_keys import (
    load_role_key,
    material,
    open_role_signer,
    public_pem,
    refuse_duplicates,
    resolve_role_key,
)
from edgekit.trust.signer import generate_signer, load_signer, save_signer

DOCTOR_DAYS = 14.0
_LEAST_SHARE = 0.25
"""Of its own lifetime: a timestamp that lives for a day cannot be asked to last a fortnight."""
_ROLE_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")


@dataclass(frozen=True, kw_only=True)
class KeyPlan:
    """How many keys a new repository's roles get, and which of them exist already (``.pub``, ``.pem`` or a URI)."""

    root: int = 1
    root_threshold: int = 1
    targets: int = 1
    targets_threshold: int = 1
    given: dict[str, tuple[str, ...]] | None = None
    """By role; they count towards the role's number."""

    def count(self, role: str) -> int:
        """Keys of a role."""
        return {"root": self.root, "targets": self.targets}.get(role, 1)

    def threshold(self, role: str) -> int:
        """Signatures that a role needs."""
        return {"root": self.root_threshold, "targets": self.targets_threshold}.get(role, 1)


class RoleStatus(Record, frozen=True, kw_only=True):
    """One role: its version, when it expires, its keys, and who signed what is visible."""

    role: str
    version: int
    expires_at: datetime
    is_expired: bool
    keyids: tuple[str, ...]
    threshold: int
    names: tuple[str, ...] = ()
    """What people call the keys, in the same order."""
    paths: tuple[str, ...] = ()
    """What a delegated role may sign."""


class RepositoryStatus(Record, frozen=True, kw_only=True):
    """What ``edgekit repo status`` and ``edgekit trust status`` show."""

    folder: str
    keys_dir: str
    roles: tuple[RoleStatus, ...]
    releases: tuple[Release, ...]
    publishers: tuple[str, ...]
    """Key ids whose bundles may be published."""
    waiting: tuple[Waiting, ...] = ()
    recalls: tuple[Recall, ...] = ()


# --- creating


def init_repository(
    folder: Path,
    *,
    keys_dir: Path | None = None,
    expiry: Expiry | None = None,
    keys: KeyPlan | None = None,
    is_gated: bool = False,
    now: datetime | None = None,
) -> RepositoryStatus:
    """Create a repository and its keys; goes on where an interrupted call stopped.

    Args:
        folder: of the repository; made where missing.
        keys_dir: for the private keys; None is ``keys`` beside the folder.
        expiry: of the roles.
        keys: how many keys, which thresholds, which keys exist already.
        is_gated: releases enter on the first channel only and are promoted from there.
        now: the time, UTC.

    Returns:
        The status; where keys were given whose private halves are elsewhere, it says whose signatures are waited for.

    Raises:
        UsageError: ``repository.exists``, ``repository.keys_inside``, ``trust.threshold``, or an error of the keys that are
            there already.
    """
    if (folder / CONFIG_FILE).exists():
        raise UsageError("repository.exists", f"{folder}: a repository is here already.", hint="Give another folder.")
    plan = keys or KeyPlan()
    _check_plan(plan)
    place = keys_dir or folder.absolute().parent / "keys"
    served = [folder.absolute() / name for name in SERVED]
    if any(place.absolute().is_relative_to(path) for path in served):
        raise UsageError("repository.keys_inside", f"{place}: this folder is served to everybody; keys must lie elsewhere.")
    relative = os.path.relpath(place.absolute(), folder.absolute())
    store = Store(folder, RepositoryConfig(keys_dir=relative, expiry=expiry or Expiry(), is_gated=is_gated))
    for path in (*served, folder.absolute() / "blobs" / "sha256", folder.absolute() / "publishers"):
        make_folder(path)
    make_folder(place, mode=PRIVATE_FOLDER)
    with store.locked():
        role_keys = {role: _role_keys(store, role, plan) for role in TOP_ROLES}
        _write_first_metadata(store, role_keys, plan, whole_second(now))
        write_durably(folder / CONFIG_FILE, [encode_json(store.config)])
    return repository_status(folder, now=now)


def _check_plan(plan: KeyPlan) -> None:
    for role in ("root", "targets"):
        if not 1 <= plan.threshold(role) <= plan.count(role):
            raise UsageError(
                "trust.threshold",
                f"{role}: {plan.threshold(role)} of {plan.count(role)} keys cannot be asked for.",
                hint="The threshold is at least 1 and at most the number of keys.",
            )


def _role_keys(store: Store, role: str, plan: KeyPlan) -> list[Key]:
    """The role's keys: those that were given, those that are there already (an interrupted init), and new ones."""
    given = [_remember(store, spec) for spec in (plan.given or {}).get(role, ())]
    names = [role] if plan.count(role) == 1 else [f"{role}-{number}" for number in range(1, plan.count(role) + 1)]
    keys = list(given)
    for name in names[len(given) :]:
        path = store.keys_dir / f"{name}.pem"
        if path.exists():
            signer = load_signer(path)
        else:
            signer = generate_signer()
            save_signer(signer, path)
        key = signer.tuf_signer().public_key
        write_durably(path.with_suffix(".pub"), [public_pem(key)])
        _name(store, key, name)
        keys.append(key)
    refuse_duplicates(keys, role)
    return keys


def _remember(store: Store, spec: str) -> Key:
    """A key that exists already: its name and, for a token, where it is."""
    uri, key = resolve_role_key(spec)
    _name(store, key, Path(spec).stem if not uri else spec.partition("?")[0], uri=uri)
    if not uri and Path(spec).suffix == ".pem":
        store.give([spec])
    return key


def _name(store: Store, key: Key, name: str, *, uri: str = "") -> None:
    config = store.config
    names = config.key_names | {key.keyid: name}
    uris = config.key_uris | ({key.keyid: uri} if uri else {})
    store.config = msgspec.structs.replace(config, key_names=names, key_uris=uris)


def _write_first_metadata(store: Store, keys: dict[str, list[Key]], plan: KeyPlan, now: datetime) -> None:
    """The first version of every role; what needs signatures from elsewhere goes to ``pending/``."""
    root = Root(version=1, expires=store.expires("root", now), consistent_snapshot=True)
    for role in TOP_ROLES:
        for key in keys[role]:
            root.add_key(key, role)
        root.roles[role].threshold = plan.threshold(role)
    snapshot = Snapshot(version=1, expires=store.expires("snapshot", now))
    timestamp = Timestamp(version=1, expires=store.expires("timestamp", now))
    signed: dict[str, Metadata[Any]] = {}
    for role, content in (("root", root), ("targets", Targets(version=1, expires=store.expires("targets", now)))):
        metadata: Metadata[Any] = Metadata(content)
        for signer in store.find_signers({key.keyid: key for key in keys[role]}).values():
            add_signature(metadata, signer)
        if not delegation_of(root, role).is_met(metadata):
            raise UsageError(
                "trust.init_needs_keys",
                f"{role}: {plan.threshold(role)} private keys must be at hand to sign the first metadata.",
                hint="Give .pem files or URIs of that many keys; or begin with your own key and add the others' .pub files "
                'with "edgekit trust rotate", which they sign on their machines.',
            )
        signed[role] = metadata
    data = store.write("1.root.json", signed["root"])
    store.save_anchor(data)
    data = store.write("1.targets.json", signed["targets"])
    snapshot.meta["targets.json"] = MetaFile.from_data(1, data, ["sha256"])
    entry = audit.read_log(store.folder)[:1] or (audit.append(store.folder, "init", str(store.folder.name), now=now),)
    snapshot.unrecognized_fields[audit.SNAPSHOT_FIELD] = audit.anchor(entry[0])
    data = _sign_all(store, Metadata(snapshot), keys["snapshot"], "1.snapshot.json")
    timestamp.snapshot_meta = MetaFile.from_data(1, data, ["sha256"])
    _sign_all(store, Metadata(timestamp), keys["timestamp"], "timestamp.json")


def _sign_all(store: Store, metadata: Metadata[Any], keys: Sequence[Key], name: str) -> bytes:
    for signer in store.find_signers({key.keyid: key for key in keys}).values():
        add_signature(metadata, signer)
    return store.write(name, metadata)


# --- changing who may sign


def _change(
    folder: Path,
    action: str,
    subject: str,
    make: Callable[[Workbench], dict[str, str] | None],
    *,
    keys: Sequence[str] = (),
    is_refresh: bool = False,
    now: datetime | None = None,
) -> Settled:
    """Open, change, sign with the keys at hand and those given, publish what is complete, write it down."""
    store, moment = Store.open(folder), whole_second(now)
    with store.locked():
        store.give(keys)
        bench = Workbench.open(store, now=moment, is_log_checked=not is_refresh)
        details = make(bench)
        if is_refresh and details is not None:
            bench.check_log()
        bench.sign(store.find_signers(bench.wanted()))
        entry = None
        if details is not None:
            entry = audit.append(store.folder, action, subject, now=moment, details=details)
        return bench.settle(entry, is_refresh=is_refresh)


def rotate(
    folder: Path,
    role: str,
    *,
    old: str = "",
    new: str = "",
    threshold: int | None = None,
    keys: Sequence[str] = (),
    now: datetime | None = None,
) -> Settled:
    """Exchange a key of a role, add one, remove one, or change the threshold.

    Args:
        folder: of the repository.
        role: a top role, or a delegated one.
        old: key to remove: its name, its id or the start of it, or its ``.pub``; empty removes none.
        new: key to add: a ``.pub``, a ``.pem`` or a URI; ``generate`` makes one in the keys folder; empty adds none.
        threshold: signatures that the role needs from now on.
        keys: private keys to sign with, beside those in the keys folder.
        now: the time, UTC.

    Raises:
        UsageError: ``trust.no_role``, ``trust.no_key``, ``trust.threshold``, ``trust.nothing``.
        TrustError: ``trust.duplicate_key``.
    """
    if not (old or new or threshold):
        raise UsageError("trust.nothing", "nothing to change.", hint="Give --old KEY, --new KEY or --threshold N.")

    def make(bench: Workbench) -> dict[str, str]:
        store = bench.store
        details: dict[str, str] = {}
        holder = _holder(bench, role)
        if new:
            key = _generate(store, role) if new == "generate" else _remember(store, new)
            _add_key(holder, role, key)
            details["new"] = key.keyid
        if old:
            keyid = _find_key(store, holder, role, old)
            holder.revoke_key(keyid, role)
            details["old"] = keyid
        part = holder.get_delegated_role(role)
        if threshold is not None:
            part.threshold = threshold
            details["threshold"] = str(threshold)
        _check_role(holder, role)
        store.save_config(store.config)
        return details

    return _change(folder, "rotate", role, make, keys=keys, now=now)


def _holder(bench: Workbench, role: str) -> Root | Targets:
    """The metadata that says who signs a role, opened for a change."""
    if role in TOP_ROLES:
        return bench.root()
    visible = bench.look("targets")
    if visible is None or role not in delegated_roles(visible):
        known = ", ".join((*TOP_ROLES, *(delegated_roles(visible) if visible else ())))
        raise UsageError("trust.no_role", f"{role}: no such role.", hint=f"Roles: {known}.")
    return bench.targets("targets")


def _generate(store: Store, role: str) -> Key:
    number, taken = 1, set(store.config.key_names.values())
    while f"{role}-{number}" in taken or any(store.keys_dir.glob(f"{role}-{number}.p*")):
        number += 1  # the name of a key that was carried away is not given twice
    signer = generate_signer()
    path = store.keys_dir / f"{role}-{number}.pem"
    save_signer(signer, path)
    key = signer.tuf_signer().public_key
    write_durably(path.with_suffix(".pub"), [public_pem(key)])
    _name(store, key, path.stem)
    return key


def _add_key(holder: Root | Targets, role: str, key: Key) -> None:
    have = delegation_of(holder, role).keys
    if any(material(other) == material(key) for other in have.values()):
        raise TrustError(
            "trust.duplicate_key", f"{role}: the key {key.keyid[:12]}… is one of its keys already.", hint="Give another key."
        )
    holder.add_key(key, role)


def _check_role(holder: Root | Targets, role: str) -> None:
    part = holder.get_delegated_role(role)
    if not 1 <= part.threshold <= len(part.keyids):
        raise UsageError(
            "trust.threshold",
            f"{role}: {part.threshold} signatures of {len(part.keyids)} keys cannot be reached.",
            hint="Add a key with --new first, or give --threshold.",
        )


def _find_key(store: Store, holder: Root | Targets, role: str, spec: str) -> str:
    """A key of a role by name, id, start of the id, or file."""
    keys = delegation_of(holder, role).keys
    if Path(spec).suffix in {".pub", ".pem"} and Path(spec).is_file():
        wanted = resolve_role_key(spec)[1]
        found = [keyid for keyid, key in keys.items() if material(key) == material(wanted)]
    else:
        names = store.config.key_names
        found = [keyid for keyid in keys if names.get(keyid) == spec or (len(spec) >= 6 and keyid.startswith(spec))]
    if len(found) != 1:
        known = ", ".join(store.name_of(keyid) for keyid in keys)
        why = "names several keys" if found else "is not one of its keys"
        raise UsageError("trust.no_key", f"{role}: {spec} {why}.", hint=f"Its keys: {known}.")
    return found[0]


def revoke(folder: Path, spec: str, *, reason: str, keys: Sequence[str] = (), now: datetime | None = None) -> Settled:
    """Take a key out of every role that has it.

    Args:
        folder: of the repository.
        spec: the key: name, id, start of the id, or file.
        reason: for the audit log.
        keys: private keys to sign with, beside those in the keys folder.
        now: the time, UTC.

    Raises:
        UsageError: ``trust.no_key``; ``trust.threshold`` when a role could not reach its threshold any more.
    """

    def make(bench: Workbench) -> dict[str, str]:
        roles = []
        names = [*TOP_ROLES, *delegated_roles(bench.look("targets") or bench.chain.targets)]
        for role in names:
            holder: Root | Targets | None = bench.chain.root if role in TOP_ROLES else bench.look("targets")
            try:
                keyid = _find_key(bench.store, holder, role, spec)  # type: ignore[arg-type]
            except UsageError:
                continue
            changed = _holder(bench, role)
            changed.revoke_key(keyid, role)
            _check_role(changed, role)
            roles.append(role)
        if not roles:
            raise UsageError("trust.no_key", f"{spec}: no role has this key.", hint='See "edgekit trust status".')
        return {"roles": ", ".join(roles), "reason": reason}

    return _change(folder, "revoke", spec, make, keys=keys, now=now)


def delegate(
    folder: Path,
    role: str,
    *,
    models: Sequence[str],
    new_keys: Sequence[str],
    threshold: int = 1,
    keys: Sequence[str] = (),
    now: datetime | None = None,
) -> Settled:
    """Let other keys sign the releases of a family of models, and of no other.

    Args:
        folder: of the repository.
        role: the new role's name.
        models: names of models, with ``*`` for any part of a name.
        new_keys: keys of the role (``.pub``, ``.pem``, a URI, or ``generate``).
        threshold: how many of them must sign.
        keys: private keys to sign with, beside those in the keys folder.
        now: the time, UTC.

    Raises:
        UsageError: ``trust.role_name``, ``trust.role_exists``, ``trust.models``, ``trust.threshold``.
        TrustError: ``trust.duplicate_key``.
    """
    if role in TOP_ROLES or not role or not set(role) <= _ROLE_CHARACTERS:
        raise UsageError("trust.role_name", f"{role!r}: not a name for a role.", hint="Lower-case letters, digits, - and _.")
    if not models or any("/" in name or not name for name in models):
        raise UsageError("trust.models", "no models, or a name with a slash.", hint="For example --models 'kws*'.")
    patterns = [f"models/{name}/*/*/manifest.json" for name in models]

    def make(bench: Workbench) -> dict[str, str]:
        targets = bench.targets("targets")
        if role in delegated_roles(targets):
            raise UsageError("trust.role_exists", f"{role}: is delegated to already.", hint='Use "edgekit trust rotate".')
        found = [_generate(bench.store, role) if spec == "generate" else _remember(bench.store, spec) for spec in new_keys]
        refuse_duplicates(found, role)
        if targets.delegations is None:
            targets.delegations = Delegations(keys={}, roles={})
        assert targets.delegations.roles is not None
        targets.delegations.roles[role] = DelegatedRole(role, [], threshold, terminating=True, paths=patterns)
        for key in found:
            targets.add_key(key, role)
        _check_role(targets, role)
        bench.targets(role)
        bench.store.save_config(bench.store.config)
        return {"models": ", ".join(models), "keys": ", ".join(key.keyid for key in found), "threshold": str(threshold)}

    return _change(folder, "delegate", role, make, keys=keys, now=now)


def undelegate(folder: Path, role: str, *, keys: Sequence[str] = (), now: datetime | None = None) -> Settled:
    """Take a delegation back; its releases are not offered any more.

    Raises:
        UsageError: ``trust.no_role``.
    """

    def make(bench: Workbench) -> dict[str, str]:
        if role in TOP_ROLES:
            raise UsageError("trust.no_role", f"{role}: is not a delegated role.")
        targets = _holder(bench, role)
        assert isinstance(targets, Targets)
        assert targets.delegations is not None
        assert targets.delegations.roles is not None
        for keyid in list(targets.delegations.roles[role].keyids):
            targets.revoke_key(keyid, role)
        del targets.delegations.roles[role]
        bench.discard(role)
        return {}

    return _change(folder, "undelegate", role, make, keys=keys, now=now)


# --- signing


def sign_pending(
    folder: Path, role: str = "", *, keys: Sequence[str] = (), now: datetime | None = None
) -> tuple[tuple[str, ...], Settled]:
    """Add signatures to what waits here.

    Args:
        folder: of the repository.
        role: of the change; empty is every change that the keys may sign.
        keys: private keys (``.pem`` or URI); none takes those of the keys folder.
        now: the time, UTC.

    Returns:
        The roles that got a signature, and what became of them.

    Raises:
        UsageError: ``trust.nothing_pending``.
        TrustError: ``trust.foreign_key``.
    """
    store, moment = Store.open(folder), whole_second(now)
    with store.locked():
        bench = Workbench.open(store, now=moment)
        if not bench.pending or (role and role not in bench.pending):
            raise UsageError(
                "trust.nothing_pending", f"{folder}: nothing waits for a signature{f' of {role}' if role else ''}."
            )
        given = {signer.public_key.keyid: signer for signer in (open_role_signer(spec) for spec in keys)}
        done = bench.sign(given or store.find_signers(bench.wanted()), role=role)
        if not done:
            raise TrustError("trust.foreign_key", "none of the keys may sign what waits.", hint='See "edgekit trust status".')
        entry = audit.append(store.folder, "sign", ", ".join(done), now=moment, details={"keys": ", ".join(given)})
        return done, bench.settle(entry)


def describe_change(new: Root | Targets, old: Root | Targets | None) -> tuple[str, ...]:
    """What signing a change would mean, in words, for the person who is about to sign."""
    lines = [f"{new.type} version {new.version}, valid until {new.expires:%Y-%m-%d}"]
    if isinstance(new, Root):
        before = old.roles if isinstance(old, Root) else {}
        for role, part in new.roles.items():
            was = before.get(role)
            added = [keyid for keyid in part.keyids if was is None or keyid not in was.keyids]
            removed = [keyid for keyid in was.keyids if keyid not in part.keyids] if was else []
            word = "adds key" if isinstance(old, Root) else "key"
            lines += [f"{role}: {word} {keyid[:12]}…" for keyid in added] + [
                f"{role}: removes key {keyid[:12]}…" for keyid in removed
            ]
            if was is not None and was.threshold != part.threshold:
                lines.append(f"{role}: {part.threshold} signatures instead of {was.threshold}")
        return tuple(lines)
    known = old.targets if isinstance(old, Targets) else {}
    for path, target in new.targets.items():
        was_target = known.get(path)
        if was_target is None or was_target.to_dict() != target.to_dict():
            lines.append(f"{'adds' if was_target is None else 'changes'} {path}")
    lines += [f"removes {path}" for path in known if path not in new.targets]
    old_roles = delegated_roles(old) if isinstance(old, Targets) else ()
    lines += [f"delegates to {role}" for role in delegated_roles(new) if role not in old_roles]
    lines += [f"delegates no more to {role}" for role in old_roles if role not in delegated_roles(new)]
    return tuple(lines)


def export_pending(folder: Path, role: str, out: Path) -> tuple[str, ...]:
    """Write a change to a file that can be signed elsewhere.

    Returns:
        What signing it would mean.

    Raises:
        UsageError: ``trust.nothing_pending``.
    """
    store = Store.open(folder)
    bench = Workbench.open(store, now=whole_second(None), is_log_checked=False)
    if role not in bench.pending:
        raise UsageError("trust.nothing_pending", f"{folder}: nothing waits for a signature of {role}.")
    path = store.pending_dir / f"{role}.json"
    write_durably(out, path.read_bytes())
    old: Root | Targets | None = bench.chain.root if role == "root" else _visible(bench.chain, role)
    return describe_change(bench.pending[role].signed, old)


def _visible(chain: Chain, role: str) -> Targets | None:
    return chain.targets if role == "targets" else chain.delegated.get(role)


def read_detached(path: Path) -> Metadata[Any]:
    """A change that travelled as a file.

    Raises:
        UsageError: ``trust.not_metadata``.
    """
    try:
        return Metadata.from_bytes(path.read_bytes())
    except (OSError, TufRepositoryError) as error:
        raise UsageError(
            "trust.not_metadata", f"{path}: cannot be read as metadata: {error}.", hint='Make it with "edgekit trust export".'
        ) from error


def sign_detached(path: Path, keys: Sequence[str]) -> tuple[str, ...]:
    """Add signatures to a file that ``export_pending`` wrote; no repository is needed.

    Returns:
        The key ids.

    Raises:
        UsageError: ``trust.not_metadata``, ``trust.no_signer``, or an error of the key.
    """
    metadata = read_detached(path)
    if not keys:
        raise UsageError("trust.no_signer", "no --key to sign with.", hint="--key FILE.pem, or a URI such as hsm:2.")
    keyids = []
    for spec in keys:
        signer = open_role_signer(spec)
        add_signature(metadata, signer)
        keyids.append(signer.public_key.keyid)
    write_durably(path, metadata.to_bytes())
    return tuple(keyids)


def merge_detached(folder: Path, path: Path, *, now: datetime | None = None) -> tuple[str, Settled]:
    """Take over the signatures of a file that was signed elsewhere.

    Returns:
        The role, and what became of it.

    Raises:
        TrustError: ``trust.other_content`` when the file is not what waits here, ``trust.foreign_key`` when it brings nothing.
    """
    store, moment = Store.open(folder), whole_second(now)
    brought = read_detached(path)
    with store.locked():
        bench = Workbench.open(store, now=moment)
        role = next((name for name, item in bench.pending.items() if item.signed_bytes == brought.signed_bytes), "")
        if not role:
            raise TrustError(
                "trust.other_content",
                f"{path}: is not what waits for signatures here; it was changed, or the change here went on.",
                hint='Export it again: "edgekit trust export".',
            )
        allowed = set(bench.wanted())
        mine = {keyid: sig for keyid, sig in brought.signatures.items() if keyid in allowed}
        fresh = mine.keys() - bench.pending[role].signatures.keys()
        if not fresh:
            raise TrustError("trust.foreign_key", f"{path}: brings no new signature by a key of {role}.")
        bench.pending[role].signatures.update(mine)
        entry = audit.append(store.folder, "sign", role, now=moment, details={"keys": ", ".join(sorted(fresh))})
        return role, bench.settle(entry)


def refresh_repository(
    folder: Path,
    *,
    is_targets_too: bool = False,
    roles: Sequence[str] = (),
    keys: Sequence[str] = (),
    now: datetime | None = None,
) -> RepositoryStatus:
    """Sign timestamp and snapshot again, so that devices go on to trust the repository; publish what has its signatures.

    Args:
        folder: of the repository.
        is_targets_too: also the targets, whose signature holds for longer, and the delegated roles whose keys are here.
        roles: further roles to give a new expiry; they wait for signatures where keys are elsewhere.
        keys: private keys to sign with, beside those in the keys folder.
        now: the time, UTC.

    Raises:
        RepositoryError, TrustError, UsageError: as :class:`Workbench`.
    """

    def make(bench: Workbench) -> dict[str, str] | None:
        wanted = list(roles)
        if is_targets_too:
            wanted += ["targets"]
            wanted += [
                role
                for role in bench.chain.delegated
                if bench.store.find_signers(delegation_of(bench.chain.targets, role).keys)
            ]
        for role in dict.fromkeys(wanted):
            if role == "root":
                bench.root()
            elif role == "targets" or role in bench.chain.delegated:
                bench.targets(role)
            elif role not in TOP_ROLES:
                raise UsageError("trust.no_role", f"{role}: no such role.", hint='See "edgekit trust status".')
        return {"roles": ", ".join(wanted)} if wanted else None

    _change(folder, "refresh", folder.name, make, keys=keys, is_refresh=True, now=now)
    return repository_status(folder, now=now)


# --- looking


def repository_status(folder: Path, *, now: datetime | None = None) -> RepositoryStatus:
    """What the repository offers and when its signatures expire; needs no private key.

    Raises:
        RepositoryError, TrustError: as :meth:`Store.chain`.
    """
    store = Store.open(folder)
    chain, moment = store.chain(), whole_second(now)
    parts: list[tuple[str, Any, Root | Targets]] = [(role, getattr(chain, role), chain.root) for role in TOP_ROLES]
    parts += [(role, targets, chain.targets) for role, targets in chain.delegated.items()]
    return RepositoryStatus(
        folder=str(folder),
        keys_dir=str(store.keys_dir),
        roles=tuple(_role_status(store, role, signed, holder, moment) for role, signed, holder in parts),
        releases=releases_of(chain),
        publishers=tuple(key.keyid for key in load_public_keys(store.publishers)),
        waiting=_waiting(store, chain, moment),
        recalls=recalls_of(chain.targets).recalls,
    )


def _role_status(store: Store, role: str, signed: Any, holder: Root | Targets, now: datetime) -> RoleStatus:
    part = holder.get_delegated_role(role)
    return RoleStatus(
        role=role,
        version=signed.version,
        expires_at=signed.expires,
        is_expired=signed.is_expired(now),
        keyids=tuple(part.keyids),
        threshold=part.threshold,
        names=tuple(store.config.key_names.get(keyid, "") for keyid in part.keyids),
        paths=tuple(getattr(part, "paths", None) or ()),
    )


def _waiting(store: Store, chain: Chain, now: datetime) -> tuple[Waiting, ...]:
    bench = Workbench(store, chain, now, store.pending())
    return tuple(bench.waiting_for(role) for role in bench.pending)


class Fault(Record, frozen=True, kw_only=True):
    """One thing that ``edgekit trust doctor`` found. A warning does not fail."""

    level: Literal["fault", "warning"]
    what: str
    hint: str = ""


def diagnose(folder: Path, *, days: float = DOCTOR_DAYS, now: datetime | None = None) -> tuple[Fault, ...]:
    """What is wrong with a repository's trust, or will be soon.

    Args:
        folder: of the repository.
        days: what expires within them is a fault; a role that lives shorter must have a quarter of its life left.
        now: the time, UTC.
    """
    try:
        status = repository_status(folder, now=now)
        store = Store.open(folder)
        chain = store.chain()
    except EdgekitError as error:
        return (Fault(level="fault", what=error.message, hint=error.hint),)
    moment = whole_second(now)
    found = [fault for role in status.roles for fault in _role_faults(store, role, days, moment)]
    for holder in (chain.root, chain.targets):
        for role in TOP_ROLES if isinstance(holder, Root) else delegated_roles(holder):
            try:
                refuse_duplicates(delegation_of(holder, role).keys.values(), role)
            except TrustError as error:
                found.append(Fault(level="fault", what=error.message, hint=error.hint))
    found += [
        Fault(
            level="warning",
            what=f"{item.role} version {item.version} is not published: {item.reason}",
            hint='"edgekit trust status"',
        )
        for item in status.waiting
    ]
    kinds = {key.keytype for key in (*chain.root.keys.values(), *_delegated_keys(chain))} - {"ed25519"}
    if kinds:
        found.append(
            Fault(
                level="warning",
                what=f"keys of the kind {', '.join(sorted(kinds))}: devices can check them only with the cryptography package",
                hint="pip install 'edgekit[agent,crypto]' on the devices, or use Ed25519 keys.",
            )
        )
    return (*found, *_key_faults(store, chain), *_log_faults(store, chain))


def _delegated_keys(chain: Chain) -> list[Key]:
    delegations = chain.targets.delegations
    return list(delegations.keys.values()) if delegations else []


def _role_faults(store: Store, role: RoleStatus, days: float, now: datetime) -> list[Fault]:
    life = store.config.expiry.days(role.role)
    left = (role.expires_at - now) / timedelta(days=1)
    faults = []
    if left < min(days, _LEAST_SHARE * life):
        hours = f"{abs(left) * 24:.0f} h" if abs(left) < 2 else f"{abs(left):.0f} d"
        word = f"expired {hours} ago" if left < 0 else f"expires in {hours}"
        extra = "" if role.role in {"snapshot", "timestamp"} else f" --role {role.role}"
        faults.append(Fault(level="fault", what=f"{role.role} {word}", hint=f'"edgekit trust refresh {store.folder}{extra}"'))
    if len(role.keyids) < role.threshold:
        faults.append(Fault(level="fault", what=f"{role.role}: {role.threshold} signatures of {len(role.keyids)} keys"))
    if role.role == "root" and len(role.keyids) == role.threshold:
        faults.append(
            Fault(
                level="warning",
                what=f"root: {role.threshold} of {len(role.keyids)} keys: who loses one loses the repository",
                hint=f'"edgekit trust rotate {store.folder} root --new KEY.pub" adds a spare one.',
            )
        )
    return faults


def _key_faults(store: Store, chain: Chain) -> list[Fault]:
    faults = []
    roots = delegation_of(chain.root, "root").keys
    for path in sorted(store.keys_dir.glob("*.pem")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            faults.append(Fault(level="fault", what=f"{path}: mode {mode:04o}, others can read it", hint=f"chmod 600 {path}"))
        public = path.with_suffix(".pub")
        is_root = public.is_file() and _keyid(public) in roots
        if is_root:
            faults.append(
                Fault(
                    level="warning",
                    what=f"{path}: a root key is on this machine",
                    hint="Move it offline once you need it no more.",
                )
            )
    open_keys = [path.name for path in sorted(store.keys_dir.glob("*.pem")) if b"ENCRYPTED" not in path.read_bytes()]
    if open_keys:
        what = f"{store.keys_dir}: not encrypted: {', '.join(open_keys)}"
        faults.append(Fault(level="warning", what=what, hint="Set EDGEKIT_KEY_PASSPHRASE when a key is made."))
    for name in SERVED:
        faults += [
            Fault(level="fault", what=f"{path}: a private key in a folder that is served", hint="Move it away; revoke it.")
            for path in (store.folder / name).rglob("*.pem")
        ]
    if not store.anchor.is_file():
        faults.append(Fault(level="fault", what=f"{store.anchor}: our copy of the root is missing"))
    return faults


def _keyid(public: Path) -> str:
    try:
        return str(load_role_key(public).keyid)
    except UsageError:
        return ""


def accept_cut_log(folder: Path, reason: str, *, now: datetime | None = None) -> audit.AuditEntry:
    """Go on from an audit log that lost its end and has no backup; that it did, and why, becomes its next entry.

    Args:
        folder: of the repository.
        reason: in words, for those who read the log later.
        now: the time, UTC.

    Raises:
        UsageError: ``audit.whole`` when nothing is missing.
        TrustError: ``audit.broken`` when an entry was changed: that is no loss, and only a backup helps.
    """
    store, moment = Store.open(folder), whole_second(now)
    with store.locked():
        bench = Workbench.open(store, now=moment, is_log_checked=False)
        try:
            bench.check_log()
        except TrustError as error:
            if error.code != "audit.cut":
                raise
        else:
            raise UsageError("audit.whole", f"{folder}: the audit log is whole; there is no loss to accept.")
        known = bench.chain.snapshot.unrecognized_fields[audit.SNAPSHOT_FIELD]
        details = {"reason": reason, "known": str(known["seq"]), "digest": str(known["digest"])}
        entry = audit.append(store.folder, "log cut", folder.name, now=moment, details=details)
        bench.settle(entry, is_refresh=True)
        return entry


def _log_faults(store: Store, chain: Chain) -> list[Fault]:
    try:
        audit.check_anchor(audit.read_log(store.folder), chain.snapshot.unrecognized_fields.get(audit.SNAPSHOT_FIELD))
    except (TrustError, ArtifactError) as error:
        return [Fault(level="fault", what=error.message, hint=error.hint)]
    return []
