"""The sequential detector: how often it is wrong, how soon it is right, and what it takes off for each of its three reasons."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from edgekit.monitor.detector import (
    DECAY,
    DetectorState,
    Rule,
    acknowledge,
    arl_for,
    e_benjamini_hochberg,
    log_evidence,
    step,
)
from edgekit.schema.base import decode_json, encode_json

EDGES = stats.norm.ppf(np.linspace(0, 1, 11)[1:-1])
SAMPLES = 200


def shares(shift):
    return np.diff([0.0, *stats.norm.cdf(EDGES - shift), 1.0])


def delay(shift, *, reference_samples=20_000, rule, limit=400, seed=0):
    """Windows until the alarm; ``limit`` when there was none."""
    rng = np.random.default_rng(seed)
    reference = rng.multinomial(reference_samples, shares(0.0))
    state = DetectorState()
    for window in range(1, limit + 1):
        state = step(state, rng.multinomial(SAMPLES, shares(shift)), reference, rule)
        if state.is_alarm:
            assert state.since == window
            return window
    return limit


def test_nothing_drifts_and_the_budget_of_false_alarms_is_kept():
    rule = Rule(arl=200.0, effect_floor=0.0)
    alarms = [delay(0.0, rule=rule, limit=200, seed=seed, reference_samples=200_000) for seed in range(60)]
    assert sum(value < 200 for value in alarms) <= 60 * (1 - np.exp(-1)) + 10, "one alarm in 200 windows on average, not more"


def test_small_reference_does_not_break_the_budget():
    rule = Rule(arl=1000.0)
    alarms = sum(delay(0.0, rule=rule, limit=250, seed=seed, reference_samples=1000) < 250 for seed in range(80))
    assert alarms <= 80 * (1 - np.exp(-0.25)) / 2, "within the budget, whatever sample the baseline was"


@pytest.mark.parametrize(("shift", "windows"), [(0.2, 8.0), (0.3, 4.0), (0.5, 2.0)])
def test_shift_is_seen_within_a_few_windows(shift, windows):
    rule = Rule(arl=1000.0)
    assert np.mean([delay(shift, rule=rule, seed=seed) for seed in range(20)]) <= windows


def test_shift_that_does_not_matter_gives_no_alarm_however_long_it_lasts():
    assert delay(0.03, rule=Rule(arl=1000.0), limit=1500) == 1500
    assert delay(0.03, rule=Rule(arl=1000.0, effect_floor=0.0), reference_samples=10_000_000, limit=1500) < 1500


def test_devices_that_differ_give_false_alarms_until_their_counts_are_divided():
    rng = np.random.default_rng(5)
    reference = rng.multinomial(1_000_000, np.full(10, 0.1))
    rule = Rule(arl=1000.0)
    plain, divided = DetectorState(), DetectorState()
    for _ in range(100):
        window = sum(rng.multinomial(50, rng.dirichlet(np.full(10, 1.0))) for _ in range(10))
        plain = step(plain, window, reference, rule)
        divided = step(divided, window, reference, rule, design_effect=1 + 49 / 11)
    assert plain.is_alarm
    assert not divided.is_alarm


def test_evidence_is_at_most_one_on_average():
    rng = np.random.default_rng(6)
    reference = rng.multinomial(2_000_000, shares(0.0))
    past = rng.multinomial(SAMPLES, shares(0.4)) * DECAY
    rule = Rule(arl=2.0, effect_floor=0.0)
    values = [np.exp(log_evidence(rng.multinomial(20, shares(0.0)), past, reference, rule)) for _ in range(20_000)]
    assert np.mean(values) <= 1.0 + 3 * np.std(values) / np.sqrt(len(values))
    assert np.mean(values) > 0.8


def test_state_travels_and_begins_anew():
    reference, rule = np.full(10, 1000), Rule(arl=50.0)
    state = DetectorState()
    for _ in range(3):
        state = step(state, np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 200]), reference, rule)
    assert state.is_alarm
    assert state.since == 1
    again = decode_json(encode_json(state), DetectorState)
    assert again == state
    assert step(again, np.zeros(10), reference, rule) == state
    assert acknowledge(state) == DetectorState(windows=3)
    with pytest.raises(ValueError, match="bins"):
        step(state, np.ones(9), reference, rule)


def test_budget_counts_streams_and_windows():
    assert arl_for(2, streams=10, windows=100) == 500
    assert arl_for(1000, streams=1, windows=1) == 2
    with pytest.raises(ValueError, match="budget"):
        arl_for(0, streams=1, windows=1)


def test_false_discoveries_keep_to_their_share_under_dependence():
    rng = np.random.default_rng(7)
    wrong, found = 0, 0
    for _ in range(300):
        common = rng.normal()
        drifts = np.arange(40) < 10
        signal = 0.5 * common + rng.normal(size=40) * np.sqrt(0.75) + 3.0 * drifts
        values = np.exp(2.5 * signal - 2.5**2 / 2)  # a likelihood ratio: its mean is 1 without a drift
        chosen = e_benjamini_hochberg(values.tolist(), share=0.1)
        found += sum(drifts[index] for index in chosen)
        wrong += len(chosen) and np.mean([not drifts[index] for index in chosen])
    assert wrong / 300 <= 0.1
    assert found > 300
    assert e_benjamini_hochberg([], share=0.1) == ()
    with pytest.raises(ValueError, match="share"):
        e_benjamini_hochberg([1.0], share=0.0)
