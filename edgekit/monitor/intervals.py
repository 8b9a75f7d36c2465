"""One interval of one model: what all devices sent in it, added up by slice of the fleet.

A slice is ``all``, or a part of the devices that ``key=value`` names (``site=lab``). Counts add up exactly; what does not is
made here, where the devices are still apart: how much they differ from one another, and which of them a drift comes from.

>>> from edgekit.schema.baseline import ReferenceProfile, StreamProfile
>>> stream = StreamProfile(name="x", kind="input", tensor="x", edges=(0.0,), counts=(1, 2))
>>> folder = Folder(ReferenceProfile(samples=3, streams=(stream,)), start_ms=0)
>>> folder.add([DeviceWindow(device="lab/cam-1", samples=3, sketched=3, sketches=(bytes([1, 2]),))])
>>> interval = folder.finish({"lab/cam-1": ("site=lab",)})
>>> interval.slices["site=lab"].samples, interval.slices["all"].devices
(3, 1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.monitor.compare import JEFFREYS, design_effect
from edgekit.monitor.detector import scores_of
from edgekit.monitor.sketch import decode_counts, encode_counts
from edgekit.monitor.streams import Watched, decode_many, sketch_widths, watched_streams
from edgekit.schema.base import Record
from edgekit.schema.baseline import ReferenceProfile

ALL = "all"
TOP_DEVICES = 5


class DeviceWindow(Record, frozen=True, kw_only=True):
    """What one device sent of the model in one window."""

    device: str
    requests: int = 0
    errors: int = 0
    rejected: int = 0
    samples: int = 0
    sketched: int = 0
    labelled: int = 0
    right: int = 0
    duration_ms: int = 0
    sketches: tuple[bytes, ...] = ()
    verdicts: dict[str, int] = {}  # noqa: RUF012 - msgspec copies an empty default
    latency: bytes = b""


class SliceCounts(Record, frozen=True, kw_only=True):
    """A slice's sums over one interval, or over several: they are mergeable."""

    devices: int = 0
    windows: int = 0
    requests: int = 0
    errors: int = 0
    rejected: int = 0
    samples: int = 0
    sketched: int = 0
    labelled: int = 0
    right: int = 0
    covered_ms: int = 0
    """Sum of the windows' durations."""
    verdicts: dict[str, int] = {}  # noqa: RUF012 - msgspec copies an empty default
    sketches: tuple[bytes, ...] = ()
    """Of the profile's streams, encoded; empty where nothing was sketched."""

    def cells(self, widths: Sequence[int]) -> list[NDArray[np.int64]]:
        """The counts of each of the profile's streams."""
        if len(self.sketches) != len(widths):
            return [np.zeros(width, dtype=np.int64) for width in widths]
        return [decode_counts(part, cells=width) for part, width in zip(self.sketches, widths, strict=True)]


class TopDevice(Record, frozen=True, kw_only=True):
    """A device with its share of what speaks for drift."""

    device: str
    share: float
    samples: int


class Interval(Record, frozen=True, kw_only=True):
    """An interval of one model."""

    start_ms: int
    slices: dict[str, SliceCounts]
    variation: tuple[tuple[float, float], ...] = ()
    """By watched stream: variance between devices over that of one sample, of the bins' shares and of where values lie (or how
    wide, whichever is larger); may be below 0 by chance, NaN where one device cannot tell."""
    top: tuple[tuple[TopDevice, ...], ...] = ()
    """By watched stream, over all devices."""
    unreadable: int = 0
    """Windows whose sketches fit no profile, or say more than they saw."""


@dataclass
class _Sums:
    requests: int = 0
    errors: int = 0
    rejected: int = 0
    samples: int = 0
    sketched: int = 0
    labelled: int = 0
    right: int = 0
    covered_ms: int = 0
    windows: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)

    def add(self, window: DeviceWindow) -> None:
        for name in ("requests", "errors", "rejected", "samples", "sketched", "labelled", "right"):
            setattr(self, name, getattr(self, name) + getattr(window, name))
        self.windows += 1
        self.covered_ms += window.duration_ms
        for key, number in window.verdicts.items():
            self.verdicts[key] = self.verdicts.get(key, 0) + number


