"""What simulated devices see is what monitoring should find: nothing without drift, the shift that was asked for with it."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.fleet.simulator.population import Population, make_profile
from edgekit.monitor.compare import compare
from edgekit.monitor.performance import calibrate, estimate
from edgekit.monitor.sketch import CONFIDENCE_BINS, cells_of, count_values, decode_counts

POPULATION = Population()
PROFILE = POPULATION.profile
TABLE = next(number for number, stream in enumerate(PROFILE.streams) if stream.kind == "classes")


def fleet_counts(shift: float, *, devices: int = 60, samples: int = 500, concept: float = 0.0):
    """Summed sketches of some devices, and their labels."""
    total = [np.zeros(cells_of(stream), dtype=np.int64) for stream in PROFILE.streams]
    labelled = right = 0
    for number in range(devices):
        rng = np.random.default_rng([5, number])
        inputs = POPULATION.input_shares(POPULATION.trait(rng), shift)
        seen = POPULATION.observe(rng, inputs, POPULATION.answer_shares(shift), samples=samples, labelled=0.5, concept=concept)
        for place, data in enumerate(seen.sketches):
            total[place] += decode_counts(data, cells=total[place].size)
        labelled, right = labelled + seen.labelled, right + seen.right
    return total, right / labelled


def psi(counts, number: int) -> float:
    stream = PROFILE.streams[number]
    return compare(stream.counts, counts[number][: len(stream.counts)], edges=stream.edges or None).psi


def test_profile_is_large_enough_and_its_own_bytes():
    assert PROFILE.samples >= 5000
    assert Population(make_profile()).crc == POPULATION.crc
    assert Population(PROFILE, crc=7).crc == 7


def test_nothing_drifts_by_itself_and_every_second_input_when_asked():
    still, moved = fleet_counts(0.0)[0], fleet_counts(0.5)[0]
    inputs = [number for number, stream in enumerate(PROFILE.streams) if stream.kind == "input"]
    for place, number in enumerate(inputs):
        assert psi(still, number) < 0.05
        if place % 2 == 0:
            assert psi(moved, number) > 0.15
        else:
            assert psi(moved, number) < 0.05


def test_shift_is_as_large_as_it_says():
    """The mean of the shifted bins, in standard deviations of the reference, for a continuous stream."""
    stream = PROFILE.streams[0]
    middles = np.convolve(stream.edges, [0.5, 0.5], mode="valid")
    counts = fleet_counts(0.4, devices=200)[0][0][1 : 1 + middles.size]
    before = np.asarray(stream.counts[1 : 1 + middles.size])
    moved = (counts @ middles) / counts.sum() - (before @ middles) / before.sum()
    assert moved / stream.std == pytest.approx(0.4, abs=0.08)


def test_estimate_agrees_with_labels_until_a_concept_drifts():
    stream = PROFILE.streams[TABLE]
    shape = (PROFILE.classes, CONFIDENCE_BINS)
    calibration = calibrate(
        right=np.reshape(stream.right, shape).astype(float), answered=np.reshape(stream.counts, shape).astype(float)
    )

    def gap(shift: float, concept: float) -> float:
        counts, accuracy = fleet_counts(shift, concept=concept)
        return estimate(counts[TABLE].reshape(shape), calibration).accuracy - accuracy

    assert abs(gap(0.0, 0.0)) < 0.01
    assert abs(gap(0.5, 0.0)) < 0.01
    assert gap(0.0, 0.2) > 0.1


def test_drift_lowers_confidence_and_accuracy():
    (before, good), (after, worse) = fleet_counts(0.0), fleet_counts(0.8)
    bins = np.tile(np.arange(CONFIDENCE_BINS), PROFILE.classes)
    assert after[TABLE] @ bins / after[TABLE].sum() < before[TABLE] @ bins / before[TABLE].sum()
    assert worse < good - 0.03


def test_missing_sensor_is_counted_as_missing():
    rng = np.random.default_rng(0)
    inputs = POPULATION.input_shares(POPULATION.trait(rng), 0.0)
    seen = POPULATION.observe(rng, inputs, POPULATION.answer_shares(0.0), samples=600, labelled=0.0, missing_stream=2)
    missing = [decode_counts(data, cells=cells_of(PROFILE.streams[number]))[-1] for number, data in enumerate(seen.sketches)]
    assert 140 < missing[2] < 260
    assert missing[1] == 0


def test_sampled_rows_follow_the_same_bins():
    rng = np.random.default_rng(1)
    trait = POPULATION.trait(rng)
    inputs = POPULATION.input_shares(trait, 0.0)
    rows = np.array([POPULATION.draw_row(rng, inputs)[1] for _ in range(1500)])
    counts = count_values(rows[:, 0], np.asarray(PROFILE.streams[0].edges))[:-1]
    assert compare(PROFILE.streams[0].counts, counts, edges=PROFILE.streams[0].edges).psi < 0.12
