"""What a rollout is, what is known of its devices, and what is shown of it. Times are Unix milliseconds, UTC."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgekit.schema.base import Record
from edgekit.schema.desired import UpdatePolicy

RolloutState = Literal["running", "paused", "halted", "rolling_back", "rolled_back", "cancelled", "done"]
"""``halted``: no further device gets it; those that have it keep it. ``rolled_back``: every device that could went back."""
OPEN_STATES: tuple[RolloutState, ...] = ("running", "paused", "halted", "rolling_back")
DeviceStage = Literal["waiting", "asked", "committed", "failed", "reverting", "reverted"]
"""``asked``: its desired state names the release; ``failed``: it refused, failed or rolled back; ``reverting``: asked back."""
GateMetric = Literal["latency_p95_ratio", "latency_p95_ms", "error_share", "rejected_share", "score_psi", "critical_alerts"]
Comparison = Literal["<", "<=", ">", ">="]
GateVerdict = Literal["ok", "violated", "unknown"]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
MINUTE_MS = 60_000


class Wave(Record, frozen=True, kw_only=True):
    """A part of the devices: the first ``count`` of them, or all whose fixed random value lies below ``share``."""

    name: str
    share: Share = 0.0
    count: int = 0


class Gate(Record, frozen=True, kw_only=True):
    """What must hold before the next wave begins; measured on the devices that committed the release."""

    metric: GateMetric
    comparison: Comparison
    limit: float
    min_samples: int = 1

    def __str__(self) -> str:
        return f"{self.metric} {self.comparison} {self.limit:g}"

    def holds(self, value: float) -> bool:
        """Whether a value is within the limit."""
        match self.comparison:
            case "<":
                return value < self.limit
            case "<=":
                return value <= self.limit
            case ">":
                return value > self.limit
            case ">=":
                return value >= self.limit


class RolloutSpec(Record, frozen=True, kw_only=True):
    """What is asked for.

    ``max_failed`` is the share of the devices of the waves begun so far that may fail: one more halts the rollout.
    ``required_success`` is the share of a wave's devices that must have committed before it is passed; a device that says
    nothing has not. ``deadline_ms`` after it was asked a device that has not answered is silent.
    """

    model: str
    version: str
    counter: int
    manifest: str
    selector: str
    waves: tuple[Wave, ...]
    gates: tuple[Gate, ...] = ()
    soak_ms: int = 30 * MINUTE_MS
    deadline_ms: int = 24 * 60 * MINUTE_MS
    max_failed: Share = 0.02
    required_success: Share = 0.95
    is_rolled_back_on_halt: bool = True
    needs_approval: bool = False
    policy: UpdatePolicy = UpdatePolicy()
    max_batch: int = 1000
    """Devices that are asked at one turn at most."""


class Progress(Record, frozen=True, kw_only=True):
    """Where a rollout stands."""

    state: RolloutState = "running"
    wave: int = 0
    wave_began_ms: int = 0
    soaking_since_ms: int = 0
    """Since when enough of the wave's devices have committed; 0: not yet."""
    forgiven: int = 0
    """Failures that a person saw and let pass when the rollout was resumed."""
    approved: int = 0
    """Waves that a person let begin, where that is asked for."""
    reason: str = ""
    thresholds: tuple[float, ...] = ()
    """Random value below which a device belongs to each wave, fixed when the rollout began."""


class DeviceProgress(Record, frozen=True, kw_only=True):
    """One device of a rollout: what the server did, and what the device said since."""

    device_id: int
    site: str
    device: str
    position: float
    """Its fixed random value in [0, 1) for this release."""
    stage: DeviceStage = "waiting"
    asked_ms: int = 0
    detail: str = ""


class GateReading(Record, frozen=True, kw_only=True):
    """A gate as it was measured; ``value`` is null where nobody reported enough."""

    gate: Gate
    verdict: GateVerdict
    value: float | None = None
    control: float | None = None
    """The same of devices that do not have the release yet."""
    samples: int = 0


class WaveView(Record, frozen=True, kw_only=True):
    """A wave's devices by what became of them."""

    name: str
    devices: int
    waiting: int = 0
    pending: int = 0
    """Asked, and still within the deadline."""
    silent: int = 0
    committed: int = 0
    failed: int = 0
    reverted: int = 0


class RolloutView(Record, frozen=True, kw_only=True):
    """A rollout as people see it."""

    id: int
    spec: RolloutSpec
    progress: Progress
    waves: tuple[WaveView, ...]
    gates: tuple[GateReading, ...] = ()
    devices: int = 0
    allowed_failures: int = 0
    """Of the waves begun so far; one more halts it."""
    created_ms: int = 0
    created_by: str = ""
    updated_ms: int = 0
    waits_for: str = ""
    """What it waits for, in words."""


class RolloutDevicePage(Record, frozen=True, kw_only=True):
    """Devices of a rollout, by site and name."""

    devices: tuple[DeviceProgress, ...]
    total: int
    next: str = ""


class DryRun(Record, frozen=True, kw_only=True):
    """What a rollout would do: the devices of each wave, by name."""

    spec: RolloutSpec
    waves: tuple[tuple[str, ...], ...]
    has_it: tuple[str, ...] = ()
    """Devices that run the release already."""
    allowed_failures: tuple[int, ...] = ()
    """Failures up to the end of each wave that do not halt it."""
