"""The agent's durable state: slots, floors, refusals, and the intent that a power cut may interrupt."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

from edgekit.schema.base import SCHEMA_VERSION, Record
from edgekit.schema.digest import Digest
from edgekit.schema.release import Fallback, Recall

SlotName = Literal["a", "b"]
SlotStatus = Literal["empty", "staging", "verified", "active", "good", "bad"]
Phase = Literal["idle", "fetch", "stage", "verify", "selftest", "switch", "report"]


class Slot(Record, frozen=True, kw_only=True):
    """One of the two slots. ``path``s inside are fixed: ``slots/<name>/manifest.json`` and ``slots/<name>/blobs/<hex>``."""

    name: SlotName
    status: SlotStatus = "empty"
    model: str = ""
    version: str = ""
    counter: int = 0
    manifest: Digest | None = None
    model_digest: Digest | None = None
    variant: str = ""
    """The variant that the device took."""
    valid_until: datetime | None = None
    fallback: Fallback = "report"
    """What the device does from ``valid_until`` on."""


class Refusal(Record, frozen=True, kw_only=True):
    """A release that this device refused, and why; it is not tried again."""

    model: str
    version: str
    counter: int
    manifest: Digest
    code: str
    reason: str
    at: datetime


class Floors(Record, frozen=True, kw_only=True):
    """Anti-rollback floors; they never decrease, except that a new root version resets the online roles and targets.

    ``releases`` maps a model's name to its highest committed release counter; ``time`` is the latest verified time;
    ``delegated`` has the versions of delegated targets roles.
    """

    root: int = 0
    timestamp: int = 0
    snapshot: int = 0
    targets: int = 0
    releases: dict[str, int] = {}
    time: datetime | None = None
    delegated: dict[str, int] = {}


class AgentState(Record, frozen=True, kw_only=True):
    """Everything that must survive a power cut. One JSON file, replaced atomically."""

    device: str
    slots: tuple[Slot, Slot] = msgspec.field(default_factory=lambda: (Slot(name="a"), Slot(name="b")))
    active: SlotName | None = None
    floors: Floors = msgspec.field(default_factory=Floors)
    refusals: tuple[Refusal, ...] = ()
    recalls: tuple[Recall, ...] = ()
    failed_deltas: tuple[Digest, ...] = ()
    """Deltas that did not give what they promised here; they are not tried again."""
    phase: Phase = "idle"
    intent: str = ""
    """What the phase was about, for people and for recovery: ``<model>@<version>#<counter>``."""
    attempts: int = 0
    """Self-tests of the intent that were begun: a device that dies in each of them must stop trying."""
    schema_version: int = SCHEMA_VERSION


class AgentStatus(Record, frozen=True, kw_only=True):
    """What ``edgekit agent status`` shows: the running agent's own view, served on its loopback port."""

    state: AgentState
    pid: int
    site: str
    started_at: datetime
    uptime_s: float
    url: str
    is_broker_connected: bool
    outbox_messages: int
    outbox_bytes: int
    last_refresh_at: datetime | None
    last_error: str
    requests: int
    errors: int
    rss_mb: float
