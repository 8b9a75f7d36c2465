"""What the device says: messages get their (boot, seq), go into the outbox, and the courier hears that something is there.

A full disk must not stop the agent: what cannot be stored is counted, and told when there is room again.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from edgekit.agent.config import AgentConfig
from edgekit.agent.outbox import Dropped, Kind, Outbox
from edgekit.agent.plan import DeviceFacts
from edgekit.agent.windows import METRICS, SKETCHES
from edgekit.errors import EdgekitError
from edgekit.schema.message import Birth, Event, EventKind, Message, Reported, SlotReport, Window
from edgekit.schema.release import ReleaseInfo
from edgekit.schema.state import AgentState, Slot
from edgekit.telemetry.codec import encode, schema_crc

logger = logging.getLogger(__name__)

BOOT_BITS = 63
DIGEST_DIGITS = 12


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


def describe_slot(slot: Slot) -> SlotReport:
    """A slot as the fleet sees it."""
    return SlotReport(
        name=slot.name,
        status=slot.status,
        model=slot.model,
        version=slot.version,
        counter=slot.counter,
        model_digest=slot.model_digest or "",
        manifest_digest=slot.manifest or "",
    )


@dataclass
class Journal:
    """Gives out seq within this boot. Used from the loop's thread."""

    outbox: Outbox
    config: AgentConfig
    agent_version: str
    boot: int = field(default_factory=lambda: secrets.randbits(BOOT_BITS))
    seq: int = 0
    url: str = ""
    on_stored: Callable[[], None] = lambda: None
    _unstored: int = 0
    _unstored_first: int = 0
    schema: int = field(default_factory=lambda: schema_crc(METRICS, SKETCHES))

    def _store(self, kind: Kind, message: Message, payload: bytes) -> None:
        if not self.config.broker:
            return
        schema = self.schema if kind == "w" else 0
        try:
            _, dropped = self.outbox.put(boot=self.boot, seq=self.seq, kind=kind, payload=payload, schema=schema)
        except sqlite3.Error as error:
            self._unstored_first = self._unstored_first or self.seq
            self._unstored += 1
            logger.error("event=outbox_failed kind=%s error=%r", type(message).__name__, str(error))  # noqa: TRY400 - it says all
            return
        for loss in dropped:
            self._tell_loss(loss)
        if self._unstored:
            loss = Dropped(
                boot=self.boot, kind=kind, count=self._unstored, first_seq=self._unstored_first, last_seq=self.seq - 1
            )
            self._unstored = self._unstored_first = 0
            self._tell_loss(loss)
        self.on_stored()

    def _next(self) -> int:
        self.seq += 1
        return self.seq

    def _tell_loss(self, loss: Dropped) -> None:
        fields = {
            "count": loss.count,
            "boot": loss.boot,
            "first_seq": loss.first_seq,
            "last_seq": loss.last_seq,
            "kind": loss.kind,
        }
        logger.warning("event=messages_dropped count=%d kind=%s", loss.count, loss.kind)
        self.event("messages_dropped", f"{loss.count} messages were dropped: the spool is full", fields=fields)

    def birth(self, facts: DeviceFacts, *, runtime: str, runtime_version: str) -> None:
        """Who and what this device is."""
        birth = Birth(
            boot=self.boot,
            seq=self._next(),
            time_ms=now_ms(),
            metrics=METRICS,
            sketches=SKETCHES,
            agent_version=self.agent_version,
            runtime=runtime,
            runtime_version=runtime_version,
            arch=facts.arch,
            cpu=facts.cpu,
            isa=facts.isa,
            cores=facts.cores,
            ram_mb=facts.ram_mb,
            os=facts.os,
            labels=self.config.labels,
            url=self.url,
        )
        self._store("birth", birth, encode(birth))

    def event(
        self,
        kind: EventKind,
        detail: str = "",
        *,
        error: EdgekitError | None = None,
        code: str = "",
        release: ReleaseInfo | Slot | None = None,
        fields: Mapping[str, str | int | float | bool] | None = None,
    ) -> None:
        """Something happened."""
        name = "" if release is None else release.name if isinstance(release, ReleaseInfo) else release.model
        event = Event(
            boot=self.boot,
            seq=self._next(),
            time_ms=now_ms(),
            kind=kind,
            detail=error.message if error else detail,
            code=error.code if error else code,
            model=name,
            version=release.version if release else "",
            counter=release.counter if release else 0,
            fields=dict(fields or {}),
        )
        level = logging.WARNING if event.code else logging.INFO
        logger.log(level, "event=%s release=%s@%s code=%s detail=%r", kind, name, event.version, event.code, event.detail)
        self._store("ev", event, encode(event))

    def reported(self, state: AgentState, *, last_error: str, last_error_code: str) -> None:
        """The device's state as a whole."""
        reported = Reported(
            boot=self.boot,
            seq=self._next(),
            time_ms=now_ms(),
            slots=tuple(describe_slot(slot) for slot in state.slots),
            active=state.active or "",
            phase=state.phase,
            last_error=last_error,
            last_error_code=last_error_code,
            refused=tuple(refusal.manifest for refusal in state.refusals),
        )
        self._store("rep", reported, encode(reported))

    def window(self, *, start_ms: int, duration_ms: int, values: bytes, sketches: tuple[bytes, ...], model_digest: str) -> None:
        """One window of figures."""
        window = Window(
            seq=self._next(),
            start_ms=start_ms,
            duration_ms=duration_ms,
            values=values,
            model_digest=model_digest.removeprefix("sha256:")[:DIGEST_DIGITS],
            sketches=sketches if any(sketches) else (),
        )
        self._store("w", window, msgspec.msgpack.encode(window))
