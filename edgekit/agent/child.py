"""The supervisor's side of a worker: start it, follow it, ask it, end it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgekit.agent.board import Board, Page
from edgekit.agent.interpreter import module_command
from edgekit.agent.link import (
    Collect,
    Collected,
    Compare,
    Compared,
    Drain,
    Drained,
    Failed,
    Figures,
    Go,
    Labelled,
    NextSample,
    Ready,
    Sample,
    Sampled,
    Start,
    StatusAnswer,
    StatusRequest,
    TakeSample,
    ToSupervisor,
    ToWorker,
    pack_frame,
    read_to_supervisor,
)
from edgekit.agent.spare import ENVIRONMENT, SpareProcess, hand_over, take
from edgekit.agent.vitals import MEGA, rss_bytes
from edgekit.errors import ArtifactError, DeviceError, EdgekitError

logger = logging.getLogger(__name__)

COLLECT_SECONDS = 2.0
KILL_SECONDS = 5.0
WATCH_SECONDS = 0.05

StatusMaker = Callable[[], bytes]
FactTaker = Callable[[Labelled | Sampled], None]


class SelfTestFailed(Exception):  # noqa: N818 - the outcome of a test, caught by the updater
    """A worker could not load or prove a model (``model``, empty when nobody knows which).

    ``is_final``: trying again would not help.
    """

    def __init__(self, error: EdgekitError, *, is_final: bool, model: str = "") -> None:
        super().__init__(error.message)
        self.error = error
        self.is_final = is_final
        self.model = model


async def _run_worker(
    arguments: Sequence[str], descriptors: Sequence[int], *, is_empty: bool
) -> asyncio.subprocess.Process | SpareProcess:
    """A worker's process: the one that was started in advance, if it waits and there is a model for it, or a new one.

    In the arguments ``{0}`` stands for the first descriptor, and so on.
    """
    waiting = None if is_empty else take()
    if waiting is not None and (process := hand_over(waiting, arguments, descriptors)) is not None:
        return process
    return await asyncio.create_subprocess_exec(
        *module_command("edgekit.agent.worker_process", *(text.format(*descriptors) for text in arguments)),
        stdin=asyncio.subprocess.DEVNULL,
        pass_fds=tuple(descriptors),
        env=ENVIRONMENT | dict(os.environ),
    )


@dataclass
class WorkerProcess:
    """One worker. ``board`` says what each of its models is doing, in the order of ``start.models``."""

    process: asyncio.subprocess.Process | SpareProcess
    start: Start
    make_status: StatusMaker
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    board: Board
    ready: asyncio.Future[Ready] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    requests: int = 0
    errors: int = 0
    leftover: list[Figures] = field(default_factory=list)
    """Figures that nobody waited for: the last ones, and answers that came late."""
    is_expected_to_end: bool = False
    on_fact: FactTaker = lambda _fact: None
    """Takes labels and samples, which are messages of their own."""
    _collecting: dict[int, asyncio.Future[tuple[Figures, ...]]] = field(default_factory=dict)
    _samples: dict[str, asyncio.Future[Sample]] = field(default_factory=dict)
    _compared: asyncio.Future[Compared] | None = None
    _next_id: int = 0
    _silent_since: float | None = None
    _collected: tuple[int, int] = (0, 0)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @classmethod
    async def spawn(cls, listeners: Sequence[socket.socket], start: Start, make_status: StatusMaker) -> WorkerProcess:
        """Start a worker that loads what ``start`` says and waits for :meth:`go`."""
        ours, theirs = socket.socketpair()
        board = Board.create(len(start.models))
        descriptors = (theirs.fileno(), board.descriptor, *(listener.fileno() for listener in listeners))
        listen = (f"{{{number}}}" for number in range(2, len(descriptors)))
        arguments = ("--link", "{0}", "--listen", *listen, "--board", "{1}", str(len(start.models)))
        try:
            process = await _run_worker(arguments, descriptors, is_empty=not start.models)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            board.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        worker = cls(process, start, make_status, reader, writer, board)
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
        return ", ".join(model.label for model in self.start.models) or "no model"

    def page(self, model: str) -> Page | None:
        """A model's page on the board; None when it is not here."""
        names = [each.name for each in self.start.models]
        return self.board.page(names.index(model)) if model in names else None

    @property
    def suspects(self) -> tuple[str, ...]:
        """The models that were at work in the worker's last moment."""
        return tuple(self.start.models[number].name for number in self.board.running())

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

    def _take(self, frame: ToSupervisor) -> None:  # noqa: C901, PLR0912 - one case a frame
        match frame:
            case Ready():
                if not self.ready.done():
                    self.ready.set_result(frame)
            case Failed(code=code, message=message, is_final=is_final, model=model):
                self.is_expected_to_end = True
                self._fail(ArtifactError(code, message), is_final=is_final, model=model)
            case Collected(id=number, figures=figures):
                self._count(figures)
                self._silent_since = None
                if (future := self._collecting.pop(number, None)) and not future.done():
                    future.set_result(figures)
                else:
                    self.leftover += figures
            case Sample(model=model):
                if (waiting := self._samples.pop(model, None)) and not waiting.done():
                    waiting.set_result(frame)
            case Compared():
                if self._compared is not None and not self._compared.done():
                    self._compared.set_result(frame)
            case Labelled() | Sampled():
                self.on_fact(frame)
            case StatusRequest(id=number, requests=requests, errors=errors):
                self.requests, self.errors = requests, errors
                self._send(StatusAnswer(id=number, body=self.make_status()))
            case Drained(figures=figures):
                self._count(figures)
                self.leftover += figures

    def _count(self, figures: Sequence[Figures]) -> None:
        requests, errors = sum(each.requests for each in figures), sum(each.errors for each in figures)
        self._collected = (self._collected[0] + requests, self._collected[1] + errors)
        self.requests, self.errors = max(self.requests, self._collected[0]), max(self.errors, self._collected[1])

    def _fail(self, error: EdgekitError, *, is_final: bool, model: str) -> None:
        if not self.ready.done():
            self.ready.set_exception(SelfTestFailed(error, is_final=is_final, model=model))
        for sample in self._samples.values():
            sample.cancel()

    async def _watch(self) -> None:
        code = await self.process.wait()
        await asyncio.wait([self._tasks[0]], timeout=1.0)
        ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        # SIGKILL comes from outside (the kernel short of memory, an operator): it proves nothing about the model.
        self._fail(
            DeviceError("selftest.crashed", f"{self.name}: the process died while loading or testing the model: {ending}."),
            is_final=code != -signal.SIGKILL,
            model=next(iter(self.suspects), ""),
        )
        self.writer.close()
        self.ended.set()

    async def wait_ready(self, seconds: float, *, ram_mb: float = 0.0, is_ram_final: bool = True) -> Ready:
        """Wait for the self-test's end.

        Args:
            seconds: how long.
            ram_mb: what the process may take meanwhile; 0 for no limit.
            is_ram_final: whether taking more refuses the model for good.

        Raises:
            SelfTestFailed: when it did not pass, did not end in time, took too much memory, or the process died.
        """
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            step = min(left, WATCH_SECONDS) if ram_mb else left
            with contextlib.suppress(TimeoutError):
                ready = await asyncio.wait_for(asyncio.shield(self.ready), max(0.0, step))
                if ram_mb and ready.peak_rss_mb > ram_mb:
                    raise self._too_large(ready.peak_rss_mb, ram_mb, is_final=is_ram_final)
                return ready
            if ram_mb and (used := rss_bytes(self.pid) / MEGA) > ram_mb:
                raise self._too_large(used, ram_mb, is_final=is_ram_final)
            if time.monotonic() >= deadline:
                self.kill()
                error = DeviceError("selftest.timeout", f"{self.name}: the self-test did not end within {seconds:g} s.")
                raise SelfTestFailed(error, is_final=True, model=next(iter(self.suspects), "")) from None

    def _too_large(self, used_mb: float, limit_mb: float, *, is_final: bool) -> SelfTestFailed:
        self.kill()
        text = f"{self.name}: the self-test took {used_mb:.0f} MB of memory, at most {limit_mb:.0f} MB are allowed."
        error = DeviceError("selftest.memory", text, hint="Raise [selftest] ram_limit_mb, or publish a smaller variant.")
        return SelfTestFailed(error, is_final=is_final, model=next(iter(self.suspects), ""))

    async def next_sample(self, model: str, seconds: float) -> Sample | None:
        """The next answer of a model with its input; None when none came in time."""
        future: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        self._samples[model] = future
        self._send(NextSample(model=model))
        try:
            return await asyncio.wait_for(future, seconds)
        except (TimeoutError, asyncio.CancelledError):
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            return None
        finally:
            self._samples.pop(model, None)

    async def compare(self, asked: Compare, seconds: float) -> Compared | None:
        """How this worker's model answers an input; None when it did not in time, or died."""
        answer: asyncio.Future[Compared] = asyncio.get_running_loop().create_future()
        ended = asyncio.ensure_future(self.ended.wait())
        self._compared = answer
        self._send(asked)
        try:
            waits: set[asyncio.Future[Any]] = {answer, ended}
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else None
        finally:
            ended.cancel()
            self._compared = None

    def take_sample(self, wanted: TakeSample) -> None:
        """Let it give one of its next inputs."""
        self._send(wanted)

    def go(self) -> None:
        """Let it accept connections."""
        self._send(Go())

    def drain(self) -> None:
        """Let it finish what it has and end."""
        self.is_expected_to_end = True
        self._send(Drain())

    async def collect(self) -> tuple[Figures, ...] | None:
        """Its figures since the last time; None when it does not answer."""
        self._next_id += 1
        number, asked_at = self._next_id, time.monotonic()
        future: asyncio.Future[tuple[Figures, ...]] = asyncio.get_running_loop().create_future()
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
