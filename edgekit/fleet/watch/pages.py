"""What the watch knows, as records for pages, for the API and for alerts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, func, select

from edgekit.errors import ArtifactError
from edgekit.fleet import tables
from edgekit.fleet.gaps import SeqRanges
from edgekit.fleet.watch import store
from edgekit.fleet.watch.findings import RECENT_INTERVALS
from edgekit.fleet.watch.labels import LabelFigures, read_labels
from edgekit.fleet.watch.views import (
    Bin,
    Budget,
    ClassQuality,
    DeviceShare,
    DriftPage,
    Finding,
    Loss,
    ProfileView,
    QualityPage,
    QualityPoint,
    SliceView,
    Statistics,
    StreamDrift,
    TimePoint,
    VersionsPage,
    VersionView,
    Violation,
)
from edgekit.monitor.compare import psi_over_time
from edgekit.monitor.intervals import ALL, SliceCounts, merge_slices
from edgekit.monitor.performance import CONFIDENCE_BINS, Estimate, estimate, realise, weigh
from edgekit.monitor.sketch import MIN_SAMPLES
from edgekit.monitor.streams import Watched, bin_middles, compare_watched, decode_many, mean_of
from edgekit.monitor.watcher import ConceptVerdict, StreamVerdict, Watcher, WatchState
from edgekit.telemetry.histogram import LatencyHistogram

if TYPE_CHECKING:
    from edgekit.fleet.store import Store
    from edgekit.fleet.watch.service import Watch

DAY_MS = 86_400_000
MAX_ROWS = 200
"""Streams on a page."""
MAX_POINTS = 400
MAX_CLASSES = 100
_SEVERITY: dict[str, Literal["info", "warning", "critical"]] = {"concept_drift": "critical"}
_Rows = list[tuple[int, SliceCounts, bytes | None]]


@dataclass(frozen=True)
class Opened:
    """One watch, read for a page."""

    row: store.WatchRow
    watcher: Watcher
    state: WatchState
    known: store.KnownProfile | None
    budget: Budget

    @property
    def verdicts(self) -> tuple[StreamVerdict, ...]:
        """Of every stream and slice."""
        return self.watcher.verdicts(self.state)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the model's classes."""
        return self.known.labels if self.known else ()


def open_watches(watch: Watch, connection: Connection, model: str) -> list[Opened]:
    """The watches of a model, the one with the newest windows first."""
    budget = store.read_budget(connection, model)
    known = {item.crc: item for item in store.read_profiles(connection, model)}
    found = []
    for row in store.read_watches(connection, model):
        item = known.get(row.crc)
        watcher = watch.watcher(model, row.crc, item, budget)
        state = WatchState.decode(row.state) if row.state is not None else watcher.start()
        found.append(Opened(row=row, watcher=watcher, state=state, known=item, budget=budget))
    return sorted(found, key=lambda each: (not each.watcher.watched, -each.row.frontier_ms))


# --- drift ------------------------------------------------------------------------------------------------------------------


def drift_page(watch: Watch, fleet: Store, model: str, *, since_ms: int, now_ms: int, slice_name: str = "") -> DriftPage:
    """The drift page; see :meth:`edgekit.fleet.watch.service.Watch.drift`."""
    with fleet.read() as connection:
        opened = open_watches(watch, connection, model)
        if not opened:
            note = "No windows of this model have been judged yet; an interval is judged two minutes after its end."
            return DriftPage(
                model=model, now_ms=now_ms, since_ms=since_ms, budget=store.read_budget(connection, model), note=note
            )
        first = opened[0]
        chosen = _chosen(first, slice_name)
        names = sorted({verdict.slice for verdict in chosen} | {ALL})
        rows = store.read_slices(connection, first.row.id, since_ms=since_ms, slices=names)
        facts = store.read_facts(connection, first.row.id, since_ms=since_ms)
        findings = {
            (item.slice, item.stream): item.noticed_ms for item in store.read_findings(connection, first.row.id, is_open=True)
        }
        loss = _loss(connection, model, rows.get(ALL, []), first.row.interval_ms)
    streams = [_stream(first, verdict, rows.get(verdict.slice, []), facts, findings) for verdict in chosen]
    streams.sort(key=lambda each: (not each.is_alarm, each.is_inhibited, -(each.effect or 0.0), each.slice, each.stream))
    return DriftPage(
        model=model,
        now_ms=now_ms,
        since_ms=since_ms,
        budget=first.budget,
        streams=tuple(streams[:MAX_ROWS]),
        slices=first.state.slices,
        profile=_profile_view(first),
        profiles=tuple(_profile_view(each) for each in opened),
        frontier_ms=max(0, first.row.frontier_ms + first.row.interval_ms) if first.row.frontier_ms >= 0 else 0,
        loss=loss,
        watched=len(first.watcher.watched) * len(first.state.slices),
        note=""
        if first.watcher.watched
        else "Its release has no reference profile here: pack it with --data, give --repository.",
    )


