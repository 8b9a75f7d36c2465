"""The log-mel spectrum of one window.

Hann window (periodic), power spectrum, triangles on the mel scale of O'Shaughnessy (1987) as HTK has them, peak 1. Every band
is an element-wise product and a sum over its own bins: no matrix product, whose order would depend on the BLAS library.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UsageError
from edgekit.schema.features import LogMel

Array = NDArray[Any]


def _mel(hz: float) -> float:
    return 2595.0 * math.log10(1.0 + hz / 700.0)


def _hz(mel: float) -> float:
    return 700.0 * (math.pow(10.0, mel / 2595.0) - 1.0)


class MelBank:
    """Made ready once for one declaration: [samples] -> [frames, bands]."""

    def __init__(self, spec: LogMel, *, length: int, rate_hz: float) -> None:
        high = spec.high_hz or rate_hz / 2
        if not 0 < spec.fft <= length or spec.frame_hop < 1 or spec.bands < 1 or spec.floor <= 0:
            text = f"{spec.name}: frames of {spec.fft} every {spec.frame_hop} samples do not fit a window of {length}."
            raise UsageError(
                "features.log_mel", text, hint="fft, frame_hop, bands and floor are above 0, fft at most the window."
            )
        if not 0 <= spec.low_hz < high <= rate_hz / 2:
            raise UsageError("features.log_mel", f"{spec.name}: bands from {spec.low_hz:g} to {high:g} Hz at {rate_hz:g} Hz.")
        self.frames = 1 + (length - spec.fft) // spec.frame_hop
        self._fft, self._hop, self._floor = spec.fft, spec.frame_hop, spec.floor
        self._taper = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(spec.fft) / spec.fft)
        edges = np.linspace(_mel(spec.low_hz), _mel(high), spec.bands + 2)
        bins = np.array([_hz(edge) for edge in edges]) * spec.fft / rate_hz
        self._bands = [_triangle(*bins[band : band + 3].tolist(), count=spec.fft // 2 + 1) for band in range(spec.bands)]
        if empty := [band for band, (_start, weights) in enumerate(self._bands) if not len(weights)]:
            text = f"{spec.name}: band {empty[0]} of {spec.bands} holds no frequency of an FFT of {spec.fft}."
            raise UsageError("features.log_mel", text, hint="Use fewer bands, or a longer fft.")

    def apply(self, samples: Array) -> Array:
        """Samples [length], float64, none missing."""
        starts = np.arange(self.frames) * self._hop
        frames = samples[starts[:, None] + np.arange(self._fft)] * self._taper
        spectrum = np.fft.rfft(frames, axis=-1)
        power = spectrum.real * spectrum.real + spectrum.imag * spectrum.imag
        out = np.empty((self.frames, len(self._bands)))
        for band, (start, weights) in enumerate(self._bands):
            part = np.ascontiguousarray(power[:, start : start + len(weights)] * weights)
            out[:, band] = np.add.reduce(part, axis=-1)
        return np.asarray(np.log(np.maximum(out, self._floor)))


def _triangle(low: float, peak: float, high: float, *, count: int) -> tuple[int, Array]:
    """First bin and weights of one band."""
    start, end = max(0, math.floor(low) + 1), min(count, math.ceil(high))
    bins = np.arange(start, end, dtype=np.float64)
    weights = np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak))
    return start, weights[: len(bins)]
