"""Drift by sequential evidence: an alarm budget in place of a significance level.

A stream (a feature, an output, a confidence) gives one histogram an interval. Its detector keeps a number M that grows with
the evidence that the intervals do not come from the reference any more: an e-detector of the Shiryaev-Roberts kind (Shin,
Ramdas and Rinaldo, "E-detectors", 2023). Without drift, M exceeds ``arl`` once in ``arl`` intervals on average or less, however
often one looks; that is the average run length to a false alarm, and :func:`arl_for` makes it from "at most X a month".

M is a weighted mean of detectors, each sharp for another kind of drift, which is an e-detector again:

- *tilts*: the reference moved, or stretched, by a known amount in its normal scores; there is nothing to learn, so that small
  shifts show;
- *coarse* and *fine*: how well the recent intervals predict this one (a Dirichlet-multinomial around the reference and the
  decayed past), over eight groups of bins and over all bins; they see every shape of drift, a little later;
- *missing*: more values that are no numbers.

Four things are taken off, or no guarantee would hold:

- samples of one device resemble each other: counts are divided by the design effect;
- neighbouring intervals resemble each other, too (a day has its hours): how much the sums over 1, 4, 16 and 64 intervals vary
  more than independent samples would is learned from the stream itself, and counts are divided by it. It is an estimate, and
  there is none in the first days;
- the reference is an estimate from m samples, and a fleet of D devices is a sample of devices, for good: what such an error
  reaches in one case of a thousand (of a hundred for the fleet) is taken off, in nats a sample; its mean is not enough, since
  one baseline serves for long;
- a shift may be real and not matter: ``effect_floor`` nats a sample, 0.002 being a sixteenth of a standard deviation, 0.005 a
  tenth.

    >>> bank = Bank([Reference(counts=(2500, 2500, 2500, 2500))], Rule(arl=1000.0))
    >>> state = bank.start()
    >>> for window in ([50, 50, 50, 50], [20, 30, 60, 90], [20, 30, 60, 90]):
    ...     state = bank.step(state, np.array([window]))
    >>> bool(state.since[0] > 0), int(state.steps)
    (True, 3)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import NormalDist

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ArtifactError
from edgekit.monitor.compare import JEFFREYS
from edgekit.schema.base import Record

Array = NDArray[np.float64]
PRIOR_SAMPLES = 200.0
DECAY = 0.9
EFFECT_FLOOR = 0.002
LOCATION_TILTS = (0.12, 0.4)
"""Standard deviations of the normal score, to both sides."""
SCALE_TILTS = (0.15,)
MISSING_TILTS = (0.02, 0.1)
"""Share of missing values, added."""
GROUPS = 8
WEIGHTS = {"location": 0.5, "scale": 0.1, "missing": 0.1, "fine": 0.15, "coarse": 0.15}
"""Of the components; what a stream does not have is shared out among the others."""
BLOCKS = (1, 4, 16, 64)
"""Intervals whose sums are looked at for what neighbours share."""
CAUTION = 1.5
"""Standard errors taken off an estimated time effect, so that noise is none."""
MEMORY = 0.02
"""Weight of a new interval in what a stream learns of itself, once it has seen fifty."""
WINSOR = 4.0
FEW_DEVICES = 6
"""A fleet's own variation is taken as learned from at least so many."""
CALM_STEPS = 6
"""Intervals without an effect that end an alarm."""
Z999 = 3.090232306167813
_CAP = 1e4
_TINY = 1e-12
_STIRLING_FROM = 8
_T995 = (63.66, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169)
"""Student's t at 0.995 for 1 to 10 degrees of freedom."""
_Z995 = 2.5758293035489004


class Rule(Record, frozen=True, kw_only=True):
    """``arl``: intervals to a false alarm, on average at least. ``effect_floor``: nats a sample that do not matter."""

    arl: float
    effect_floor: float = EFFECT_FLOOR


class Reference(Record, frozen=True, kw_only=True):
    """What a stream is compared with: ``counts`` [B], of these the last one the missing values when ``has_missing``."""

    counts: tuple[float, ...]
    is_ordered: bool = True
    """Bins of a number; False for classes."""
    has_missing: bool = False


def arl_for(alarms: float, *, streams: int, windows: float) -> float:
    """The average run length that keeps a budget of false alarms.

    Args:
        alarms: how many false alarms all streams together may give in the time, above 0.
        streams: how many are watched.
        windows: that each stream has in the time.

    >>> round(arl_for(1, streams=1000, windows=720))
    720000
    """
    if alarms <= 0 or streams < 1 or windows <= 0:
        raise ValueError("a budget needs a positive number of alarms, streams and windows")
    return max(2.0, streams * windows / alarms)


