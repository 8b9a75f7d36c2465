from __future__ import annotations

import numpy as np
import pytest

from edgekit.fleet.rollout.sequential import MIN_CLUSTERS, Cluster, half_width, judge, ratio


def fleet(random, *, devices: int, looks: int, share: float, spread: float, each: int):
    """Hits and trials of each device after each look: devices differ by a beta distribution."""
    concentration = 1 / spread - 1
    own = random.beta(share * concentration, (1 - share) * concentration, devices)
    hits = random.binomial(each, own, (looks, devices)).cumsum(axis=0)
    return [[Cluster(hits=int(h), trials=each * (look + 1)) for h in row] for look, row in enumerate(hits)]


@pytest.mark.parametrize("spread", [0.01, 0.1])
def test_looking_a_hundred_times_does_not_raise_false_alarms(spread):
    """No difference, devices alike or not: at most alpha of the experiments ever say that there is one."""
    random, wrong, runs = np.random.default_rng(5), 0, 200
    for _ in range(runs):
        sides = [fleet(random, devices=30, looks=100, share=0.8, spread=spread, each=5) for _ in range(2)]
        wrong += any(judge(*pair, margin=0.02).verdict.startswith("challenger") for pair in zip(*sides, strict=True))
    assert wrong / runs <= 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5


def test_a_naive_test_would_be_fooled():
    """The same data by a z-test at each look: this is what the interval is for."""
    random, wrong = np.random.default_rng(5), 0
    for _ in range(100):
        sides = [fleet(random, devices=30, looks=100, share=0.8, spread=0.01, each=5) for _ in range(2)]
        for left, right in zip(*sides, strict=True):
            a, b = ratio(left), ratio(right)
            if abs(a[0] - b[0]) > 1.96 * (a[1] + b[1]) ** 0.5:
                wrong += 1
                break
    assert wrong > 20


def test_a_real_difference_is_found_and_named():
    random, found = np.random.default_rng(6), []
    for _ in range(50):
        champion = fleet(random, devices=40, looks=60, share=0.80, spread=0.02, each=10)
        challenger = fleet(random, devices=40, looks=60, share=0.90, spread=0.02, each=10)
        verdicts = [judge(*pair, margin=0.02).verdict for pair in zip(champion, challenger, strict=True)]
        found.append(next((at for at, verdict in enumerate(verdicts) if verdict != "keep going"), None))
        assert "challenger is worse" not in verdicts
    assert sum(at is not None for at in found) >= 48


def test_interval_covers_the_truth_at_every_look():
    random, missed = np.random.default_rng(7), 0
    for _ in range(150):
        champion = fleet(random, devices=30, looks=60, share=0.7, spread=0.05, each=10)
        challenger = fleet(random, devices=30, looks=60, share=0.75, spread=0.05, each=10)
        judged = [judge(*pair, margin=0.02) for pair in zip(champion, challenger, strict=True)]
        missed += any(not item.low <= 0.05 <= item.high for item in judged)
    assert missed / 150 <= 0.05 + 2 * (0.05 * 0.95 / 150) ** 0.5


def test_the_same_is_said_to_be_the_same_in_the_end():
    alike = [Cluster(hits=80_000, trials=100_000) for _ in range(60)]
    assert judge(alike, alike, margin=0.02).verdict == "no difference"


def test_few_devices_decide_nothing():
    good = [Cluster(hits=99, trials=100)] * (MIN_CLUSTERS - 1)
    bad = [Cluster(hits=1, trials=100)] * 50
    assert judge(good, bad, margin=0.02).verdict == "keep going"
    assert judge([], bad, margin=0.02).verdict == "keep going"
    assert judge([*good, Cluster(hits=0, trials=0)], bad, margin=0.02).champion_devices == MIN_CLUSTERS - 1


def test_lower_may_be_better():
    few, many = [Cluster(hits=2, trials=100)] * 20, [Cluster(hits=20, trials=100)] * 20
    assert judge(many, few, margin=0.01, higher_is_better=False).verdict == "challenger is better"
    assert judge(few, many, margin=0.01, higher_is_better=False).verdict == "challenger is worse"


def test_perfect_score_still_has_a_width():
    perfect = [Cluster(hits=10, trials=10)] * 20
    judged = judge(perfect, perfect, margin=0.02)
    assert judged.high > 0.005


def test_width_shrinks_with_data():
    widths = [half_width(variance, alpha=0.05, planned=1e-4) for variance in (1e-2, 1e-3, 1e-4, 1e-5)]
    assert widths == sorted(widths, reverse=True)
    assert widths[2] > 1.96 * 1e-2  # the price of looking at any time
