"""The Open Inference Protocol's codec."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekit.agent.protocol import DATATYPES, InferRequest, decode_request, describe_tensors, encode_answer
from edgekit.errors import DataError
from edgekit.schema.tensor import TensorSpec


def request(data, *, shape=(1, 2), datatype="FP32", name="x", **more):
    return json.dumps({"inputs": [{"name": name, "shape": list(shape), "datatype": datatype, "data": data}], **more}).encode()


@pytest.mark.parametrize("data", [[0.5, 1], [[0.5, 1]], [[0.5], [1]]])
def test_flat_and_nested_data(data):
    feeds = decode_request(request(data)).feeds
    assert feeds["x"].dtype == np.float32
    assert feeds["x"].tolist() == [[0.5, 1.0]]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "request.malformed"),
        (b"{}", "request.malformed"),
        (b"\xff\xfe", "request.malformed"),
        (b"[" * 100_000, "request.malformed"),
        (request([1, 2, 3]), "data.shape"),
        (request([1, 2], shape=(-1, 2)), "data.shape"),
        (request([1, 2], shape=(1,) * 20), "data.shape"),
        (request([1, 2], datatype="FP8"), "data.dtype"),
        (request(["a", "b"]), "data.dtype"),
        (request([1, None]), "data.dtype"),
        (request([[1], [1, 2]]), "request.malformed"),
        (request([1.5, 2], datatype="INT8"), "data.dtype"),
        (request([300, 2], datatype="UINT8"), "data.dtype"),
        (request([-1, 2], datatype="UINT8"), "data.dtype"),
        (b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32"}]}', "request.malformed"),
        (b'{"inputs":[%s,%s]}' % ((b'{"name":"x","shape":[1],"datatype":"FP32","data":[1]}',) * 2), "request.malformed"),
    ],
)  # fmt: skip
def test_bad_request_refused(body, code):
    with pytest.raises(DataError) as caught:
        decode_request(body)
    assert caught.value.code == code


@pytest.mark.parametrize("datatype", list(DATATYPES))
def test_integers_of_every_datatype(datatype):
    feeds = decode_request(request([0, 1], datatype=datatype)).feeds
    assert feeds["x"].dtype == np.dtype(DATATYPES[datatype])
    assert feeds["x"].tolist() == [[0, 1]]


def test_large_uint64_kept_exactly():
    value = 2**64 - 1
    assert decode_request(request([value, 1], datatype="UINT64")).feeds["x"][0, 0] == value


def test_binary_input():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    head = json.dumps(
        {"inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "parameters": {"binary_data_size": 24}}]}
    ).encode()
    decoded = decode_request(head + array.tobytes(), len(head))
    np.testing.assert_array_equal(decoded.feeds["x"], array)


@pytest.mark.parametrize("size", [20, 28, -1, "24"])
def test_binary_input_of_wrong_size_refused(size):
    head = json.dumps(
        {"inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "parameters": {"binary_data_size": size}}]}
    ).encode()
    with pytest.raises(DataError):
        decode_request(head + bytes(24), len(head))


def test_unknown_output_refused():
    with pytest.raises(DataError, match="has y"):
        encode_answer(InferRequest(feeds={}, outputs=("z",)), {"y": np.zeros(1)}, model="m", version="1", model_digest="d")


@settings(max_examples=50, deadline=None)
@given(
    array=hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=4), elements=st.floats(-1e6, 1e6, width=32)),
    is_binary=st.booleans(),
)
def test_answer_carries_the_outputs(array, is_binary):
    asked = InferRequest(feeds={}, id="7", is_all_binary=is_binary)
    body, json_length = encode_answer(asked, {"y": array}, model="m", version="1.0", model_digest="sha256:ab")
    head = json.loads(body if json_length is None else body[:json_length])
    assert (head["model_name"], head["model_version"], head["id"]) == ("m", "1.0", "7")
    assert head["parameters"]["model_digest"] == "sha256:ab"
    output = head["outputs"][0]
    assert output["shape"] == list(array.shape)
    values = np.frombuffer(body[json_length:], np.float32) if is_binary else np.array(output["data"], np.float32)
    np.testing.assert_array_equal(values, array.ravel())


def test_dynamic_axis_is_minus_one():
    assert describe_tensors((TensorSpec(name="x", dtype="float32", shape=("batch", 3)),)) == [
        {"name": "x", "datatype": "FP32", "shape": [-1, 3]}
    ]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-5, 300)))
def test_fuzzed_body_raises_only_our_error(body, length):
    try:
        decode_request(body, length)
    except DataError:
        return
    pytest.fail("random bytes were taken for a request")
