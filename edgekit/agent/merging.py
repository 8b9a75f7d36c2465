"""Several windows as one: what a spool does before it gives anything up.

Counts and histograms add, so the merged window says of the whole time exactly what its parts said; quantiles are read off the
merged histograms, gauges are averaged by time or keep their largest or last value (``RULES``). The merged window has the last
part's sequence number, and names those of all parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec

from edgekit.agent.windows import METRICS, SCHEMA, merge_latencies, merge_models, read_quantiles
from edgekit.errors import ArtifactError
from edgekit.schema.message import ModelWindow, Window
from edgekit.telemetry.codec import pack_values, unpack_values

RULES = {
    "rss_mb": "max",
    "temperature_c": "max",
    "queue_p99_ms": "max",
    "outbox_messages": "last",
    "outbox_bytes": "last",
    "worker_restarts": "last",
    "uptime_s": "last",
    "disk_free_mb": "last",
    "memory_free_mb": "min",
    "confidence_mean": "by_samples",
}
"""How a metric merges; counts are summed, quantiles read off the histograms, all others averaged by time."""


def ranges_of(window: Window) -> tuple[int, ...]:
    """First and last of each range of sequence numbers that a window stands for."""
    return window.merged or (window.seq, window.seq)


def join_ranges(parts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Ranges as one flat, sorted tuple of first and last, neighbours joined."""
    pairs = sorted((part[at], part[at + 1]) for part in parts for at in range(0, len(part), 2))
    joined: list[int] = []
    for first, last in pairs:
        if joined and first <= joined[-1] + 1:
            joined[-1] = max(joined[-1], last)
        else:
            joined += [first, last]
    return tuple(joined)


def count_of(ranges: Sequence[int]) -> int:
    """How many numbers are in some ranges."""
    return sum(ranges[at + 1] - ranges[at] + 1 for at in range(0, len(ranges), 2))


def merge_payloads(payloads: Sequence[bytes], schema: int) -> tuple[bytes, tuple[int, ...]] | None:
    """Encoded windows of one boot as one, with the ranges that it stands for; None when they cannot be merged.

    Args:
        payloads: oldest first, two or more.
        schema: theirs; only windows of this version's schema can be merged.
    """
    if schema != SCHEMA:
        return None
    try:
        merged = merge_windows([msgspec.msgpack.decode(payload, type=Window) for payload in payloads])
    except (msgspec.DecodeError, ArtifactError):
        return None
    return msgspec.msgpack.encode(merged), merged.merged


def merge_windows(windows: Sequence[Window]) -> Window:
    """Windows of one boot as one.

    Args:
        windows: oldest first, one or more, of this version's schema.

    Raises:
        ArtifactError: ``telemetry.malformed`` for values or histograms that are none.
    """
    first, last = windows[0], windows[-1]
    digests = {window.model_digest for window in windows}
    sketches = tuple(
        merge_latencies([window.sketches[place] for window in windows if len(window.sketches) > place]).encode()
        for place in range(max(len(window.sketches) for window in windows))
    )
    return Window(
        seq=last.seq,
        start_ms=first.start_ms,
        duration_ms=sum(window.duration_ms for window in windows),
        values=_merge_values(windows, sketches),
        model_digest=last.model_digest if len(digests) == 1 else "",
        sketches=sketches,
        models=_merge_models(windows),
        merged=join_ranges(ranges_of(window) for window in windows),
    )


def _merge_values(windows: Sequence[Window], sketches: Sequence[bytes]) -> bytes:
    rows = [unpack_values(window.values) for window in windows]
    if any(len(row) != len(METRICS) for row in rows):
        raise ArtifactError("telemetry.malformed", f"a window without {len(METRICS)} values cannot be merged.")
    names = [spec.name for spec in METRICS]
    samples = [row[names.index("samples")] for row in rows]
    seconds = [max(1, window.duration_ms) for window in windows]
    quantiles = read_quantiles(sketches)
    merged = []
    for place, spec in enumerate(METRICS):
        column = [row[place] for row in rows]
        if spec.kind == "count":
            merged.append(math.fsum(value for value in column if math.isfinite(value)))
        elif spec.name in quantiles:
            merged.append(quantiles[spec.name])
        else:
            merged.append(_merge_gauge(RULES.get(spec.name, "mean"), column, seconds, samples))
    return pack_values(merged)


def _merge_gauge(rule: str, column: Sequence[float], seconds: Sequence[float], samples: Sequence[float]) -> float:
    known = [place for place, value in enumerate(column) if math.isfinite(value)]
    values = [column[place] for place in known]
    if not values:
        return math.nan
    match rule:
        case "max":
            return max(values)
        case "min":
            return min(values)
        case "last":
            return values[-1]
        case "by_samples":
            weights = [samples[place] for place in known]
        case _:
            weights = [seconds[place] for place in known]
    total = math.fsum(weights)
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else math.nan


def _merge_models(windows: Sequence[Window]) -> tuple[ModelWindow, ...]:
    groups: dict[tuple[str, int], list[ModelWindow]] = {}
    for window in windows:
        for model in window.models:
            if not model.latency and len(window.models) == 1 and window.sketches:
                model = msgspec.structs.replace(model, latency=window.sketches[0])  # noqa: PLW2901 - left out where it was alone
            groups.setdefault((model.model_digest, model.profile), []).append(model)
    models = tuple(merge_models(group) for group in groups.values())
    if len(models) == 1:
        return (msgspec.structs.replace(models[0], latency=b""),)
    return models
