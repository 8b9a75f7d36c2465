"""Watches one model: takes its intervals one after the other and says which streams drift, in which slice, since when.

The same engine judges recorded data (``edgekit monitor replay``) and the fleet's windows. It is a pure function of the
intervals: the state after some of them can be written down, read again and gone on with, and gives what an uninterrupted run
gives, bit for bit; windows that come late are judged by going back to a state before them.

The budget is one for all: streams times slices share it. Devices that differ from each other make evidence smaller, in every
slice by as much as all devices of the fleet show it.

>>> from edgekit.monitor.sketch import build_profile
>>> profile = build_profile({"x": np.arange(6000.0).reshape(-1, 1)})
>>> watcher = Watcher(profile, WatchRule())
>>> watcher.start().slices
()
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ArtifactError
from edgekit.monitor.concept import BetState, bet
from edgekit.monitor.detector import EFFECT_FLOOR, Bank, BankState, Rule, arl_for, e_benjamini_hochberg, error_of_fleet
from edgekit.monitor.intervals import ALL, Interval
from edgekit.monitor.performance import CONFIDENCE_BINS, Calibration, Estimate, calibrate, estimate
from edgekit.monitor.streams import Watched, sketch_widths, watched_streams
from edgekit.schema.base import Record
from edgekit.schema.baseline import ReferenceProfile, StreamProfile

DAY_S = 86_400.0
LIST_SHARE = 0.1
"""Of the list of drifting streams at most so much is false."""
MAX_SLICES = 100
FORGET_MS = 30 * 86_400_000
"""A slice that was not seen for so long is no longer watched."""
VARIATION_MEMORY = 0.05
WARM_UP = 6
"""Intervals after which what devices differ by may grow slowly only."""
CONCEPT_MARGIN = 0.02
"""The estimate and the labels may differ by so much: what the estimate itself is off by."""


class WatchRule(Record, frozen=True, kw_only=True):
    """``alarms`` false ones in ``days`` over all streams and slices, on average at most."""

    alarms: float = 1.0
    days: float = 30.0
    effect_floor: float = EFFECT_FLOOR
    interval_s: float = 600.0


class StreamVerdict(Record, frozen=True, kw_only=True):
    """What is known of one stream in one slice."""

    stream: str
    slice: str
    kind: str
    evidence: float
    """Natural logarithm of the detector's number."""
    threshold: float
    since_ms: int
    """Begin of the interval in which the alarm began; 0 for none."""
    time_effect: float
    variation: float
    is_alarm: bool = False
    is_listed: bool = False
    is_inhibited: bool = False


class ConceptVerdict(Record, frozen=True, kw_only=True):
    """Whether labels show more errors in a slice than the estimate expects."""

    slice: str
    evidence: float
    threshold: float
    answers: int
    since_ms: int
    is_alarm: bool = False
    is_inhibited: bool = False


@dataclass(frozen=True)
class WatchState:
    """What a watcher remembers; ``frontier_ms`` is the begin of the last interval it took, -1 before the first."""

    slices: tuple[str, ...]
    last_seen_ms: tuple[int, ...]
    bank: BankState | None
    since_ms: tuple[int, ...]
    """By slice and stream, in the bank's order."""
    variation: tuple[tuple[float, float], ...]
    """By stream, as :class:`edgekit.monitor.intervals.Interval` has it, smoothed."""
    variation_seen: int
    known_by: int
    """Devices that it was learned from."""
    bets: tuple[BetState, ...]
    bet_since_ms: tuple[int, ...]
    frontier_ms: int = -1

    def encode(self) -> bytes:
        """As bytes, exactly."""
        bank = self.bank.encode() if self.bank else None
        bets = [(state.log_m, state.answers) for state in self.bets]
        parts = (self.slices, self.last_seen_ms, bank, self.since_ms, self.variation, self.variation_seen, self.known_by, bets)
        return msgspec.msgpack.encode([*parts, self.bet_since_ms, self.frontier_ms])

    @classmethod
    def decode(cls, data: bytes) -> WatchState:
        """What :meth:`encode` wrote.

        Raises:
            ArtifactError: ``record.malformed``.
        """
        try:
            found = msgspec.msgpack.decode(data, type=_Packed)
        except msgspec.DecodeError as error:
            raise ArtifactError("record.malformed", f"state of a watch: {error}.") from error
        slices, last_seen_ms, bank, since_ms, variation, variation_seen, known_by, bets, bet_since_ms, frontier_ms = found
        return cls(
            slices=slices,
            last_seen_ms=last_seen_ms,
            bank=BankState.decode(bank) if bank is not None else None,
            since_ms=since_ms,
            variation=variation,
            variation_seen=variation_seen,
            known_by=known_by,
            bets=tuple(BetState(log_m=log_m, answers=answers) for log_m, answers in bets),
            bet_since_ms=bet_since_ms,
            frontier_ms=frontier_ms,
        )


