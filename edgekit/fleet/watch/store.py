"""The watch's own rows: settings, references, sums, states, findings."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from sqlalchemy import Connection, delete, func, insert, select, update

from edgekit.errors import ArtifactError
from edgekit.fleet.tables import upsert
from edgekit.fleet.watch.reading import Folded
from edgekit.fleet.watch.tables import (
    watch_facts,
    watch_findings,
    watch_intervals,
    watch_profiles,
    watch_settings,
    watch_snapshots,
    watches,
    window_marks,
)
from edgekit.fleet.watch.views import Budget
from edgekit.monitor.intervals import Interval, SliceCounts, TopDevice
from edgekit.schema.base import Record, decode_json, encode_json
from edgekit.schema.baseline import ReferenceProfile

MAX_MARKS = 200_000
MAX_BLOB = 32 * 1024 * 1024


class Mark(Record, frozen=True, kw_only=True):
    """A stretch of time of a model in which something changed."""

    id: int
    model_digest: str
    start_ms: int
    end_ms: int


class KnownProfile(Record, frozen=True, kw_only=True):
    """A reference with what it belongs to."""

    crc: int
    model_digest: str
    model: str
    version: str
    size_bytes: int
    labels: tuple[str, ...]
    profile: ReferenceProfile
    added_ms: int


class WatchRow(Record, frozen=True, kw_only=True):
    """One watch: a model with one reference."""

    id: int
    model: str
    crc: int
    revision: int
    frontier_ms: int
    interval_ms: int
    updated_ms: int
    state: bytes | None


class FactRow(Record, frozen=True, kw_only=True):
    """What is kept of an interval beside its sums."""

    start_ms: int
    variation: tuple[tuple[float, float], ...]
    top: tuple[tuple[TopDevice, ...], ...]
    unreadable: int
    slices: tuple[str, ...] = ()
    evidence: tuple[float, ...] = ()
    """Of each slice's streams after this interval, in the order of ``slices``."""


class FindingRow(Record, frozen=True, kw_only=True):
    """A finding; ``ended_ms`` is 0 while it lasts."""

    kind: str
    slice: str
    stream: str
    since_ms: int
    noticed_ms: int
    ended_ms: int
    effect: float | None
    evidence: float | None
    text: str


def pack(record: Any) -> bytes:
    """A record in few bytes."""
    return zlib.compress(msgspec.msgpack.encode(record), 3)


def unpack(data: bytes, kind: Any) -> Any:
    """What :func:`pack` wrote.

    Raises:
        ArtifactError: ``record.malformed``.
    """
    try:
        engine = zlib.decompressobj()
        raw = engine.decompress(data, MAX_BLOB)
        return msgspec.msgpack.decode(raw, type=kind)
    except (zlib.error, msgspec.DecodeError) as error:
        raise ArtifactError("record.malformed", f"the watch's table: {error}.") from error


# settings and references


def read_budget(connection: Connection, model: str) -> Budget:
    """What is asked of the watch on a model; the defaults where nobody asked."""
    found = connection.execute(select(watch_settings).where(watch_settings.c.model == model)).first()
    if found is None:
        return Budget()
    return Budget(
        alarms=found.alarms,
        days=found.days,
        effect_floor=found.effect_floor,
        interval_s=found.interval_s,
        slices=tuple(filter(None, found.slices.split(","))),
    )


def write_budget(connection: Connection, model: str, budget: Budget) -> None:
    """Keep what is asked."""
    values = {
        "alarms": budget.alarms,
        "days": budget.days,
        "effect_floor": budget.effect_floor,
        "interval_s": budget.interval_s,
        "slices": ",".join(budget.slices),
    }
    statement = upsert(watch_settings, connection.dialect.name).values(model=model, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=["model"], set_=values))


