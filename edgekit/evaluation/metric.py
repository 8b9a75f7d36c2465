"""Metrics: what "quality" means for a model, by name or by the user's own function.

A metric is a mean over samples (then its drop gets a paired bootstrap interval) or one figure for the whole data set. The first
output counts; its last axis holds the classes of a classifier. Fidelity metrics (``agreement``, ``sqnr_db``) compare with the
fp32 baseline and need no labels.

    >>> resolve_metric(None, has_labels=True, task="classification").name
    'top1'
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgekit.dataset.data import Array, suggest
from edgekit.dataset.function import is_function_spec, load_attribute
from edgekit.errors import DataError, EdgekitError, UsageError
from edgekit.schema.contract import Task

SQNR_CAP_DB = 200.0
"""SQNR of identical outputs: infinite by its formula, this by our records, since JSON has no infinity."""
TOP5_CLASSES = 6
Unit = Literal["fraction", "dB", "label", "label squared", ""]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a metric may look at. ``baseline`` has the fp32 outputs of the same samples, in the same order of outputs."""

    outputs: Mapping[str, Array]
    baseline: Mapping[str, Array]
    labels: Array | None
    source: str = "data"

    @property
    def first(self) -> Array:
        """The first output, [N, ...]."""
        return next(iter(self.outputs.values()))

    @property
    def first_baseline(self) -> Array:
        """The baseline's first output."""
        return next(iter(self.baseline.values()))


def _unchanged(mean: Array) -> Array:
    return mean


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric: ``score`` gives an array [N] (its mean, passed through ``finish``, is the value) or the value itself."""

    name: str
    is_higher_better: bool
    score: Callable[[Evidence], Array | float]
    unit: Unit = ""
    needs_labels: bool = False
    is_for_classifiers: bool = False
    finish: Callable[[Array], Array] = _unchanged


# --- classification ---------------------------------------------------------------------------------------------------------


def class_scores(evidence: Evidence, metric: str) -> Array:
    """The first output as class scores [N, ..., C].

    Raises:
        UsageError: ``metric.not_classifier`` when its last axis has fewer than two entries.
    """
    scores = evidence.first
    if scores.ndim < 2 or scores.shape[-1] < 2:
        raise UsageError(
            "metric.not_classifier",
            f"metric {metric}: the first output has shape {list(scores.shape)}; expected classes on its last axis.",
            hint="Choose sqnr_db, mse or mae, or give your own with --metric module:function.",
        )
    return scores


def class_labels(evidence: Evidence, metric: str, classes: int) -> Array:
    """The labels as class indices, int64 [N].

    Raises:
        DataError: ``data.labels_dtype`` or ``data.labels_range``.
    """
    assert evidence.labels is not None
    labels = evidence.labels
    is_whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and bool((labels == np.trunc(labels)).all()))
    if labels.ndim != 1 or not is_whole:
        text = f"{evidence.source}: metric {metric} needs one class index per sample, the labels are {labels.dtype.name}"
        raise DataError(
            "data.labels_dtype", f"{text} of shape {list(labels.shape)}.", hint="Choose mse or mae, or save class indices."
        )
    indices = labels.astype(np.int64)
    wrong = (indices < 0) | (indices >= classes)
    if wrong.any():
        first = int(wrong.argmax())
        raise DataError(
            "data.labels_range",
            f"{evidence.source}: sample {first} has label {indices[first]}, the model's classes are 0 to {classes - 1}.",
            hint="Labels are indices of the model's classes, from 0.",
        )
    return indices


def _labelled(evidence: Evidence, metric: str) -> tuple[Array, Array]:
    scores = class_scores(evidence, metric)
    if scores.ndim != 2:
        text = f"metric {metric}: the first output has shape {list(scores.shape)}; expected [samples, classes]."
        raise UsageError("metric.not_classifier", text, hint="Give your own with --metric module:function.")
    return scores, class_labels(evidence, metric, scores.shape[1])


def _top1(evidence: Evidence) -> Array:
    scores, labels = _labelled(evidence, "top1")
    return np.asarray(scores.argmax(axis=1) == labels, dtype=np.float64)


def _top5(evidence: Evidence) -> Array:
    scores, labels = _labelled(evidence, "top5")
    if scores.shape[1] < TOP5_CLASSES:
        text = f"metric top5: the model has {scores.shape[1]} classes, every answer would count as right."
        raise UsageError("metric.too_few_classes", text, hint="Choose top1.")
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    places = np.arange(scores.shape[1])
    ahead = (scores > own) | ((scores == own) & (places < labels[:, None]))
    return np.asarray(ahead.sum(axis=1) < 5, dtype=np.float64)


def confusion(predicted: Array, labels: Array, classes: int) -> Array:
    """Counts [C, C]: row is the label, column the prediction."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def recall_by_class(scores: Array, labels: Array) -> dict[int, float]:
    """Accuracy of each class that occurs in the labels."""
    counts = confusion(scores.argmax(axis=1), labels, scores.shape[1])
    totals = counts.sum(axis=1)
    return {int(i): float(counts[i, i] / totals[i]) for i in np.flatnonzero(totals)}


