"""One unit a model: its slots, its state, its updates, its crashes. What happens to one never touches another.

The first model's files lie in the state folder itself, as they always did; each further model NAME has the same layout under
``models/NAME/``.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec

from edgekit.agent.background import in_background
from edgekit.agent.board import Page
from edgekit.agent.child import SelfTestFailed
from edgekit.agent.config import AgentConfig
from edgekit.agent.factory import open_factory
from edgekit.agent.health import CrashLedger
from edgekit.agent.journal import Journal
from edgekit.agent.link import Model, Proof
from edgekit.agent.plan import DeviceFacts, active_slot, other_slot, refuse
from edgekit.agent.probation import add, begin, judge
from edgekit.agent.slots import SlotStore
from edgekit.agent.state_store import StateStore, prepare_dir
from edgekit.agent.steps import Installer
from edgekit.agent.updater import Proven, Updater, new_refusal
from edgekit.agent.validity import find_ban
from edgekit.errors import DeviceError, EdgekitError, EnvironmentFault, TrustError
from edgekit.schema.message import EventKind
from edgekit.schema.state import AgentState, ModelStatus, Probation, Slot, Source

logger = logging.getLogger(__name__)

MODELS_DIR = "models"
SAVE_SECONDS = 10.0
"""A probation's counts are written no more often: the flash memory is worth more than a few inferences."""
DAMAGED = "slot.damaged"


class Host(Protocol):
    """Who runs the workers for all units."""

    async def prove(self, unit: Unit, model: Model) -> Proven:
        """Let a model prove itself; raises SelfTestFailed."""

    async def ask_facts(self) -> DeviceFacts:
        """What this device is."""

    @property
    def known_facts(self) -> DeviceFacts:
        """What is known of this device without asking."""

    def report(self) -> None:
        """Tell the fleet the whole state."""


def unit_configs(config: AgentConfig) -> tuple[AgentConfig, ...]:
    """The configuration of each model: the first one's is the agent's."""
    further = (
        msgspec.structs.replace(
            config,
            model=name,
            channel=model.channel or config.channel,
            factory=model.factory,
            state_dir=str(config.state_path / MODELS_DIR / name),
            models={},
        )
        for name, model in config.models.items()
    )
    return (config, *further)


@dataclass
class _Watch:
    """A probation in this worker's time: what was there before it, and since when it serves."""

    page: Page
    base: Probation
    since: float
    saved_at: float


