"""Drift by sequential evidence: an alarm budget in place of a significance level.

One stream (a feature, an output, a confidence) sends one histogram a window. Its detector keeps a number M that grows with the
evidence that the windows do not come from the reference any more: an e-detector of the Shiryaev-Roberts kind (Shin, Ramdas and
Rinaldo, "E-detectors", 2023). Without drift, M exceeds ``arl`` once in ``arl`` windows on average or less, however often one
looks; that is the average run length to a false alarm, and :func:`arl_for` makes it from "at most X a month".

The evidence of a window is a likelihood ratio: how well the recent windows predict it (a Dirichlet-multinomial around the
reference and the decayed past) over how well the reference does. Three things are taken off, or no guarantee would hold:

- samples of one device resemble each other: counts are divided by the design effect
  (:func:`edgekit.monitor.compare.design_effect`);
- the reference is an estimate from m samples, whose divergence from the truth is chi-squared with B - 1 degrees of freedom over
  2m: what it exceeds in one case of a hundred, in nats a sample (its mean is not enough: one baseline serves for long);
- a shift may be real and not matter: ``effect_floor`` nats a sample, 0.005 being about a tenth of a standard deviation.

    >>> import numpy as np
    >>> rule = Rule(arl=1000.0)
    >>> state, reference = DetectorState(), np.array([2500, 2500, 2500, 2500])
    >>> for window in ([50, 50, 50, 50], [20, 30, 60, 90], [20, 30, 60, 90]):
    ...     state = step(state, np.array(window), reference, rule)
    >>> state.is_alarm, state.windows
    (True, 3)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekit.monitor.compare import JEFFREYS, Counts, shares
from edgekit.schema.base import Record

PRIOR_SAMPLES = 200.0
DECAY = 0.9
EFFECT_FLOOR = 0.005
Z99 = 2.3263478740408408
_CAP = 1e4


class Rule(Record, frozen=True, kw_only=True):
    """``arl``: windows to a false alarm, on average at least. ``effect_floor``: nats a sample that do not matter."""

    arl: float
    effect_floor: float = EFFECT_FLOOR


class DetectorState(Record, frozen=True, kw_only=True):
    """What one stream remembers: B numbers and a few more."""

    log_m: float = -math.inf
    """Natural logarithm of M; minus infinity before the first window."""
    past: tuple[float, ...] = ()
    """Decayed counts of the windows so far, divided by the design effect."""
    windows: int = 0
    is_alarm: bool = False
    since: int = 0
    """The window, counted from 1, in which the alarm began; 0 for none."""


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


def log_evidence(current: Counts, past: Sequence[float], reference: Counts, rule: Rule, *, design_effect: float = 1.0) -> float:
    """Natural logarithm of a window's e-value: at most 0 on average where nothing drifts.

    Args:
        current: counts [B] of the window.
        past: decayed counts [B] of the windows before; empty for none.
        reference: counts [B] of the baseline.
        rule: the effect that does not matter.
        design_effect: at least 1.
    """
    counts = np.asarray(current, dtype=np.float64) / max(1.0, design_effect)
    base = np.asarray(reference, dtype=np.float64)
    n, m = float(counts.sum()), float(base.sum())
    if not n or not m:
        return 0.0
    p0 = shares(base, prior=JEFFREYS)
    alpha = PRIOR_SAMPLES * p0
    if len(past):
        alpha = alpha + np.asarray(past, dtype=np.float64)
    slack = _reference_error(counts.size - 1, m) + rule.effect_floor
    return _log_dirichlet_multinomial(counts, alpha) - float((counts * np.log(p0)).sum()) - n * slack


def _reference_error(degrees_of_freedom: int, samples: float) -> float:
    """The 99th percentile of chi-squared by Wilson and Hilferty's cube root, over 2m."""
    if degrees_of_freedom < 1:
        return 0.0
    part = 2.0 / (9.0 * degrees_of_freedom)
    return float(degrees_of_freedom * (1.0 - part + Z99 * math.sqrt(part)) ** 3 / (2.0 * samples))


def _log_dirichlet_multinomial(counts: NDArray[np.float64], alpha: NDArray[np.float64]) -> float:
    """Without the multinomial coefficient, which the ratio does not need."""
    total = math.lgamma(float(alpha.sum())) - math.lgamma(float(alpha.sum() + counts.sum()))
    return total + sum(math.lgamma(a + c) - math.lgamma(a) for a, c in zip(alpha.tolist(), counts.tolist(), strict=True) if c)


def step(state: DetectorState, current: Counts, reference: Counts, rule: Rule, *, design_effect: float = 1.0) -> DetectorState:
    """The state after one more window; M becomes (M + 1) times the window's e-value.

    A window without samples changes nothing. The alarm stays until :func:`acknowledge`.

    Raises:
        ValueError: when the window has other bins than the reference.
    """
    counts = np.asarray(current, dtype=np.float64)
    if counts.shape != np.shape(reference) or (state.past and len(state.past) != counts.size):
        raise ValueError(f"a window of {counts.size} bins for a reference of {np.size(reference)}")
    if not counts.sum():
        return state
    evidence = log_evidence(counts, state.past, reference, rule, design_effect=design_effect)
    log_m = min(_CAP, float(np.logaddexp(state.log_m, 0.0)) + evidence)
    before = np.asarray(state.past, dtype=np.float64) if state.past else np.zeros(counts.shape)
    windows = state.windows + 1
    is_new = not state.is_alarm and log_m > math.log(rule.arl)
    return DetectorState(
        log_m=log_m,
        past=tuple((DECAY * (before + counts / max(1.0, design_effect))).tolist()),
        windows=windows,
        is_alarm=state.is_alarm or is_new,
        since=windows if is_new else state.since,
    )


def acknowledge(state: DetectorState) -> DetectorState:
    """Begin anew: the alarm was seen, or another model serves."""
    return DetectorState(windows=state.windows)


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
