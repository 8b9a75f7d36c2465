"""The workers of one agent: at most one that serves, one that is being tested, and those that drain.

A swap is always the same: start the next worker, let it prove itself, let it accept, drain the one before. Totals and
figures are summed over all of them, so that nothing is lost with a worker's end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgekit.agent.child import FactTaker, StatusMaker, WorkerProcess
from edgekit.agent.config import AgentConfig
from edgekit.agent.errands import stand_back
from edgekit.agent.link import Ceiling, Figures, Model, Start

logger = logging.getLogger(__name__)

END_MARGIN_S = 5.0
HUNG_SECONDS = 30.0
"""A serving worker that answers its supervisor no more for so long is ended and started again."""

CrashHandler = Callable[[WorkerProcess], None]


@dataclass
class Workers:
    """The set of workers; ``on_crash`` is called in the loop when the serving one dies."""

    listeners: Sequence[socket.socket]
    config: AgentConfig
    make_status: StatusMaker
    on_crash: CrashHandler
    current: WorkerProcess | None = None
    on_fact: FactTaker = lambda _fact: None
    _all: list[WorkerProcess] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _leftover: list[Figures] = field(default_factory=list)
    _past: tuple[int, int] = (0, 0)

    async def start(
        self,
        models: Sequence[Model],
        *,
        absence: str = "",
        absences: Mapping[str, str] | None = None,
        ceiling: Ceiling | None = None,
    ) -> WorkerProcess:
        """Start a worker; it does not accept yet.

        Args:
            models: what it serves.
            absence: why it serves nothing.
            absences: why it does not serve single models, by name.
            ceiling: what it may use until it serves.
        """
        config = self.config
        start = Start(
            models=tuple(models),
            threads=config.threads,
            max_request_bytes=config.max_request_bytes,
            request_timeout_s=config.request_timeout_s,
            drain_s=config.drain_s,
            absence=absence,
            absences=dict(absences or {}),
            ceiling=ceiling,
            max_connections=config.max_connections,
        )
        worker = await WorkerProcess.spawn(self.listeners, start, self.make_status)
        resources = config.resources
        stand_back(worker.pid, nice=resources.worker_nice, oom_score_adj=resources.worker_oom_score_adj)
        worker.on_fact = self.on_fact
        self._all.append(worker)
        self._spawn(self._follow(worker))
        return worker

    def switch(self, worker: WorkerProcess) -> None:
        """Let the worker accept and the one before it drain."""
        before, self.current = self.current, worker
        worker.go()
        if before is not None and before.is_running:
            self.retire(before)

    def retire(self, worker: WorkerProcess) -> None:
        """Let a worker finish what it has; one that does not end in time (a model that hangs) is killed."""
        worker.drain()
        limit = self.config.drain_s + self.config.request_timeout_s + END_MARGIN_S
        self._spawn(worker.end(limit))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("event=task_failed", exc_info=error)

    async def _follow(self, worker: WorkerProcess) -> None:
        await worker.ended.wait()
        self._all.remove(worker)
        self._past = (self._past[0] + worker.requests, self._past[1] + worker.errors)
        self._leftover += worker.leftover
        code = worker.process.returncode
        logger.info("event=worker_ended pid=%d model=%s code=%s", worker.pid, worker.name.replace(" ", "_"), code)
        if worker is self.current:
            self.current = None
            if not worker.is_expected_to_end:
                self.on_crash(worker)

    @property
    def totals(self) -> tuple[int, int]:
        """Requests and errors since the agent's start."""
        return (
            self._past[0] + sum(worker.requests for worker in self._all),
            self._past[1] + sum(worker.errors for worker in self._all),
        )

    @property
    def pids(self) -> list[int]:
        """Process ids of all workers."""
        return [worker.pid for worker in self._all]

    async def collect(self) -> Sequence[Figures]:
        """What was counted since the last time, by every worker, those that ended included."""
        asked = [worker for worker in self._all if worker.ready.done()]
        answers = await asyncio.gather(*(worker.collect() for worker in asked))
        leftover, self._leftover = self._leftover, []
        for worker in asked:
            leftover += worker.leftover
            worker.leftover = []
        if self.current is not None and self.current.silent_s >= HUNG_SECONDS:
            logger.error("event=worker_hangs pid=%d silent_s=%.0f", self.current.pid, self.current.silent_s)
            self.current.abort()
        return [*leftover, *(figures for answer in answers if answer is not None for figures in answer)]

    async def stop(self) -> None:
        """Drain all of them."""
        self_ending = [worker.end(self.config.drain_s + END_MARGIN_S) for worker in list(self._all)]
        await asyncio.gather(*self_ending, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*self._tasks, return_exceptions=True), END_MARGIN_S)