@dataclass
class Unit:
    """One model."""

    config: AgentConfig
    store: StateStore
    slots: SlotStore
    journal: Journal
    host: Host
    root: bytes
    ledger: CrashLedger = field(default_factory=CrashLedger)
    served: Model | None = None
    """What answers now."""
    proof: Proof | None = None
    absence: str = ""
    """Why nothing may serve, as a recall or a validity says; empty: nothing is installed, or it is tried again."""
    not_before: float = 0.0
    """The model is not started again before this time (monotonic): it died or failed a moment ago."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the next poll should not wait."""
    _last: tuple[str, str] = ("", "")
    _told: set[tuple[str | None, str]] = field(default_factory=set)
    _watch: _Watch | None = None
    _factory_told: str = ""

    def __post_init__(self) -> None:
        self.updater = Updater(
            self.config, self.store, self.slots, self.journal, self.root, self, self.host.ask_facts, self.host.report
        )

    @classmethod
    def open(cls, config: AgentConfig, journal: Journal, host: Host, root: bytes) -> Unit:
        """A further model's unit, over its own folder."""
        prepare_dir(config.state_path)
        store = StateStore.open(config.state_path, device=config.device)
        return cls(config, store, SlotStore(config.state_path), journal, host, root)

    @property
    def name(self) -> str:
        """The model's name; empty for an agent that was told none."""
        return self.config.model or (self.served.name if self.served else "")

    @property
    def serves(self) -> Source:
        """Where its model comes from."""
        if self.served is None:
            return "nothing"
        return "factory" if Path(self.served.blob_dir).name == "factory" else "slot"

    def status(self) -> ModelStatus:
        """For people."""
        return ModelStatus(
            name=self.name,
            channel=self.config.channel,
            state=self.store.state,
            serves=self.serves,
            version=self.served.manifest.version if self.served else "",
            model_digest=self.served.variant.model if self.served else None,
            absence=self.absence,
            last_error=self.updater.last_error,
            last_error_code=self.updater.last_error_code,
        )

    # --- what it wants to serve

    async def prove(self, model: Model) -> Proven:
        """For the updater."""
        return await self.host.prove(self, model)

    async def wanted(self) -> Model | None:
        """The model that should serve: the active slot's, else the other good one's, else the factory's.

        Every blob is hashed; a slot that is damaged is given up on the way.
        """
        if time.monotonic() < self.not_before:
            return None
        while (slot := active_slot(self.store.state)) is not None:
            try:
                return await in_background(functools.partial(self._model_of, slot), name="hash")
            except EdgekitError as error:
                self.give_up(slot, error)
                if error.code != DAMAGED and active_slot(self.store.state) == slot:
                    break
        return await self._factory_model()

    def _model_of(self, slot: Slot) -> Model:
        return Installer(self.config, self.store, self.slots, self.host.known_facts).model_of(slot)

    async def _factory_model(self) -> Model | None:
        if not self.config.factory:
            return None
        try:
            facts = await self.host.ask_facts()
            model = await in_background(lambda: open_factory(self.config, facts), name="factory")
        except (EdgekitError, OSError) as error:
            if self._factory_told != str(error):
                self._factory_told = str(error)
                code = error.code if isinstance(error, EdgekitError) else "device.disk_error"
                self.journal.event("install_failed", f"the factory model: {error}", code=code)
            return None
        if self._factory_told != model.label:
            self._factory_told = model.label
            slot = Slot(name="a", model=model.name, version=model.manifest.version)
            self.journal.event(
                "rolled_back", f"no slot can serve: {model.label} from the factory does", code="factory.served", release=slot
            )
        return model

    # --- what goes wrong

    def give_up(self, slot: Slot, error: EdgekitError) -> bool:
        """Take a slot out of service.

        Returns:
            Whether something else is there to be tried.
        """
        self._watch = None
        other = self.updater.give_up(slot, error, has_last_resort=bool(self.config.factory))
        if other is not None:
            self.ledger.forget()
        return other is not None or (active_slot(self.store.state) is None and bool(self.config.factory))

    def note_failure(self, failed: SelfTestFailed, now: float) -> None:
        """The model could not be started: give it up, or try it again later."""
        slot = active_slot(self.store.state)
        is_worth_another_try = (
            not failed.is_final and failed.error.code != DAMAGED and not self.ledger.is_looping
        ) or slot is None
        if is_worth_another_try or slot is None or not self.give_up(slot, failed.error):
            self.ledger.note(now)
            self.not_before = now + max(1.0, self.ledger.delay_s)

    def note_crash(self, ending: str, now: float) -> None:
        """The worker died at this model's work, or with nobody else to blame."""
        self.ledger.note(now)
        state = self.store.state
        slot = active_slot(state)
        label = f"{slot.model}@{slot.version}" if slot else "no model"
        self.journal.event("worker_crashed", f"{label}: {ending}", code="worker.crashed", release=slot)
        self.not_before = now + self.ledger.delay_s
        if slot is None:
            return
        if state.probation is not None:
            self.pause(now)
            trial = self.store.state.probation
            assert trial is not None
            self._save(msgspec.structs.replace(trial, crashes=trial.crashes + 1))
            self._judge(slot, ())
            if self.store.state.probation is None:
                self.not_before = 0.0
            return
        can_change = other_slot(state).status == "good" or self.config.factory
        if self.ledger.is_looping and can_change:
            error = EnvironmentFault("worker.crash_loop", f"{label}: the worker died again and again, last by {ending}.")
            if self.give_up(slot, error):
                self.not_before = 0.0

    # --- probation

    def begin_serving(self, model: Model, proof: Proof | None, page: Page | None, before: Sequence[float], now: float) -> None:
        """A worker with this model accepts from now on.

        Args:
            model: what it serves.
            proof: of its self-test.
            page: of the worker's board.
            before: the last latencies of the model before it.
            now: monotonic.
        """
        self.pause(now)
        is_other = self._last != (model.blob_dir, model.variant.model)
        self._last = (model.blob_dir, model.variant.model)
        self.served, self.proof, self.absence = model, proof, ""
        if is_other:
            self.ledger.forget()
        trial = self.store.state.probation
        if trial is not None and page is not None:
            if is_other and not trial.baseline_ms and not trial.inferences:
                trial = begin(trial, before)
            self._watch = _Watch(page, trial, now, now)

    def _now(self, now: float) -> Probation | None:
        """The probation with what this worker did."""
        watch = self._watch
        return add(watch.base, watch.page.tally, served_s=now - watch.since) if watch else self.store.state.probation

    def _fold(self, now: float) -> None:
        if (trial := self._now(now)) is not None:
            self._save(trial)

    def pause(self, now: float) -> None:
        """The worker is gone, or another one takes its place: what it did is kept."""
        self._fold(now)
        self._watch = None

    def _save(self, trial: Probation) -> None:
        def change(state: AgentState) -> AgentState:
            return msgspec.structs.replace(state, probation=trial) if state.probation is not None else state

        try:
            self.store.transform(change)
        except OSError as full:
            logger.error("event=state_not_saved error=%r", str(full))  # noqa: TRY400 - it says all

    def watch(self, now: float) -> bool:
        """Judge a probation on live traffic.

        Returns:
            Whether it ended.
        """
        slot, watch = active_slot(self.store.state), self._watch
        if self.store.state.probation is None or slot is None or watch is None:
            return False
        trial = self._now(now)
        assert trial is not None
        verdict = judge(trial, self.config.probation, recent_ms=watch.page.recent_ms)
        if verdict.kind == "wait":
            if now - watch.saved_at >= SAVE_SECONDS:
                watch.saved_at = now
                self._save(trial)
            return False
        self._save(trial)
        self._watch = None
        self._end(slot, verdict.kind == "commit", verdict.code, verdict.reason)
        return True

    def _judge(self, slot: Slot, recent: Sequence[float]) -> None:
        """Judge what the state says, without a worker."""
        trial = self.store.state.probation
        if trial is None:
            return
        verdict = judge(trial, self.config.probation, recent_ms=recent)
        if verdict.kind == "abort":
            self._end(slot, False, verdict.code, verdict.reason)  # noqa: FBT003 - not committed

    def _end(self, slot: Slot, is_committed: bool, code: str, reason: str) -> None:  # noqa: FBT001 - private
        if is_committed:
            self.updater.commit()
        else:
            self.give_up(slot, DeviceError(code, f"{slot.model}@{slot.version} {reason}."))

    def recover(self) -> None:
        """After the agent's start: what an interruption left; a device that boots for ever ends on the model before."""
        self._keep_minimum()
        self.updater.recover()
        if self.store.damage:
            where = active_slot(self.store.state)
            detail = f"{self.store.damage} The state was rebuilt from the slots."
            self.journal.event("install_failed", detail, code="state.rebuilt", release=where)
        if (slot := active_slot(self.store.state)) is not None:
            self._judge(slot, ())

    def _keep_minimum(self) -> None:
        """The floor that the device came with: it holds whatever became of the state."""
        least = self.config.minimum_release.get(self.config.model, 0)
        floors = self.store.state.floors
        if floors.releases.get(self.config.model, 0) < least:
            self.store.update(floors=msgspec.structs.replace(floors, releases=floors.releases | {self.config.model: least}))

    # --- recalls, and releases that are valid for a time

    def apply_ban(self, now: datetime) -> bool:
        """Take a model that may not serve any longer out of service, as its release or its recall says.

        Returns:
            Whether something else must serve now.
        """
        state = self.store.state
        slot = active_slot(state)
        ban = find_ban(state, slot, now) if slot is not None else None
        if slot is None or ban is None:
            return False
        kind: EventKind = "release_recalled" if ban.kind == "recalled" else "release_expired"
        if ban.fallback == "report":
            if (slot.manifest, ban.kind) not in self._told:
                self._told.add((slot.manifest, ban.kind))
                self.journal.event(kind, f"{ban.reason}; it goes on serving", code=ban.code, release=slot)
            return False
        other = other_slot(state)
        has_other = ban.fallback == "previous" and other.status == "good" and find_ban(state, other, now) is None
        error = TrustError(ban.code, ban.reason)

        def change(before: AgentState) -> AgentState:
            slots = {slot.name: msgspec.structs.replace(slot, status="bad")}
            if has_other:
                slots[other.name] = msgspec.structs.replace(other, status="active")
            return msgspec.structs.replace(
                before,
                slots=tuple(slots.get(each.name, each) for each in before.slots),
                active=other.name if has_other else None,
                refusals=refuse(before, new_refusal(slot, error)),
                probation=None,
                step="",
            )

        self.store.transform(change)
        self._watch = None
        self.absence = "" if has_other else ban.reason
        self.updater.last_error_code, self.updater.last_error = ban.code, ban.reason
        where = f"back to {other.model}@{other.version}" if has_other else "nothing serves"
        self.journal.event(kind, f"{ban.reason}; {where}", code=ban.code, release=slot)
        self.host.report()
        return True

    # --- what lies on the disk

    async def scrub(self) -> bool:
        """Hash the active and the good slot; a damaged one is given up, and fetched again.

        Returns:
            Whether something else must serve now.
        """
        changed = False
        for slot in self.store.state.slots:
            if slot.status not in {"active", "good"}:
                continue
            try:
                await in_background(functools.partial(self._model_of, slot), name="scrub")
            except EdgekitError as error:
                if error.code != DAMAGED:
                    continue
                if self.store.state.active == slot.name:
                    self.give_up(slot, error)
                    changed = True
                else:
                    self.store.update_slot(Slot(name=slot.name))
                    self.slots.clear(slot.name)
                    self.journal.event("install_failed", f"in reserve: {error.message}", code=error.code, release=slot)
        self.store.update(scrubbed_at=datetime.now(UTC))
        return changed
