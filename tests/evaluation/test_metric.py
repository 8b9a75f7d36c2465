"""Metrics against their definitions, computed the long way, and their refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import DataError, UsageError
from edgekit.evaluation.metric import SQNR_CAP_DB, Evidence, metric_names, resolve_metric, sqnr_db


def score(name, outputs, labels=None, baseline=None):
    outputs = np.asarray(outputs)
    evidence = Evidence(
        outputs={"y": outputs},
        baseline={"y": outputs if baseline is None else np.asarray(baseline)},
        labels=labels,
        source="d.npz",
    )
    metric = resolve_metric(name, has_labels=labels is not None, task="classification")
    return float(metric.finish(np.mean(metric.score(evidence))))


def code_of(name, outputs, labels=None):
    with pytest.raises(UsageError) as caught:
        score(name, outputs, labels)
    return caught.value.code


SCORES = np.random.default_rng(3).normal(size=(200, 8)).astype(np.float32)
LABELS = np.random.default_rng(4).integers(0, 7, 200)


def test_top1_and_top5_by_sorting():
    order = np.argsort(-SCORES, axis=1)
    assert score("top1", SCORES, LABELS) == pytest.approx((order[:, 0] == LABELS).mean())
    assert score("top5", SCORES, LABELS) == pytest.approx((order[:, :5] == LABELS[:, None]).any(axis=1).mean())


def test_constant_scores_do_not_count_as_right():
    labels = np.arange(8)
    assert score("top1", np.zeros((8, 8)), labels) == pytest.approx(1 / 8)
    assert score("top5", np.zeros((8, 8)), labels) == pytest.approx(5 / 8)


def test_balanced_accuracy_and_f1_by_definition():
    predicted, labels = SCORES.argmax(axis=1), LABELS
    recalls = [(predicted[labels == c] == c).mean() for c in range(7)]
    assert score("balanced_accuracy", SCORES, LABELS) == pytest.approx(np.mean(recalls))
    f1 = []
    for c in range(8):
        hits = ((predicted == c) & (labels == c)).sum()
        f1.append(2 * hits / ((predicted == c).sum() + (labels == c).sum()))
    assert score("f1_macro", SCORES, LABELS) == pytest.approx(np.mean(f1))


def test_balanced_accuracy_sees_the_rare_class():
    labels = np.array([0] * 99 + [1])
    always_zero = np.tile([1.0, 0.0], (100, 1))
    assert score("top1", always_zero, labels) == pytest.approx(0.99)
    assert score("balanced_accuracy", always_zero, labels) == pytest.approx(0.5)


def test_regression_metrics_by_definition():
    labels = np.array([1.0, 2.0, 4.0])
    outputs = np.array([[1.5], [2.0], [2.0]], np.float32)
    assert score("mse", outputs, labels) == pytest.approx((0.25 + 0 + 4) / 3)
    assert score("rmse", outputs, labels) == pytest.approx(math.sqrt(4.25 / 3))
    assert score("mae", outputs, labels) == pytest.approx(2.5 / 3)
    assert score("r2", outputs, labels) == pytest.approx(1 - 4.25 / np.square(labels - labels.mean()).sum())


def test_agreement_over_positions():
    outputs = np.zeros((2, 2, 3))
    outputs[..., 1] = 1
    baseline = outputs.copy()
    baseline[0, 0] = [5, 0, 0]
    assert score("agreement", outputs, baseline=baseline) == pytest.approx(0.75)


def test_sqnr_by_definition_and_at_its_ends():
    reference = np.array([10.0, 0.0])
    assert sqnr_db(reference, np.array([9.0, 0.0])) == pytest.approx(20.0)
    assert sqnr_db(reference, reference) == SQNR_CAP_DB
    assert sqnr_db(np.zeros(2), np.ones(2)) == -SQNR_CAP_DB
    assert sqnr_db(np.zeros(2), np.zeros(2)) == SQNR_CAP_DB
    assert math.isfinite(sqnr_db(np.array([1e30], np.float32), np.array([1e-30], np.float32)))


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20), st.floats(0.001, 1000))
def test_sqnr_does_not_depend_on_scale(values, factor):
    reference = np.array(values)
    output = reference + np.linspace(0.1, 0.2, len(reference))
    assert sqnr_db(reference, output) == pytest.approx(sqnr_db(reference * factor, output * factor), abs=1e-6)


def test_sqnr_of_several_outputs_is_the_worst():
    big, small = np.array([[1e6]]), np.array([[1.0]])
    evidence = Evidence(
        outputs={"a": big, "b": small * 2, "n": np.array([1])},
        baseline={"a": big, "b": small, "n": np.array([9])},
        labels=None,
    )
    assert resolve_metric("sqnr_db", has_labels=False, task="other").score(evidence) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("has_labels", "task", "name"),
    [
        (True, "classification", "top1"),
        (False, "classification", "agreement"),
        (True, "other", "mae"),
        (False, "other", "sqnr_db"),
    ],
)
def test_default_metric(has_labels, task, name):
    assert resolve_metric(None, has_labels=has_labels, task=task).name == name


def test_unknown_metric_suggests_the_nearest():
    with pytest.raises(UsageError) as caught:
        resolve_metric("top_1", has_labels=True, task="classification")
    assert caught.value.code == "metric.unknown"
    assert '"top1"' in caught.value.hint


@pytest.mark.parametrize("name", [name for name in metric_names() if name not in ("agreement", "sqnr_db")])
def test_label_metric_without_labels(name):
    with pytest.raises(UsageError) as caught:
        resolve_metric(name, has_labels=False, task="classification")
    assert caught.value.code == "metric.needs_labels"


def test_metrics_that_do_not_fit():
    assert code_of("top1", np.zeros((3, 1)), np.zeros(3, int)) == "metric.not_classifier"
    assert code_of("top1", np.zeros((3, 2, 2)), np.zeros(3, int)) == "metric.not_classifier"
    assert code_of("top5", np.zeros((3, 5)), np.zeros(3, int)) == "metric.too_few_classes"
    assert code_of("top1", np.zeros((3, 2)), np.array([0, 1, 2])) == "data.labels_range"
    assert code_of("top1", np.zeros((3, 2)), np.array([0, -1, 1])) == "data.labels_range"
    assert code_of("top1", np.zeros((3, 2)), np.array([0, 0.5, 1])) == "data.labels_dtype"
    assert code_of("mse", np.zeros((3, 2)), np.zeros(3)) == "data.labels_shape"
    assert code_of("r2", np.zeros((3, 1)), np.ones(3)) == "data.labels_constant"


OWN = """
import numpy as np
def per_sample(outputs, labels): return np.abs(outputs["y"][:, 0])
per_sample.higher_is_better = False
def whole(outputs, labels): return float(labels.sum())
whole.needs_labels = True
def fails(outputs, labels): return outputs["nope"]
def wrong_shape(outputs, labels): return np.zeros(2)
def not_finite(outputs, labels): return float("nan")
def text(outputs, labels): return "good"
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own_metric.py"
    path.write_text(OWN)
    return path


def test_own_metric_per_sample(own):
    metric = resolve_metric(f"{own}:per_sample", has_labels=False, task="other")
    assert (metric.name, metric.is_higher_better) == ("per_sample", False)
    assert score(f"{own}:per_sample", [[-1.0, 5], [3.0, 5]]) == pytest.approx(2.0)


def test_own_metric_as_a_whole(own):
    assert score(f"{own}:whole", [[1.0], [2.0]], np.array([3, 4])) == pytest.approx(7.0)
    with pytest.raises(UsageError, match="needs labels"):
        resolve_metric(f"{own}:whole", has_labels=False, task="other")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("fails", "metric.failed"),
        ("wrong_shape", "metric.bad_result"),
        ("not_finite", "metric.bad_result"),
        ("text", "metric.failed"),
        ("absent", "data.not_found"),
    ],
)
def test_bad_own_metric(own, name, code):
    assert code_of(f"{own}:{name}", [[1.0], [2.0], [3.0]]) == code


def test_own_metric_missing_module():
    with pytest.raises(DataError):
        resolve_metric("no_such_module_here:f", has_labels=True, task="other")