def _chosen(opened: Opened, slice_name: str) -> list[StreamVerdict]:
    verdicts = opened.verdicts
    if slice_name:
        return [verdict for verdict in verdicts if verdict.slice == slice_name]
    return [verdict for verdict in verdicts if verdict.slice == ALL or verdict.is_alarm][:MAX_ROWS]


def _profile_view(opened: Opened) -> ProfileView:
    known, profile = opened.known, opened.watcher.profile
    return ProfileView(
        model_digest=known.model_digest if known else "",
        crc=opened.row.crc,
        version=known.version if known else "",
        samples=profile.samples,
        streams=len(opened.watcher.watched),
        source=profile.source,
        is_small=0 < profile.samples < MIN_SAMPLES,
    )


def _series(watched: Watched, rows: _Rows, widths: Sequence[int]) -> NDArray[np.float64]:
    """A stream's watched counts over time [T, B]; zeros where nothing was sketched."""
    parts = [each.sketches[watched.source] if len(each.sketches) == len(widths) else b"" for _at, each, _ in rows]
    cells, _ = decode_many(parts, cells=widths[watched.source])
    return watched.read(cells)


def _stream(
    opened: Opened,
    verdict: StreamVerdict,
    rows: _Rows,
    facts: Sequence[store.FactRow],
    noticed: Mapping[tuple[str, str], int],
) -> StreamDrift:
    watcher = opened.watcher
    at = next(at for at, each in enumerate(watcher.watched) if each.name == verdict.stream)
    watched = watcher.watched[at]
    series = _series(watched, rows, watcher.widths)
    first = _first_recent(rows, verdict)
    total = series[first:].sum(axis=0)
    devices = max((each.devices for _at, each, _ in rows[first:]), default=0)
    samples = float(total.sum())
    effect = (1.0 + samples * verdict.variation / max(1, devices)) * verdict.time_effect
    found = compare_watched(watched, total, design_effect=effect) if samples and sum(watched.reference.counts) else None
    reference = np.asarray(watched.reference.counts)
    has_missing = watched.reference.has_missing
    is_number = bool(watched.edges) and watched.kind in {"input", "output"}
    return StreamDrift(
        stream=watched.name,
        slice=verdict.slice,
        kind=watched.kind,
        effect=_known(found.psi) if found else None,
        evidence=_finite(verdict.evidence),
        threshold=verdict.threshold,
        is_alarm=verdict.is_alarm,
        is_listed=verdict.is_listed,
        is_inhibited=verdict.is_inhibited,
        since_ms=verdict.since_ms,
        noticed_ms=noticed.get((ALL if verdict.is_inhibited else verdict.slice, verdict.stream), 0),
        missing_share=float(total[-1] / samples) if has_missing and samples else None,
        reference_missing_share=float(reference[-1] / reference.sum()) if has_missing and reference.sum() else None,
        out_of_range_share=float((total[0] + total[-2]) / samples) if is_number and samples else None,
        saturation_share=mean_of(watched, total) if watched.kind == "saturation" else None,
        design_effect=effect / verdict.time_effect,
        time_effect=verdict.time_effect,
        statistics=_statistics(found, effect) if found else None,
        histogram=_histogram(watched, reference, total),
        timeline=_timeline(opened, verdict, at, rows=rows, series=series, facts=facts),
        top_devices=_top(facts, at) if verdict.slice == ALL else (),
    )


def _first_recent(rows: _Rows, verdict: StreamVerdict) -> int:
    """Where the intervals begin that "now" is about: with the alarm, else the last ones."""
    if verdict.is_alarm:
        return next((at for at, row in enumerate(rows) if row[0] >= verdict.since_ms), max(0, len(rows) - RECENT_INTERVALS))
    return max(0, len(rows) - RECENT_INTERVALS)


