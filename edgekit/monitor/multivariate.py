"""Drift of several numbers together: where each alone looks as before, and what they have to do with one another has changed.

Sketches of single streams cannot show it, so it needs samples: opted-in ones from devices, or a recording. Two tests:

- :class:`MeanEmbedding`: maximum mean discrepancy by random Fourier features (Gretton et al., JMLR 2012; Rahimi and Recht, NIPS
  2007). A sample becomes 128 numbers, a window their mean; the distance between two means has a null distribution that follows
  from the reference's own covariance (Satterthwaite's chi-squared approximation), so that no permutations are needed.
  It sees shifts of many kinds, and pure changes of correlation in few dimensions badly.
- :func:`classify_domains`: a logistic regression on the values and their products tells reference from now, judged on samples
  that it did not see (Lopez-Paz and Oquab, "Revisiting classifier two-sample tests", 2017). Its products see correlation.

Both take the samples as independent of each other. Neighbours in time are not: with ``block`` so many of them count as one,
which is an estimate of the caller's. Looked at again and again, p-values become e-values (:func:`evidence_of`) and a
detector of their own.

>>> rng = np.random.default_rng(0)
>>> embedding = MeanEmbedding.fit(rng.normal(size=(4000, 5)), seed=1)
>>> embedding.test(rng.normal(size=(400, 5))).p_value > 0.01
True
>>> embedding.test(rng.normal(0.4, 1.0, size=(400, 5))).p_value < 1e-6
True
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.monitor.compare import chi_squared_tail
from edgekit.schema.base import Record

Array = NDArray[Any]
FEATURES = 128
_MAX_MEDIAN = 1000
_MAX_PRODUCTS = 40
_RIDGE = 1e-2
_STEPS = 25
FOLDS = 2


class JointTest(Record, frozen=True, kw_only=True):
    """The outcome: ``statistic`` is the squared distance of means, or the area under the ROC curve."""

    method: str
    statistic: float
    p_value: float
    samples: int
    reference_samples: int


@dataclass(frozen=True)
class MeanEmbedding:
    """Random features of a reference, with their mean and covariance."""

    centre: Array
    scale: Array
    weights: Array
    phases: Array
    mean: Array
    moments: tuple[float, float]
    """Trace of the features' covariance, and of its square."""
    samples: int

    @classmethod
    def fit(cls, reference: Array, *, seed: int, features: int = FEATURES) -> MeanEmbedding:
        """Choose features by the reference's spread.

        Args:
            reference: float [m, D], m at least 2; rows with a value that is not finite are left out.
            seed: of the random features.
            features: how many.

        Raises:
            ValueError: when there are too few rows.
        """
        rows = _finite_rows(reference)
        if rows.shape[0] < 2:
            raise ValueError(f"a reference of {rows.shape[0]} complete rows: expected at least 2")
        rng = np.random.default_rng(seed)
        centre, scale = rows.mean(axis=0), np.maximum(rows.std(axis=0), 1e-9)
        some = (rows[rng.permutation(rows.shape[0])[:_MAX_MEDIAN]] - centre) / scale
        pairs = some[: some.shape[0] // 2] - some[some.shape[0] // 2 : some.shape[0] // 2 * 2]
        width = max(float(np.median(np.sqrt((pairs**2).sum(axis=1)))), 1e-6) if len(pairs) else 1.0
        made = cls(
            centre=centre,
            scale=scale,
            weights=rng.normal(size=(rows.shape[1], features)) / width,
            phases=rng.uniform(0, 2 * np.pi, features),
            mean=np.zeros(features),
            moments=(0.0, 0.0),
            samples=rows.shape[0],
        )
        values = made.embed(rows)
        covariance = np.cov(values, rowvar=False)
        moments = (float(np.trace(covariance)), float((covariance**2).sum()))
        return cls(**(made.__dict__ | {"mean": values.mean(axis=0), "moments": moments}))

    def embed(self, rows: Array) -> Array:
        """Random Fourier features [N, features] of rows [N, D]."""
        scaled = (np.asarray(rows, dtype=np.float64) - self.centre) / self.scale
        return np.asarray(np.sqrt(2.0 / self.phases.size) * np.cos(scaled @ self.weights + self.phases))

    def test(self, rows: Array, *, block: float = 1.0) -> JointTest:
        """Whether rows come from the reference.

        Args:
            rows: float [N, D].
            block: so many neighbouring rows count as one, at least 1.
        """
        known = _finite_rows(rows)
        n = known.shape[0] / max(1.0, block)
        if known.shape[0] < 2:
            return JointTest(
                method="mmd", statistic=math.nan, p_value=1.0, samples=known.shape[0], reference_samples=self.samples
            )
        difference = self.embed(known).mean(axis=0) - self.mean
        distance = float(difference @ difference)
        trace, square = self.moments
        freedom = trace**2 / square  # Satterthwaite: a sum of weighted chi-squared as one, by mean and variance
        value = distance / ((1.0 / n + 1.0 / self.samples) * trace) * freedom
        p_value = chi_squared_tail_real(value, freedom)
        return JointTest(
            method="mmd", statistic=distance, p_value=p_value, samples=known.shape[0], reference_samples=self.samples
        )


def chi_squared_tail_real(value: float, degrees_of_freedom: float) -> float:
    """The tail for degrees of freedom that are no whole number: between the two whole ones beside it, on a log scale."""
    low = max(1, math.floor(degrees_of_freedom))
    share = max(0.0, degrees_of_freedom - low)
    below, above = chi_squared_tail(value, low), chi_squared_tail(value, low + 1)
    if below <= 0 or above <= 0:
        return max(below, above)
    return math.exp((1 - share) * math.log(below) + share * math.log(above))


def _finite_rows(rows: Array) -> Array:
    table = np.asarray(rows, dtype=np.float64)
    table = table.reshape(table.shape[0], -1)
    return table[np.isfinite(table).all(axis=1)]


def classify_domains(reference: Array, rows: Array, *, seed: int, block: float = 1.0) -> JointTest:
    """Whether a classifier can tell the reference from now on samples that it did not see.

    Args:
        reference: float [m, D].
        rows: float [N, D].
        seed: of the split.
        block: so many neighbouring rows count as one.

    Returns:
        The area under the ROC curve over both halves, with Hanley and McNeil's one-sided test against 0.5 by the normal
        approximation of the Mann-Whitney statistic.
    """
    a, b = _finite_rows(reference), _finite_rows(rows)
    if min(len(a), len(b)) < 2 * FOLDS:
        return JointTest(method="classifier", statistic=math.nan, p_value=1.0, samples=len(b), reference_samples=len(a))
    values = _with_products(np.concatenate([a, b]))
    is_now = np.concatenate([np.zeros(len(a)), np.ones(len(b))])
    fold = _folds(len(a), len(b), seed)
    scores = np.zeros(len(values))
    for each in range(FOLDS):
        known = fold != each
        scores[~known] = _fit_logistic(values[known], is_now[known])(values[~known])
    areas, variance = [], 0.0
    for each in range(FOLDS):
        here = fold == each
        n, m = float(is_now[here].sum()), float((1 - is_now[here]).sum())
        areas.append(_area(scores[here], is_now[here] > 0))
        variance += (n / block + m / block + 1) / (12 * (n / block) * (m / block)) / FOLDS**2
    area = float(np.mean(areas))
    z = (area - 0.5) / math.sqrt(variance)
    p_value = 0.5 * math.erfc(z / math.sqrt(2))
    return JointTest(method="classifier", statistic=area, p_value=p_value, samples=len(b), reference_samples=len(a))


def _folds(first: int, second: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(count) % FOLDS for count in (first, second)])


