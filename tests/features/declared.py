"""Declarations and streams for the tests of features."""

from __future__ import annotations

import numpy as np

from edgekit.schema.features import (
    FeatureSet,
    LogMel,
    StreamColumn,
    StreamSpec,
    WindowFeatures,
    WindowPart,
    WindowSamples,
    WindowSpec,
)

EVERY = (
    "mean",
    "std",
    "min",
    "max",
    "rms",
    "peak_to_peak",
    "slope",
    "zero_crossings",
    "quantile(0.9)",
    "count",
    "missing",
    "energy(0, 10)",
    "energy(10, 50)",
    "first",
    "last",
    "delta",
)
FIGURES = tuple(each for each in EVERY if not each.startswith("energy"))


def vibration(
    *,
    length=40,
    hop=15,
    fill="linear",
    max_missing=0.5,
    time="t",
    late_s=0.0,
    aggregates=EVERY,
    rate_hz=100.0,
    reset_after_s=5.0,
):
    """Two columns at 100 Hz: figures of a window, and the window itself."""
    return FeatureSet(
        stream=StreamSpec(
            name="motor",
            columns=(StreamColumn(name="ax", unit="g"), StreamColumn(name="ay", unit="g", missing_value=-999)),
            rate_hz=rate_hz,
            time=time,
            late_s=late_s,
            reset_after_s=reset_after_s,
        ),
        windows=(WindowSpec(name="w", length=length, hop=hop, fill=fill, max_missing=max_missing),),
        inputs=(
            WindowFeatures(name="x", parts=(WindowPart(window="w", aggregates=aggregates),), dtype="float64"),
            WindowSamples(name="raw", window="w", steps=("clip(-3, 3)",)),
        ),
    )


def audio():
    """Half a second of sound at 2 kHz."""
    return FeatureSet(
        stream=StreamSpec(name="mic", columns=(StreamColumn(name="pcm"),), rate_hz=2000),
        windows=(WindowSpec(name="clip", length_s=0.5, hop_s=0.25),),
        inputs=(LogMel(name="mel", window="clip", column="pcm", fft=128, frame_hop=64, bands=8, steps=("normalize(-3, 2)",)),),
    )


def samples(count, *, seed=0, rate_hz=100.0, start_s=1000.0):
    """A shaft that turns at 7 Hz, with noise."""
    random = np.random.default_rng(seed)
    t = start_s + np.arange(count) / rate_hz
    ax = np.sin(2 * np.pi * 7 * t) + 0.1 * random.normal(size=count)
    return {"t": t, "ax": ax, "ay": random.normal(size=count) + 0.3}


def pushed(stream, columns, sizes):
    """Everything that comes out when the samples come in chunks of these sizes."""
    count = len(next(iter(columns.values())))
    found, start, turn = [], 0, 0
    while start < count:
        size = sizes[turn % len(sizes)]
        found += stream.push({name: array[start : start + size] for name, array in columns.items()})
        start, turn = start + size, turn + 1
    return found


def bits(windows):
    """Windows to the last bit."""
    return [
        (
            window.start_s,
            window.end_s,
            {name: (value.dtype.str, value.shape, value.tobytes()) for name, value in window.inputs.items()},
        )
        for window in windows
    ]
