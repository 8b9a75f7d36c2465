"""What both sides of a delta compute alike: a quantized weight at its new scale, products of scales, folded differences.

Exact on every machine: the products of 8-bit integers with float32 scales fit in a double, and one IEEE division and one
rounding to even follow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def channel_of(start: int, count: int, *, channels: int, inner: int) -> NDArray[np.int64]:
    """The channel of each of ``count`` bytes from ``start`` on, in a tensor [outer, channels, inner]."""
    places = np.arange(start, start + count, dtype=np.int64)
    found: NDArray[np.int64] = (places // inner) % channels
    return found


def fold(differences: NDArray[Any]) -> bytes:
    """Unsigned differences as 0, -1, 1, -2, 2, … in planes of bytes: what is small has only zeros in the upper planes."""
    width = differences.dtype.itemsize
    signs = differences >> (8 * width - 1)
    folded = (differences << 1) ^ (0 - signs)
    found: bytes = folded.astype(f"<u{width}").view(np.uint8).reshape(-1, width).T.tobytes()
    return found


def unfold(planes: bytes, width: int) -> NDArray[Any]:
    """The opposite of :func:`fold`, for integers of ``width`` bytes."""
    joined = np.frombuffer(planes, np.uint8).reshape(width, -1).T
    folded = np.ascontiguousarray(joined).view(f"<u{width}").ravel()
    return (folded >> 1) ^ (0 - (folded & 1))


def multiply(scales: NDArray[np.float32], factor_bits: int) -> bytes:
    """Scales times a factor that is given by its bits, as little-endian float32."""
    factor = np.array([factor_bits], "<u4").view("<f4")
    with np.errstate(all="ignore"):
        found: bytes = (scales * factor).astype("<f4").tobytes()
    return found


def rescale(
    old: Bytes,
    old_scale: NDArray[np.float32],
    new_scale: NDArray[np.float32],
    *,
    is_signed: bool,
    zero_point: int,
) -> Bytes:
    """The bytes that mean the same values at another scale.

    Args:
        old: bytes as they lie in the file.
        old_scale: of each byte.
        new_scale: of each byte.
        is_signed: int8, else uint8.
        zero_point: of both.
    """
    values = (old.view(np.int8) if is_signed else old).astype(np.float64) - zero_point
    with np.errstate(all="ignore"):
        moved = np.rint(values * old_scale.astype(np.float64) / new_scale.astype(np.float64)) + zero_point
    low, high = (-128, 127) if is_signed else (0, 255)
    bounded = np.clip(np.nan_to_num(moved, nan=zero_point, posinf=high, neginf=low), low, high)
    found: Bytes = bounded.astype(np.int64).astype(np.uint8)
    return found
