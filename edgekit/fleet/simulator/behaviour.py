"""One simulated device: what it does and says, as a function of time and of what it hears. No socket, no clock, no file.

It keeps the agent's rules: a birth first on each connection, every stored message with the next number of its boot, windows
kept while there is no connection and merged by ten before they become too many, a desired state obeyed only with the fleet's
signature, and the life of a release: found, fetched, tested, on probation, committed or taken back. Which faults it has follows
from the seed and its number; what it draws for its figures, too.

    >>> device = SimulatedDevice(SimulatorOptions(), 0, book, start_ms=now_ms)  # doctest: +SKIP
    >>> device.connected(now_ms)                                                # doctest: +SKIP
    >>> device.next_message(now_ms).verb                                        # doctest: +SKIP
    'status'
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

import numpy as np

from edgekit.errors import EdgekitError
from edgekit.fleet.simulator.machine import DAY_MS, draw_latencies, make_machine
from edgekit.fleet.simulator.options import Shift, SimulatorOptions
from edgekit.fleet.simulator.population import Floats, Population, Trait
from edgekit.fleet.simulator.releases import ReleaseBook, SimulatedRelease
from edgekit.schema.desired import DesiredState
from edgekit.schema.message import (
    Birth,
    ClockSource,
    Death,
    Event,
    EventKind,
    Heartbeat,
    InputSample,
    Label,
    MetricSpec,
    ModelWindow,
    Reported,
    SampleTensor,
    SketchSpec,
    SlotReport,
    Window,
    WindowBatch,
)
from edgekit.telemetry.codec import compress, encode, pack_values, schema_crc
from edgekit.telemetry.histogram import BINS, LatencyHistogram
from edgekit.telemetry.topics import Verb
from edgekit.trust.desired import verify_desired
from edgekit.trust.keys import PublicKey

METRICS: tuple[MetricSpec, ...] = (
    MetricSpec(name="requests", kind="count"),
    MetricSpec(name="errors", kind="count"),
    MetricSpec(name="rejected", kind="count"),
    MetricSpec(name="samples", kind="count"),
    MetricSpec(name="out_of_range", kind="count"),
    MetricSpec(name="latency_p50_ms", unit="ms", kind="quantile"),
    MetricSpec(name="latency_p90_ms", unit="ms", kind="quantile"),
    MetricSpec(name="latency_p99_ms", unit="ms", kind="quantile"),
    MetricSpec(name="inference_p50_ms", unit="ms", kind="quantile"),
    MetricSpec(name="queue_p99_ms", unit="ms", kind="quantile"),
    MetricSpec(name="confidence_mean"),
    MetricSpec(name="cpu_percent", unit="%"),
    MetricSpec(name="rss_mb", unit="MB"),
    MetricSpec(name="load_1m"),
    MetricSpec(name="temperature_c", unit="°C"),
    MetricSpec(name="disk_free_mb", unit="MB"),
    MetricSpec(name="memory_free_mb", unit="MB"),
    MetricSpec(name="outbox_messages"),
    MetricSpec(name="outbox_bytes", unit="B"),
    MetricSpec(name="worker_restarts"),
    MetricSpec(name="uptime_s", unit="s"),
)
"""As the agent's (edgekit.agent.windows), which the fleet may not import; a test compares them."""
SKETCHES: tuple[SketchSpec, ...] = (
    SketchSpec(name="latency_ms", unit="ms", bins=BINS),
    SketchSpec(name="inference_ms", unit="ms", bins=BINS),
)
SCHEMA = schema_crc(METRICS, SKETCHES)
AGENT_VERSION = "0.1.0"
BATCH_WINDOWS = 30
KEEP_FINE = 30
"""So many of the newest windows are never merged."""
MERGED = 10
FULL_WINDOWS = 10
TAKEN_BACK = "desired.taken_back"
SAMPLE_EACH = 10
LABEL_EACH = 20
CRASH_S = 600.0
MIDDLING_MS = 10.0
"""The latency of a middling device."""
SHORT_SPELLS = 0.75
"""Share of the times away that end within a quarter of an hour."""
ERROR_SHARE = 0.0005
BOOT_BITS = 63
MINUTE_MS = 60_000
Kind = Literal["birth", "rep", "ev", "w", "lb", "x", "hb"]
Fate = Literal["good", "fail", "rollback", "silent", "dark"]
_VERBS: dict[Kind, Verb] = {"birth": "status", "rep": "rep", "ev": "ev", "w": "w", "lb": "lb", "x": "x", "hb": "hb"}


