"""Messages to bytes and back, bounded and typed.

>>> from edgekit.schema.message import Death
>>> decode(encode(Death(boot=7))).boot
7
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Iterable, Sequence
from sys import byteorder

import msgspec

from edgekit.errors import ArtifactError
from edgekit.schema.message import AnyMessage, MetricSpec, SketchSpec

MAX_BYTES = 256 * 1024
"""No message is larger; more is refused before it is decoded."""
ZLIB_LEVEL = 6
WORTH = 0.9
"""Compressed to more than this share, a message travels as it is."""
_ZLIB_START = b"\x78"
_FLOAT_BYTES = 4
_encoder = msgspec.msgpack.Encoder(order="deterministic")
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """One MessagePack array with the message's tag in its first place."""
    return _encoder.encode(message)


def compress(data: bytes) -> bytes:
    """The same message as a zlib stream where that is worth it; both begin differently, so nothing else says which it is."""
    packed = zlib.compress(data, ZLIB_LEVEL)
    return packed if len(packed) <= len(data) * WORTH else data


def _inflate(data: bytes | bytearray | memoryview) -> bytes:
    """What a zlib stream holds, never more than a message may have."""
    try:
        stream = zlib.decompressobj()
        found = stream.decompress(data, MAX_BYTES + 1)
    except zlib.error as error:
        raise ArtifactError("telemetry.malformed", f"message of {len(data)} bytes: {error}.") from error
    if len(found) > MAX_BYTES or not stream.eof or stream.unused_data:
        raise ArtifactError("telemetry.malformed", f"message of {len(data)} bytes: not one zlib stream of at most {MAX_BYTES}.")
    return found


def decode(data: bytes | bytearray | memoryview) -> AnyMessage:
    """The message in some bytes, compressed or not.

    Raises:
        ArtifactError: ``telemetry.malformed`` for anything that is not one of ours, or is larger than ``MAX_BYTES``.
    """
    if len(data) > MAX_BYTES:
        raise ArtifactError("telemetry.malformed", f"message of {len(data)} bytes: the largest allowed is {MAX_BYTES}.")
    if data[:1] == _ZLIB_START:
        data = _inflate(data)
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError("telemetry.malformed", f"message of {len(data)} bytes: {error}.") from error


def schema_crc(metrics: Iterable[MetricSpec], sketches: Iterable[SketchSpec]) -> int:
    """CRC-32 of the metric and sketch names in their order: binds a window to the birth that declares it."""
    names = [*(spec.name for spec in metrics), "", *(f"{spec.name} {spec.bins}" for spec in sketches)]
    return zlib.crc32("\n".join(names).encode())


def pack_values(values: Sequence[float]) -> bytes:
    """Little-endian float32; NaN is "no value", what float32 cannot hold becomes infinite."""
    vector = array("f", (_to_float32(value) for value in values))
    if byteorder == "big":
        vector.byteswap()
    return vector.tobytes()


def unpack_values(data: bytes) -> list[float]:
    """The values of a packed vector.

    Raises:
        ArtifactError: ``telemetry.malformed`` when the length is no multiple of four.
    """
    if len(data) % _FLOAT_BYTES:
        raise ArtifactError("telemetry.malformed", f"value vector of {len(data)} bytes: not a multiple of {_FLOAT_BYTES}.")
    vector = array("f")
    vector.frombytes(data)
    if byteorder == "big":
        vector.byteswap()
    return vector.tolist()


def _to_float32(value: float) -> float:
    """Python refuses to put a too large double into a float32 array; IEEE 754 says infinity."""
    try:
        array("f", [value])
    except OverflowError:
        return math.copysign(math.inf, value)
    return value
