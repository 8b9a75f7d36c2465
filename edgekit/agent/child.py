"""The supervisor's side of a worker: start it, follow it, ask it, end it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from edgekit.agent.interpreter import module_command
from edgekit.agent.link import (
    Collect,
    Collected,
    Drain,
    Drained,
    Failed,
    Figures,
    Go,
    Ready,
    Start,
    StatusAnswer,
    StatusRequest,
    ToWorker,
    pack_frame,
    read_to_supervisor,
)
from edgekit.errors import ArtifactError, DeviceError, EdgekitError

logger = logging.getLogger(__name__)

COLLECT_SECONDS = 2.0
KILL_SECONDS = 5.0
WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

StatusMaker = Callable[[], bytes]


class SelfTestFailed(Exception):  # noqa: N818 - the outcome of a test, caught by the updater
    """A worker could not load or prove its model. ``is_final``: trying again would not help."""

    def __init__(self, error: EdgekitError, *, is_final: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.is_final = is_final


@dataclass
class WorkerProcess:
    """One worker."""

    process: asyncio.subprocess.Process
    start: Start
    make_status: StatusMaker
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ready: asyncio.Future[Ready] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    requests: int = 0
    errors: int = 0
    leftover: list[Figures] = field(default_factory=list)
    """Figures that nobody waited for: the last ones, and answers that came late."""
    is_expected_to_end: bool = False
    _collecting: dict[int, asyncio.Future[Figures]] = field(default_factory=dict)
    _next_id: int = 0
    _silent_since: float | None = None
    _collected: tuple[int, int] = (0, 0)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @classmethod
    async def spawn(cls, listener: socket.socket, start: Start, make_status: StatusMaker) -> WorkerProcess:
        """Start a worker that loads what ``start`` says and waits for :meth:`go`."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *module_command("edgekit.agent.worker", "--link", str(theirs.fileno()), "--listen", str(listener.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), listener.fileno()),
                env=WORKER_ENVIRONMENT | dict(os.environ),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        worker = cls(process, start, make_status, reader, writer)
        worker.ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        worker._send(start)
        worker._tasks = [asyncio.ensure_future(worker._read()), asyncio.ensure_future(worker._watch())]
        return worker

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return not self.ended.is_set()

    @property
    def name(self) -> str:
        """What it serves, for people."""
        model = self.start.model
        return f"{model.manifest.name}@{model.manifest.version}" if model else "no model"

    def _send(self, frame: ToWorker) -> None:
        if not self.writer.is_closing():
            self.writer.write(pack_frame(frame))

    async def _read(self) -> None:
        try:
            while (frame := await read_to_supervisor(self.reader)) is not None:
                self._take(frame)
        except ArtifactError as error:
            logger.error("event=worker_link_broken pid=%d error=%r", self.pid, error.message)  # noqa: TRY400 - the trace says no more
            self.kill()

    def _take(self, frame: Ready | Failed | Collected | StatusRequest | Drained) -> None:
        match frame:
            case Ready():
                if not self.ready.done():
                    self.ready.set_result(frame)
            case Failed(code=code, message=message, is_final=is_final):
                self.is_expected_to_end = True
                self._fail(ArtifactError(code, message), is_final=is_final)
            case Collected(id=number, figures=figures):
                self._count(figures)
                self._silent_since = None
                if (future := self._collecting.pop(number, None)) and not future.done():
                    future.set_result(figures)
                else:
                    self.leftover.append(figures)
            case StatusRequest(id=number, requests=requests, errors=errors):
                self.requests, self.errors = requests, errors
                self._send(StatusAnswer(id=number, body=self.make_status()))
            case Drained(figures=figures):
                self._count(figures)
                self.leftover.append(figures)

    def _count(self, figures: Figures) -> None:
        self._collected = (self._collected[0] + figures.requests, self._collected[1] + figures.errors)
        self.requests, self.errors = max(self.requests, self._collected[0]), max(self.errors, self._collected[1])

    def _fail(self, error: EdgekitError, *, is_final: bool) -> None:
        if not self.ready.done():
            self.ready.set_exception(SelfTestFailed(error, is_final=is_final))

    async def _watch(self) -> None:
        code = await self.process.wait()
        await asyncio.wait([self._tasks[0]], timeout=1.0)
        ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        # SIGKILL comes from outside (the kernel short of memory, an operator): it proves nothing about the model.
        self._fail(
            DeviceError("selftest.crashed", f"{self.name}: the process died while loading or testing the model: {ending}."),
            is_final=code != -signal.SIGKILL,
        )
        self.writer.close()
        self.ended.set()

    async def wait_ready(self, seconds: float) -> Ready:
        """Wait for the self-test's end.

        Raises:
            SelfTestFailed: when it did not pass, did not end in time, or the process died.
        """
        try:
            return await asyncio.wait_for(asyncio.shield(self.ready), seconds)
        except TimeoutError:
            self.is_expected_to_end = True
            self.kill()
            error = DeviceError("selftest.timeout", f"{self.name}: the self-test did not end within {seconds:g} s.")
            raise SelfTestFailed(error, is_final=True) from None

    def go(self) -> None:
        """Let it accept connections."""
        self._send(Go())

    def drain(self) -> None:
        """Let it finish what it has and end."""
        self.is_expected_to_end = True
        self._send(Drain())

    async def collect(self) -> Figures | None:
        """Its figures since the last time; None when it does not answer."""
        self._next_id += 1
        number, asked_at = self._next_id, time.monotonic()
        future: asyncio.Future[Figures] = asyncio.get_running_loop().create_future()
        self._collecting[number] = future
        self._send(Collect(id=number))
        try:
            return await asyncio.wait_for(future, COLLECT_SECONDS)
        except TimeoutError:
            if self._silent_since is None:
                self._silent_since = asked_at
            return None
        finally:
            self._collecting.pop(number, None)

    @property
    def silent_s(self) -> float:
        """For how long it owes an answer to :meth:`collect`, seconds."""
        return 0.0 if self._silent_since is None else time.monotonic() - self._silent_since

    def kill(self) -> None:
        """End it at once."""
        self.is_expected_to_end = True
        self.abort()

    def abort(self) -> None:
        """End it at once, as a crash: its supervisor starts another one."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def end(self, seconds: float) -> None:
        """Drain it, and kill it when it has not ended in time."""
        if self.is_running:
            self.drain()
            try:
                await asyncio.wait_for(self.ended.wait(), seconds)
            except TimeoutError:
                self.kill()
        await asyncio.wait_for(self.ended.wait(), KILL_SECONDS)
