"""One poll: refresh, plan, do the steps, tell how it went; and what becomes of a model on probation.

What fails for good is refused and remembered; everything else is tried again later. An outcome is written into the state
together with what it is the outcome of, and leaves it when its report is on the disk: a report that fails undoes nothing, and
none is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from edgekit.agent.background import in_background
from edgekit.agent.child import SelfTestFailed
from edgekit.agent.config import AgentConfig
from edgekit.agent.disk import FULL, disk_full
from edgekit.agent.faults import checkpoint
from edgekit.agent.inbox import Answer, Request, new_answer
from edgekit.agent.journal import Journal
from edgekit.agent.link import Model
from edgekit.agent.plan import (
    DeviceFacts,
    Plan,
    active_slot,
    backoff_s,
    interrupted,
    make_plan,
    new_outcome,
    next_poll_s,
    other_slot,
    refuse,
    slot_of,
)
from edgekit.agent.probation import describe
from edgekit.agent.slots import SlotStore
from edgekit.agent.source import RepositorySource
from edgekit.agent.state_store import StateStore
from edgekit.agent.steps import Contents, Installer, ReleaseRefused, Source, commit, settle_trials
from edgekit.agent.stick import StickSource
from edgekit.agent.vitals import disk_free_bytes
from edgekit.errors import DeviceError, EdgekitError, RepositoryError, TrustError
from edgekit.schema.desired import UpdatePolicy
from edgekit.schema.message import EventKind
from edgekit.schema.release import Recall, Release
from edgekit.schema.state import AgentState, Floors, Outcome, Refusal, Slot

if TYPE_CHECKING:
    from edgekit.trust.repository_client import RefreshResult

logger = logging.getLogger(__name__)

RETRY_BASE_S = 2.0
RETRY_CAP_S = 900.0
TIME_FLOOR_S = 3600.0
SHORTEST_POLL_S = 0.05
PROBATION_WAIT_S = 180.0
PROBATION_STEP_S = 0.1


class Proven(Protocol):
    """A model that passed its self-test and waits in its worker."""

    def serve(self) -> None:
        """Let it serve, instead of what serves now."""

    def discard(self) -> None:
        """End its worker, if it does not serve."""


class Server(Protocol):
    """What the updater needs of the serving side."""

    async def prove(self, model: Model) -> Proven:
        """Start a worker on a model and let it prove itself.

        Raises:
            SelfTestFailed: when it did not.
        """


class Chooser(Protocol):
    """Who decides which release a device should run: the fleet's desired state, or else nobody but the channel."""

    def choose(self, model: str, releases: Sequence[Release]) -> Choice | None:
        """What may be installed now; None leaves it to the channel."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The releases to choose from, whatever their channel, and how they may be fetched."""

    releases: tuple[Release, ...]
    policy: UpdatePolicy | None = None
    wait_s: float = 0.0
    """Until the policy allows it; 0: nothing to wait for."""


@dataclass
class _Deferral:
    """A release whose installation failed, and when it may be tried again (monotonic)."""

    failures: int
    until: float
    code: str


