"""Sketches: the same numbers as the profile's, exactly mergeable, small on the wire, and nothing but our errors for garbage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgekit.counts import merge_counts
from edgekit.errors import ArtifactError
from edgekit.monitor.sketch import (
    CONFIDENCE_BINS,
    Sketcher,
    bare_profile,
    build_profile,
    cells_of,
    choose_streams,
    confidence_cells,
    count_values,
    cut_edges,
    decode_counts,
    encode_counts,
    stream_values,
)
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.baseline import ReferenceProfile
from edgekit.schema.contract import Contract
from edgekit.schema.tensor import TensorSpec

COUNTS = arrays(np.int64, st.integers(1, 60), elements=st.one_of(st.just(0), st.integers(0, 1 << 40)))
RNG = np.random.default_rng(0)
TABLE = np.column_stack([RNG.normal(size=6000), RNG.integers(0, 3, 6000), RNG.exponential(size=6000)]).astype(np.float32)
SCORES = RNG.dirichlet(np.ones(3), size=6000).astype(np.float32)


@given(COUNTS)
def test_counts_round_trip(counts):
    assert np.array_equal(decode_counts(encode_counts(counts), cells=counts.size), counts)


@given(st.lists(arrays(np.int64, 35, elements=st.integers(0, 1000)), min_size=1, max_size=5), st.randoms())
def test_merge_is_addition_in_any_order(parts, random):
    encoded = [encode_counts(part) for part in parts]
    whole = merge_counts(encoded)
    random.shuffle(encoded)
    assert merge_counts(encoded) == whole
    assert np.array_equal(decode_counts(whole, cells=35), sum(parts))
    if len(encoded) > 2:
        assert merge_counts([merge_counts(encoded[:2]), *encoded[2:]]) == whole


@given(st.binary(max_size=60))
def test_any_bytes_are_counts_or_refused(data):
    try:
        counts = decode_counts(data, cells=35)
    except ArtifactError as error:
        assert error.code == "telemetry.malformed"  # noqa: PT017 - only some bytes are refused
    else:
        assert encode_counts(counts) == data


@given(arrays(np.float64, st.integers(1, 50), elements=st.floats(-1e3, 1e3) | st.just(np.nan)))
def test_each_value_is_counted_once_and_on_the_right_side_of_each_edge(values):
    edges = np.array([-10.0, 0.0, 1.0, 500.0])
    counts = count_values(values, edges)
    assert counts.sum() == values.size
    assert counts[-1] == np.isnan(values).sum()
    assert counts[0] == (values < -10.0).sum()
    assert counts[-2] == (values > 500.0).sum()
    assert counts[2] == ((values > 0.0) & (values <= 1.0)).sum()


def test_profile_cuts_at_quantiles_and_few_values_get_a_bin_each():
    profile = build_profile({"x": TABLE}, columns={"x": ["volt", "mode", "rate"]})
    volt, mode, rate = profile.streams
    assert [stream.name for stream in profile.streams] == ["volt", "mode", "rate"]
    assert profile.samples == sum(volt.counts) == 6000
    assert len(volt.edges) == len(rate.edges) == 33
    inner = volt.counts[1:-1]
    assert max(inner) - min(inner) <= 2
    assert (volt.counts[0], volt.counts[-1]) == (0, 0)
    assert mode.edges == (-0.5, 0.5, 1.5, 2.5)
    assert mode.counts[1:4] == tuple((TABLE[:, 1] == value).sum() for value in range(3))
    assert decode_json(encode_json(profile), ReferenceProfile) == profile


def test_device_counts_what_the_profile_counted():
    profile = build_profile({"x": TABLE}, {"y": SCORES}, scores="y")
    sketcher = Sketcher(profile)
    for start in range(0, 6000, 7):
        sketcher.observe({"x": TABLE[start : start + 7]}, {"y": SCORES[start : start + 7]})
    for stream, data in zip(profile.streams, sketcher.take(), strict=True):
        counts = decode_counts(data, cells=cells_of(stream)).tolist()
        assert counts == [*stream.counts, stream.missing] if stream.kind == "input" else list(stream.counts)
    assert sketcher.take() == (b"",) * 4


def test_what_is_new_on_the_device_has_its_bins():
    profile = build_profile({"x": TABLE})
    sketcher = Sketcher(profile)
    sketcher.observe({"x": np.array([[99.0, 7.0, np.nan], [-99.0, 1.0, np.inf]], dtype=np.float32)}, {})
    volt, mode, rate = (
        decode_counts(data, cells=cells_of(stream)) for stream, data in zip(profile.streams, sketcher.take(), strict=True)
    )
    assert (volt[0], volt[-2], volt[-1]) == (1, 1, 0)
    assert (mode[-2], mode[2]) == (1, 1)
    assert (rate[-2], rate[-1]) == (1, 1)


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((9, 3, 8, 8), ["x[0].mean", "x[0].std", "x[1].mean", "x[1].std", "x[2].mean", "x[2].std", "x.outside"]),
        ((9, 8, 8, 1), ["x.mean", "x.std", "x.outside"]),
        ((9, 16000), ["x.mean", "x.std", "x.peak", "x.outside"]),
        ((9, 2), ["x[0]", "x[1]"]),
        ((9, 40, 98), ["x.mean", "x.std", "x.peak", "x.outside"]),
    ],
)
def test_streams_suit_the_kind_of_input(shape, names):
    tensor = RNG.integers(0, 255, shape).astype(np.uint8)
    streams = choose_streams("x", tensor)
    assert [stream.name for stream in streams] == names
    for stream in streams:
        values = stream_values(stream, tensor)
        assert values.shape == (9,)
        assert np.isfinite(values).all()
    assert stream_values(streams[0], tensor)[0] == pytest.approx(
        {4: tensor[0, 0] if shape[1] <= 4 else tensor[0], 3: tensor[0], 2: tensor[0]}[len(shape)].mean()
        if names[0] != "x[0]"
        else tensor[0, 0]
    )


def test_confidence_of_probabilities_and_logits_is_the_same():
    logits = RNG.normal(size=(500, 4)) * 3
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    by_logits, by_probabilities = confidence_cells(logits), confidence_cells(probabilities)
    assert np.array_equal(by_logits[0], by_probabilities[0])
    assert np.mean(by_logits[1] == by_probabilities[1]) > 0.99
    assert confidence_cells(np.ones((5, 1))) is None
    assert confidence_cells(np.ones((5, 9), dtype=np.int64)) is None
    assert confidence_cells(np.array([[np.nan, 1.0], [0.2, 0.8]]))[0].tolist() == [1]


def test_calibration_counts_who_was_right():
    labels = SCORES.argmax(axis=1)
    labels[:3000] = 0
    stream = build_profile({"x": TABLE}, {"y": SCORES}, scores="y", labels=labels).streams[-1]
    right, counts = np.array(stream.right).reshape(3, CONFIDENCE_BINS), np.array(stream.counts).reshape(3, CONFIDENCE_BINS)
    assert right.sum() == (SCORES.argmax(axis=1) == labels).sum()
    assert (right <= counts).all()
    assert np.array_equal(right[0], counts[0])


def test_live_tensor_of_another_shape_counts_nothing():
    sketcher = Sketcher(build_profile({"x": RNG.random((50, 3, 4, 4))}, {"y": SCORES[:50]}, scores="y"))
    sketcher.observe({"x": RNG.random((1, 2, 4, 4)), "z": np.ones(3)}, {"y": np.ones((1, 9), dtype=np.float32)})
    counts = [decode_counts(data, cells=40).sum() for data in sketcher.take()[:-1]]
    assert counts == [1, 1, 1, 1, 0, 0, 1]


def test_sketch_of_a_minute_is_small():
    sketcher = Sketcher(build_profile({"x": TABLE}, {"y": SCORES}, scores="y"))
    rows = RNG.integers(0, 6000, 600)
    sketcher.observe({"x": TABLE[rows]}, {"y": SCORES[rows]})
    sizes = [len(data) for data in sketcher.take()]
    assert max(sizes[:3]) <= 36
    assert sizes[3] <= 60


def test_edges_of_nothing_and_of_one_value():
    assert cut_edges(np.array([np.nan])) == (0.0,)
    assert cut_edges(np.array([5.0, 5.0])) == (2.5, 7.5)
    with pytest.raises(ArtifactError, match="no samples"):
        build_profile({"x": np.zeros((0, 3))})


def test_share_outside_the_calibrated_range_is_counted():
    reference = RNG.uniform(0, 1, (200, 3, 8, 8)).astype(np.float32)
    profile = build_profile({"x": reference})
    stream = profile.streams[-1]
    assert (stream.name, stream.low, stream.high) == ("x.outside", float(reference.min()), float(reference.max()))
    assert stream.counts[1] == 200
    sketcher = Sketcher(profile)
    bright = np.full((2, 3, 8, 8), 0.5, np.float32)
    bright[0, :, :4] = 1.5
    sketcher.observe({"x": bright}, {})
    counts = decode_counts(sketcher.take()[-1], cells=cells_of(stream))
    assert counts.tolist() == [0, 1, 0, 0, 0, 0, 0, 1, 0, 0]


def test_answers_of_very_many_classes_are_counted_by_confidence():
    scores = RNG.dirichlet(np.ones(1000) * 0.01, size=300).astype(np.float32)
    labels = scores.argmax(axis=1)
    profile = build_profile({"x": RNG.random((300, 2))}, {"y": scores}, scores="y", labels=labels)
    stream = profile.streams[-1]
    assert (len(stream.counts), sum(stream.counts), stream.right, profile.classes) == (
        CONFIDENCE_BINS,
        300,
        stream.counts,
        1000,
    )
    sketcher = Sketcher(profile)
    sketcher.observe({"x": RNG.random((300, 2))}, {"y": scores})
    assert decode_counts(sketcher.take()[-1], cells=CONFIDENCE_BINS).tolist() == list(stream.counts)


@pytest.mark.parametrize(("classes", "cells"), [(3, 60), (1000, 20), (1, 0)])
def test_what_is_counted_without_a_reference(classes, cells):
    output = TensorSpec(name="y", dtype="float32", shape=("batch", classes))
    profile = bare_profile(Contract(inputs=(), outputs=(output,), task="classification"))
    assert (len(profile.streams[0].counts) if profile else 0) == cells
    assert bare_profile(Contract(inputs=(), outputs=(output,))) is None