def _with_products(rows: Array) -> Array:
    """Standardized values, their squares and, of the first few columns, their products."""
    scaled = (rows - rows.mean(axis=0)) / np.maximum(rows.std(axis=0), 1e-9)
    scaled = np.clip(scaled, -5, 5)
    some = scaled[:, :_MAX_PRODUCTS]
    at = np.triu_indices(some.shape[1])
    products = some[:, at[0]] * some[:, at[1]]
    products = (products - products.mean(axis=0)) / np.maximum(products.std(axis=0), 1e-9)
    return np.concatenate([np.ones((len(rows), 1)), scaled, products], axis=1)


def _fit_logistic(values: Array, is_now: Array) -> Any:
    """Ridge logistic regression by Newton's method, the classes weighted alike."""
    weight = np.where(is_now > 0, 0.5 / max(is_now.mean(), 1e-9), 0.5 / max(1 - is_now.mean(), 1e-9))
    beta = np.zeros(values.shape[1])
    ridge = _RIDGE * len(values) * np.eye(values.shape[1]) / 10
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-np.clip(values @ beta, -30, 30)))
        gradient = values.T @ (weight * (is_now - p)) - ridge @ beta
        hessian = (values * (weight * p * (1 - p))[:, None]).T @ values + ridge
        move = np.linalg.solve(hessian, gradient)
        beta = beta + move
        if float(np.abs(move).max()) < 1e-6:
            break
    return lambda rows: rows @ beta


def _area(scores: Array, is_now: Array) -> float:
    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(1, len(scores) + 1)
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.bincount(inverse, weights=ranks) / counts)[inverse]
    n, m = float(is_now.sum()), float((~is_now).sum())
    return float((ranks[is_now].sum() - n * (n + 1) / 2) / (n * m))


def evidence_of(p_value: float) -> float:
    """Natural logarithm of the e-value of a p-value: the calibrators k * p^(k - 1), mixed over k from 0 to 1.

    Vovk and Wang, "E-values: calibration, combination and applications", 2021.

    >>> round(evidence_of(1e-8), 1), round(evidence_of(0.9), 1)
    (12.6, -0.7)
    """
    p = min(max(p_value, 1e-300), 1 - 1e-9)
    log_p = math.log(p)
    return math.log(1 - p + p * log_p) - log_p - 2 * math.log(-log_p)


def step_joint(log_m: float, p_value: float) -> float:
    """The logarithm of the joint detector's number after one more test: M becomes (M + 1) times the e-value."""
    return float(np.logaddexp(log_m, 0.0)) + evidence_of(p_value)
