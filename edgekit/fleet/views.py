"""What the fleet server shows: the records of ``/api/v1`` and of the pages.

Times are Unix milliseconds, UTC. A figure that nobody reported is null.
"""

from __future__ import annotations

from typing import Literal

from edgekit.schema.base import Record

DeviceState = Literal["online", "offline", "stale"]
"""``online``: connected; ``stale``: connected as far as the broker knows, but silent; ``offline``: its will was published."""


class SlotView(Record, frozen=True, kw_only=True):
    """One slot of a device."""

    name: str
    status: str
    model: str
    version: str
    counter: int
    model_digest: str
    manifest_digest: str


class GapView(Record, frozen=True, kw_only=True):
    """Stored messages of a device: received, of these late (from its spool), and known to be missing.

    ``lost`` are those that the device said it gave up, ``missing`` those that nobody can explain yet. ``merged`` of the
    received ones came as part of another window: nothing is lost but their resolution.
    """

    received: int = 0
    late: int = 0
    missing: int = 0
    lost: int = 0
    merged: int = 0


class ModelView(Record, frozen=True, kw_only=True):
    """What one model did on a device in the last day; ``right`` of the ``labelled`` predictions were right."""

    model_digest: str
    """First 12 hex digits."""
    requests: int = 0
    errors: int = 0
    rejected: int = 0
    samples: int = 0
    sketched: int = 0
    labelled: int = 0
    right: int = 0


class DeviceView(Record, frozen=True, kw_only=True):
    """One device in a list; figures are of its newest window."""

    site: str
    device: str
    state: DeviceState
    last_seen_ms: int
    model: str = ""
    version: str = ""
    counter: int = 0
    model_digest: str = ""
    """First 12 hex digits."""
    latency_p50_ms: float | None = None
    latency_p99_ms: float | None = None
    throughput_per_s: float | None = None
    requests: int | None = None
    errors: int | None = None
    cpu_percent: float | None = None
    rss_mb: float | None = None
    outbox_messages: int | None = None
    last_error: str = ""
    last_error_code: str = ""
    refused: int = 0
    """How many releases it refuses."""
    sparkline: tuple[float | None, ...] = ()
    """p50 latency of the last windows, oldest first."""
    agent_version: str = ""
    arch: str = ""
    cpu: str = ""
    labels: dict[str, str] = {}


class EventView(Record, frozen=True, kw_only=True):
    """Something that a device reported."""

    id: int
    site: str
    device: str
    time_ms: int
    kind: str
    detail: str = ""
    code: str = ""
    model: str = ""
    version: str = ""
    counter: int = 0


class DeviceDetail(Record, frozen=True, kw_only=True):
    """Everything of one device but its series."""

    device: DeviceView
    slots: tuple[SlotView, ...]
    active: str
    phase: str
    gaps: GapView
    events: tuple[EventView, ...]
    metrics: tuple[tuple[str, str], ...]
    """Name and unit of each metric that has a series."""
    isa: tuple[str, ...] = ()
    cores: int = 0
    ram_mb: float = 0.0
    os: str = ""
    runtime: str = ""
    runtime_version: str = ""
    clock: str = ""
    url: str = ""
    boot: str = ""
    booted_ms: int = 0
    latency_histogram: tuple[tuple[float, float, int], ...] = ()
    """Lower and upper bound in ms, and count, of the last hour's requests."""
    refused_messages: int = 0
    """Messages on its topics that were malformed, or held what cannot be stored."""
    last_refused: str = ""
    """Why, for the last of them."""
    models: tuple[ModelView, ...] = ()


class Series(Record, frozen=True, kw_only=True):
    """One metric over time; points are (time, value), oldest first. Points in one resolution step are averaged."""

    metric: str
    unit: str
    points: tuple[tuple[int, float | None], ...]


class ReleaseView(Record, frozen=True, kw_only=True):
    """A model version and how many devices serve it, and refuse it."""

    model: str
    version: str
    counter: int
    model_digest: str
    serving: int
    refusing: int
    sites: dict[str, int] = {}
    """How many devices serve it, by site."""


class Attention(Record, frozen=True, kw_only=True):
    """Something that needs a person: ``severity`` first, newest first.

    What several devices say of one release is one item: ``devices`` counts them, ``site`` and ``device`` name the newest.
    """

    severity: Literal["critical", "warning"]
    site: str
    device: str
    title: str
    detail: str
    time_ms: int
    devices: int = 1
    kind: str = ""
    """The events' kind, when events say so."""


class FleetView(Record, frozen=True, kw_only=True):
    """The overview."""

    now_ms: int
    online: int
    offline: int
    stale: int
    requests_per_s: float
    errors: int
    releases: tuple[ReleaseView, ...]
    attention: tuple[Attention, ...]
    outdated: int = 0
    """Devices that serve an older release of a model than another device does."""
    refusing: int = 0
    """Devices that refused an installation in the last day."""


class DevicePage(Record, frozen=True, kw_only=True):
    """A page of the device list; ``next`` and ``previous`` are cursors of the pages beside it, empty at the ends."""

    devices: tuple[DeviceView, ...]
    total: int
    next: str = ""
    previous: str = ""


class EventPage(Record, frozen=True, kw_only=True):
    """A page of events, newest first; ``next`` is the id to ask before."""

    events: tuple[EventView, ...]
    next: int | None = None


class IngestStatus(Record, frozen=True, kw_only=True):
    """How the ingest is doing."""

    is_broker_connected: bool
    broker: str
    received: int
    stored: int
    duplicates: int
    malformed: int
    last_malformed: str = ""
    windows: int = 0
    """Windows among the stored."""
    waiting: int = 0
    """Messages that are here and not yet in the database."""
    lag_s: float = 0.0
    """How long the oldest of them has waited."""
    is_held_back: bool = False
    """The broker has sent all that it may: more waits there until the database has taken these."""
    reconnects: int = 0
    last_error: str = ""
    """Why the broker or the database was last not to be used; empty while both are."""


class Health(Record, frozen=True, kw_only=True):
    """``/api/v1/health``."""

    is_healthy: bool
    version: str
    uptime_s: float
    ingest: IngestStatus
