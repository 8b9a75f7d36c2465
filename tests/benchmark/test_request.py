"""Requests made and fitted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.benchmark.request import fit_request, make_request, shape_of, take_samples
from edgekit.errors import DataError
from edgekit.schema.tensor import DType, TensorSpec

AXES = st.one_of(st.integers(1, 5), st.sampled_from(["batch", "n", "length"]))
SPECS = st.builds(
    TensorSpec, name=st.just("x"), dtype=st.sampled_from(DType.__args__), shape=st.lists(AXES, max_size=4).map(tuple)
)


@given(SPECS, st.integers(1, 4))
def test_made_request_has_the_declared_type_and_shape(spec, batch):
    value = make_request([spec], batch=batch)["x"]
    assert value.dtype == np.dtype(spec.dtype)
    assert value.shape == shape_of(spec, batch)
    assert not spec.dtype.startswith("float") or (value.min() >= 0 and value.max() <= 1)


def spec(name="x", dtype="float32", shape=("batch", 1, 4, 4)) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def test_request_is_the_same_for_the_same_seed():
    np.testing.assert_array_equal(make_request([spec()], seed=1)["x"], make_request([spec()], seed=1)["x"])


def test_bytes_use_their_whole_range():
    value = make_request([spec(dtype="int8", shape=(1, 10_000))])["x"]
    assert (value.min(), value.max()) == (-128, 127)


@pytest.mark.parametrize(
    ("shape", "batch", "expected"), [(("n", 2), 1, [0]), (("n", 2), 5, [0, 1, 2, 0, 1]), ((2, 2), 1, [0, 1])]
)
def test_samples_start_again_where_there_are_too_few(shape, batch, expected):
    arrays = {"x": np.arange(3, dtype=np.float32)[:, None].repeat(2, 1)}
    assert take_samples(arrays, [spec(shape=shape)], batch=batch)["x"][:, 0].tolist() == expected


def test_fit_keeps_the_values_under_another_name():
    request = make_request([spec()])
    fitted, is_same = fit_request(request, [spec(name="args_0")], name="other")
    assert is_same
    assert fitted["args_0"] is request["x"]


def test_fit_matches_by_name_whatever_the_order():
    inputs = [spec("a", shape=(1, 2)), spec("b", shape=(1, 3))]
    request = make_request(inputs)
    fitted, is_same = fit_request(request, inputs[::-1], name="other")
    assert is_same
    np.testing.assert_array_equal(fitted["a"], request["a"])


@pytest.mark.parametrize("other", [spec(dtype="int8"), spec(shape=(1, 4, 4, 1))])
def test_fit_draws_values_where_the_form_differs(other):
    fitted, is_same = fit_request(make_request([spec()]), [other], name="other")
    assert not is_same
    assert (fitted["x"].dtype, fitted["x"].shape) == (np.dtype(other.dtype), shape_of(other, 1))


@pytest.mark.parametrize("inputs", [[spec(), spec("y")], [spec(shape=(1, 3))]])
def test_models_that_take_something_else_are_refused(inputs):
    with pytest.raises(DataError) as caught:
        fit_request(make_request([spec()]), inputs, name="other.onnx")
    assert caught.value.code == "benchmark.inputs_differ"
    assert "other.onnx" in caught.value.message
