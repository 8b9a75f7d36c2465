"""The runtime's own graph: what ran in integers, what did not though the file asked for it, what conversions cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.compiler.audit import audit_runtime
from edgekit.compiler.calibration import collect_ranges
from edgekit.compiler.qdq import QdqPlan, write_qdq
from edgekit.dataset.data import make_dataset
from edgekit.schema.target import Int8Rules

SHAPE = (1, 8, 12, 12)


def residual() -> onnx.ModelProto:
    """Two convolutions with a sum around the second."""
    generator = np.random.default_rng(0)
    weights = [numpy_helper.from_array(generator.normal(0, 0.2, (8, 8, 3, 3)).astype(np.float32), f"w{i}") for i in range(2)]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "w1"], ["b"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["a", "b"], ["y"], name="sum"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in "xy"]
    graph = helper.make_graph(nodes, "residual", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(0, 1, SHAPE).astype(np.float32)}


def quantized(feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    proto = residual()
    ranges = collect_ranges(proto, make_dataset(feeds, source="made here"))
    return write_qdq(proto, QdqPlan(ranges=ranges, rules=Int8Rules(), is_per_channel=True))


def save(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return path


def test_int8_model_runs_in_integers(feeds, tmp_path):
    audit = audit_runtime(save(quantized(feeds), tmp_path), feeds)
    by_kind = {kernel.op_type: kernel.precision for kernel in audit.kernels}
    assert by_kind["QLinearConv"] == "int8"
    assert by_kind["QuantizeLinear"] == "conversion"
    assert not [item for item in audit.findings if item.kind == "float-island"]
    assert audit.total_ms > 0


def test_island_is_found_with_its_reason(feeds, tmp_path):
    proto = quantized(feeds)
    ends = [node for node in proto.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "b"]
    back = next(node for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[0] == ends[0].output[0])
    reader = next(node for node in proto.graph.node if back.output[0] in node.input)
    reader.input[:] = ["b" if name == back.output[0] else name for name in reader.input]
    proto.graph.node.remove(ends[0])
    proto.graph.node.remove(back)
    islands = [item for item in audit_runtime(save(proto, tmp_path), feeds).findings if item.kind == "float-island"]
    assert [item.node for item in islands] == ["second"]
    assert "its result is not quantized" in islands[0].text
    assert islands[0].ms is not None


def test_layer_left_in_float_on_purpose_is_no_finding(feeds, tmp_path):
    proto = residual()
    ranges = collect_ranges(proto, make_dataset(feeds, source="made here"))
    mixed = write_qdq(proto, QdqPlan(ranges=ranges, rules=Int8Rules(), is_per_channel=True, float_nodes=("second",)))
    assert not [item for item in audit_runtime(save(mixed, tmp_path), feeds).findings if item.kind == "float-island"]


def test_conversions_that_cost_are_found(tmp_path):
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16)]
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 8, 256, 256)),
        helper.make_tensor_value_info("y", TensorProto.FLOAT16, (1, 8, 256, 256)),
    ]
    graph = helper.make_graph(nodes, "casts", values[:1], values[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = [
        item
        for item in audit_runtime(save(proto, tmp_path), {"x": np.ones((1, 8, 256, 256), np.float32)}).findings
        if item.kind == "conversion"
    ]
    assert [item.op_type for item in found] == ["Cast"]