class Outgoing(NamedTuple):
    """A message that waits to be published, with the numbers by which it is found again in a database."""

    kind: Kind
    payload: bytes
    boot: int
    seqs: tuple[int, ...]
    """Of the windows in it, or its own."""
    requests: int = 0
    covers: tuple[int, ...] = ()
    """Ranges that merged windows stand for, first and last."""

    @property
    def verb(self) -> Verb:
        """The topic's last level."""
        return _VERBS[self.kind]

    @property
    def is_retained(self) -> bool:
        """Whether the broker keeps it."""
        return self.kind in {"birth", "rep"}

    @property
    def qos(self) -> int:
        """Only signs of life may be lost."""
        return 0 if self.kind == "hb" else 1


class _Kept(NamedTuple):
    """A window that has passed and was not sent: its figures are drawn when it is."""

    boot: int
    seq: int
    start_ms: int
    duration_ms: int
    release: SimulatedRelease
    ranges: tuple[int, ...] = ()


@dataclass
class _Job:
    """A release on its way in."""

    release: SimulatedRelease
    fate: Fate
    stage: Literal["waiting", "fetching", "testing", "probation"] = "waiting"


@dataclass
class Story:
    """What a device went through, for tests and summaries."""

    installed: int = 0
    committed: int = 0
    refused: int = 0
    rolled_back: int = 0
    ignored: int = 0
    dropped: int = 0
    merged: int = 0


