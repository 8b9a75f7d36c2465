"""Windows over a stream of samples, whatever the chunks they come in.

The rules are those of one sample after the other; a chunk is only cut where a window closes, so the same samples in the same
order give the same windows, the same counts and the same bits, one by one or all at once.

1. A sample's slot: counted, or with a time column the nearest place on a grid of 1/rate seconds from the stream's first sample.
2. The newest slot is the largest so far. A sample further from it than ``reset_after_s``, either way, starts the stream anew:
   what windows had begun is lost, and counted.
3. Windows end at multiples of the hop; one closes as soon as the newest slot is its last one plus ``late_s``.
4. A sample of a window that has closed, and of none that is open, is late: dropped, counted. A second sample for one slot is
   dropped, counted. A sample between windows (a hop longer than the window) is of no use, and no fault.
5. A closed window that misses more than it may is incomplete: no features, counted. One without any sample was not there.

State is one matrix [columns, length + late] a stream: bounded by the declaration, never by what is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError
from edgekit.features.program import Program
from edgekit.schema.features import TimeUnit

Array = NDArray[Any]
_PER_SECOND: dict[TimeUnit, float] = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_FURTHEST = 1 << 53


@dataclass
class StreamCounters:
    """What became of the samples and windows of one stream."""

    samples: int = 0
    late: int = 0
    duplicates: int = 0
    untimed: int = 0
    """Without a finite time."""
    resets: int = 0
    windows: int = 0
    incomplete: int = 0
    """Windows that missed too much, those at the stream's start among them."""

    def __add__(self, other: StreamCounters) -> StreamCounters:
        return StreamCounters(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class FeatureWindow:
    """One end of windows: the longest one's begin and end in seconds, and every model input [1, ...].

    ``last`` is the place, in the pushed chunk, of the sample that closed it.
    """

    start_s: float
    end_s: float
    inputs: dict[str, Array]
    last: int


class StreamWindows:
    """One stream on its way: push samples, take windows.

    Args:
        program: of a feature set with a stream.
    """

    def __init__(self, program: Program) -> None:
        assert program.stream is not None
        stream = program.stream
        self._program, self._stream = program, stream
        self._late = round(stream.late_s * stream.rate_hz)
        self._reset = max(1, round(stream.reset_after_s * stream.rate_hz))
        self._size = program.length + self._late + 1
        self._ring = np.full((len(program.columns), self._size), np.nan)
        self._taken = np.zeros(self._size, bool)
        self._sentinels = [
            (place, column.missing_value) for place, column in enumerate(stream.columns) if column.missing_value is not None
        ]
        self._zero: int | float | None = None
        """Time of the first sample since the last start, in the stream's unit; slot 0 of the grid is at ``_anchor``."""
        self._anchor = 0
        self._newest: int | None = None
        self._next_slot = 0
        self._next_end = 0
        self.counters = StreamCounters()

    # --- samples in ---------------------------------------------------------------------------------------------------------

    def push(self, columns: Mapping[str, Array]) -> list[FeatureWindow]:
        """Take samples, oldest first.

        Args:
            columns: every column of the stream [n], and its time where it has one. NaN is a missing value.

        Returns:
            The windows that these samples closed.

        Raises:
            DataError: ``data.missing_input``, ``data.shape`` or ``data.dtype``; then nothing was taken.
        """
        values, times = self._read(columns)
        self.counters.samples += values.shape[1]
        kept: Array = np.arange(values.shape[1])
        if times is not None and times.dtype.kind == "f":
            finite = np.isfinite(times) & (np.abs(times) < _FURTHEST * _PER_SECOND[self._stream.time_unit])
            if not finite.all():
                self.counters.untimed += int(np.count_nonzero(~finite))
                values, times, kept = values[:, finite], times[finite], kept[finite]
        return [*self._take(values, times, kept)]

    def check(self, columns: Mapping[str, Array]) -> None:
        """Refuse what :meth:`push` would refuse; nothing is taken."""
        self._read(columns)

    def _read(self, columns: Mapping[str, Array]) -> tuple[Array, Array | None]:
        names = self._program.raw_columns
        lengths = set()
        for name in names:
            if name not in columns:
                text = f'stream "{self._stream.name}": column "{name}" is missing; it has {", ".join(names)}.'
                raise DataError("data.missing_input", text)
            array = columns[name]
            if array.ndim != 1 or array.dtype.kind not in "biuf":
                found = f"{array.dtype.name}{list(array.shape)}"
                text = f'stream "{self._stream.name}": column "{name}" is {found}, expected numbers [n].'
                raise DataError("data.dtype" if array.ndim == 1 else "data.shape", text)
            lengths.add(len(array))
        if len(lengths) > 1:
            raise DataError("data.shape", f'stream "{self._stream.name}": columns of different lengths: {sorted(lengths)}.')
        values = np.empty((len(self._program.columns), lengths.pop()))
        for place, name in enumerate(self._program.columns):
            values[place] = columns[name]
        values[np.isinf(values)] = np.nan
        for place, sentinel in self._sentinels:
            values[place, values[place] == sentinel] = np.nan
        return values, columns[self._stream.time] if self._stream.time else None

    def _take(self, values: Array, times: Array | None, kept: Array) -> Iterator[FeatureWindow]:
        """Cut where the stream starts anew; within a part every sample has a slot."""
        start, count = 0, values.shape[1]
        while start < count:
            if self._newest is None:
                self._begin(None if times is None else times[start])
            assert self._newest is not None
            slots = self._slots(None if times is None else times[start:], count - start)
            running = np.maximum.accumulate(slots)
            before = np.empty_like(running)
            before[0], before[1:] = self._newest, np.maximum(running[:-1], self._newest)
            jumps = np.abs(slots - before) > self._reset
            end = start + (int(jumps.argmax()) if jumps.any() else count - start)
            part = end - start
            yield from self._place(
                values[:, start:end], slots[:part], np.maximum(running[:part], self._newest), kept[start:end]
            )
            if end < count:
                self._forget()
            start = end

    def _begin(self, time: Any) -> None:
        """The first sample, or the first after a jump: it sets the grid."""
        if time is None:
            self._zero = None
            slot = self._next_slot
        else:
            self._zero = int(time) if np.asarray(time).dtype.kind in "iub" else float(time)
            slot = int(np.floor(float(self._zero) / _PER_SECOND[self._stream.time_unit] * self._stream.rate_hz + 0.5))
        self._anchor, self._newest = slot, slot - 1
        self._next_end = -((self._late - slot - 1) // self._program.hop) * self._program.hop
        self._ring[:] = np.nan
        self._taken[:] = False

    def _forget(self) -> None:
        self.counters.resets += 1
        assert self._newest is not None
        begun = np.arange(self._next_end - self._program.length, self._newest + 1)
        self.counters.incomplete += bool(self._taken[begun % self._size].any())
        self._newest = None

    def _slots(self, times: Array | None, count: int) -> Array:
        if times is None:
            return np.arange(self._next_slot, self._next_slot + count)
        if times.dtype.kind in "iub" and isinstance(self._zero, int):
            passed = (times.astype(np.int64) - self._zero).astype(np.float64)
        else:
            passed = times.astype(np.float64) - float(self._zero or 0)
        per_second = _PER_SECOND[self._stream.time_unit]
        places = np.floor((passed / per_second if per_second != 1.0 else passed) * self._stream.rate_hz + 0.5)
        return self._anchor + np.clip(places, -_FURTHEST, _FURTHEST).astype(np.int64)

    # --- windows out --------------------------------------------------------------------------------------------------------

    def _place(self, values: Array, slots: Array, running: Array, kept: Array) -> Iterator[FeatureWindow]:
        """Write the samples of a part; each one that closes windows is a cut."""
        position, count = 0, len(slots)
        while position < count:
            closing = self._next_end - 1 + self._late
            cut = int(np.searchsorted(running, closing, side="left"))
            cut = max(cut, position)
            if cut > position:
                self._write(values[:, position:cut], slots[position:cut], int(running[cut - 1]))
            if cut == count:
                break
            slot, last = int(slots[cut]), int(kept[cut])
            yield from self._close_up_to(slot, last)
            self._write(values[:, cut : cut + 1], slots[cut : cut + 1], slot)
            if not self._late and self._next_end - 1 == slot:
                yield from self._close(last)
            position = cut + 1
        self._next_slot = int(slots[-1]) + 1 if not self._stream.time and count else self._next_slot

    def _write(self, values: Array, slots: Array, newest: int) -> None:
        """Samples, none of which closes a window; ``newest`` is the largest slot up to the last of them."""
        oldest = self._next_end - self._program.length
        self._advance(newest)
        if slots[0] < oldest or not (np.diff(slots) > 0).all() or self._taken[slots % self._size].any():
            inside = slots >= oldest
            closed_until = self._next_end - self._program.hop
            self.counters.late += int(np.count_nonzero(slots < min(oldest, closed_until)))
            values, slots = values[:, inside], slots[inside]
            unique, first = np.unique(slots, return_index=True)
            free = ~self._taken[unique % self._size]
            self.counters.duplicates += len(slots) - int(np.count_nonzero(free))
            values, slots = values[:, first[free]], unique[free]
        places = slots % self._size
        self._ring[:, places] = values
        self._taken[places] = True

    def _advance(self, newest: int) -> None:
        """Clear the slots between the newest so far and the new one."""
        assert self._newest is not None
        if newest <= self._newest:
            return
        steps = min(newest - self._newest, self._size)
        places = np.arange(newest - steps + 1, newest + 1) % self._size
        self._ring[:, places] = np.nan
        self._taken[places] = False
        self._newest = newest

    def _close_up_to(self, slot: int, last: int) -> Iterator[FeatureWindow]:
        """Close every window that a sample at this slot closes, and that it does not belong to."""
        assert self._newest is not None
        newest = self._newest
        while self._next_end <= slot and self._next_end - 1 + self._late <= slot:
            if self._next_end - self._program.length > newest:
                self._skip_to(slot)
                return
            yield from self._close(last)

    def _skip_to(self, slot: int) -> None:
        """Windows that would hold no sample at all: there is none, and no loop over them."""
        hop = self._program.hop
        open_from = -((self._late - slot - 1) // hop) * hop
        self._next_end = max(self._next_end, open_from)

    def _close(self, last: int) -> Iterator[FeatureWindow]:
        end = self._next_end
        self._advance(end - 1)
        self._next_end = end + self._program.hop
        windows = {name: self._cut(end - plan.length, end) for name, plan in self._program.windows.items()}
        if not self._taken[np.arange(end - self._program.length, end) % self._size].any():
            return
        inputs = self._program.of_windows(windows)
        if inputs is None:
            self.counters.incomplete += 1
            return
        self.counters.windows += 1
        yield FeatureWindow(self._seconds(end - self._program.length), self._seconds(end), inputs, last)

    def _cut(self, start: int, end: int) -> Array:
        """The slots start..end-1 as a matrix of its own, C-contiguous."""
        first, last = start % self._size, end % self._size
        if first < last:
            return self._ring[:, first:last].copy()
        return np.concatenate([self._ring[:, first:], self._ring[:, :last]], axis=1)

    def _seconds(self, slot: int) -> float:
        if self._zero is None:
            return slot / self._stream.rate_hz
        return float(self._zero) / _PER_SECOND[self._stream.time_unit] + (slot - self._anchor) / self._stream.rate_hz
