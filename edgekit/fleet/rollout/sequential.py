"""Champion against challenger: a test that may be looked at as often as one likes.

Two groups of devices report how many of how many answers were right. Devices are clusters: their answers are alike, so that
the variance is that between devices (linearized ratio estimator; Cochran, Sampling Techniques, 6.5). The interval for the
difference holds at all times at once (normal mixture, Robbins 1970; asymptotic confidence sequences, Waudby-Smith et al. 2021),
so that stopping when it leaves zero does not raise the rate of false alarms, as it would with a p-value.

>>> judge([Cluster(hits=90, trials=100)] * 20, [Cluster(hits=60, trials=100)] * 20, margin=0.02).verdict
'challenger is worse'
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from edgekit.schema.base import Record

Verdict = Literal["challenger is better", "challenger is worse", "no difference", "keep going"]
MIN_CLUSTERS = 8
"""Devices on each side, below which the interval is not trusted."""
SMOOTHING = 1.0
"""Pseudo-answers that keep the variance of a perfect score from being nothing."""


class Cluster(Record, frozen=True, kw_only=True):
    """One device: ``hits`` of ``trials``."""

    hits: int
    trials: int


class Judgement(Record, frozen=True, kw_only=True):
    """What is known now; ``difference`` is challenger less champion, with its interval."""

    verdict: Verdict
    champion: float | None
    challenger: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    champion_trials: int = 0
    challenger_trials: int = 0
    champion_devices: int = 0
    challenger_devices: int = 0


def ratio(clusters: Sequence[Cluster]) -> tuple[float, float] | None:
    """The share of hits, and the variance of this estimate; None without two devices that tried anything."""
    used = [cluster for cluster in clusters if cluster.trials > 0]
    if len(used) < 2:
        return None
    trials = sum(cluster.trials for cluster in used)
    share = sum(cluster.hits for cluster in used) / trials
    between = sum((cluster.hits - share * cluster.trials) ** 2 for cluster in used) * len(used) / (len(used) - 1)
    smooth = (sum(cluster.hits for cluster in used) + SMOOTHING) / (trials + 2 * SMOOTHING)
    independent = smooth * (1 - smooth) / trials
    return share, max(between / trials**2, independent)


def half_width(variance: float, *, alpha: float, planned: float) -> float:
    """Half the interval's width, valid at all times.

    Args:
        variance: of the estimate now.
        alpha: the share of experiments in which the interval ever misses the truth.
        planned: the variance at which it shall be narrowest.
    """
    information, tuned = 1.0 / variance, 1.0 / planned
    log_alpha = -2.0 * math.log(alpha)
    rho = tuned / (log_alpha + math.log(log_alpha) + 1.0)
    return math.sqrt((information + rho) * math.log((information + rho) / (rho * alpha**2))) / information


def judge(
    champion: Sequence[Cluster],
    challenger: Sequence[Cluster],
    *,
    margin: float,
    alpha: float = 0.05,
    higher_is_better: bool = True,
) -> Judgement:
    """What may be said now.

    Args:
        champion: the devices that serve the present release.
        challenger: those that serve the new one.
        margin: a difference below that is none.
        alpha: the share of experiments that may say something wrong.
        higher_is_better: of the share of hits.
    """
    left, right = ratio(champion), ratio(challenger)
    devices = [sum(cluster.trials > 0 for cluster in side) for side in (champion, challenger)]
    trials = [sum(cluster.trials for cluster in side) for side in (champion, challenger)]
    if left is None or right is None:
        return Judgement(verdict="keep going", champion=left[0] if left else None, challenger=right[0] if right else None)
    difference, variance = right[0] - left[0], left[1] + right[1]
    width = half_width(variance, alpha=alpha, planned=max(margin / 3, 1e-6) ** 2)
    low, high = difference - width, difference + width
    verdict: Verdict = "keep going"
    if min(devices) >= MIN_CLUSTERS:
        if low > 0 or high < 0:
            verdict = "challenger is better" if (low > 0) == higher_is_better else "challenger is worse"
        if -margin < low and high < margin:
            verdict = "no difference"
    return Judgement(
        verdict=verdict,
        champion=left[0],
        challenger=right[0],
        difference=difference,
        low=low,
        high=high,
        champion_trials=trials[0],
        challenger_trials=trials[1],
        champion_devices=devices[0],
        challenger_devices=devices[1],
    )