_Packed = tuple[
    tuple[str, ...],
    tuple[int, ...],
    bytes | None,
    tuple[int, ...],
    tuple[tuple[float, float], ...],
    int,
    int,
    list[tuple[tuple[float, ...], int]],
    tuple[int, ...],
    int,
]


class Watcher:
    """Judges the intervals of one model against one reference profile."""

    def __init__(self, profile: ReferenceProfile, rule: WatchRule, class_names: Sequence[str] = ()) -> None:
        self.profile, self.rule = profile, rule
        self.watched: tuple[Watched, ...] = watched_streams(profile, class_names)
        self.widths = sketch_widths(profile)
        self.calibration, self._answers_at = _calibration(profile)
        self._one = Bank([watched.reference for watched in self.watched], Rule(arl=2.0, effect_floor=rule.effect_floor))
        self._banks: dict[int, Bank] = {}

    def start(self) -> WatchState:
        """Nothing seen yet."""
        return WatchState(
            slices=(),
            last_seen_ms=(),
            bank=None,
            since_ms=(),
            variation=((0.0, 0.0),) * len(self.watched),
            variation_seen=0,
            known_by=0,
            bets=(),
            bet_since_ms=(),
        )

    def arl(self, slices: int) -> float:
        """Intervals to a false alarm of one stream, so that all together keep the budget."""
        streams = max(1, (len(self.watched) + 1) * slices)
        return arl_for(self.rule.alarms, streams=streams, windows=self.rule.days * DAY_S / self.rule.interval_s)

    def advance(self, state: WatchState, interval: Interval) -> WatchState:
        """The state after one more interval.

        Raises:
            ValueError: when the interval does not come after the last one.
        """
        if interval.start_ms <= state.frontier_ms:
            raise ValueError(f"interval at {interval.start_ms} after the one at {state.frontier_ms}: give them in order")
        state = self._with_slices(state, interval)
        bank = self._bank(len(state.slices))
        counts, devices = self._counts(state, interval)
        state = _learn_variation(state, interval)
        found = np.tile(np.maximum(np.asarray(state.variation).reshape(-1, 2), 0.0), (len(state.slices), 1))
        each = np.maximum(np.repeat(devices, len(self.watched)), 1.0)
        assert state.bank is not None
        after = bank.step(
            state.bank,
            counts,
            cluster=found[:, 0] / each,
            fleet_error=error_of_fleet(found[:, 1], each, known_by=state.known_by),
            design_effect=1.0 + counts.sum(axis=1) * found.max(axis=1) / each,
        )
        since_ms = np.where(after.since > 0, np.where(state.bank.since > 0, state.since_ms, interval.start_ms), 0)
        bets = [self._bet(state.bets[at], interval, name) for at, name in enumerate(state.slices)]
        limit = math.log(bank.rule.arl)
        bet_since = tuple(
            (before or interval.start_ms) if made.total > limit else 0
            for before, made in zip(state.bet_since_ms, bets, strict=True)
        )
        return replace(
            state,
            bank=after,
            since_ms=tuple(since_ms.astype(int).tolist()),
            bets=tuple(bets),
            bet_since_ms=bet_since,
            frontier_ms=interval.start_ms,
        )

    def _bank(self, slices: int) -> Bank:
        if slices not in self._banks:
            self._banks[slices] = self._one.repeated(slices, Rule(arl=self.arl(slices), effect_floor=self.rule.effect_floor))
        return self._banks[slices]

    def _with_slices(self, state: WatchState, interval: Interval) -> WatchState:
        """The state with room for slices that are new, and without those that are long gone."""
        kept = [
            at
            for at, name in enumerate(state.slices)
            if name in interval.slices or interval.start_ms - state.last_seen_ms[at] <= FORGET_MS
        ]
        names = [state.slices[at] for at in kept]
        fresh = [name for name in interval.slices if name not in names][: max(0, MAX_SLICES - len(names))]
        seen = {name: state.last_seen_ms[at] for at, name in zip(kept, names, strict=True)}
        seen |= dict.fromkeys((name for name in (*names, *fresh) if name in interval.slices), interval.start_ms)
        if not fresh and len(kept) == len(state.slices):
            return replace(state, last_seen_ms=tuple(seen[name] for name in names))
        width = len(self.watched)
        rows = [at * width + stream for at in kept for stream in range(width)]
        count = len(fresh)
        return replace(
            state,
            slices=(*names, *fresh),
            last_seen_ms=tuple(seen[name] for name in (*names, *fresh)),
            bank=_resize(state.bank, rows, self._one, count),
            since_ms=(*(state.since_ms[row] for row in rows), *(0,) * (count * width)),
            bets=(*(state.bets[at] for at in kept), *(BetState(),) * count),
            bet_since_ms=(*(state.bet_since_ms[at] for at in kept), *(0,) * count),
        )

    def _counts(self, state: WatchState, interval: Interval) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Watched counts [slices x streams, B] and devices [slices]."""
        table = np.zeros((len(state.slices) * len(self.watched), self._one.width))
        devices = np.zeros(len(state.slices))
        for at, name in enumerate(state.slices):
            found = interval.slices.get(name)
            if found is None:
                continue
            devices[at] = found.devices
            cells = found.cells(self.widths)
            for stream, watched in enumerate(self.watched):
                counts = watched.read(cells[watched.source])
                table[at * len(self.watched) + stream, : counts.size] = counts
        return table, devices

    def estimate(self, interval_cells: list[NDArray[np.int64]]) -> Estimate | None:
        """The estimated quality of some sketches; None without a labelled baseline."""
        if self.calibration is None:
            return None
        return estimate(interval_cells[self._answers_at].reshape(-1, CONFIDENCE_BINS), self.calibration)

    def _bet(self, state: BetState, interval: Interval, name: str) -> BetState:
        """Bet on the labels of a slice that fewer are right than the answers of the interval are estimated to be."""
        found = interval.slices.get(name)
        if found is None or not found.labelled or self.calibration is None:
            return state
        guess = self.estimate(found.cells(self.widths))
        expected = guess.accuracy if guess is not None and guess.samples else self.reference_accuracy
        if expected is None:
            return state
        wrong = found.labelled - found.right
        return bet(state, wrong=wrong, answers=found.labelled, expected=1.0 - expected, margin=CONCEPT_MARGIN)

    @property
    def reference_accuracy(self) -> float | None:
        """The baseline's own share of right answers; None without labels."""
        streams = [stream for stream in self.profile.streams if stream.right and sum(stream.counts)]
        return sum(streams[0].right) / sum(streams[0].counts) if streams else None

    def evidence(self, state: WatchState) -> list[float]:
        """Natural logarithms of the detectors' numbers, by slice and stream."""
        if state.bank is None:
            return []
        return [float(value) for value in self._bank(len(state.slices)).log_m(state.bank)]

    def verdicts(self, state: WatchState) -> tuple[StreamVerdict, ...]:
        """Every stream in every slice; alarms of ``all`` inhibit those of the same stream below it."""
        if state.bank is None:
            return ()
        bank = self._bank(len(state.slices))
        log_m, effect = bank.log_m(state.bank), bank.time_effect(state.bank)
        age = np.maximum(1.0, state.bank.steps - state.bank.started)
        e_values = np.exp(np.minimum(log_m - np.log(age), 700.0))  # M is at most its age on average
        listed = set(e_benjamini_hochberg(e_values.tolist(), share=LIST_SHARE))
        is_alarm = state.bank.since > 0
        width = len(self.watched)
        found = []
        for at, name in enumerate(state.slices):
            for stream, watched in enumerate(self.watched):
                row = at * width + stream
                parent = state.slices.index(ALL) * width + stream if ALL in state.slices else row
                found.append(
                    StreamVerdict(
                        stream=watched.name,
                        slice=name,
                        kind=watched.kind,
                        evidence=float(log_m[row]),
                        threshold=math.log(bank.rule.arl),
                        since_ms=state.since_ms[row],
                        time_effect=float(effect[row]),
                        variation=max(0.0, *state.variation[stream]),
                        is_alarm=bool(is_alarm[row]),
                        is_listed=row in listed or bool(is_alarm[row]),
                        is_inhibited=bool(is_alarm[row] and row != parent and is_alarm[parent]),
                    )
                )
        return tuple(found)

    def concepts(self, state: WatchState) -> tuple[ConceptVerdict, ...]:
        """What the labels of every slice say."""
        limit = math.log(self.arl(max(1, len(state.slices))))
        is_all_over = ALL in state.slices and state.bet_since_ms[state.slices.index(ALL)] > 0
        return tuple(
            ConceptVerdict(
                slice=name,
                evidence=made.total,
                threshold=limit,
                answers=made.answers,
                since_ms=since,
                is_alarm=since > 0,
                is_inhibited=since > 0 and is_all_over and name != ALL,
            )
            for name, made, since in zip(state.slices, state.bets, state.bet_since_ms, strict=True)
        )