@dataclass
class Updater:
    """Polls and installs. ``report`` sends the device's state after each outcome."""

    config: AgentConfig
    store: StateStore
    slots: SlotStore
    journal: Journal
    root: bytes
    server: Server
    ask_facts: Callable[[], Awaitable[DeviceFacts]]
    report: Callable[[], None]
    halt: threading.Event = field(default_factory=threading.Event)
    last_refresh_at: datetime | None = None
    offered: tuple[Release, ...] = ()
    """Of the last refresh."""
    last_error: str = ""
    last_error_code: str = ""
    failures: int = 0
    chooser: Chooser | None = None
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Shared by the updaters of an agent: one update at a time."""
    is_paused: bool = False
    superseded: threading.Event = field(default_factory=threading.Event)
    """Set when something else is desired while an installation is under way: it ends at the next step or chunk."""
    _deferred: dict[str, _Deferral] = field(default_factory=dict)
    _announced: set[str] = field(default_factory=set)

    def recover(self) -> None:
        """Tidy up after an interruption: no half-built slot, and no release that kills the device for ever."""
        settle_trials(self.store, self.slots)
        self._count_interruption()
        state = self.store.state
        other = other_slot(state)
        if other.status == "staging":
            self.store.update_slot(Slot(name=other.name))
            self.slots.clear(other.name)
        if state.phase != "idle":
            logger.warning("event=recovered phase=%s intent=%s", state.phase, state.intent)
            attempts = state.attempts if state.phase == "selftest" else 0
            self.store.update(phase="idle", intent="", attempts=attempts, step="")
        if (trial := state.probation) is not None:
            self.store.update(probation=msgspec.structs.replace(trial, starts=trial.starts + 1), step="probation")
        self.tell()

    def _count_interruption(self) -> None:
        """A release that the device keeps dying of is refused, wherever it does."""
        state = self.store.state
        attempt, active = state.attempt, active_slot(state)
        if attempt is None:
            return
        if active is not None and active.manifest == attempt.manifest:
            self.store.update(attempt=None)
            return
        parts = self.config.state_path / "parts"
        size = sum(path.stat().st_size for path in parts.iterdir()) if parts.is_dir() else 0
        changed, reason = interrupted(attempt, size)
        if changed is not None:
            self.store.update(attempt=changed)
            return
        model, _, rest = state.intent.partition("@")
        version, _, counter = rest.rpartition("#")
        slot = Slot(
            name=other_slot(state).name,
            model=model or self.config.model,
            version=version,
            counter=int(counter) if counter.isdecimal() else 0,
            manifest=attempt.manifest,
        )
        self._keep_refusal(slot, "install.interrupted", reason)
        self.store.update_slot(Slot(name=slot.name))
        self.slots.clear(slot.name)

    def rest(self) -> None:
        """The agent ends cleanly: what is under way was not interrupted by its own doing."""
        trial = self.store.state.probation
        kept = msgspec.structs.replace(trial, starts=0) if trial else None
        self.store.update(attempt=None, probation=kept, attempts=0, phase="idle", intent="")

    def _keep_refusal(self, slot: Slot, code: str, reason: str) -> None:
        """Remember a refusal and that it is to be told, in one write."""
        assert slot.manifest is not None
        refusal = Refusal(
            model=slot.model,
            version=slot.version,
            counter=slot.counter,
            manifest=slot.manifest,
            code=code,
            reason=reason,
            at=datetime.now(UTC),
        )
        outcome = _outcome("install_refused", slot, code, reason)

        def change(state: AgentState) -> AgentState:
            return msgspec.structs.replace(
                state,
                refusals=refuse(state, refusal),
                outcomes=new_outcome(state, outcome),
                attempt=None,
                phase="report",
            )

        self.store.transform(change)

    def tell(self) -> None:
        """Report the outcomes that wait for it. What cannot be stored now is told again later; nothing is undone by that."""
        for outcome in self.store.state.outcomes:
            slot = Slot(name="a", model=outcome.model, version=outcome.version, counter=outcome.counter)
            fields = {**outcome.fields, "outcome": outcome.id}
            try:
                self.journal.event(outcome.kind, outcome.detail, code=outcome.code, release=slot, fields=fields)
                checkpoint("telling")
                left = tuple(each for each in self.store.state.outcomes if each.id != outcome.id)
                self.store.update(outcomes=left)
            except Exception:
                logger.exception("event=report_failed outcome=%s", outcome.id)
                return

    def report_safely(self) -> None:
        """Tell the whole state; a failure is logged and undoes nothing."""
        try:
            self.report()
        except Exception:
            logger.exception("event=report_failed")

    # --- probation

    def commit(self) -> None:
        """The model on probation stays: its floor is raised, and it is told."""
        state = self.store.state
        slot, trial = active_slot(state), state.probation
        if slot is None or trial is None:
            return
        where = f"{slot.model}@{slot.version} passed its probation"
        commit(self.store, self.slots, _outcome("committed", slot, "", where, fields=describe(trial)))
        self.tell()
        self.report_safely()

    async def probation_over(self, seconds: float) -> bool:
        """Wait until no model is on probation: what it would go back to must stay where it is; False when it took longer."""
        deadline = time.monotonic() + seconds
        while self.store.state.probation is not None:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(PROBATION_STEP_S)
        return True

    def give_up(self, slot: Slot, error: EdgekitError, *, has_last_resort: bool = False) -> Slot | None:
        """Take the active slot out of service for the other good one, in one write.

        A damaged slot is emptied even when there is no other: the release is fetched again. Another one is refused from now
        on, and kept where nothing could take its place; ``has_last_resort``: something outside the slots can.

        Returns:
            The slot that serves from now on; None when there is none.
        """
        is_damaged = error.code == "slot.damaged"
        found: list[Slot | None] = []
        checkpoint("rolling_back")

        def change(state: AgentState) -> AgentState:
            found.clear()
            if state.active != slot.name:
                found.append(active_slot(state))
                return state
            other = other_slot(state)
            is_good, is_trial = other.status == "good", state.probation is not None
            found.append(msgspec.structs.replace(other, status="active") if is_good else None)
            if not (is_good or is_damaged or is_trial or has_last_resort):
                return state
            slots = {slot.name: Slot(name=slot.name) if is_damaged else msgspec.structs.replace(slot, status="bad")}
            if is_good:
                slots[other.name] = msgspec.structs.replace(other, status="active")
            where = f"back to {other.model}@{other.version}" if is_good else "there is no other good slot"
            fields = describe(state.probation) if state.probation else {}
            outcome = _outcome("rolled_back", slot, error.code, f"{error.message} {where}", fields=fields)
            changed = msgspec.structs.replace(
                state,
                slots=tuple(slots.get(each.name, each) for each in state.slots),
                active=other.name if is_good else None,
                probation=None,
                step="",
                outcomes=new_outcome(state, outcome),
            )
            return changed if is_damaged else msgspec.structs.replace(changed, refusals=refuse(state, new_refusal(slot, error)))

        before = self.store.state
        after = self.store.transform(change)
        checkpoint("rolled_back")
        if is_damaged and after is not before:
            self.slots.clear(slot.name)
        self._note_error(error.code, error.message)
        if after is before:
            self.journal.event("worker_crashed", f"{error.message} there is no other good slot", code=error.code, release=slot)
        self.tell()
        self.report_safely()
        return found[0]

    async def install_stick(self, request: Request) -> Answer:
        """Verify a stick and install the newest release on it that this device may have.

        Returns:
            What became of it; it never raises for what is on the stick.
        """
        if not await self.probation_over(PROBATION_WAIT_S):
            trial = self.store.state.probation
            text = f"release {trial.counter if trial else 0} of {self.config.model} is on probation; ask again when it is over"
            return new_answer(request, text, code="install.on_probation")
        async with self.busy:
            try:
                source = StickSource(
                    Path(request.stick), root=self.root, floors=self.store.state.floors, model=self.config.model
                )
                found = await in_background(source.refresh, name="stick")
                self._raise_floors(found.floors)
                self._keep_recalls(found.recalls)
                plan = make_plan(self.store.state, found.releases, model=self.config.model, channel=self.config.channel)
                if plan is None:
                    return new_answer(request, _why_not(self.store.state, found.releases, self.config))
                await self._install(plan, source, self.config)
            except (EdgekitError, OSError) as failure:
                error = failure if isinstance(failure, EdgekitError) else self._disk_error(failure, 0)
                self.journal.event("install_refused", f"stick {request.stick}: {error.message}", code=error.code)
                return new_answer(request, error.message, code=error.code)
            code, text = self._became_of(plan)
            return new_answer(request, text, code=code)

    async def carry_out(self, plan: Plan, source: Source) -> tuple[str, str]:
        """Install what somebody at the device chose; the caller holds ``busy``.

        Returns:
            An error's code, empty when it serves, and what became of it.
        """
        await self._install(plan, source, self.config)
        return self._became_of(plan)

    def _became_of(self, plan: Plan) -> tuple[str, str]:
        active, wanted = active_slot(self.store.state), plan.release.manifest_digest
        if active and active.manifest == wanted:
            return "", f"{plan.intent} serves from slot {active.name}, variant {active.variant}"
        return self.last_error_code or "install.failed", self.last_error

    async def look(self) -> tuple[Release, ...]:
        """What the repository's verified metadata lists: from a refresh of now, else as it was seen last."""
        if self.config.repository:
            with contextlib.suppress(EdgekitError, OSError):
                async with self.busy:
                    await self._refresh()
        return self.offered

    async def poll(self) -> float:
        """One round.

        Returns:
            Seconds until the next.
        """
        async with self.busy:
            self.superseded.clear()
            return await self._poll()

    async def _poll(self) -> float:
        try:
            source, releases = await self._refresh()
        except (EdgekitError, OSError) as failure:
            error = failure if isinstance(failure, EdgekitError) else self._disk_error(failure, 0)
            self._note_unreachable(error)
            cap = max(self.config.poll_s, min(60 * self.config.poll_s, RETRY_CAP_S))
            return self.config.poll_s + backoff_s(self.failures, base_s=self.config.poll_s, cap_s=cap, draw=random.random)
        self.tell()
        if self.failures:
            logger.info("event=repository_reachable failures=%d", self.failures)
            self.failures = 0
            self._note_error("", "")
            self.report()
        now = time.monotonic()
        waiting = {digest for digest, deferral in self._deferred.items() if deferral.until > now}
        config, channel, retries = self.config, self.config.channel, self._retries_at(releases)
        choice = self.chooser.choose(config.model, releases) if self.chooser else None
        if choice is not None:
            releases, config, channel = choice.releases, _restricted(config, choice.policy), ""
            retries += [now + choice.wait_s] if choice.wait_s else []
        plan = make_plan(self.store.state, releases, model=config.model, channel=channel, deferred=waiting)
        if plan is not None and not self.is_paused:
            await self._install(plan, source, config)
            retries += self._retries_at(releases)
        elif self.store.state.phase != "idle":
            self.store.update(phase="idle", intent="", attempts=0)
        return max(SHORTEST_POLL_S, next_poll_s(config.poll_s, retries, now=time.monotonic()))

    def _retries_at(self, releases: Sequence[Release]) -> list[float]:
        """When failed releases may be tried again; what is not offered any more is forgotten."""
        offered = {release.manifest_digest for release in releases}
        self._deferred = {digest: deferral for digest, deferral in self._deferred.items() if digest in offered}
        return [deferral.until for deferral in self._deferred.values()]

    async def _refresh(self) -> tuple[RepositorySource, tuple[Release, ...]]:
        def work() -> tuple[RepositorySource, RefreshResult]:
            source = RepositorySource(self.config, self.root, self.store.state.floors, self.halt, self.superseded)
            return source, source.refresh()

        source, result = await in_background(work, name="refresh")
        releases, floors, recalls = result.releases, result.floors, result.recalls
        self.last_refresh_at, self.offered = datetime.now(UTC), releases
        self._raise_floors(floors)
        self._keep_recalls(recalls)
        return source, releases

    def _keep_recalls(self, recalls: tuple[Recall, ...]) -> None:
        """The deny-list works offline, too."""
        if recalls != self.store.state.recalls:
            self.store.update(recalls=recalls)

    def _raise_floors(self, floors: Floors) -> None:
        """Keep the new floors; the time alone is written at most once an hour, for the flash memory's sake."""
        old = self.store.state.floors
        new = msgspec.structs.replace(floors, releases=old.releases)
        is_time_only = msgspec.structs.replace(new, time=old.time) == old
        if is_time_only and old.time and new.time and (new.time - old.time).total_seconds() < TIME_FLOOR_S:
            return
        self.store.update(floors=new)

    def _note_unreachable(self, error: EdgekitError) -> None:
        self.failures += 1
        is_news = self.failures == 1 or error.code != self.last_error_code
        self._note_error(error.code, error.message)
        if is_news:
            is_ours = isinstance(error, DeviceError)
            self.journal.event("install_failed" if is_ours else "repository_unreachable", error=error)
            self.report()

    def _note_error(self, code: str, message: str) -> None:
        self.last_error_code, self.last_error = code, message

    async def _install(self, plan: Plan, source: Source, config: AgentConfig) -> None:
        info = plan.release.info
        if plan.release.manifest_digest not in self._announced:
            self._announced.add(plan.release.manifest_digest)
            self.journal.event("release_found", release=info)
            self.journal.event("install_started", f"into slot {plan.slot}", release=info)
        try:
            await self._try(plan, source, config)
        except EdgekitError as error:
            if error.code == "install.superseded" and self.superseded.is_set():
                self._give_way(plan)
            elif error.code != "agent.stopping":
                self._fail(plan, error)
        except OSError as error:
            self._fail(plan, self._disk_error(error, info.installed_bytes))

    async def _try(self, plan: Plan, source: Source, config: AgentConfig) -> None:
        installer = Installer(config, self.store, self.slots, await self.ask_facts())
        try:
            await self._do(plan, installer, source)
        except ReleaseRefused as refused:
            self._refuse(plan, refused)

    def _disk_error(self, error: OSError, needed: int) -> DeviceError:
        """What the disk said, as ours."""
        if error.errno in FULL:
            return disk_full(self.config.state_path, needed, disk_free_bytes(self.config.state_path))
        return DeviceError("device.disk_error", f"{self.config.state_dir}: {error}.", hint="Check the disk.")

    async def _do(self, plan: Plan, installer: Installer, source: Source) -> None:
        with contextlib.ExitStack() as stack:
            await self._steps(plan, installer, source, stack)

    async def _steps(self, plan: Plan, installer: Installer, source: Source, stack: contextlib.ExitStack) -> None:
        contents: Contents | None = None
        proven: Proven | None = None
        started = time.monotonic()
        for step in plan.steps:
            if self.superseded.is_set() and step != "report":  # what serves already is reported
                raise DeviceError("install.superseded", f"{plan.intent}: something newer is desired.")
            installer.enter(step, plan)
            match step:
                case "fetch":
                    contents = await in_background(lambda: installer.fetch(plan, source), name="fetch")
                    for error in installer.failed_deltas:
                        self.journal.event("delta_failed", error.message, code=error.code, release=plan.release.info)
                case "stage":
                    ready = _known(contents)
                    await in_background(lambda c=ready: installer.stage(plan, c), name="stage")  # type: ignore[misc]
                case "verify":
                    ready = contents or installer.contents_of(slot_of(self.store.state, plan.slot))
                    await in_background(lambda c=ready: installer.verify(plan, c), name="verify")  # type: ignore[misc]
                case "selftest":
                    proven = await self._self_test(plan, installer)
                    stack.callback(proven.discard)
                case "switch":
                    installer.switch(plan)
                    if proven is not None:
                        proven.serve()
                case "report":
                    self._succeed(plan, installer, time.monotonic() - started)
                case "idle":
                    pass

    async def _self_test(self, plan: Plan, installer: Installer) -> Proven:
        slot = slot_of(self.store.state, plan.slot)
        model = await in_background(lambda: installer.model_of(slot), name="hash")
        try:
            proven = await self.server.prove(model)
        except SelfTestFailed as failed:
            if failed.is_final:
                raise ReleaseRefused(failed.error.code, failed.error.message) from failed
            raise failed.error from failed
        checkpoint("tested")
        return proven

    def _succeed(self, plan: Plan, installer: Installer, seconds: float) -> None:
        self._deferred.pop(plan.release.manifest_digest, None)
        self._note_error("", "")
        installer.settle()
        trial = self.store.state.probation
        fields: dict[str, str | int | float | bool] = {
            "seconds": round(seconds, 3),
            "slot": plan.slot,
            "variant": slot_of(self.store.state, plan.slot).variant,
        }
        if installer.delta_saved_bytes:
            fields["delta_saved_bytes"] = installer.delta_saved_bytes
        if trial is not None:
            self.store.update(step="probation")
        try:
            self.journal.event("install_finished", f"slot {plan.slot} serves", release=plan.release.info, fields=fields)
            if trial is not None:
                self.journal.event("probation_started", "on live traffic", release=plan.release.info)
        except Exception:
            logger.exception("event=report_failed")
        self.report_safely()
        checkpoint("reported")

    def _refuse(self, plan: Plan, refused: ReleaseRefused) -> None:
        info = plan.release.info
        slot = Slot(
            name=plan.slot, model=info.name, version=info.version, counter=info.counter, manifest=plan.release.manifest_digest
        )
        self._keep_refusal(slot, refused.code, refused.reason)
        checkpoint("refused")
        self._deferred.pop(plan.release.manifest_digest, None)
        self._note_error(refused.code, refused.reason)
        self._free(plan)
        self.store.update(phase="idle", intent="", attempts=0, step="")
        self.tell()
        self.report_safely()

    def _free(self, plan: Plan) -> None:
        slot = slot_of(self.store.state, plan.slot)
        if slot.status in {"staging", "verified"} and plan.slot != self.store.state.active:
            self.store.update_slot(Slot(name=plan.slot))
            self.slots.clear(plan.slot)

    def _give_way(self, plan: Plan) -> None:
        """Something else is desired: nothing half-done stays."""
        logger.info("event=install_superseded release=%s", plan.intent)
        self._free(plan)
        self.store.update(phase="idle", intent="", attempts=0, step="", attempt=None)

    def _fail(self, plan: Plan, error: EdgekitError) -> None:
        """Try again later; the fleet hears of it once for each new reason."""
        digest = plan.release.manifest_digest
        code, message = error.code, error.message
        before = self._deferred.get(digest)
        failures = before.failures + 1 if before else 1
        base = RETRY_BASE_S if not isinstance(error, RepositoryError | TrustError) else max(RETRY_BASE_S, self.config.poll_s)
        wait = base / 2 + backoff_s(failures, base_s=base, cap_s=RETRY_CAP_S, draw=random.random)
        self._deferred[digest] = _Deferral(failures, time.monotonic() + wait, code)
        self._note_error(code, message)
        try:
            self.store.update(phase="idle", intent="", attempts=0, step="", attempt=None)
        except OSError as full:
            logger.error("event=state_not_saved error=%r", str(full))  # noqa: TRY400 - it says all
        if before is None or before.code != code:
            kind: EventKind = "precheck_failed" if code.startswith("precheck.") else "install_failed"
            self.journal.event(kind, message, code=code, release=plan.release.info)
            self.report_safely()