def write_profile(connection: Connection, known: KnownProfile) -> None:
    """Keep a reference, so that what was counted with it stays readable."""
    values = {
        "model": known.model[:64],
        "version": known.version[:64],
        "size_bytes": known.size_bytes,
        "labels": msgspec.msgpack.encode(known.labels),
        "data": zlib.compress(encode_json(known.profile), 6),
        "added_ms": known.added_ms,
    }
    statement = upsert(watch_profiles, connection.dialect.name).values(crc=known.crc, model_digest=known.model_digest, **values)
    connection.execute(statement.on_conflict_do_nothing(index_elements=["crc", "model_digest"]))


def read_profiles(connection: Connection, model: str) -> tuple[KnownProfile, ...]:
    """The references of a model, the newest first."""
    row = watch_profiles.c
    statement = select(watch_profiles).where(row.model == model).order_by(row.added_ms.desc(), row.version.desc())
    return tuple(
        KnownProfile(
            crc=item.crc,
            model_digest=item.model_digest,
            model=item.model,
            version=item.version,
            size_bytes=item.size_bytes,
            labels=msgspec.msgpack.decode(item.labels, type=tuple[str, ...]),
            profile=decode_json(zlib.decompress(item.data), ReferenceProfile, name=f"reference of {item.model}"),
            added_ms=item.added_ms,
        )
        for item in connection.execute(statement)
    )


def known_profiles(connection: Connection) -> set[tuple[int, str]]:
    """CRC and model digest of every reference that is kept."""
    row = watch_profiles.c
    return {(crc, digest) for crc, digest in connection.execute(select(row.crc, row.model_digest))}


def profile_names(connection: Connection) -> dict[str, tuple[str, str]]:
    """Model and version of the digests whose reference is kept."""
    row = watch_profiles.c
    return {
        digest: (model, version)
        for digest, model, version in connection.execute(select(row.model_digest, row.model, row.version))
    }


# marks


def read_marks(connection: Connection) -> tuple[Mark, ...]:
    """The oldest marks."""
    rows = connection.execute(select(window_marks).order_by(window_marks.c.id).limit(MAX_MARKS))
    return tuple(Mark(id=item.id, model_digest=item.model_digest, start_ms=item.start_ms, end_ms=item.end_ms) for item in rows)


def add_marks(connection: Connection, marks: Sequence[tuple[str, int, int]]) -> None:
    """Mark stretches of time: digest, begin, end."""
    if marks:
        rows = [{"model_digest": digest, "start_ms": start_ms, "end_ms": end_ms} for digest, start_ms, end_ms in marks]
        connection.execute(insert(window_marks), rows)


def drop_marks(connection: Connection, ids: Sequence[int]) -> None:
    """Forget marks that were dealt with."""
    for at in range(0, len(ids), 500):
        connection.execute(delete(window_marks).where(window_marks.c.id.in_(list(ids[at : at + 500]))))


# watches and their intervals


def read_watches(connection: Connection, model: str = "") -> tuple[WatchRow, ...]:
    """The watches, of a model or of all, the one with the newest windows first."""
    statement = select(watches).order_by(watches.c.frontier_ms.desc(), watches.c.id.desc())
    if model:
        statement = statement.where(watches.c.model == model)
    return tuple(
        WatchRow(**{name: getattr(item, name) for name in WatchRow.__struct_fields__}) for item in connection.execute(statement)
    )


def make_watch(connection: Connection, *, model: str, crc: int, interval_ms: int, now_ms: int) -> WatchRow:
    """The watch on a model with one reference, made where it is new."""
    statement = upsert(watches, connection.dialect.name).values(
        model=model, crc=crc, revision=0, frontier_ms=-1, interval_ms=interval_ms, updated_ms=now_ms, state=None
    )
    connection.execute(statement.on_conflict_do_nothing(index_elements=["model", "crc"]))
    item = connection.execute(select(watches).where(watches.c.model == model, watches.c.crc == crc)).one()
    return WatchRow(**{name: getattr(item, name) for name in WatchRow.__struct_fields__})


