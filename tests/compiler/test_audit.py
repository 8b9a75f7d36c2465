"""The runtime's own graph: what ran in integers, what did not though the file asked for it and why, what can be repaired."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.compiler import audit as audit_module
from edgekit.compiler.audit import NO_PAIR, UNSIGNED, audit_runtime
from edgekit.compiler.calibration import collect_ranges
from edgekit.compiler.graph import open_plain, run_once
from edgekit.compiler.pipeline import optimize
from edgekit.compiler.preparation import OptimizeRequest
from edgekit.compiler.qdq import QdqGraph, QdqPlan, silenced_root, write_qdq
from edgekit.compiler.repair import repair
from edgekit.dataset.data import make_dataset
from edgekit.errors import ArtifactError
from edgekit.schema.target import Int8Rules
from tests.compiler import small_graphs

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


# --- one layer, quantized in every way --------------------------------------------------------------------------------------

FLOAT, STEP = TensorProto.FLOAT, 0.05
ON_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 wants uint8 activations")
MIDDLE = {np.uint8: 128, np.int8: 0, np.uint16: 32768}
LAYER_SHAPES = {"Conv": (8, 8, 3, 3), "ConvTranspose": (8, 8, 3, 3), "MatMul": (16, 16), "Gemm": (16, 16)}


def constant(values, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values), name)


def make(nodes, weights, outputs, *, shape=SHAPE, opset: int = 17, extra=()) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", FLOAT, shape), *extra]
    values = [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "layer", inputs, values, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def q(name: str, end: str, scale: str = "s") -> onnx.NodeProto:
    return helper.make_node("QuantizeLinear", [name, scale, "z"], [end], name=f"Q_{end}")


def dq(name: str, end: str, scale: str = "s") -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", [name, scale, "z"], [end], name=f"DQ_{end}")


def parameters(kind=np.uint8) -> list[onnx.TensorProto]:
    """Scale and zero point of the activations, another scale, and one weight of eight channels."""
    values = np.random.default_rng(3).integers(-100, 100, (8, 8, 3, 3)).astype(np.int8)
    scales = [constant(np.float32(STEP), "s"), constant(np.float32(0.07), "s2"), constant(kind(MIDDLE[kind]), "z")]
    return [*scales, constant(values, "wq"), constant(np.float32(0.01), "ws"), constant(np.int8(0), "wz")]


def conv(name: str, source: str, result: str) -> list[onnx.NodeProto]:
    weight = helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], [f"{name}_w"], name=f"{name}_w")
    return [weight, helper.make_node("Conv", [source, f"{name}_w"], [result], name=name, pads=[1, 1, 1, 1])]


def layer(
    op="Conv", *, kind=np.uint8, bias="int32", bias_scale=0.0005, end="Q", rows=False, attributes=None
) -> onnx.ModelProto:
    """x -> Q -> DQ -> the layer -> Q -> DQ -> y; ``end``: what is behind it."""
    shape = LAYER_SHAPES[op]
    weights = [*parameters(kind)[:3], constant(np.random.default_rng(0).integers(-99, 99, shape).astype(np.int8), "wq")]
    scale = np.full(shape[0], 0.01, np.float32) if rows else np.float32(0.01)
    weights += [constant(scale, "ws"), constant(np.zeros(np.shape(scale), np.int8), "wz")]
    axis = {"axis": 0} if rows else {}
    nodes = [q("x", "xq"), dq("xq", "xd"), helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], **axis)]
    inputs, extra = ["xd", "wd"], []
    if bias in ("int32", "int8"):
        values = np.arange(shape[0]).astype(bias)
        weights += [constant(values, "bq"), constant(np.float32(bias_scale), "bs"), constant(np.zeros((), bias), "bz")]
        nodes.append(helper.make_node("DequantizeLinear", ["bq", "bs", "bz"], ["b"]))
    elif bias == "float32":
        weights.append(constant(np.ones(shape[0], np.float32), "b"))
    elif bias == "computed":
        extra = [helper.make_tensor_value_info("b", FLOAT, [shape[0]])]
    given = (attributes or {}) | ({"pads": [1, 1, 1, 1]} if "Conv" in op else {})
    nodes.append(helper.make_node(op, [*inputs, "b"] if bias else inputs, ["c"], name="layer", **given))
    outputs = ["y"]
    if end == "nothing":
        nodes.append(helper.make_node("Identity", ["c"], ["y"]))
    elif end in ("Relu", "Tanh"):
        nodes += [helper.make_node(end, ["c"], ["r"]), q("r", "yq"), dq("yq", "y")]
    elif end == "two":
        nodes += [q("c", "yq"), dq("yq", "y"), q("c", "oq", "s2"), dq("oq", "o", "s2")]
        outputs.append("o")
    else:
        nodes += [q("c", "yq"), dq("yq", "y")]
    if end == "reader":
        nodes.append(helper.make_node("Tanh", ["c"], ["t"], name="reader"))
        outputs.append("t")
    size = list(SHAPE) if "Conv" in op else [4, 16]
    return make(nodes, weights, outputs, shape=size, opset=21 if kind is np.uint16 else 17, extra=extra)


def islands(proto: onnx.ModelProto, folder: Path) -> list:
    audit = audit_runtime(save(proto, folder), None, is_timed=False)
    return [finding for finding in audit.findings if finding.kind == "float-island"]


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"rows": True}, {"bias": "float32"}, {"bias": None}, {"op": "MatMul", "bias": None}, {"op": "Gemm"}),
        *({"op": "MatMul", "bias": None, "end": "nothing"}, {"op": "Gemm", "end": "nothing"}, {"kind": np.int8}),
    ],
    ids=str,
)
def test_layer_that_fuses_is_no_island(settings, tmp_path):
    assert islands(layer(**settings), tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bias": "int8"}, "its bias is int8, not int32"),
        ({"bias": "computed"}, "its bias is computed while it runs"),
        ({"bias_scale": 0.1}, "its bias has a scale of its own"),
        ({"end": "nothing"}, "its result is not quantized"),
        ({"end": "Tanh"}, "Tanh stands between it and its QuantizeLinear"),
        ({"end": "Relu"}, "Relu stands between it and its QuantizeLinear"),
        ({"end": "reader"}, "its result is also read in float32 by reader"),
        ({"end": "two"}, "its result is quantized 2 times, differently"),
        ({"op": "ConvTranspose", "bias": None}, "no integer kernel for ConvTranspose"),
        ({"op": "MatMul", "bias": None, "rows": True}, "its weights have one scale for each row"),
        ({"op": "Gemm", "attributes": {"alpha": 0.5}}, "alpha and beta must be 1"),
        ({"kind": np.uint16}, "its activations are uint16"),
    ],
    ids=str,
)
def test_island_says_why(settings, reason, tmp_path):
    found = islands(layer(**settings), tmp_path)
    assert [finding.node for finding in found] == ["layer"]
    assert reason in found[0].text
    assert found[0].repair


# --- whole models from a quantizer ------------------------------------------------------------------------------------------


def silu_network() -> onnx.ModelProto:
    """Convolutions with SiLU, a residual sum, HardSwish and a classifier."""
    generator = np.random.default_rng(0)
    shapes = {"w1": (8, 8, 3, 3), "w2": (8, 8, 3, 3), "w3": (8, 8, 3, 3), "w4": (4, 8)}
    weights = [constant(generator.normal(0, 0.15, shape).astype(np.float32), name) for name, shape in shapes.items()]
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="stem", **pads),
        helper.make_node("Sigmoid", ["a"], ["a_gate"], name="gate1"),
        helper.make_node("Mul", ["a", "a_gate"], ["b"], name="silu1"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="body", **pads),
        helper.make_node("Add", ["b", "c"], ["d"], name="sum"),
        helper.make_node("HardSwish", ["d"], ["e"], name="swish"),
        helper.make_node("Conv", ["e", "w3"], ["f"], name="tail", **pads),
        helper.make_node("GlobalAveragePool", ["f"], ["g"], name="pool"),
        helper.make_node("Flatten", ["g"], ["h"], name="flat"),
        helper.make_node("Gemm", ["h", "w4"], ["y"], name="head", transB=1),
    ]
    return make(nodes, weights, ["y"])


def static(folder: Path, activations: str) -> onnx.ModelProto:
    """The network as ``onnxruntime.quantization.quantize_static`` writes it."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = 4

        def get_next(self):
            self.left -= 1
            return {"x": np.random.default_rng(self.left).normal(size=SHAPE).astype(np.float32)} if self.left >= 0 else None

    onnx.save(silu_network(), folder / "float.onnx")
    kinds = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
    with silenced_root():
        quantize_static(
            folder / "float.onnx",
            folder / "static.onnx",
            Reader(),
            activation_type=kinds[activations],
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
    return onnx.load(folder / "static.onnx")


def test_unsigned_network_has_one_cheap_operator_in_float(feeds, tmp_path):
    audit = audit_runtime(save(static(tmp_path, "uint8"), tmp_path), feeds)
    assert not [finding for finding in audit.findings if finding.kind == "float-island"]
    pairs = [finding for finding in audit.findings if finding.kind == "unfused-pair"]
    assert len(pairs) == 1
    assert "HardSigmoid, Mul behind d_DequantizeLinear" in pairs[0].text
    precisions = {(kernel.op_type, kernel.precision) for kernel in audit.kernels}
    assert {("Transpose", "conversion"), ("Flatten", "int8"), ("QLinearSigmoid", "int8"), ("HardSigmoid", "fp32")} <= precisions


def test_every_node_has_its_time_with_or_without_a_name(feeds, tmp_path):
    proto = static(tmp_path, "uint8")
    for node in proto.graph.node:
        node.name = ""
    audit = audit_runtime(save(proto, tmp_path), feeds)
    assert all(kernel.node and kernel.ms is not None for kernel in audit.kernels)
    assert audit.total_ms == pytest.approx(sum(kernel.ms for kernel in audit.kernels))


@ON_X86
def test_branching_int8_activations_are_islands_until_they_are_unsigned(feeds, tmp_path):
    proto = static(tmp_path, "int8")
    audit = audit_runtime(save(proto, tmp_path), feeds, is_timed=False)
    found = [finding for finding in audit.findings if finding.kind == "float-island"]
    assert {finding.node for finding in found} == {"stem", "gate1", "silu1", "body", "sum"}
    assert {finding.repair for finding in found} == {UNSIGNED}
    assert all(finding.ms is None for finding in audit.findings)
    repaired, notes = repair(proto, audit)
    assert notes[0].startswith("activations int8 -> uint8: ")
    assert proto == onnx.load(tmp_path / "static.onnx")
    np.testing.assert_array_equal(run_once(repaired, feeds)[0], run_once(proto, feeds)[0])
    after = audit_runtime(save(repaired, tmp_path), feeds, is_timed=False)
    assert not [finding for finding in after.findings if finding.kind == "float-island"]
    assert repair(repaired, after)[1] == ()


@ON_X86
def test_readers_of_one_activation_get_a_dequantizer_each(feeds, tmp_path):
    nodes = [q("x", "xq"), dq("xq", "xd"), *conv("first", "xd", "a"), q("a", "aq"), dq("aq", "ad")]
    nodes += [*conv("second", "ad", "b"), q("b", "bq"), dq("bq", "bd")]
    nodes += [helper.make_node("Add", ["ad", "bd"], ["c"], name="sum"), q("c", "cq"), dq("cq", "y")]
    proto = make(nodes, parameters(np.int8), ["y"])
    repaired, notes = repair(proto, audit_runtime(save(proto, tmp_path), feeds, is_timed=False))
    graph = QdqGraph(repaired)
    assert "DequantizeLinear for a reader of its own: 1" in notes
    assert [len(graph.uses[node.output[0]]) for node in graph.uses["aq"]] == [1, 1]
    np.testing.assert_array_equal(run_once(repaired, feeds)[0], run_once(proto, feeds)[0])


@ON_X86
def test_weights_keep_their_zero_point_when_activations_share_it(feeds, tmp_path):
    nodes = [q("x", "xq"), dq("xq", "xd"), *conv("first", "xd", "a"), q("a", "aq"), dq("aq", "ad")]
    nodes += [helper.make_node("Mul", ["ad", "ad"], ["c"], name="square"), q("c", "cq"), dq("cq", "y")]
    proto = make(nodes, parameters(np.int8), ["y"])
    next(node for node in proto.graph.node if node.name == "first_w").input[2] = "z"
    repaired, notes = repair(proto, audit_runtime(save(proto, tmp_path), feeds, is_timed=False))
    graph = QdqGraph(repaired)
    assert notes == ("activations int8 -> uint8: 3",)
    assert graph.makers["first_w"].input[2] == "z"
    assert graph.array(graph.makers["aq"].input[2]) == 128
    np.testing.assert_array_equal(run_once(repaired, feeds)[0], run_once(proto, feeds)[0])


@ON_X86
def test_weights_that_the_file_quantizes_itself_stay_int8(feeds, tmp_path):
    nodes = [q("x", "xq"), dq("xq", "xd"), *conv("first", "xd", "a"), q("a", "aq"), dq("aq", "ad")]
    nodes += [helper.make_node("Mul", ["ad", "ad"], ["c"], name="square"), q("c", "cq"), dq("cq", "y")]
    nodes.insert(0, helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], name="Q_w"))
    weights = [item for item in parameters(np.int8) if item.name != "wq"]
    weights.append(constant(np.random.default_rng(0).normal(0, 0.3, (8, 8, 3, 3)).astype(np.float32), "w"))
    proto = make(nodes, weights, ["y"])
    repaired, notes = repair(proto, audit_runtime(save(proto, tmp_path), feeds, is_timed=False))
    assert notes == ("activations int8 -> uint8: 3",)
    assert QdqGraph(repaired).makers["wq"].input[2] == "wz"


