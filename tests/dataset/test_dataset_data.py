"""Digest, sampling, batches, profile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekit.dataset.data import digest_arrays, make_dataset, spread_indices
from edgekit.dataset.profile import describe
from edgekit.errors import UsageError

ARRAYS = hnp.arrays(st.sampled_from([np.float32, np.int64, np.uint8]), hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
NAMED = st.dictionaries(st.text(min_size=1, max_size=5), ARRAYS, min_size=1, max_size=3)


@given(NAMED)
def test_digest_ignores_order_layout_and_byte_order(arrays):
    digest = digest_arrays(arrays, None)
    assert digest == digest_arrays(dict(reversed(arrays.items())), None)
    assert digest == digest_arrays({name: np.asfortranarray(array) for name, array in arrays.items()}, None)
    swapped = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in arrays.items()}
    assert digest == digest_arrays(swapped, None)


@given(NAMED, st.data())
def test_digest_sees_one_flipped_bit(arrays, draw):
    name = draw.draw(st.sampled_from(sorted(arrays)))
    raw = bytearray(arrays[name].tobytes())
    place = draw.draw(st.integers(0, len(raw) * 8 - 1))
    raw[place // 8] ^= 1 << (place % 8)
    changed = np.frombuffer(bytes(raw), arrays[name].dtype).reshape(arrays[name].shape)
    assert digest_arrays(arrays, None) != digest_arrays(arrays | {name: changed}, None)


@given(NAMED, ARRAYS)
def test_digest_sees_names_types_shapes_and_labels(arrays, labels):
    digest = digest_arrays(arrays, None)
    assert digest != digest_arrays(arrays, labels)
    assert digest_arrays(arrays, labels) != digest_arrays(arrays | {"labels!": labels}, None)
    name = next(iter(arrays))
    renamed = {key if key != name else key + "'": array for key, array in arrays.items()}
    assert digest != digest_arrays(renamed, None)
    assert digest != digest_arrays(arrays | {name: arrays[name][None]}, None)


@given(st.integers(1, 5000), st.integers(1, 6000))
def test_spread_is_even_distinct_and_stable(count, limit):
    indices = spread_indices(count, limit)
    assert len(indices) == min(count, limit)
    assert indices[0] == 0
    assert indices[-1] < count
    gaps = np.diff(indices)
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    np.testing.assert_array_equal(indices, spread_indices(count, limit))


@given(st.integers(1, 40), st.integers(1, 50))
def test_batches_hold_every_sample_once(count, size):
    data = make_dataset({"x": np.arange(count)}, labels=np.arange(count) * 2, source="test")
    batches = list(data.batches(size))
    assert np.concatenate([feeds["x"] for feeds, _ in batches]).tolist() == list(range(count))
    assert np.concatenate([labels for _, labels in batches]).tolist() == list(range(0, 2 * count, 2))
    assert all(len(labels) == size for _, labels in batches[:-1])


def test_batch_of_none_is_refused():
    with pytest.raises(UsageError):
        next(make_dataset({"x": np.zeros(3)}, source="test").batches(0))


def test_select_keeps_labels_beside_samples():
    data = make_dataset({"x": np.arange(5)}, labels=np.arange(5) + 10, class_names=("a",), source="test", notes=("n",))
    chosen = data.select([4, 1])
    assert chosen.inputs["x"].tolist() == [4, 1]
    assert chosen.labels.tolist() == [14, 11]
    assert (chosen.class_names, chosen.notes, chosen.source) == (("a",), ("n",), "test")
    assert chosen.digest != data.digest


def test_profile_has_the_moments(monkeypatch):
    monkeypatch.setattr("edgekit.dataset.profile._CHUNK_VALUES", 7)
    values = np.random.default_rng(0).normal(3, 2, (50, 3)).astype(np.float32)
    values[:10, 0] = 0
    data = make_dataset({"x": values}, labels=np.array([0] * 20 + [2] * 30), class_names=("a", "b", "c"), source="test")
    profile = describe(data)
    (one,) = profile.inputs
    assert one.mean == pytest.approx(values.mean(dtype=np.float64))
    assert one.std == pytest.approx(values.std(dtype=np.float64))
    assert (one.minimum, one.maximum) == (values.min(), values.max())
    assert one.zero_fraction == pytest.approx(10 / 150)
    assert profile.class_counts == {"a": 20, "b": 0, "c": 30}