def save_state(connection: Connection, row: WatchRow, *, state: bytes | None, frontier_ms: int, now_ms: int) -> bool:
    """Write a watch's state; False when somebody else wrote one meanwhile, and nothing may be written."""
    changed = connection.execute(
        update(watches)
        .where(watches.c.id == row.id, watches.c.revision == row.revision)
        .values(state=state, frontier_ms=frontier_ms, revision=row.revision + 1, updated_ms=now_ms)
    )
    return bool(changed.rowcount)


def forget_intervals(connection: Connection, watch_id: int) -> None:
    """Drop everything of a watch but itself and its findings."""
    for table in (watch_intervals, watch_facts, watch_snapshots):
        connection.execute(delete(table).where(table.c.watch_id == watch_id))


def write_interval(connection: Connection, watch_id: int, start_ms: int, folded: Folded | None) -> None:
    """Replace an interval's sums; None takes it away."""
    for table in (watch_intervals, watch_facts):
        connection.execute(delete(table).where(table.c.watch_id == watch_id, table.c.start_ms == start_ms))
    if folded is None:
        return
    rows = [
        {
            "watch_id": watch_id,
            "slice": name[:200],
            "start_ms": start_ms,
            "data": pack(counts),
            "latency": folded.latency.get(name),
        }
        for name, counts in folded.interval.slices.items()
    ]
    connection.execute(insert(watch_intervals), rows)
    facts = {"data": pack((folded.interval.variation, folded.interval.top, folded.interval.unreadable)), "evidence": None}
    connection.execute(insert(watch_facts).values(watch_id=watch_id, start_ms=start_ms, **facts))


def write_evidence(
    connection: Connection, watch_id: int, evidence: Mapping[int, tuple[tuple[str, ...], Sequence[float]]]
) -> None:
    """Keep what the detectors said after each interval: its slices, and the evidence of their streams."""
    row = watch_facts.c
    for start_ms, (slices, values) in evidence.items():
        packed = pack((slices, np.asarray(values, dtype="<f4").tobytes()))
        connection.execute(
            update(watch_facts).where(row.watch_id == watch_id, row.start_ms == start_ms).values(evidence=packed)
        )


def read_intervals(connection: Connection, watch_id: int, *, after_ms: int = -1) -> dict[int, Interval]:
    """The whole intervals after a moment, by their begin."""
    table, row = watch_facts, watch_intervals.c
    found: dict[int, dict[str, SliceCounts]] = {}
    statement = select(row.start_ms, row.slice, row.data).where(row.watch_id == watch_id, row.start_ms > after_ms)
    for start_ms, name, data in connection.execute(statement.order_by(row.start_ms, row.slice)):
        found.setdefault(start_ms, {})[name] = unpack(data, SliceCounts)
    intervals = {}
    for item in connection.execute(
        select(table).where(table.c.watch_id == watch_id, table.c.start_ms > after_ms).order_by(table.c.start_ms)
    ):
        variation, top, unreadable = unpack(item.data, _Facts)
        slices = found.get(item.start_ms, {})
        ordered = {name: slices[name] for name in sorted(slices, key=lambda name: (name != "all", name))}
        intervals[item.start_ms] = Interval(
            start_ms=item.start_ms, slices=ordered, variation=variation, top=top, unreadable=unreadable
        )
    return intervals


_Facts = tuple[tuple[tuple[float, float], ...], tuple[tuple[TopDevice, ...], ...], int]


def read_slices(
    connection: Connection, watch_id: int, *, since_ms: int, slices: Sequence[str] = ()
) -> dict[str, list[tuple[int, SliceCounts, bytes | None]]]:
    """Sums by slice, oldest first: begin, counts, latencies."""
    row = watch_intervals.c
    statement = select(watch_intervals).where(row.watch_id == watch_id, row.start_ms >= since_ms)
    if slices:
        statement = statement.where(row.slice.in_(list(slices)))
    found: dict[str, list[tuple[int, SliceCounts, bytes | None]]] = {}
    for item in connection.execute(statement.order_by(row.slice, row.start_ms)):
        found.setdefault(item.slice, []).append((item.start_ms, unpack(item.data, SliceCounts), item.latency))
    return found