@dataclass(frozen=True)
class BankState:
    """What the detectors of K streams remember. Arrays are never changed in place."""

    log_m: Array
    """Natural logarithm of M of each component [K, P]; minus infinity before the first interval."""
    past: Array
    """Decayed counts of the intervals so far [K, B], divided by the design effects."""
    level: Array
    """Where the stream has been of late, as shares [K, B]: what it is compared with to learn its own variation."""
    blocks: Array
    """Sums that are being collected [len(BLOCKS), K, B]."""
    spread: Array
    """Variance of such sums over that of independent samples [len(BLOCKS), 3, K]: of all bins, of the place, of the width."""
    seen: Array
    """Intervals with samples, a stream [K]."""
    since: Array
    """The step, counted from 1, in which the alarm began [K]; 0 for none."""
    calm: Array
    """Intervals in a row without an effect while the alarm lasts [K]."""
    started: Array
    """The step after which the detector began, or began anew [K]."""
    steps: int = 0

    def encode(self) -> bytes:
        """As bytes, exactly."""
        arrays = [(list(array.shape), np.ascontiguousarray(array, dtype="<f8").tobytes()) for array in self._arrays()]
        return msgspec.msgpack.encode([self.steps, arrays])

    def _arrays(self) -> list[Array]:
        return [getattr(self, field.name) for field in fields(self) if field.name != "steps"]

    @classmethod
    def decode(cls, data: bytes) -> BankState:
        """What :meth:`encode` wrote.

        Raises:
            ArtifactError: ``record.malformed``.
        """
        try:
            steps, arrays = msgspec.msgpack.decode(data, type=tuple[int, list[tuple[tuple[int, ...], bytes]]])
            names = [field.name for field in fields(cls) if field.name != "steps"]
            found = {
                name: np.frombuffer(raw, dtype="<f8").reshape(shape) for name, (shape, raw) in zip(names, arrays, strict=True)
            }
            return cls(**found, steps=steps)
        except (msgspec.DecodeError, ValueError, TypeError) as error:
            raise ArtifactError("record.malformed", f"detector state: {error}.") from error


@dataclass(frozen=True)
class _Tables:
    """What follows from the references alone, padded to the longest."""

    shares: Array  # [K, B], 0 beyond a stream's bins
    log_shares: Array  # [K, B], 0 beyond
    log_ratios: Array  # [K, T, B]
    groups: Array  # [K, B, GROUPS] one-hot
    weights: Array  # [K, P] logarithms
    freedom: Array  # [K, P] degrees of freedom of each component's error
    scores: Array  # [K, 2, B] normal scores of the bins and their squares, each with mean 0 and variance 1
    samples: Array  # [K]
    bins: Array  # [K]