def _statistics(found: Any, effect: float) -> Statistics:
    return Statistics(
        samples=found.samples,
        effective_samples=found.samples / effect,
        reference_samples=found.reference_samples,
        psi=_known(found.psi),
        jensen_shannon=_known(found.jensen_shannon),
        kolmogorov_smirnov=_known(found.kolmogorov_smirnov),
        wasserstein=_known(found.wasserstein),
        chi_squared=_known(found.chi_squared),
        degrees_of_freedom=found.degrees_of_freedom,
        p_value=_known(found.p_value),
    )


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else 0.0


def _histogram(watched: Watched, reference: NDArray[np.float64], total: NDArray[np.float64]) -> tuple[Bin, ...]:
    before = reference / reference.sum() if reference.sum() else np.zeros_like(reference)
    now = total / total.sum() if total.sum() else np.zeros_like(total)
    bins = []
    for at in range(reference.size):
        label, low, high = _bin_label(watched, at, reference.size)
        bins.append(Bin(label=label, low=low, high=high, reference=float(before[at]), now=float(now[at])))
    return tuple(bins)


def _bin_label(watched: Watched, at: int, bins: int) -> tuple[str, float | None, float | None]:
    if watched.labels:
        return watched.labels[at], None, None
    if watched.reference.has_missing and at == bins - 1:
        return "missing", None, None
    if watched.kind == "confidence":
        return f"{at / bins:.2f} to {(at + 1) / bins:.2f}", at / bins, (at + 1) / bins
    edges = watched.edges
    if at == 0:
        return f"below {edges[0]:.4g}", None, edges[0]
    if at == len(edges):
        return f"above {edges[-1]:.4g}", edges[-1], None
    return f"{edges[at - 1]:.4g} to {edges[at]:.4g}", edges[at - 1], edges[at]


def _timeline(
    opened: Opened,
    verdict: StreamVerdict,
    at: int,
    *,
    rows: _Rows,
    series: NDArray[np.float64],
    facts: Sequence[store.FactRow],
) -> tuple[TimePoint, ...]:
    watched = opened.watcher.watched[at]
    evidence = _evidence_by_time(facts, verdict.slice, at, len(opened.watcher.watched))
    effects = psi_over_time(np.asarray(watched.reference.counts), series) if len(rows) else np.zeros(0)
    middles = bin_middles(watched)
    devices = max((each.devices for _at, each, _ in rows), default=0)
    points = []
    first = max(0, len(rows) - MAX_POINTS)
    for place in range(first, len(rows)):
        start_ms, counts, _ = rows[place]
        row, n = series[place], float(series[place].sum())
        present = row[: middles.size]
        is_number = bool(watched.edges) and watched.kind in {"input", "output"}
        points.append(
            TimePoint(
                time_ms=start_ms,
                samples=int(n),
                effect=_known(float(effects[place])),
                evidence=evidence.get(start_ms),
                mean=float((middles * present).sum() / present.sum()) if middles.size and present.sum() else None,
                missing_share=float(row[-1] / n) if watched.reference.has_missing and n else None,
                out_of_range_share=float((row[0] + row[-2]) / n) if is_number and n else None,
                coverage=min(1.0, counts.covered_ms / (devices * opened.row.interval_ms)) if devices else None,
            )
        )
    return tuple(points)


def _evidence_by_time(facts: Sequence[store.FactRow], slice_name: str, at: int, streams: int) -> dict[int, float]:
    found = {}
    for fact in facts:
        if slice_name in fact.slices:
            place = fact.slices.index(slice_name) * streams + at
            if place < len(fact.evidence) and math.isfinite(fact.evidence[place]):
                found[fact.start_ms] = fact.evidence[place]
    return found


def _top(facts: Sequence[store.FactRow], at: int) -> tuple[DeviceShare, ...]:
    for fact in reversed(facts):
        if at < len(fact.top) and fact.top[at]:
            found = []
            for device in fact.top[at]:
                site, _, name = device.device.rpartition("@")[0].partition("/")
                found.append(DeviceShare(site=site, device=name, share=device.share, samples=device.samples))
            return tuple(found)
    return ()


