"""Is a new model better than the one that serves? Both answer the same samples, and the difference has an interval.

Where each answer is right or wrong, the four ways in which two models can agree or not are drawn from their posterior with
Jeffreys' prior, so that a handful of samples never gives an interval of width zero. Other metrics that are a mean over samples
are drawn anew in pairs (Efron & Tibshirani 1993, chapter 13). The candidate is

- **better** when the whole interval of what it gains lies above 0,
- **worse** when the whole interval lies below 0 and its lower end below the margin,
- **not worse** when the interval ends no lower than the margin,
- and **cannot tell** otherwise.

>>> judge(low=-0.001, high=0.001, margin=0.01)
'not worse'
>>> judge(low=-0.05, high=0.05, margin=0.01)
'cannot tell'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from edgekit.dataset.data import Array, Dataset
from edgekit.errors import DataError, UsageError
from edgekit.evaluation.evaluate import INTERVAL, resample_means
from edgekit.evaluation.metric import Evidence, Metric, class_labels, confusion, recall_by_class
from edgekit.schema.base import Record
from edgekit.schema.digest import Digest

Judgement = Literal["better", "not worse", "worse", "cannot tell"]
DRAWS = 20_000
SCALAR_RESAMPLES = 300
_JEFFREYS = 0.5


class ClassPair(Record, frozen=True, kw_only=True):
    """Recall of one class before and after; None where no sample has it."""

    name: str
    samples: int
    current: float | None = None
    candidate: float | None = None


class Rivalry(Record, frozen=True, kw_only=True):
    """Two models on one data set. ``gain`` above 0 is for the candidate, whatever the metric."""

    name: str
    """What the data is: ``old evaluation data``, ``field samples``."""
    metric: str
    samples: int
    data: Digest
    current: float
    candidate: float
    gain: float
    low: float | None
    high: float | None
    """95 % interval of the gain; None where it is not known."""
    margin: float
    verdict: Judgement
    reason: str = ""
    classes: tuple[ClassPair, ...] = ()
    confusion_current: tuple[tuple[int, ...], ...] = ()
    """Counts by true class (row) and predicted class (column)."""
    confusion_candidate: tuple[tuple[int, ...], ...] = ()


def judge(*, low: float | None, high: float | None, margin: float) -> Judgement:
    """The verdict that an interval allows."""
    if low is None or high is None:
        return "cannot tell"
    if low > 0:
        return "better"
    if low >= -margin:
        return "not worse"
    return "worse" if high < 0 else "cannot tell"


def compare_rivals(
    candidate: Mapping[str, Array],
    current: Mapping[str, Array],
    data: Dataset,
    metric: Metric,
    *,
    name: str,
    margin: float,
    min_samples: int = 1,
    reference: Mapping[str, Array] | None = None,
    seed: int = 0,
) -> Rivalry:
    """Compare a candidate with the model that serves, on the same samples.

    Args:
        candidate: the candidate's answers to every sample.
        current: those of the model that serves.
        data: the samples.
        metric: what counts.
        name: what the data is, for people.
        margin: how much worse still counts as not worse, in the metric's unit.
        min_samples: with fewer nobody can tell.
        reference: what a metric of fidelity (``agreement``, ``sqnr_db``) compares both with.
        seed: of what is drawn.

    Raises:
        DataError, UsageError: when the metric does not fit the labels or the outputs.
    """
    sides = [
        Evidence(
            outputs=outputs, baseline=reference if reference is not None else current, labels=data.labels, source=data.source
        )
        for outputs in (candidate, current)
    ]
    scores = [metric.score(side) for side in sides]
    values = [
        float(metric.finish(np.asarray(score.mean(dtype=np.float64)))) if isinstance(score, np.ndarray) else float(score)
        for score in scores
    ]
    sign = 1.0 if metric.is_higher_better else -1.0
    low, high = _interval(scores, sides, metric, sign=sign, seed=seed)
    verdict = judge(low=low, high=high, margin=margin)
    reason = ""
    if len(data) < min_samples:
        verdict, reason = "cannot tell", f"{len(data)} samples, at least {min_samples} are needed"
    classes, before, after = _by_class(sides, data)
    return Rivalry(
        name=name,
        metric=metric.name,
        samples=len(data),
        data=data.digest,
        current=values[1],
        candidate=values[0],
        gain=sign * (values[0] - values[1]),
        low=low,
        high=high,
        margin=margin,
        verdict=verdict,
        reason=reason,
        classes=classes,
        confusion_current=before,
        confusion_candidate=after,
    )


def _interval(
    scores: list[Array | float], sides: list[Evidence], metric: Metric, *, sign: float, seed: int
) -> tuple[float, float] | tuple[None, None]:
    ours, theirs = scores
    if not isinstance(ours, np.ndarray) or not isinstance(theirs, np.ndarray):
        gains = _resampled_scalar(sides, metric, seed=seed)
    elif len(ours) < 2:
        return None, None
    elif set(np.unique(np.concatenate([ours, theirs]))) <= {0.0, 1.0}:
        gains = _binary_gains(ours, theirs, seed=seed)
    else:
        finished = metric.finish(resample_means(np.stack([ours, theirs], axis=1), seed=seed))
        gains = finished[:, 0] - finished[:, 1]
    if not len(gains):
        return None, None
    low, high = np.quantile(sign * gains, INTERVAL)
    return float(low), float(high)


def _binary_gains(ours: Array, theirs: Array, *, seed: int) -> Array:
    """Gains drawn from the posterior of the shares that only one of both has right."""
    both = int(((ours == 1) & (theirs == 1)).sum())
    only_ours, only_theirs = int(((ours == 1) & (theirs == 0)).sum()), int(((ours == 0) & (theirs == 1)).sum())
    neither = len(ours) - both - only_ours - only_theirs
    counts = np.array([both, only_ours, only_theirs, neither], dtype=np.float64) + _JEFFREYS
    drawn: Array = np.random.default_rng(seed).dirichlet(counts, DRAWS)
    return np.asarray(drawn[:, 1] - drawn[:, 2])


def _resampled_scalar(sides: list[Evidence], metric: Metric, *, seed: int) -> Array:
    """Of a metric that is one figure for all samples: samples drawn anew, both models on the same ones."""
    random, count = np.random.default_rng(seed), len(sides[0].first)
    gains = []
    for _ in range(SCALAR_RESAMPLES):
        chosen = random.integers(0, count, count)
        try:
            ours, theirs = (float(metric.score(_some(side, chosen))) for side in sides)
        except (DataError, UsageError, TypeError):
            return np.zeros(0)
        gains.append(ours - theirs)
    return np.asarray(gains)


def _some(side: Evidence, chosen: Array) -> Evidence:
    return Evidence(
        outputs={name: array[chosen] for name, array in side.outputs.items()},
        baseline={name: array[chosen] for name, array in side.baseline.items()},
        labels=None if side.labels is None else side.labels[chosen],
        source=side.source,
    )


def _by_class(
    sides: list[Evidence], data: Dataset
) -> tuple[tuple[ClassPair, ...], tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Recall and confusion by class, where the model answers with class scores and labels are classes."""
    scores = [side.first for side in sides]
    if data.labels is None or scores[0].ndim != 2 or scores[0].shape[1] < 2:
        return (), (), ()
    classes = scores[0].shape[1]
    try:
        labels = class_labels(sides[0], "top1", classes)
    except (DataError, UsageError):
        return (), (), ()
    names = data.class_names if len(data.class_names) == classes else tuple(map(str, range(classes)))
    ours, theirs = (recall_by_class(score, labels) for score in scores)
    counts = np.bincount(labels, minlength=classes)
    pairs = tuple(
        ClassPair(name=names[at], samples=int(counts[at]), current=theirs.get(at), candidate=ours.get(at))
        for at in range(classes)
    )
    after, before = (confusion(score.argmax(axis=1), labels, classes) for score in scores)
    return pairs, _table(before), _table(after)


def _table(counts: Array) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(cell) for cell in row) for row in counts)
