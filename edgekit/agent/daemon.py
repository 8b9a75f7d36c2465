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
import secrets
import signal
import socket
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit import __version__
from edgekit.agent.background import in_background
from edgekit.agent.child import SelfTestFailed, WorkerProcess
from edgekit.agent.config import AgentConfig
from edgekit.agent.courier import Courier
from edgekit.agent.desired import DesiredDesk
from edgekit.agent.facts import ask_facts
from edgekit.agent.hangs import HangWatch
from edgekit.agent.health import MAX_DELAY_S
from edgekit.agent.hosting import Hosting, ProvenWorker
from edgekit.agent.identity import IdentityFiles
from edgekit.agent.journal import Journal, now_ms
from edgekit.agent.link import Figures, Labelled, Model, Sampled, TakeSample
from edgekit.agent.listeners import bind_unix
from edgekit.agent.logs import keep_log, start_logging
from edgekit.agent.merging import merge_payloads
from edgekit.agent.mqtt_inference import InferenceDesk
from edgekit.agent.notify import Notifier, answers
from edgekit.agent.operation import Operation, OperationStore
from edgekit.agent.outbox import Outbox
from edgekit.agent.plan import DeviceFacts, active_slot
from edgekit.agent.samples import SampleDesk
from edgekit.agent.slots import SlotStore
from edgekit.agent.source import read_root
from edgekit.agent.spare import release as release_spare
from edgekit.agent.state_store import DirLock, StateStore, prepare_dir
from edgekit.agent.units import Unit, unit_configs
from edgekit.agent.violations import ViolationWatch
from edgekit.agent.vitals import MEGA, CpuMeter, rss_bytes
from edgekit.agent.windows import Surroundings, measure_window
from edgekit.agent.workers import Workers
from edgekit.durable import PRIVATE_FILE, write_durably
from edgekit.errors import EdgekitError, EnvironmentFault
from edgekit.schema.base import encode_json
from edgekit.schema.state import AgentState, AgentStatus
from edgekit.telemetry.topics import topic

if TYPE_CHECKING:
    from edgekit.agent.commands import Commander
    from edgekit.agent.mqtt import Incoming

logger = logging.getLogger(__name__)

