"""The sequential detector: how often it is wrong, how soon it is right, and what it takes off for each of its four reasons."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special, stats

from edgekit.errors import ArtifactError
from edgekit.monitor.detector import (
    CALM_STEPS,
    Bank,
    BankState,
    Reference,
    Rule,
    _log_gamma,
    arl_for,
    e_benjamini_hochberg,
    error_of_fleet,
)

EDGES = stats.norm.ppf(np.linspace(0, 1, 33)[1:-1])
SAMPLES = 200


def shares(shift, scale=1.0):
    return np.diff([0.0, *stats.norm.cdf((EDGES - shift) / scale), 1.0])


def reference(rng, samples):
    return Reference(counts=tuple(rng.multinomial(samples, shares(0.0)).tolist()))


def delay(shift, *, reference_samples=20_000, rule, limit=400, seed=0, scale=1.0):
    """Intervals until the alarm; ``limit`` when there was none."""
    rng = np.random.default_rng(seed)
    bank = Bank([reference(rng, reference_samples)], rule)
    state = bank.start()
    for window in range(1, limit + 1):
        state = bank.step(state, rng.multinomial(SAMPLES, shares(shift, scale))[None])
        if state.since[0]:
            assert state.since[0] == window
            return window
    return limit


def test_nothing_drifts_and_the_budget_of_false_alarms_is_kept():
    rule = Rule(arl=200.0, effect_floor=0.0)
    alarms = [delay(0.0, rule=rule, limit=200, seed=seed, reference_samples=200_000) for seed in range(60)]
    assert sum(value < 200 for value in alarms) <= 60 * (1 - np.exp(-1)) + 10, "one alarm in 200 windows on average, not more"


def test_small_reference_does_not_break_the_budget():
    rule = Rule(arl=1000.0)
    alarms = sum(delay(0.0, rule=rule, limit=250, seed=seed, reference_samples=1000) < 250 for seed in range(40))
    assert alarms <= 40 * (1 - np.exp(-0.25)), "within the budget, whatever sample the baseline was"


@pytest.mark.parametrize(("shift", "scale", "windows"), [(0.2, 1.0, 6.0), (0.3, 1.0, 3.0), (0.5, 1.0, 1.5), (0.0, 1.3, 4.0)])
def test_shift_is_seen_within_a_few_windows(shift, scale, windows):
    rule = Rule(arl=1000.0)
    assert np.mean([delay(shift, rule=rule, seed=seed, scale=scale) for seed in range(20)]) <= windows


def test_shift_that_does_not_matter_gives_no_alarm_however_long_it_lasts():
    assert delay(0.02, rule=Rule(arl=1000.0), limit=1000) == 1000
    assert delay(0.03, rule=Rule(arl=1000.0, effect_floor=0.0), reference_samples=10_000_000, limit=1000) < 1000


def test_devices_that_differ_give_false_alarms_until_their_counts_are_divided():
    rng = np.random.default_rng(5)
    bank = Bank([Reference(counts=tuple(rng.multinomial(1_000_000, np.full(10, 0.1)).tolist()))], Rule(arl=1000.0))
    plain, divided = bank.start(), bank.start()
    is_alarm = [False, False]
    for _ in range(100):
        window = sum(rng.multinomial(50, rng.dirichlet(np.full(10, 1.0))) for _ in range(10))[None]
        plain = bank.step(plain, window)
        divided = bank.step(divided, window, design_effect=np.array([1 + 49 / 11]))
        is_alarm = [is_alarm[0] or plain.since[0] > 0, is_alarm[1] or divided.since[0] > 0]
    assert is_alarm == [True, False]


def test_devices_that_differ_for_good_need_the_error_of_a_fleet_as_a_sample():
    """The same ten devices all the time, each with its own mean: the fleet's mean is off, in every window anew."""
    found = [0, 0]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        bank = Bank([reference(rng, 1_000_000)], Rule(arl=1000.0))
        devices = [shares(offset) for offset in rng.normal(0, 0.3, 10)]
        plain, aware = bank.start(), bank.start()
        variation = np.array([0.09])
        for _ in range(60):
            window = sum(rng.multinomial(50, device) for device in devices)[None]
            effect = 1 + 500 * variation / 10
            plain = bank.step(plain, window, design_effect=effect)
            error = error_of_fleet(variation, np.array([10.0]), known_by=10)
            aware = bank.step(aware, window, design_effect=effect, fleet_error=error)
        found[0] += plain.since[0] > 0
        found[1] += aware.since[0] > 0
    assert found[0] >= 5, "dividing alone does not do: the offset stays"
    assert found[1] <= 1


@pytest.mark.parametrize(("devices", "freedom"), [(2, 5), (6, 5), (11, 10), (12, 11), (40, 39), (1000, 999)])
def test_error_of_a_fleet_follows_student(devices, freedom):
    expected = stats.t.ppf(0.995, freedom) ** 2 / 2 * 0.5 / 7
    assert error_of_fleet(np.array([0.5]), np.array([7.0]), known_by=devices) == pytest.approx([expected], rel=0.01)
    assert error_of_fleet(np.array([0.5]), np.array([7.0]), known_by=1) == [0.0]


