"""Where the tensors of a TFLite file lie, without a framework: a walk over the flat buffer's tables.

Each constant tensor of a subgraph is one, and so are the scales of each quantized one, also of activations. As for ONNX, what
is not understood is left out; a delta is then larger, and never wrong. Field numbers are those of TensorFlow Lite's schema.fbs.

    >>> find_flat_tensors(b"")
    {}
"""

from __future__ import annotations

import math
import struct
from dataclasses import replace

from edgekit.bundle.delta.tensors import FLOAT, INT8, INT32, ITEM_BYTES, UINT8, Tensor

IDENTIFIER = b"TFL3"
_KINDS = {0: FLOAT, 1: 10, 2: INT32, 3: UINT8, 4: 7, 7: 5, 9: INT8}
"""TensorProto.DataType by TensorType."""
_MODEL_SUBGRAPHS, _MODEL_BUFFERS = 2, 4
_SHAPE, _TYPE, _BUFFER, _NAME, _QUANTIZATION = 0, 1, 2, 3, 4
_SCALE, _QUANTIZED_AXIS = 2, 6
_MAX_ITEMS = 1 << 20


class _Odd(Exception):  # noqa: N818 - not an error: the file is something else
    """Not a flat buffer of this kind."""


class _Walk:
    """Reads that stay within the file."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)

    def number(self, form: str, at: int) -> int:
        if at < 0 or at + struct.calcsize(form) > len(self.data):
            raise _Odd
        return int(struct.unpack_from(form, self.data, at)[0])

    def field(self, table: int, number: int) -> int | None:
        """Where a table's field lies; None when it has its default."""
        shape = table - self.number("<i", table)
        slot = 4 + 2 * number
        if slot + 2 > self.number("<H", shape):
            return None
        offset = self.number("<H", shape + slot)
        return table + offset if offset else None

    def scalar(self, table: int, number: int, form: str) -> int:
        at = self.field(table, number)
        return 0 if at is None else self.number(form, at)

    def vector(self, table: int, number: int, item_bytes: int) -> tuple[int, int]:
        """Where a vector's items begin, and how many there are."""
        at = self.field(table, number)
        if at is None:
            return 0, 0
        begin = at + self.number("<I", at)
        count = self.number("<I", begin)
        if begin + 4 + count * item_bytes > len(self.data):
            raise _Odd
        return begin + 4, count

    def tables(self, table: int, number: int) -> list[int]:
        begin, count = self.vector(table, number, 4)
        if count > _MAX_ITEMS:
            raise _Odd
        return [at + self.number("<I", at) for at in range(begin, begin + 4 * count, 4)]


def find_flat_tensors(content: bytes | memoryview) -> dict[str, Tensor]:
    """The constant tensors of a TFLite file and their scales by name; empty for any other file."""
    if bytes(content[4:8]) != IDENTIFIER:
        return {}
    walk = _Walk(content)
    found: dict[str, Tensor] = {}
    try:
        model = walk.number("<I", 0)
        buffers = walk.tables(model, _MODEL_BUFFERS)
        for place, graph in enumerate(walk.tables(model, _MODEL_SUBGRAPHS)):
            for table in walk.tables(graph, 0):
                for tensor in _tensors(walk, table, buffers, prefix=f"{place}/"):
                    found.setdefault(tensor.name, tensor)
    except _Odd:
        return {}
    return found


def _tensors(walk: _Walk, table: int, buffers: list[int], *, prefix: str) -> list[Tensor]:
    """A tensor with data, and its scales; of one without data the scales alone."""
    begin, length = walk.vector(table, _NAME, 1)
    name = prefix + bytes(walk.data[begin : begin + length]).decode(errors="replace")
    scale, axis = _scale(walk, table, name)
    tensor = _constant(walk, table, buffers, name)
    if tensor is None or scale is None:
        return [each for each in (tensor, scale) if each is not None]
    count, shape = scale.shape[0], tensor.shape
    if tensor.kind not in {INT8, UINT8} or (count != 1 and not (0 <= axis < len(shape) and shape[axis] == count)):
        return [tensor, scale]
    return [replace(tensor, scale=scale.name, axis=axis if count > 1 else -1), scale]


def _constant(walk: _Walk, table: int, buffers: list[int], name: str) -> Tensor | None:
    buffer, kind = walk.scalar(table, _BUFFER, "<I"), _KINDS.get(walk.scalar(table, _TYPE, "<b"))
    if not 0 < buffer < len(buffers) or kind is None:
        return None
    offset, size = walk.vector(buffers[buffer], 0, 1)
    begin, rank = walk.vector(table, _SHAPE, 4)
    shape = tuple(walk.number("<i", begin + 4 * axis) for axis in range(rank))
    if not size or math.prod(shape) * ITEM_BYTES[kind] != size or min(shape, default=1) <= 0:
        return None
    return Tensor(name, kind, shape, offset, size)


def _scale(walk: _Walk, table: int, name: str) -> tuple[Tensor | None, int]:
    at = walk.field(table, _QUANTIZATION)
    if at is None:
        return None, 0
    quantization = at + walk.number("<I", at)
    begin, count = walk.vector(quantization, _SCALE, 4)
    axis = walk.scalar(quantization, _QUANTIZED_AXIS, "<i")
    return (Tensor(f"{name}#scale", FLOAT, (count,), begin, 4 * count) if count else None), axis