class Bank:
    """The detectors of K streams, in one pass of numpy each interval."""

    def __init__(self, references: Sequence[Reference], rule: Rule) -> None:
        """Prepare.

        Args:
            references: of each stream; one without samples never gives evidence.
            rule: the budget and the floor.
        """
        self.rule = rule
        self.references = tuple(references)
        self.width = max((len(reference.counts) for reference in references), default=1)
        self._tables = _make_tables(self.references, self.width)

    def __len__(self) -> int:
        return len(self._tables.bins)

    def repeated(self, times: int, rule: Rule) -> Bank:
        """The same streams several times over, one after the other: a slice each."""
        made = Bank.__new__(Bank)
        made.rule, made.references, made.width = rule, self.references * times, self.width
        parts = {each.name: getattr(self._tables, each.name) for each in fields(self._tables)}
        made._tables = _Tables(**{name: np.concatenate([part] * times) for name, part in parts.items()})  # noqa: SLF001
        return made

    def start(self) -> BankState:
        """Nothing seen yet."""
        count, components = self._tables.weights.shape
        table, zeros = np.zeros((count, self.width)), np.zeros(count)
        return BankState(
            log_m=np.full((count, components), -np.inf),
            past=table,
            level=table,
            blocks=np.zeros((len(BLOCKS), count, self.width)),
            spread=np.ones((len(BLOCKS), 3, count)),
            seen=zeros,
            since=zeros,
            calm=zeros,
            started=zeros,
        )

    def log_m(self, state: BankState) -> Array:
        """Natural logarithm of M [K], the mean over the components."""
        with np.errstate(invalid="ignore"):
            return np.asarray(np.logaddexp.reduce(state.log_m + self._tables.weights, axis=1))

    def time_effect(self, state: BankState) -> Array:
        """By how much what neighbouring intervals share divides the counts [K], at least 1: a careful estimate."""
        ranks = np.array([min(state.steps // length, 1 / MEMORY) for length in BLOCKS])
        freedom = np.stack([np.maximum(self._tables.bins - 1, 1.0), np.ones(len(self)), np.ones(len(self))])
        error = np.sqrt(2.0 / (np.maximum(ranks, 1e-3)[:, None, None] * freedom[None]))
        return np.asarray(np.maximum(1.0, (state.spread * (1.0 - CAUTION * error)).max(axis=(0, 1))))

    def evidence(
        self,
        state: BankState,
        counts: Array,
        *,
        cluster: Array | None = None,
        fleet_error: Array | None = None,
        design_effect: Array | None = None,
    ) -> Array:
        """Natural logarithms of one interval's e-values, a component [K, P].

        Args:
            state: before the interval.
            counts: [K, B].
            cluster: one over the samples that the fleet's devices are worth as a sample of devices [K]; 0 for no clusters.
            fleet_error: nats a sample that the fleet's place or width may be off by (:func:`error_of_fleet`) [K].
            design_effect: at least 1 [K].
        """
        tables = self._tables
        divisor = np.maximum(1.0, np.ones(len(self)) if design_effect is None else design_effect) * self.time_effect(state)
        tempered = counts / divisor[:, None]
        n = tempered.sum(axis=1)
        tilts = np.einsum("ktb,kb->kt", tables.log_ratios, tempered)
        plain = (tempered * tables.log_shares).sum(axis=1)
        alpha = PRIOR_SAMPLES * tables.shares + state.past
        fine = _log_dirichlet_multinomial(tempered, alpha) - plain
        grouped, grouped_alpha = (np.einsum("kb,kbg->kg", table, tables.groups) for table in (tempered, alpha))
        grouped_shares = np.einsum("kb,kbg->kg", tables.shares, tables.groups)
        known = np.log(np.where(grouped_shares > 0, grouped_shares, 1.0))
        coarse = _log_dirichlet_multinomial(grouped, grouped_alpha) - (grouped * known).sum(axis=1)
        gained = np.concatenate([tilts, fine[:, None], coarse[:, None]], axis=1)
        inverse = 1.0 / np.maximum(tables.samples, _TINY) + (0.0 if cluster is None else cluster)
        slack = _error_quantile(tables.freedom) * inverse[:, None]
        if fleet_error is not None:
            one = _error_quantile(np.ones(1)) / np.maximum(tables.samples, _TINY) + fleet_error
            slack = np.maximum(slack, one[:, None])
        slack = slack + self.rule.effect_floor
        usable = (n > 0) & (tables.samples > 0)
        return np.asarray(np.where(usable[:, None], gained - n[:, None] * slack, 0.0))

    def step(
        self,
        state: BankState,
        counts: NDArray[np.int64] | Array,
        *,
        cluster: Array | None = None,
        fleet_error: Array | None = None,
        design_effect: Array | None = None,
    ) -> BankState:
        """The state after one more interval; each component's M becomes (M + 1) times its e-value.

        A stream without samples keeps its state. An alarm lasts until ``CALM_STEPS`` intervals in a row are without an effect;
        then the detector begins anew.

        Args:
            state: before.
            counts: [K, B] with B at most ``width``.
            cluster: see :meth:`evidence`.
            fleet_error: see :meth:`evidence`.
            design_effect: see :meth:`evidence`.

        Raises:
            ValueError: when the counts are not of these streams.
        """
        table = self._fitting(counts)
        effect = np.maximum(1.0, np.ones(len(self)) if design_effect is None else design_effect)
        gained = self.evidence(state, table, cluster=cluster, fleet_error=fleet_error, design_effect=effect)
        has_samples = (table.sum(axis=1) > 0) & (self._tables.samples > 0)
        steps = state.steps + 1
        log_m = np.where(has_samples[:, None], np.minimum(_CAP, np.logaddexp(state.log_m, 0.0) + gained), state.log_m)
        divided = table / (effect * self.time_effect(state))[:, None]
        past = np.where(has_samples[:, None], DECAY * (state.past + divided), state.past)
        learned = self._learn(state, table / effect[:, None], has_samples)
        after = replace(learned, log_m=log_m, past=past, steps=steps)
        return self._judge(after, has_samples)

    def _fitting(self, counts: NDArray[np.int64] | Array) -> Array:
        table = np.asarray(counts, dtype=np.float64)
        if table.ndim != 2 or table.shape[0] != len(self) or table.shape[1] > self.width:
            raise ValueError(f"counts {table.shape} for {len(self)} streams of at most {self.width} bins")
        return np.pad(table, ((0, 0), (0, self.width - table.shape[1])))

    def _learn(self, state: BankState, counts: Array, has_samples: NDArray[np.bool_]) -> BankState:
        """What the stream shows of its own variation: of sums over blocks of intervals, around where it has been of late."""
        n = counts.sum(axis=1)
        seen = state.seen + has_samples
        weight = np.where(has_samples, np.maximum(MEMORY, 1.0 / np.maximum(seen, 1.0)), 0.0)[:, None]
        shares = counts / np.maximum(n, _TINY)[:, None]
        level = state.level * (1 - weight) + shares * weight
        blocks, spread = state.blocks + counts[None], state.spread
        done = [at for at, length in enumerate(BLOCKS) if (state.steps + 1) % length == 0]
        if done:
            blocks, spread = blocks.copy(), spread.copy()
            for at in done:
                spread[at] = self._block_spread(spread[at], blocks[at], level, rank=(state.steps + 1) // BLOCKS[at])
                blocks[at] = 0.0
        return replace(state, level=level, blocks=blocks, spread=spread, seen=seen)

    def _block_spread(self, before: Array, sums: Array, level: Array, *, rank: int) -> Array:
        n = sums.sum(axis=1)
        expected = n[:, None] * level
        used = expected > _TINY
        beyond = sums - expected
        chi = np.where(used, beyond**2 / np.where(used, expected, 1.0), 0.0).sum(axis=1) / np.maximum(used.sum(axis=1) - 1, 1)
        scores = self._tables.scores
        moved = np.einsum("kb,ksb->sk", beyond, scores)
        centre = np.einsum("kb,ksb->sk", level, scores)
        variance = np.maximum(np.einsum("kb,ksb->sk", level, scores**2) - centre**2, 1e-6)
        found = np.concatenate([chi[None], moved**2 / (np.maximum(n, 1.0) * variance)])
        weight = max(MEMORY, 1.0 / (rank + 1))
        held = np.minimum(found, WINSOR * before) if rank > 3 else found
        return np.where(n > 0, before * (1 - weight) + held * weight, before)

    def _judge(self, state: BankState, has_samples: NDArray[np.bool_]) -> BankState:
        is_over = self.log_m(state) > math.log(self.rule.arl)
        since = np.where((state.since == 0) & is_over & has_samples, state.steps, state.since)
        calm = np.where(since > 0, np.where(has_samples, np.where(self._is_calm(state), state.calm + 1, 0.0), state.calm), 0.0)
        ends = calm >= CALM_STEPS
        return replace(
            state,
            since=np.where(ends, 0.0, since),
            calm=np.where(ends, 0.0, calm),
            started=np.where(ends, state.steps, state.started),
            log_m=np.where(ends[:, None], -np.inf, state.log_m),
        )

    def _is_calm(self, state: BankState) -> NDArray[np.bool_]:
        """Whether the recent intervals are as before: the last ten, or the last fifty for a stream that goes up and down."""
        n = state.past.sum(axis=1)
        fifty = n * (1 - DECAY) / DECAY * np.minimum(state.seen, 1 / MEMORY)
        is_old = state.steps - state.since >= 1 / MEMORY  # before that the fifty are mostly from before the alarm
        is_near = self._is_near(state.past, n) | (is_old & self._is_near(state.level * fifty[:, None], fifty))
        return np.asarray(is_near | (self.log_m(state) < 0))

    def _is_near(self, counts: Array, n: Array) -> NDArray[np.bool_]:
        """Whether counts are within half the floor, with what chance adds taken off, and enough to say so."""
        tables, floor = self._tables, max(self.rule.effect_floor, 0.002)
        shares = (counts + JEFFREYS * (tables.shares > 0)) / np.maximum(n + JEFFREYS * tables.bins, _TINY)[:, None]
        ratio = np.log(np.where(shares > 0, shares, 1.0)) - tables.log_shares
        divergence = (shares * ratio).sum(axis=1)
        moved = np.einsum("kb,ksb->sk", shares, tables.scores)[0]
        one = (1.0 / np.maximum(n, 1.0) + 1.0 / np.maximum(tables.samples, 1.0)) / 2
        is_near = (divergence - (tables.bins - 1) * one <= floor / 2) & (moved**2 / 2 - one <= floor / 2)
        return np.asarray(is_near & (one <= 2 * floor))


def _make_tables(references: Sequence[Reference], width: int) -> _Tables:
    count = len(references)
    tilts = 2 * len(LOCATION_TILTS) + 2 * len(SCALE_TILTS) + len(MISSING_TILTS)
    shares, ratios = np.zeros((count, width)), np.zeros((count, tilts, width))
    scores = np.zeros((count, 2, width))
    groups, weights = np.zeros((count, width, GROUPS)), np.full((count, tilts + 2), -np.inf)
    freedom = np.ones((count, tilts + 2))
    for at, reference in enumerate(references):
        bins = len(reference.counts)
        base = np.asarray(reference.counts, dtype=np.float64) + JEFFREYS
        p = base / base.sum()
        shares[at, :bins] = p
        scores[at, :, :bins] = scores_of(reference)
        found, kinds = _tilt_ratios(p, scores[at, :, :bins], reference)
        ratios[at, :, :bins] = found
        group = _group_bins(p, reference)
        groups[at, np.arange(bins), group] = 1.0
        weights[at] = _component_weights(kinds, is_coarse=bins > GROUPS and reference.is_ordered)
        freedom[at, -2:] = bins - 1, len(set(group.tolist())) - 1
    return _Tables(
        shares=shares,
        log_shares=np.log(np.where(shares > 0, shares, 1.0)),
        log_ratios=ratios,
        groups=groups,
        weights=weights,
        freedom=freedom,
        scores=scores,
        samples=np.array([float(sum(reference.counts)) for reference in references]),
        bins=np.array([float(len(reference.counts)) for reference in references]),
    )


def _normal_scores(p: Array) -> Array:
    """The standard normal's quantile at the middle of each bin, with mean 0 and variance 1."""
    middle = np.clip(np.cumsum(p) - p / 2, 1e-9, 1 - 1e-9)
    normal = NormalDist()
    z = np.array([normal.inv_cdf(value) for value in middle.tolist()])
    return _standardize(z, p)


def _standardize(z: Array, p: Array) -> Array:
    centred = z - float((p * z).sum())
    variance = float((p * centred**2).sum())
    return centred / math.sqrt(variance) if variance > _TINY else np.zeros_like(z)


def scores_of(reference: Reference) -> Array:
    """Normal scores of the bins, and what of their squares the scores do not say [2, B]; zeros for classes."""
    base = np.asarray(reference.counts, dtype=np.float64) + JEFFREYS
    p, bins = base / base.sum(), base.size
    present = bins - 1 if reference.has_missing else bins
    found = np.zeros((2, bins))
    if reference.is_ordered and present >= 2:
        inner = p[:present] / p[:present].sum()
        found[0, :present] = z = _normal_scores(inner)
        found[1, :present] = _standardize(z**2 - float((inner * z**3).sum()) * z, inner) if present >= 4 else 0.0
    return found


def error_of_fleet(variation: Array, devices: Array, *, known_by: int) -> Array:
    """Nats a sample by which a fleet's place may be off for good, as a sample of devices.

    Half the squared error that is exceeded in one case of a hundred: Student's t, since the variation is an estimate, too.
    Fewer than ``FEW_DEVICES`` count as so many: strictly, two devices that differ at all could never show a drift.

    Args:
        variation: variance of devices' means over that of a sample, at least 0 [K].
        devices: how many there are [K].
        known_by: devices that the variation was estimated from; one tells nothing.
    """
    if known_by < 2:
        return np.zeros(np.shape(variation))
    return np.asarray(_student(max(known_by, FEW_DEVICES) - 1) ** 2 / 2 * variation / np.maximum(devices, 1.0))


def _student(freedom: int) -> float:
    """Student's t at 0.995; by Cornish and Fisher's expansion beyond the table."""
    if freedom <= len(_T995):
        return _T995[freedom - 1]
    z = _Z995
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _tilt_ratios(p: Array, scores: Array, reference: Reference) -> tuple[Array, tuple[str, ...]]:
    """Logarithms of the tilted over the reference shares [T, B], and each tilt's kind; empty for one that there is not."""
    bins = p.size
    rows: list[Array] = []
    kinds: list[str] = []
    for kind, score, sizes in zip(("location", "scale"), scores, (LOCATION_TILTS, SCALE_TILTS), strict=True):
        for size in (signed for each in sizes for signed in (each, -each)):
            tilted = p * np.exp(size * score)
            rows.append(np.log(tilted / tilted.sum() / p))
            kinds.append(kind if score.any() else "")
    for extra in MISSING_TILTS:
        row = np.zeros(bins)
        if reference.has_missing:
            share = float(p[-1])
            more = share + extra * (1 - share)
            row[:-1], row[-1] = math.log((1 - more) / (1 - share)), math.log(more / share)
        rows.append(row)
        kinds.append("missing" if reference.has_missing else "")
    return np.array(rows), tuple(kinds)


def _component_weights(kinds: Sequence[str], *, is_coarse: bool) -> Array:
    """Logarithms of the components' weights, which add up to 1; what there is not has none."""
    weights = np.zeros(len(kinds) + 2)
    for kind in ("location", "scale", "missing"):
        here = [at for at, found in enumerate(kinds) if found == kind]
        if here:
            weights[here] = WEIGHTS[kind] / len(here)
    weights[-2:] = WEIGHTS["fine"], WEIGHTS["coarse"] if is_coarse else 0.0
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(weights / weights.sum()))


def _group_bins(p: Array, reference: Reference) -> NDArray[np.int64]:
    """Which of the groups each bin belongs to; equal shares as far as bins allow."""
    if p.size <= GROUPS:
        return np.arange(p.size)
    middle = np.cumsum(p) - p / 2
    found = np.minimum((middle * GROUPS).astype(np.int64), GROUPS - 1)
    if reference.has_missing:  # a group of its own
        found = np.minimum((middle * (GROUPS - 1)).astype(np.int64), GROUPS - 2)
        found[-1] = GROUPS - 1
    return found


def _error_quantile(degrees_of_freedom: Array) -> Array:
    """Half the 99.9th percentile of chi-squared, by Wilson and Hilferty's cube root: over m, the reference's error in nats."""
    used = np.maximum(degrees_of_freedom, 1.0)
    part = 2.0 / (9.0 * used)
    return np.asarray(np.where(degrees_of_freedom < 1, 0.0, used * (1.0 - part + Z999 * np.sqrt(part)) ** 3 / 2.0))


def _log_gamma(x: Array) -> Array:
    """Logarithm of the gamma function of positive numbers: Stirling's series (DLMF 5.11.1), shifted up by eight."""
    shifted = x + _STIRLING_FROM
    product = x.copy()
    for step in range(1, _STIRLING_FROM):
        product = product * (x + step)
    inverse = 1.0 / shifted
    square = inverse * inverse
    series = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square / 1188))))
    return np.asarray((shifted - 0.5) * np.log(shifted) - shifted + 0.5 * math.log(2 * math.pi) + series - np.log(product))


