"""Run a model over data, and report how good it is beside its fp32 baseline.

Both models answer the same samples, so the drop is compared in pairs: the interval comes from resampling samples, not models
(Efron & Tibshirani 1993, chapter 13: percentile bootstrap). An interval of width 0 says that no sample was answered
differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edgekit.dataset.data import Array, Dataset
from edgekit.errors import ArtifactError, DataError, UsageError
from edgekit.evaluation.metric import SQNR_CAP_DB, Evidence, Metric, class_labels, recall_by_class, resolve_metric, sqnr_db
from edgekit.runtime.parallel import in_order
from edgekit.runtime.session import Session
from edgekit.schema.measurement import EvalReport

RESAMPLES = 2000
INTERVAL = (0.025, 0.975)
BATCH_SIZE = 64
BATCH_BYTES = 4 * 2**20
"""Inputs of one batch: every session keeps the memory of its largest batch."""
_CHUNK_VALUES = 1 << 21
_MAX_DISTINCT = 256
_DRAWS = 200_000
_PREDICTING = "running the model"

Progress = Callable[[str, float], None]


def _no_progress(_text: str, _done: float) -> None:
    return None


# --- predict ----------------------------------------------------------------------------------------------------------------


def predict(
    session: Session,
    data: Dataset,
    batch_size: int = BATCH_SIZE,
    *,
    workers: int = 1,
    on_progress: Progress = _no_progress,
) -> dict[str, Array]:
    """Every output for every sample, [N, ...], in order.

    Batches are of ``batch_size`` samples, fewer where samples are large. A model with a fixed batch gets exactly that: the
    last batch is filled with its last sample, whose extra answers are thrown away. Inputs are matched by name; a single input
    by its place, where a conversion renamed it.

    Args:
        session: the model.
        data: the samples.
        batch_size: the most samples at a time.
        workers: batches at a time, on a thread each; more than one only where the session can run on several threads at once.
        on_progress: called with a text and the fraction done.

    Raises:
        DataError: ``data.missing_input`` when the names do not match.
        ArtifactError: ``model.no_batch_axis`` when an output does not have one entry per sample.
    """
    names = _feed_names(session, data)
    fixed = next((spec.shape[0] for spec in session.inputs if spec.shape and isinstance(spec.shape[0], int)), None)
    parts: dict[str, list[Array]] = {}
    done = 0
    per_sample = sum(array.nbytes for array in data.inputs.values()) // max(1, len(data))
    affordable = max(1, min(batch_size, BATCH_BYTES // max(1, per_sample)))

    def answer(batch: tuple[Mapping[str, Array], object]) -> tuple[int, Mapping[str, Array]]:
        feeds, _labels = batch
        ready = {names[name]: array if fixed is None else _fill(array, fixed) for name, array in feeds.items()}
        return len(next(iter(feeds.values()))), session.run(ready)

    for count, answers in in_order(answer, data.batches(fixed or affordable), workers):
        for name, array in answers.items():
            _check_batch(name, array, fixed or count)
            parts.setdefault(name, []).append(array[:count].copy())
        done += count
        on_progress(_PREDICTING, done / len(data))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _feed_names(session: Session, data: Dataset) -> dict[str, str]:
    """The session's name for each of the data's inputs."""
    wanted = [spec.name for spec in session.inputs]
    if set(wanted) == set(data.inputs):
        return {name: name for name in wanted}
    if len(wanted) == 1 and len(data.inputs) == 1:
        return {next(iter(data.inputs)): wanted[0]}
    text = f"{data.source}: the model takes {', '.join(wanted)}, the data has {', '.join(data.inputs)}."
    raise DataError("data.missing_input", text, hint="Name the data's arrays after the model's inputs.")


def _fill(array: Array, size: int) -> Array:
    missing = size - len(array)
    return array if missing == 0 else np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])


def _check_batch(name: str, array: Array, count: int) -> None:
    if array.ndim == 0 or len(array) != count:
        text = f'output "{name}" has shape {list(array.shape)} for a batch of {count}; expected {count} on axis 0.'
        raise ArtifactError("model.no_batch_axis", text, hint="Export the model so that axis 0 of every output is the sample.")


# --- evaluate ---------------------------------------------------------------------------------------------------------------


def evaluate(
    outputs: Mapping[str, Array],
    baseline_outputs: Mapping[str, Array],
    data: Dataset,
    metric: Metric,
    *,
    isa: Sequence[str],
    labels: Sequence[str] = (),
    seed: int = 0,
) -> EvalReport:
    """Compare a model with its baseline on labelled or unlabelled data.

    Args:
        outputs: the model's answers to every sample of ``data``.
        baseline_outputs: the fp32 model's, output by output in the same order (names may differ).
        data: the samples that were answered.
        metric: what counts.
        isa: instruction set that both ran on.
        labels: class names for the accuracy by class; the data's own when empty.
        seed: of the bootstrap.

    Raises:
        ArtifactError: ``model.outputs_differ`` when the two do not have the same outputs, ``model.not_finite`` when an answer
            is NaN or infinite.
        DataError, UsageError: when the metric does not fit the labels or the outputs.
    """
    _check_comparable(outputs, baseline_outputs, data)
    own = Evidence(outputs=outputs, baseline=baseline_outputs, labels=data.labels, source=data.source)
    reference = Evidence(outputs=baseline_outputs, baseline=baseline_outputs, labels=data.labels, source=data.source)
    score, base = metric.score(own), metric.score(reference)
    value, baseline = _finish(metric, score), _finish(metric, base)
    sign = 1.0 if metric.is_higher_better else -1.0
    low, high = _drop_interval(score, base, metric, seed)
    if metric.name == "sqnr_db":
        low, high = _sqnr_interval(own, baseline, seed)
    return EvalReport(
        metric=metric.name,
        value=value,
        baseline=baseline,
        drop=sign * (baseline - value),
        is_higher_better=metric.is_higher_better,
        samples=len(data),
        data=data.digest,
        isa=tuple(isa),
        drop_low=low,
        drop_high=high,
        extra=_extra(own, metric),
        per_class=_per_class(own, tuple(labels) or data.class_names),
    )


def _check_comparable(outputs: Mapping[str, Array], baseline: Mapping[str, Array], data: Dataset) -> None:
    if len(outputs) != len(baseline):
        text = f"the model has {len(outputs)} outputs ({', '.join(outputs)}), the baseline {len(baseline)}."
        raise ArtifactError("model.outputs_differ", text)
    for (name, own), (base_name, base) in zip(outputs.items(), baseline.items(), strict=True):
        if own.shape != base.shape or own.ndim == 0 or len(own) != len(data):
            text = (
                f'output "{name}" has shape {list(own.shape)}, the baseline {list(base.shape)}, the data {len(data)} samples.'
            )
            raise ArtifactError(
                "model.outputs_differ", text, hint="Both models must answer the same samples in the same layout."
            )
        check_finite_output(base, f'the baseline\'s output "{base_name}"')
        check_finite_output(own, f'output "{name}"')


def check_finite_output(array: Array, name: str) -> None:
    """Refuse NaN and infinity in a model's answers.

    Raises:
        ArtifactError: ``model.not_finite`` with the first sample.
    """
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return
    bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    raise ArtifactError(
        "model.not_finite",
        f"{name} is NaN or infinite in {int(bad.sum())} of {len(array)} samples, the first is sample {int(bad.argmax())}.",
        hint="The model overflows on this data; a lower precision or wrong calibration ranges do that.",
    )


def _finish(metric: Metric, score: Array | float) -> float:
    return float(metric.finish(np.asarray(score.mean(dtype=np.float64)))) if isinstance(score, np.ndarray) else float(score)


def _drop_interval(
    score: Array | float, base: Array | float, metric: Metric, seed: int
) -> tuple[float, float] | tuple[None, None]:
    if not isinstance(score, np.ndarray) or not isinstance(base, np.ndarray) or len(score) < 2:
        return None, None
    if metric.is_higher_better and (base == 1).all() and 0 < (missed := float((score == 0).sum())) == float((score != 1).sum()):
        return _share_interval(int(missed), len(score))
    means = resample_means(np.stack([score, base], axis=1), seed=seed)
    values = metric.finish(means)
    drops = values[:, 1] - values[:, 0] if metric.is_higher_better else values[:, 0] - values[:, 1]
    low, high = np.quantile(drops, INTERVAL)
    return float(low), float(high)


def _share_interval(missed: int, count: int) -> tuple[float, float]:
    """95 % interval of the share of samples that are answered differently, where the baseline is right by definition.

    Jeffreys' interval (Brown, Cai and DasGupta, "Interval Estimation for a Binomial Proportion", 2001): with a handful of cases
    the bootstrap's is too short.
    """
    drawn = np.random.default_rng(0).beta(missed + 0.5, count - missed + 0.5, _DRAWS)
    low, high = np.quantile(drawn, INTERVAL)
    return float(low), float(high)


def _sqnr_interval(evidence: Evidence, baseline: float, seed: int) -> tuple[float, float] | tuple[None, None]:
    """Of the drop in dB: powers of signal and noise are sums over samples, which can be drawn again."""
    pairs = list(zip(evidence.baseline.values(), evidence.outputs.values(), strict=True))
    reference, output = min(pairs, key=lambda pair: sqnr_db(*pair))
    count = len(reference)
    rows = reference.reshape(count, -1).astype(np.float64)
    noise = np.square(rows - output.reshape(count, -1)).sum(axis=1)
    if count < 2 or not noise.any():
        return None, None
    means = resample_means(np.stack([np.square(rows).sum(axis=1), noise], axis=1), seed=seed)
    values = 10 * np.log10(np.maximum(means[:, 0], 1e-30) / np.maximum(means[:, 1], 1e-30))
    low, high = np.quantile(baseline - np.minimum(values, SQNR_CAP_DB), INTERVAL)
    return float(low), float(high)


def resample_means(pairs: Array, *, seed: int, resamples: int = RESAMPLES) -> Array:
    """Means of bootstrap resamples.

    Where few distinct rows occur (top-1: four), a resample is one multinomial draw over them, which is the same distribution
    at a fraction of the work; else rows are drawn by index, in chunks of bounded memory.

    Args:
        pairs: float64 [N, 2], the scores of both models by sample.
        seed: of the generator.
        resamples: how many.

    Returns:
        float64 [resamples, 2].
    """
    random = np.random.default_rng(seed)
    count = len(pairs)
    distinct, counts = np.unique(pairs, axis=0, return_counts=True)
    if len(distinct) <= _MAX_DISTINCT:
        drawn: Array = random.multinomial(count, counts / count, size=resamples)
        return np.asarray(drawn @ distinct / count)
    means = np.empty((resamples, pairs.shape[1]))
    step = max(1, _CHUNK_VALUES // (count * pairs.shape[1]))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        means[start : start + size] = pairs[random.integers(0, count, size=(size, count))].mean(axis=1)
    return means


def _extra(evidence: Evidence, metric: Metric) -> dict[str, float]:
    """Figures beside the metric itself: always the SQNR; agreement and balanced accuracy for classifiers."""
    has_labels = evidence.labels is not None
    names = ["sqnr_db"]
    if _is_classifier(evidence, metric):
        names += ["agreement", "top1", "balanced_accuracy"] if has_labels else ["agreement"]
    extra = {}
    for name in names:
        if name != metric.name:
            other = resolve_metric(name, has_labels=has_labels, task="classification")
            extra[name] = _finish(other, other.score(evidence))
    return extra


def _is_classifier(evidence: Evidence, metric: Metric) -> bool:
    """Whether class figures make sense: [N, 2 or more] scores, and labels (where there are any) that are their indices."""
    if evidence.first.ndim != 2 or evidence.first.shape[1] < 2:
        return False
    if evidence.labels is None:
        return metric.is_for_classifiers
    try:
        class_labels(evidence, metric.name, evidence.first.shape[1])
    except (DataError, UsageError):
        return False
    return True


def _per_class(evidence: Evidence, names: tuple[str, ...]) -> dict[str, float]:
    scores = evidence.first
    if evidence.labels is None or evidence.labels.dtype.kind != "i" or evidence.labels.ndim != 1 or scores.ndim != 2:
        return {}
    if scores.shape[1] < 2 or evidence.labels.min() < 0 or evidence.labels.max() >= scores.shape[1]:
        return {}
    is_named = len(names) == scores.shape[1]
    recalls = recall_by_class(scores, evidence.labels)
    return {names[index] if is_named else str(index): recall for index, recall in recalls.items()}
