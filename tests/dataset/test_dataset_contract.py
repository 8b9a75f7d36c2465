"""The contract: inferred from data, checked on requests."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.dataset.contract import check_feeds, count_out_of_range, infer_contract, infer_task
from edgekit.dataset.data import make_dataset
from edgekit.errors import DataError
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.contract import Contract
from edgekit.schema.tensor import TensorSpec

IN = (
    TensorSpec(name="x", dtype="float32", shape=("batch", 3)),
    TensorSpec(name="n", dtype="int64", shape=("batch",)),
)
OUT = (TensorSpec(name="logits", dtype="float32", shape=("batch", 4)),)


def dataset(labels=None, class_names=()):
    x = np.array([[0, 1, 2], [-1, 0.5, 9]], np.float32)
    return make_dataset({"x": x, "n": np.array([3, 5])}, labels=labels, class_names=class_names, source="d.npz")


@pytest.fixture
def contract():
    return infer_contract(dataset(np.array([0, 3])), IN, OUT)


def feeds(batch=1):
    return {"x": np.zeros((batch, 3), np.float32), "n": np.zeros(batch, np.int64)}


def test_contract_has_ranges_and_survives_json(contract):
    assert [(spec.minimum, spec.maximum) for spec in contract.inputs] == [(-1.0, 9.0), (3.0, 5.0)]
    assert contract.task == "classification"
    assert decode_json(encode_json(contract), Contract) == contract


def test_class_names_must_fit_the_output():
    assert infer_contract(dataset(np.array([0, 1]), ("a", "b", "c", "d")), IN, OUT).labels == ("a", "b", "c", "d")
    assert infer_contract(dataset(), IN, OUT, ("e", "f", "g", "h")).labels == ("e", "f", "g", "h")
    with pytest.raises(DataError) as caught:
        infer_contract(dataset(np.array([0, 1]), ("a", "b")), IN, OUT)
    assert caught.value.code == "data.class_count"


@pytest.mark.parametrize(
    ("labels", "name", "shape", "task"),
    [
        (np.array([0, 1]), "logits", ("b", 4), "classification"),
        (np.array([0.5, 1]), "logits", ("b", 4), "other"),
        (None, "logits", ("b", 4), "classification"),
        (None, "embedding", ("b", 4), "other"),
        (None, "y", ("b", 3), "other"),
        (None, "y", ("b", 1), "other"),
        (None, "y", ("b", 4, 4), "other"),
        (np.array([0, 1]), "y", ("b", "classes"), "classification"),
    ],
)
def test_task(labels, name, shape, task):
    assert infer_task(dataset(labels), IN, [TensorSpec(name=name, dtype="float32", shape=shape)]) == task


@pytest.mark.parametrize("batch", [1, 7])
def test_good_feeds_pass(contract, batch):
    check_feeds(contract, feeds(batch))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"x": None}, "data.missing_input"),
        ({"y": np.zeros(1)}, "data.unknown_input"),
        ({"x": np.zeros((1, 3))}, "data.dtype"),
        ({"x": np.zeros((1, 4), np.float32)}, "data.shape"),
        ({"x": np.zeros(3, np.float32)}, "data.shape"),
        ({"x": np.zeros((1, 3, 1), np.float32)}, "data.shape"),
        ({"n": np.zeros(2, np.int64)}, "data.shape"),
        ({"x": np.zeros((0, 3), np.float32), "n": np.zeros(0, np.int64)}, "data.empty"),
        ({"x": np.array([[0, np.nan, 0]], np.float32)}, "data.not_finite"),
        ({"x": np.array([[0, np.inf, 0]], np.float32)}, "data.not_finite"),
    ],
)
def test_bad_feeds_are_named(contract, change, code):
    given = {name: array for name, array in (feeds() | change).items() if array is not None}
    with pytest.raises(DataError) as caught:
        check_feeds(contract, given)
    assert caught.value.code == code
    assert f'"{next(iter(change))}"' in caught.value.message


def test_misspelt_feed_gets_a_hint():
    spec = (TensorSpec(name="image", dtype="float32", shape=("batch", 3)),)
    data = make_dataset({"image": np.zeros((1, 3), np.float32)}, source="test")
    contract = infer_contract(data, spec, OUT)
    with pytest.raises(DataError) as caught:
        check_feeds(contract, {"imgae": np.zeros((1, 3), np.float32)})
    assert '"imgae"' in caught.value.hint


def test_out_of_range_is_counted_and_no_error(contract):
    given = {"x": np.array([[-2, 0, 9], [10, 9.5, 1]], np.float32), "n": np.array([3, 5])}
    check_feeds(contract, given)
    assert count_out_of_range(contract, given) == {"x": 3, "n": 0}


def test_fixed_batch_is_kept():
    spec = (TensorSpec(name="x", dtype="float32", shape=(1, 3)),)
    contract = infer_contract(make_dataset({"x": np.zeros((5, 3), np.float32)}, source="test"), spec, OUT)
    check_feeds(contract, {"x": np.zeros((1, 3), np.float32)})
    with pytest.raises(DataError):
        check_feeds(contract, {"x": np.zeros((2, 3), np.float32)})