class Folder:
    """Adds up the windows of one interval. Memory is one histogram a device and stream."""

    def __init__(self, profile: ReferenceProfile, *, start_ms: int) -> None:
        self._watched: tuple[Watched, ...] = watched_streams(profile)
        self._scores = [scores_of(watched.reference) for watched in self._watched]
        self._widths = sketch_widths(profile)
        self._is_numeric = [stream.kind != "classes" for stream in profile.streams]
        self._start_ms = start_ms
        self._places: dict[str, int] = {}
        self._sums: list[_Sums] = []
        self._cells = [np.zeros((0, width), dtype=np.int64) for width in self._widths]
        self._unreadable = 0

    def add(self, windows: Sequence[DeviceWindow]) -> None:
        """Add some windows; several of one device are one device."""
        places = np.zeros(len(windows), dtype=np.int64)
        for at, window in enumerate(windows):
            place = self._places.setdefault(window.device, len(self._places))
            if place == len(self._sums):
                self._sums.append(_Sums())
            self._sums[place].add(window)
            places[at] = place
        self._grow()
        chosen = [at for at, window in enumerate(windows) if len(window.sketches) == len(self._widths) and window.sketched > 0]
        self._unreadable += sum(1 for window in windows if window.sketches and len(window.sketches) != len(self._widths))
        if chosen and self._widths:
            self._add_sketches([windows[at] for at in chosen], places[chosen])

    def _grow(self) -> None:
        missing = len(self._sums) - (self._cells[0].shape[0] if self._cells else len(self._sums))
        if missing > 0:
            extra = max(missing, len(self._sums) // 2)
            self._cells = [np.pad(table, ((0, extra), (0, 0))) for table in self._cells]

    def _add_sketches(self, windows: Sequence[DeviceWindow], places: NDArray[np.int64]) -> None:
        sketched = np.array([window.sketched for window in windows])
        is_good = np.ones(len(windows), dtype=np.bool_)
        tables = []
        for at, width in enumerate(self._widths):
            counts, is_read = decode_many([window.sketches[at] for window in windows], cells=width)
            is_good &= is_read
            if self._is_numeric[at]:
                is_good &= counts.sum(axis=1) <= sketched
            tables.append(counts)
        self._unreadable += int((~is_good).sum())
        for at, counts in enumerate(tables):
            np.add.at(self._cells[at], places[is_good], counts[is_good])

    def finish(self, slices_of: Mapping[str, Sequence[str]]) -> Interval:
        """The sums by slice.

        Args:
            slices_of: of each device, beside ``all``.
        """
        count = len(self._sums)
        members: dict[str, list[int]] = {ALL: list(range(count))}
        for device, place in self._places.items():
            for name in slices_of.get(device, ()):
                members.setdefault(name, []).append(place)
        tables = [table[:count] for table in self._cells]
        by_stream = [watched.read(tables[watched.source]) for watched in self._watched]
        names = list(self._places)
        return Interval(
            start_ms=self._start_ms,
            slices={name: self._slice(members[name], tables) for name in [ALL, *sorted(set(members) - {ALL})]},
            variation=tuple(variation_of(table, scores) for table, scores in zip(by_stream, self._scores, strict=True)),
            top=tuple(_top_devices(watched, table, names) for watched, table in zip(self._watched, by_stream, strict=True)),
            unreadable=self._unreadable,
        )

    def _slice(self, places: Sequence[int], tables: Sequence[NDArray[np.int64]]) -> SliceCounts:
        sums = [self._sums[place] for place in places]
        verdicts: dict[str, int] = {}
        for each in sums:
            for key, number in each.verdicts.items():
                verdicts[key] = verdicts.get(key, 0) + number
        added: dict[str, Any] = {
            name: sum(getattr(each, name) for each in sums)
            for name in ("windows", "requests", "errors", "rejected", "samples", "sketched", "labelled", "right", "covered_ms")
        }
        sketches = tuple(encode_counts(table[list(places)].sum(axis=0)) for table in tables)
        is_sketched = any(sketches)
        return SliceCounts(devices=len(places), verdicts=verdicts, sketches=sketches if is_sketched else (), **added)


def merge_slices(parts: Sequence[SliceCounts], widths: Sequence[int]) -> SliceCounts:
    """The sums of several intervals; ``devices`` is the largest of them."""
    verdicts: dict[str, int] = {}
    for part in parts:
        for key, number in part.verdicts.items():
            verdicts[key] = verdicts.get(key, 0) + number
    names = ("windows", "requests", "errors", "rejected", "samples", "sketched", "labelled", "right", "covered_ms")
    with_sketches = [part for part in parts if len(part.sketches) == len(widths)]
    sketches = tuple(
        encode_counts(decode_many([part.sketches[at] for part in with_sketches], cells=width)[0].sum(axis=0))
        for at, width in enumerate(widths)
    )
    added: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in names}
    devices = max((part.devices for part in parts), default=0)
    return SliceCounts(devices=devices, verdicts=verdicts, sketches=sketches if with_sketches else (), **added)