def _loss(connection: Connection, model: str, rows: _Rows, interval_ms: int) -> Loss:
    boots, serving = tables.boots.c, tables.device_models.c
    here = select(serving.device_id).where(serving.model == model)
    statement = select(boots.received, boots.lost, boots.given_out, boots.late).where(boots.device_id.in_(here))
    received = lost = missing = late = 0
    for item in connection.execute(statement):
        ranges = SeqRanges(msgspec.msgpack.decode(item.received, type=list[tuple[int, int]]))
        received += ranges.count
        late += item.late
        told = msgspec.msgpack.decode(item.lost, type=list[tuple[int, int]]) if item.lost else []
        lost += sum(ranges.add_range(first, last) for first, last in told)
        missing += ranges.missing(item.given_out)
    devices = max((counts.devices for _at, counts, _ in rows), default=0)
    newest = rows[-1][1] if rows else None
    span = (rows[-1][0] - rows[0][0]) // interval_ms + 1 if rows else 0
    covered = sum(counts.covered_ms for _at, counts, _ in rows)
    return Loss(
        received=received,
        lost=lost,
        missing=missing,
        late=late,
        coverage=min(1.0, covered / (devices * span * interval_ms)) if devices and span else None,
        silent_devices=max(0, devices - newest.devices) if newest else 0,
    )


# --- quality ----------------------------------------------------------------------------------------------------------------


def quality_page(watch: Watch, fleet: Store, model: str, *, since_ms: int, now_ms: int) -> QualityPage:
    """The quality page; see :meth:`edgekit.fleet.watch.service.Watch.quality`."""
    with fleet.read() as connection:
        opened = open_watches(watch, connection, model)
        if not opened:
            note = "No windows of this model have been judged yet."
            return QualityPage(model=model, now_ms=now_ms, since_ms=since_ms, note=note)
        first = opened[0]
        rows = store.read_slices(connection, first.row.id, since_ms=since_ms)
        labelled = read_labels(connection, _digests(connection, model), since_ms=since_ms)
        loss = _loss(connection, model, rows.get(ALL, []), first.row.interval_ms)
    merged = {name: merge_slices([each for _at, each, _ in found], first.watcher.widths) for name, found in rows.items()}
    concepts = {verdict.slice: verdict for verdict in first.watcher.concepts(first.state)}
    drifting: dict[str, int] = {}
    for verdict in first.verdicts:
        drifting[verdict.slice] = drifting.get(verdict.slice, 0) + verdict.is_alarm
    slices = [
        _slice_view(
            first,
            name,
            merged[name],
            concept=concepts.get(name),
            drifting=drifting.get(name, 0),
            labels=labelled.get(name, LabelFigures()),
        )
        for name in sorted(merged, key=lambda name: (name != ALL, name))
    ]
    whole = merged.get(ALL, SliceCounts())
    note = (
        "" if first.watcher.calibration else "Its reference profile has no labels: quality before labels cannot be estimated."
    )
    return QualityPage(
        model=model,
        now_ms=now_ms,
        since_ms=since_ms,
        slices=tuple(slices),
        classes=_classes(first, whole),
        timeline=tuple(_quality_point(first, at, each) for at, each, _ in rows.get(ALL, [])[-MAX_POINTS:]),
        reference_accuracy=first.watcher.reference_accuracy,
        violations=_violations(whole),
        loss=loss,
        note=note,
    )


def _digests(connection: Connection, model: str) -> tuple[str, ...]:
    row = tables.device_models.c
    found = set(connection.execute(select(row.model_digest).where(row.model == model).distinct()).scalars())
    found |= {item.model_digest for item in store.read_profiles(connection, model)}
    return tuple(sorted(found))


def _estimate(watcher: Watcher, counts: SliceCounts) -> Estimate | None:
    if watcher.calibration is None or not counts.sketches:
        return None
    found = watcher.estimate(counts.cells(watcher.widths))
    return found if found is not None and found.samples else None


def _slice_view(
    opened: Opened, name: str, counts: SliceCounts, *, concept: ConceptVerdict | None, drifting: int, labels: LabelFigures
) -> SliceView:
    guess = _estimate(opened.watcher, counts)
    found = realise(counts.right + labels.right, counts.labelled + labels.labelled)
    estimated, realised = guess.accuracy if guess else None, _known(found.accuracy)
    answered = _by_confidence(opened.watcher, counts)
    weighted = (
        _known(weigh(right=labels.right_by_confidence, labelled=labels.labelled_by_confidence, answered=answered))
        if answered is not None and labels.labelled_by_confidence.sum() >= CONFIDENCE_BINS
        else None
    )
    return SliceView(
        slice=name,
        samples=counts.samples,
        requests=counts.requests,
        errors=counts.errors,
        rejected=counts.rejected,
        estimated=estimated,
        estimated_low=guess.low if guess else None,
        estimated_high=guess.high if guess else None,
        realised=realised,
        realised_low=_known(found.low),
        realised_high=_known(found.high),
        realised_weighted=weighted,
        labelled=found.labelled,
        label_coverage=found.labelled / counts.samples if counts.samples else None,
        label_age_ms=labels.age_ms,
        gap=estimated - realised if estimated is not None and realised is not None else None,
        gap_evidence=_known(concept.evidence) if concept else None,
        is_concept_drift=concept.is_alarm if concept else False,
        abstain_share=_abstain(counts),
        drifting=drifting,
    )


