"""What is done to raw samples before the model sees them: declared once, carried in the manifest, the same everywhere.

A feature set makes every input of the model. Either from a stream of sensor samples, cut into windows (``windows``: figures of
a window; ``samples``: the window itself; ``log_mel``: its spectrum), or from what one request holds (``table``: columns;
``image``: an image). Steps and figures are written as calls: ``"clip(-5, 5)"``, ``"quantile(0.9)"``, ``"energy(10, 50)"``.

The records say what was typed; :mod:`edgekit.features.program` reads the calls and refuses what does not fit together.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgekit.schema.base import Record
from edgekit.schema.tensor import DType

StreamName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?\Z")]
TimeUnit = Literal["s", "ms", "us", "ns"]
Fill = Literal["none", "hold", "linear", "zero"]
"""What stands in a window for missing samples: nothing (figures over what is there), the last value before (the first after, at
the window's begin), the line between the neighbours, or 0."""
Layout = Literal["time_first", "channel_first"]


class Typed(Record, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=False):
    """A record that a person typed: what is left out stays out."""


class StreamColumn(Typed, frozen=True, kw_only=True):
    """One value of a sample."""

    name: str
    unit: str = ""
    missing_value: float | None = None
    """Means missing, beside NaN."""


class StreamSpec(Typed, frozen=True, kw_only=True):
    """A stream of samples at a nominal rate.

    With a ``time`` column each sample has a place on a grid of 1/rate seconds, counted from the stream's first sample: gaps are
    known. Without one the samples are counted.
    """

    name: StreamName
    columns: tuple[StreamColumn, ...]
    rate_hz: float
    time: str = ""
    time_unit: TimeUnit = "s"
    late_s: float = 0.0
    """How long a window waits for samples that come late; what comes later still is dropped and counted."""
    reset_after_s: float = 60.0
    """A jump in time beyond this, either way, starts the stream anew."""


class WindowSpec(Typed, frozen=True, kw_only=True):
    """Windows of a stream: ``length`` and ``hop`` in samples, or in seconds. Without a hop they follow each other (tumbling).

    Windows end at whole multiples of the hop. One that misses more than ``max_missing`` of its samples (NaN counts as missing),
    in any column that is used, is skipped and counted.
    """

    name: str
    length: int | None = None
    length_s: float | None = None
    hop: int | None = None
    hop_s: float | None = None
    max_missing: float = 0.0
    fill: Fill = "none"


class WindowPart(Typed, frozen=True, kw_only=True):
    """Figures of one window: for each column (all where none is named) each aggregate, in this order."""

    window: str
    aggregates: tuple[str, ...]
    columns: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()


class WindowFeatures(Typed, frozen=True, kw_only=True, tag_field="kind", tag="windows"):
    """[batch, figures] out of windows. ``mean`` and ``std``, one for each figure, normalize it."""

    name: str
    parts: tuple[WindowPart, ...]
    dtype: DType = "float32"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class WindowSamples(Typed, frozen=True, kw_only=True, tag_field="kind", tag="samples"):
    """The samples of a window: [batch, length, columns] or [batch, columns, length]. ``mean`` and ``std`` by column."""

    name: str
    window: str
    columns: tuple[str, ...] = ()
    layout: Layout = "time_first"
    steps: tuple[str, ...] = ()
    dtype: DType = "float32"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class LogMel(Typed, frozen=True, kw_only=True, tag_field="kind", tag="log_mel"):
    """The log-mel spectrum of a window of one column: [batch, frames, bands], or [batch, bands, frames] with channels first.

    Frames of ``fft`` samples, ``frame_hop`` apart, under a Hann window; power spectrum; ``bands`` triangles on the mel scale
    (HTK) from ``low_hz`` to ``high_hz`` (0: half the rate); the natural logarithm of what is above ``floor``.
    """

    name: str
    window: str
    column: str
    fft: int
    frame_hop: int
    bands: int
    low_hz: float = 0.0
    high_hz: float = 0.0
    floor: float = 1e-6
    layout: Layout = "time_first"
    steps: tuple[str, ...] = ()
    dtype: DType = "float32"


class TableColumn(Typed, frozen=True, kw_only=True):
    """One column of a request or a table, and what is done to it; ``one_hot(a, b, c)`` makes several places of it."""

    name: str
    steps: tuple[str, ...] = ()


class TableFeatures(Typed, frozen=True, kw_only=True, tag_field="kind", tag="table"):
    """[batch, places] out of columns, in this order."""

    name: str
    columns: tuple[TableColumn, ...]
    dtype: DType = "float32"


class ImageFeatures(Typed, frozen=True, kw_only=True, tag_field="kind", tag="image"):
    """An image [batch, height, width, channels] as the model wants it: scaled, normalized by channel, in its layout."""

    name: str
    raw: str
    """The raw input's name."""
    height: int
    width: int
    channels: int
    raw_dtype: DType = "uint8"
    layout: Literal["channel_first", "channel_last"] = "channel_first"
    scale: float = 1 / 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    dtype: DType = "float32"


FeatureInput = WindowFeatures | WindowSamples | LogMel | TableFeatures | ImageFeatures


class FeatureSet(Typed, frozen=True, kw_only=True):
    """Every input of a model, and where it comes from."""

    inputs: tuple[FeatureInput, ...]
    stream: StreamSpec | None = None
    windows: tuple[WindowSpec, ...] = ()
