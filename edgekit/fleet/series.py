"""Windows into time series: the metric vectors of many windows as one matrix, read with the names that each boot declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.fleet.views import Series
from edgekit.schema.message import MetricSpec

_FLOAT = np.dtype("<f4")
Declared = Mapping[tuple[int, int], Sequence[MetricSpec]]
"""The metrics of each (boot, schema)."""


@dataclass(frozen=True, kw_only=True)
class StoredWindow:
    """One window as it is in the table."""

    start_ms: int
    duration_ms: int
    vector: bytes
    boot: int
    schema: int


def unit_of(spec: MetricSpec) -> str:
    """A metric's unit as a series: counts become rates."""
    return "1/s" if spec.kind == "count" else spec.unit


def make_series(
    windows: Sequence[StoredWindow], declared: Declared, metrics: Sequence[str], step_ms: int
) -> tuple[Series, ...]:
    """The series of some metrics.

    Args:
        windows: oldest first.
        declared: what their vectors hold; a window of another schema is left out.
        metrics: names, in the order wanted.
        step_ms: average the points in steps of this length; 0 gives every window.
    """
    columns = _columns(windows, declared, metrics)
    times = np.array([window.start_ms for window in windows], dtype=np.int64)
    units = {spec.name: unit_of(spec) for specs in declared.values() for spec in specs}
    return tuple(
        Series(metric=name, unit=units.get(name, ""), points=_points(times, columns[i], step_ms))
        for i, name in enumerate(metrics)
    )


def _columns(windows: Sequence[StoredWindow], declared: Declared, metrics: Sequence[str]) -> npt.NDArray[np.float64]:
    """Values by metric and window, NaN where a window has none: float64 [M, N]."""
    columns = np.full((len(metrics), len(windows)), np.nan)
    groups: dict[tuple[int, int, int], list[int]] = {}
    for i, window in enumerate(windows):
        groups.setdefault((window.boot, window.schema, len(window.vector)), []).append(i)
    for (boot, schema, size), places in groups.items():
        if size % _FLOAT.itemsize or not size:
            continue
        matrix = np.frombuffer(b"".join(windows[i].vector for i in places), dtype=_FLOAT).reshape(len(places), -1)
        seconds = np.array([windows[i].duration_ms for i in places], dtype=np.float64) / 1000
        for at, spec in enumerate(declared.get((boot, schema), ())[: matrix.shape[1]]):
            if spec.name in metrics:
                values = matrix[:, at].astype(np.float64)
                if spec.kind == "count":
                    values = np.divide(values, seconds, out=np.zeros_like(values), where=seconds > 0)
                columns[metrics.index(spec.name), places] = values
    return columns


def _points(times: npt.NDArray[np.int64], values: npt.NDArray[np.float64], step_ms: int) -> tuple[tuple[int, float], ...]:
    is_known = np.isfinite(values)
    times, values = times[is_known], values[is_known]
    if step_ms > 0 and len(times):
        times, inverse = np.unique(times - times % step_ms, return_inverse=True)
        values = np.bincount(inverse, weights=values) / np.bincount(inverse)
    return tuple(zip(times.tolist(), values.tolist(), strict=True))
