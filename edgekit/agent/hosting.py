"""Which worker serves what: one worker process has all the models, and a change of one starts the next worker.

    settle      serve what the units want now, whatever happened
    prove       let a candidate prove itself in a process of its own, under limits, and beside the model that serves

A model that fails is left out of the set, and tried again later; the others go on. What one worker's death means is decided
here: the board says whose work it was.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgekit.agent.child import SelfTestFailed, WorkerProcess
from edgekit.agent.config import AgentConfig
from edgekit.agent.faults import checkpoint
from edgekit.agent.health import CrashLedger
from edgekit.agent.journal import Journal
from edgekit.agent.limits import Budget, make_budget, needed_ram_mb
from edgekit.agent.link import Model, Proof, Ready
from edgekit.agent.plan import DeviceFacts, active_slot
from edgekit.agent.shadow import judge, watch_candidate
from edgekit.agent.units import Unit
from edgekit.agent.vitals import MEGA, memory_free_bytes
from edgekit.agent.workers import Workers
from edgekit.errors import DeviceError

logger = logging.getLogger(__name__)

MAX_ROUNDS = 16
"""Every round of settling gives something up or leaves something out; more would be a bug."""
WAITING = "its worker died or could not be started; it is tried again in a moment"
NOT_INSTALLED = "no model is installed yet"


@dataclass
class ProvenWorker:
    """A worker whose model passed its self-test: it serves, or it is given up; nothing is left behind."""

    worker: WorkerProcess
    workers: Workers
    on_serve: Callable[[], None]

    def serve(self) -> None:
        """Let it serve, instead of the one that does."""
        self.on_serve()

    def discard(self) -> None:
        """End it, unless it serves."""
        if self.worker is not self.workers.current and self.worker.is_running:
            self.workers.retire(self.worker)


@dataclass
class Hosting:
    """The units' models in workers."""

    config: AgentConfig
    units: Sequence[Unit]
    workers: Workers
    journal: Journal
    facts: Callable[[], DeviceFacts]
    spawn: Callable[[Coroutine[Any, Any, None]], None]
    later: Callable[[float], Coroutine[Any, Any, None]]
    """Settles after some seconds, and goes on trying."""
    ledger: CrashLedger = field(default_factory=CrashLedger)
    """Of crashes that are no model's fault."""
    crashes: int = 0
    runtime: tuple[str, str] = ("", "")
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def unit_of(self, name: str) -> Unit | None:
        """A model's unit; the only one where nobody says which."""
        if not name and len(self.units) == 1:
            return self.units[0]
        return next((unit for unit in self.units if unit.name == name), None)

    # --- serving

    async def settle(self) -> None:
        """Serve what the units want now.

        Raises:
            SelfTestFailed: not even a worker without a model comes up.
            OSError: this machine cannot start a process now.
        """
        async with self._lock:
            for _ in range(MAX_ROUNDS):
                if await self._settle_once():
                    return
            raise DeviceError("agent.unsettled", "the agent could not decide what to serve.")

    async def _settle_once(self) -> bool:
        models = {unit.config.model: model for unit in self.units if (model := await unit.wanted()) is not None}
        absence, absences = self._absences(models)
        if self._is_served(tuple(models.values()), absence, absences):
            return True
        worker = await self.workers.start(tuple(models.values()), absence=absence, absences=absences)
        try:
            ready = await worker.wait_ready(self.config.selftest_timeout_s * max(1, len(models)))
        except SelfTestFailed as failed:
            unit = self.unit_of(failed.model) if models else None
            if unit is None:
                raise
            unit.note_failure(failed, time.monotonic())
            if (wait := unit.not_before - time.monotonic()) > 0:
                self.spawn(self.later(wait))
            return False
        if any(not self._is_still_wanted(unit, models.get(unit.config.model)) for unit in self.units):
            self.workers.retire(worker)
            return False
        self._switch(worker, ready)
        return True

    def _absences(self, models: dict[str, Model]) -> tuple[str, dict[str, str]]:
        """Why there is no model at all, and why single ones are missing beside others."""
        if not models:
            return next((unit.absence for unit in self.units if unit.absence), ""), {}
        now = time.monotonic()
        missing = [unit for unit in self.units if unit.config.model not in models]
        return "", {
            unit.config.model: unit.absence or (WAITING if now < unit.not_before else NOT_INSTALLED) for unit in missing
        }

    def _is_served(self, models: Sequence[Model], absence: str, absences: dict[str, str]) -> bool:
        """Whether the worker that serves has just that."""
        current = self.workers.current
        if current is None or not current.is_running:
            return False
        start = current.start
        same = [_identity(model) for model in start.models] == [_identity(model) for model in models]
        return same and (start.absence, start.absences) == (absence, absences)

    @staticmethod
    def _is_still_wanted(unit: Unit, model: Model | None) -> bool:
        """Whether what was loaded is what the state says now; it may have changed meanwhile."""
        slot = active_slot(unit.store.state)
        if model is None:
            return slot is None or time.monotonic() < unit.not_before or bool(unit.absence)
        if slot is None:
            return model.blob_dir.endswith("factory")
        return model.variant.model == slot.model_digest and model.blob_dir == str(unit.slots.blob_dir(slot.name))

    def _switch(self, worker: WorkerProcess, ready: Ready) -> None:
        """The worker accepts from now on, and the one before it drains."""
        before, now = self.workers.current, time.monotonic()
        proofs = {proof.model: proof for proof in ready.proofs}
        self.workers.switch(worker)
        for unit in self.units:
            model = next((each for each in worker.start.models if each.name == unit.config.model), None)
            if model is None and len(self.units) == 1 and worker.start.models:
                model = worker.start.models[0]  # an agent that was told no model's name serves what its slot holds
            if model is None:
                unit.pause(now)
                unit.served = unit.proof = None
                continue
            page = before.page(model.name) if before is not None else None
            recent = page.recent_ms if page is not None else ()
            unit.begin_serving(model, proofs.get(model.name), worker.page(model.name), recent, now)
        if ready.proofs:
            self.runtime = (ready.proofs[0].runtime, ready.proofs[0].runtime_version)

    # --- candidates

    async def prove(self, unit: Unit, model: Model) -> ProvenWorker:
        """Let a candidate prove itself under limits, then beside the model that serves where that is configured.

        Raises:
            SelfTestFailed: ``selftest.*`` or ``shadow.*``.
        """
        budget = self._budget(unit, model)
        shadow = self.config.shadow
        extra = shadow.max_s * shadow.cpu_percent / 100.0 if shadow.samples else 0.0
        ceiling = budget.ceiling(timeout_s=self.config.selftest_timeout_s + extra)
        is_declared = bool(self.config.selftest.ram_limit_mb or needed_ram_mb(model.manifest, model.variant))
        worker = await self.workers.start((model,), absences=self._absences({unit.config.model: model})[1], ceiling=ceiling)
        try:
            ready = await worker.wait_ready(self.config.selftest_timeout_s, ram_mb=budget.ram_mb, is_ram_final=is_declared)
            self._check_latency(model, ready.proofs[0], budget)
            await self._shadow(unit, model, worker)
            others = [each.served for each in self.units if each is not unit and each.served is not None]
            if others:
                worker, ready = await self._join(unit, model, worker)
        except SelfTestFailed as failed:
            self.workers.retire(worker)
            if failed.error.code == "selftest.memory" and not is_declared:
                raise SelfTestFailed(failed.error, is_final=False, model=failed.model) from failed
            raise
        except BaseException:
            self.workers.retire(worker)
            raise

        def serve() -> None:
            self._switch(worker, ready)
            served = {each.name: each for each in worker.start.models}
            if any(not self._is_still_wanted(each, served.get(each.config.model)) for each in self.units if each is not unit):
                self.spawn(self.later(0.0))  # another unit changed meanwhile

        return ProvenWorker(worker, self.workers, serve)

    def _budget(self, unit: Unit, model: Model) -> Budget:
        limits = self.config.selftest
        return make_budget(
            model.manifest,
            model.variant,
            self.facts(),
            active_ms=unit.proof.golden_ms if unit.proof else 0.0,
            free_mb=memory_free_bytes() / MEGA,
            ram_factor=limits.ram_factor,
            ram_limit_mb=limits.ram_limit_mb,
            latency_factor=limits.latency_factor,
            latency_limit_ms=limits.latency_limit_ms,
        )

    @staticmethod
    def _check_latency(model: Model, proof: Proof, budget: Budget) -> None:
        logger.info(
            "event=self_test_passed model=%s worst_error=%g golden_ms=%.3f", model.label, proof.worst_error, proof.golden_ms
        )
        if budget.latency_ms and proof.best_ms > budget.latency_ms:
            text = (
                f"{model.label}: a golden sample takes {proof.best_ms:.3g} ms at best, at most {budget.latency_ms:.3g} ms are "
                f"allowed: {budget.latency_reason}."
            )
            raise SelfTestFailed(DeviceError("selftest.latency", text), is_final=True, model=model.name)

    async def _shadow(self, unit: Unit, model: Model, worker: WorkerProcess) -> None:
        config, serving = self.config.shadow, unit.served
        if not config.samples or serving is None or serving.name != model.name:
            return
        slot = next((s for s in unit.store.state.slots if str(unit.slots.blob_dir(s.name)) == model.blob_dir), None)
        unit.store.update(step="shadow")
        checkpoint("shadow")
        unit.journal.event("shadow_started", f"beside {serving.label}", release=slot, fields={"samples": config.samples})
        findings = await watch_candidate(
            lambda: self.workers.current,
            worker,
            model.name,
            config,
            answer_s=self.config.request_timeout_s,
            is_stopped=unit.updater.superseded.is_set,
        )
        verdict = judge(findings, config)
        unit.journal.event("shadow_finished", verdict.reason, code=verdict.code, release=slot, fields=findings.fields())
        unit.store.update(step="")
        if verdict.code:
            error = DeviceError(verdict.code, f"{model.label}: in the shadow of {serving.label} {verdict.reason}.")
            raise SelfTestFailed(error, is_final=verdict.is_final, model=model.name)

    async def _join(self, unit: Unit, model: Model, alone: WorkerProcess) -> tuple[WorkerProcess, Ready]:
        """A worker with the candidate and what the other units serve; the one that was alone ends first."""
        alone.kill()
        await alone.ended.wait()
        models = {each.config.model: model if each is unit else each.served for each in self.units}
        there = {name: each for name, each in models.items() if each is not None}
        worker = await self.workers.start(tuple(there.values()), absences=self._absences(there)[1])
        ready = await self._wait(worker, len(models), model)
        return worker, ready

    async def _wait(self, worker: WorkerProcess, count: int, model: Model) -> Ready:
        try:
            return await worker.wait_ready(self.config.selftest_timeout_s * count)
        except SelfTestFailed as failed:
            if failed.model == model.name:
                raise
            # another unit's model does not come up: that is not this candidate's fault, and is seen to by settling
            self.spawn(self.later(0.0))
            raise SelfTestFailed(failed.error, is_final=False, model=failed.model) from failed

    # --- crashes

    def note_crash(self, worker: WorkerProcess) -> None:
        """The serving worker died."""
        now, code = time.monotonic(), worker.process.returncode
        ending = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        self.crashes += 1
        culprits = self._culprits(worker)
        for unit in self.units:
            if unit in culprits:
                unit.note_crash(ending, now)
            else:
                unit.pause(now)
        if not culprits:
            self.ledger.note(now)
            self.journal.event("worker_crashed", f"{worker.name}: {ending}", code="worker.crashed")
        # the others at once, those whose fault it was after their pause
        waits = {0.0, *(max(0.0, unit.not_before - now) for unit in culprits)} if culprits else {self.ledger.delay_s}
        for wait in sorted(waits):
            self.spawn(self.later(wait))

    def _culprits(self, worker: WorkerProcess) -> list[Unit]:
        """Whose work it was; a death at nobody's work is the only model's, or the one's on probation."""
        names = {model.name for model in worker.start.models}
        mine = [unit for unit in self.units if unit.config.model in names] or (list(self.units) if names else [])
        if suspects := [unit for unit in mine if unit.config.model in worker.suspects]:
            return suspects
        if len(mine) == 1:
            return mine
        return [unit for unit in mine if unit.store.state.probation is not None]


def _identity(model: Model) -> tuple[str, str, str, str]:
    return (model.name, model.manifest.version, model.blob_dir, model.variant.model)