def _calibration(profile: ReferenceProfile) -> tuple[Calibration | None, int]:
    """The calibration of a labelled baseline, and which stream it belongs to."""
    for at, stream in enumerate(profile.streams):
        if stream.kind == "classes" and stream.right and sum(stream.counts):
            return calibrate(right=_table(stream, stream.right), answered=_table(stream, stream.counts)), at
    return None, -1


def _table(stream: StreamProfile, counts: tuple[int, ...]) -> NDArray[np.float64]:
    assert stream.kind == "classes"
    return np.asarray(counts, dtype=np.float64).reshape(-1, CONFIDENCE_BINS)


def _learn_variation(state: WatchState, interval: Interval) -> WatchState:
    """How much devices differ, a stream: smoothed over the intervals; those that cannot tell change nothing."""
    if not interval.variation or all(math.isnan(pair[0]) for pair in interval.variation):
        return state
    seen = state.variation_seen + 1
    weight = max(VARIATION_MEMORY, 1.0 / seen)

    whole = interval.slices[ALL]
    chance = math.sqrt(2.0 / max(1, whole.devices - 1)) * whole.devices / max(1, whole.sketched)

    def learned(old: float, new: float) -> float:
        held = min(new, 4 * max(old, 0.0) + 2 * chance) if seen > WARM_UP else new  # a drift of some devices is no variation
        return old + weight * (held - old)

    def smoothed(old: tuple[float, float], new: tuple[float, float]) -> tuple[float, float]:
        return old if math.isnan(new[0]) else (learned(old[0], new[0]), learned(old[1], new[1]))

    pairs = zip(state.variation, interval.variation, strict=True)
    known_by = max(2, round(state.known_by + weight * (interval.slices[ALL].devices - state.known_by)))
    return replace(state, variation=tuple(smoothed(*pair) for pair in pairs), variation_seen=seen, known_by=known_by)


def _resize(state: BankState | None, rows: list[int], one: Bank, count: int) -> BankState:
    """Some streams of a state, and ``count`` slices of fresh ones behind them."""
    fresh = one.start()
    steps = state.steps if state else 0

    def resized(name: str) -> NDArray[np.float64]:
        axis = {"blocks": 1, "spread": 2}.get(name, 0)
        new = getattr(fresh, name)
        if name == "started":
            new = new + steps
        kept = np.take(getattr(state or fresh, name), rows, axis=axis)
        return np.concatenate([kept, *[new] * count], axis=axis)

    made = {each.name: resized(each.name) for each in fields(BankState) if each.name != "steps"}
    return BankState(**made, steps=steps)