def test_file_with_external_data_is_audited(feeds, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(static(tmp_path, "uint8"), path, save_as_external_data=True, location="weights", size_threshold=0)
    assert any(kernel.op_type == "QLinearConv" for kernel in audit_runtime(path, feeds, is_timed=False).kernels)


# --- pairs and conversions --------------------------------------------------------------------------------------------------


def tanh(source: str, result: str) -> onnx.NodeProto:
    return helper.make_node("Tanh", [source], [result], name=f"tanh_{result}")


def test_pair_between_float_nodes_is_found_and_removed(feeds, tmp_path):
    nodes = [tanh("x", "a"), q("a", "aq"), dq("aq", "ad"), tanh("ad", "b"), q("b", "bq"), dq("bq", "y")]
    proto = make(nodes, parameters()[:3], ["y", "ad"])
    audit = audit_runtime(save(proto, tmp_path), feeds, is_timed=False)
    assert [(finding.kind, finding.node, finding.repair) for finding in audit.findings] == [
        ("unfused-pair", "Q_aq", NO_PAIR),
        ("unfused-pair", "Q_bq", NO_PAIR),
    ]
    repaired, notes = repair(proto, audit)
    assert notes == ("pairs between two float32 sides removed: 2",)
    assert [node.op_type for node in repaired.graph.node] == ["Tanh", "Identity", "Tanh", "Identity"]
    for before, after in zip(run_once(proto, feeds), run_once(repaired, feeds), strict=True):
        assert 0 < np.abs(before - after).max() <= STEP


def test_pair_that_only_a_branch_reads_stays_correct(feeds, tmp_path):
    branches = [
        helper.make_graph([helper.make_node("Neg" if kind else "Abs", ["ad"], [f"o{kind}"])], f"g{kind}", [], [output])
        for kind, output in enumerate(helper.make_tensor_value_info(f"o{kind}", FLOAT, None) for kind in (0, 1))
    ]
    nodes = [tanh("x", "a"), q("a", "aq"), dq("aq", "ad"), helper.make_node("ReduceSum", ["ad"], ["sum"], keepdims=0)]
    nodes += [helper.make_node("Greater", ["sum", "s"], ["is_large"])]
    nodes += [helper.make_node("If", ["is_large"], ["y"], then_branch=branches[0], else_branch=branches[1])]
    proto = make(nodes, parameters()[:3], ["y"])
    repaired, notes = repair(proto, audit_runtime(save(proto, tmp_path), feeds, is_timed=False))
    assert np.abs(run_once(proto, feeds)[0] - run_once(repaired, feeds)[0]).max() <= STEP
    assert len(notes) == 1


def test_change_of_scale_between_integer_kernels_is_found(feeds, tmp_path):
    nodes = [q("x", "xq"), dq("xq", "xd"), *conv("first", "xd", "a"), q("a", "aq"), dq("aq", "ad")]
    nodes += [q("ad", "bq", "s2"), dq("bq", "bd", "s2"), *conv("second", "bd", "c"), q("c", "cq"), dq("cq", "cd")]
    nodes += [helper.make_node("Add", ["ad", "cd"], ["e"], name="sum"), q("e", "eq"), dq("eq", "y")]
    audit = audit_runtime(save(make(nodes, parameters(), ["y"]), tmp_path), feeds, is_timed=False)
    assert [(finding.kind, finding.node) for finding in audit.findings] == [("unfused-pair", "Q_bq")]


def test_weights_that_are_converted_at_every_run_are_found(tmp_path):
    weights = parameters()[4:]
    weights.append(constant(np.random.default_rng(3).integers(-100, 100, (4096, 8, 3, 3)).astype(np.int8), "wq"))
    nodes = [*conv("only", "x", "c"), helper.make_node("GlobalAveragePool", ["c"], ["y"], name="pool")]
    found = audit_runtime(save(make(nodes, weights, ["y"], shape=[1, 8, 3, 3]), tmp_path), None).findings
    assert [(finding.kind, finding.node) for finding in found] == [("conversion", "only_w")]
    assert "of constants" in found[0].text
    assert "store these weights in float32" in found[0].repair


def test_conversions_that_cost_no_more_than_being_profiled_are_none():
    """Both nodes take the same time, that of writing it down."""
    proto = make([*conv("only", "x", "y")], parameters()[3:], ["y"])
    graph = QdqGraph(proto)
    ran = audit_module._Ran(
        graph=graph,
        file=graph,
        types=audit_module._types_of(proto),
        ms={node.output[0]: 0.002 for node in proto.graph.node},
        is_timed=True,
        asked=frozenset(),
        transposes=frozenset(),
    )
    assert list(audit_module._conversions(ran, 0.004)) == []
    ran.ms["only_w"] = 0.004
    assert [finding.node for finding in audit_module._conversions(ran, 0.006)] == ["only_w"]


def test_price_of_dynamic_quantization_is_named():
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], name="ranges")]
    nodes.append(helper.make_node("ConvInteger", ["xq", "wq", "xz"], ["a"], name="conv"))
    nodes.append(helper.make_node("Cast", ["a"], ["y"], to=FLOAT, name="back"))
    proto = make(nodes, parameters()[3:], ["y"])
    graph = QdqGraph(proto)
    ran = audit_module._Ran(
        graph=graph,
        file=graph,
        types=audit_module._types_of(proto),
        ms={"xq": 0.1, "a": 0.3, "y": 0.1},
        is_timed=True,
        asked=frozenset(),
        transposes=frozenset(),
    )
    found = list(audit_module._conversions(ran, 0.5))
    assert {(finding.node, finding.repair) for finding in found} == {
        ("ranges", audit_module.DYNAMIC),
        ("back", audit_module.DYNAMIC),
    }


