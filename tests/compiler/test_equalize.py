"""Scaled channels: the float model answers the same, ranges come closer, what cannot take a factor is left alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.compiler.equalize import channel_maxima, equalize, find_folds
from edgekit.compiler.graph import run_once
from edgekit.dataset.data import Dataset, make_dataset

SIZE = 8


def model(nodes, weights, *, shape, output_rank) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *[None] * (output_rank - 1)])]
    tensors = [numpy_helper.from_array(np.asarray(values, np.float32), name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "network", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def uneven(shape: tuple[int, ...], axis: int) -> np.ndarray:
    spread = np.geomspace(0.01, 10, shape[axis])
    return np.random.default_rng(7).normal(0, 1, shape) * spread.reshape(
        [-1 if place == axis else 1 for place in range(len(shape))]
    )


def convolutions(between: str = "Relu") -> onnx.ModelProto:
    node, random = helper.make_node, np.random.default_rng(3)
    weights = {
        "w1": uneven((6, 3, 3, 3), 0), "b1": np.geomspace(0.01, 10, 6),
        "w2": random.normal(0, 1, (6, 1, 3, 3)), "b2": random.normal(0, 1, 6),
        "w3": random.normal(0, 1, (4, 6, 1, 1)),
    }  # fmt: skip
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"], name="first", pads=[1, 1, 1, 1]),
        node(between, ["a"], ["b"], name="act1"),
        node("Conv", ["b", "w2", "b2"], ["c"], name="depthwise", group=6, pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["d"], name="act2"),
        node("MaxPool", ["d"], ["e"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["e", "w3"], ["y"], name="last"),
    ]
    return model(nodes, weights, shape=(3, SIZE, SIZE), output_rank=4)


def transformer() -> onnx.ModelProto:
    """Pre-normalization: what the normalization makes goes into two products and nowhere else."""
    node, random = helper.make_node, np.random.default_rng(3)
    weights = {
        "g": uneven((8,), 0), "s": random.normal(0, 1, 8), "wq": random.normal(0, 1, (8, 5)),
        "wk": random.normal(0, 1, (8, 5)), "wo": random.normal(0, 1, (3, 5)), "bq": random.normal(0, 1, 5),
    }  # fmt: skip
    nodes = [
        node("LayerNormalization", ["x", "g", "s"], ["n"], name="norm"),
        node("MatMul", ["n", "wq"], ["q0"], name="query"),
        node("Add", ["q0", "bq"], ["q1"], name="bias"),
        node("Relu", ["q1"], ["q"], name="act"),
        node("MatMul", ["n", "wk"], ["k"], name="key"),
        node("Sigmoid", ["k"], ["gate"], name="gate"),
        node("Reshape", ["q", "shape"], ["flat"], name="flat"),
        node("Gemm", ["flat", "wo"], ["z"], name="out", transB=1),
        node("Reshape", ["z", "back"], ["z3"], name="unflat"),
        node("Concat", ["z3", "gate"], ["y"], name="join", axis=2),
    ]
    made = model(nodes, weights, shape=(4, 8), output_rank=3)
    for name, values in (("shape", [-1, 5]), ("back", [-1, 4, 3])):
        made.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    return made


def data(*shape: int) -> Dataset:
    return make_dataset({"x": np.random.default_rng(5).normal(0, 1, (20, *shape)).astype(np.float32)}, source="made here")


def spread(proto: onnx.ModelProto, samples: Dataset, tensor: str, *, is_last: bool = False) -> float:
    values = channel_maxima(proto, samples, {tensor: is_last})[tensor]
    return float(values.max() / values.min())


@pytest.mark.parametrize("rule", ["weights", "activations"])
def test_convolutions_answer_the_same_and_vary_less(rule):
    proto, samples = convolutions(), data(3, SIZE, SIZE)
    scaled, places = equalize(proto, samples, rule=rule)
    assert places == 2
    np.testing.assert_allclose(run_once(scaled, samples.inputs)[0], run_once(proto, samples.inputs)[0], rtol=1e-3, atol=1e-3)
    assert spread(scaled, samples, "b") < spread(proto, samples, "b") / 5


def test_weights_rule_makes_both_ranges_equal():
    scaled, _ = equalize(convolutions(), data(3, SIZE, SIZE), rule="weights")
    stored = {item.name: np.abs(numpy_helper.to_array(item)) for item in scaled.graph.initializer}
    made, read = stored["w1"].max(axis=(1, 2, 3)), stored["w2"].max(axis=(1, 2, 3))
    assert np.ptp(np.log(made / read)) < 0.05


def test_normalization_takes_the_factors_of_all_its_readers():
    proto, samples = transformer(), data(4, 8)
    assert [(fold.maker.name, [node.name for node in fold.readers]) for fold in find_folds(proto)] == [
        ("norm", ["query", "key"])
    ]
    scaled, _ = equalize(proto, samples, rule="activations")
    np.testing.assert_allclose(run_once(scaled, samples.inputs)[0], run_once(proto, samples.inputs)[0], rtol=1e-3, atol=1e-3)
    assert spread(scaled, samples, "n", is_last=True) < spread(proto, samples, "n", is_last=True) / 5


@pytest.mark.parametrize("between", ["Sigmoid", "HardSwish"])
def test_what_is_not_linear_for_positive_factors_stops_it(between):
    assert [fold.maker.name for fold in find_folds(convolutions(between))] == ["depthwise"]


def test_a_tensor_that_something_else_reads_is_left_alone():
    proto = convolutions()
    proto.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))
    assert [fold.maker.name for fold in find_folds(proto)] == ["first"]


def test_a_shared_weight_is_left_alone():
    proto = convolutions()
    proto.graph.node.append(helper.make_node("Identity", ["w3"], ["copy"], name="reads"))
    assert [fold.maker.name for fold in find_folds(proto)] == ["first"]


def test_a_channel_that_is_always_zero_changes_nothing():
    proto, samples = convolutions(), data(3, SIZE, SIZE)
    for item in proto.graph.initializer:
        if item.name in ("w1", "b1"):
            values = numpy_helper.to_array(item).copy()
            values[2] = 0
            item.CopyFrom(numpy_helper.from_array(values, item.name))
    for rule in ("weights", "activations"):
        scaled, _ = equalize(proto, samples, rule=rule)
        found = run_once(scaled, samples.inputs)[0]
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, run_once(proto, samples.inputs)[0], rtol=1e-3, atol=1e-3)
