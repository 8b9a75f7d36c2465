"""Remote commands: verified, allowed, written down, carried out once, answered.

1. The envelope is verified: :mod:`edgekit.trust.command` says by which rules.
2. Its kind is one of the setting ``commands``: a device obeys nothing that it was not told to obey.
3. It was not taken before; what was taken is remembered until it has expired, and the clock never goes back.
4. It is written into the audit log, then carried out: at most once, whatever happens; heavy work in a child process.
5. The answer goes to this device's own ``rsp`` topic, in parts; events tell the fleet that the command came and how it ended.

A refused command changes nothing. Who floods a device with them gets no more than a few events an hour.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec

from edgekit.agent.audit import AuditLog
from edgekit.agent.background import in_background
from edgekit.agent.config import AgentConfig
from edgekit.agent.errands import Errand, run_errand, seconds_of
from edgekit.agent.journal import Journal
from edgekit.agent.mqtt import Incoming
from edgekit.agent.operation import Operation
from edgekit.errors import DeviceError, EdgekitError, TrustError
from edgekit.schema.base import encode_msgpack
from edgekit.schema.command import BenchmarkOrder, Command, CommandPart, PauseOrder, RollbackOrder
from edgekit.telemetry.topics import topic
from edgekit.trust.command import VerifiedCommand, verify_command
from edgekit.trust.floors import reference_time
from edgekit.trust.keys import PublicKey, load_public_keys

logger = logging.getLogger(__name__)

PART_BYTES = 60_000
SEND_SECONDS = 60.0
SEND_STEP_S = 0.05
ERRAND_SECONDS = 120.0
MAX_SEEN = 512
MAX_TOLD_PER_HOUR = 10
HOUR = 3600.0
MEDIA_TYPES = {"benchmark": "application/json", "probe": "application/json", "debug": "application/gzip"}


class Sender(Protocol):
    """What this needs of the courier."""

    def answer(self, where: str, payload: bytes, *, correlation: bytes = b"", qos: int = 1) -> bool:
        """Publish; False when that is not possible now."""


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    code: str = ""
    text: str = ""
    data: bytes = b""


@dataclass
class Commander:
    """Used from the loop's thread only."""

    config: AgentConfig
    operation: Operation
    journal: Journal
    sender: Sender
    keys: tuple[PublicKey, ...]
    make_status: Callable[[], bytes]
    audit: AuditLog
    spawn: Callable[..., None]
    _errand: str = ""
    """The id of the command that a child works on."""
    _told: deque[float] = field(default_factory=deque)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    def open(
        cls,
        config: AgentConfig,
        operation: Operation,
        journal: Journal,
        *,
        sender: Sender,
        make_status: Callable[[], bytes],
        spawn: Callable[..., None],
    ) -> Commander:
        """With the keys of the settings.

        Raises:
            UsageError: a key file is damaged.
        """
        keys = load_public_keys(Path(config.command_keys or config.fleet_keys))
        return cls(config, operation, journal, sender, keys, make_status, AuditLog(config.state_path), spawn)

    @property
    def topic(self) -> str:
        """Where commands come from."""
        return topic(self.config.site, self.config.device, "cmd")

    def recover(self) -> None:
        """Tell of a command that the agent's end interrupted; it is not begun again."""
        state = self.operation.store.state
        if not state.running:
            return
        text = "the agent ended while it was carried out"
        try:
            self.audit.write(
                "finished", command_id=state.running, kind=state.running_kind, code="command.interrupted", detail=text
            )
            self.operation.store.update(running="", running_kind="")
        except OSError as error:
            logger.error("event=audit_failed error=%r", str(error))  # noqa: TRY400 - it says all
        fields = {"id": state.running, "kind": state.running_kind}
        self.journal.event("command_finished", f"{state.running_kind}: {text}", code="command.interrupted", fields=fields)

    def hear(self, message: Incoming) -> None:
        """A message on the topic of commands."""
        if message.payload:
            self.spawn(self.take(message.payload))

    def _now(self) -> datetime:
        """The device's time, which never goes back behind what it has seen."""
        horizon = self.operation.store.state.horizon
        now = reference_time(self.operation.units[0].store.state.floors, datetime.now(UTC))
        return max(now, horizon) if horizon else now

    async def take(self, payload: bytes) -> None:
        """Verify a command, and carry it out if this device may and will."""
        now = self._now()
        try:
            verified = await in_background(
                lambda: verify_command(payload, self.keys, device=self.config.device, now=now), name="command"
            )
        except EdgekitError as error:
            self._tell_refusal(error)
            return
        command = verified.command
        async with self._turn:
            seen = self.operation.store.state.seen
            if command.id in seen:
                if command.id != self.operation.store.state.running:
                    self._tell_refusal(TrustError("command.replayed", f"{command.kind} {command.id[:8]} was taken before."))
                return
            try:
                self._admit(verified, now)
            except EdgekitError as error:
                self._tell_refusal(error, command)
                await self._send(command, _Outcome(code=error.code, text=error.message))
                return
            except OSError as error:
                await self._send(command, _Outcome(code="device.disk_error", text=f"not carried out: {error}"))
                return
            is_errand = command.kind in MEDIA_TYPES
            if is_errand:
                self._errand = command.id
        fields = {"id": command.id, "kind": command.kind, "key": verified.keyids[0][:12]}
        self.journal.event("command_received", command.kind, fields=fields)
        self._publish(CommandPart(id=command.id, kind="accepted", text=f"{self.config.device} begins"))
        try:
            outcome = await self._carry_out(command)
        finally:
            if is_errand:
                self._errand = ""
        self._finish(command, outcome)
        await self._send(command, outcome)

    def _admit(self, verified: VerifiedCommand, now: datetime) -> None:
        """Rules 2 to 4, up to the audit log.

        Raises:
            TrustError: ``command.not_allowed``.
            DeviceError: ``command.busy`` or ``command.too_many``.
            OSError: when the disk refuses.
        """
        command, store = verified.command, self.operation.store
        if command.kind not in self.config.commands:
            allowed = ", ".join(self.config.commands) or "none"
            raise TrustError("command.not_allowed", f"{self.config.device} does not obey {command.kind}; it obeys {allowed}.")
        if self._errand and command.kind in MEDIA_TYPES:
            raise DeviceError("command.busy", f"{self.config.device} is at another command ({self._errand[:8]}).")
        seen = {each: expires_at for each, expires_at in store.state.seen.items() if expires_at > now}
        if len(seen) >= MAX_SEEN:
            raise DeviceError("command.too_many", f"{self.config.device} took {len(seen)} commands that have not expired yet.")
        is_errand = command.kind in MEDIA_TYPES
        store.update(
            seen=seen | {command.id: command.expires_at},
            horizon=now,
            running=command.id if is_errand else store.state.running,
            running_kind=command.kind if is_errand else store.state.running_kind,
        )
        self.audit.write("received", command_id=command.id, kind=command.kind, keyids=verified.keyids)

    def _tell_refusal(self, error: EdgekitError, command: Command | None = None) -> None:
        now = time.monotonic()
        while self._told and now - self._told[0] > HOUR:
            self._told.popleft()
        logger.warning("event=command_refused code=%s error=%r", error.code, error.message)
        if len(self._told) >= MAX_TOLD_PER_HOUR:
            return
        self._told.append(now)
        kind, command_id = (command.kind, command.id) if command else ("", "")
        try:
            self.audit.write("refused", command_id=command_id, kind=kind, code=error.code, detail=error.message)
        except OSError as full:
            logger.error("event=audit_failed error=%r", str(full))  # noqa: TRY400 - it says all
        self.journal.event("command_received", f"refused: {error.message}", code=error.code, fields={"id": command_id})

    async def _carry_out(self, command: Command) -> _Outcome:
        operation, by = self.operation, f"command {command.id[:8]}"
        try:
            match command.kind:
                case "pause":
                    outcome = _Outcome(text=operation.pause((command.pause or PauseOrder()).seconds, by=by))
                case "resume":
                    outcome = _Outcome(text=operation.resume(by=by))
                case "rollback":
                    outcome = _Outcome(text=await operation.rollback((command.rollback or RollbackOrder()).model, by=by))
                case "benchmark" | "debug" | "probe":
                    outcome = await self._send_child(command)
        except EdgekitError as error:
            outcome = _Outcome(code=error.code, text=f"{error.message} {error.hint}".strip())
        except OSError as error:
            outcome = _Outcome(code="device.disk_error", text=str(error))
        except Exception as error:
            logger.exception("event=command_failed kind=%s", command.kind)
            outcome = _Outcome(code="agent.bug", text=f"{type(error).__name__}: {error}")
        return outcome

    async def _send_child(self, command: Command) -> _Outcome:
        order = command.benchmark or BenchmarkOrder()
        errand = Errand(kind=command.kind, config=self.config, status=self.make_status(), benchmark=order)
        timeout_s = seconds_of(order) if command.kind == "benchmark" else ERRAND_SECONDS
        data = await run_errand(errand, timeout_s=timeout_s)
        return _Outcome(text=f"{command.kind}: {len(data)} bytes", data=data)

    def _finish(self, command: Command, outcome: _Outcome) -> None:
        try:
            self.audit.write("finished", command_id=command.id, kind=command.kind, code=outcome.code, detail=outcome.text)
            if self.operation.store.state.running == command.id:
                self.operation.store.update(running="", running_kind="")
        except OSError as error:
            logger.error("event=audit_failed error=%r", str(error))  # noqa: TRY400 - it says all
        fields = {"id": command.id, "kind": command.kind}
        self.journal.event("command_finished", f"{command.kind}: {outcome.text}", code=outcome.code, fields=fields)

    async def _send(self, command: Command, outcome: _Outcome) -> None:
        """The answer in parts, as fast as the connection takes them; without one it is given up after a while."""
        data = outcome.data
        pieces = [data[at : at + PART_BYTES] for at in range(0, len(data), PART_BYTES)] or [b""]
        first = CommandPart(
            id=command.id,
            kind="result",
            parts=len(pieces),
            code=outcome.code,
            text=outcome.text,
            media_type=MEDIA_TYPES.get(command.kind, "text/plain") if data else "text/plain",
            digest=hashlib.sha256(data).hexdigest(),
        )
        deadline = time.monotonic() + SEND_SECONDS
        for number, piece in enumerate(pieces):
            part = msgspec.structs.replace(first, part=number, data=piece)
            while not self._publish(part):
                if time.monotonic() > deadline:
                    logger.warning("event=command_answer_lost id=%s part=%d of=%d", command.id, number, len(pieces))
                    return
                await asyncio.sleep(SEND_STEP_S)

    def _publish(self, part: CommandPart) -> bool:
        where = topic(self.config.site, self.config.device, "rsp")
        return self.sender.answer(where, encode_msgpack(part), correlation=part.id.encode())
