"""One window of figures: the metric vector that the birth message declares, latency sketches, and what each model counted."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgekit.agent.link import Figures
from edgekit.agent.vitals import MEGA, CpuMeter, disk_free_bytes, memory_free_bytes, rss_bytes, temperature_c
from edgekit.counts import merge_counts
from edgekit.schema.message import MetricSpec, ModelWindow, SketchSpec
from edgekit.telemetry.codec import pack_values, schema_crc
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


SCHEMA = schema_crc(METRICS, SKETCHES)
DIGEST_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A window's figures: the packed vector in the order of ``METRICS``, sketches in the order of ``SKETCHES``, models."""

    values: bytes
    sketches: tuple[bytes, ...]
    models: tuple[ModelWindow, ...] = ()


def merge_latencies(parts: Sequence[bytes]) -> LatencyHistogram:
    """The histogram of all that some encoded ones counted."""
    merged = LatencyHistogram()
    for data in parts:
        if data:
            merged.merge(LatencyHistogram.decode(data))
    return merged


def _quantile(bins: LatencyHistogram, q: float) -> float:
    return bins.quantile(q) if bins.count else math.nan


def read_quantiles(sketches: Sequence[bytes]) -> dict[str, float]:
    """The quantiles that a window's vector has of its sketches; NaN of nothing."""
    latency, inference = (LatencyHistogram.decode(part) for part in (*sketches, b"", b"")[:2])
    return {
        "latency_p50_ms": _quantile(latency, 0.5),
        "latency_p90_ms": _quantile(latency, 0.9),
        "latency_p99_ms": _quantile(latency, 0.99),
        "inference_p50_ms": _quantile(inference, 0.5),
    }


def measure_window(figures: Sequence[Figures], around: Surroundings, cpu: CpuMeter) -> Measured:
    """The figures of one window. A quantile or a mean of nothing is NaN, a sketch of nothing is empty."""
    sketches = tuple(merge_latencies([getattr(part, name) for part in figures]).encode() for name in ("latency", "inference"))
    confidences = sum(part.confidence_count for part in figures)
    values = {
        "requests": sum(part.requests for part in figures),
        "errors": sum(part.errors for part in figures),
        "rejected": sum(part.rejected for part in figures),
        "samples": sum(part.samples for part in figures),
        "out_of_range": sum(part.out_of_range for part in figures),
        **read_quantiles(sketches),
        "queue_p99_ms": _quantile(merge_latencies([part.queue for part in figures]), 0.99),
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
    return Measured(values=packed, sketches=sketches, models=model_windows(figures))


def model_windows(figures: Sequence[Figures]) -> tuple[ModelWindow, ...]:
    """What each model did, merged over the workers that served it; a model that did nothing is left out."""
    groups: dict[tuple[str, int], list[ModelWindow]] = {}
    for part in figures:
        if part.model_digest and (part.requests or part.labelled or part.verdicts):
            groups.setdefault((part.model_digest, part.profile), []).append(_model_window(part))
    models = tuple(merge_models(parts) for parts in groups.values())
    if len(models) == 1:  # the window's own sketch says the same
        return (msgspec.structs.replace(models[0], latency=b""),)
    return models


def _model_window(part: Figures) -> ModelWindow:
    return ModelWindow(
        model_digest=part.model_digest.removeprefix("sha256:")[:DIGEST_DIGITS],
        profile=part.profile,
        requests=part.requests,
        samples=part.samples,
        sketched=part.sketched,
        sketches=part.sketches,
        latency=part.latency,
        errors=part.errors,
        rejected=part.rejected,
        verdicts=part.verdicts,
        labelled=part.labelled,
        right=part.right,
    )


def merge_models(parts: Sequence[ModelWindow]) -> ModelWindow:
    """One model's figures of several windows, or of several workers, as one.

    Raises:
        ArtifactError: ``telemetry.malformed``.
    """
    if len(parts) == 1:
        return parts[0]
    verdicts: dict[str, int] = {}
    for part in parts:
        for key, number in part.verdicts.items():
            verdicts[key] = verdicts.get(key, 0) + number
    return ModelWindow(
        model_digest=parts[0].model_digest,
        profile=parts[0].profile,
        requests=sum(part.requests for part in parts),
        samples=sum(part.samples for part in parts),
        sketched=sum(part.sketched for part in parts),
        sketches=tuple(
            merge_counts([part.sketches[place] for part in parts if len(part.sketches) > place])
            for place in range(max(len(part.sketches) for part in parts))
        ),
        latency=merge_latencies([part.latency for part in parts]).encode(),
        errors=sum(part.errors for part in parts),
        rejected=sum(part.rejected for part in parts),
        verdicts=verdicts,
        labelled=sum(part.labelled for part in parts),
        right=sum(part.right for part in parts),
    )
