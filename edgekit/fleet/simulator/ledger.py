"""What the simulated devices sent, by number, and whether a database holds exactly that: sent = stored, nothing twice.

A ledger has one line a boot: which sequence numbers were acknowledged by the broker, by table, and how many requests their
windows count. What was sent and not acknowledged may or may not have arrived; it is listed apart and may be there.

>>> ledger = Ledger()
>>> ledger.sent("site-01", "sim-000000", Outgoing("ev", b"", 7, (2,)))
>>> ledger.acknowledged("site-01", "sim-000000", Outgoing("ev", b"", 7, (2,)))
>>> ledger.lines[0].events
[(2, 2)]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from sqlalchemy import Connection, Table, func, select

from edgekit.durable import write_durably
from edgekit.errors import ArtifactError, UsageError
from edgekit.fleet import tables
from edgekit.fleet.gaps import SeqRanges
from edgekit.fleet.simulator.behaviour import Kind, Outgoing
from edgekit.fleet.store import Store
from edgekit.schema.base import Record

_TABLES: Mapping[Kind, str] = {
    "w": "windows",
    "ev": "events",
    "lb": "labels",
    "x": "samples",
    "birth": "states",
    "rep": "states",
}
_ROWS: Mapping[str, Table] = {
    "windows": tables.windows,
    "events": tables.events,
    "labels": tables.labels,
    "samples": tables.samples,
}
BATCH = 400
Ranges = list[tuple[int, int]]


class LedgerLine(Record, frozen=True, kw_only=True):
    """One boot of one device. Ranges are first and last."""

    site: str
    device: str
    boot: int
    windows: Ranges
    events: Ranges
    labels: Ranges
    samples: Ranges
    states: Ranges
    """Births and reports: in the received numbers, not in a table of their own."""
    unsure: Ranges
    """Sent, and never acknowledged."""
    covered: Ranges
    """Numbers that merged windows stand for."""
    requests: int
    """Of the acknowledged windows."""


class LedgerFile(Record, frozen=True, kw_only=True):
    """A ledger as it lies on the disk."""

    lines: tuple[LedgerLine, ...]
    format: int = 1


@dataclass
class _Boot:
    """A boot that is being sent."""

    acknowledged: dict[str, SeqRanges] = field(default_factory=dict)
    open: dict[int, int] = field(default_factory=dict)
    """Numbers on their way."""
    covered: SeqRanges = field(default_factory=SeqRanges)
    requests: int = 0

    def of(self, name: str) -> SeqRanges:
        if name not in self.acknowledged:
            self.acknowledged[name] = SeqRanges()
        return self.acknowledged[name]

    def list(self, name: str) -> Ranges:
        return self.acknowledged[name].ranges if name in self.acknowledged else []


class Ledger:
    """Keeps the numbers of what is sent."""

    def __init__(self) -> None:
        self._boots: dict[tuple[str, str, int], _Boot] = {}

    def _boot(self, site: str, device: str, boot: int) -> _Boot:
        key = (site, device, boot)
        found = self._boots.get(key)
        if found is None:
            found = self._boots[key] = _Boot()
        return found

    def sent(self, site: str, device: str, message: Outgoing) -> None:
        """A message was handed to the connection."""
        if message.seqs:
            self._boot(site, device, message.boot).open.update(dict.fromkeys(message.seqs, 1))

    def acknowledged(self, site: str, device: str, message: Outgoing) -> None:
        """The broker has it."""
        if not message.seqs:
            return
        boot = self._boot(site, device, message.boot)
        ranges = boot.of(_TABLES[message.kind])
        for seq in message.seqs:
            ranges.add(seq)
            boot.open.pop(seq, None)
        for at in range(0, len(message.covers), 2):
            boot.covered.add_range(message.covers[at], message.covers[at + 1])
        boot.requests += message.requests

    @property
    def lines(self) -> tuple[LedgerLine, ...]:
        """The ledger as records."""
        return tuple(
            LedgerLine(
                site=site,
                device=device,
                boot=boot,
                windows=kept.list("windows"),
                events=kept.list("events"),
                labels=kept.list("labels"),
                samples=kept.list("samples"),
                states=kept.list("states"),
                unsure=SeqRanges((seq, seq) for seq in sorted(kept.open)).ranges,
                covered=kept.covered.ranges,
                requests=kept.requests,
            )
            for (site, device, boot), kept in sorted(self._boots.items())
        )

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_ledger(path, self.lines)


def write_ledger(path: Path, lines: Sequence[LedgerLine]) -> None:
    """Write a ledger, whole or not at all."""
    write_durably(path, msgspec.msgpack.encode(LedgerFile(lines=tuple(lines))))


def read_ledger(path: Path) -> tuple[LedgerLine, ...]:
    """The lines of a ledger.

    Raises:
        UsageError: ``ledger.unreadable``.
        ArtifactError: ``ledger.malformed``.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        hint = 'Write one with "edgekit fleet simulate --ledger FILE".'
        raise UsageError("ledger.unreadable", f"{path}: {error.strerror}.", hint=hint) from error
    try:
        return msgspec.msgpack.decode(data, type=LedgerFile).lines
    except msgspec.DecodeError as error:
        raise ArtifactError("ledger.malformed", f"{path}: not a ledger: {error}.") from error


