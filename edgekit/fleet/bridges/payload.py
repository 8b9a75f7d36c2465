"""Sparkplug B payloads to bytes and back: the part of its protobuf schema (version 3.0, section 6.4) that an edge node uses.

Written after the published schema, without a protobuf library. Data sets, templates, properties and metadata are not written;
what a host sends is read as far as names, aliases and plain values, and everything else in it is passed over.

>>> data = encode_payload(Payload(timestamp=1, metrics=(Metric(name="a", datatype=DataType.BOOLEAN, value=True),), seq=0))
>>> decode_payload(data).metrics[0].value
True
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from edgekit.errors import ArtifactError

MAX_BYTES = 1 << 20
Value = bool | int | float | str | bytes
_FLOAT, _DOUBLE = struct.Struct("<f"), struct.Struct("<d")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_SHIFT = 63


class DataType(IntEnum):
    """The basic data types."""

    UNKNOWN = 0
    INT8 = 1
    INT16 = 2
    INT32 = 3
    INT64 = 4
    UINT8 = 5
    UINT16 = 6
    UINT32 = 7
    UINT64 = 8
    FLOAT = 9
    DOUBLE = 10
    BOOLEAN = 11
    STRING = 12
    DATETIME = 13
    TEXT = 14
    UUID = 15
    BYTES = 17


_IN_INT = frozenset({DataType.INT8, DataType.INT16, DataType.INT32, DataType.UINT8, DataType.UINT16, DataType.UINT32})
_IN_LONG = frozenset({DataType.INT64, DataType.UINT64, DataType.DATETIME})
_IN_TEXT = frozenset({DataType.STRING, DataType.TEXT, DataType.UUID})


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric. ``datatype`` travels in births only; a value of None travels as null."""

    name: str = ""
    alias: int | None = None
    timestamp: int | None = None
    datatype: DataType = DataType.UNKNOWN
    value: Value | None = None
    has_type: bool = True
    """Whether the data type is written."""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """A message's content; a death has no ``seq``."""

    timestamp: int | None = None
    metrics: tuple[Metric, ...] = ()
    seq: int | None = None


# writing


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _integer(field: int, number: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(number)


def _block(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(data)) + data


def _encode_value(datatype: DataType, value: Value) -> bytes:  # noqa: PLR0911 - one line a type
    """The value in the field that its type has; integers below zero as two's complement."""
    match datatype, value:
        case _, int() if datatype in _IN_INT:
            return _integer(10, value & 0xFFFF_FFFF)
        case _, int() if datatype in _IN_LONG:
            return _integer(11, value & 0xFFFF_FFFF_FFFF_FFFF)
        case DataType.FLOAT, int() | float():
            return _varint(12 << 3 | _FIXED32) + _FLOAT.pack(value)
        case DataType.DOUBLE, int() | float():
            return _varint(13 << 3 | _FIXED64) + _DOUBLE.pack(value)
        case DataType.BOOLEAN, bool():
            return _integer(14, int(value))
        case _, str() if datatype in _IN_TEXT:
            return _block(15, value.encode())
        case DataType.BYTES, bytes():
            return _block(16, value)
        case _:
            raise ArtifactError("sparkplug.datatype", f"a value {value!r} of type {datatype!r} cannot be written.")


def _encode_metric(metric: Metric) -> bytes:
    parts = []
    if metric.name:
        parts.append(_block(1, metric.name.encode()))
    if metric.alias is not None:
        parts.append(_integer(2, metric.alias))
    if metric.timestamp is not None:
        parts.append(_integer(3, metric.timestamp))
    if metric.has_type:
        parts.append(_integer(4, metric.datatype))
    parts.append(_integer(7, 1) if metric.value is None else _encode_value(metric.datatype, metric.value))
    return b"".join(parts)


def encode_payload(payload: Payload) -> bytes:
    """A payload as protobuf.

    Raises:
        ArtifactError: ``sparkplug.datatype`` for a value that its type cannot hold.
    """
    parts = [] if payload.timestamp is None else [_integer(1, payload.timestamp)]
    parts += [_block(2, _encode_metric(metric)) for metric in payload.metrics]
    if payload.seq is not None:
        parts.append(_integer(3, payload.seq))
    return b"".join(parts)


# reading


def _malformed(why: str) -> ArtifactError:
    return ArtifactError("sparkplug.malformed", f"Sparkplug payload: {why}.")


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
        if shift > _MAX_SHIFT:
            raise _malformed("a number of more than ten bytes")
    raise _malformed("it ends in a number")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Each field's number and value: an integer, or bytes of whatever length the wire type says."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        match key & 7:
            case 0:
                value, at = _read_varint(data, at)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _read_varint(data, at)
            case 5:
                size = 4
            case other:
                raise _malformed(f"wire type {other}")
        if at + size > len(data):
            raise _malformed("it ends in a field")
        yield key >> 3, data[at : at + size]
        at += size


def _read_text(value: int | bytes) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else ""
    except UnicodeDecodeError as error:
        raise _malformed("a text that is not UTF-8") from error


def _read_metric(data: bytes) -> Metric:
    name, alias, timestamp, datatype = "", None, None, 0
    value: Value | None = None
    for field, found in _fields(data):
        match field, found:
            case 1, bytes():
                name = _read_text(found)
            case 2, int():
                alias = found
            case 3, int():
                timestamp = found
            case 4, int():
                datatype = found
            case ((10 | 11), int()):
                value = found
            case 12, bytes() if len(found) == _FLOAT.size:
                value = float(_FLOAT.unpack(found)[0])
            case 13, bytes() if len(found) == _DOUBLE.size:
                value = float(_DOUBLE.unpack(found)[0])
            case 14, int():
                value = bool(found)
            case 15, bytes():
                value = _read_text(found)
            case 16, bytes():
                value = found
            case _:
                pass
    known = DataType(datatype) if datatype in {each.value for each in DataType} else DataType.UNKNOWN
    return Metric(name=name, alias=alias, timestamp=timestamp, datatype=known, value=value, has_type=bool(datatype))


def decode_payload(data: bytes) -> Payload:
    """Read what a host application sent.

    Raises:
        ArtifactError: ``sparkplug.malformed``.
    """
    if len(data) > MAX_BYTES:
        raise _malformed(f"{len(data)} bytes: at most {MAX_BYTES} are read")
    timestamp, seq = None, None
    metrics: list[Metric] = []
    for field, found in _fields(data):
        match field, found:
            case 1, int():
                timestamp = found
            case 2, bytes():
                metrics.append(_read_metric(found))
            case 3, int():
                seq = found
            case _:
                pass
    return Payload(timestamp=timestamp, metrics=tuple(metrics), seq=seq)