def _balanced_accuracy(evidence: Evidence) -> float:
    recalls = recall_by_class(*_labelled(evidence, "balanced_accuracy"))
    return float(np.mean(list(recalls.values())))


def _f1_macro(evidence: Evidence) -> float:
    """Mean over the classes that occur in labels or predictions of 2 TP / (2 TP + FP + FN)."""
    scores, labels = _labelled(evidence, "f1_macro")
    counts = confusion(scores.argmax(axis=1), labels, scores.shape[1])
    weight = counts.sum(axis=0) + counts.sum(axis=1)
    seen = weight > 0
    return float(np.mean(2 * np.diag(counts)[seen] / weight[seen]))


# --- fidelity to the baseline -----------------------------------------------------------------------------------------------


def _agreement(evidence: Evidence) -> Array:
    same = class_scores(evidence, "agreement").argmax(axis=-1) == evidence.first_baseline.argmax(axis=-1)
    return np.asarray(same.reshape(len(same), -1).mean(axis=1), dtype=np.float64)


def sqnr_db(reference: Array, output: Array) -> float:
    """Signal to quantization noise ratio, 10 log10(sum ref^2 / sum (ref - out)^2), within +-``SQNR_CAP_DB``.

    >>> sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 3.5]))
    20.0
    """
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(reference.astype(np.float64) - output.astype(np.float64)).sum())
    if noise == 0:
        return SQNR_CAP_DB
    if signal == 0:
        return -SQNR_CAP_DB
    return min(SQNR_CAP_DB, max(-SQNR_CAP_DB, 10 * math.log10(signal / noise)))


def _worst_sqnr(evidence: Evidence) -> float:
    """Of several outputs the worst counts: they may differ in scale by any factor."""
    pairs = list(zip(evidence.baseline.values(), evidence.outputs.values(), strict=True))
    floats = [pair for pair in pairs if pair[0].dtype.kind == "f"] or pairs
    return min(sqnr_db(reference, output) for reference, output in floats)


# --- regression -------------------------------------------------------------------------------------------------------------


def _errors(evidence: Evidence, metric: str) -> Array:
    """Output minus label, float64 [N, k]."""
    assert evidence.labels is not None
    outputs, labels = evidence.first, evidence.labels
    count = len(outputs)
    if math.prod(outputs.shape[1:]) != math.prod(labels.shape[1:]):
        raise DataError(
            "data.labels_shape",
            f"{evidence.source}: metric {metric}: the first output is {list(outputs.shape)}, the labels {list(labels.shape)}.",
            hint="Give one label per output value, or another --metric.",
        )
    return outputs.reshape(count, -1).astype(np.float64) - labels.reshape(count, -1).astype(np.float64)


def _squared_error(evidence: Evidence) -> Array:
    return np.asarray(np.square(_errors(evidence, "mse")).mean(axis=1))


def _absolute_error(evidence: Evidence) -> Array:
    return np.asarray(np.abs(_errors(evidence, "mae")).mean(axis=1))


def _r2(evidence: Evidence) -> float:
    residual = np.square(_errors(evidence, "r2")).sum()
    assert evidence.labels is not None
    labels = evidence.labels.reshape(len(evidence.labels), -1).astype(np.float64)
    total = np.square(labels - labels.mean(axis=0)).sum()
    if total == 0:
        raise DataError(
            "data.labels_constant", f"{evidence.source}: all labels are equal, r2 is not defined.", hint="Choose mse."
        )
    return float(1 - residual / total)


