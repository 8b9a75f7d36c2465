"""Carries the outbox to the broker: identity first, then what is new, then the backlog; never more than 20 on the way.

On each connection the births and states that wait go first, oldest first, so that the broker's retained messages end on the
newest. Only when all of them are confirmed the rest follows. A message leaves the outbox when its PUBACK says success; a
refused one (not authorized, quota) stays, and is tried again after a while.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
from paho.mqtt.client import topic_matches_sub

from edgekit.agent.journal import Journal, now_ms
from edgekit.agent.mqtt import FAILURE_CODE, MAX_IN_FLIGHT, Connection, Handlers, Incoming
from edgekit.agent.outbox import Kind, Outbox, Row
from edgekit.schema.message import Death, Heartbeat, Window, WindowBatch
from edgekit.telemetry.codec import encode
from edgekit.telemetry.topics import Verb, topic

logger = logging.getLogger(__name__)

BATCH_WINDOWS = 30
REFUSED_RETRY_S = 30.0
GOODBYE_SECONDS = 2.0
_VERBS: dict[Kind, Verb] = {"birth": "status", "rep": "rep", "ev": "ev", "w": "w"}


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
    _late_after: int = 0
    _retry: asyncio.TimerHandle | None = None
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
        for topic_filter in self._listeners:
            if self._connection is not None:
                self._connection.subscribe(topic_filter)
        logger.info("event=broker_connected waiting=%d", self.outbox.count)
        self._rewind()
        self.pump()

    def _rewind(self) -> None:
        """Everything in the outbox is to be sent: the connection is new, or something was refused."""
        self._in_flight.clear()
        self._preface = self.outbox.read(kinds=("birth", "rep"), limit=1_000_000)
        self._preface_ids = {row.id for row in self._preface}
        newest = self.outbox.newest_id()
        self._mark = self._live_after = newest
        self._late_after = 0

    def _disconnected(self, _reason: str) -> None:
        self.is_connected = False
        self._in_flight.clear()

    def pump(self) -> None:
        """Send as much as may be on the way at once; a spool that cannot be read now is tried again later."""
        try:
            self._pump()
        except sqlite3.Error as error:
            self._postpone(f"the spool: {error}")

    def _pump(self) -> None:
        while self.is_connected and len(self._in_flight) < MAX_IN_FLIGHT:
            if self._preface:
                is_sent = self._send([self._preface.pop(0)], is_late=False)
            elif self._preface_ids:
                return
            elif rows := self.outbox.read(kinds=("birth", "rep", "ev", "w"), after=self._live_after, limit=1):
                self._live_after = rows[0].id
                is_sent = self._send(rows, is_late=False)
            elif rows := self._next_late():
                self._late_after = rows[-1].id
                is_sent = self._send(rows, is_late=True)
            else:
                return
            if not is_sent:
                return

    def _next_late(self) -> list[Row]:
        """The next of the backlog: one event, or up to 30 windows of one boot and one schema."""
        rows = self.outbox.read(kinds=("ev", "w"), after=self._late_after, limit=BATCH_WINDOWS)
        rows = [row for row in rows if row.id <= self._mark]
        if not rows or rows[0].kind != "w":
            return rows[:1]
        first = rows[0]
        batch = []
        for row in rows:
            if (row.kind, row.boot, row.schema) != (first.kind, first.boot, first.schema):
                break
            batch.append(row)
        return batch

    def _send(self, rows: Sequence[Row], *, is_late: bool) -> bool:
        first, config = rows[0], self.journal.config
        payload = first.payload
        if first.kind == "w":
            windows = tuple(msgspec.msgpack.decode(row.payload, type=Window) for row in rows)
            payload = encode(WindowBatch(boot=first.boot, windows=windows, is_late=is_late, schema=first.schema))
        assert self._connection is not None
        is_retained = first.kind in {"birth", "rep"}
        where = topic(config.site, config.device, _VERBS[first.kind])
        mid = self._connection.publish(where, payload, qos=1, is_retained=is_retained)
        if mid is None:
            self.is_connected = False
            return False
        self.sent_messages += 1
        self.sent_bytes += len(payload) + len(where)
        self._in_flight[mid] = tuple(row.id for row in rows)
        return True

    def _puback(self, mid: int, code: int, reason: str) -> None:
        ids = self._in_flight.pop(mid, None)
        if ids is None:
            return
        self._preface_ids.difference_update(ids)
        if code < FAILURE_CODE:
            try:
                self.outbox.confirm(ids)
            except sqlite3.Error as error:
                self._postpone(f"the spool: {error}")
        else:
            self._postpone(reason)
        self.pump()

    def _postpone(self, reason: str) -> None:
        """What was refused, or could not be forgotten, is sent again after a while."""
        self.last_refusal = reason
        logger.warning("event=publish_refused reason=%r", reason)
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(REFUSED_RETRY_S, self._try_again)

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
