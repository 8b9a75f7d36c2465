"""The verdict on a new model beside the one that serves: intervals, margins, and what cannot be told."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.dataset.data import make_dataset
from edgekit.evaluation.metric import resolve_metric
from edgekit.evaluation.rivals import compare_rivals, judge


def answers(right: np.ndarray, labels: np.ndarray, classes: int = 3) -> dict[str, np.ndarray]:
    """Class scores that hit the label exactly where ``right`` says so."""
    predicted = np.where(right, labels, (labels + 1) % classes)
    return {"scores": np.eye(classes, dtype=np.float32)[predicted]}


def rivalry(ours, theirs, *, margin=0.02, min_samples=1, metric="top1"):
    labels = np.arange(len(ours)) % 3
    data = make_dataset({"x": np.zeros((len(ours), 1), np.float32)}, labels=labels, class_names="abc", source="test")
    found = resolve_metric(metric, has_labels=True, task="classification")
    return compare_rivals(
        answers(ours, labels), answers(theirs, labels), data, found, name="test", margin=margin, min_samples=min_samples
    )


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.1, "better"),
        (-0.01, 0.1, "not worse"),
        (-0.02, -0.001, "not worse"),
        (-0.05, -0.001, "worse"),
        (-0.05, 0.05, "cannot tell"),
        (None, None, "cannot tell"),
    ],
)
def test_verdict_follows_from_the_interval(low, high, verdict):
    assert judge(low=low, high=high, margin=0.02) == verdict


def test_difference_is_paired():
    random = np.random.default_rng(0)
    theirs = random.random(600) < 0.7
    ours = theirs.copy()
    ours[np.flatnonzero(~theirs)[:30]] = True  # 30 more, and none lost: unpaired this would drown in noise
    found = rivalry(ours, theirs)
    assert found.verdict == "better"
    assert found.gain == pytest.approx(0.05)
    assert 0.03 < found.low < 0.05 < found.high < 0.08
    assert rivalry(theirs, ours).verdict == "worse"


def test_handful_of_equal_answers_proves_nothing():
    few, many = np.ones(12, bool), np.ones(3000, bool)
    assert rivalry(few, few).verdict == "cannot tell"
    assert rivalry(many, many).verdict == "not worse"
    assert rivalry(many, many, min_samples=5000).verdict == "cannot tell"


def test_interval_covers_the_true_gain_as_often_as_it_says():
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        cells = random.choice(4, 150, p=(0.6, 0.15, 0.1, 0.15))
        found = rivalry((cells == 0) | (cells == 1), (cells == 0) | (cells == 2))
        hits += found.low <= 0.05 <= found.high
    assert 180 <= hits <= 199  # 95 % of 200, give or take three standard deviations


def test_classes_and_confusion_tell_where():
    theirs = np.ones(300, bool)
    ours = np.arange(300) % 3 != 1
    found = rivalry(ours, theirs)
    assert [(each.name, each.current, each.candidate) for each in found.classes] == [
        ("a", 1.0, 1.0), ("b", 1.0, 0.0), ("c", 1.0, 1.0),
    ]  # fmt: skip
    assert found.confusion_candidate[1] == (0, 0, 100)
    assert found.confusion_current[1] == (0, 100, 0)


def test_metric_of_one_figure_for_all_has_an_interval():
    random = np.random.default_rng(2)
    found = rivalry(random.random(300) < 0.95, random.random(300) < 0.6, metric="f1_macro")
    assert found.verdict == "better"
    assert found.low < found.gain < found.high
