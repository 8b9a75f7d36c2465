"""A signal: one figure about some part of the fleet, now. Every part of the server offers its own; rules watch them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from edgekit.schema.base import Record

SIGNALS: dict[str, str] = {
    "device.offline": "share of devices whose connection was lost; labels site",
    "device.silent": "share of devices that are connected and say nothing; labels site",
    "install.failed_share": "share of the devices that tried a release and failed, in the last day; labels model, version",
    "rolled_back.share": "share of the devices that had a release and went back from it, last day; labels model, version",
    "latency.p95_ms": "95th percentile of the last 15 minutes; labels model, version",
    "error.share": "failed requests in the last 15 minutes; labels model, version",
    "rejected.share": "requests that the input contract refused in the last 15 minutes; labels model, version",
    "outbox.messages": "most messages that wait on a device's disk; labels site",
    "loss.missing": "messages that are known to be missing; labels site",
    "ingest.lag_s": "how far storing is behind receiving; no labels",
    "delivery.failed": "deliveries that were given up in the last hour; no labels",
    "job.failed": "a background job that failed at its last turn; labels job",
    "drift.effect": "effect of input drift; labels model, stream, slice",
    "drift.evidence": "log evidence of input drift over its bound; labels model, stream, slice",
    "prediction_drift": "effect of drift in the answers; labels model, slice",
    "accuracy.estimated": "estimated before labels come; labels model, slice",
    "accuracy.realised": "of answers whose label came; labels model, slice",
    "accuracy.gap": "realised less estimated; labels model, slice",
    "contract.violations": "share of inputs with a verdict; labels model",
    "missing.share": "share of missing values; labels model, stream",
    "saturation.share": "share of values beyond the reference's range; labels model, stream",
    "rollout.halted": "1 while a rollout is halted or goes back; labels model, version, rollout",
    "rollout.stalled": "1 while a rollout waits for longer than its deadline; labels model, version, rollout",
}
"""The names that rules may watch."""
LABELS = ("site", "device", "group", "model", "version", "stream", "slice", "rollout", "job")
Comparison = Literal["above", "below"]


class Signal(Record, frozen=True, kw_only=True):
    """One figure; ``samples`` is on how much it rests, ``evidence`` is for people."""

    name: str
    value: float
    samples: int = 1
    labels: dict[str, str] = {}
    time_ms: int = 0
    evidence: dict[str, str | float] = {}


Source = Callable[[int], Iterable[Signal]]
"""Given the time, the signals of one part of the server."""
