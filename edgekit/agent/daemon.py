"""The agent: wiring of update, serving and telemetry, from start to a clean end.

    config = load_config(Path("agent.toml"))
    exit_code = run_agent(config)

What never stops serving: an unreachable or expired repository, an absent broker, a full disk, a refused release. What stops
the agent is only its start: a wrong configuration, a port in use, another agent on the same state folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import platform
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from edgekit import __version__
from edgekit.agent.background import in_background
from edgekit.agent.child import SelfTestFailed, WorkerProcess
from edgekit.agent.config import AgentConfig
from edgekit.agent.courier import Courier
from edgekit.agent.facts import ask_facts
from edgekit.agent.health import MAX_DELAY_S, CrashLedger
from edgekit.agent.inbox import Inbox
from edgekit.agent.journal import Journal, now_ms
from edgekit.agent.link import Model
from edgekit.agent.logs import start_logging
from edgekit.agent.outbox import Outbox
from edgekit.agent.plan import DeviceFacts, active_slot, other_slot, refuse
from edgekit.agent.slots import SlotStore
from edgekit.agent.source import read_root
from edgekit.agent.state_store import DirLock, StateStore, prepare_dir
from edgekit.agent.steps import Installer
from edgekit.agent.updater import Updater
from edgekit.agent.validity import find_ban
from edgekit.agent.vitals import MEGA, CpuMeter, rss_bytes
from edgekit.agent.windows import Surroundings, measure_window
from edgekit.agent.workers import Workers
from edgekit.durable import PRIVATE_FILE, write_durably
from edgekit.errors import EdgekitError, EnvironmentFault, TrustError
from edgekit.schema.base import encode_json
from edgekit.schema.message import EventKind
from edgekit.schema.state import AgentState, AgentStatus, Refusal, Slot

logger = logging.getLogger(__name__)

RUN_FILE = "agent.json"
BACKLOG = 128
BIND_SECONDS = 3.0
BIND_STEP_S = 0.1
IDLE_WHILE_WAITING_S = 1.0
GUARD_SECONDS = 5.0
REQUEST_SECONDS = 1.0


def bind(host: str, port: int) -> socket.socket:
    """The listening socket. A worker that outlived its supervisor gives the port back within moments; that is waited for.

    Raises:
        EnvironmentFault: ``port.in_use`` or ``port.unusable``.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    deadline = time.monotonic() + BIND_SECONDS
    while True:
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise EnvironmentFault(
                    "port.unusable",
                    f"{host}:{port}: cannot listen there: {error.strerror}.",
                    hint="Give another --host or --port.",
                ) from error
            if time.monotonic() >= deadline:
                raise EnvironmentFault(
                    "port.in_use",
                    f"{host}:{port}: something listens there already.",
                    hint=f'Give another port with --port, or see who has it: "ss -ltnp sport = :{port}".',
                ) from error
            time.sleep(BIND_STEP_S)
        else:
            return listener


def _fallback_facts() -> DeviceFacts:
    """What can be said of a machine that could not be probed."""
    return DeviceFacts(
        arch=platform.machine(), cpu="", isa=(), cores=os.cpu_count() or 0, ram_mb=0.0, os=platform.system(), runtimes={}
    )


@dataclass
class ProvenWorker:
    """A worker whose model passed its self-test: it serves, or it is given up; nothing is left behind."""

    worker: WorkerProcess
    workers: Workers
    on_serve: Callable[[], None]

    def serve(self) -> None:
        """Let it serve, instead of the one that does."""
        self.on_serve()
        self.workers.switch(self.worker)

    def discard(self) -> None:
        """End it, unless it serves."""
        if self.worker is not self.workers.current and self.worker.is_running:
            self.workers.retire(self.worker)


