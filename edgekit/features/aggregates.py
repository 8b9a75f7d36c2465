"""The figures of one window.

A figure is computed from one window alone: float64, a C-contiguous matrix [columns, samples], reduced along its last axis.
What the arithmetic sees is the window and nothing else, neither how many windows there are nor in what chunks the samples
came: that is why batch and stream agree to the last bit. Sums are numpy's pairwise sums over that axis, whose order depends
on the number of samples only; a sum of products is an element-wise product, then a sum (no BLAS call).

``energy`` goes through an FFT and ``log1p`` through the machine's math library: exact on one machine, equal to about one
part in 1e15 on another. All others use additions, multiplications, divisions and square roots only, which IEEE 754 rounds
the same way on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UsageError
from edgekit.features.calls import Call, check_call, parse_call

Array = NDArray[Any]

AGGREGATES: dict[str, tuple[int, ...]] = {
    "mean": (0,),
    "std": (0,),
    "min": (0,),
    "max": (0,),
    "rms": (0,),
    "peak_to_peak": (0,),
    "slope": (0,),
    "zero_crossings": (0,),
    "quantile": (1,),
    "count": (0,),
    "missing": (0,),
    "energy": (2,),
    "first": (0,),
    "last": (0,),
    "delta": (0,),
}
INEXACT = frozenset({"energy"})
_EDGE = 1e-9
"""A frequency this close to a bin, in bins, lies on it."""


@dataclass(frozen=True)
class Window:
    """Some columns of one window, after missing samples were filled in.

    ``values`` is float64 [columns, samples], NaN where nothing stands; ``missing`` counts, by column, what was not there before
    filling.
    """

    values: Array
    missing: Array
    rate_hz: float

    @property
    def length(self) -> int:
        """Samples that a whole window has."""
        return int(self.values.shape[1])


@dataclass(frozen=True)
class _Present:
    """Columns without a missing sample: ``values`` [columns, n], and where these samples stand in the window."""

    values: Array
    places: Array
    rate_hz: float

    @property
    def count(self) -> int:
        return int(self.values.shape[1])


def parse_aggregates(texts: tuple[str, ...], rate_hz: float) -> tuple[Call, ...]:
    """Read and check aggregates.

    Raises:
        UsageError: ``features.call`` naming what is wrong.
    """
    calls = tuple(parse_call(text, what="aggregate") for text in texts)
    for call in calls:
        check_call(call, AGGREGATES, what="aggregate")
        if call.name == "quantile" and not 0 <= call.numbers[0] <= 1:
            raise UsageError("features.call", f'"{call.text}": a quantile is between 0 and 1.')
        if call.name == "energy" and not 0 <= call.numbers[0] < call.numbers[1] <= rate_hz / 2 + _EDGE:
            text = f'"{call.text}": a band lies between 0 and half the rate, {rate_hz / 2:g} Hz, low before high.'
            raise UsageError("features.call", text)
    return calls


def aggregate(window: Window, calls: tuple[Call, ...]) -> Array:
    """All figures of a window: float64 [columns, calls]; NaN where a column has nothing to compute one from."""
    columns, length = window.values.shape
    out = np.full((columns, len(calls)), np.nan)
    is_gone = np.isnan(window.values)
    if not is_gone.any():
        _fill_in(out, _Present(window.values, np.arange(length, dtype=np.float64), window.rate_hz), calls)
    else:
        for column in range(columns):
            places = np.flatnonzero(~is_gone[column])
            if len(places):
                present = _Present(window.values[column, places][None], places.astype(np.float64), window.rate_hz)
                _fill_in(out[column : column + 1], present, calls)
    for place, call in enumerate(calls):
        if call.name == "count":
            out[:, place] = length - window.missing
        elif call.name == "missing":
            out[:, place] = window.missing / length
    return out


def _fill_in(out: Array, present: _Present, calls: tuple[Call, ...]) -> None:
    for place, call in enumerate(calls):
        if (figure := _FIGURES.get(call.name)) is not None:
            out[:, place] = figure(present, call)


def _sum(values: Array) -> Array:
    return np.asarray(np.add.reduce(np.ascontiguousarray(values), axis=-1))


def _mean(present: _Present, _call: Call) -> Array:
    return np.asarray(_sum(present.values) / present.count)


def _std(present: _Present, call: Call) -> Array:
    deviation = present.values - _mean(present, call)[:, None]
    return np.asarray(np.sqrt(_sum(deviation * deviation) / present.count))


def _rms(present: _Present, _call: Call) -> Array:
    return np.asarray(np.sqrt(_sum(present.values * present.values) / present.count))


def _slope(present: _Present, _call: Call) -> Array:
    """Of the least-squares line, per second; NaN for a single sample."""
    if present.count < 2:
        return np.full(len(present.values), np.nan)
    seconds = present.places / present.rate_hz
    centred = seconds - _sum(seconds[None])[0] / present.count
    return np.asarray(_sum(present.values * centred) / _sum((centred * centred)[None])[0])


def _quantile(present: _Present, call: Call) -> Array:
    """Between order statistics, linear (Hyndman & Fan 1996, definition 7)."""
    ordered = np.sort(present.values, axis=-1)
    place = (present.count - 1) * call.numbers[0]
    low = math.floor(place)
    high = min(low + 1, present.count - 1)
    return np.asarray(ordered[:, low] + (ordered[:, high] - ordered[:, low]) * (place - low))


def _zero_crossings(present: _Present, _call: Call) -> Array:
    is_negative = present.values < 0
    return np.asarray(np.count_nonzero(is_negative[:, 1:] != is_negative[:, :-1], axis=-1), np.float64)


def _energy(present: _Present, call: Call) -> Array:
    """The mean square of what lies in low <= f < high (half the rate included); by Parseval all bands sum up to rms²."""
    count = present.count
    low, high = (hz * count / present.rate_hz for hz in call.numbers)
    last = count // 2 + 1
    first, end = math.ceil(low - _EDGE), last if high >= count / 2 - _EDGE else math.ceil(high - _EDGE)
    if first >= end:
        return np.zeros(len(present.values))
    spectrum = np.fft.rfft(present.values, axis=-1)[:, first:end]
    power = spectrum.real * spectrum.real + spectrum.imag * spectrum.imag
    weights = np.full(end - first, 2.0)
    if first == 0:
        weights[0] = 1.0
    if end == last and count % 2 == 0:
        weights[-1] = 1.0
    return np.asarray(_sum(power * weights) / (float(count) * count))


_FIGURES: dict[str, Callable[[_Present, Call], Array]] = {
    "mean": _mean,
    "std": _std,
    "min": lambda present, _call: np.asarray(present.values.min(axis=-1)),
    "max": lambda present, _call: np.asarray(present.values.max(axis=-1)),
    "rms": _rms,
    "peak_to_peak": lambda present, _call: np.asarray(present.values.max(axis=-1) - present.values.min(axis=-1)),
    "slope": _slope,
    "zero_crossings": _zero_crossings,
    "quantile": _quantile,
    "energy": _energy,
    "first": lambda present, _call: present.values[:, 0],
    "last": lambda present, _call: present.values[:, -1],
    "delta": lambda present, _call: present.values[:, -1] - present.values[:, 0],
}