@ON_X86
def test_float16_file_is_computed_in_float32_here(tmp_path):
    path = save(small_graphs.convolutional(batch=1, dtype=np.float16), tmp_path)
    audit = audit_runtime(path, None, is_timed=False)
    found = [finding for finding in audit.findings if finding.op_type == "Cast"]
    assert len(found) == 1
    assert "this processor computes it in float32" in found[0].text
    assert "fp16" not in {kernel.precision for kernel in audit.kernels if kernel.op_type == "Conv"}


def test_plain_float32_model_has_no_findings_but_costs(tmp_path):
    audit = audit_runtime(save(small_graphs.convolutional(batch=1), tmp_path), None)
    assert {finding.kind for finding in audit.findings} <= {"conversion"}
    assert {kernel.precision for kernel in audit.kernels} <= {"fp32", "conversion"}
    proto = small_graphs.convolutional()
    assert repair(proto, audit) == (proto, ())


# --- what does not run ------------------------------------------------------------------------------------------------------


def test_operator_of_another_library_is_named_without_kernels(tmp_path):
    proto = small_graphs.weightless()
    proto.graph.node[0].domain = "com.example"
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    audit = audit_runtime(save(proto, tmp_path), None)
    assert [(finding.kind, finding.op_type) for finding in audit.findings] == [("unknown-operator", "Softmax")]
    assert audit.kernels == ()
    assert audit.total_ms is None