def read_facts(connection: Connection, watch_id: int, *, since_ms: int) -> tuple[FactRow, ...]:
    """What is kept of the intervals since a moment, oldest first."""
    row = watch_facts.c
    rows = []
    for item in connection.execute(
        select(watch_facts).where(row.watch_id == watch_id, row.start_ms >= since_ms).order_by(row.start_ms)
    ):
        variation, top, unreadable = unpack(item.data, _Facts)
        slices, raw = unpack(item.evidence, tuple[tuple[str, ...], bytes]) if item.evidence else ((), b"")
        rows.append(
            FactRow(
                start_ms=item.start_ms,
                variation=variation,
                top=top,
                unreadable=unreadable,
                slices=slices,
                evidence=tuple(np.frombuffer(raw, dtype="<f4").tolist()),
            )
        )
    return tuple(rows)


def newest_snapshot(connection: Connection, watch_id: int, *, before_ms: int) -> tuple[int, bytes] | None:
    """The newest kept state from before a moment, and up to when it knows."""
    row = watch_snapshots.c
    statement = select(row.frontier_ms, row.state).where(row.watch_id == watch_id, row.frontier_ms < before_ms)
    found = connection.execute(statement.order_by(row.frontier_ms.desc()).limit(1)).first()
    return (found[0], found[1]) if found else None


def write_snapshots(connection: Connection, watch_id: int, states: Mapping[int, bytes], *, from_ms: int, keep_ms: int) -> None:
    """Replace the kept states from a moment on; of those older than ``keep_ms`` the newest stays."""
    row = watch_snapshots.c
    connection.execute(delete(watch_snapshots).where(row.watch_id == watch_id, row.frontier_ms >= from_ms))
    if states:
        rows = [{"watch_id": watch_id, "frontier_ms": at, "state": data} for at, data in states.items()]
        connection.execute(insert(watch_snapshots), rows)
    oldest = connection.execute(
        select(func.max(row.frontier_ms)).where(row.watch_id == watch_id, row.frontier_ms < keep_ms)
    ).scalar()
    if oldest is not None:
        connection.execute(delete(watch_snapshots).where(row.watch_id == watch_id, row.frontier_ms < oldest))


# findings


def read_findings(connection: Connection, watch_id: int, *, is_open: bool = True, since_ms: int = 0) -> tuple[FindingRow, ...]:
    """Findings of a watch: those that last, or all since a moment."""
    row = watch_findings.c
    statement = select(watch_findings).where(row.watch_id == watch_id).order_by(row.id)
    statement = statement.where(row.ended_ms == 0) if is_open else statement.where(row.since_ms >= since_ms)
    names = FindingRow.__struct_fields__
    return tuple(FindingRow(**{name: getattr(item, name) for name in names}) for item in connection.execute(statement))


def write_findings(connection: Connection, watch_id: int, findings: Sequence[FindingRow], *, now_ms: int) -> None:
    """Replace the open findings: those that are there stay the same rows, those that are gone end now."""
    row = watch_findings.c
    open_ = {
        (item.kind, item.slice, item.stream): item
        for item in connection.execute(select(watch_findings).where(row.watch_id == watch_id, row.ended_ms == 0))
    }
    for finding in findings:
        known = open_.pop((finding.kind, finding.slice, finding.stream), None)
        values = {
            "effect": finding.effect,
            "evidence": finding.evidence,
            "text": finding.text[:500],
            "since_ms": finding.since_ms,
        }
        if known is not None:
            connection.execute(update(watch_findings).where(row.id == known.id).values(**values))
        else:
            keys = {"kind": finding.kind, "slice": finding.slice[:200], "stream": finding.stream[:200]}
            connection.execute(
                insert(watch_findings).values(watch_id=watch_id, noticed_ms=now_ms, ended_ms=0, **keys, **values)
            )
    for item in open_.values():
        connection.execute(update(watch_findings).where(row.id == item.id).values(ended_ms=now_ms))
