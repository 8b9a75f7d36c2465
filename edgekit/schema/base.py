"""The base of every record: frozen, keyword-only, JSON and MessagePack by msgspec.

Unknown fields are ignored on decoding, so that a newer writer does not stop an older reader; signed records are kept and
verified as the bytes that were signed, so nothing is lost by that. Hand-written files (``targets/*.toml``) refuse them.

    >>> from edgekit.schema.tensor import TensorSpec
    >>> decode_json(encode_json(TensorSpec(name="x", dtype="float32", shape=("batch", 3))), TensorSpec).shape
    ('batch', 3)
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, TypeVar

import msgspec

from edgekit.errors import ArtifactError

SCHEMA_VERSION = 1
Scalar = str | int | float | bool | None
Moment = Annotated[datetime, msgspec.Meta(tz=True)]
"""A time with its zone: one without cannot be compared with a clock."""
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
"""A number that every JSON reader, MessagePack and every database keep exactly."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A record that one process writes and another reads."""


R = TypeVar("R")


def encode_json(record: Any) -> bytes:
    """Canonical JSON: fields in declared order, two-space indent, one newline at the end."""
    return msgspec.json.format(msgspec.json.encode(record, order="deterministic"), indent=2) + b"\n"


def is_canonical_json(data: bytes) -> bool:
    """Whether the bytes are what this project writes for the same JSON; fields that are not known here may be in it."""
    try:
        again = msgspec.json.format(msgspec.json.encode(msgspec.json.decode(data)), indent=2) + b"\n"
    except (msgspec.DecodeError, msgspec.EncodeError, UnicodeError, OverflowError, RecursionError):
        return False
    return bool(again == data)


def decode_json(data: bytes | str, kind: type[R], *, name: str = "record") -> R:
    """Decode JSON into a record.

    Args:
        data: the JSON text.
        kind: the record's class.
        name: what the data is, for the error message (a file name).

    Raises:
        ArtifactError: ``record.malformed`` when it is not JSON or does not fit the record.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(
            "record.malformed",
            f"{name}: not a valid {kind.__name__}: {error}.",
            hint="The file was damaged, or written by an incompatible version of edgekit; make it again.",
        ) from error


def encode_msgpack(record: Any) -> bytes:
    """MessagePack with the record's own layout."""
    return msgspec.msgpack.encode(record, order="deterministic")


def decode_msgpack(data: bytes, kind: type[R], *, name: str = "record") -> R:
    """Decode MessagePack into a record; errors as :func:`decode_json`."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(
            "record.malformed",
            f"{name}: not a valid {getattr(kind, '__name__', 'record')}: {error}.",
            hint="The data was damaged, or written by an incompatible version of edgekit.",
        ) from error
