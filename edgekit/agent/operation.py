"""What people ask of a running agent, at the device or from afar: install, roll back, pause, resume.

A pause is kept over restarts and always has an end; what is installed goes on serving. A rollback goes to the other good slot:
that needs no permission by anybody, and the release that was left is refused from then on, so that it does not come back by
itself. A bundle that is handed over as a file carries no signed metadata: it is taken when metadata that this agent has
verified lists it, or when it is signed by a key of ``publisher_keys`` and is not older than what was committed here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from edgekit.agent.config import AgentConfig
from edgekit.agent.inbox import Answer, Inbox, Request, new_answer
from edgekit.agent.journal import Journal
from edgekit.agent.plan import active_slot, make_plan, other_slot
from edgekit.agent.units import Unit
from edgekit.agent.validity import find_recall
from edgekit.durable import PRIVATE_FILE, write_durably
from edgekit.errors import ArtifactError, DeviceError, EdgekitError, UsageError
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.command import MAX_PAUSE_S, OperationState
from edgekit.schema.desired import DesiredModel
from edgekit.schema.state import AgentState, Refusal

logger = logging.getLogger(__name__)

STATE_FILE = "operation.json"
BY_HAND = "local.rolled_back"
TAKEN_BACK = "desired.taken_back"
LOOK_SECONDS = 30.0
"""The pipe wakes the agent at once; this is for a request that came another way."""
PAUSE_STEP_S = 30.0
SETTLE_SECONDS = 60.0


def _is_taken_back(refusal: Refusal, manifest: str) -> bool:
    return refusal.code == TAKEN_BACK and refusal.manifest == manifest


def _without_refusal(state: AgentState, manifest: str) -> AgentState:
    kept = tuple(refusal for refusal in state.refusals if not _is_taken_back(refusal, manifest))
    return msgspec.structs.replace(state, refusals=kept)


class OperationStore:
    """``operation.json`` in the state folder; a damaged one is begun anew."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / STATE_FILE
        try:
            self.state = decode_json(self._path.read_bytes(), OperationState, name=STATE_FILE)
        except FileNotFoundError:
            self.state = OperationState()
        except (OSError, ArtifactError) as error:
            logger.error("event=operation_state_damaged error=%r", str(error))  # noqa: TRY400 - it says all
            self.state = OperationState(horizon=datetime.now(UTC))

    def update(self, **changes: object) -> OperationState:
        """Replace fields, durably.

        Raises:
            OSError: when the disk refuses; nothing is changed then.
        """
        state = msgspec.structs.replace(self.state, **changes)
        write_durably(self._path, encode_json(state), mode=PRIVATE_FILE)
        self.state = state
        return state


