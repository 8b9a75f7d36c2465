"""Windows into roll-ups of a minute, an hour and a day: pure, and the same whichever way the windows are grouped.

Counts are added, histograms are merged by addition, and a gauge keeps its sum and how many windows had it, so that a mean of
means never weighs wrong. A quantile whose histogram travels with the window is read from the merged histogram; the mean of
quantiles would be none.

>>> spec = MetricSpec(name="requests", kind="count")
>>> part = Rollup(windows=1, duration_ms=10_000, sums=np.array([5.0]), numbers=np.array([1]))
>>> merge_rollups([part, part], Declared(metrics=(spec,))).sums.tolist()
[10.0]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.counts import merge_counts
from edgekit.errors import ArtifactError
from edgekit.schema.message import MetricSpec, SketchSpec
from edgekit.telemetry.histogram import LatencyHistogram

MINUTE_MS = 60_000
HOUR_MS = 3_600_000
DAY_MS = 86_400_000
STEPS = (MINUTE_MS, HOUR_MS, DAY_MS)
COUNTS = ("requests", "errors", "rejected", "samples", "sketched", "labelled", "right")
MAX_COUNT = 2**63 - 1
_FLOAT32, _FLOAT64, _UINT32 = np.dtype("<f4"), np.dtype("<f8"), np.dtype("<u4")
_QUANTILE = re.compile(r"(.+)_p(\d{2,3})_(.+)\Z")
_encode = msgspec.msgpack.encode


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What the vectors and sketches of a schema hold."""

    metrics: tuple[MetricSpec, ...] = ()
    sketches: tuple[SketchSpec, ...] = ()

    def quantiles(self) -> list[tuple[int, int, float]]:
        """Metrics that are quantiles of a sketch: the metric's place, the sketch's, and which quantile."""
        places = {spec.name: place for place, spec in enumerate(self.sketches)}
        found = []
        for place, spec in enumerate(self.metrics):
            match = _QUANTILE.match(spec.name)
            if match and f"{match[1]}_{match[3]}" in places:
                found.append((place, places[f"{match[1]}_{match[3]}"], int(match[2]) / 10 ** len(match[2])))
        return found


@dataclass(frozen=True, kw_only=True)
class RawWindow:
    """One window as it is in the table."""

    start_ms: int
    duration_ms: int
    schema: int
    vector: bytes
    sketches: bytes | None


@dataclass(kw_only=True)
class Rollup:
    """Some windows of one schema together: sums and numbers by metric, histograms by sketch."""

    windows: int
    duration_ms: int
    sums: NDArray[np.float64]
    numbers: NDArray[np.int64]
    sketches: list[LatencyHistogram] = field(default_factory=list)

    def pack(self) -> tuple[int, int, bytes, bytes, bytes | None]:
        """As columns: windows, duration, sums, numbers, sketches."""
        sketches = tuple(sketch.encode() for sketch in self.sketches)
        sums, numbers = self.sums.astype(_FLOAT64).tobytes(), self.numbers.astype(_UINT32).tobytes()
        return self.windows, self.duration_ms, sums, numbers, _encode(sketches) if any(sketches) else None


def unpack_rollup(windows: int, duration_ms: int, sums: bytes, numbers: bytes, sketches: bytes | None) -> Rollup:
    """The opposite of :meth:`Rollup.pack`."""
    return Rollup(
        windows=windows,
        duration_ms=duration_ms,
        sums=np.frombuffer(sums, _FLOAT64).astype(np.float64),
        numbers=np.frombuffer(numbers, _UINT32).astype(np.int64),
        sketches=_read_sketches(sketches),
    )


def _read_sketches(data: bytes | None) -> list[LatencyHistogram]:
    """Histograms; an empty one for what is none."""
    found = []
    for part in msgspec.msgpack.decode(data, type=tuple[bytes, ...]) if data else ():
        try:
            found.append(LatencyHistogram.decode(part))
        except ArtifactError:
            found.append(LatencyHistogram())
    return found


def roll_windows(windows: Sequence[RawWindow], declared: Mapping[int, Declared]) -> dict[tuple[int, int], Rollup]:
    """Windows by the minute in which they begin, and schema."""
    groups: dict[tuple[int, int], list[RawWindow]] = {}
    for window in windows:
        groups.setdefault((window.start_ms - window.start_ms % MINUTE_MS, window.schema), []).append(window)
    return {key: _roll(group, declared.get(key[1], Declared())) for key, group in groups.items()}


