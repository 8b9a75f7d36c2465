"""Quality estimated from counts: near the truth under covariate shift, blind to concept drift, and honest about both."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgekit.monitor.performance import CONFIDENCE_BINS, calibrate, estimate


def answers(rng, count, *, shift=0.0, flip=0.0):
    """A binary classifier with calibrated scores: predicted classes, confidences, and whether each was right."""
    logits = rng.normal(shift, 2.0, size=count)
    scores = 1 / (1 + np.exp(-logits))
    labels = rng.random(count) < scores
    labels ^= rng.random(count) < flip
    predicted = scores > 0.5
    return predicted.astype(int), np.where(predicted, scores, 1 - scores), predicted == labels


def table(predicted, confidence, chosen=None):
    counts = np.zeros((2, CONFIDENCE_BINS), dtype=np.int64)
    bins = np.minimum((confidence * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    chosen = np.ones(len(predicted), dtype=bool) if chosen is None else chosen
    np.add.at(counts, (predicted[chosen], bins[chosen]), 1)
    return counts


@pytest.fixture(scope="module")
def calibration():
    predicted, confidence, right = answers(np.random.default_rng(0), 50_000)
    return calibrate(right=table(predicted, confidence, right), answered=table(predicted, confidence))


@pytest.mark.parametrize("shift", [-1.5, 0.0, 1.0, 2.5])
def test_covariate_shift_is_followed(calibration, shift):
    inside = 0
    for seed in range(1, 21):
        predicted, confidence, right = answers(np.random.default_rng(seed), 5000, shift=shift)
        found = estimate(table(predicted, confidence), calibration)
        assert found.accuracy == pytest.approx(right.mean(), abs=0.02)
        inside += found.low <= right.mean() <= found.high
        assert found.precision[1] == pytest.approx(right[predicted == 1].mean(), abs=0.03)
    assert inside >= 17, "the interval holds the truth in 95 % of the cases"


def test_concept_drift_is_not_seen_and_the_estimate_says_so(calibration):
    predicted, confidence, right = answers(np.random.default_rng(3), 20_000, flip=0.2)
    found = estimate(table(predicted, confidence), calibration)
    assert found.accuracy > right.mean() + 0.08
    assert found.assumption == "no concept drift"


def test_bins_that_the_baseline_never_saw_lean_on_their_class(calibration):
    right, answered = np.zeros((2, 4)), np.zeros((2, 4))
    answered[0], right[0] = [0, 0, 10, 90], [0, 0, 5, 85]
    small = calibrate(right=right, answered=answered)
    assert small.right_share[0][0] == pytest.approx(0.9, abs=0.02)
    assert small.right_share[1][2] == pytest.approx(small.right_share[0][0], abs=0.02)
    with pytest.raises(ValueError, match="right"):
        calibrate(right=answered + 1, answered=answered)


def test_no_answers_give_no_number(calibration):
    found = estimate(np.zeros((2, CONFIDENCE_BINS)), calibration)
    assert math.isnan(found.accuracy)
    assert all(math.isnan(value) for value in found.precision)
    with pytest.raises(ValueError, match="calibration"):
        estimate(np.zeros((3, CONFIDENCE_BINS)), calibration)
