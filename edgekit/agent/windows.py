"""One window of figures: the metric vector that the birth message declares, and its two latency sketches."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.agent.link import Figures
from edgekit.agent.vitals import MEGA, CpuMeter, disk_free_bytes, memory_free_bytes, rss_bytes, temperature_c
from edgekit.schema.message import MetricSpec, SketchSpec
from edgekit.telemetry.codec import pack_values
from edgekit.telemetry.histogram import BINS, LatencyHistogram

METRICS: tuple[MetricSpec, ...] = (
    MetricSpec(name="requests", kind="count"),
    MetricSpec(name="errors", kind="count"),
    MetricSpec(name="rejected", kind="count"),
    MetricSpec(name="samples", kind="count"),
    MetricSpec(name="out_of_range", kind="count"),
    MetricSpec(name="latency_p50_ms", unit="ms", kind="quantile"),
    MetricSpec(name="latency_p90_ms", unit="ms", kind="quantile"),
    MetricSpec(name="latency_p99_ms", unit="ms", kind="quantile"),
    MetricSpec(name="inference_p50_ms", unit="ms", kind="quantile"),
    MetricSpec(name="queue_p99_ms", unit="ms", kind="quantile"),
    MetricSpec(name="confidence_mean"),
    MetricSpec(name="cpu_percent", unit="%"),
    MetricSpec(name="rss_mb", unit="MB"),
    MetricSpec(name="load_1m"),
    MetricSpec(name="temperature_c", unit="°C"),
    MetricSpec(name="disk_free_mb", unit="MB"),
    MetricSpec(name="memory_free_mb", unit="MB"),
    MetricSpec(name="outbox_messages"),
    MetricSpec(name="outbox_bytes", unit="B"),
    MetricSpec(name="worker_restarts"),
    MetricSpec(name="uptime_s", unit="s"),
)
SKETCHES: tuple[SketchSpec, ...] = (
    SketchSpec(name="latency_ms", unit="ms", bins=BINS),
    SketchSpec(name="inference_ms", unit="ms", bins=BINS),
)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What is not counted by a worker."""

    pids: Sequence[int]
    state_dir: Path
    outbox_messages: int
    outbox_bytes: int
    worker_restarts: int
    uptime_s: float


def _merge(parts: Sequence[bytes]) -> LatencyHistogram:
    merged = LatencyHistogram()
    for data in parts:
        if data:
            merged.merge(LatencyHistogram.decode(data))
    return merged


def measure_window(figures: Sequence[Figures], around: Surroundings, cpu: CpuMeter) -> tuple[bytes, tuple[bytes, ...]]:
    """The packed metric vector in the order of ``METRICS``, and the sketches in the order of ``SKETCHES``.

    A quantile or a mean of nothing is NaN, a sketch of nothing is empty.
    """
    latency = _merge([part.latency for part in figures])
    inference = _merge([part.inference for part in figures])
    queue = _merge([part.queue for part in figures])
    confidences = sum(part.confidence_count for part in figures)

    def quantile(bins: LatencyHistogram, q: float) -> float:
        return bins.quantile(q) if bins.count else math.nan

    values = {
        "requests": sum(part.requests for part in figures),
        "errors": sum(part.errors for part in figures),
        "rejected": sum(part.rejected for part in figures),
        "samples": sum(part.samples for part in figures),
        "out_of_range": sum(part.out_of_range for part in figures),
        "latency_p50_ms": quantile(latency, 0.5),
        "latency_p90_ms": quantile(latency, 0.9),
        "latency_p99_ms": quantile(latency, 0.99),
        "inference_p50_ms": quantile(inference, 0.5),
        "queue_p99_ms": quantile(queue, 0.99),
        "confidence_mean": sum(part.confidence_sum for part in figures) / confidences if confidences else math.nan,
        "cpu_percent": cpu.take(around.pids),
        "rss_mb": sum(rss_bytes(pid) for pid in around.pids) / MEGA,
        "load_1m": os.getloadavg()[0],
        "temperature_c": temperature_c(),
        "disk_free_mb": disk_free_bytes(around.state_dir) / MEGA,
        "memory_free_mb": memory_free_bytes() / MEGA,
        "outbox_messages": around.outbox_messages,
        "outbox_bytes": around.outbox_bytes,
        "worker_restarts": around.worker_restarts,
        "uptime_s": around.uptime_s,
    }
    packed = pack_values([float(values[spec.name]) for spec in METRICS])
    return packed, tuple(bins.encode() if bins.count else b"" for bins in (latency, inference))