@dataclass
class Operation:
    """Used from the loop's thread only. ``settle`` serves what is wanted now."""

    config: AgentConfig
    units: Sequence[Unit]
    journal: Journal
    store: OperationStore
    settle: Callable[[], Awaitable[object]]
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def unit(self, model: str) -> Unit:
        """A model's unit; the first one's for an empty name.

        Raises:
            UsageError: ``model.unknown``.
        """
        for unit in self.units:
            if model in {"", unit.name, unit.config.model}:
                return unit
        names = ", ".join(unit.name for unit in self.units)
        raise UsageError("model.unknown", f"{model}: this agent does not run that model.", hint=f"It runs {names}.")

    # --- pause

    @property
    def paused_until(self) -> datetime | None:
        """When the pause ends; None when there is none."""
        until = self.store.state.paused_until
        return until if until is not None and until > datetime.now(UTC) else None

    def apply_pause(self) -> None:
        """Hold the updates, or let them go on."""
        is_paused = self.paused_until is not None
        for unit in self.units:
            if unit.updater.is_paused and not is_paused:
                unit.wake.set()
            unit.updater.is_paused = is_paused

    def pause(self, seconds: float, *, by: str) -> str:
        """Let updates wait.

        Raises:
            UsageError: ``pause.length``.
            OSError: when the disk refuses.
        """
        if not 0 < seconds <= MAX_PAUSE_S:
            raise UsageError("pause.length", f"a pause of {seconds:g} s: expected more than 0, at most {MAX_PAUSE_S:g} s.")
        until = (datetime.now(UTC) + timedelta(seconds=seconds)).replace(microsecond=0)
        self.store.update(paused_until=until)
        self.apply_pause()
        self._changed.set()
        text = f"updates wait until {until:%Y-%m-%d %H:%M} UTC"
        self.journal.event("updates_paused", f"{text}, asked for by {by}", fields={"until": until.isoformat()})
        return f"{text}; what is installed goes on serving"

    def resume(self, *, by: str) -> str:
        """End a pause."""
        if self.paused_until is None:
            return "updates are not paused"
        self.store.update(paused_until=None)
        self.apply_pause()
        self.journal.event("updates_resumed", f"asked for by {by}")
        return "updates go on"

    async def follow_pause(self) -> None:
        """End a pause in time, by the device's clock, which may jump."""
        while True:
            self._changed.clear()
            until = self.paused_until
            wait_s = min(PAUSE_STEP_S, (until - datetime.now(UTC)).total_seconds()) if until else None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), None if wait_s is None else max(0.05, wait_s))
            if until is not None and self.paused_until is None and self.store.state.paused_until is not None:
                with contextlib.suppress(OSError):
                    self.store.update(paused_until=None)
                self.apply_pause()
                self.journal.event("updates_resumed", "the pause is over")

    # --- rollback

    async def rollback(self, model: str, *, by: str) -> str:
        """Go back to the other good slot; what became of it.

        Raises:
            UsageError: ``model.unknown``.
            DeviceError: ``rollback.nothing`` when nothing serves or there is no other good slot.
        """
        unit = self.unit(model)
        async with unit.updater.busy:
            state = unit.store.state
            slot, other = active_slot(state), other_slot(state)
            if slot is None or other.status != "good":
                what = "nothing serves from a slot" if slot is None else f"slot {other.name} is {other.status}"
                raise DeviceError(
                    "rollback.nothing",
                    f"{unit.name}: there is nothing to go back to: {what}.",
                    hint="Publish the release again that should run, or bring it on a stick.",
                )
            unit.give_up(slot, DeviceError(BY_HAND, f"{slot.model}@{slot.version} was taken back by {by};"))
            unit.not_before = 0.0
        await self.settle()
        await self._wait_served(unit, other.manifest)
        serving = active_slot(unit.store.state)
        if serving is None or serving.manifest != other.manifest:
            raise DeviceError("rollback.failed", f"{unit.name}: {unit.updater.last_error or 'the other slot does not serve'}.")
        left = f"{slot.model}@{slot.version}"
        return f"{serving.model}@{serving.version} serves from slot {serving.name}; {left} is refused until it is allowed again"

    async def obey(self, unit: Unit, wanted: DesiredModel) -> None:
        """What a desired state can say beside "install this": go back to the older release that lies good in the other slot.

        Nothing is fetched for it and no floor is lowered: the way back is as far as the other slot. What was taken back so may
        come again when it is desired again.
        """
        state = unit.store.state
        if any(_is_taken_back(refusal, wanted.manifest) for refusal in state.refusals):
            unit.store.transform(lambda old: _without_refusal(old, wanted.manifest))
        slot, other = active_slot(state), other_slot(state)
        if slot is None or slot.manifest == wanted.manifest or other.manifest != wanted.manifest:
            return
        is_recalled = find_recall(state.recalls, (wanted.manifest,)) is not None
        if other.status != "good" or other.counter > slot.counter or is_recalled:
            return
        async with unit.updater.busy:
            if unit.store.state.active == slot.name:
                unit.give_up(slot, DeviceError(TAKEN_BACK, f"{slot.model}@{slot.version} was taken back by the fleet;"))
                unit.not_before = 0.0
        await self.settle()

    async def _wait_served(self, unit: Unit, manifest: str | None) -> None:
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            slot = active_slot(unit.store.state)
            is_there = unit.served is not None and slot is not None and unit.served.variant.model == slot.model_digest
            if is_there or slot is None or slot.manifest != manifest:
                return
            await asyncio.sleep(0.05)

    def allow_again(self, model: str) -> str:
        """Take back what a rollback by hand refused."""
        unit = self.unit(model)
        refused = [refusal for refusal in unit.store.state.refusals if refusal.code == BY_HAND]
        if not refused:
            return f"{unit.name}: no release was taken back by hand"

        def change(state: AgentState) -> AgentState:
            return msgspec.structs.replace(state, refusals=tuple(each for each in state.refusals if each.code != BY_HAND))

        unit.store.transform(change)
        unit.wake.set()
        names = ", ".join(f"{refusal.model}@{refusal.version}" for refusal in refused)
        return f"{names} may come again"

    # --- installing

    async def install_stick(self, request: Request) -> tuple[str, str]:
        """Install what is on a stick, for each of the models; an error's code, and what became of it."""
        answers = [await unit.updater.install_stick(request) for unit in self.units]
        return next((answer.code for answer in answers if answer.code), ""), "; ".join(answer.text for answer in answers)

    async def install_file(self, request: Request, path: Path) -> str:
        """Install a bundle that somebody at the device handed over.

        Raises:
            EdgekitError: why it was refused.
        """
        from edgekit.agent.file_source import FileSource, open_file  # noqa: PLC0415 - bundles are read on such a day only

        given = await open_file(path, request.name or path.name, self.config, self.units)
        unit = given.unit
        async with unit.updater.busy:
            plan = make_plan(unit.store.state, (given.release,), model=unit.config.model, channel="")
            if plan is None:
                raise DeviceError("install.not_needed", given.why_not(unit.store.state))
            code, text = await unit.updater.carry_out(plan, FileSource(given.bundle))
        if code:
            raise DeviceError(code, text)
        return f"{text}. {given.authority}"

    # --- the inbox

    async def follow_requests(self) -> None:
        """Answer requests, one after the other."""
        inbox = Inbox(self.config.state_path)
        try:
            bell = inbox.open_bell()
        except OSError as error:
            logger.error("event=inbox_failed error=%r", str(error))  # noqa: TRY400 - it says all
            return
        while True:
            while (request := inbox.take()) is not None:
                try:
                    inbox.answer(await self.answer(request, inbox.bundle(request)))
                except OSError as error:
                    logger.error("event=request_failed error=%r", str(error))  # noqa: TRY400 - it says all
            await inbox.wait(bell, LOOK_SECONDS)

    async def answer(self, request: Request, bundle: Path) -> Answer:
        """Do what a request asks for; it never raises for what is asked."""
        logger.info("event=local_request kind=%s model=%s", request.kind, request.model or "-")
        try:
            code, text = await self._carry_out(request, bundle)
        except EdgekitError as error:
            if request.kind == "install_file":
                self.journal.event("install_refused", f"file {request.name}: {error.message}", code=error.code)
            code, text = error.code, error.message
        except OSError as error:
            code, text = "device.disk_error", f"{self.config.state_dir}: {error}"
        except Exception as error:
            logger.exception("event=request_failed kind=%s", request.kind)
            code, text = "agent.bug", f"{type(error).__name__}: {error}"
        return new_answer(request, text, code=code)

    async def _carry_out(self, request: Request, bundle: Path) -> tuple[str, str]:
        match request.kind:
            case "install":
                return await self.install_stick(request)
            case "install_file":
                text = await self.install_file(request, bundle)
            case "rollback":
                text = await self.rollback(request.model, by="hand")
            case "allow_again":
                text = self.allow_again(request.model)
            case "pause":
                text = self.pause(request.seconds, by="hand")
            case "resume":
                text = self.resume(by="hand")
        return "", text
