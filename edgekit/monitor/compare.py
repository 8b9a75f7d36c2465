"""How far two histograms over the same bins lie apart: the common statistics, each with what makes it honest.

A fixed threshold on PSI is a threshold on the sample size: without any drift its mean is about (B - 1)(1/n + 1/m) for B bins
and n and m samples, so that with 100 samples in 10 bins it exceeds 0.1 in two cases of five. ``psi`` here has that bias taken
off, and the raw value stands beside it. A p-value says that a difference is there, not that it matters: read it with an effect.

    >>> import numpy as np
    >>> same = compare(np.array([500, 300, 200]), np.array([50, 30, 20]))
    >>> round(same.psi, 3), same.kolmogorov_smirnov
    (0.0, 0.0)
    >>> compare(np.array([500, 300, 200]), np.array([20, 30, 50])).kolmogorov_smirnov
    0.3
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekit.schema.base import Record

Counts = NDArray[np.int64] | NDArray[np.float64]
JEFFREYS = 0.5
"""What each bin is thought to have beside what was counted: a bin without a sample is unlikely, not impossible."""
_MAX_TERMS = 10_000


class Comparison(Record, frozen=True, kw_only=True):
    """Two histograms beside each other. Distances are 0 for equal shares; all but PSI, Wasserstein and chi-squared end at 1.

    ``wasserstein`` is in units of the reference's spread (its 10th to 90th percentile), NaN where bins have no widths.
    """

    samples: float
    reference_samples: float
    psi: float
    psi_raw: float
    jensen_shannon: float
    """The distance: the square root of the divergence in bits."""
    hellinger: float
    total_variation: float
    kolmogorov_smirnov: float
    """The largest gap between the cumulated shares at the bins' edges; a lower bound of the exact statistic."""
    wasserstein: float
    chi_squared: float
    degrees_of_freedom: int
    p_value: float
    """Of the chi-squared test that both come from one distribution, by independent samples."""


def shares(counts: Counts, *, prior: float = 0.0) -> NDArray[np.float64]:
    """Counts as shares, with ``prior`` added to each bin. All zero gives equal shares with a prior, else NaN."""
    values = np.asarray(counts, dtype=np.float64) + prior
    total = values.sum()
    return np.asarray(values / total if total else np.full(values.shape, np.nan))


def psi_bias(bins: int, samples: float, reference_samples: float) -> float:
    """The mean of PSI where nothing drifts: (B - 1)(1/n + 1/m)."""
    if not samples or not reference_samples:
        return math.inf
    return (bins - 1) * (1.0 / samples + 1.0 / reference_samples)


def compare(
    reference: Counts, current: Counts, *, edges: Sequence[float] | None = None, design_effect: float = 1.0
) -> Comparison:
    """Compare two histograms.

    Args:
        reference: counts [B].
        current: counts [B] over the same bins.
        edges: B - 1 inner edges of ordered bins, the first and last bin being open; None for categories.
        design_effect: by how much the current samples' variance exceeds that of independent ones (:func:`design_effect`);
            the test and PSI's bias count n / design_effect samples.

    Raises:
        ValueError: when the histograms differ in length, or an argument makes no sense.
    """
    p, q = np.asarray(reference, dtype=np.float64), np.asarray(current, dtype=np.float64)
    if p.shape != q.shape or p.ndim != 1 or not p.size:
        raise ValueError(f"histograms of shapes {p.shape} and {q.shape}: expected two of one length")
    if (p < 0).any() or (q < 0).any() or design_effect < 1:
        raise ValueError("counts are not negative, and a design effect is at least 1")
    m, n = float(p.sum()), float(q.sum()) / design_effect
    raw = _psi(p, q)
    chi, freedom = _chi_squared(p, q / design_effect)
    ps, qs = shares(p), shares(q)
    return Comparison(
        samples=float(q.sum()),
        reference_samples=m,
        psi=max(0.0, raw - psi_bias(_used(p, q), n, m)) if n and m else math.nan,
        psi_raw=raw if n and m else math.nan,
        jensen_shannon=_jensen_shannon(ps, qs),
        hellinger=float(np.sqrt(max(0.0, 1.0 - float(np.sqrt(ps * qs).sum())))) if n and m else math.nan,
        total_variation=float(np.abs(ps - qs).sum() / 2),
        kolmogorov_smirnov=round(float(np.abs(np.cumsum(ps) - np.cumsum(qs)).max()), 12),
        wasserstein=_wasserstein(ps, qs, edges, m),
        chi_squared=chi,
        degrees_of_freedom=freedom,
        p_value=chi_squared_tail(chi, freedom) if n and m else math.nan,
    )


def _used(p: NDArray[np.float64], q: NDArray[np.float64]) -> int:
    """Bins that have a sample in either."""
    return max(1, int(np.count_nonzero(p + q)))