def _abstain(counts: SliceCounts) -> float | None:
    """Rejected requests over all; None where there were none."""
    return counts.rejected / counts.requests if counts.requests else None


def _by_confidence(watcher: Watcher, counts: SliceCounts) -> NDArray[np.float64] | None:
    watched = next((each for each in watcher.watched if each.kind == "confidence"), None)
    if watched is None or not counts.sketches:
        return None
    return watched.read(counts.cells(watcher.widths)[watched.source])


def _quality_point(opened: Opened, start_ms: int, counts: SliceCounts) -> QualityPoint:
    guess, found = _estimate(opened.watcher, counts), realise(counts.right, counts.labelled)
    return QualityPoint(
        time_ms=start_ms,
        samples=counts.samples,
        estimated=guess.accuracy if guess else None,
        estimated_low=guess.low if guess else None,
        estimated_high=guess.high if guess else None,
        realised=_known(found.accuracy),
        realised_low=_known(found.low),
        realised_high=_known(found.high),
        labelled=counts.labelled,
    )


def _classes(opened: Opened, counts: SliceCounts) -> tuple[ClassQuality, ...]:
    """The predicted classes, the most frequent first."""
    watcher = opened.watcher
    at = next((at for at, stream in enumerate(watcher.profile.streams) if stream.kind == "classes"), None)
    if at is None or not counts.sketches:
        return ()
    stream = watcher.profile.streams[at]
    before = np.asarray(stream.counts, dtype=np.float64).reshape(-1, CONFIDENCE_BINS)
    if before.shape[0] < 2:
        return ()
    now = counts.cells(watcher.widths)[at].reshape(-1, CONFIDENCE_BINS)
    precision = estimate(now, watcher.calibration).precision if watcher.calibration else (math.nan,) * before.shape[0]
    right = np.asarray(stream.right or [0] * before.size, dtype=np.float64).reshape(-1, CONFIDENCE_BINS).sum(axis=1)
    total, was = max(1.0, float(now.sum())), max(1.0, float(before.sum()))
    order = np.argsort(-now.sum(axis=1), kind="stable")[:MAX_CLASSES].tolist()
    return tuple(
        ClassQuality(
            label=opened.labels[number] if len(opened.labels) == before.shape[0] else str(number),
            share=float(now[number].sum() / total),
            reference_share=float(before[number].sum() / was),
            precision_estimated=_known(precision[number]),
            precision_reference=float(right[number] / before[number].sum()) if stream.right and before[number].sum() else None,
        )
        for number in order
    )


def _violations(counts: SliceCounts) -> tuple[Violation, ...]:
    found = []
    for key, number in sorted(counts.verdicts.items(), key=lambda item: (-item[1], item[0])):
        action, _, name = key.partition(" ")
        found.append(Violation(action=action, name=name, count=number, share=min(1.0, number / max(1, counts.samples))))
    return tuple(found[:MAX_ROWS])


# --- versions ---------------------------------------------------------------------------------------------------------------


def versions_page(watch: Watch, fleet: Store, model: str, *, since_ms: int, now_ms: int) -> VersionsPage:
    """Versions beside each other, the newest first; each on all devices, then on each architecture."""
    views: list[VersionView] = []
    with fleet.read() as connection:
        opened = open_watches(watch, connection, model)
        row = tables.device_models.c
        statement = select(row.version, row.counter, row.model_digest).where(row.model == model).distinct()
        counters = {item.version: (item.counter, item.model_digest) for item in connection.execute(statement)}
        serving = _serving(connection, model)
        for each in opened:
            rows = store.read_slices(connection, each.row.id, since_ms=since_ms)
            views += [_version(each, name, found, counters, serving) for name, found in rows.items() if _is_version(name)]
    seen = {(view.version, view.device_class) for view in views}
    views += [
        VersionView(version=version, model_digest=counters[version][1], devices=number)
        for (version, device_class), number in serving.items()
        if not device_class and (version, "") not in seen
    ]
    views.sort(key=lambda view: (-counters.get(view.version, (0, ""))[0], view.version, view.device_class))
    return VersionsPage(model=model, now_ms=now_ms, since_ms=since_ms, versions=tuple(views))