class Verdict(Record, frozen=True, kw_only=True):
    """What a comparison of a ledger with a database found. ``doubled`` counts effects: rows twice, requests counted twice."""

    devices: int
    sent: int
    """Messages and windows that were acknowledged."""
    stored: int
    """Of those, how many the database has."""
    lost: int
    doubled: int
    unsure: int
    """Sent without an acknowledgement; those that arrived are in ``unsure_stored``."""
    unsure_stored: int
    foreign: int
    """Rows of these boots that nobody sent."""
    windows: int
    requests_sent: int
    requests_stored: int
    examples: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether everything arrived and nothing counts twice."""
        return not (self.lost or self.doubled or self.foreign)


@dataclass
class _Tally:
    sent: int = 0
    stored: int = 0
    lost: int = 0
    doubled: int = 0
    unsure: int = 0
    unsure_stored: int = 0
    foreign: int = 0
    windows: int = 0
    requests_sent: int = 0
    requests_stored: int = 0
    examples: list[str] = field(default_factory=list)

    def tell(self, text: str) -> None:
        if len(self.examples) < 10:
            self.examples.append(text)


def verify_ledger(store: Store, lines: Sequence[LedgerLine]) -> Verdict:
    """Compare what was sent with what is stored."""
    tally = _Tally()
    with store.read() as connection:
        ids = _device_ids(connection, {(line.site, line.device) for line in lines})
        for at in range(0, len(lines), BATCH):
            part = [(line, ids.get((line.site, line.device), -1)) for line in lines[at : at + BATCH]]
            _compare(connection, part, tally)
    return Verdict(
        devices=len({(line.site, line.device) for line in lines}),
        sent=tally.sent,
        stored=tally.stored,
        lost=tally.lost,
        doubled=tally.doubled,
        unsure=tally.unsure,
        unsure_stored=tally.unsure_stored,
        foreign=tally.foreign,
        windows=tally.windows,
        requests_sent=tally.requests_sent,
        requests_stored=tally.requests_stored,
        examples=tuple(tally.examples),
    )


def _device_ids(connection: Connection, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], int]:
    row = tables.devices.c
    found = connection.execute(select(row.site, row.device, row.id))
    return {(site, device): number for site, device, number in found if (site, device) in wanted}


def _compare(connection: Connection, part: Sequence[tuple[LedgerLine, int]], tally: _Tally) -> None:
    boots = {(number, line.boot) for line, number in part}
    stored = {name: _seqs(connection, table, boots) for name, table in _ROWS.items()}
    received = _received(connection, boots)
    requests = _requests(connection, boots)
    for line, number in part:
        key = (number, line.boot)
        unsure = SeqRanges(line.unsure)
        tally.unsure += unsure.count
        for name in _ROWS:
            rows = stored[name].get(key, [])
            _compare_rows(f"{line.site}/{line.device} {name}", line, getattr(line, name), rows, tally)
        states = received.get(key, SeqRanges())
        for first, last in line.states:
            for seq in range(first, last + 1):
                tally.sent += 1
                tally.stored += seq in states
                tally.lost += seq not in states
        counted = requests.get(key, 0)
        tally.requests_sent += line.requests
        tally.requests_stored += counted
        if counted > line.requests and not line.unsure:
            tally.doubled += 1
            tally.tell(f"{line.site}/{line.device}: {counted} requests stored, {line.requests} sent")


def _compare_rows(what: str, line: LedgerLine, sent: Ranges, rows: Sequence[int], tally: _Tally) -> None:
    """One table's rows of one boot against what was acknowledged for it."""
    here, unsure = set(rows), SeqRanges(line.unsure)
    tally.doubled += len(rows) - len(here)
    if len(rows) != len(here):
        tally.tell(f"{what}: {len(rows) - len(here)} rows twice")
    expected = {seq for first, last in sent for seq in range(first, last + 1)}
    lost = expected - here
    tally.sent += len(expected)
    tally.stored += len(expected) - len(lost)
    tally.lost += len(lost)
    if what.endswith("windows"):
        tally.windows += len(expected) - len(lost)
    if lost:
        tally.tell(f"{what}: {len(lost)} not stored, the first {min(lost)}")
    extra = here - expected
    tally.unsure_stored += sum(seq in unsure for seq in extra)
    foreign = [seq for seq in extra if seq not in unsure]
    tally.foreign += len(foreign)
    if foreign:
        tally.tell(f"{what}: {len(foreign)} rows that nobody sent, the first {min(foreign)}")


def _seqs(connection: Connection, table: Table, boots: Iterable[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    columns, wanted = (table.c.device_id, table.c.boot, table.c.seq), set(boots)
    for number, boot, seq in connection.execute(select(*columns).where(table.c.device_id.in_({key[0] for key in wanted}))):
        if (number, boot) in wanted:
            found.setdefault((number, boot), []).append(seq)
    return found


def _received(connection: Connection, boots: Iterable[tuple[int, int]]) -> dict[tuple[int, int], SeqRanges]:
    row, wanted = tables.boots.c, set(boots)
    statement = select(row.device_id, row.boot, row.received).where(row.device_id.in_({key[0] for key in wanted}))
    decode = msgspec.msgpack.Decoder(list[tuple[int, int]]).decode
    return {
        (number, boot): SeqRanges(decode(data))
        for number, boot, data in connection.execute(statement)
        if (number, boot) in wanted
    }


def _requests(connection: Connection, boots: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    row, wanted = tables.model_windows.c, set(boots)
    statement = (
        select(row.device_id, row.boot, func.sum(row.requests))
        .where(row.device_id.in_({key[0] for key in wanted}))
        .group_by(row.device_id, row.boot)
    )
    return {(number, boot): int(total) for number, boot, total in connection.execute(statement) if (number, boot) in wanted}