def test_a_day_with_hours_is_learned_and_a_lasting_shift_is_still_seen():
    rng = np.random.default_rng(3)
    mix = np.mean([shares(0.5 * math.sin(2 * math.pi * hour / 24)) for hour in range(24)], axis=0)
    bank = Bank([Reference(counts=tuple(rng.multinomial(20_000, mix).tolist()))], Rule(arl=10_000.0))
    state, alarms = bank.start(), []
    for hour in range(24 * 40):
        state = bank.step(state, rng.multinomial(SAMPLES, shares(0.5 * math.sin(2 * math.pi * hour / 24)))[None])
        alarms.append(state.since[0] > 0)
    assert bank.time_effect(state)[0] > 5
    assert not any(alarms[24 * 20 :]), "after some days the cycle is known"
    after = []
    for hour in range(24 * 3):
        state = bank.step(state, rng.multinomial(SAMPLES, shares(1.0 + 0.5 * math.sin(2 * math.pi * hour / 24)))[None])
        after.append(state.since[0] > 0)
    assert after.index(True) < 12
    assert all(after[after.index(True) :]), "it lasts, and so does the alarm"


def test_alarm_ends_when_the_drift_has_ended_and_begins_anew():
    rng = np.random.default_rng(2)
    bank = Bank([reference(rng, 20_000)], Rule(arl=1000.0))
    state = bank.start()
    for _ in range(5):
        state = bank.step(state, rng.multinomial(SAMPLES, shares(0.8))[None])
    assert state.since[0] > 0
    steps = 0
    while state.since[0]:
        state = bank.step(state, rng.multinomial(SAMPLES, shares(0.0))[None])
        steps += 1
        assert steps < 100
    assert steps >= CALM_STEPS
    assert state.started[0] == state.steps
    for _ in range(3):
        state = bank.step(state, rng.multinomial(SAMPLES, shares(0.8))[None])
    assert state.since[0] > 0


def test_alarm_lasts_as_long_as_its_drift():
    rng = np.random.default_rng(12)
    bank = Bank([reference(rng, 20_000)], Rule(arl=1000.0))
    state = bank.start()
    for window in range(260):
        state = bank.step(state, rng.multinomial(SAMPLES, shares(0.3 if window >= 100 else 0.0))[None])
        if window >= 110:
            assert 100 < state.since[0] <= 106


def test_missing_values_are_evidence():
    rng = np.random.default_rng(4)
    bank = Bank([Reference(counts=(*rng.multinomial(6000, shares(0.0)).tolist(), 3), has_missing=True)], Rule(arl=1e5))
    state = bank.start()
    for _ in range(6):
        state = bank.step(state, np.array([[*rng.multinomial(190, shares(0.0)), 10]]))
    assert state.since[0] > 0


def test_evidence_is_at_most_one_on_average_for_every_component():
    rng = np.random.default_rng(6)
    truth = reference(rng, 5_000_000)
    bank = Bank([truth] * 2000, Rule(arl=2.0, effect_floor=0.0))
    p0 = np.asarray(truth.counts) / sum(truth.counts)
    state = bank.step(bank.start(), rng.multinomial(SAMPLES, shares(0.4), size=2000))
    values = np.exp(np.concatenate([bank.evidence(state, rng.multinomial(20, p0, size=2000).astype(float)) for _ in range(10)]))
    used = values.std(axis=0) > 0
    assert used.sum() >= 10
    assert (values.mean(axis=0) <= 1.0 + 4 * values.std(axis=0) / np.sqrt(len(values))).all()
    assert values.mean(axis=0)[used].min() > 0.7


def test_streams_of_a_bank_do_not_touch_each_other():
    rng = np.random.default_rng(8)
    references = [reference(rng, 6000), Reference(counts=(100.0, 900.0), is_ordered=False), reference(rng, 300)]
    bank, alone = Bank(references, Rule(arl=1000.0)), [Bank([each], Rule(arl=1000.0)) for each in references]
    state, states = bank.start(), [each.start() for each in alone]
    for _ in range(30):
        table = np.zeros((3, 32))
        table[0], table[1, :2], table[2] = (
            rng.multinomial(200, shares(0.1)),
            rng.multinomial(50, [0.15, 0.85]),
            rng.multinomial(20, shares(0)),
        )
        state = bank.step(state, table)
        states = [
            each.step(before, table[at : at + 1, : each.width])
            for at, (each, before) in enumerate(zip(alone, states, strict=True))
        ]
    single = np.concatenate([each.log_m(found) for each, found in zip(alone, states, strict=True)])
    assert bank.log_m(state) == pytest.approx(single, abs=1e-8)
    twice = bank.repeated(2, Rule(arl=1000.0))
    assert len(twice) == 6
    assert twice.step(twice.start(), np.tile(table, (2, 1))).past[3:] == pytest.approx(bank.step(bank.start(), table).past)


def test_state_travels_bit_for_bit():
    rng = np.random.default_rng(9)
    bank = Bank([reference(rng, 5000)], Rule(arl=50.0))
    state = bank.start()
    for _ in range(7):
        state = bank.step(state, rng.multinomial(SAMPLES, shares(0.2))[None])
    again = BankState.decode(state.encode())
    window = rng.multinomial(SAMPLES, shares(0.2))[None]
    assert bank.step(again, window).encode() == bank.step(state, window).encode()
    assert bank.step(state, np.zeros((1, 32))).log_m.tolist() == state.log_m.tolist()
    with pytest.raises(ArtifactError, match="detector state"):
        BankState.decode(b"\x93")
    with pytest.raises(ValueError, match="bins"):
        bank.step(state, np.ones((1, 33)))


def test_stream_without_a_reference_never_gives_evidence():
    bank = Bank([Reference(counts=(0.0, 0.0, 0.0))], Rule(arl=2.0))
    state = bank.start()
    for _ in range(20):
        state = bank.step(state, np.array([[50, 1, 0]]))
    assert state.since[0] == 0


def test_log_gamma_is_the_library_s():
    x = np.concatenate([np.geomspace(1e-6, 1e7, 400), [1.0, 2.0]])
    assert _log_gamma(x) == pytest.approx(special.gammaln(x), rel=1e-12, abs=1e-12)


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
