"""A classifier's quality before labels arrive, from counts alone: confidence-based performance estimation on histograms.

A device sends, for each class that was predicted, how many answers fell into which of 20 bins of confidence. The baseline says
how often answers of a bin were right (the calibration). Where confidence still means what it meant, the share of right answers
is the sum over the bins. It sees covariate shift; it is blind to concept drift, where the same confidence is right less often:
every estimate says so, and the gap to the quality that labels show later is the alarm for that.

    >>> import numpy as np
    >>> calibration = calibrate(right=np.array([[60, 190]]), answered=np.array([[100, 200]]))
    >>> estimate(np.array([[10, 90]]), calibration).accuracy
    0.915
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgekit.monitor.compare import JEFFREYS, Counts
from edgekit.schema.base import Record

CONFIDENCE_BINS = 20
Z95 = 1.959963984540054


class Calibration(Record, frozen=True, kw_only=True):
    """How often answers were right in the baseline, by predicted class and bin of confidence: [C][bins]."""

    right_share: tuple[tuple[float, ...], ...]
    answered: tuple[tuple[float, ...], ...]


class Estimate(Record, frozen=True, kw_only=True):
    """The estimated quality of some answers; ``low`` to ``high`` holds the accuracy with 95 % where concepts did not drift."""

    samples: float
    accuracy: float
    low: float
    high: float
    precision: tuple[float, ...]
    """By predicted class; NaN where it was never predicted."""
    assumption: str = "no concept drift"


def calibrate(*, right: Counts, answered: Counts) -> Calibration:
    """The calibration of a labelled baseline.

    A bin with few answers leans on its class's other bins, one without any answers takes the class's share.

    Args:
        right: answers that were right [C, bins].
        answered: all answers [C, bins].

    Raises:
        ValueError: when more were right than answered, or the shapes differ.
    """
    hits, total = np.asarray(right, dtype=np.float64), np.asarray(answered, dtype=np.float64)
    if hits.shape != total.shape or hits.ndim != 2 or (hits > total).any() or (hits < 0).any():
        raise ValueError(
            f"right {hits.shape} of answered {total.shape}: expected two tables [classes, bins], right <= answered"
        )
    overall = (hits.sum() + JEFFREYS) / (total.sum() + 2 * JEFFREYS)
    by_class = (hits.sum(axis=1) + 2 * JEFFREYS * overall) / (total.sum(axis=1) + 2 * JEFFREYS)
    share = np.where(total > 0, hits / np.maximum(total, 1e-12), by_class[:, None])
    return Calibration(right_share=_rows(share), answered=_rows(total))


def _rows(table: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


def estimate(counts: Counts, calibration: Calibration) -> Estimate:
    """The quality of answers nobody labelled.

    The interval has two parts: these answers are a sample, and the calibration is an estimate from its own sample.

    Args:
        counts: answers [C, bins] by predicted class and bin of confidence.
        calibration: of the baseline, with the same shape.

    Raises:
        ValueError: when the shapes differ.
    """
    table, share = np.asarray(counts, dtype=np.float64), np.asarray(calibration.right_share, dtype=np.float64)
    if table.shape != share.shape:
        raise ValueError(f"counts {table.shape} for a calibration {share.shape}")
    total = float(table.sum())
    by_class = table.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(by_class > 0, (table * share).sum(axis=1) / by_class, math.nan)
    if not total:
        return Estimate(samples=0.0, accuracy=math.nan, low=math.nan, high=math.nan, precision=tuple(precision.tolist()))
    accuracy = float((table * share).sum() / total)
    spread = share * (1 - share)
    known = np.maximum(np.asarray(calibration.answered, dtype=np.float64), 1.0)
    variance = float((table * spread).sum() / total**2 + ((table / total) ** 2 * spread / known).sum())
    reach = Z95 * math.sqrt(variance)
    return Estimate(
        samples=total,
        accuracy=round(accuracy, 12),
        low=max(0.0, accuracy - reach),
        high=min(1.0, accuracy + reach),
        precision=tuple(precision.tolist()),
    )


class Realised(Record, frozen=True, kw_only=True):
    """The quality that labels show; ``low`` to ``high`` holds it with 95 % (Wilson's interval)."""

    labelled: int
    accuracy: float
    low: float
    high: float


def realise(right: float, labelled: float) -> Realised:
    """The accuracy of labelled answers; NaN without any.

    >>> realise(90, 100).accuracy
    0.9
    """
    if labelled <= 0:
        return Realised(labelled=0, accuracy=math.nan, low=math.nan, high=math.nan)
    share = right / labelled
    square = Z95**2
    middle = (share + square / (2 * labelled)) / (1 + square / labelled)
    reach = Z95 * math.sqrt(share * (1 - share) / labelled + square / (4 * labelled**2)) / (1 + square / labelled)
    return Realised(labelled=round(labelled), accuracy=share, low=max(0.0, middle - reach), high=min(1.0, middle + reach))


def weigh(*, right: Counts, labelled: Counts, answered: Counts) -> float:
    """The accuracy of all answers when some are labelled more readily than others.

    Labels weighted by the inverse of how often answers of their bin of confidence are labelled (inverse probability weighting
    by post-stratification). It corrects a choice that depends on the confidence, no other; bins without labels are left out.

    Args:
        right: labelled answers that were right [bins].
        labelled: labelled answers [bins].
        answered: all answers [bins].

    Returns:
        NaN where nothing is labelled, or less than half of the answers lie in bins with labels.

    >>> float(weigh(right=np.array([2, 90]), labelled=np.array([4, 100]), answered=np.array([500, 500])))
    0.7
    """
    hits, known, total = (np.asarray(each, dtype=np.float64) for each in (right, labelled, answered))
    if not hits.shape == known.shape == total.shape:
        raise ValueError(f"tables of shapes {hits.shape}, {known.shape}, {total.shape}: expected one shape")
    used = known > 0
    if not used.any() or total[used].sum() < total.sum() / 2 or not total.sum():
        return math.nan
    return float((total[used] * hits[used] / known[used]).sum() / total[used].sum())
