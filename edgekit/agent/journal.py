"""What the device says: messages get their (boot, seq), go into the outbox, and the courier hears that something is there.

A full disk must not stop the agent: what cannot be stored is counted, and told when there is room again.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from edgekit.agent.clock import Clock
from edgekit.agent.config import AgentConfig
from edgekit.agent.outbox import Dropped, Kind, Outbox
from edgekit.agent.plan import DeviceFacts
from edgekit.agent.windows import DIGEST_DIGITS, METRICS, SCHEMA, SKETCHES, Measured
from edgekit.errors import EdgekitError
from edgekit.schema.message import Birth, Event, EventKind, InputSample, Label, Message, Reported, SlotReport, Window
from edgekit.schema.release import ReleaseInfo
from edgekit.schema.state import AgentState, Slot
from edgekit.telemetry.codec import encode

logger = logging.getLogger(__name__)

BOOT_BITS = 63
MAX_RANGES_TEXT = 2000
EXPIRE_EACH_S = 600.0


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
    _expire_after: float = 0.0
    _unstored_first: int = 0
    schema: int = SCHEMA
    clock: Clock = field(default_factory=Clock)

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
            ranges = (self._unstored_first, self.seq - 1)
            loss = Dropped(boot=self.boot, kind=kind, count=self._unstored, ranges=ranges)
            self._unstored = self._unstored_first = 0
            self._tell_loss(loss)
        self.on_stored()

    def _next(self) -> int:
        """The next number. A jump of the clock is told first, so that the server can correct what was stamped before it."""
        if (step := self.clock.check()) is not None:
            fields = {"delta_ms": step.delta_ms, "last_seq": self.seq, "is_correction": not step.was_set}
            self.event("clock_stepped", f"the clock jumped by {step.delta_ms / 1000:.1f} s", fields=fields)
        self.seq += 1
        return self.seq

    def _tell_loss(self, loss: Dropped) -> None:
        why = "they outlived their time" if loss.reason == "expired" else "the spool is full"
        fields: dict[str, str | int | float | bool] = {
            "count": loss.count,
            "boot": loss.boot,
            "first_seq": loss.first_seq,
            "last_seq": loss.last_seq,
            "kind": loss.kind,
            "reason": loss.reason,
            "ranges": describe_ranges(loss.ranges),
        }
        logger.warning("event=messages_dropped count=%d kind=%s reason=%s", loss.count, loss.kind, loss.reason)
        self.event("messages_dropped", f"{loss.count} messages were dropped: {why}", fields=fields)

    def expire(self) -> None:
        """Now and then give up what outlived its time, unless nobody knows the time."""
        if self.clock.source != "unsynced" and time.monotonic() >= self._expire_after:
            self._expire_after = time.monotonic() + EXPIRE_EACH_S
            for loss in self.outbox.expire(now_ms()):
                self._tell_loss(loss)

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
            clock=self.clock.source,
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

    def reported(self, state: AgentState, *, last_error: str, last_error_code: str, probation: tuple[str, ...] = ()) -> None:
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
            desired_seq=state.desired_seq,
            probation=probation,
        )
        self._store("rep", reported, encode(reported))

    def window(self, *, start_ms: int, duration_ms: int, measured: Measured, model_digest: str) -> None:
        """One window of figures."""
        window = Window(
            seq=self._next(),
            start_ms=start_ms,
            duration_ms=duration_ms,
            values=measured.values,
            model_digest=short_digest(model_digest),
            sketches=measured.sketches if any(measured.sketches) else (),
            models=measured.models,
        )
        self._store("w", window, msgspec.msgpack.encode(window))

    def label(
        self,
        prediction_id: str,
        label: str,
        *,
        model_digest: str,
        predicted: str = "",
        confidence: float = 0.0,
        is_counted: bool = False,
    ) -> None:
        """The true answer to a prediction."""
        message = Label(
            boot=self.boot,
            seq=self._next(),
            time_ms=now_ms(),
            model_digest=short_digest(model_digest),
            prediction_id=prediction_id,
            label=label,
            predicted=predicted,
            confidence=confidence,
            is_counted=is_counted,
        )
        self._store("lb", message, encode(message))

    def sample(self, sample: InputSample) -> None:
        """A live input, as it was redacted; boot, seq and time are given to it here."""
        stamped = msgspec.structs.replace(sample, boot=self.boot, seq=self._next(), time_ms=now_ms())
        self._store("x", stamped, encode(stamped))


def short_digest(digest: str) -> str:
    """A model's digest as messages carry it: the first 12 hex digits."""
    return digest.removeprefix("sha256:")[:DIGEST_DIGITS]


def describe_ranges(ranges: Sequence[int]) -> str:
    """Sequence numbers for an event: ``3-7,9``; what is too long for one ends with one range over the rest.

    >>> describe_ranges((3, 7, 9, 9))
    '3-7,9'
    """
    parts: list[str] = []
    length = 0
    for at in range(0, len(ranges), 2):
        first, last = ranges[at], ranges[at + 1]
        if length > MAX_RANGES_TEXT:
            parts.append(f"{first}-{ranges[-1]}")
            break
        parts.append(str(first) if first == last else f"{first}-{last}")
        length += len(parts[-1]) + 1
    return ",".join(parts)