class SimulatedDevice:
    """See the module. Times are the simulation's, Unix milliseconds; :meth:`step` is due at :attr:`next_ms`."""

    def __init__(
        self,
        options: SimulatorOptions,
        number: int,
        book: ReleaseBook,
        *,
        start_ms: int,
        keys: Sequence[PublicKey] = (),
        run: str = "",
    ) -> None:
        """Make a device that has been running its release for a while.

        Args:
            options: of the simulation.
            number: which device of the fleet.
            book: the releases there are.
            start_ms: when the simulation begins.
            keys: whose desired states it obeys; without any it obeys none.
            run: makes this run's boots differ from another's with the same seed.
        """
        self.options, self.number, self.book, self.keys = options, number, book, tuple(keys)
        site = number % options.sites
        self.site, self.name = f"site-{site + 1:02d}", f"{options.prefix}-{number:06d}"
        self._run = run or str(start_ms)
        self.start_ms = start_ms
        faults = options.faults
        self._has = {name: self.draw(name) < getattr(faults, name) for name in _OWN_FAULTS}
        self.machine = make_machine(self.draw, site=site, is_slow=self._has["slow"], link_bytes_per_s=options.link_bytes_per_s)
        self._rng = np.random.default_rng([options.seed, number])
        self.release = book.first
        self.slots: dict[str, SlotReport] = {"a": _slot("a", "active", book.first), "b": SlotReport(name="b", status="empty")}
        self.active = "a"
        self.refused: tuple[str, ...] = ()
        self.desired_seq = 0
        self.is_powered = True
        self.is_away = False
        self.restarts = 0
        """Grows with each new boot: the connection of the former one is gone."""
        self.story = Story()
        self.boot, self.seq, self._booted_ms = self._new_boot(), 0, start_ms - int(self.draw("uptime") * 3 * DAY_MS)
        self._queue: deque[Outgoing] = deque()
        self._first: deque[Outgoing] = deque()
        self._windows: deque[_Kept] = deque()
        self._agenda: list[tuple[int, int, Callable[[int], None]]] = []
        self._order = 0
        self._job: _Job | None = None
        self._wanted: tuple[int, SimulatedRelease] | None = None
        self._error = ("", "")
        self._seen = b""
        self._worker_restarts = 0
        self._window_ms = start_ms
        self._window_number = 0
        self._clock_ms = 0
        self._clock: ClockSource = "ntp"
        self._traits: dict[int, Trait] = {}
        self._shares: tuple[tuple[int, float], list[Floats], Floats] | None = None
        self._begin()

    # what is fixed

    def draw(self, what: str) -> float:
        """A number in [0, 1) that this device always draws for this name."""
        digest = hashlib.blake2b(f"{self.options.seed}/{self.number}/{what}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    def _new_boot(self) -> int:
        text = f"{self.options.seed}/{self._run}/{self.number}/{self.restarts}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> (64 - BOOT_BITS) | 1

    def fate(self, manifest: str) -> Fate:
        """What a release comes to on this device; what it ran before the simulation began is good."""
        if not self._is_faulty(manifest):
            return "good"
        place, faults = self.draw(f"release/{manifest}"), self.options.faults
        for name, share in (
            ("silent", faults.silent),
            ("fail", faults.fail),
            ("rollback", faults.rollback),
            ("dark", faults.dark),
        ):
            if place < share:
                return name  # type: ignore[return-value]
            place -= share
        return "good"

    def _is_faulty(self, manifest: str) -> bool:
        """Whether the faults of releases are about this one."""
        faulty = self.options.faulty
        return self.book.label_of(manifest) in faulty if faulty else manifest != self.book.first.manifest

    @property
    def labels(self) -> dict[str, str]:
        """As an installer would set them."""
        return {"hardware": self.machine.kind.name, "ring": "early" if self.draw("ring") < 0.1 else "late"}

    @property
    def will(self) -> bytes:
        """What the broker says when the connection is lost."""
        return encode(Death(boot=self.boot))

    # time

    @property
    def next_ms(self) -> int:
        """When something happens next."""
        return self._agenda[0][0] if self._agenda else 2**62

    @property
    def is_wanted_online(self) -> bool:
        """Whether it would be connected now, if it could."""
        return self.is_powered and not self.is_away

    def _after(self, now_ms: int, seconds: float, what: Callable[[int], None]) -> None:
        self._order += 1
        heapq.heappush(self._agenda, (now_ms + max(1, round(seconds * 1000)), self._order, what))

    def step(self, now_ms: int) -> None:
        """Let everything happen that is due."""
        while self._agenda and self._agenda[0][0] <= now_ms:
            due_ms, _, what = heapq.heappop(self._agenda)
            if self.is_powered:
                what(due_ms)

    def _begin(self) -> None:
        start, options = self.start_ms, self.options
        self._event(start, "agent_started", f"edgekit {AGENT_VERSION}, simulated")
        self._report(start)
        first = self.draw("phase") * options.telemetry_s
        self._window_ms = start - round((options.telemetry_s - first) * 1000)
        self._after(start, first, self._end_window)
        self._after(start, self.draw("beat") * options.heartbeat_s, self._beat)
        if self._has["offline"] or self._has["full"]:
            self._after(start, 60 + 300 * self.draw("away/0"), self._go_away)
        if self._has["crashloop"]:
            self._after(start, CRASH_S * (0.2 + self.draw("crash")), self._crash)
        if self._has["clock"]:
            self._clock, self._clock_ms = "unsynced", -(start - MINUTE_MS)
            self._after(start, 60 + 240 * self.draw("clock/set"), self._set_clock)

    def _stamp(self, time_ms: int) -> int:
        """A time as this device's clock shows it."""
        return max(0, time_ms + self._clock_ms)

    # the connection

    def connected(self, now_ms: int) -> None:
        """The broker has accepted the connection: who it is goes first, unless a birth of this boot waits already."""
        if any(message.kind == "birth" and message.boot == self.boot for message in self._first):
            return
        birth = Birth(
            boot=self.boot,
            seq=self._next(),
            time_ms=self._stamp(now_ms),
            metrics=METRICS,
            sketches=SKETCHES,
            agent_version=AGENT_VERSION,
            runtime="onnxruntime",
            runtime_version="1.24.0",
            arch=self.machine.kind.arch,
            cpu=self.machine.kind.cpu,
            isa=self.machine.kind.isa,
            cores=self.machine.kind.cores,
            ram_mb=self.machine.kind.ram_mb,
            os="Debian GNU/Linux 12 (simulated)",
            clock=self._clock,
            labels=self.labels,
        )
        older = sum(message.boot != self.boot for message in self._first)
        self._first.insert(older, Outgoing("birth", encode(birth), self.boot, (birth.seq,)))

    def next_message(self, now_ms: int) -> Outgoing | None:
        """What goes out next: births and states, then events, labels and samples, then windows, oldest first."""
        if self._first:
            return self._first.popleft()
        if self._queue:
            return self._queue.popleft()
        if not self._windows:
            return None
        first = self._windows[0]
        is_late = now_ms - (first.start_ms + first.duration_ms) > 2000 * self.options.telemetry_s
        batch: list[_Kept] = []
        while self._windows and self._windows[0].boot == first.boot and len(batch) < (BATCH_WINDOWS if is_late else 1):
            batch.append(self._windows.popleft())
        return self._pack(batch, is_late=is_late)

    def give_back(self, messages: Sequence[Outgoing]) -> None:
        """Messages that were sent and not acknowledged before the connection was lost; they go again, in their order."""
        self._first.extendleft(reversed([message for message in messages if message.is_retained]))
        self._queue.extendleft(reversed([message for message in messages if not message.is_retained]))

    @property
    def waiting(self) -> int:
        """Messages and windows that were not handed out yet."""
        return len(self._first) + len(self._queue) + len(self._windows)

    def goodbye(self, now_ms: int) -> bytes:
        """The clean end."""
        return encode(Death(boot=self.boot, is_clean=True, time_ms=self._stamp(now_ms)))

    # saying

    def _next(self) -> int:
        self.seq += 1
        return self.seq

    def _event(
        self,
        now_ms: int,
        kind: EventKind,
        detail: str = "",
        *,
        code: str = "",
        release: SimulatedRelease | None = None,
        fields: Mapping[str, str | int | float | bool] | None = None,
    ) -> None:
        event = Event(
            boot=self.boot,
            seq=self._next(),
            time_ms=self._stamp(now_ms),
            kind=kind,
            detail=detail,
            code=code,
            model=release.model if release else "",
            version=release.version if release else "",
            counter=release.counter if release else 0,
            fields=dict(fields or {}),
        )
        self._queue.append(Outgoing("ev", encode(event), self.boot, (event.seq,)))

    def _report(self, now_ms: int) -> None:
        is_on_probation = self._job is not None and self._job.stage == "probation"
        reported = Reported(
            boot=self.boot,
            seq=self._next(),
            time_ms=self._stamp(now_ms),
            slots=tuple(self.slots.values()),
            active=self.active,
            last_error=self._error[1],
            last_error_code=self._error[0],
            refused=self.refused,
            desired_seq=self.desired_seq,
            probation=(self.release.model,) if is_on_probation else (),
        )
        self._first.append(Outgoing("rep", encode(reported), self.boot, (reported.seq,)))

    def _beat(self, now_ms: int) -> None:
        self._after(now_ms, self.options.heartbeat_s, self._beat)
        if self.is_wanted_online:
            beat = Heartbeat(boot=self.boot, seq=self.seq, time_ms=self._stamp(now_ms), outbox=self.waiting)
            self._queue.append(Outgoing("hb", encode(beat), self.boot, ()))

    # windows

    def _end_window(self, now_ms: int) -> None:
        self._after(now_ms, self.options.telemetry_s, self._end_window)
        start, self._window_ms = self._window_ms, now_ms
        self._window_number += 1
        self._windows.append(_Kept(self.boot, self._next(), start, max(1, now_ms - start), self.release))
        if self._has["crashloop"]:
            self._worker_restarts += 1
            self._event(now_ms, "worker_crashed", "signal SIGSEGV", code="worker.crashed", release=self.release)
        if self.is_away:
            self._make_room(now_ms)
        if self._window_number % LABEL_EACH == self.number % LABEL_EACH:
            self._label(now_ms)
        if self.draw("sampling") < self.options.sampling and self._window_number % SAMPLE_EACH == 0:
            self._sample(now_ms)

    def _make_room(self, now_ms: int) -> None:
        """The spool is small: the oldest windows become one of ten, or are given up."""
        if self._has["full"]:
            self._give_up(now_ms)
        elif len(self._windows) > KEEP_FINE + MERGED:
            fine = [place for place, window in enumerate(self._windows) if not window.ranges][:MERGED]
            parts = [self._windows[place] for place in fine]
            if len(parts) == MERGED and len({(part.boot, part.release.manifest) for part in parts}) == 1:
                merged = _merge(parts)
                rest = [window for place, window in enumerate(self._windows) if place not in fine]
                rest.insert(fine[0], merged)
                self._windows = deque(rest)
                self.story.merged += len(parts)

    def _give_up(self, now_ms: int) -> None:
        gone = []
        while len(self._windows) > FULL_WINDOWS:
            gone.append(self._windows.popleft())
        for boot in dict.fromkeys(window.boot for window in gone):
            seqs = [window.seq for window in gone if window.boot == boot]
            self.story.dropped += len(seqs)
            fields: dict[str, str | int | float | bool] = {
                "count": len(seqs),
                "boot": boot,
                "first_seq": seqs[0],
                "last_seq": seqs[-1],
                "kind": "w",
                "reason": "full",
                "ranges": ",".join(map(str, seqs)),
            }
            self._event(now_ms, "messages_dropped", f"{len(seqs)} messages were dropped: the spool is full", fields=fields)

    def _pack(self, kept: Sequence[_Kept], *, is_late: bool) -> Outgoing:
        windows, requests = [], 0
        covers: tuple[int, ...] = ()
        for each in kept:
            window, count = self._measure(each)
            windows.append(window)
            requests += count
            covers += window.merged
        batch = WindowBatch(boot=kept[0].boot, windows=tuple(windows), is_late=is_late, schema=SCHEMA)
        seqs = tuple(window.seq for window in windows)
        return Outgoing("w", compress(encode(batch)), kept[0].boot, seqs, requests, covers)

    def _measure(self, kept: _Kept) -> tuple[Window, int]:
        """The figures of a window, and how many requests it counts."""
        rng, options, middle_ms = self._rng, self.options, kept.start_ms + kept.duration_ms // 2
        seconds = kept.duration_ms / 1000
        rate = options.requests_per_s * (0.4 + 1.1 * self.machine.load(middle_ms))
        requests = int(rng.poisson(rate * seconds))
        population = self.book.population(kept.release)
        inputs, answers = self._distributions(population, middle_ms)
        parts = 1 + (len(kept.ranges) > 0) * (MERGED - 1)
        missing = int(self.draw("sensor/which") * population.inputs) if self._has["sensor"] else -1
        seen = population.observe(
            rng,
            inputs,
            answers,
            samples=min(requests, options.sketched * parts),
            labelled=options.labelled,
            concept=self._shift(options.faults.concept, "concept", middle_ms),
            missing_stream=missing,
        )
        median = self.machine.latency_ms(middle_ms) * self._regress(kept.release)
        latency = draw_latencies(rng, median + 0.4, requests)
        inference = draw_latencies(rng, median, requests)
        errors = int(rng.binomial(requests, ERROR_SHARE * (40 if self._has["crashloop"] else 1)))
        verdicts: dict[str, int] = {}
        if self._has["sensor"] and requests:
            name = [stream.name for stream in population.profile.streams if stream.kind != "classes"][missing]
            verdicts = {f"missing {name}": int(rng.binomial(requests, 0.33))}
        model = ModelWindow(
            model_digest=kept.release.short,
            profile=population.crc,
            requests=requests,
            samples=requests,
            sketched=seen.sketched,
            sketches=seen.sketches,
            errors=errors,
            verdicts=verdicts,
            labelled=seen.labelled,
            right=seen.right,
        )
        sketches = (latency.encode(), inference.encode())
        window = Window(
            seq=kept.seq,
            start_ms=self._stamp(kept.start_ms),
            duration_ms=kept.duration_ms,
            values=pack_values(self._values(middle_ms, model, latency, inference, seen.confidence)),
            model_digest=kept.release.short,
            sketches=sketches if any(sketches) else (),
            models=(model,) if requests else (),
            merged=kept.ranges,
        )
        return window, requests if window.models else 0

    def _values(
        self, time_ms: int, model: ModelWindow, latency: LatencyHistogram, inference: LatencyHistogram, confidence: float
    ) -> list[float]:
        """The metric vector, in the order of ``METRICS``."""
        kind, load, requests = self.machine.kind, self.machine.load(time_ms), model.requests
        return [
            float(requests),
            float(model.errors),
            0.0,
            float(requests),
            0.0,
            latency.quantile(0.5),
            latency.quantile(0.9),
            latency.quantile(0.99),
            inference.quantile(0.5),
            0.3 + 0.5 * load if requests else math.nan,
            confidence if requests else math.nan,
            min(100.0 * kind.cores, 5 + self.machine.latency_ms(time_ms) * self.options.requests_per_s * load / 10),
            118.0 + 40 * self.draw("rss"),
            0.2 + 1.5 * load,
            self.machine.temperature_c(time_ms),
            4000.0 + 20_000 * self.draw("disk"),
            kind.ram_mb * (0.3 + 0.3 * self.draw("memory")),
            float(self.waiting),
            600.0 * self.waiting,
            float(self._worker_restarts),
            max(0.0, (time_ms - self._booted_ms) / 1000),
        ]

    def _shift(self, shift: Shift | None, name: str, time_ms: int) -> float:
        """How far something has moved for this device at a time."""
        if shift is None or time_ms - self.start_ms < shift.after_s * 1000 or self.draw(f"{name}/has") >= shift.share:
            return 0.0
        return shift.size

    def _distributions(self, population: Population, time_ms: int) -> tuple[list[Floats], Floats]:
        shift = self._shift(self.options.faults.drift, "drift", time_ms)
        key = (population.crc, shift)
        if self._shares is None or self._shares[0] != key:
            trait = self._traits.get(population.inputs)
            if trait is None:
                trait = population.trait(np.random.default_rng([self.options.seed, self.number, population.inputs]))
                self._traits[population.inputs] = trait
            self._shares = key, population.input_shares(trait, shift), population.answer_shares(shift)
        return self._shares[1], self._shares[2]

    def _regress(self, release: SimulatedRelease) -> float:
        return 1.0 + self.options.faults.regress if self._is_faulty(release.manifest) else 1.0

    def _label(self, now_ms: int) -> None:
        population = self.book.population(self.release)
        _inputs, answers = self._distributions(population, now_ms)
        drawn = population.draw_answer(self._rng, answers, self._shift(self.options.faults.concept, "concept", now_ms))
        if drawn is None or not self.options.labelled:
            return
        label = Label(
            boot=self.boot,
            seq=self._next(),
            time_ms=self._stamp(now_ms),
            model_digest=self.release.short,
            prediction_id=f"{self.name}-{self.restarts}-{self.seq}",
            label=str(drawn.truth),
            predicted=str(drawn.predicted),
            confidence=drawn.confidence,
            is_counted=True,
        )
        self._queue.append(Outgoing("lb", encode(label), self.boot, (label.seq,)))

    def _sample(self, now_ms: int) -> None:
        population = self.book.population(self.release)
        inputs, answers = self._distributions(population, now_ms)
        row = population.draw_row(self._rng, inputs)
        drawn = population.draw_answer(self._rng, answers, 0.0)
        if row is None:
            return
        values = row[1].astype("<f4")
        tensor = SampleTensor(name=row[0], dtype="float32", shape=(1, values.size), data=values.tobytes())
        sample = InputSample(
            boot=self.boot,
            seq=self._next(),
            time_ms=self._stamp(now_ms),
            model_digest=self.release.short,
            prediction_id=f"{self.name}-{self.restarts}-{self.seq}",
            tensors=(tensor,),
            predicted="" if drawn is None else str(drawn.predicted),
            confidence=0.0 if drawn is None else drawn.confidence,
            redacted=("none",),
        )
        self._queue.append(Outgoing("x", encode(sample), self.boot, (sample.seq,)))

    # faults

    def _go_away(self, now_ms: int) -> None:
        self.is_away = True
        place = self.draw(f"back/{now_ms - self.start_ms}")
        seconds = 120 + 800 * place if place < SHORT_SPELLS else 900 + 1500 * self.draw(f"long/{now_ms - self.start_ms}")
        self._after(now_ms, seconds, self._come_back)

    def _come_back(self, now_ms: int) -> None:
        self.is_away = False
        self._after(now_ms, 180 + 600 * self.draw(f"away/{now_ms - self.start_ms}"), self._go_away)

    def _crash(self, now_ms: int) -> None:
        """The agent itself dies and is started again: a new boot, and what was on the disk is still there."""
        self._after(now_ms, CRASH_S, self._crash)
        self.restarts += 1
        self.boot, self.seq, self._booted_ms = self._new_boot(), 0, now_ms
        self._event(now_ms, "agent_started", f"edgekit {AGENT_VERSION}, simulated, after a crash")
        self._report(now_ms)

    def _set_clock(self, now_ms: int) -> None:
        last, delta = self.seq, -self._clock_ms
        self._clock, self._clock_ms = "ntp", 0
        fields: dict[str, str | int | float | bool] = {"delta_ms": delta, "last_seq": last, "is_correction": True}
        self._event(now_ms, "clock_stepped", f"the clock jumped by {delta / 1000:.1f} s", fields=fields)

    # desired states

    def hear(self, payload: bytes, *, now_ms: int, clock: datetime) -> None:
        """A desired state was delivered; the broker repeats the retained one on each connection.

        Args:
            payload: the envelope.
            now_ms: the simulation's time.
            clock: the time against which the envelope is judged, aware.
        """
        if not self.keys or not payload or payload == self._seen or not self.is_powered:
            return
        self._seen = payload
        try:
            state = verify_desired(payload, self.keys, device=self.name, last_seq=self.desired_seq, now=clock)
        except EdgekitError as error:
            self._event(now_ms, "desired_refused", error.message, code=error.code)
            return
        self._accept(state, now_ms, clock)

    def _accept(self, state: DesiredState, now_ms: int, clock: datetime) -> None:
        wanted = state.models.get(self.release.model)
        held = {slot.manifest_digest for slot in self.slots.values()}
        if wanted is not None and wanted.manifest not in held and self.fate(wanted.manifest) == "silent":
            self.story.ignored += 1
            return
        self.desired_seq = state.seq
        names = ", ".join(f"{name} {model.counter}" for name, model in sorted(state.models.items()))
        self._event(now_ms, "desired_accepted", f"seq {state.seq}: {names or 'no model'}", fields={"seq": state.seq})
        self._wanted = None
        if wanted is None:
            return
        release = self.book.find(self.release.model, wanted.counter, wanted.manifest)
        if release is None:
            text = f"{self.release.model}: signed metadata lists no release {wanted.counter} with this manifest."
            self._event(now_ms, "desired_refused", text, code="desired.unknown_release")
            return
        share = self.draw(f"jitter/{wanted.manifest}")
        not_before = state.policy.not_before or clock
        wait_s = max(0.0, (not_before - clock).total_seconds()) + state.policy.jitter_s * share
        self._wanted = state.seq, release
        self._after(now_ms, wait_s, self._consider)

    def _consider(self, now_ms: int) -> None:
        """Look what is wanted, and do the next thing for it."""
        if self._wanted is None:
            return
        release = self._wanted[1]
        if self._job is not None and self._job.stage != "probation" and self._job.release is not release:
            self._job = None  # superseded: nothing half-done stays
        if release.manifest == self.release.manifest:
            return
        if self._go_back(release, now_ms) or self._job is not None or release.manifest in self.refused:
            return
        self._job = _Job(release=release, fate=self.fate(release.manifest))
        self._event(now_ms, "release_found", release=release)
        self._event(now_ms, "install_started", f"into slot {self._other}", release=release)
        self._job.stage = "fetching"
        seconds = release.size_bytes / self.machine.link_bytes_per_s * (0.8 + 0.6 * self.draw(f"fetch/{release.manifest}"))
        self._after(now_ms, seconds, self._make_fetched(self._job))

    @property
    def _other(self) -> str:
        return "b" if self.active == "a" else "a"

    def _go_back(self, release: SimulatedRelease, now_ms: int) -> bool:
        """Return to an older release that lies good in the other slot, as the agent does at once."""
        if release.manifest in self.refused:
            return False
        other = self.slots[self._other]
        if other.status != "good" or other.manifest_digest != release.manifest or release.counter > self.release.counter:
            return False
        self._take_back(now_ms, TAKEN_BACK, f"{self.release.label} was taken back by the fleet;")
        return True

    def _take_back(self, now_ms: int, code: str, why: str) -> None:
        left, other = self.release, self.slots[self._other]
        found = self.book.find(other.model, other.counter, other.manifest_digest)
        assert found is not None, "a slot holds what the book knows"
        self.slots[self.active] = _slot(self.active, "bad", left)
        self.active, self.release = self._other, found
        self.slots[self.active] = _slot(self.active, "active", found)
        self.refused = (*self.refused, left.manifest)
        self._job = None
        self._error = (code, why)
        self.story.rolled_back += 1
        self._event(now_ms, "rolled_back", f"{why} back to {found.label}", code=code, release=left)
        self._report(now_ms)

    def _make_fetched(self, job: _Job) -> Callable[[int], None]:
        def fetched(now_ms: int) -> None:
            if self._job is not job:
                return
            if job.fate == "dark":
                self.is_powered = False
                return
            job.stage = "testing"
            share = 0.4 + 1.2 * self.draw(f"test/{job.release.manifest}")
            seconds = self.options.self_test_s * share * self.machine.kind.latency_ms / MIDDLING_MS
            self._after(now_ms, seconds, lambda now: self._tested(job, now))

        return fetched

    def _tested(self, job: _Job, now_ms: int) -> None:
        if self._job is not job:
            return
        release = job.release
        if job.fate == "fail":
            self._job = None
            code = "selftest.mismatch"
            why = f"{release.label}: the golden samples do not match on this device: worst error 0.41, tolerance 0.05."
            self.refused = (*self.refused, release.manifest)
            self._error = (code, why)
            self.story.refused += 1
            self._event(now_ms, "install_refused", why, code=code, release=release)
            self._report(now_ms)
            return
        self.slots[self.active] = _slot(self.active, "good", self.release)
        self.active = self._other
        self.slots[self.active] = _slot(self.active, "active", release)
        self.release, job.stage, self._error = release, "probation", ("", "")
        self.story.installed += 1
        self._event(now_ms, "install_finished", f"slot {self.active} serves", release=release, fields={"slot": self.active})
        self._event(now_ms, "probation_started", "on live traffic", release=release)
        self._report(now_ms)
        seconds = self.options.probation_s * (0.9 + 0.4 * self.draw(f"probation/{release.manifest}"))
        self._after(now_ms, seconds * (0.5 if job.fate == "rollback" else 1.0), lambda now: self._proved(job, now))

    def _proved(self, job: _Job, now_ms: int) -> None:
        if self._job is not job:
            return
        if job.fate == "rollback":
            why = f"{job.release.label}: on probation: 7 of 50 inferences failed;"
            self._take_back(now_ms, "probation.failures", why)
        else:
            self._job = None
            self.story.committed += 1
            self._event(now_ms, "committed", f"{job.release.label} passed its probation", release=job.release)
            self._report(now_ms)
        self._consider(now_ms)


_OWN_FAULTS = ("slow", "offline", "crashloop", "clock", "sensor", "full")


def _slot(name: str, status: str, release: SimulatedRelease) -> SlotReport:
    return SlotReport(
        name=name,
        status=status,
        model=release.model,
        version=release.version,
        counter=release.counter,
        model_digest=release.model_digest,
        manifest_digest=release.manifest,
    )


def _merge(parts: Sequence[_Kept]) -> _Kept:
    """Windows of one boot and release as one, which stands for all of them."""
    ranges: list[int] = []
    for part in parts:
        if ranges and part.seq == ranges[-1] + 1:
            ranges[-1] = part.seq
        else:
            ranges += [part.seq, part.seq]
    first, last = parts[0], parts[-1]
    duration = sum(part.duration_ms for part in parts)
    return _Kept(last.boot, last.seq, first.start_ms, duration, last.release, tuple(ranges))
