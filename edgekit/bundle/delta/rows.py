"""Which rows of an old tensor the rows of a new one are: what pruning leaves, found again by its bytes.

>>> match_rows([b"aa", b"bb", b"cc", b"dd"], [b"aa", b"cc", b"dd"])
[0, 2, 3]
>>> runs([0, 2, 3])
[(0, 0, 1), (2, 1, 2)]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MISSING = -1


def changed_axis(old: Sequence[int], new: Sequence[int]) -> int | None:
    """The one axis along which two shapes differ; None when it is another number."""
    if len(old) != len(new):
        return None
    axes = [axis for axis, sizes in enumerate(zip(old, new, strict=True)) if sizes[0] != sizes[1]]
    return axes[0] if len(axes) == 1 else None


def rows_along(data: bytes, shape: Sequence[int], item_bytes: int, axis: int) -> list[bytes]:
    """The bytes of each place along an axis."""
    outer, count, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]) * item_bytes
    values = np.frombuffer(data, np.uint8).reshape(outer, count, inner)
    return [row.tobytes() for row in values.transpose(1, 0, 2)]


def match_rows(old: Sequence[bytes], new: Sequence[bytes]) -> list[int]:
    """For each new row an old one with the same bytes, the next behind the last one's if there is one; else ``MISSING``."""
    places: dict[bytes, list[int]] = {}
    for place, row in enumerate(old):
        places.setdefault(row, []).append(place)
    found, last = [], -1
    for row in new:
        same = places.get(row)
        place = MISSING if same is None else next((each for each in same if each > last), same[0])
        found.append(place)
        last = place if place != MISSING else last
    return found


def runs(matches: Sequence[int]) -> list[tuple[int, int, int]]:
    """(old place, new place, length) of rows that follow each other in both; ``MISSING`` rows run together, too."""
    found: list[tuple[int, int, int]] = []
    for place, match in enumerate(matches):
        if found:
            old, new, length = found[-1]
            follows = MISSING if old == MISSING else old + length
            if match == follows:
                found[-1] = (old, new, length + 1)
                continue
        found.append((match, place, 1))
    return found