def _log_dirichlet_multinomial(counts: Array, alpha: Array) -> Array:
    """By row, without the multinomial coefficient, which the ratio does not need."""
    used = counts > 0
    safe = np.where(alpha > 0, alpha, 1.0)
    parts = np.zeros_like(counts)
    parts[used] = _log_gamma(safe[used] + counts[used]) - _log_gamma(safe[used])
    total = np.maximum(alpha.sum(axis=1), _TINY)
    return np.asarray(parts.sum(axis=1) + _log_gamma(total) - _log_gamma(total + counts.sum(axis=1)))


def e_benjamini_hochberg(values: Sequence[float], *, share: float) -> tuple[int, ...]:
    """Which of many e-values are discoveries, with at most ``share`` false ones among them, whatever their dependence.

    Wang and Ramdas, "False discovery rate control with e-values", 2022: the k largest with k * e_(k) >= K / share.

    Args:
        values: e-values of K streams.
        share: 0..1.

    Returns:
        Indices of the discoveries, the strongest first.

    >>> e_benjamini_hochberg([0.5, 300.0, 1.2, 90.0], share=0.05)
    (1, 3)
    """
    if not 0 < share < 1:
        raise ValueError(f"share {share}: expected a number between 0 and 1")
    order = sorted(range(len(values)), key=lambda index: -values[index])
    kept = 0
    for rank, index in enumerate(order, 1):
        if rank * values[index] >= len(values) / share:
            kept = rank
    return tuple(order[:kept])