RUN_FILE = "agent.json"
BACKLOG = 128
BIND_SECONDS = 3.0
BIND_STEP_S = 0.1
GUARD_SECONDS = 5.0
PROBATION_SECONDS = 0.25
PROBATION_LOOK_S = 2.0
"""While there is none."""
MIN_SCRUB_WAIT_S = 60.0
FIRST_SCRUB_S = 3600.0


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
class Daemon:
    """One running agent."""

    config: AgentConfig
    listener: socket.socket
    store: StateStore
    slots: SlotStore
    outbox: Outbox
    root: bytes
    local: socket.socket | None = None
    """The Unix socket, where one is configured."""
    started: float = field(default_factory=time.monotonic)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    violations: ViolationWatch = field(default_factory=ViolationWatch)
    _facts: DeviceFacts | None = None
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        host, port = self.listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.journal = Journal(self.outbox, self.config, __version__, url=self.url)
        self.courier = Courier(self.outbox, self.journal, self._announce)
        self.journal.on_stored = self.courier.pump
        self.workers = Workers(tuple(filter(None, (self.listener, self.local))), self.config, self._make_status, self._on_crash)
        self.workers.on_fact = self._on_fact
        self.samples = SampleDesk(
            config=self.config.samples,
            folder=self.config.state_path,
            ask=self._ask_sample,
            models=lambda: [unit.served.name for unit in self.units if unit.served is not None],
            store=self.journal.sample,
        )
        first, *further = unit_configs(self.config)
        self.units = (
            Unit(first, self.store, self.slots, self.journal, self, self.root),
            *(Unit.open(config, self.journal, self, self.root) for config in further),
        )
        self.updater = self.units[0].updater
        for unit in self.units:
            unit.updater.busy = self.updater.busy
            unit.updater.halt = self.updater.halt
        self.hosting = Hosting(
            self.config, self.units, self.workers, self.journal, lambda: self.known_facts, self._spawn, self._settle_later
        )
        self.hangs = HangWatch(limit_s=self.config.request_timeout_s)
        self.inference: InferenceDesk | None = None
        self.instance = secrets.token_hex(8)
        self.notifier = Notifier.from_environment()
        self.operation = Operation(
            self.config, self.units, self.journal, OperationStore(self.config.state_path), lambda: self._settle_later(0.0)
        )
        self.operation.apply_pause()
        self.commander = self._open_commander() if self.config.commands else None
        self.desk = DesiredDesk.open(self.config, self.store, self.journal) if self.config.fleet_keys else None
        if self.desk is not None:
            self.desk.on_change = self._on_desired
            for unit in self.units:
                unit.updater.chooser = self.desk

    def _open_commander(self) -> Commander:
        from edgekit.agent.commands import Commander  # noqa: PLC0415 - for devices that obey any

        return Commander.open(
            self.config,
            self.operation,
            self.journal,
            sender=self.courier,
            make_status=self._make_status,
            spawn=self._spawn,
        )

    # --- facts, status, reports

    async def ask_facts(self) -> DeviceFacts:
        """What this device is; asked once."""
        if self._facts is None:
            self._facts = await in_background(ask_facts, name="facts")
        return self._facts

    @property
    def known_facts(self) -> DeviceFacts:
        """What is known of this device by now."""
        return self._facts or _fallback_facts()

    async def prove(self, unit: Unit, model: Model) -> ProvenWorker:
        """Let a model prove itself."""
        return await self.hosting.prove(unit, model)

    def _announce(self) -> None:
        runtime, version = self.hosting.runtime
        self.journal.birth(self.known_facts, runtime=runtime, runtime_version=version)
        self.report()

    def report(self) -> None:
        """Tell the fleet the whole state: the slots of every model, those of further ones as ``NAME/a``."""
        updater = next((unit.updater for unit in self.units if unit.updater.last_error_code), self.updater)
        self.journal.reported(
            combine_states([unit.store.state for unit in self.units]),
            last_error=updater.last_error,
            last_error_code=updater.last_error_code,
            probation=tuple(unit.name for unit in self.units if unit.store.state.probation is not None),
        )

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
                models=tuple(unit.status() for unit in self.units),
                instance=self.instance,
                paused_until=self.operation.paused_until,
            )
        )

    # --- serving

    def _on_crash(self, worker: WorkerProcess) -> None:
        try:
            self.hosting.note_crash(worker)
        except OSError as full:
            logger.error("event=state_not_saved error=%r", str(full))  # noqa: TRY400 - it says all
            self._spawn(self._settle_later(1.0))

    async def _settle_later(self, delay_s: float) -> None:
        """Serve what is wanted after a while; what this machine cannot give now (a process, disk space) is tried for again."""
        while not self._stop.is_set():
            await asyncio.sleep(delay_s)
            if not await self._settle():
                delay_s = MAX_DELAY_S
                continue
            waits = [unit.not_before - time.monotonic() for unit in self.units]
            if max(waits) <= 0:
                return
            delay_s = max(waits)

    async def _settle(self) -> bool:
        """Serve what is wanted now; whether that was possible."""
        try:
            await self.hosting.settle()
        except (SelfTestFailed, EdgekitError, OSError) as error:
            logger.error("event=serving_failed error=%r", str(error))  # noqa: TRY400 - it says all
            return False
        return True

    async def _guard(self) -> None:
        """Recalls and validities: what may not serve any longer ends in time, offline too."""
        while True:
            try:
                self._end_hanging()
                changed = [unit.apply_ban(datetime.now(UTC)) for unit in self.units]
                if any(changed) and not await self._settle():
                    self._spawn(self._settle_later(1.0))
            except Exception:
                logger.exception("event=guard_failed")
            await asyncio.sleep(GUARD_SECONDS)

    def _end_hanging(self) -> None:
        """A model that has been at one inference for longer than a request may take: its worker is ended, as by a crash."""
        worker = self.workers.current
        if worker is None:
            return
        pages = {model.name: worker.page(model.name) for model in worker.start.models}
        looked = [(worker.pid, name, page.is_busy, page.tally.inferences) for name, page in pages.items() if page is not None]
        if hanging := self.hangs.look(looked, time.monotonic()):
            limit = f"{self.config.request_timeout_s:g} s"
            self.journal.event("model_hung", f"{hanging}: one inference took longer than {limit}", code="model.hung")
            worker.abort()

    async def _watch(self) -> None:
        """Models on probation."""
        while True:
            is_any = any(unit.store.state.probation for unit in self.units)
            await asyncio.sleep(PROBATION_SECONDS if is_any else PROBATION_LOOK_S)
            for unit in self.units:
                try:
                    is_over = unit.watch(time.monotonic())
                except Exception:
                    logger.exception("event=watch_failed model=%s", unit.name)
                    continue
                if is_over:
                    unit.wake.set()
                    self._spawn(self._settle_later(0.0))

    async def _scrub(self) -> None:
        """Everything on the disk, now and then: bits fall over without a word."""
        while True:
            await asyncio.sleep(self._scrub_wait())
            for unit in self.units:
                try:
                    if await unit.scrub():
                        self._spawn(self._settle_later(0.0))
                    unit.wake.set()
                except Exception:
                    logger.exception("event=scrub_failed model=%s", unit.name)

    def _scrub_wait(self) -> float:
        """Seconds until the next scrub: the pause counts over restarts, too."""
        last = self.store.state.scrubbed_at
        if last is None:
            return min(FIRST_SCRUB_S, self.config.scrub_s)
        passed = max(0.0, (datetime.now(UTC) - last).total_seconds())
        return max(min(MIN_SCRUB_WAIT_S, self.config.scrub_s), self.config.scrub_s - passed)

    # --- what systemd is told

    def _describe(self) -> str:
        """The agent in one line."""
        served = ", ".join(unit.served.label for unit in self.units if unit.served) or "nothing"
        until = self.operation.paused_until
        return f"serves {served} at {self.url}" + (f"; updates wait until {until:%Y-%m-%d %H:%M} UTC" if until else "")

    async def _is_alive(self) -> bool:
        """Whether requests are answered: this loop turns, and so does the worker's."""
        host, port = self.listener.getsockname()[:2]
        return await answers(host, port)

    # --- what the fleet desires

    def _on_desired_message(self, incoming: Incoming) -> None:
        if self.desk is not None:
            self.desk.take(incoming.payload)

    def _on_desired(self) -> None:
        """Something else is desired: what is under way for something else gives way, and every unit looks again."""
        assert self.desk is not None
        for unit in self.units:
            attempt = unit.store.state.attempt
            if attempt is not None and not self.desk.wants(unit.config.model, attempt.manifest):
                unit.updater.superseded.set()
            unit.wake.set()

    # --- rounds

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("event=task_failed", exc_info=error)

    async def _poll(self, unit: Unit) -> None:
        while True:
            unit.wake.clear()
            try:
                if self.desk is not None and (wanted := self.desk.wanted(unit.config.model)):
                    await self.operation.obey(unit, wanted)
                wait_s = await unit.updater.poll()
            except Exception:
                logger.exception("event=poll_failed model=%s", unit.name)
                wait_s = self.config.poll_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(unit.wake.wait(), wait_s)

    async def _window(self) -> None:
        cpu = CpuMeter()
        begun = due = time.monotonic()
        while True:
            due = max(due + self.config.window_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            ended = time.monotonic()
            duration_ms = round((ended - begun) * 1000)  # by the clock that never jumps
            try:
                await self._close_window(cpu, now_ms() - duration_ms, duration_ms)
                self.journal.expire()
                if self.journal.clock.refresh():
                    self._announce()
            except Exception:
                logger.exception("event=window_failed")
            begun = ended

    async def _close_window(self, cpu: CpuMeter, start_ms: int, duration_ms: int) -> None:
        figures = await self.workers.collect()
        self._judge_inputs(figures)
        if not self.config.broker:
            return
        around = Surroundings(
            pids=(os.getpid(), *self.workers.pids),
            state_dir=self.config.state_path,
            outbox_messages=self.outbox.count,
            outbox_bytes=self.outbox.size_bytes,
            worker_restarts=self.hosting.crashes,
            uptime_s=time.monotonic() - self.started,
        )
        measured = measure_window(figures, around, cpu)
        slot = active_slot(self.store.state)
        digest = slot.model_digest or "" if slot else ""
        self.journal.window(start_ms=start_ms, duration_ms=duration_ms, measured=measured, model_digest=digest)

    def _on_fact(self, fact: Labelled | Sampled) -> None:
        """What a worker heard or gave, beside its figures."""
        try:
            if isinstance(fact, Sampled):
                self.samples.receive(fact)
            else:
                self.journal.label(
                    fact.prediction_id,
                    fact.label,
                    model_digest=fact.model_digest,
                    predicted=fact.predicted,
                    confidence=fact.confidence,
                    is_counted=fact.is_counted,
                )
        except OSError as error:
            logger.error("event=sample_not_stored error=%r", str(error))  # noqa: TRY400 - no quota, no sample

    def _ask_sample(self, _model: str, wanted: TakeSample) -> None:
        if self.workers.current is not None:
            self.workers.current.take_sample(wanted)

    def _judge_inputs(self, figures: Sequence[Figures]) -> None:
        """An event for each model whose inputs broke its contract more often than they may."""
        worker = self.workers.current
        models = {model.variant.model: model for model in worker.start.models} if worker is not None else {}
        for part in figures:
            model = models.get(part.model_digest)
            found = self.violations.judge(part, model.manifest.contract) if model is not None else None
            if model is not None and found is not None:
                fields: dict[str, str | int | float | bool] = {
                    "input": found.name,
                    "action": found.action,
                    "share": found.share,
                }
                fields["model_digest"] = found.model_digest
                self.journal.event("contract_violated", f"{model.label}: {found.text}", fields=fields)

    def _listen_for_inference(self) -> None:
        """Topics whose messages are run through a model."""
        if not self.config.inference_topics:
            return
        host, port = self.listener.getsockname()[:2]
        topics = [
            each if each.model else msgspec.structs.replace(each, model=self.config.model)
            for each in self.config.inference_topics
        ]
        self.inference = InferenceDesk(topics, (host, port), self.config.socket, self.courier.answer)
        self.inference.start()
        for each in topics:
            self.courier.listen(each.subscribe, functools.partial(self.inference.hear, each))

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
            for unit in self.units:
                unit.apply_ban(datetime.now(UTC))
        if not await self._settle():
            self._spawn(self._settle_later(1.0))
        await release_spare()
        await self._start_telemetry()
        self._spawn(self._guard())
        self._spawn(self._watch())
        self._spawn(self.operation.follow_requests())
        self._spawn(self.operation.follow_pause())
        self._keep_certificate()
        self.notifier.ready(self._describe())
        self._spawn(self.notifier.watch(self._is_alive, self._describe))
        if self.config.scrub_s:
            self._spawn(self._scrub())
        if self.config.repository:
            for unit in self.units:
                self._spawn(self._poll(unit))
        await self._stop.wait()
        await self._shut_down()
        return 0

    def _keep_certificate(self) -> None:
        """A device that was enrolled renews its certificate by itself."""
        files = IdentityFiles.of(self.config.state_path)
        about = files.read()
        if about is not None and self.config.cert_file == str(files.pair):
            from edgekit.agent.renewal import Renewer  # noqa: PLC0415 - its HTTP client is for devices that were enrolled

            self._spawn(Renewer(files, about, self.journal).run())

    def _tidy_up(self) -> None:
        """What an interruption left, and where we are; a disk without a free byte keeps nobody from serving."""
        try:
            for unit in self.units:
                unit.recover()
            write_durably(
                self.config.state_path / RUN_FILE,
                msgspec.json.encode({"pid": os.getpid(), "url": self.url, "instance": self.instance}),
                mode=PRIVATE_FILE,
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
            if self.desk is not None:
                self.courier.listen(topic(self.config.site, self.config.device, "des"), self._on_desired_message)
            if self.commander is not None:
                self.commander.recover()
                self.courier.listen(self.commander.topic, self.commander.hear)
            self._listen_for_inference()
            self.courier.start()
            self._spawn(self._beat())
        self._spawn(self._window())
        if self.config.broker and self.config.samples.per_day:
            self._spawn(self.samples.run())

    async def _shut_down(self) -> None:
        logger.info("event=agent_stopping")
        self.notifier.stopping()
        self.updater.halt.set()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for unit in self.units:
            unit.pause(time.monotonic())
        await self.workers.stop()
        for unit in self.units:
            with contextlib.suppress(OSError):
                unit.updater.rest()
        self.journal.event("agent_stopped")
        if self.inference is not None:
            self.inference.stop()
        await self.courier.stop()
        (self.config.state_path / RUN_FILE).unlink(missing_ok=True)


def combine_states(states: Sequence[AgentState]) -> AgentState:
    """The first model's state with every model's slots and refusals, as the fleet is told."""
    first = states[0]
    if len(states) == 1:
        return first
    slots = [slot for state in states[:1] for slot in state.slots]
    for state in states[1:]:
        name = next((slot.model for slot in state.slots if slot.model), "")
        slots += [msgspec.structs.replace(slot, name=f"{name}/{slot.name}") for slot in state.slots if slot.model]
    refusals = tuple(refusal for state in states for refusal in state.refusals)
    phase = next((state.phase for state in states if state.phase != "idle"), first.phase)
    return msgspec.structs.replace(first, slots=tuple(slots), refusals=refusals, phase=phase)


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
    keep_log(config.state_path, config.log_bytes)
    try:
        listener = bind(config.host, config.port)
        local = bind_unix(Path(config.socket), mode=config.socket_mode) if config.socket else None
        store = StateStore.open(config.state_path, device=config.device)
        outbox = Outbox(config.state_path / "outbox.db", max_bytes=config.outbox_bytes, merge=merge_payloads)

        async def live() -> int:
            return await Daemon(config, listener, store, SlotStore(config.state_path), outbox, root, local=local).run()

        try:
            return asyncio.run(live())
        finally:
            outbox.close()
            listener.close()
            if local is not None:
                Path(config.socket).unlink(missing_ok=True)
                local.close()
    finally:
        lock.release()
