"""What a decoded message may hold to be stored: numbers that a database can keep, texts that a page can show.

A device is not trusted to be sane. One message that a database refuses would hold up every other device's, so it is refused at
the door, counted, and shown on the device's page.

>>> from edgekit.schema.message import Heartbeat
>>> check_message(Heartbeat(boot=1, seq=2**64 - 1, time_ms=0))
Traceback (most recent call last):
edgekit.errors.ArtifactError: Heartbeat.seq is 18446744073709551615: expected 0 to 9223372036854775807.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from edgekit.errors import ArtifactError
from edgekit.schema.message import (
    AnyMessage,
    Birth,
    Event,
    InputSample,
    Label,
    ModelWindow,
    Reported,
    Window,
    WindowBatch,
)

MAX_INTEGER = 2**63 - 1
MAX_TIME_MS = 253_402_300_799_999
"""The last millisecond of the year 9999."""
MAX_TEXT = 4000
MAX_ITEMS = 1000
MAX_MERGED = 100_000
"""Sequence numbers that one window may stand for."""
_FIRST_SEQ = 1
_STORED = (Birth, Event, Reported, WindowBatch, Label, InputSample)
_TIMES = ("time_ms", "start_ms")


def check_message(message: AnyMessage) -> None:
    """Refuse what cannot be stored or shown.

    Raises:
        ArtifactError: ``telemetry.out_of_range``, naming the field.
    """
    if isinstance(message, WindowBatch):
        if all(map(_is_plain, message.windows)) and 0 <= message.boot <= MAX_INTEGER and 0 <= message.schema <= MAX_INTEGER:
            _check_length("WindowBatch", "windows", len(message.windows))
            return
        for window in message.windows:
            _check_merged(window.merged, window.seq)
    kind = type(message).__name__
    for name, value in _fields(message):
        match value:
            case bool():
                pass
            case int():
                _check_integer(kind, name, value, is_stored=isinstance(message, _STORED))
            case str():
                _check_text(kind, name, value)
            case tuple() | dict():
                _check_length(kind, name, len(value))
            case _:
                pass


def _is_plain(window: Window) -> bool:
    """Whether nothing of a window can be refused, by the few comparisons that nearly every window passes.

    What is not plain is looked at field by field; this only spares that for the many thousands a second that are.
    """
    if window.merged or not (0 < window.seq <= MAX_INTEGER and 0 <= window.start_ms <= MAX_TIME_MS):
        return False
    if not 0 <= window.duration_ms <= MAX_INTEGER or len(window.sketches) > MAX_ITEMS or len(window.models) > MAX_ITEMS:
        return False
    return _is_text(window.model_digest) and all(map(_is_plain_model, window.models))


def _is_plain_model(model: ModelWindow) -> bool:
    counts = (
        model.requests,
        model.samples,
        model.sketched,
        model.errors,
        model.rejected,
        model.labelled,
        model.right,
        model.profile,
    )
    is_plain = min(counts) >= 0 and max(counts) <= MAX_INTEGER and len(model.sketches) <= MAX_ITEMS
    return is_plain and not model.verdicts and _is_text(model.model_digest)


def _is_text(text: str) -> bool:
    return len(text) <= MAX_TEXT and "\0" not in text


def _fields(record: msgspec.Struct) -> Iterator[tuple[str, Any]]:
    """Each field of a record and of the records in it; texts of tuples and dicts under their field's name."""
    for name in record.__struct_fields__:
        value = getattr(record, name)
        yield name, value
        if isinstance(value, dict):
            value = (*value, *value.values())
        if isinstance(value, tuple):
            for item in value:
                if isinstance(item, msgspec.Struct):
                    yield from _fields(item)
                else:
                    yield f"{name}[]", item


def _check_integer(kind: str, name: str, value: int, *, is_stored: bool) -> None:
    lowest = _FIRST_SEQ if name == "seq" and is_stored else 0
    highest = MAX_TIME_MS if name in _TIMES else MAX_INTEGER
    if not lowest <= value <= highest:
        raise ArtifactError("telemetry.out_of_range", f"{kind}.{name} is {value}: expected {lowest} to {highest}.")


def _check_merged(merged: tuple[int, ...], seq: int) -> None:
    """Ranges in order, not too many, that have the window's own number in them."""
    if not merged:
        return
    ends = [*merged]
    in_order = len(ends) % 2 == 0 and ends == sorted(ends) and ends[0] >= 1 and ends[-1] <= MAX_INTEGER
    total = sum(ends[at + 1] - ends[at] + 1 for at in range(0, len(ends) - 1, 2)) if in_order else 0
    if not in_order or total > MAX_MERGED or not ends[0] <= seq <= ends[-1]:
        raise ArtifactError(
            "telemetry.out_of_range", f"Window.merged: not ranges in order around {seq}, or more than {MAX_MERGED}."
        )


def _check_text(kind: str, name: str, value: str) -> None:
    if len(value) > MAX_TEXT or "\0" in value:
        found = f"has {len(value)} characters" if len(value) > MAX_TEXT else "holds a NUL character"
        raise ArtifactError("telemetry.out_of_range", f"{kind}.{name} {found}: at most {MAX_TEXT} without NUL are stored.")


def _check_length(kind: str, name: str, length: int) -> None:
    if length > MAX_ITEMS:
        raise ArtifactError("telemetry.out_of_range", f"{kind}.{name} has {length} items: at most {MAX_ITEMS} are stored.")
