"""A latency histogram with logarithmic buckets, exactly mergeable by addition.

The mapping is that of OpenTelemetry's exponential histogram at scale 3: bucket ``i`` holds (2^(i/8), 2^((i+1)/8)], eight
buckets an octave, so a quantile is off by less than one bucket, 9 % of its value.
Buckets are sparse; only those with counts are kept and sent. Values at
or below zero, and those too small to matter, fall into the lowest bucket, those too large into the highest.

    >>> bins = LatencyHistogram()
    >>> for value in (1.0, 2.0, 4.0):
    ...     bins.add(value)
    >>> bins.count, round(bins.quantile(0.5), 2)
    (3, 1.92)
    >>> LatencyHistogram.decode(bins.encode()) == bins
    True
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from edgekit.errors import ArtifactError

SCALE = 3
BINS = f"log2:{SCALE}"
PER_OCTAVE = 1 << SCALE
MIN_INDEX = -20 * PER_OCTAVE
MAX_INDEX = 40 * PER_OCTAVE
_FORMAT = 1
_MAX_VARINT_BYTES = 10
_MAX_COUNT = 1 << 53
"""More in one bucket is garbage, and no double could hold it."""


def index_of(value: float) -> int:
    """The bucket of a value: the smallest ``i`` with value <= 2^((i+1)/8), clamped."""
    if not value > 0:
        return MIN_INDEX
    if math.isinf(value):
        return MAX_INDEX
    return min(max(math.ceil(math.log2(value) * PER_OCTAVE) - 1, MIN_INDEX), MAX_INDEX)


def bounds_of(index: int) -> tuple[float, float]:
    """Lower (exclusive) and upper (inclusive) bound of a bucket."""
    return 2.0 ** (index / PER_OCTAVE), 2.0 ** ((index + 1) / PER_OCTAVE)


class LatencyHistogram:
    """Counts by bucket."""

    __slots__ = ("_counts", "count")

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self._counts: dict[int, int] = {index: number for index, number in (counts or {}).items() if number}
        self.count = sum(self._counts.values())

    @property
    def counts(self) -> dict[int, int]:
        """Count by bucket index, in order."""
        return dict(sorted(self._counts.items()))

    def add(self, value: float, times: int = 1) -> None:
        """Count a value; NaN is ignored."""
        if value != value:  # noqa: PLR0124 - NaN
            return
        index = index_of(value)
        self._counts[index] = self._counts.get(index, 0) + times
        self.count += times

    def merge(self, other: LatencyHistogram) -> None:
        """Add another histogram's counts to this one."""
        for index, number in other._counts.items():
            self._counts[index] = self._counts.get(index, 0) + number
        self.count += other.count

    def quantile(self, q: float) -> float:
        """The value below which a share ``q`` of the counts lies, interpolated geometrically within its bucket; NaN if empty.

        Args:
            q: 0..1.
        """
        if not self.count:
            return math.nan
        rank, below = min(max(q, 0.0), 1.0) * self.count, 0
        last = MIN_INDEX
        for last, number in sorted(self._counts.items()):
            if below + number >= rank:
                share = min(max((rank - below) / number, 0.0), 1.0)
                return float(2.0 ** ((last + share) / PER_OCTAVE))
            below += number
        return bounds_of(last)[1]

    def encode(self) -> bytes:
        """Compact bytes: format, then gap and count of each used bucket as varints (the first index zigzag); empty if empty."""
        if not self.count:
            return b""
        parts = [bytes([_FORMAT])]
        previous: int | None = None
        for index, number in sorted(self._counts.items()):
            gap = _zigzag(index) if previous is None else index - previous
            parts += [_varint(gap), _varint(number)]
            previous = index
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> LatencyHistogram:
        """The histogram in some bytes.

        Raises:
            ArtifactError: ``telemetry.malformed``.
        """
        if not data:
            return cls()
        if data[0] != _FORMAT:
            raise ArtifactError("telemetry.malformed", f"histogram of format {data[0]}: this version reads {_FORMAT}.")
        numbers = _read_varints(data, 1)
        if len(numbers) % 2:
            raise ArtifactError("telemetry.malformed", "histogram: a bucket without its count.")
        counts: dict[int, int] = {}
        index = 0
        for position in range(0, len(numbers), 2):
            index = _unzigzag(numbers[0]) if position == 0 else index + numbers[position]
            number = numbers[position + 1]
            if index in counts or not MIN_INDEX <= index <= MAX_INDEX or not 0 < number <= _MAX_COUNT:
                raise ArtifactError("telemetry.malformed", f"histogram: bucket {index} is out of order or out of range.")
            counts[index] = number
        return cls(counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LatencyHistogram) and self._counts == other._counts

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"LatencyHistogram({self.counts})"


def _zigzag(value: int) -> int:
    return value << 1 if value >= 0 else (-value << 1) - 1


def _unzigzag(value: int) -> int:
    return value >> 1 if value % 2 == 0 else -((value + 1) >> 1)


def _varint(value: int) -> bytes:
    """LEB128 of a non-negative integer."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varints(data: bytes, start: int) -> list[int]:
    numbers: list[int] = []
    value = shift = 0
    for byte in data[start:]:
        value |= (byte & 0x7F) << shift
        if byte & 0x80:
            shift += 7
            if shift > 7 * (_MAX_VARINT_BYTES - 1):
                raise ArtifactError("telemetry.malformed", "histogram: a number is too long.")
            continue
        numbers.append(value)
        value = shift = 0
    if shift:
        raise ArtifactError("telemetry.malformed", "histogram: it ends in the middle of a number.")
    return numbers