def _roll(windows: Sequence[RawWindow], declared: Declared) -> Rollup:
    width = len(declared.metrics)
    matrix = np.full((len(windows), width), np.nan)
    for place, window in enumerate(windows):
        if len(window.vector) % _FLOAT32.itemsize == 0:
            values = np.frombuffer(window.vector, _FLOAT32)[:width]
            matrix[place, : len(values)] = values
    is_known = np.isfinite(matrix)
    sketches: list[LatencyHistogram] = []
    for window in windows:
        _add_sketches(sketches, _read_sketches(window.sketches))
    made = Rollup(
        windows=len(windows),
        duration_ms=min(MAX_COUNT, sum(window.duration_ms for window in windows)),
        sums=np.where(is_known, matrix, 0.0).sum(axis=0),
        numbers=is_known.sum(axis=0).astype(np.int64),
        sketches=sketches,
    )
    return _settle(made, declared)


def _add_sketches(into: list[LatencyHistogram], parts: Sequence[LatencyHistogram]) -> None:
    into += [LatencyHistogram() for _ in range(len(parts) - len(into))]
    for sketch, part in zip(into, parts, strict=False):
        sketch.merge(part)


def _settle(made: Rollup, declared: Declared) -> Rollup:
    """Read the quantiles from the merged histograms."""
    for metric, sketch, quantile in declared.quantiles():
        if sketch < len(made.sketches) and made.sketches[sketch].count and made.numbers[metric]:
            made.sums[metric] = made.sketches[sketch].quantile(quantile) * made.numbers[metric]
    return made


def merge_rollups(parts: Sequence[Rollup], declared: Declared) -> Rollup:
    """Several roll-ups of one schema as one."""
    width = max((len(part.sums) for part in parts), default=0)
    made = Rollup(windows=0, duration_ms=0, sums=np.zeros(width), numbers=np.zeros(width, np.int64))
    for part in parts:
        made.windows += part.windows
        made.duration_ms = min(MAX_COUNT, made.duration_ms + part.duration_ms)
        made.sums[: len(part.sums)] += part.sums
        made.numbers[: len(part.numbers)] += part.numbers
        _add_sketches(made.sketches, part.sketches)
    return _settle(made, declared)


# what models did

ModelKey = tuple[str, int]
"""Model digest and profile."""


@dataclass(kw_only=True)
class ModelRollup:
    """What a model did in some windows together."""

    windows: int = 0
    duration_ms: int = 0
    counts: list[int] = field(default_factory=lambda: [0] * len(COUNTS))
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    sketches: tuple[bytes, ...] = ()
    verdicts: dict[str, int] = field(default_factory=dict)

    def add(self, other: ModelRollup) -> None:
        """Count another one's windows, too."""
        self.windows += other.windows
        self.duration_ms = min(MAX_COUNT, self.duration_ms + other.duration_ms)
        self.counts = [min(MAX_COUNT, a + b) for a, b in zip(self.counts, other.counts, strict=True)]
        self.latency.merge(other.latency)
        self.sketches = tuple(merge_counts((a, b)) for a, b in zip_longest(self.sketches, other.sketches, fillvalue=b""))
        for name, number in other.verdicts.items():
            self.verdicts[name] = min(MAX_COUNT, self.verdicts.get(name, 0) + number)

    def pack(self) -> tuple[Any, ...]:
        """As columns: windows, duration, the counts, latency, sketches, verdicts."""
        return (
            self.windows,
            self.duration_ms,
            *self.counts,
            self.latency.encode() or None,
            _encode(self.sketches) if any(self.sketches) else None,
            _encode(self.verdicts) if self.verdicts else None,
        )


def unpack_model(
    *,
    windows: int,
    duration_ms: int,
    counts: Iterable[int],
    latency: bytes | None,
    sketches: bytes | None,
    verdicts: bytes | None,
) -> ModelRollup:
    """A model's row of a window or of a roll-up; sketches that a device wrote wrongly count as none."""
    found = list(counts)
    parts = msgspec.msgpack.decode(sketches, type=tuple[bytes, ...]) if sketches else ()
    try:
        parts = tuple(merge_counts((part,)) for part in parts)
    except ArtifactError:
        parts, found[COUNTS.index("sketched")] = (), 0
    try:
        bins = LatencyHistogram.decode(latency or b"")
    except ArtifactError:
        bins = LatencyHistogram()
    return ModelRollup(
        windows=windows,
        duration_ms=duration_ms,
        counts=found,
        latency=bins,
        sketches=parts,
        verdicts=msgspec.msgpack.decode(verdicts, type=dict[str, int]) if verdicts else {},
    )


def merge_models(parts: Iterable[tuple[ModelKey, ModelRollup]]) -> dict[ModelKey, ModelRollup]:
    """Roll-ups by model and profile."""
    found: dict[ModelKey, ModelRollup] = {}
    for key, part in parts:
        found.setdefault(key, ModelRollup()).add(part)
    return found
