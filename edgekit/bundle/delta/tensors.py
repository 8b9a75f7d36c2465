"""Where the tensors of an ONNX file lie, without a framework: a walk over the protocol buffer's fields.

Only what deltas need is read: the initializers' names, types, shapes and the place of their raw data, and which scale belongs
to which quantized weight (``DequantizeLinear`` nodes). Anything that is not understood is left out; a delta is then larger, and
never wrong. Field numbers are those of onnx.proto3 (ModelProto.graph 7, GraphProto.node 1 and .initializer 5).

    >>> find_tensors(b"")
    {}
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""Bytes of one element by TensorProto.DataType."""
FLOAT, UINT8, INT8, INT32 = 1, 2, 3, 6


@dataclass(frozen=True)
class Tensor:
    """An initializer. Its elements lie in the file as they are in memory; if they do not, ``size_bytes`` is 0."""

    name: str
    kind: int
    """TensorProto.DataType."""
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    field_offset: int = 0
    field_bytes: int = 0
    """The whole field of the graph that holds the tensor, with its name and shape."""
    scale: str = ""
    """The initializer with the scale that the weight is dequantized with."""
    zero_point: str = ""
    axis: int = 1

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.kind]


class _Odd(Exception):  # noqa: N818 - not an error: the file is something else
    """Not a protocol buffer of this kind."""


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise _Odd
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: memoryview, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, and begin and end of each field's payload (a varint's value in place of its begin)."""
    at = begin
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, wire, value, at
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in {_FIXED64, _FIXED32}:
            size = 8 if wire == _FIXED64 else 4
        else:
            raise _Odd
        if at + size > end:
            raise _Odd
        yield number, wire, at, at + size
        at += size


def _text(data: memoryview, begin: int, end: int) -> str:
    return bytes(data[begin:end]).decode(errors="replace")


def _shape(data: memoryview, begin: int, end: int, wire: int, shape: list[int]) -> None:
    if wire == _VARINT:
        shape.append(begin)
        return
    at = begin
    while at < end:
        value, at = _varint(data, at)
        shape.append(value)


def _tensor(data: memoryview, begin: int, end: int) -> Tensor:
    name, kind, place = "", 0, (0, 0)
    shape: list[int] = []
    for number, wire, first, last in _fields(data, begin, end):
        match number:
            case 1:
                _shape(data, first, last, wire, shape)
            case 2 if wire == _VARINT:
                kind = first
            case 8 if wire == _BYTES:
                name = _text(data, first, last)
            case 4 | 9 if wire == _BYTES:  # packed floats lie in the file as raw ones do
                place = (first, last - first)
            case _:
                pass
    is_plain = kind in ITEM_BYTES and place[1] > 0 and math.prod(shape) * ITEM_BYTES[kind] == place[1]
    return Tensor(name, kind, tuple(shape), *(place if is_plain else (begin, 0)))


def _dequantize(data: memoryview, begin: int, end: int) -> tuple[list[str], int] | None:
    """The inputs and the axis of a DequantizeLinear node."""
    inputs: list[str] = []
    kind, axis = "", 1
    for number, wire, first, last in _fields(data, begin, end):
        if wire != _BYTES:
            continue
        if number == 1:
            inputs.append(_text(data, first, last))
        elif number == 4:
            kind = _text(data, first, last)
        elif number == 5:
            axis = _axis(data, first, last, axis)
    return (inputs, axis) if kind == "DequantizeLinear" and len(inputs) >= 2 else None


def _axis(data: memoryview, begin: int, end: int, default: int) -> int:
    name, value = "", default
    for number, wire, first, last in _fields(data, begin, end):
        if number == 1 and wire == _BYTES:
            name = _text(data, first, last)
        elif number == 3 and wire == _VARINT:
            value = first if first < 1 << 63 else first - (1 << 64)
    return value if name == "axis" else default


def find_tensors(content: bytes | memoryview) -> dict[str, Tensor]:
    """The initializers of an ONNX file by name; empty for any other file."""
    data = memoryview(content)
    found: dict[str, Tensor] = {}
    used: dict[str, tuple[list[str], int]] = {}
    try:
        for number, wire, first, last in _fields(data, 0, len(data)):
            if number != _GRAPH or wire != _BYTES:
                continue
            before = first
            for field, kind, begin, end in _fields(data, first, last):
                whole, before = (before, end - before), end
                if kind != _BYTES:
                    continue
                if field == _INITIALIZER:
                    tensor = _tensor(data, begin, end)
                    found[tensor.name] = replace(tensor, field_offset=whole[0], field_bytes=whole[1])
                elif field == _NODE and (node := _dequantize(data, begin, end)) is not None:
                    used[node[0][0]] = node
    except _Odd:
        return {}
    return {name: _with_scale(tensor, used.get(name), found) for name, tensor in found.items()}


def _with_scale(tensor: Tensor, node: tuple[list[str], int] | None, found: dict[str, Tensor]) -> Tensor:
    if node is None or tensor.kind not in {INT8, UINT8} or not tensor.size_bytes:
        return tensor
    inputs, axis = node
    scale = found.get(inputs[1])
    axis = axis + len(tensor.shape) if axis < 0 else axis
    if scale is None or scale.kind != FLOAT or not scale.size_bytes:
        return tensor
    count = math.prod(scale.shape)
    if count != 1 and not (0 <= axis < len(tensor.shape) and tensor.shape[axis] == count):
        return tensor
    zero = inputs[2] if len(inputs) > 2 and inputs[2] in found else ""
    return replace(tensor, scale=scale.name, zero_point=zero, axis=axis if count > 1 else -1)
