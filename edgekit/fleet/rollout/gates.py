"""What the gates measure: devices that committed the release beside those that do not have it yet, over the same time.

What drifts in the world drifts for both, so that the difference is the release's. A gate without enough samples is unknown, and
unknown passes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import msgspec
import numpy as np
from sqlalchemy import ColumnElement, Connection, and_, func, select

from edgekit.errors import ArtifactError
from edgekit.fleet import tables
from edgekit.fleet.rollout.records import Gate, GateReading, GateVerdict
from edgekit.fleet.rollout.tables import rollout_devices
from edgekit.monitor.compare import compare
from edgekit.monitor.sketch import CONFIDENCE_BINS, cells_of, decode_counts
from edgekit.schema.baseline import ReferenceProfile
from edgekit.telemetry.histogram import LatencyHistogram

MAX_ROWS = 20_000
"""Windows that are merged for one figure; the newest count."""
MIN_CONTROL = 30
RELATIVE = frozenset({"latency_p95_ratio", "score_psi"})
PERCENTILE = 95

Profiles = Callable[[int], ReferenceProfile | None]
"""The reference profile with a CRC-32."""


@dataclass
class Figures:
    """What a set of devices reported of one model."""

    requests: int = 0
    errors: int = 0
    rejected: int = 0
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    classes: dict[int, np.ndarray] = field(default_factory=dict)
    """Answers by predicted class, for each number of classes."""

    @property
    def latencies(self) -> int:
        """Requests whose latency is known."""
        return sum(self.latency.counts.values())


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def collect(connection: Connection, of: ColumnElement[bool], *, model: str, since_ms: int, profiles: Profiles) -> Figures:
    """The figures of devices for a model since a time.

    Args:
        connection: to read by.
        of: which rows of ``device_models``.
        model: the model's name.
        since_ms: windows that begin before are left out.
        profiles: to read sketches by.
    """
    serves, row, window = tables.device_models.c, tables.model_windows.c, tables.windows.c
    statement = (
        select(row.requests, row.errors, row.rejected, row.latency, row.profile, row.sketches, window.sketches.label("whole"))
        .join(tables.device_models, and_(serves.device_id == row.device_id, serves.model_digest == row.model_digest))
        .outerjoin(tables.windows, and_(window.device_id == row.device_id, window.boot == row.boot, window.seq == row.seq))
        .where(serves.model == model, of, row.start_ms >= since_ms)
        .order_by(row.start_ms.desc())
        .limit(MAX_ROWS)
    )
    found = Figures()
    for item in connection.execute(statement):
        found.requests += item.requests
        found.errors += item.errors
        found.rejected += item.rejected
        _add_latency(found, item.latency, item.whole)
        _add_classes(found, item.sketches, profiles(item.profile) if item.profile else None)
    return found


def _add_latency(found: Figures, own: bytes | None, whole: bytes | None) -> None:
    try:
        if own:
            found.latency.merge(LatencyHistogram.decode(own))
        elif whole:
            sketches = msgspec.msgpack.decode(whole, type=tuple[bytes, ...])
            found.latency.merge(LatencyHistogram.decode(sketches[0]))
    except (ArtifactError, msgspec.DecodeError, IndexError):
        return


def _add_classes(found: Figures, packed: bytes | None, profile: ReferenceProfile | None) -> None:
    """The predicted classes of a window, from the table of class by confidence."""
    if not packed or profile is None:
        return
    number = next((at for at, stream in enumerate(profile.streams) if stream.kind == "classes"), None)
    if number is None:
        return
    try:
        data = msgspec.msgpack.decode(packed, type=tuple[bytes, ...])[number]
        counts = decode_counts(data, cells=cells_of(profile.streams[number]))
    except (ArtifactError, msgspec.DecodeError, IndexError, ValueError):
        return
    by_class = counts.reshape(-1, CONFIDENCE_BINS).sum(axis=1)
    known = found.classes.get(len(by_class))
    found.classes[len(by_class)] = by_class if known is None else known + by_class


def members(rollout_id: int, stages: Sequence[str]) -> ColumnElement[bool]:
    """Rows of ``device_models`` of a rollout's devices in some stages."""
    row = rollout_devices.c
    return tables.device_models.c.device_id.in_(
        select(row.device_id).where(row.rollout_id == rollout_id, row.stage.in_(stages))
    )


def read_gate(gate: Gate, canary: Figures, control: Figures, *, critical_alerts: int) -> GateReading:
    """One gate from the figures."""
    value, beside, samples = _measure(gate, canary, control, critical_alerts)
    if value is None or samples < gate.min_samples:
        return GateReading(gate=gate, verdict="unknown", value=value, control=beside, samples=samples)
    verdict: GateVerdict = "ok" if gate.holds(value) else "violated"
    return GateReading(gate=gate, verdict=verdict, value=value, control=beside, samples=samples)


def pass_relative(readings: Sequence[GateReading]) -> tuple[GateReading, ...]:
    """Gates that compare with devices without the release, when none are left: the waves before would not have passed else."""
    return tuple(
        msgspec.structs.replace(reading, verdict="ok")
        if reading.verdict == "unknown" and reading.gate.metric in RELATIVE
        else reading
        for reading in readings
    )


def _measure(gate: Gate, canary: Figures, control: Figures, critical_alerts: int) -> tuple[float | None, float | None, int]:
    """Value, the control's, and samples."""
    match gate.metric:
        case "latency_p95_ms":
            return _p95(canary), _p95(control), canary.latencies
        case "latency_p95_ratio":
            mine, theirs = _p95(canary), _p95(control)
            is_known = mine is not None and theirs and control.latencies >= MIN_CONTROL
            return (mine / theirs if is_known and mine and theirs else None), theirs, canary.latencies
        case "error_share":
            return _share(canary.errors, canary.requests), _share(control.errors, control.requests), canary.requests
        case "rejected_share":
            return _share(canary.rejected, canary.requests), _share(control.rejected, control.requests), canary.requests
        case "score_psi":
            return _score_psi(canary, control)
        case "critical_alerts":
            return float(critical_alerts), None, max(1, gate.min_samples)
        case _:
            assert_never(gate.metric)


def _p95(figures: Figures) -> float | None:
    return figures.latency.quantile(PERCENTILE / 100) if figures.latencies else None


def _score_psi(canary: Figures, control: Figures) -> tuple[float | None, float | None, int]:
    """Distance of the predicted classes of both, where both have the same number of them."""
    common = [number for number in canary.classes if number in control.classes]
    if not common:
        return None, None, 0
    mine, theirs = canary.classes[common[0]], control.classes[common[0]]
    if not mine.sum() or theirs.sum() < MIN_CONTROL:
        return None, None, int(mine.sum())
    return compare(theirs.tolist(), mine.tolist()).psi, None, int(mine.sum())


def count_serving(connection: Connection, *, model: str, manifest: str) -> int:
    """How many devices serve a release."""
    row = tables.device_models.c
    statement = select(func.count()).where(row.model == model, row.manifest_digest == manifest)
    return connection.execute(statement).scalar() or 0