@ON_X86
def test_file_optimized_for_one_machine_is_found(tmp_path):
    path = tmp_path / "model.onnx"
    open_plain(small_graphs.convolutional(batch=1).SerializeToString(), level="all", stored=path)
    found = [finding for finding in audit_runtime(path, None).findings if finding.kind == "unknown-operator"]
    assert len(found) == 1
    assert "the file was optimized for the processor of one machine" in found[0].text


def test_request_that_the_model_refuses(tmp_path):
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    proto = make(nodes, [constant(np.array([5, -1]), "shape")], ["y"], shape=["batch", 3])
    with pytest.raises(ArtifactError, match=r"failed on x \[1, 3\]"):
        audit_runtime(save(proto, tmp_path), None)


# --- the search repairs ------------------------------------------------------------------------------------------------------


@ON_X86
def test_a_quantized_model_is_repaired_and_timed_against_what_it_was(feeds, tmp_path):
    path = save(static(tmp_path, "int8"), tmp_path)
    samples = {name: np.concatenate([values] * 8) for name, values in feeds.items()}
    np.savez(tmp_path / "samples.npz", **samples)
    request = OptimizeRequest(
        model=str(path), target="host", data=str(tmp_path / "samples.npz"), effort="fast", out=tmp_path / "out"
    )
    result = optimize(request)
    candidates = {item.name: item for item in result.candidates}
    assert candidates["repaired"].evaluation.value >= candidates["fp32"].evaluation.value
    assert candidates["repaired"].latency is not None
    assert "activations int8 -> uint8" in candidates["repaired"].lineage[-1].notes[0]
