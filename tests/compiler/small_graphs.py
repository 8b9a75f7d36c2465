"""Small real ONNX models with every trait that users' files have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
SIZE = 12


def value(name: str, shape: list, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def weight(name: str, shape: tuple[int, ...], seed: int = 0, dtype: type = np.float32) -> onnx.TensorProto:
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 8
    array = np.random.default_rng([seed, len(name), *shape]).normal(size=shape) / np.sqrt(fan_in)
    return numpy_helper.from_array(array.astype(dtype), name)


def build(nodes, inputs, outputs, weights, opset: int = 17) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "small", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def convolutional(
    *, batch: int | str = "batch", opset: int = 17, dtype: type = np.float32, channels: int = 8
) -> onnx.ModelProto:
    """x [batch, 1, 12, 12] -> conv, batch norm, relu, residual conv, mean, gemm -> logits [batch, 4]."""
    kind = FLOAT if dtype is np.float32 else TensorProto.FLOAT16
    c = channels
    norm = [
        numpy_helper.from_array(np.linspace(0.5, 1.5, c, dtype=dtype), "gamma"),
        numpy_helper.from_array(np.linspace(-0.1, 0.1, c, dtype=dtype), "beta"),
        numpy_helper.from_array(np.linspace(-0.2, 0.2, c, dtype=dtype), "mean"),
        numpy_helper.from_array(np.linspace(0.8, 1.2, c, dtype=dtype), "var"),
    ]
    pads = [1, 1, 1, 1]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="conv1", pads=pads),
        helper.make_node("BatchNormalization", ["a", "gamma", "beta", "mean", "var"], ["b"], name="norm"),
        helper.make_node("Relu", ["b"], ["c"], name="relu1"),
        helper.make_node("Conv", ["c", "w2"], ["d"], name="conv2", pads=pads),
        helper.make_node("Add", ["c", "d"], ["e"], name="add"),
        helper.make_node("Relu", ["e"], ["f"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["f"], ["g"], name="pool"),
        helper.make_node("Flatten", ["g"], ["h"], name="flatten", axis=1),
        helper.make_node("Gemm", ["h", "w3"], ["logits"], name="head", transB=1),
    ]
    weights = [
        weight("w1", (c, 1, 3, 3), dtype=dtype),
        weight("w2", (c, c, 3, 3), dtype=dtype),
        weight("w3", (4, c), dtype=dtype),
    ]
    x, y = value("x", [batch, 1, SIZE, SIZE], kind), value("logits", [batch, 4], kind)
    return build(nodes, [x], [y], [*weights, *norm], opset)


def matrix(hidden: int = 128) -> onnx.ModelProto:
    """Two inputs, two outputs, MatMul only."""
    nodes = [
        helper.make_node("Concat", ["left", "right"], ["both"], axis=1),
        helper.make_node("MatMul", ["both", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "w2"], ["scores"]),
    ]
    inputs = [value("left", ["batch", 6]), value("right", ["batch", 10])]
    outputs = [value("scores", ["batch", 5]), value("hidden", ["batch", hidden])]
    return build(nodes, inputs, outputs, [weight("w1", (16, hidden)), weight("w2", (hidden, 5))])


def constant_weights() -> onnx.ModelProto:
    """The same network with its weights as Constant nodes."""
    model = convolutional()
    nodes = [helper.make_node("Constant", [], [item.name], value=item) for item in model.graph.initializer]
    nodes += list(model.graph.node)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    return model


def branching() -> onnx.ModelProto:
    """The whole network inside the branches of an If that depends on the input."""
    branches = []
    for index in range(2):
        w = weight(f"w{index}", (16, 16), seed=index)
        node = helper.make_node("MatMul", ["x", w.name], [f"y{index}"])
        branches.append(helper.make_graph([node], f"branch{index}", [], [value(f"y{index}", ["batch", 16])], [w]))
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["is_positive"]),
        helper.make_node("If", ["is_positive"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    zero = numpy_helper.from_array(np.float32(0), "zero")
    return build(nodes, [value("x", ["batch", 16])], [value("y", ["batch", 16])], [zero])


def weightless() -> onnx.ModelProto:
    """Nothing to quantize."""
    nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=1)]
    return build(nodes, [value("x", ["batch", 5])], [value("y", ["batch", 5])], [])


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def images(count: int = 48, seed: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {"x": random.random((count, 1, SIZE, SIZE), dtype=np.float32)}