def _is_version(name: str) -> bool:
    return name.startswith("release=")


def _serving(connection: Connection, model: str) -> dict[tuple[str, str], int]:
    """Devices by version and architecture; with an empty architecture all of a version."""
    models, devices = tables.device_models, tables.devices
    statement = (
        select(models.c.version, devices.c.arch, func.count())
        .join(devices, devices.c.id == models.c.device_id)
        .where(models.c.model == model)
        .group_by(models.c.version, devices.c.arch)
    )
    found: dict[tuple[str, str], int] = {}
    for version, arch, number in connection.execute(statement):
        found[version, ""] = found.get((version, ""), 0) + number
        if arch:
            found[version, arch] = found.get((version, arch), 0) + number
    return found


def _version(
    opened: Opened,
    name: str,
    rows: _Rows,
    counters: Mapping[str, tuple[int, str]],
    serving: Mapping[tuple[str, str], int],
) -> VersionView:
    version, _, device_class = name.removeprefix("release=").partition(",arch=")
    counts = merge_slices([each for _at, each, _ in rows], opened.watcher.widths)
    guess, found = _estimate(opened.watcher, counts), realise(counts.right, counts.labelled)
    latency = _merge_latency(part for _at, _counts, part in rows)
    alarms = [verdict for verdict in opened.verdicts if verdict.slice == name and verdict.is_alarm]
    known = opened.known if opened.known and opened.known.version == version else None
    return VersionView(
        version=version,
        model_digest=counters.get(version, (0, known.model_digest if known else ""))[1],
        device_class=device_class,
        devices=serving.get((version, device_class), 0),
        requests=counts.requests,
        samples=counts.samples,
        errors=counts.errors,
        error_share=counts.errors / counts.requests if counts.requests else None,
        rejected_share=_abstain(counts),
        latency_p50_ms=latency.quantile(0.5) if latency else None,
        latency_p95_ms=latency.quantile(0.95) if latency else None,
        latency_p99_ms=latency.quantile(0.99) if latency else None,
        size_bytes=known.size_bytes or None if known else None,
        estimated=guess.accuracy if guess else None,
        estimated_low=guess.low if guess else None,
        estimated_high=guess.high if guess else None,
        realised=_known(found.accuracy),
        labelled=counts.labelled,
        drifting=len(alarms),
        effect=_largest_effect(opened.watcher, counts),
        since_ms=rows[0][0] if rows else 0,
        until_ms=rows[-1][0] + opened.row.interval_ms if rows else 0,
    )


def _merge_latency(parts: Iterable[bytes | None]) -> LatencyHistogram | None:
    merged = LatencyHistogram()
    for part in parts:
        if part:
            try:
                merged.merge(LatencyHistogram.decode(part))
            except ArtifactError:
                continue
    return merged if merged.count else None


def _largest_effect(watcher: Watcher, counts: SliceCounts) -> float | None:
    if not counts.sketches:
        return None
    cells = counts.cells(watcher.widths)
    found = []
    for watched in watcher.watched:
        now = watched.read(cells[watched.source])
        if watched.kind == "input" and now.sum() and sum(watched.reference.counts):
            found.append(float(psi_over_time(np.asarray(watched.reference.counts), now[None])[0]))
    return max(found, default=None)


# --- findings ---------------------------------------------------------------------------------------------------------------


def open_findings(fleet: Store, model: str = "") -> tuple[Finding, ...]:
    """Findings that last, the newest first."""
    found = []
    with fleet.read() as connection:
        for row in store.read_watches(connection, model):
            for item in store.read_findings(connection, row.id):
                kind: Any = item.kind
                found.append(
                    Finding(
                        kind=kind,
                        model=row.model,
                        slice=item.slice,
                        stream=item.stream,
                        severity=_SEVERITY.get(item.kind, "warning"),
                        since_ms=item.since_ms,
                        noticed_ms=item.noticed_ms,
                        effect=item.effect,
                        evidence=item.evidence,
                        text=item.text,
                    )
                )
    return tuple(sorted(found, key=lambda finding: -finding.noticed_ms))
