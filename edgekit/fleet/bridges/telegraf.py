"""Windows as JSON, one message a window with every figure by its name: what Telegraf and its like can read. No I/O.

The devices' own messages pack figures as a vector whose names the birth declares, and may be compressed: no generic parser
reads that. This reads births and windows as they pass and says the same in words.

>>> from edgekit.schema.message import Birth, MetricSpec
>>> reader = WindowReader()
>>> reader.take("lab", "cam-7", Birth(boot=7, seq=1, time_ms=0, metrics=(MetricSpec(name="requests"),)))
[]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from edgekit.errors import ArtifactError
from edgekit.schema.base import Record
from edgekit.schema.message import AnyMessage, Birth, MetricSpec, Window, WindowBatch
from edgekit.telemetry.codec import schema_crc, unpack_values

MAX_WAITING = 200
"""Windows of one device that are kept until its birth is read."""


class WindowLine(Record, frozen=True, kw_only=True):
    """One window. A figure that is no number is left out. (site, device, boot, seq) names it for ever."""

    site: str
    device: str
    boot: str
    """A text: readers of JSON keep 53 bits of a number."""
    seq: int
    time_ms: int
    """Its end."""
    duration_ms: int
    is_late: bool
    model_digest: str
    figures: dict[str, float]
    labels: dict[str, str] = {}


class _Birth(NamedTuple):
    """What is needed of a birth."""

    schema: int
    metrics: tuple[MetricSpec, ...]
    labels: Mapping[str, str]


class WindowReader:
    """Births and windows in, lines out."""

    def __init__(self) -> None:
        self._births: dict[tuple[str, str], _Birth] = {}
        self._waiting: dict[tuple[str, str], list[WindowBatch]] = {}
        self.skipped = 0
        """Windows that no known birth declares."""

    def take(self, site: str, device: str, message: AnyMessage) -> list[WindowLine]:
        """What a message says, in lines."""
        key = (site, device)
        match message:
            case Birth():
                crc = schema_crc(message.metrics, message.sketches)
                self._births[key] = _Birth(crc, message.metrics, message.labels)
                waiting = self._waiting.pop(key, [])
                return [line for batch in waiting for line in self._lines(site, device, batch)]
            case WindowBatch():
                if key not in self._births:
                    kept = self._waiting.setdefault(key, [])
                    kept.append(message)
                    if len(kept) > MAX_WAITING:
                        self.skipped += len(kept.pop(0).windows)
                    return []
                return self._lines(site, device, message)
            case _:
                return []

    def _lines(self, site: str, device: str, batch: WindowBatch) -> list[WindowLine]:
        birth = self._births[site, device]
        if batch.schema and batch.schema != birth.schema:
            self.skipped += len(batch.windows)
            return []
        return [_line(site, device, batch, window, birth) for window in batch.windows]


def _line(site: str, device: str, batch: WindowBatch, window: Window, birth: _Birth) -> WindowLine:
    try:
        values = unpack_values(window.values)
    except ArtifactError:
        values = []
    figures = {spec.name: value for spec, value in zip(birth.metrics, values, strict=False) if math.isfinite(value)}
    return WindowLine(
        site=site,
        device=device,
        boot=str(batch.boot),
        seq=window.seq,
        time_ms=window.start_ms + window.duration_ms,
        duration_ms=window.duration_ms,
        is_late=batch.is_late,
        model_digest=window.model_digest,
        figures=figures,
        labels=dict(birth.labels),
    )


def encode_line(line: WindowLine) -> bytes:
    """A line as JSON."""
    return msgspec.json.encode(line)
