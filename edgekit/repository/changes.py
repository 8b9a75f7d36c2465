"""Changes to a repository's metadata: made, signed one by one, and published when enough have signed.

A change is a new version of one role in ``pending/``. Whoever has a key adds a signature, here or on another machine; what has
its signatures is published together, in the order that devices can follow at every moment. A change that depends on another
waits for it: a new root for the targets that its new keys must sign, a delegation for the metadata of the role that it names.

    >>> bench = Workbench.open(store, now=now)          # doctest: +SKIP
    >>> bench.targets("targets").targets.pop("old")     # doctest: +SKIP
    >>> bench.sign(store.find_signers(bench.wanted()))  # doctest: +SKIP
    >>> bench.settle().waiting                          # doctest: +SKIP
    ()
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from securesystemslib.signer import Key  # type: ignore[attr-defined]
from securesystemslib.signer import Signer as RoleSigner  # type: ignore[attr-defined]
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]

from edgekit.errors import TrustError, UsageError
from edgekit.repository.audit import SNAPSHOT_FIELD, AuditEntry, anchor, check_anchor, read_log
from edgekit.repository.store import (
    Chain,
    Delegation,
    Store,
    add_signature,
    copy_of,
    delegated_roles,
    delegation_of,
    highest,
    signed_by,
)
from edgekit.schema.base import Record


class Waiting(Record, frozen=True, kw_only=True):
    """A change that is not published yet, and why."""

    role: str
    version: int
    signed: tuple[str, ...]
    """Key ids that have signed."""
    unsigned: tuple[str, ...]
    """Key ids that may still sign."""
    missing: int
    """How many more signatures it needs."""
    reason: str


@dataclass(frozen=True)
class Settled:
    """What became visible, and what waits."""

    published: tuple[str, ...]
    waiting: tuple[Waiting, ...]


def _words(missing: int) -> str:
    return f"{missing} more signature{'' if missing == 1 else 's'}" if missing > 0 else "is signed, waits for another change"


@dataclass
class Workbench:
    """The changes that are under way on top of the visible metadata. The caller holds the repository's lock."""

    store: Store
    chain: Chain
    now: datetime
    pending: dict[str, Metadata[Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, store: Store, *, now: datetime, is_log_checked: bool = True) -> Workbench:
        """Take up what is under way.

        Args:
            store: the repository.
            now: the time, UTC.
            is_log_checked: refuse to go on from an audit log that is not the one that the signed snapshot knows. Signing the
                timestamp again needs no log: devices shall not lose their repository because its books were damaged.

        Raises:
            TrustError: ``audit.cut``, ``audit.broken``; and as :meth:`Store.chain`.
        """
        chain = store.chain(is_to_be_extended=True)
        pending = store.pending()
        visible = {"root": chain.root.version, "targets": chain.targets.version}
        visible |= {role: targets.version for role, targets in chain.delegated.items()}
        top: Targets = pending["targets"].signed if "targets" in pending else chain.targets
        known = {"root", "targets", *delegated_roles(top), *delegated_roles(chain.targets)}
        stale = [
            role for role, metadata in pending.items() if metadata.signed.version <= visible.get(role, 0) or role not in known
        ]
        bench = cls(store, chain, now, {role: item for role, item in pending.items() if role not in stale})
        bench._is_interrupted = "root" in stale
        bench._stale = stale
        if is_log_checked:
            bench.check_log()
        return bench

    def check_log(self) -> None:
        """Compare the audit log with what the signed snapshot says of it.

        Raises:
            TrustError: ``audit.cut``, ``audit.broken``.
        """
        check_anchor(read_log(self.store.folder), self.chain.snapshot.unrecognized_fields.get(SNAPSHOT_FIELD))

    _is_interrupted: bool = False
    """A new root became visible, and the rest of its publication did not."""
    _stale: list[str] = field(default_factory=list)

    # --- making changes

    def root(self) -> Root:
        """The root to change; what was signed of an earlier form of this change has to be signed again."""
        signed: Root = self._edit("root", self.chain.root)
        return signed

    def targets(self, role: str = "targets") -> Targets:
        """A targets role to change, new where it is delegated to and does not exist yet."""
        signed: Targets = self._edit(role, self.chain.targets if role == "targets" else self.chain.delegated.get(role))
        return signed

    def look(self, role: str = "targets") -> Targets | None:
        """A targets role as it is or will be, not to be changed."""
        if role in self.pending:
            signed: Targets = self.pending[role].signed
            return signed
        return self.chain.targets if role == "targets" else self.chain.delegated.get(role)

    def _edit(self, role: str, visible: Root | Targets | None) -> Any:
        """A version above every one that was ever written; nothing of it is signed yet."""
        base = self.pending[role].signed if role in self.pending else deepcopy(visible or Targets())
        base.version = max(visible.version if visible else 0, highest(self.store.metadata, role)) + 1
        base.expires = self.store.expires(role, self.now)
        self.pending[role] = Metadata(base)
        return base

    def discard(self, role: str) -> None:
        """Give a change up."""
        self.pending.pop(role, None)
        self._stale.append(role)

    # --- signing

    def delegation(self, role: str) -> Delegation:
        """Who must sign a pending change, by what will be visible with it.

        Raises:
            UsageError: ``trust.no_role``.
        """
        root = self.pending["root"].signed if "root" in self.pending else self.chain.root
        delegator = root if role in {"root", "targets", "snapshot", "timestamp"} else self.look("targets")
        try:
            return delegation_of(delegator, role)  # type: ignore[arg-type]
        except ValueError as error:
            raise UsageError(
                "trust.no_role", f"{role}: no such role in this repository.", hint='See "edgekit trust status".'
            ) from error

    def wanted(self) -> dict[str, Key]:
        """Every key whose signature some pending change may use."""
        keys: dict[str, Key] = {}
        for role in self.pending:
            keys |= self.delegation(role).keys
            if role == "root":
                keys |= delegation_of(self.chain.root, "root").keys
        return keys

    def sign(self, signers: Mapping[str, RoleSigner], *, role: str = "") -> tuple[str, ...]:
        """Add signatures to the pending changes of one role, or of all.

        Returns:
            The roles that got a signature.

        Raises:
            TrustError: ``trust.foreign_key`` when a role is named and none of the keys may sign it.
        """
        done = []
        for name, metadata in self.pending.items():
            if role and name != role:
                continue
            allowed = self.delegation(name).keys
            if name == "root":
                allowed = {**delegation_of(self.chain.root, "root").keys, **allowed}
            mine = [signer for keyid, signer in signers.items() if keyid in allowed]
            for signer in mine:
                add_signature(metadata, signer)
            if mine:
                done.append(name)
        if role and role not in done:
            raise TrustError(
                "trust.foreign_key",
                f"{role}: none of the given keys may sign it.",
                hint='"edgekit trust status" says whose signatures are waited for.',
            )
        return tuple(done)

    # --- publishing

    def settle(self, entry: AuditEntry | None = None, *, is_refresh: bool = False) -> Settled:
        """Publish what has its signatures; keep the rest.

        Args:
            entry: the newest entry of the audit log, for the snapshot.
            is_refresh: sign snapshot and timestamp again even if nothing else changed.

        Raises:
            UsageError: ``repository.no_key`` when something could be published, or is to be refreshed, and the keys of
                snapshot and timestamp are not at hand.
        """
        root = self._new_root()
        ready, waiting = self._ready_targets(root or self.chain.root)
        if root is not None and not self._is_root_ready(root, ready):
            self._resign_for(root)
            ready, waiting = self._ready_targets(root)
            if not self._is_root_ready(root, ready):
                waiting.append(self.waiting_for("root", "waits until the targets are signed by the keys of the new root"))
                root = None
                ready, more = self._ready_targets(self.chain.root)
                waiting += more
        self._publish(root, ready, entry, is_refresh=is_refresh)
        for role, metadata in self.pending.items():
            self.store.save_pending(role, metadata)
        left = {item.role: item for item in reversed(waiting) if item.role in self.pending}
        found = [left.get(role) or self.waiting_for(role, "") for role in self.pending]
        return Settled((*(["root"] if root else []), *sorted(ready)), tuple(found))

    def _new_root(self) -> Root | None:
        """The pending root, when the old root's keys and its own have signed it."""
        metadata = self.pending.get("root")
        if metadata is None:
            return None
        signed: Root = metadata.signed
        is_met = all(delegation_of(root, "root").is_met(metadata) for root in (self.chain.root, signed))
        return signed if is_met else None

    def _ready_targets(self, root: Root) -> tuple[dict[str, Metadata[Any]], list[Waiting]]:
        """The pending targets roles that may become visible together under a root."""
        ready: dict[str, Metadata[Any]] = {}
        waiting: list[Waiting] = []
        top = self.pending.get("targets")
        if top is not None and delegation_of(root, "targets").is_met(top):
            ready["targets"] = top
        elif top is not None:
            waiting.append(self.waiting_for("targets", ""))
        if "targets" in ready:
            roles, faults = self._ready_delegated(top.signed)  # type: ignore[union-attr]
            blocking = [item.role for item in faults if not self._is_valid_under(top.signed, item.role)]  # type: ignore[union-attr]
            if not blocking:
                return ready | roles, faults
            waiting = [*faults, self.waiting_for("targets", f"waits for {', '.join(blocking)}")]
        roles, faults = self._ready_delegated(self.chain.targets)
        return roles, waiting + faults

    def _ready_delegated(self, targets: Targets) -> tuple[dict[str, Metadata[Any]], list[Waiting]]:
        ready: dict[str, Metadata[Any]] = {}
        faults: list[Waiting] = []
        for role in delegated_roles(targets):
            change = self.pending.get(role)
            if change is not None and delegation_of(targets, role).is_met(change):
                ready[role] = change
            elif change is not None:
                faults.append(self.waiting_for(role, ""))
            elif not self._is_valid_under(targets, role):
                self._edit(role, self.chain.delegated.get(role))
                self.sign(self.store.find_signers(delegation_of(targets, role).keys))
                again = self.pending[role]
                if delegation_of(targets, role).is_met(again):
                    ready[role] = again
                else:
                    faults.append(self.waiting_for(role, "its keys changed"))
        return ready, faults

    def _is_valid_under(self, targets: Targets, role: str) -> bool:
        """Whether what is visible of a delegated role stays valid with these targets."""
        visible = self.chain.delegated.get(role)
        if visible is None:
            return False
        path = self.store.metadata / f"{visible.version}.{role}.json"
        return delegation_of(targets, role).is_met(Metadata.from_bytes(path.read_bytes()))

    def _is_root_ready(self, root: Root, ready: Mapping[str, Metadata[Any]]) -> bool:
        """Whether the targets that will be visible are valid under the new root."""
        if "targets" in ready:
            return True
        path = self.store.metadata / f"{self.chain.targets.version}.targets.json"
        return delegation_of(root, "targets").is_met(Metadata.from_bytes(path.read_bytes()))

    def _resign_for(self, root: Root) -> None:
        """The targets once more, for the new root's keys to sign."""
        if "targets" not in self.pending:
            self._edit("targets", self.chain.targets)
        self.sign(self.store.find_signers(delegation_of(root, "targets").keys))

    def waiting_for(self, role: str, reason: str = "") -> Waiting:
        """What a pending change still needs."""
        metadata = self.pending[role]
        parts = [self.delegation(role)]
        if role == "root":
            parts.append(delegation_of(self.chain.root, "root"))
        signed: dict[str, Key] = {}
        unsigned: dict[str, Key] = {}
        missing = 0
        for part in parts:
            have = signed_by(part.keys, metadata)
            signed |= have
            unsigned |= {keyid: key for keyid, key in part.keys.items() if keyid not in have}
            missing = max(missing, part.threshold - len(have))
        return Waiting(
            role=role,
            version=metadata.signed.version,
            signed=tuple(signed),
            unsigned=tuple(keyid for keyid in unsigned if keyid not in signed),
            missing=max(0, missing),
            reason=reason or _words(missing),
        )

    def _publish(
        self, root: Root | None, ready: Mapping[str, Metadata[Any]], entry: AuditEntry | None, *, is_refresh: bool
    ) -> None:
        """Write what is ready, the timestamp last, then forget that it was pending.

        A role that is delegated to no more stays in the snapshot: devices refuse one that forgets a role (TUF 5.5.5).
        """
        if root is None and not ready and not is_refresh and not self._is_interrupted:
            self.store.drop_pending(self._stale)
            return
        effective = root or self.chain.root
        signers = {role: self._online_signers(effective, role, ready) for role in ("snapshot", "timestamp")}
        if root is not None:  # a power cut before the end must be known for one: see Store.chain
            for role in (*ready, "root"):
                self.store.save_pending(role, self.pending[role])
        snapshot, timestamp = copy_of(self.chain.snapshot), copy_of(self.chain.timestamp)
        for role, metadata in ready.items():
            name = f"{role}.json"
            data = self.store.write(f"{metadata.signed.version}.{name}", metadata)
            snapshot.meta[name] = MetaFile.from_data(metadata.signed.version, data, ["sha256"])
        if entry is not None:
            snapshot.unrecognized_fields[SNAPSHOT_FIELD] = anchor(entry)
        snapshot_data = self._sign_online(snapshot, signers["snapshot"])
        anchor_data = self._write_root(root) if root is not None else b""
        timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, snapshot_data, ["sha256"])
        self._sign_online(timestamp, signers["timestamp"])
        if root is not None or self._is_interrupted:
            newest = self.store.metadata / f"{effective.version}.root.json"
            self.store.save_anchor(anchor_data or newest.read_bytes())
        done = [*ready, *self._stale, *(["root"] if root else [])]
        self.store.drop_pending(done)
        for role in done:
            self.pending.pop(role, None)

    def _write_root(self, root: Root) -> bytes:
        return self.store.write(f"{root.version}.root.json", self.pending["root"])

    def _online_signers(self, root: Root, role: str, ready: Mapping[str, Metadata[Any]]) -> list[RoleSigner]:
        delegation = delegation_of(root, role)
        signers = self.store.find_signers(delegation.keys)
        if len(signers) >= delegation.threshold:
            return list(signers.values())
        for name, metadata in self.pending.items():
            self.store.save_pending(name, metadata)
        what = f"; signed and kept: {', '.join(sorted(ready))}" if ready else ""
        raise UsageError(
            "repository.no_key",
            f"{self.store.keys_dir}: no key for the role {role} that the root lists{what}.",
            hint=f'Run "edgekit trust refresh {self.store.folder}" where the keys of snapshot and timestamp are.',
        )

    def _sign_online(self, signed: Snapshot | Timestamp, signers: list[RoleSigner]) -> bytes:
        is_snapshot = isinstance(signed, Snapshot)
        role = "snapshot" if is_snapshot else "timestamp"
        used = highest(self.store.metadata, role) if is_snapshot else self.store.reserved_timestamp()
        signed.version = max(signed.version, used) + 1
        if not is_snapshot:
            self.store.reserve_timestamp(signed.version)
        signed.expires = self.store.expires(role, self.now)
        metadata: Metadata[Any] = Metadata(signed)
        for signer in signers:
            add_signature(metadata, signer)
        return self.store.write(f"{signed.version}.snapshot.json" if is_snapshot else "timestamp.json", metadata)
