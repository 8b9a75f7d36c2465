"""Names, types and shapes of a model's inputs and outputs, and small tensors as data."""

from __future__ import annotations

from typing import Literal

from edgekit.schema.base import Record

DType = Literal[
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"
]


class TensorSpec(Record, frozen=True, kw_only=True):
    """One input or output.

    ``shape`` has a number for a fixed axis and a name (``"batch"``) for a dynamic one.
    """

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


class TensorData(Record, frozen=True, kw_only=True):
    """A small tensor: C-contiguous little-endian bytes."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes
