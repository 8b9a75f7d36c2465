"""A simulation as one process or several, with progress on the way and a clean end on Ctrl-C.

Each process has a part of the devices and an event loop of its own. The first Ctrl-C lets what is on its way be acknowledged
and says goodbye for every device; the second ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from edgekit.errors import EdgekitError, EnvironmentFault
from edgekit.fleet.simulator.ledger import LedgerLine
from edgekit.fleet.simulator.options import SimulatorOptions
from edgekit.fleet.simulator.releases import ReleaseBook
from edgekit.fleet.simulator.simulation import Progress, Simulation, Summary
from edgekit.trust.keys import PublicKey

if TYPE_CHECKING:
    from edgekit.fleet.config import BrokerAddress

R = TypeVar("R", Progress, Summary)
Tell = Callable[[Progress], None]
_LARGEST = frozenset({"elapsed_s", "connect_s", "behind_s"})
"""Figures of which the largest of all processes counts; the others add up."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a process needs."""

    options: SimulatorOptions
    book: ReleaseBook
    address: BrokerAddress
    keys: tuple[PublicKey, ...] = ()
    with_ledger: bool = False
    run_name: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What it came to, and what was sent where a ledger was asked for."""

    summary: Summary
    ledger: tuple[LedgerLine, ...]


def run(job: Job, *, processes: int = 1, tell: Tell = lambda _progress: None) -> Outcome:
    """Simulate until the end, or until Ctrl-C.

    Args:
        job: what to simulate.
        processes: among how many the devices are shared.
        tell: hears how it stands, once a second.

    Raises:
        EnvironmentFault: ``limit.files``, or ``simulator.process`` when one of several ended by itself.
        UsageError: the options make no sense.
    """
    job = job if job.run_name else _named(job)
    return _run_here(job, tell) if processes <= 1 else _run_many(job, processes, tell)


def _named(job: Job) -> Job:
    return Job(
        options=job.options,
        book=job.book,
        address=job.address,
        keys=job.keys,
        with_ledger=job.with_ledger,
        run_name=str(time.time_ns()),
    )


def _run_here(job: Job, tell: Tell, *, stopper: Connection | None = None) -> Outcome:
    async def whole() -> Outcome:
        simulation = Simulation(
            job.options,
            job.book,
            job.address,
            keys=job.keys,
            run_name=job.run_name,
            with_ledger=job.with_ledger,
            on_progress=tell,
        )
        loop = asyncio.get_running_loop()
        if stopper is not None:
            loop.add_reader(stopper.fileno(), simulation.stop)
        else:
            _stop_on_signals(loop, simulation)
        summary = await simulation.run()
        return Outcome(summary=summary, ledger=simulation.ledger)

    return asyncio.run(whole())


def _stop_on_signals(loop: asyncio.AbstractEventLoop, simulation: Simulation) -> None:
    def stop() -> None:
        simulation.stop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread
            loop.add_signal_handler(number, stop)


def _child(job: Job, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outcome: Any = _run_here(job, pipe.send, stopper=pipe)
    except EdgekitError as error:
        outcome = error
    pipe.send(outcome)


def split(options: SimulatorOptions, processes: int) -> list[SimulatorOptions]:
    """The same fleet in parts, one a process."""
    parts, first = [], options.first
    for number in range(processes):
        count = options.devices * (number + 1) // processes - options.devices * number // processes
        rate = max(1.0, options.connects_per_s / processes)
        parts.append(msgspec.structs.replace(options, first=first, devices=count, connects_per_s=rate))
        first += count
    return [part for part in parts if part.devices]


def _run_many(job: Job, processes: int, tell: Tell) -> Outcome:
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, Any] = {}
    for options in split(job.options, processes):
        ours, theirs = context.Pipe()
        part = Job(**{**vars(job), "options": options})
        process = context.Process(target=_child, args=(part, theirs), daemon=True)
        process.start()
        theirs.close()
        running[ours] = process
    try:
        return _gather(running, tell)
    finally:
        for process in running.values():
            process.join(5)
            if process.is_alive():
                process.kill()


def _gather(running: dict[Connection, Any], tell: Tell) -> Outcome:
    newest: dict[Connection, Progress] = {}
    done: dict[Connection, Outcome] = {}
    failure: EdgekitError | None = None
    is_stopping = False
    while len(done) < len(running) and failure is None:
        try:
            ready = wait([pipe for pipe in running if pipe not in done], timeout=1.0)
            for pipe in ready:
                assert isinstance(pipe, Connection)
                match _receive(pipe):
                    case Progress() as progress:
                        newest[pipe] = progress
                    case Outcome() as outcome:
                        done[pipe] = outcome
                    case EdgekitError() as error:
                        failure = error
            if ready and len(newest) == len(running):
                tell(add_records(list(newest.values())))
                newest.clear()
        except KeyboardInterrupt:
            if is_stopping:
                raise
            is_stopping = True
            _stop_all(running)
    if failure is not None:
        _stop_all(running)
        raise failure
    outcomes = list(done.values())
    return Outcome(
        summary=add_records([outcome.summary for outcome in outcomes]),
        ledger=tuple(line for outcome in outcomes for line in outcome.ledger),
    )


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError as error:
        raise EnvironmentFault("simulator.process", "one of the simulator's processes ended by itself.") from error


def _stop_all(running: dict[Connection, Any]) -> None:
    for pipe in running:
        with contextlib.suppress(OSError):
            pipe.send("stop")


def add_records(records: Sequence[R]) -> R:
    """The figures of several processes as one."""
    first = records[0]
    found: dict[str, Any] = {}
    for name in first.__struct_fields__:
        values = [getattr(record, name) for record in records]
        if isinstance(values[0], str):
            found[name] = next(filter(None, values), "")
        else:
            found[name] = max(values) if name in _LARGEST else sum(values)
    return type(first)(**found)
