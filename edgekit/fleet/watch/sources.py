"""The watch's signals for alert rules: what the newest intervals say, model by model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgekit.fleet.alerting.signals import Signal
from edgekit.fleet.watch import pages
from edgekit.fleet.watch.views import DriftPage, QualityPage, SliceView, StreamDrift

if TYPE_CHECKING:
    from edgekit.fleet.watch.service import Watch

RECENT_MS = 3_600_000
ALARM_RATIO = 1.01
"""What an alarm's evidence counts at least, over its bound: it lasts until its stream is calm."""


def signals(watch: Watch, now_ms: int) -> Iterator[Signal]:
    """The signals of all models."""
    for model in watch.models():
        interval_ms = watch.budget(model).interval_s * 1000
        since_ms = now_ms - max(RECENT_MS, 6 * interval_ms)
        yield from _of_drift(watch.drift(model, since_ms, now_ms=now_ms), now_ms)
        yield from _of_quality(watch.quality(model, now_ms=now_ms, since_ms=now_ms - pages.DAY_MS), now_ms)


def _of_drift(page: DriftPage, now_ms: int) -> Iterator[Signal]:
    version = page.profile.version if page.profile else ""
    for stream in page.streams:
        if stream.statistics is None or stream.is_inhibited:
            continue
        yield from _of_stream(page.model, version, stream, now_ms)


def _of_stream(model: str, version: str, stream: StreamDrift, now_ms: int) -> Iterator[Signal]:
    assert stream.statistics is not None
    labels = {"model": model, "version": version, "stream": stream.stream, "slice": stream.slice}
    if stream.slice.startswith("site="):
        labels["site"] = stream.slice.removeprefix("site=")
    samples = int(stream.statistics.samples)
    evidence: dict[str, str | float] = {
        "psi": round(stream.statistics.psi or 0.0, 4),
        "log_evidence": round(stream.evidence, 1),
        "bound": round(stream.threshold, 1),
        "effective_samples": round(stream.statistics.effective_samples),
        "design_effect": round(stream.design_effect, 2),
        "time_effect": round(stream.time_effect, 2),
    }
    if stream.top_devices:
        evidence["top_devices"] = ", ".join(f"{each.site}/{each.device} {each.share:.0%}" for each in stream.top_devices[:3])

    def made(name: str, value: float) -> Signal:
        return Signal(name=name, value=value, samples=samples, labels=labels, time_ms=now_ms, evidence=evidence)

    ratio = stream.evidence / stream.threshold if stream.threshold else 0.0
    over = max(ratio, ALARM_RATIO) if stream.is_alarm else min(ratio, 1.0)
    effect = stream.effect if stream.effect is not None else 0.0
    if stream.kind in {"class", "confidence"}:
        yield made("prediction_drift", effect if stream.is_alarm else 0.0)
        return
    yield made("drift.effect", effect)
    yield made("drift.evidence", over)
    if stream.missing_share is not None:
        yield made("missing.share", stream.missing_share)
    if stream.saturation_share is not None:
        yield made("saturation.share", stream.saturation_share)


def _of_quality(page: QualityPage, now_ms: int) -> Iterator[Signal]:
    for part in page.slices:
        labels = {"model": page.model, "slice": part.slice}
        yield from _of_slice(part, labels, now_ms)
    if page.slices:
        whole = page.slices[0]
        share = min(
            1.0, (whole.rejected + sum(each.count for each in page.violations)) / max(1, whole.samples + whole.rejected)
        )
        shown = ", ".join(f"{each.action} {each.name} {each.share:.1%}" for each in page.violations[:3])
        yield Signal(
            name="contract.violations",
            value=share,
            samples=whole.samples,
            labels={"model": page.model},
            time_ms=now_ms,
            evidence={"most": shown} if shown else {},
        )


def _of_slice(part: SliceView, labels: dict[str, str], now_ms: int) -> Iterator[Signal]:
    if part.estimated is not None:
        band = f"{part.estimated_low:.3f} to {part.estimated_high:.3f}, assumes no concept drift"
        yield Signal(
            name="accuracy.estimated",
            value=part.estimated,
            samples=part.samples,
            labels=labels,
            time_ms=now_ms,
            evidence={"band": band},
        )
    if part.realised is not None:
        yield Signal(
            name="accuracy.realised",
            value=part.realised,
            samples=part.labelled,
            labels=labels,
            time_ms=now_ms,
            evidence={"band": f"{part.realised_low:.3f} to {part.realised_high:.3f}"},
        )
    if part.gap is not None:
        evidence: dict[str, str | float] = {"estimated": part.estimated or 0.0, "realised": part.realised or 0.0}
        if part.gap_evidence is not None:
            evidence["log_evidence"] = round(part.gap_evidence, 1)
        yield Signal(
            name="accuracy.gap", value=-part.gap, samples=part.labelled, labels=labels, time_ms=now_ms, evidence=evidence
        )