def variation_of(by_device: NDArray[np.float64], scores: NDArray[np.float64]) -> tuple[float, float]:
    """How much devices differ from each other: of the shares of all bins, and of place or width.

    Args:
        by_device: counts [D, B].
        scores: of the bins [2, B], see :func:`edgekit.monitor.detector.scores_of`.
    """
    rows = by_device[by_device.sum(axis=1) > 0]
    if rows.shape[0] < 2:
        return float("nan"), float("nan")
    sizes = rows.sum(axis=1)
    worth = float(sizes.sum() ** 2 / (sizes**2).sum())
    of_bins = (design_effect(rows) - 1.0) * worth / float(sizes.sum())
    return of_bins, max(_variance_component(rows, sizes, score) for score in scores)


def _variance_component(rows: NDArray[np.float64], sizes: NDArray[np.float64], score: NDArray[np.float64]) -> float:
    """Variance of the devices' means over that within them, by the analysis of variance for groups of different sizes."""
    total, groups = float(sizes.sum()), rows.shape[0]
    means = rows @ score / sizes
    grand = float(rows.sum(axis=0) @ score) / total
    within = float((rows @ score**2).sum() - (sizes * means**2).sum())
    if total <= groups or within <= 0:
        return 0.0
    within /= total - groups
    between = float((sizes * (means - grand) ** 2).sum()) / (groups - 1)
    size = (total - float((sizes**2).sum()) / total) / (groups - 1)
    return float((between - within) / size / within)


def _top_devices(watched: Watched, by_device: NDArray[np.float64], names: Sequence[str]) -> tuple[TopDevice, ...]:
    """The devices whose samples speak most for where all samples have moved to."""
    total = by_device.sum(axis=0)
    reference = np.asarray(watched.reference.counts)
    if not total.sum() or not reference.sum():
        return ()
    now = (total + JEFFREYS) / (total + JEFFREYS).sum()
    before = (reference + JEFFREYS) / (reference + JEFFREYS).sum()
    spoken = np.maximum(by_device @ np.log(now / before), 0.0)
    if not spoken.sum():
        return ()
    order = np.argsort(-spoken, kind="stable")[:TOP_DEVICES]
    return tuple(
        TopDevice(device=names[at], share=float(spoken[at] / spoken.sum()), samples=int(by_device[at].sum()))
        for at in order.tolist()
        if spoken[at] > 0
    )