def _psi(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    used = (p + q) > 0
    a, b = shares(p[used], prior=JEFFREYS), shares(q[used], prior=JEFFREYS)
    return float(((b - a) * np.log(b / a)).sum())


def psi_over_time(reference: Counts, counts: Counts, *, design_effect: float = 1.0) -> NDArray[np.float64]:
    """PSI of many histograms against one reference, with its bias taken off; NaN for one without samples.

    Args:
        reference: counts [B].
        counts: [T, B].
        design_effect: at least 1, the same for all.

    >>> psi_over_time(np.array([500, 500]), np.array([[50, 50], [10, 90]])).round(2).tolist()
    [0.0, 0.83]
    """
    p, q = np.asarray(reference, dtype=np.float64)[None], np.asarray(counts, dtype=np.float64)
    used = (p + q) > 0
    a, b = np.where(used, p + JEFFREYS, 0.0), np.where(used, q + JEFFREYS, 0.0)
    a, b = (part / np.maximum(part.sum(axis=1, keepdims=True), JEFFREYS) for part in (a, b))
    with np.errstate(divide="ignore", invalid="ignore"):
        raw = np.where(used, (b - a) * np.log(b / np.where(used, a, 1.0)), 0.0).sum(axis=1)
        n, m = q.sum(axis=1) / design_effect, p.sum()
        bias = (used.sum(axis=1) - 1) * (1.0 / n + 1.0 / m)
        return np.asarray(np.where((n > 0) & (m > 0), np.maximum(0.0, raw - bias), math.nan))


def _jensen_shannon(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    middle = (p + q) / 2

    def divergence(part: NDArray[np.float64]) -> float:
        used = part > 0
        return float((part[used] * np.log2(part[used] / middle[used])).sum())

    value = (divergence(p) + divergence(q)) / 2
    return math.nan if np.isnan(middle).any() else math.sqrt(max(0.0, value))


def _wasserstein(p: NDArray[np.float64], q: NDArray[np.float64], edges: Sequence[float] | None, samples: float) -> float:
    """The area between the cumulated shares over the inner edges, in units of the reference's spread.

    Straight lines between the edges, but in the first and the last bin: there a tail ends, and the gap falls off as fast as the
    reference's tail does, exponentially down to half a sample.
    """
    if edges is None:
        return math.nan
    cuts = np.asarray(edges, dtype=np.float64)
    if cuts.shape != (p.size - 1,) or (np.diff(cuts) < 0).any():
        raise ValueError(f"{cuts.size} edges for {p.size} bins: expected {p.size - 1} in order")
    below_p, below_q = np.cumsum(p)[:-1], np.cumsum(q)[:-1]
    gaps = np.abs(below_p - below_q)
    areas = (gaps[1:] + gaps[:-1]) / 2 * np.diff(cuts)
    if areas.size > 2 and samples > 0:
        for at in (0, areas.size - 1):
            areas[at] = _logarithmic_mean(*(gaps[at : at + 2] + 0.5 / samples)) * (cuts[at + 1] - cuts[at])
    spread = float(np.interp(0.9, below_p, cuts) - np.interp(0.1, below_p, cuts))
    return float(areas.sum()) / spread if spread > 0 else math.nan


def _logarithmic_mean(a: float, b: float) -> float:
    """The mean of an exponential that goes from a to b."""
    return float((a - b) / math.log(a / b)) if abs(a - b) > 1e-12 else float(a)


def _chi_squared(p: NDArray[np.float64], q: NDArray[np.float64]) -> tuple[float, int]:
    """Pearson's statistic of the 2 x B table; empty bins do not count."""
    used = (p + q) > 0
    p, q = p[used], q[used]
    m, n = p.sum(), q.sum()
    if not m or not n or p.size < 2:
        return 0.0, max(1, p.size - 1)
    both = (p + q) / (m + n)
    value = ((p - m * both) ** 2 / (m * both)).sum() + ((q - n * both) ** 2 / (n * both)).sum()
    return float(value), int(p.size - 1)


def chi_squared_tail(value: float, degrees_of_freedom: int) -> float:
    """P(X >= value) for a chi-squared variable: the regularized upper incomplete gamma function Q(k/2, value/2).

    By its series below the mean and by Lentz's continued fraction above (DLMF 8.11.4 and 8.9.2).
    """
    a, x = degrees_of_freedom / 2.0, value / 2.0
    if x <= 0:
        return 1.0
    scale = math.exp(-x + a * math.log(x) - math.lgamma(a))
    if x < a + 1:
        term = total = 1.0 / a
        for step in range(1, _MAX_TERMS):
            term *= x / (a + step)
            total += term
            if term < total * 1e-16:
                break
        return min(1.0, max(0.0, 1.0 - scale * total))
    tiny = 1e-300
    b = x + 1.0 - a
    c, d = 1.0 / tiny, 1.0 / b
    fraction = d
    for step in range(1, _MAX_TERMS):
        factor = -step * (step - a)
        b += 2.0
        d = 1.0 / (factor * d + b or tiny)
        c = b + factor / c or tiny
        fraction *= d * c
        if abs(d * c - 1.0) < 1e-15:
            break
    return min(1.0, max(0.0, scale * fraction))


def design_effect(by_device: Counts) -> float:
    """By how much clustering in devices inflates the variance of pooled shares; at least 1.

    Rao and Scott's first-order correction (Annals of Statistics 12, 1984), the clusters being devices:
    the mean over the bins of estimated variance over binomial variance, weighted by 1 - share.

    Args:
        by_device: counts [D, B], one row a device; rows without samples are left out.
    """
    rows = np.asarray(by_device, dtype=np.float64)
    rows = rows[rows.sum(axis=1) > 0] if rows.size else rows
    if rows.shape[0] < 2:
        return 1.0
    sizes = rows.sum(axis=1)
    total, pooled = float(sizes.sum()), rows.sum(axis=0) / sizes.sum()
    used = (pooled > 0) & (pooled < 1)
    if not used.any():
        return 1.0
    devices = rows.shape[0]
    residual = rows[:, used] - sizes[:, None] * pooled[used]
    variance = devices / (devices - 1) * (residual**2).sum(axis=0) / total**2
    binomial = pooled[used] * (1 - pooled[used]) / total
    weights = 1 - pooled[used]
    return max(1.0, float((weights * variance / binomial).sum() / weights.sum()))
