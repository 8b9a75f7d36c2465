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


class Probation(Record, frozen=True, kw_only=True):
    """The active slot's model has not earned its place yet: what it did so far on live traffic, over all restarts."""

    slot: SlotName
    manifest: Digest
    counter: int
    starts: int = 0
    """Starts of the agent since, that no clean stop ended."""
    crashes: int = 0
    inferences: int = 0
    failures: int = 0
    bad_outputs: int = 0
    served_s: float = 0.0
    baseline_ms: float = 0.0
    """p95 of the model before; 0 when it did not answer enough."""


class Attempt(Record, frozen=True, kw_only=True):
    """An installation that is under way, and how often the device died in it before.

    ``size_bytes`` is what had been downloaded: a download that goes on after each power cut is no loop.
    """

    manifest: Digest
    phase: str
    interruptions: int = 0
    """Deaths in steps that load no model."""
    deaths: int = 0
    """In the self-test and after it."""
    size_bytes: int = 0


class Outcome(Record, frozen=True, kw_only=True):
    """What became of a release; it stays here until the report of it is on the disk. ``id`` lets a reader count it once."""

    id: str
    kind: Literal["committed", "rolled_back", "install_refused"]
    model: str
    version: str
    counter: int
    detail: str
    code: str = ""
    fields: dict[str, str | int | float | bool] = {}


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
    step: str = ""
    """Within the phase: ``precheck``, ``shadow``, ``probation``. A text: older agents skip it, and know the phases only."""
    probation: Probation | None = None
    attempt: Attempt | None = None
    outcomes: tuple[Outcome, ...] = ()
    desired_seq: int = 0
    """Of the desired state that this device accepted last."""
    scrubbed_at: datetime | None = None


Source = Literal["slot", "factory", "nothing"]


class ModelStatus(Record, frozen=True, kw_only=True):
    """One model of a running agent."""

    name: str
    channel: str
    state: AgentState
    serves: Source
    version: str = ""
    model_digest: Digest | None = None
    absence: str = ""
    last_error: str = ""
    last_error_code: str = ""


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
    models: tuple[ModelStatus, ...] = ()
    """All of them; ``state`` is the first one's."""
    instance: str = ""
    """Drawn at the agent's start: who asks sees that it is the one of that state folder."""
    paused_until: datetime | None = None
    """Updates wait until then."""
