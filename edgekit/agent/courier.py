"""Carries the outbox to the broker: identity first, then what is new, then the backlog; never more than 20 on the way.

On each connection the births and states that wait go first, oldest first, so that the broker's retained messages end on the
newest. Only when all of them are confirmed the rest follows: what is new as it comes, and beside it the backlog, by class
(events and labels, windows up to 30 a message, samples), at a bounded rate, and on the last five places only in turn, so that
old data do not hold up live ones, and a whole fleet that comes back does not drown its broker.

A message leaves the outbox when its PUBACK says success. "No matching subscribers" is none: the broker took it and threw it
away, because the fleet's server has no session there (any more); then one message at a time asks whether somebody listens
again.

A refused one (not authorized, quota) stays, and is tried again after a pause that grows; after ``MAX_REFUSALS`` it is set aside
with an event, and tried once more on a connection a day later. What is larger than the broker takes is sent in smaller parts,
or set aside at once. When the broker hangs up because of what it was sent, messages go one at a time for a while, so that the
one that it cannot bear is found and does not cost all others.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
from paho.mqtt.client import topic_matches_sub

from edgekit.agent.journal import Journal, now_ms
from edgekit.agent.mqtt import FAILURE_CODE, MAX_IN_FLIGHT, Connection, Handlers, Incoming
from edgekit.agent.outbox import Kind, Outbox, Row
from edgekit.agent.pace import Pace
from edgekit.schema.message import Death, Heartbeat, Window, WindowBatch
from edgekit.telemetry.codec import MAX_BYTES, compress, encode
from edgekit.telemetry.topics import Verb, topic

logger = logging.getLogger(__name__)

BATCH_WINDOWS = 30
REFUSED_RETRY_S = 30.0
MAX_RETRY_S = 3600.0
MAX_REFUSALS = 5
REVIVE_S = 86400.0
GOODBYE_SECONDS = 2.0
LIVE_RESERVE = 5
"""Places on the way that the backlog only takes in its turn."""
LIVE_RUN = 4
"""So many live messages in a row let one of the backlog pass."""
PACKET_MARGIN_BYTES = 512
"""What a packet has beside its payload, at most: header, topic, properties."""
TOO_LARGE = 0x95
NOBODY_LISTENS = 0x10
UNHEARD_RETRY_S = 60.0
"""The longest pause between two looks for a listener."""
CAREFUL_MESSAGES = 50
"""So many go one at a time after the broker hung up because of one."""
_VERBS: dict[Kind, Verb] = {"birth": "status", "rep": "rep", "ev": "ev", "lb": "lb", "w": "w", "x": "x"}
_LIVE: tuple[Kind, ...] = ("birth", "rep", "ev", "lb", "w")
_BACKLOG: tuple[tuple[Kind, ...], ...] = (("ev", "lb"), ("w",), ("x",))
"""What is sent of the backlog first. Samples are never live."""


@dataclass
class Courier:
    """Used from the loop's thread only."""

    outbox: Outbox
    journal: Journal
    announce: Callable[[], None]
    """Puts a birth into the outbox."""
    is_connected: bool = False
    sent_messages: int = 0
    sent_bytes: int = 0
    last_refusal: str = ""
    _connection: Connection | None = None
    _in_flight: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _preface: list[Row] = field(default_factory=list)
    _preface_ids: set[int] = field(default_factory=set)
    _mark: int = 0
    _live_after: int = 0
    _late_after: dict[tuple[Kind, ...], int] = field(default_factory=dict)
    _live_run: int = 0
    _pace: Pace = field(default_factory=Pace)
    _batch_windows: int = BATCH_WINDOWS
    _refusals: int = 0
    _careful: int = 0
    _is_unheard: bool = False
    _told: set[tuple[Kind, str]] = field(default_factory=set)
    _revived_at: float = field(default_factory=time.monotonic)
    _retry: asyncio.TimerHandle | None = None
    _resume: asyncio.TimerHandle | None = None
    _listeners: dict[str, Callable[[Incoming], None]] = field(default_factory=dict)

    def listen(self, topic_filter: str, handler: Callable[[Incoming], None]) -> None:
        """Hear what is published there, now and after each new connection; one handler a filter.

        The handler runs in the loop's thread and must not block it. The broker may deliver a message twice.
        """
        self._listeners[topic_filter] = handler
        if self.is_connected and self._connection is not None:
            self._connection.subscribe(topic_filter)

    def _hear(self, message: Incoming) -> None:
        for topic_filter, handler in tuple(self._listeners.items()):
            if topic_matches_sub(topic_filter, message.topic):
                try:
                    handler(message)
                except Exception:  # a bug in one listener must not cut the connection of the others
                    logger.exception("event=listener_failed topic=%s", message.topic)

    def answer(self, where: str, payload: bytes, *, correlation: bytes = b"", qos: int = 1) -> bool:
        """Publish outside the spool: what is of no use later, such as the answer to a command.

        Returns:
            Whether it is on its way; False without a connection.
        """
        if not self.is_connected or self._connection is None:
            return False
        mid = self._connection.publish(where, payload, qos=qos, is_retained=False, correlation=correlation)
        return mid is not None

    def start(self) -> None:
        """Begin to connect."""
        config = self.journal.config
        self._pace = Pace(per_s=config.drain_per_s)
        will = encode(Death(boot=self.journal.boot))
        handlers = Handlers(
            on_connect=self._connected, on_disconnect=self._disconnected, on_puback=self._puback, on_message=self._hear
        )
        self._connection = Connection(config, topic(config.site, config.device, "status"), will, handlers)
        self._connection.start()

    def _connected(self) -> None:
        if not self.outbox.read(kinds=("birth",), boot=self.journal.boot, limit=1):
            self.announce()  # not connected yet: nothing goes out before the birth
        self.is_connected = True
        self._told.clear()
        self._batch_windows = self._batch_windows if self._careful else BATCH_WINDOWS
        for topic_filter in self._listeners:
            if self._connection is not None:
                self._connection.subscribe(topic_filter)
        logger.info("event=broker_connected waiting=%d", self.outbox.count)
        self._rewind()
        self.pump()

    def _rewind(self) -> None:
        """Everything in the outbox is to be sent: the connection is new, or something was refused."""
        self._forget_flight()
        if self.outbox.dead and time.monotonic() - self._revived_at >= REVIVE_S:
            self._revived_at = time.monotonic()
            logger.info("event=messages_revived count=%d", self.outbox.revive())
        self._preface = self.outbox.read(kinds=("birth", "rep"), limit=1_000_000)
        self._preface_ids = {row.id for row in self._preface}
        newest = self.outbox.newest_id()
        self._mark = self._live_after = newest
        self._late_after.clear()

    def _forget_flight(self) -> None:
        self._in_flight.clear()
        self.outbox.held.clear()

    def _disconnected(self, reason: str) -> None:
        self.is_connected = False
        flight = tuple(self._in_flight.values())
        self._forget_flight()
        if flight and getattr(self._connection, "is_blamed", False):
            if self._careful and len(flight) == 1 and len(flight[0]) > 1:
                self._batch_windows = max(1, len(flight[0]) // 2)
            elif self._careful and len(flight) == 1:
                self._bury_ids(flight[0], reason, most=MAX_REFUSALS)
            self._careful = CAREFUL_MESSAGES

    def pump(self) -> None:
        """Send as much as may be on the way at once; a spool that cannot be read now is tried again later."""
        try:
            self._pump()
        except sqlite3.Error as error:
            self._postpone(f"the spool: {error}")

    def _pump(self) -> None:
        while self.is_connected and len(self._in_flight) < self._places:
            if self._preface:
                is_sent = self._send([self._preface.pop(0)], is_late=False)
            elif self._preface_ids or (self._is_unheard and self._retry is not None):
                return
            elif self._live_run >= LIVE_RUN and (rows := self._next_late(is_turn=True)):
                is_sent = self._send_late(rows)
            elif rows := self.outbox.read(kinds=_LIVE, after=self._live_after, limit=1):
                self._live_after, self._live_run = rows[0].id, self._live_run + 1
                is_sent = self._send(rows, is_late=False)
            elif rows := self._next_late():
                is_sent = self._send_late(rows)
            else:
                return
            if not is_sent:
                return

    @property
    def _places(self) -> int:
        """How many messages may be on the way: what we want, or the broker allows."""
        if self._careful or self._is_unheard:
            return 1
        return min(MAX_IN_FLIGHT, getattr(self._connection, "receive_maximum", MAX_IN_FLIGHT))

    def _next_late(self, *, is_turn: bool = False) -> list[Row]:
        """The next of the backlog: one message, or up to 30 windows of one boot and one schema; none while it must wait.

        ``is_turn``: live messages let it pass, so it may have any place.
        """
        self._live_run = 0
        if not is_turn and len(self._in_flight) >= max(1, self._places - LIVE_RESERVE):
            return []
        for kinds in _BACKLOG:
            rows = self.outbox.read(kinds=kinds, after=self._late_after.get(kinds, 0), limit=self._batch_windows)
            rows = rows if kinds == ("x",) else [row for row in rows if row.id <= self._mark]
            if not rows:
                continue
            if (wait_s := self._pace.wait_s(time.monotonic())) > 0:
                self._resume_in(wait_s)
                return []
            return self._same(rows) if kinds == ("w",) else rows[:1]
        return []

    def _same(self, rows: Sequence[Row]) -> list[Row]:
        """The windows at the beginning that fit into one message."""
        first, size = rows[0], 0
        batch: list[Row] = []
        for row in rows:
            size += len(row.payload)
            if (row.boot, row.schema) != (first.boot, first.schema) or (batch and size > self._most_bytes):
                break
            batch.append(row)
        return batch

    @property
    def _most_bytes(self) -> int:
        """The largest payload: what the broker takes, and the server."""
        limit = getattr(self._connection, "max_packet_bytes", 0) or MAX_BYTES
        return max(1, min(limit, MAX_BYTES) - PACKET_MARGIN_BYTES)

    def _resume_in(self, seconds: float) -> None:
        def resume() -> None:
            self._resume = None
            self.pump()

        if self._resume is None:
            self._resume = asyncio.get_running_loop().call_later(seconds, resume)

    def _send_late(self, rows: Sequence[Row]) -> bool:
        for kinds in _BACKLOG:
            if rows[0].kind in kinds:
                self._late_after[kinds] = rows[-1].id
        self._pace.take(time.monotonic())
        return self._send(rows, is_late=True)

    def _send(self, rows: Sequence[Row], *, is_late: bool) -> bool:
        first, config = rows[0], self.journal.config
        payload = first.payload
        if first.kind == "w":
            windows = tuple(msgspec.msgpack.decode(row.payload, type=Window) for row in rows)
            payload = compress(encode(WindowBatch(boot=first.boot, windows=windows, is_late=is_late, schema=first.schema)))
        if len(payload) > self._most_bytes + PACKET_MARGIN_BYTES // 2:
            self._bury(rows, f"{len(payload)} bytes are more than the broker takes", most=0)
            return True
        assert self._connection is not None
        is_retained = first.kind in {"birth", "rep"}
        where = topic(config.site, config.device, _VERBS[first.kind])
        mid = self._connection.publish(where, payload, qos=1, is_retained=is_retained)
        if mid is None:
            self.is_connected = False
            return False
        self.sent_messages += 1
        self.sent_bytes += len(payload) + len(where)
        ids = tuple(row.id for row in rows)
        self._in_flight[mid] = ids
        self.outbox.held.update(ids)
        return True

    def _puback(self, mid: int, code: int, reason: str) -> None:
        ids = self._in_flight.pop(mid, None)
        if ids is None:
            return
        self.outbox.held.difference_update(ids)
        was_preface = not self._preface_ids.isdisjoint(ids)  # the broker retains those anyway
        self._preface_ids.difference_update(ids)
        try:
            if code == NOBODY_LISTENS and not was_preface:
                self._is_unheard = True
                self._postpone("nobody listens", most_s=UNHEARD_RETRY_S)
            elif code < FAILURE_CODE:
                self._is_unheard = self._is_unheard and was_preface
                self.outbox.confirm(ids)
                self._refusals = 0
                self._careful = max(0, self._careful - 1)
            else:
                self._refused(ids, code, reason)
        except sqlite3.Error as error:
            self._postpone(f"the spool: {error}")
        self.pump()

    def _refused(self, ids: Sequence[int], code: int, reason: str) -> None:
        """The broker does not want these: later again, in smaller parts where that may help, at last no more."""
        if code == TOO_LARGE and len(ids) > 1:
            self._batch_windows = max(1, len(ids) // 2)
        else:
            self._bury_ids(ids, reason, most=MAX_REFUSALS)
        self._postpone(reason)

    def _bury(self, rows: Sequence[Row], reason: str, *, most: int) -> None:
        self._preface_ids.difference_update(row.id for row in rows)
        self._bury_ids([row.id for row in rows], reason, most=most)

    def _bury_ids(self, ids: Sequence[int], reason: str, *, most: int) -> None:
        """Count a refusal; what was refused too often is set aside, and each kind of it told once a connection."""
        buried = self.outbox.refuse(ids, most=most)
        for kind in dict.fromkeys(row.kind for row in buried):
            if (kind, reason) in self._told:
                continue
            self._told.add((kind, reason))
            count = sum(row.kind == kind for row in buried)
            self.journal.event(
                "message_refused",
                f"the broker refuses what goes to {_VERBS[kind]!r}: {reason}",
                code="broker.refused",
                fields={"verb": _VERBS[kind], "count": count, "reason": reason},
            )

    def _postpone(self, reason: str, *, most_s: float = MAX_RETRY_S) -> None:
        """What was refused, or could not be forgotten, is sent again after a while, that grows as long as nothing goes."""
        self.last_refusal = reason
        if self._retry is None:
            wait_s = min(most_s, MAX_RETRY_S, REFUSED_RETRY_S * 2 ** min(self._refusals, 16))
            self._refusals += 1
            logger.warning("event=publish_refused reason=%r retry_s=%.1f", reason, wait_s)
            self._retry = asyncio.get_running_loop().call_later(wait_s, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        if self.is_connected and not self._in_flight:
            try:
                self._rewind()
            except sqlite3.Error as error:
                self._postpone(f"the spool: {error}")
            else:
                self.pump()
        elif self.is_connected:
            self._retry = asyncio.get_running_loop().call_later(1.0, self._try_again)

    def beat(self) -> None:
        """Send a sign of life, if there is somebody to hear it."""
        if self.is_connected and self._connection is not None:
            journal, config = self.journal, self.journal.config
            beat = Heartbeat(boot=journal.boot, seq=journal.seq, time_ms=now_ms(), outbox=self.outbox.count)
            payload, where = encode(beat), topic(config.site, config.device, "hb")
            self._connection.publish(where, payload, qos=0, is_retained=False)
            self.sent_messages += 1
            self.sent_bytes += len(payload) + len(where)

    async def _wait_sent(self, deadline: float, is_waiting: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        while self.is_connected and is_waiting() and loop.time() < deadline:  # noqa: ASYNC110 - once, at the end
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Send what can still go, say a clean goodbye, disconnect."""
        if self._connection is None:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + GOODBYE_SECONDS
        await self._wait_sent(deadline, lambda: bool(self.outbox.count or self._in_flight))
        if self.is_connected:
            config = self.journal.config
            death = encode(Death(boot=self.journal.boot, is_clean=True, time_ms=now_ms()))
            mid = self._connection.publish(topic(config.site, config.device, "status"), death, qos=1, is_retained=True)
            if mid is not None:
                self._in_flight[mid] = ()
            await self._wait_sent(deadline, lambda: bool(self._in_flight))
        await asyncio.to_thread(self._connection.stop)