@dataclass
class Daemon:
    """One running agent."""

    config: AgentConfig
    listener: socket.socket
    store: StateStore
    slots: SlotStore
    outbox: Outbox
    root: bytes
    started: float = field(default_factory=time.monotonic)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    _ledger: CrashLedger = field(default_factory=CrashLedger)
    _facts: DeviceFacts | None = None
    _runtime: tuple[str, str] = ("", "")
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _told: set[tuple[str | None, str]] = field(default_factory=set)
    _absence: str = ""

    def __post_init__(self) -> None:
        host, port = self.listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.journal = Journal(self.outbox, self.config, __version__, url=self.url)
        self.courier = Courier(self.outbox, self.journal, self._announce)
        self.journal.on_stored = self.courier.pump
        self.workers = Workers(self.listener, self.config, self._make_status, self._on_crash)
        self.updater = Updater(self.config, self.store, self.slots, self.journal, self.root, self, self.ask_facts, self.report)

    # --- facts, status, reports

    async def ask_facts(self) -> DeviceFacts:
        """What this device is; asked once."""
        if self._facts is None:
            self._facts = await in_background(ask_facts, name="facts")
        return self._facts

    def _announce(self) -> None:
        runtime, version = self._runtime
        self.journal.birth(self._facts or _fallback_facts(), runtime=runtime, runtime_version=version)
        self.report()

    def report(self) -> None:
        """Tell the fleet the whole state."""
        updater = self.updater
        self.journal.reported(self.store.state, last_error=updater.last_error, last_error_code=updater.last_error_code)

    def _make_status(self) -> bytes:
        requests, errors = self.workers.totals
        return encode_json(
            AgentStatus(
                state=self.store.state,
                pid=os.getpid(),
                site=self.config.site,
                started_at=self.started_at,
                uptime_s=round(time.monotonic() - self.started, 3),
                url=self.url,
                is_broker_connected=self.courier.is_connected,
                outbox_messages=self.outbox.count,
                outbox_bytes=self.outbox.size_bytes,
                last_refresh_at=self.updater.last_refresh_at,
                last_error=self.updater.last_error,
                requests=requests,
                errors=errors,
                rss_mb=round(sum(rss_bytes(pid) for pid in (os.getpid(), *self.workers.pids)) / MEGA, 2),
            )
        )

    # --- serving

    async def prove(self, model: Model) -> ProvenWorker:
        """Start a worker on a new model and let it prove itself."""
        return await self._prove(model, on_serve=self._ledger.forget)

    async def _prove(self, model: Model, *, on_serve: Callable[[], None] = lambda: None) -> ProvenWorker:
        worker = await self.workers.start(model)
        ready = await worker.wait_ready(self.config.selftest_timeout_s)
        logger.info(
            "event=self_test_passed model=%s worst_error=%g golden_ms=%.3f", worker.name, ready.worst_error, ready.golden_ms
        )

        def started() -> None:
            self._absence = ""
            self._runtime = (ready.runtime, ready.runtime_version)
            on_serve()

        return ProvenWorker(worker, self.workers, started)

    async def _serve_active(self) -> None:
        """Serve the active slot, or the other good one, or nothing but health."""
        while (slot := active_slot(self.store.state)) is not None:
            try:
                proven = await self._prove(await in_background(functools.partial(self._model_of, slot), name="hash"))
            except SelfTestFailed as failed:
                if self._is_worth_another_try(failed) or not self._fall_back(slot, failed.error):
                    self._ledger.note(time.monotonic())
                    await self._serve_nothing()
                    self._spawn(self._serve_later(max(1.0, self._ledger.delay_s)))
                    return
            except EdgekitError as error:
                if not self._fall_back(slot, error):
                    break
            else:
                if active_slot(self.store.state) == slot:
                    proven.serve()
                    return
                proven.discard()
        await self._serve_nothing()

    def _is_worth_another_try(self, failed: SelfTestFailed) -> bool:
        """Whether a model failed for a reason that says nothing about it, such as a lack of memory, and not too often."""
        return not failed.is_final and failed.error.code != "slot.damaged" and not self._ledger.is_looping

    def _model_of(self, slot: Slot) -> Model:
        return Installer(self.config, self.store, self.slots, self._facts or _fallback_facts()).model_of(slot)

    async def _serve_nothing(self) -> None:
        if self._is_served_rightly():
            return
        worker = await self.workers.start(None, absence=self._absence)
        await worker.wait_ready(self.config.selftest_timeout_s)
        if self._is_served_rightly():
            self.workers.retire(worker)
        else:
            self.workers.switch(worker)

    def _is_served_rightly(self) -> bool:
        """Whether a worker answers, and not with a model that may not serve."""
        worker = self.workers.current
        if worker is None or not worker.is_running:
            return False
        return worker.start.model is None or active_slot(self.store.state) is not None

    # --- recalls, and releases that are valid for a time

    def _apply_ban(self) -> bool:
        """Take a model that may not serve any longer out of service, as its release or its recall says.

        Returns:
            Whether something else must serve now.
        """
        state, now = self.store.state, datetime.now(UTC)
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
                refusals=refuse(before, _refusal(slot, error)),
            )

        self.store.transform(change)
        self._absence = "" if has_other else ban.reason
        self.updater.last_error_code, self.updater.last_error = ban.code, ban.reason
        where = f"back to {other.model}@{other.version}" if has_other else "nothing serves"
        self.journal.event(kind, f"{ban.reason}; {where}", code=ban.code, release=slot)
        self.report()
        return True

    async def _guard(self) -> None:
        while True:
            try:
                if self._apply_ban() and not await self._is_served():
                    self._spawn(self._serve_later(1.0))
            except Exception:
                logger.exception("event=guard_failed")
            await asyncio.sleep(GUARD_SECONDS)

    # --- installing from a stick

    async def _follow_requests(self) -> None:
        """What ``edgekit agent install`` asks for; only who may write into the state folder can ask."""
        inbox = Inbox(self.config.state_path)
        while True:
            try:
                request = inbox.take()
                if request is not None:
                    inbox.answer(await self.updater.install_stick(request))
            except Exception:
                logger.exception("event=request_failed")
            await asyncio.sleep(REQUEST_SECONDS)

    async def _serve_later(self, delay_s: float) -> None:
        """Serve again after a while; what this machine cannot give now (a process, disk space) is tried for again."""
        while True:
            await asyncio.sleep(delay_s)
            if await self._is_served():
                return
            delay_s = MAX_DELAY_S

    async def _is_served(self) -> bool:
        try:
            await self._serve_active()
        except (SelfTestFailed, OSError) as error:
            logger.error("event=serving_failed error=%r", str(error))  # noqa: TRY400 - it says all
            return False
        return True

    def _fall_back(self, bad: Slot, error: EdgekitError) -> bool:
        """Give a slot up for the other good one.

        A damaged slot is emptied even when there is no other: the release is fetched again.

        Returns:
            Whether there is something else to try.
        """
        is_damaged = error.code == "slot.damaged"
        outcome: list[Slot | None] = []

        def change(state: AgentState) -> AgentState:
            other = other_slot(state)
            outcome.clear()
            if state.active != bad.name:
                outcome.append(other)
                return state
            is_good = other.status == "good"
            outcome.append(other if is_good else None)
            if not is_good and not is_damaged:
                return state
            slots = {bad.name: Slot(name=bad.name) if is_damaged else msgspec.structs.replace(bad, status="bad")}
            if is_good:
                slots[other.name] = msgspec.structs.replace(other, status="active")
            changed = msgspec.structs.replace(
                state, slots=tuple(slots.get(s.name, s) for s in state.slots), active=other.name if is_good else None
            )
            return changed if is_damaged else msgspec.structs.replace(changed, refusals=refuse(state, _refusal(bad, error)))

        self.store.transform(change)
        target = outcome[0]
        where = f"back to {target.model}@{target.version}" if target else "there is no other good slot"
        self.updater.last_error_code, self.updater.last_error = error.code, error.message
        if target or is_damaged:
            self.journal.event("rolled_back", f"{error.message} {where}", code=error.code, release=bad)
        else:
            self.journal.event("worker_crashed", f"{error.message} {where}", code=error.code, release=bad)
        self.report()
        return target is not None

    def _on_crash(self, worker: WorkerProcess) -> None:
        self._ledger.note(time.monotonic())
        slot = active_slot(self.store.state)
        code = worker.process.returncode
        ending = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        self.journal.event("worker_crashed", f"{worker.name}: {ending}", code="worker.crashed", release=slot)
        if slot is not None and self._ledger.is_looping and other_slot(self.store.state).status == "good":
            error = EnvironmentFault("worker.crash_loop", f"{worker.name}: the worker died again and again, last by {ending}.")
            try:
                if self._fall_back(slot, error):
                    self._ledger.forget()
            except OSError as full:
                logger.error("event=state_not_saved error=%r", str(full))  # noqa: TRY400 - it says all
        self._spawn(self._restart(self._ledger.delay_s))

    async def _restart(self, delay_s: float) -> None:
        """Serve again; while that has to wait, health is answered all the same."""
        if self._stop.is_set():
            return
        if delay_s >= IDLE_WHILE_WAITING_S:
            with contextlib.suppress(SelfTestFailed, OSError):
                await self._serve_nothing()
        await self._serve_later(delay_s)

    # --- rounds

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("event=task_failed", exc_info=error)

    async def _poll(self) -> None:
        while True:
            try:
                wait_s = await self.updater.poll()
            except Exception:
                logger.exception("event=poll_failed")
                wait_s = self.config.poll_s
            await asyncio.sleep(wait_s)

    async def _window(self) -> None:
        cpu = CpuMeter()
        start_ms, due = now_ms(), time.monotonic()
        while True:
            due = max(due + self.config.window_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            end_ms = now_ms()
            try:
                await self._close_window(cpu, start_ms, max(0, end_ms - start_ms))
            except Exception:
                logger.exception("event=window_failed")
            start_ms = end_ms

    async def _close_window(self, cpu: CpuMeter, start_ms: int, duration_ms: int) -> None:
        figures = await self.workers.collect()
        if not self.config.broker:
            return
        around = Surroundings(
            pids=(os.getpid(), *self.workers.pids),
            state_dir=self.config.state_path,
            outbox_messages=self.outbox.count,
            outbox_bytes=self.outbox.size_bytes,
            worker_restarts=self._ledger.total,
            uptime_s=time.monotonic() - self.started,
        )
        values, sketches = measure_window(figures, around, cpu)
        slot = active_slot(self.store.state)
        digest = slot.model_digest or "" if slot else ""
        self.journal.window(start_ms=start_ms, duration_ms=duration_ms, values=values, sketches=sketches, model_digest=digest)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.config.heartbeat_s)
            try:
                self.courier.beat()
            except Exception:
                logger.exception("event=beat_failed")

    # --- life

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self._tidy_up()
        logger.info("event=agent_listening url=%s device=%s state_dir=%s", self.url, self.config.device, self.config.state_dir)
        self.journal.event("agent_started", f"edgekit {__version__} at {self.url}")
        with contextlib.suppress(OSError):  # a full disk: the guard tries again
            self._apply_ban()
        if not await self._is_served():
            self._spawn(self._serve_later(1.0))
        await self._start_telemetry()
        self._spawn(self._guard())
        self._spawn(self._follow_requests())
        if self.config.repository:
            self._spawn(self._poll())
        await self._stop.wait()
        await self._shut_down()
        return 0

    def _tidy_up(self) -> None:
        """What an interruption left, and where we are; a disk without a free byte keeps nobody from serving."""
        try:
            self.updater.recover()
            write_durably(
                self.config.state_path / RUN_FILE, msgspec.json.encode({"pid": os.getpid(), "url": self.url}), mode=PRIVATE_FILE
            )
        except OSError as error:
            logger.error("event=state_not_saved error=%r", str(error))  # noqa: TRY400 - it says all

    async def _start_telemetry(self) -> None:
        try:
            await self.ask_facts()
        except EdgekitError as error:
            logger.error("event=probe_failed error=%r", error.message)  # noqa: TRY400 - expected, handled
        self._announce()
        if self.config.broker:
            self.courier.start()
            self._spawn(self._beat())
        self._spawn(self._window())

    async def _shut_down(self) -> None:
        logger.info("event=agent_stopping")
        self.updater.halt.set()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.workers.stop()
        self.journal.event("agent_stopped")
        await self.courier.stop()
        (self.config.state_path / RUN_FILE).unlink(missing_ok=True)


def _refusal(slot: Slot, error: EdgekitError) -> Refusal:
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


def run_agent(config: AgentConfig) -> int:
    """Run an agent until it is told to stop.

    Raises:
        UsageError: the root metadata cannot be read.
        EnvironmentFault: ``agent.already_running``, ``port.in_use``, ``state.unwritable``.
    """
    start_logging()
    root = read_root(config) if config.root else b""
    prepare_dir(config.state_path)
    lock = DirLock(config.state_path)
    lock.acquire()
    try:
        listener = bind(config.host, config.port)
        store = StateStore.open(config.state_path, device=config.device)
        outbox = Outbox(config.state_path / "outbox.db", max_bytes=config.outbox_bytes)

        async def live() -> int:
            return await Daemon(config, listener, store, SlotStore(config.state_path), outbox, root).run()

        try:
            return asyncio.run(live())
        finally:
            outbox.close()
            listener.close()
    finally:
        lock.release()
