"""Field samples as a data set: decoded, refused, joined with labels, cut in two, mixed."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.dataset.data import make_dataset
from edgekit.dataset.field import UNLABELLED, assemble, check_field, decode_tensor, mix, split_holdout, with_labels
from edgekit.errors import DataError
from edgekit.schema.contract import Contract, InputSpec
from edgekit.schema.message import SampleTensor
from edgekit.schema.tensor import TensorSpec
from edgekit.schema.work import FieldSample

CONTRACT = Contract(
    inputs=(InputSpec(name="x", dtype="float32", shape=("batch", 2)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
    task="classification",
    labels=("cat", "dog", "1"),
)


def tensor(values, *, name: str = "x", dtype: str = "float32", is_packed: bool = False) -> SampleTensor:
    array = np.asarray([values], dtype)
    data = zlib.compress(array.tobytes()) if is_packed else array.tobytes()
    return SampleTensor(name=name, dtype=dtype, shape=array.shape, data=data, encoding="zlib" if is_packed else "")


def sample(values=(1, 2), *, label: str = "", device: str = "cam", redacted=(), tensors=None) -> FieldSample:
    return FieldSample(
        site="lab", device=device, time_ms=1, model_digest="ab", prediction_id="p", predicted="", confidence=0.0, label=label,
        redacted=tuple(redacted), tensors=tensors or (tensor(values),),
    )  # fmt: skip


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8), st.booleans())
def test_tensor_decodes_to_what_was_encoded(values, is_packed):
    found = decode_tensor(tensor(values, is_packed=is_packed))
    assert found.dtype == np.float32
    assert np.array_equal(found, np.asarray([values], np.float32))


@pytest.mark.parametrize(
    "broken",
    [
        SampleTensor(name="x", dtype="float32", shape=(1, 2), data=b"\0" * 7),
        SampleTensor(name="x", dtype="float32", shape=(1, 2), data=b"\0" * 9),
        SampleTensor(name="x", dtype="float32", shape=(1, 2), data=b"no zlib", encoding="zlib"),
        SampleTensor(name="x", dtype="float32", shape=(1, 2), data=zlib.compress(b"\0" * 4000), encoding="zlib"),
        SampleTensor(name="x", dtype="float32", shape=(1, 2), data=b"\0" * 8, encoding="lzma"),
        SampleTensor(name="x", dtype="object", shape=(1,), data=b"\0" * 8),
        SampleTensor(name="x", dtype="fluffy", shape=(1,), data=b""),
        SampleTensor(name="x", dtype="float32", shape=(1, -2), data=b""),
        SampleTensor(name="x", dtype="float32", shape=(1 << 40,), data=b""),
    ],
)
def test_damaged_tensor_is_refused(broken):
    with pytest.raises(DataError) as caught:
        decode_tensor(broken)
    assert caught.value.code == "sample.malformed"


def test_what_cannot_be_used_is_left_out_and_counted():
    found = assemble(
        [
            sample((1, 2), label="dog"),
            sample((1, 2)),  # the same again
            sample((3, 4), label="1"),  # a class by this name, not the class at place 1
            sample((5, 6), label="unicorn"),
            sample((7, 8), redacted=("none",)),
            sample((9, 9), redacted=("blur:x:2",)),
            sample((np.nan, 1)),
            sample(tensors=(tensor((1, 2), dtype="float64"),)),
            sample(tensors=(tensor((1, 2, 3)),)),
            sample(tensors=(tensor((1, 2), name="z"),)),
            sample(tensors=(SampleTensor(name="x", dtype="float32", shape=(1, 2), data=b""),)),
        ],
        CONTRACT,
    )
    assert found.labels.tolist() == [1, 2, UNLABELLED, UNLABELLED]
    assert found.data.inputs["x"].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert found.skipped == {
        "came before": 1,
        "a label that is none of the classes": 1,
        "redacted": 1,
        "values that are not finite": 1,
        "another type or shape than the contract's": 2,
        "other inputs than the model's": 1,
        "damaged": 1,
    }
    assert len(assemble([sample(redacted=("blur:x:2",))], CONTRACT, with_redacted=True)) == 1


def test_label_of_a_copy_counts_for_the_first():
    found = assemble([sample((1, 2)), sample((1, 2), label="cat")], CONTRACT)
    assert found.labels.tolist() == [0]


def many(count: int, *, labelled: float = 1.0, devices: int = 3):
    random = np.random.default_rng(0)
    return assemble(
        (
            sample(random.normal(size=2), label="cat" if random.random() < labelled else "", device=f"cam-{n % devices}")
            for n in range(count)
        ),
        CONTRACT,
    )


def test_checks_refuse_too_few_and_warn_of_one_sided_ones():
    verdicts = {each.name: each.verdict for each in check_field(many(50), min_samples=60, min_labelled=51, contract=CONTRACT)}
    assert verdicts == {"samples": "refused", "labels": "refused", "quality": "ok", "devices": "ok", "classes": "warning"}
    lonely = check_field(many(50, devices=1), min_samples=1, min_labelled=0, contract=CONTRACT)
    assert {each.name: each.verdict for each in lonely}["devices"] == "warning"


def test_holdout_is_the_same_in_every_run_and_needs_labels():
    found = many(600, labelled=0.5)
    learn, held = split_holdout(found)
    assert sorted([*learn, *held]) == list(range(600))
    assert (found.labels[held] != UNLABELLED).all()
    assert 0.3 < len(held) / found.labelled < 0.5
    by_content = {found.data.inputs["x"][at].tobytes() for at in held}
    again = many(300, labelled=0.5)  # the first half of the same samples
    assert {again.data.inputs["x"][at].tobytes() for at in split_holdout(again)[1]} <= by_content
    assert len(with_labels(found, learn)) == found.labelled - len(held)
    assert len(split_holdout(many(200, labelled=0.0), needs_label=False)[1]) > 50


def test_mix_keeps_the_share_it_was_asked_for():
    old = make_dataset({"x": np.zeros((400, 2), np.float32)}, labels=np.zeros(400, np.int64), source="old")
    new = make_dataset({"x": np.ones((100, 2), np.float32)}, source="new")
    for share, sizes in ((0.5, (100, 100)), (0.2, (400, 100)), (0.1, (396, 44))):
        mixed = mix(old, new, share=share)
        assert (int((mixed.inputs["x"][:, 0] == 0).sum()), int((mixed.inputs["x"][:, 0] == 1).sum())) == sizes
        assert mixed.labels is None
    assert mix(old, new, share=1.0) is new
    with pytest.raises(DataError):
        mix(old, new, share=0.0)
