"""The reference profile: what inputs and answers looked like when the model was judged, so that drift is measured against it.

It travels in the bundle, signed, so that device, server and report use the same bins. A stream is one number per sample: a
column of a table, a summary of an image or a signal, the confidence of the answer. Its bins are cut at the reference's
quantiles; below the smallest and above the largest value seen there is one bin each, and what is not a number is counted apart.
"""

from __future__ import annotations

from typing import Literal

from edgekit.schema.base import SCHEMA_VERSION, Record
from edgekit.schema.digest import Digest

StreamKind = Literal["input", "output", "classes"]
Summary = Literal["value", "mean", "std", "rms", "peak", "outside"]


class StreamProfile(Record, frozen=True, kw_only=True):
    """One stream: ``edges`` [E] cut E + 1 bins, ``counts`` [E + 1] are the reference's; missing ones stand beside.

    For the kind ``classes`` there are no edges: ``counts`` are a table of predicted class by bin of confidence, row by row.
    """

    name: str
    """For people: the input's name with the column or summary, ``x.mean``, ``temperature``."""
    kind: StreamKind
    tensor: str
    summary: Summary = "value"
    axis: str = ""
    """Which part of the tensor: empty for all of it, ``c3`` for index 3 of the channel axis, ``f7`` for column 7."""
    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    missing: int = 0
    mean: float = 0.0
    std: float = 0.0
    low: float = 0.0
    """Summary ``outside``: the reference's least and largest element; a value is the share of elements beyond them."""
    high: float = 0.0
    right: tuple[int, ...] = ()
    """Kind ``classes`` with labels: how many of ``counts`` were right, for quality estimated without labels."""


class ReferenceProfile(Record, frozen=True, kw_only=True):
    """The streams of one model. Fewer than 5,000 samples make drift slow to see; ``edgekit`` says so where it writes one."""

    samples: int
    streams: tuple[StreamProfile, ...]
    classes: int = 0
    data: Digest | None = None
    source: str = ""
    schema_version: int = SCHEMA_VERSION
