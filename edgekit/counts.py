"""Histogram counts on the wire: LEB128 varints, runs of zeros in two numbers, one form for one vector.

No numpy: the agent's supervisor merges windows with it.

>>> encode_counts([0, 0, 3, 300, 0]).hex(" ")
'00 01 03 ac 02'
>>> decode_counts(encode_counts([0, 0, 3, 300, 0]), cells=5)
[0, 0, 3, 300, 0]
"""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.errors import ArtifactError

MAX_CELLS = 1 << 16
MAX_COUNT = 1 << 53
_MAX_SHIFT = 56


def encode_counts(counts: Sequence[int]) -> bytes:
    """Counts as varints; a zero is followed by how many more zeros follow it. Trailing zeros are left out."""
    numbers = list(counts)
    while numbers and not numbers[-1]:
        numbers.pop()
    out = bytearray()
    position = 0
    while position < len(numbers):
        number = numbers[position]
        _put(out, number)
        position += 1
        if not number:
            end = position
            while not numbers[end]:
                end += 1
            _put(out, end - position)
            position = end
    return bytes(out)


def _put(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def decode_counts(data: bytes, *, cells: int) -> list[int]:
    """The counts in some bytes, ``cells`` of them.

    Raises:
        ArtifactError: ``telemetry.malformed`` for anything that :func:`encode_counts` does not write.
    """
    if cells > MAX_CELLS:
        raise _malformed(f"{cells} bins, at most {MAX_CELLS} are read")
    counts = _decode_used(data, cells)
    return counts + [0] * (cells - len(counts))


def _decode_used(data: bytes, cells: int) -> list[int]:
    """The counts up to the last that is not zero."""
    numbers = _varints(data)
    counts: list[int] = []
    index = 0
    while index < len(numbers):
        number, index = numbers[index], index + 1
        if number:
            counts.append(number)
        elif index < len(numbers) and numbers[index] < cells:
            counts += [0] * (1 + numbers[index])
            index += 1
        else:
            raise _malformed("a run of zeros without its length")
        if len(counts) > cells or number > MAX_COUNT:
            raise _malformed(f"more than {cells} bins, or a count of {number}")
    if encode_counts(counts) != data:
        raise _malformed("not in its shortest form")
    return counts


def merge_counts(parts: Sequence[bytes]) -> bytes:
    """The counts of all; trailing zeros are not needed to add.

    Raises:
        ArtifactError: ``telemetry.malformed``.
    """
    total: list[int] = []
    for part in parts:
        counts = _decode_used(part, MAX_CELLS)
        total += [0] * (len(counts) - len(total))
        for index, number in enumerate(counts):
            total[index] += number
    return encode_counts(total)


def _varints(data: bytes) -> list[int]:
    numbers: list[int] = []
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        if byte & 0x80:
            shift += 7
            if shift > _MAX_SHIFT:
                raise _malformed("a number is too long")
            continue
        numbers.append(value)
        value = shift = 0
    if shift:
        raise _malformed("it ends in the middle of a number")
    return numbers


def _malformed(why: str) -> ArtifactError:
    return ArtifactError("telemetry.malformed", f"sketch: {why}.")
