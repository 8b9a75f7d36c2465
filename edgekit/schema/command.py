"""Remote commands: what somebody who may asks a device to do, once, and the device's answer.

A command is a signed record (a DSSE envelope), delivered on ``ek/1/{site}/{device}/cmd``. The answer comes on
``ek/1/{site}/{device}/rsp`` in parts, MessagePack of :class:`CommandPart`; the parts' data, joined, are the result. The topic
of the answer is fixed, since the response topic of an MQTT message is not signed.

| kind | arguments | result |
| --- | --- | --- |
| benchmark | :class:`BenchmarkOrder` | a ``BenchmarkRun`` as JSON |
| debug | none | a debug bundle, ``tar.gz`` |
| pause | :class:`PauseOrder` | a line of text |
| resume | none | a line of text |
| probe | none | a ``TargetProfile`` as JSON |
| rollback | :class:`RollbackOrder` | a line of text |
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgekit.schema.base import SCHEMA_VERSION, Count, Moment, Record

COMMAND_MEDIA_TYPE = "application/vnd.edgekit.command.v1+json"
CommandKind = Literal["benchmark", "debug", "pause", "resume", "probe", "rollback"]
CommandId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
MAX_PAUSE_S = 30 * 86400.0
MAX_BENCHMARK_S = 60.0
MAX_BENCHMARKS = 8


class BenchmarkOrder(Record, frozen=True, kw_only=True):
    """What to time: releases that lie on the device as ``NAME`` or ``NAME@VERSION``; none: what serves."""

    models: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_BENCHMARKS)] = ()
    threads: Annotated[tuple[Annotated[int, msgspec.Meta(ge=1, le=64)], ...], msgspec.Meta(min_length=1, max_length=4)] = (1,)
    batch: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    seconds: Annotated[float, msgspec.Meta(ge=0.0, le=MAX_BENCHMARK_S)] = 2.0
    runs: Annotated[int, msgspec.Meta(ge=2, le=10_000)] = 50
    seed: Count = 0


class PauseOrder(Record, frozen=True, kw_only=True):
    """For how long updates wait; what is installed goes on serving."""

    seconds: Annotated[float, msgspec.Meta(gt=0.0, le=MAX_PAUSE_S)] = 86400.0


class RollbackOrder(Record, frozen=True, kw_only=True):
    """The model to take back; empty: the first one."""

    model: str = ""


class Command(Record, frozen=True, kw_only=True):
    """One order to one device. ``id`` is drawn at random; a device carries a command out once."""

    device: str
    id: CommandId
    issued_at: Moment
    expires_at: Moment
    kind: CommandKind
    benchmark: BenchmarkOrder | None = None
    pause: PauseOrder | None = None
    rollback: RollbackOrder | None = None
    schema_version: int = SCHEMA_VERSION


class CommandPart(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A part of the answer to command ``id``: number ``part`` of ``parts``, from 0.

    ``code`` is empty when the command was carried out; otherwise ``text`` says why it was not. ``kind`` "accepted" comes at
    once and says that the work has begun; it carries no data.
    """

    id: str
    kind: Literal["accepted", "result"]
    part: int = 0
    parts: int = 1
    code: str = ""
    text: str = ""
    media_type: str = ""
    data: bytes = b""
    digest: str = ""
    """SHA-256 of the whole data, hexadecimal."""


class AuditEntry(Record, frozen=True, kw_only=True):
    """One line of the device's log of commands; ``chain`` is the hash of this line's other fields and the line before."""

    number: Count
    at: Moment
    what: Literal["received", "refused", "finished"]
    id: str
    kind: str
    keyids: tuple[str, ...] = ()
    code: str = ""
    detail: str = ""
    chain: str = ""


class OperationState(Record, frozen=True, kw_only=True):
    """What must survive a restart: the pause, and which commands were taken."""

    paused_until: Moment | None = None
    seen: dict[str, Moment] = {}
    """When each command expires that was taken; it is forgotten then, and not accepted any more anyway."""
    horizon: Moment | None = None
    """The latest time at which a command was judged: no clock that goes back makes an old command young."""
    running: str = ""
    """The command that is being carried out; one that is here at the start was interrupted."""
    running_kind: str = ""
