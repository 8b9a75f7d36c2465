"""One poll: refresh, plan, do the steps, tell how it went.

What fails for good is refused and remembered; everything else is tried again later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec

from edgekit.agent.background import in_background
from edgekit.agent.child import SelfTestFailed
from edgekit.agent.config import AgentConfig
from edgekit.agent.disk import FULL, disk_full
from edgekit.agent.faults import checkpoint
from edgekit.agent.inbox import InstallAnswer, InstallRequest, new_answer
from edgekit.agent.journal import Journal
from edgekit.agent.link import Model
from edgekit.agent.plan import (
    MAX_ATTEMPTS,
    DeviceFacts,
    Plan,
    active_slot,
    backoff_s,
    make_plan,
    next_poll_s,
    other_slot,
    refuse,
    slot_of,
)
from edgekit.agent.slots import SlotStore
from edgekit.agent.source import RepositorySource
from edgekit.agent.state_store import StateStore
from edgekit.agent.steps import Contents, Installer, ReleaseRefused, Source
from edgekit.agent.stick import StickSource
from edgekit.agent.vitals import disk_free_bytes
from edgekit.errors import DeviceError, EdgekitError, RepositoryError, TrustError
from edgekit.schema.release import Recall, Release
from edgekit.schema.state import AgentState, Floors, Refusal, Slot
from edgekit.trust.repository_client import RefreshResult

logger = logging.getLogger(__name__)

RETRY_BASE_S = 2.0
RETRY_CAP_S = 900.0
TIME_FLOOR_S = 3600.0
SHORTEST_POLL_S = 0.05


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
    last_error: str = ""
    last_error_code: str = ""
    failures: int = 0
    _deferred: dict[str, _Deferral] = field(default_factory=dict)
    _announced: set[str] = field(default_factory=set)
    _busy: asyncio.Lock = field(default_factory=asyncio.Lock)

    def recover(self) -> None:
        """Tidy up after an interruption: no half-built slot, and no release that kills the device for ever."""
        state = self.store.state
        other = other_slot(state)
        if state.phase == "selftest" and state.attempts >= MAX_ATTEMPTS and other.manifest and other.status == "verified":
            reason = f"the device died {state.attempts} times in its self-test"
            self._refuse_slot(other, "install.interrupted", reason)
        if other.status == "staging":
            self.store.update_slot(Slot(name=other.name))
            self.slots.clear(other.name)
        if state.phase != "idle":
            logger.warning("event=recovered phase=%s intent=%s", state.phase, state.intent)
            attempts = state.attempts if state.phase == "selftest" else 0
            self.store.update(phase="idle", intent="", attempts=attempts)

    def _refuse_slot(self, slot: Slot, code: str, reason: str) -> None:
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
        self.store.update(refusals=refuse(self.store.state, refusal))
        self.journal.event("install_refused", reason, code=code, release=slot)
        self.store.update_slot(Slot(name=slot.name))
        self.slots.clear(slot.name)

    async def install_stick(self, request: InstallRequest) -> InstallAnswer:
        """Verify a stick and install the newest release on it that this device may have.

        Returns:
            What became of it; it never raises for what is on the stick.
        """
        async with self._busy:
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
                await self._install(plan, source)
            except (EdgekitError, OSError) as failure:
                error = failure if isinstance(failure, EdgekitError) else self._disk_error(failure, 0)
                self.journal.event("install_refused", f"stick {request.stick}: {error.message}", code=error.code)
                return new_answer(request, error.message, code=error.code)
            active, wanted = active_slot(self.store.state), plan.release.manifest_digest
            if active and active.manifest == wanted:
                return new_answer(request, f"{plan.intent} serves from slot {active.name}, variant {active.variant}")
            return new_answer(request, self.last_error, code=self.last_error_code or "install.failed")

    async def poll(self) -> float:
        """One round.

        Returns:
            Seconds until the next.
        """
        async with self._busy:
            return await self._poll()

    async def _poll(self) -> float:
        try:
            source, releases = await self._refresh()
        except (EdgekitError, OSError) as failure:
            error = failure if isinstance(failure, EdgekitError) else self._disk_error(failure, 0)
            self._note_unreachable(error)
            cap = max(self.config.poll_s, min(60 * self.config.poll_s, RETRY_CAP_S))
            return self.config.poll_s + backoff_s(self.failures, base_s=self.config.poll_s, cap_s=cap, draw=random.random)
        if self.failures:
            logger.info("event=repository_reachable failures=%d", self.failures)
            self.failures = 0
            self._note_error("", "")
            self.report()
        now = time.monotonic()
        waiting = {digest for digest, deferral in self._deferred.items() if deferral.until > now}
        config = self.config
        plan = make_plan(self.store.state, releases, model=config.model, channel=config.channel, deferred=waiting)
        if plan is not None:
            await self._install(plan, source)
        elif self.store.state.phase != "idle":
            self.store.update(phase="idle", intent="", attempts=0)
        return max(SHORTEST_POLL_S, next_poll_s(config.poll_s, self._retries_at(releases), now=time.monotonic()))

    def _retries_at(self, releases: Sequence[Release]) -> list[float]:
        """When failed releases may be tried again; what is not offered any more is forgotten."""
        offered = {release.manifest_digest for release in releases}
        self._deferred = {digest: deferral for digest, deferral in self._deferred.items() if digest in offered}
        return [deferral.until for deferral in self._deferred.values()]

    async def _refresh(self) -> tuple[RepositorySource, tuple[Release, ...]]:
        def work() -> tuple[RepositorySource, RefreshResult]:
            source = RepositorySource(self.config, self.root, self.store.state.floors, self.halt)
            return source, source.refresh()

        source, result = await in_background(work, name="refresh")
        releases, floors, recalls = result.releases, result.floors, result.recalls
        self.last_refresh_at = datetime.now(UTC)
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

    async def _install(self, plan: Plan, source: Source) -> None:
        info = plan.release.info
        if plan.release.manifest_digest not in self._announced:
            self._announced.add(plan.release.manifest_digest)
            self.journal.event("release_found", release=info)
            self.journal.event("install_started", f"into slot {plan.slot}", release=info)
        try:
            await self._try(plan, source)
        except EdgekitError as error:
            if error.code != "agent.stopping":
                self._fail(plan, error)
        except OSError as error:
            self._fail(plan, self._disk_error(error, info.installed_bytes))

    async def _try(self, plan: Plan, source: Source) -> None:
        installer = Installer(self.config, self.store, self.slots, await self.ask_facts())
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
        fields: dict[str, str | int | float | bool] = {
            "seconds": round(seconds, 3),
            "slot": plan.slot,
            "variant": slot_of(self.store.state, plan.slot).variant,
        }
        if installer.delta_saved_bytes:
            fields["delta_saved_bytes"] = installer.delta_saved_bytes
        self.journal.event("install_finished", f"slot {plan.slot} serves", release=plan.release.info, fields=fields)
        self.report()
        checkpoint("reported")

    def _refuse(self, plan: Plan, refused: ReleaseRefused) -> None:
        info = plan.release.info
        refusal = Refusal(
            model=info.name,
            version=info.version,
            counter=info.counter,
            manifest=plan.release.manifest_digest,
            code=refused.code,
            reason=refused.reason,
            at=datetime.now(UTC),
        )
        self.store.update(phase="report", refusals=refuse(self.store.state, refusal))
        checkpoint("refused")
        self._deferred.pop(plan.release.manifest_digest, None)
        self._note_error(refused.code, refused.reason)
        self._free(plan)
        self.store.update(phase="idle", intent="", attempts=0)
        self.journal.event("install_refused", refused.reason, code=refused.code, release=info)
        self.report()

    def _free(self, plan: Plan) -> None:
        slot = slot_of(self.store.state, plan.slot)
        if slot.status in {"staging", "verified"} and plan.slot != self.store.state.active:
            self.store.update_slot(Slot(name=plan.slot))
            self.slots.clear(plan.slot)

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
            self.store.update(phase="idle", intent="", attempts=0)
        except OSError as full:
            logger.error("event=state_not_saved error=%r", str(full))  # noqa: TRY400 - it says all
        if before is None or before.code != code:
            self.journal.event("install_failed", message, code=code, release=plan.release.info)
            self.report()


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
