"""A fleet of simulated devices in one process: who is due, who connects when, what it all came to.

>>> simulation = Simulation(options, book, address)     # doctest: +SKIP
>>> summary = asyncio.run(simulation.run())             # doctest: +SKIP
>>> summary.acknowledged == summary.sent                # doctest: +SKIP
True
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING

from edgekit.errors import EnvironmentFault
from edgekit.fleet.simulator.behaviour import SimulatedDevice, Story
from edgekit.fleet.simulator.ledger import Ledger, LedgerLine
from edgekit.fleet.simulator.options import SimulatorOptions, check_options
from edgekit.fleet.simulator.releases import ReleaseBook
from edgekit.fleet.simulator.wire import Counters, DeviceLink, Shared
from edgekit.schema.base import Record
from edgekit.trust.keys import PublicKey

if TYPE_CHECKING:
    from edgekit.fleet.config import BrokerAddress

TICK_S = 0.02
SPARE_FILES = 200
DRAIN_S = 30.0
ABSENT_S = 3.0
"""How long the end waits for a broker that is not there."""
KEEP_ALIVE_TICKS = 250


class Progress(Record, frozen=True, kw_only=True):
    """How it stands now. ``waiting`` counts what devices have not sent yet, those that are away among them."""

    elapsed_s: float
    devices: int
    connected: int
    sent: int
    acknowledged: int
    windows: int
    in_flight: int
    waiting: int
    lost_connections: int
    unheard: int
    behind_s: float
    """How late the simulation is; more than a moment means that this machine is too slow for it."""
    last_error: str = ""


class Summary(Record, frozen=True, kw_only=True):
    """What a simulation came to.

    ``unacknowledged`` is what devices had sent, or wanted to, and could not confirm when it ended; ``kept`` is the same of
    devices that were away.
    """

    devices: int
    elapsed_s: float
    connect_s: float
    """Until everyone who wanted to was connected for the first time; 0: never."""
    connects: int
    lost_connections: int
    sent: int
    resent: int
    acknowledged: int
    unacknowledged: int
    kept: int
    windows: int
    heartbeats: int
    unheard: int
    rejected: int
    sent_bytes: int
    desired: int
    installed: int
    committed: int
    refused: int
    rolled_back: int
    ignored: int
    dropped: int
    merged: int
    cpu_s: float
    max_rss_mb: float
    behind_s: float
    last_error: str = ""


def allow_connections(count: int) -> None:
    """Let this process have so many sockets.

    Raises:
        EnvironmentFault: ``limit.files``, saying what to set.
    """
    needed = count + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise EnvironmentFault(
            "limit.files",
            f"{count} connections need {needed} open files; this process may have {hard}.",
            hint=f'Run "ulimit -Hn {needed}" as root before, set LimitNOFILE={needed}, or share them among --processes.',
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@dataclass
class Simulation:
    """Used from one event loop."""

    options: SimulatorOptions
    book: ReleaseBook
    address: BrokerAddress
    keys: Sequence[PublicKey] = ()
    run_name: str = ""
    """Makes this run's messages differ from another's with the same seed; the start's time by default."""
    on_progress: Callable[[Progress], None] = lambda _progress: None
    progress_s: float = 1.0
    with_ledger: bool = False
    devices: list[SimulatedDevice] = field(default_factory=list)
    _links: list[DeviceLink] = field(default_factory=list)
    _due: list[tuple[int, int]] = field(default_factory=list)
    _scheduled: list[int] = field(default_factory=list)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _started: int = 0
    """Links that were told to connect."""
    _behind_s: float = 0.0
    _worst_behind_s: float = 0.0
    _connect_s: float = 0.0

    def __post_init__(self) -> None:
        check_options(self.options)
        now_ms = time.time_ns() // 1_000_000
        ahead_ms = self.options.duration_s * 1000 * (1 - 1 / self.options.speed)
        self.start_ms = now_ms - round(max(0.0, ahead_ms))  # an accelerated run ends about now
        self._began = time.monotonic()
        run_name = self.run_name or str(time.time_ns())
        first = self.options.first
        self.devices = [
            SimulatedDevice(self.options, number, self.book, start_ms=self.start_ms, keys=self.keys, run=run_name)
            for number in range(first, first + self.options.devices)
        ]
        self.shared = Shared(
            address=self.address,
            context=self.address.tls_context(),
            ledger=Ledger() if self.with_ledger else None,
            clock_ms=self.clock_ms,
            on_heard=self._reschedule,
        )
        self._links = [DeviceLink(device, self.shared) for device in self.devices]
        self._scheduled = [2**62] * len(self.devices)

    @property
    def counters(self) -> Counters:
        """What the connections did."""
        return self.shared.counters

    def clock_ms(self) -> int:
        """The simulation's time."""
        return self.start_ms + round((time.monotonic() - self._began) * 1000 * self.options.speed)

    def stop(self) -> None:
        """End it soon."""
        self._stop.set()

    def _reschedule(self, device: SimulatedDevice) -> None:
        place = device.number - self.options.first
        if device.next_ms < self._scheduled[place]:
            self._scheduled[place] = device.next_ms
            heapq.heappush(self._due, (device.next_ms, place))

    async def run(self) -> Summary:
        """Connect, act, and end: after ``duration_s`` of simulated time, or when :meth:`stop` is called.

        Raises:
            EnvironmentFault: ``limit.files``.
        """
        allow_connections(self.options.devices)
        self._began = time.monotonic()
        for device in self.devices:
            self._reschedule(device)
        starter = asyncio.ensure_future(self._start_links())
        reporter = asyncio.ensure_future(self._tell())
        try:
            await self._act()
        finally:
            starter.cancel()
            await self._drain()
            reporter.cancel()
            for task in (starter, reporter):
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            self._leave()
            await asyncio.sleep(0.2)
        return self.summary()

    async def _start_links(self) -> None:
        """Connect them all, not faster than asked."""
        each, began = 1 / self.options.connects_per_s, time.monotonic()
        for number, link in enumerate(self._links):
            wait = began + number * each - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            link.update()
            self._started = number + 1
        while True:
            wanted = sum(device.is_wanted_online for device in self.devices)
            if self.counters.connected >= wanted and not self._connect_s:
                self._connect_s = time.monotonic() - began
                return
            await asyncio.sleep(0.05)

    async def _act(self) -> None:
        """Let every device do what is due, until the end."""
        ticks, end_ms = 0, self.start_ms + round(self.options.duration_s * 1000) if self.options.duration_s else 2**62
        while not self._stop.is_set() and self.clock_ms() < end_ms:
            self._step_due(min(self.clock_ms(), end_ms))
            ticks += 1
            if ticks % KEEP_ALIVE_TICKS == 0:
                now = asyncio.get_running_loop().time()
                for link in self._links:
                    link.keep_alive(now)
            await asyncio.sleep(TICK_S)
        while not self._stop.is_set() and self._due and self._due[0][0] <= end_ms:
            self._step_due(end_ms)
            await asyncio.sleep(0)

    def _step_due(self, now_ms: int) -> None:
        began = time.monotonic()
        oldest = self._due[0][0] if self._due else now_ms
        self._behind_s = max(0.0, (now_ms - oldest) / 1000 / self.options.speed)
        self._worst_behind_s = max(self._worst_behind_s, self._behind_s)
        while self._due and self._due[0][0] <= now_ms:
            due_ms, place = heapq.heappop(self._due)
            if self._scheduled[place] != due_ms:
                continue
            device = self.devices[place]
            device.step(now_ms)
            self._scheduled[place] = device.next_ms
            heapq.heappush(self._due, (device.next_ms, place))
            if place < self._started:
                self._links[place].update()
            if time.monotonic() - began > 5 * TICK_S:  # the sockets want their turn
                return

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(self.progress_s)
            self.on_progress(self.progress())

    async def _drain(self) -> None:
        """Let what is there be acknowledged."""
        began = time.monotonic()
        while time.monotonic() - began < (DRAIN_S if self.counters.connected else ABSENT_S):
            for link in self._links:
                if link.is_connected and link.device.waiting:
                    link.pump()
            is_busy = any(link.device.is_wanted_online and (link.in_flight or link.device.waiting) for link in self._links)
            if not is_busy:
                return
            await asyncio.sleep(0.05)

    def _leave(self) -> None:
        self.shared.is_stopping = True
        for link in self._links:
            link.leave()

    def progress(self) -> Progress:
        """How it stands now."""
        counters = self.counters
        return Progress(
            elapsed_s=time.monotonic() - self._began,
            devices=len(self.devices),
            connected=counters.connected,
            sent=counters.sent,
            acknowledged=counters.acknowledged,
            windows=counters.windows,
            in_flight=counters.in_flight,
            waiting=sum(device.waiting for device in self.devices),
            lost_connections=counters.lost_connections,
            unheard=counters.unheard,
            behind_s=self._behind_s,
            last_error=counters.last_error,
        )

    def summary(self) -> Summary:
        """What it came to."""
        counters, usage = self.counters, resource.getrusage(resource.RUSAGE_SELF)
        stories = {name.name: sum(getattr(device.story, name.name) for device in self.devices) for name in fields(Story)}
        told = asdict(counters)
        kept = (
            "connects",
            "lost_connections",
            "sent",
            "resent",
            "acknowledged",
            "windows",
            "heartbeats",
            "unheard",
            "rejected",
        )
        return Summary(
            devices=len(self.devices),
            elapsed_s=time.monotonic() - self._began,
            connect_s=self._connect_s,
            unacknowledged=sum(link.in_flight for link in self._links)
            + sum(d.waiting for d in self.devices if d.is_wanted_online),
            kept=sum(device.waiting for device in self.devices if not device.is_wanted_online),
            cpu_s=usage.ru_utime + usage.ru_stime,
            max_rss_mb=usage.ru_maxrss / 1000,
            behind_s=self._worst_behind_s,
            sent_bytes=counters.sent_bytes,
            desired=counters.desired,
            last_error=counters.last_error,
            **{name: told[name] for name in kept},
            **stories,
        )

    @property
    def ledger(self) -> tuple[LedgerLine, ...]:
        """What was sent, if a ledger is kept."""
        return self.shared.ledger.lines if self.shared.ledger is not None else ()