def _restricted(config: AgentConfig, policy: UpdatePolicy | None) -> AgentConfig:
    """The configuration under a policy, which can only forbid more."""
    if policy is None or not policy.is_metered:
        return config
    is_full = policy.is_full_allowed and (config.metered_full or not config.metered)
    return msgspec.structs.replace(config, metered=True, metered_full=is_full)


def _outcome(
    kind: Literal["committed", "rolled_back", "install_refused"],
    slot: Slot,
    code: str,
    detail: str,
    *,
    fields: dict[str, str | int | float | bool] | None = None,
) -> Outcome:
    return Outcome(
        id=secrets.token_hex(6),
        kind=kind,
        model=slot.model,
        version=slot.version,
        counter=slot.counter,
        detail=detail,
        code=code,
        fields=fields or {},
    )


def new_refusal(slot: Slot, error: EdgekitError) -> Refusal:
    """The record that a slot's release is not to be installed again."""
    assert slot.manifest is not None
    return Refusal(
        model=slot.model,
        version=slot.version,
        counter=slot.counter,
        manifest=slot.manifest,
        code=error.code,
        reason=error.message,
        at=datetime.now(UTC),
    )


def _known(contents: Contents | None) -> Contents:
    assert contents is not None, "stage follows fetch"
    return contents


def _why_not(state: AgentState, releases: Sequence[Release], config: AgentConfig) -> str:
    """Why nothing on a stick is installed."""
    mine = [
        release.info for release in releases if release.info.name == config.model and release.info.channel == config.channel
    ]
    if not mine:
        return f"no release of {config.model} on {config.channel} is on the stick"
    newest = max(mine, key=lambda info: info.counter)
    active = active_slot(state)
    if active and active.model == config.model and active.counter >= newest.counter:
        return f"{newest.name}@{newest.version} is on the stick; {active.model}@{active.version} serves, which is not older"
    return f"{newest.name}@{newest.version} is on the stick; this device refused it before, or may not go back to it"
