"""What the fleet wants this device to run: each signed desired state is verified, kept durably, and then decides.

Accepted is only what :func:`edgekit.trust.desired.verify_desired` accepts. The envelope is written before its number is, and is
verified again at each start. A desired state that has expired begins nothing new; what serves goes on serving.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from edgekit.agent.config import AgentConfig
from edgekit.agent.journal import Journal
from edgekit.agent.state_store import StateStore
from edgekit.agent.updater import Choice
from edgekit.durable import PRIVATE_FILE, write_durably
from edgekit.errors import EdgekitError, TrustError
from edgekit.schema.desired import DesiredModel, DesiredState
from edgekit.schema.release import Release
from edgekit.trust.desired import select_release, verify_desired
from edgekit.trust.floors import reference_time
from edgekit.trust.keys import PublicKey, load_public_keys

logger = logging.getLogger(__name__)

ENVELOPE_FILE = "desired.dsse.json"
_SHARE_BITS = 64


def jitter_share(device: str, manifest: str) -> float:
    """This device's place, 0..1, in the span over which a release is spread."""
    digest = hmac.new(device.encode(), manifest.encode(), hashlib.sha256).digest()
    return float(int.from_bytes(digest[: _SHARE_BITS // 8]) / (1 << _SHARE_BITS))


def starts_at(state: DesiredState, manifest: str) -> datetime:
    """When this device may begin with a release."""
    first = max(state.issued_at, state.policy.not_before or state.issued_at)
    return first + timedelta(seconds=state.policy.jitter_s * jitter_share(state.device, manifest))


@dataclass
class DesiredDesk:
    """Takes desired states in and answers what may be installed now. Used from the loop's thread."""

    config: AgentConfig
    store: StateStore
    journal: Journal
    keys: tuple[PublicKey, ...]
    on_change: Callable[[], None] = lambda: None
    state: DesiredState | None = None
    _seen: bytes = b""
    _told: set[tuple[int, str, str]] = field(default_factory=set)

    @classmethod
    def open(cls, config: AgentConfig, store: StateStore, journal: Journal) -> DesiredDesk:
        """With what was accepted before; an envelope that does not verify any more is not acted on.

        Raises:
            UsageError: a key file is damaged.
        """
        desk = cls(config, store, journal, load_public_keys(Path(config.fleet_keys)))
        try:
            data = (config.state_path / ENVELOPE_FILE).read_bytes()
        except OSError:
            return desk
        try:
            state = desk._verify(data, last_seq=-1, now=desk._now())
        except EdgekitError as error:
            if error.code != "desired.expired":
                logger.warning("event=desired_dropped code=%s error=%r", error.code, error.message)
            return desk
        desk.state, desk._seen = state, data
        if state.seq > store.state.desired_seq:  # the number was lost with the state, or the power went in between
            store.update(desired_seq=state.seq)
        return desk

    def _now(self) -> datetime:
        return reference_time(self.store.state.floors, datetime.now(UTC))

    def _verify(self, data: bytes, *, last_seq: int, now: datetime) -> DesiredState:
        threshold = self.config.fleet_threshold
        return verify_desired(data, self.keys, device=self.config.device, last_seq=last_seq, now=now, threshold=threshold)

    def take(self, data: bytes) -> bool:
        """A desired state arrived. A broker sends the retained one again at each connection: that is no news.

        Returns:
            Whether it was accepted.
        """
        if data == self._seen or not data:
            return False
        self._seen = data
        try:
            state = self._verify(data, last_seq=self.store.state.desired_seq, now=self._now())
            write_durably(self.config.state_path / ENVELOPE_FILE, data, mode=PRIVATE_FILE)
            self.store.update(desired_seq=state.seq)
        except EdgekitError as error:
            self.journal.event("desired_refused", error.message, code=error.code)
            return False
        except OSError as full:
            self._seen = b""
            self.journal.event("desired_refused", f"{full}; it is taken when it comes again", code="device.disk_error")
            return False
        self.state = state
        names = ", ".join(f"{name} {model.counter}" for name, model in sorted(state.models.items()))
        self.journal.event("desired_accepted", f"seq {state.seq}: {names or 'no model'}", fields={"seq": state.seq})
        self.on_change()
        return True

    def choose(self, model: str, releases: Sequence[Release]) -> Choice:
        """What may be installed of a model now; nothing without a desired state that holds."""
        nothing = Choice(releases=())
        state, now = self.state, self._now()
        if state is None or model not in state.models:
            return nothing
        if now >= state.expires_at:
            self._tell(model, TrustError("desired.expired", f"the desired state expired at {state.expires_at.isoformat()}."))
            return nothing
        try:
            release = select_release(state, releases, model)
        except TrustError as error:
            self._tell(model, error)
            return nothing
        wait = (starts_at(state, release.manifest_digest) - now).total_seconds()
        if wait > 0:
            return Choice(releases=(), wait_s=wait)
        return Choice(releases=(release,), policy=state.policy)

    def wanted(self, model: str) -> DesiredModel | None:
        """What the desired state says of a model, while it holds."""
        if self.state is None or self._now() >= self.state.expires_at:
            return None
        return self.state.models.get(model)

    def wants(self, model: str, manifest: str) -> bool:
        """Whether a release is still what is desired."""
        wanted = self.state.models.get(model) if self.state else None
        return wanted is not None and wanted.manifest == manifest

    def _tell(self, model: str, error: TrustError) -> None:
        """Once for each desired state, model and reason."""
        key = (self.state.seq if self.state else 0, model, error.code)
        if key not in self._told:
            self._told.add(key)
            self.journal.event("desired_refused", error.message, code=error.code)