_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="top1", is_higher_better=True, score=_top1, unit="fraction", needs_labels=True, is_for_classifiers=True),
        Metric(name="top5", is_higher_better=True, score=_top5, unit="fraction", needs_labels=True, is_for_classifiers=True),
        Metric(
            name="balanced_accuracy",
            is_higher_better=True,
            score=_balanced_accuracy,
            unit="fraction",
            needs_labels=True,
            is_for_classifiers=True,
        ),
        Metric(
            name="f1_macro", is_higher_better=True, score=_f1_macro, unit="fraction", needs_labels=True, is_for_classifiers=True
        ),
        Metric(name="agreement", is_higher_better=True, score=_agreement, unit="fraction", is_for_classifiers=True),
        Metric(name="sqnr_db", is_higher_better=True, score=_worst_sqnr, unit="dB"),
        Metric(name="mse", is_higher_better=False, score=_squared_error, unit="label squared", needs_labels=True),
        Metric(name="rmse", is_higher_better=False, score=_squared_error, unit="label", needs_labels=True, finish=np.sqrt),
        Metric(name="mae", is_higher_better=False, score=_absolute_error, unit="label", needs_labels=True),
        Metric(name="r2", is_higher_better=True, score=_r2, needs_labels=True),
    )
}


def metric_names() -> tuple[str, ...]:
    """The built-in metrics."""
    return tuple(_METRICS)


def resolve_metric(name: str | None, *, has_labels: bool, task: Task) -> Metric:
    """The metric of this name, or the default where none is named.

    The default is ``top1`` for classifiers with labels, ``agreement`` for classifiers without, ``mae`` for other models with
    labels and ``sqnr_db`` without.

    Args:
        name: a built-in metric, or ``package.module:function`` / ``file.py:function`` with the signature
            ``f(outputs: dict[str, Array], labels: Array | None) -> float | Array [N]``; its attributes ``higher_is_better``
            (default True) and ``needs_labels`` (default False) count. The metric is then called after the function.
        has_labels: whether the evaluation data has labels.
        task: what the model does.

    Raises:
        UsageError: ``metric.unknown`` or ``metric.needs_labels``.
        DataError: ``data.not_found`` or ``data.function_failed`` when the function cannot be imported.
    """
    if name is None:
        match has_labels, task:
            case True, "classification":
                name = "top1"
            case False, "classification":
                name = "agreement"
            case True, _:
                name = "mae"
            case _:
                name = "sqnr_db"
    metric = _METRICS.get(name) or _own_metric(name)
    if metric.needs_labels and not has_labels:
        raise UsageError(
            "metric.needs_labels",
            f"metric {name} needs labels, the evaluation data has none.",
            hint="Add labels to the data, or choose agreement or sqnr_db.",
        )
    return metric


def _own_metric(name: str) -> Metric:
    if not is_function_spec(name):
        known = f"Choose from {', '.join(_METRICS)}, or give module:function."
        raise UsageError("metric.unknown", f"{name}: no such metric.", hint=suggest(name, list(_METRICS), otherwise=known))
    function = load_attribute(name)
    if not callable(function):
        raise UsageError("metric.unknown", f"{name}: not callable; expected a function of (outputs, labels).")
    return Metric(
        name=name.rpartition(":")[2],
        is_higher_better=bool(getattr(function, "higher_is_better", True)),
        score=lambda evidence: _call_own(name, function, evidence),
        needs_labels=bool(getattr(function, "needs_labels", False)),
    )


def _call_own(name: str, function: Callable[..., Any], evidence: Evidence) -> Array | float:
    try:
        result = np.asarray(function(dict(evidence.outputs), evidence.labels), dtype=np.float64)
    except EdgekitError:
        raise
    except Exception as error:
        text = f"{name}: the metric failed: {type(error).__name__}: {error}."
        raise UsageError(
            "metric.failed", text, hint="It is called with a dict of output arrays, and the labels or None."
        ) from error
    count = len(evidence.first)
    if result.shape not in ((), (count,)):
        text = f"{name}: the metric returned shape {list(result.shape)}; expected one number, or {count}, one per sample."
        raise UsageError("metric.bad_result", text)
    if not np.isfinite(result).all():
        raise UsageError("metric.bad_result", f"{name}: the metric returned NaN or infinity; expected finite numbers.")
    return result if result.ndim else float(result)
