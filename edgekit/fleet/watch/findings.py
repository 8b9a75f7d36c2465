"""What a run of the detectors found, in words: drift by stream, and labels that show more errors than expected."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.fleet.watch.store import FindingRow
from edgekit.monitor.intervals import ALL, Interval, SliceCounts, merge_slices
from edgekit.monitor.streams import Watched, compare_watched, describe_change
from edgekit.monitor.watcher import StreamVerdict, Watcher, WatchState

RECENT_INTERVALS = 12
MAX_NAMED = 4
_KINDS = {"class": "prediction_drift", "confidence": "prediction_drift", "saturation": "saturation"}


def find(watcher: Watcher, state: WatchState, intervals: Sequence[Interval], *, now_ms: int) -> list[FindingRow]:
    """The open findings after some intervals.

    Args:
        watcher: of the model.
        state: after the last interval.
        intervals: the newest ones, oldest first.
        now_ms: Unix time in milliseconds.
    """
    found = []
    recent: dict[str, SliceCounts] = {}
    verdicts = watcher.verdicts(state)
    for verdict in verdicts:
        if not verdict.is_alarm or verdict.is_inhibited:
            continue
        if verdict.slice not in recent:
            parts = [each.slices[verdict.slice] for each in intervals[-RECENT_INTERVALS:] if verdict.slice in each.slices]
            recent[verdict.slice] = merge_slices(parts, watcher.widths)
        watched = next(each for each in watcher.watched if each.name == verdict.stream)
        where = _where(verdicts, verdict) if verdict.slice == ALL else ""
        found.append(_describe(watcher, watched, verdict, recent[verdict.slice], now_ms=now_ms, where=where))
    found += [
        FindingRow(
            kind="concept_drift",
            slice=concept.slice,
            stream="",
            since_ms=concept.since_ms,
            noticed_ms=now_ms,
            ended_ms=0,
            effect=None,
            evidence=concept.evidence,
            text="labels show more errors than the estimate expects",
        )
        for concept in watcher.concepts(state)
        if concept.is_alarm and not concept.is_inhibited
    ]
    return found


def _where(verdicts: Sequence[StreamVerdict], parent: StreamVerdict) -> str:
    """The slices that drift where others of their kind do not: where to look first."""
    by_kind: dict[str, list[StreamVerdict]] = {}
    for verdict in verdicts:
        if verdict.stream == parent.stream and verdict.slice != ALL:
            by_kind.setdefault(",".join(part.partition("=")[0] for part in verdict.slice.split(",")), []).append(verdict)
    named = []
    for _kind, found in sorted(by_kind.items()):
        alarming = [verdict.slice for verdict in found if verdict.is_alarm]
        if alarming and len(alarming) < len(found):
            named += alarming
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return f"in {', '.join(named[:MAX_NAMED])}{more}" if named else ""


def _describe(
    watcher: Watcher, watched: Watched, verdict: StreamVerdict, recent: SliceCounts, *, now_ms: int, where: str
) -> FindingRow:
    counts = watched.read(recent.cells(watcher.widths)[watched.source])
    effect, text, kind = None, "", _KINDS.get(watched.kind, "drift")
    if counts.sum():
        effect = compare_watched(watched, counts).psi
        text, is_missing = describe_change(watched, counts)
        kind = "missing" if is_missing else kind
    return FindingRow(
        kind=kind,
        slice=verdict.slice,
        stream=verdict.stream,
        since_ms=verdict.since_ms,
        noticed_ms=now_ms,
        ended_ms=0,
        effect=effect,
        evidence=verdict.evidence,
        text="; ".join(filter(None, (text, where))),
    )
