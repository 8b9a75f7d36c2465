"""Distances between histograms: against definitions, against scipy, and what they say where nothing drifted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import spatial, stats

from edgekit.monitor.compare import chi_squared_tail, compare, design_effect, psi_bias

COUNTS = arrays(np.int64, st.just(8), elements=st.integers(0, 500)).filter(lambda values: values.sum() > 0)


@pytest.mark.parametrize("value", [0.0, 0.3, 2.0, 7.5, 16.9, 40.0, 200.0])
@pytest.mark.parametrize("freedom", [1, 2, 9, 31])
def test_chi_squared_tail_is_scipys(value, freedom):
    assert chi_squared_tail(value, freedom) == pytest.approx(stats.chi2.sf(value, freedom), rel=1e-9, abs=1e-14)


@given(COUNTS, COUNTS)
def test_distances_are_what_their_definitions_say(reference, current):
    found = compare(reference, current)
    p, q = reference / reference.sum(), current / current.sum()
    assert found.total_variation == pytest.approx(np.abs(p - q).sum() / 2)
    assert found.jensen_shannon == pytest.approx(spatial.distance.jensenshannon(p, q, 2), abs=1e-7)
    assert found.hellinger == pytest.approx(np.linalg.norm(np.sqrt(p) - np.sqrt(q)) / math.sqrt(2), abs=1e-7)
    assert found.kolmogorov_smirnov == pytest.approx(np.abs(np.cumsum(p - q)).max(), abs=1e-9)
    used = reference + current > 0
    if used.sum() > 1:
        expected = stats.chi2_contingency(np.array([reference[used], current[used]]), correction=False)
        assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
        assert found.degrees_of_freedom == expected.dof


@given(COUNTS)
def test_equal_shares_are_no_distance(counts):
    found = compare(counts, counts * 3)
    assert found.total_variation == found.kolmogorov_smirnov == found.psi == 0
    assert found.jensen_shannon < 1e-7
    assert found.p_value == pytest.approx(1.0)


def test_wasserstein_of_a_shift_is_the_shift_in_spreads():
    rng = np.random.default_rng(1)
    sample = rng.normal(size=200_000)
    edges = np.quantile(sample, np.linspace(0, 1, 33)[1:-1])
    spread = np.quantile(sample, 0.9) - np.quantile(sample, 0.1)
    bins = [np.histogram(values, [-np.inf, *edges, np.inf])[0] for values in (sample, rng.normal(0.5, size=200_000))]
    assert compare(bins[0], bins[1], edges=list(edges)).wasserstein == pytest.approx(0.5 / spread, rel=0.1)
    assert math.isnan(compare(bins[0], bins[1]).wasserstein)


@pytest.mark.parametrize(("samples", "raw_share"), [(100, 0.2), (200, 0.005)])
def test_psi_without_drift_is_a_matter_of_sample_size_until_its_bias_is_off(samples, raw_share):
    rng = np.random.default_rng(samples)
    reference = np.full(10, 2000)
    found = [compare(reference, rng.multinomial(samples, np.full(10, 0.1))) for _ in range(600)]
    assert np.mean([each.psi_raw for each in found]) == pytest.approx(psi_bias(10, samples, 20_000), rel=0.15)
    assert np.mean([each.psi_raw > 0.1 for each in found]) > raw_share
    assert np.mean([each.psi for each in found]) < np.mean([each.psi_raw for each in found]) / 2


def test_design_effect_sees_that_devices_differ():
    rng = np.random.default_rng(3)
    shares = np.full(10, 0.1)
    alike = rng.multinomial(100, shares, size=100)
    assert design_effect(alike) < 1.25
    unlike = np.array([rng.multinomial(100, rng.dirichlet(30 * shares)) for _ in range(100)])
    expected = 1 + 99 / 31  # of a Dirichlet-multinomial with 100 samples and a concentration of 30
    assert design_effect(unlike) == pytest.approx(expected, rel=0.25)
    assert design_effect(unlike[:1]) == design_effect(np.zeros((4, 10))) == 1.0


def test_design_effect_restores_the_false_alarms_of_the_test():
    rng = np.random.default_rng(4)
    naive, corrected = 0, 0
    reference = rng.multinomial(1_000_000, np.full(10, 0.1))
    for _ in range(200):
        devices = np.array([rng.multinomial(100, rng.dirichlet(np.full(10, 10.0))) for _ in range(60)])
        naive += compare(reference, devices.sum(axis=0)).p_value < 0.05
        corrected += compare(reference, devices.sum(axis=0), design_effect=design_effect(devices)).p_value < 0.05
    assert naive > 60
    assert corrected < 25


def test_nothing_to_compare_is_not_a_number():
    found = compare(np.array([5, 5]), np.array([0, 0]))
    assert math.isnan(found.psi)
    assert math.isnan(found.p_value)
    with pytest.raises(ValueError, match="one length"):
        compare(np.array([1, 2]), np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="edges"):
        compare(np.array([1, 2]), np.array([1, 2]), edges=[1.0, 2.0])
    with pytest.raises(ValueError, match="negative"):
        compare(np.array([1, -2]), np.array([1, 2]))
