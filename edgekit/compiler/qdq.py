"""Write int8 models in QDQ form from a plan: which layers are int8, which ranges, how many bits their weights may use.

The Q/DQ nodes come from onnxruntime's quantizer, so that its runtime recognizes them; what the plan adds is done around it. A
pair between a matrix product and consumers in float32 is left out: the kernel can answer in float32 itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.calibration import Ranges
from edgekit.compiler.export import quiet
from edgekit.compiler.graph import encode
from edgekit.errors import ArtifactError
from edgekit.schema.target import Int8Rules

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Array = NDArray[Any]
COMPUTING = ("Conv", "ConvTranspose", "MatMul", "Gemm")
QUANTIZED_OPERATORS = (
    *("Conv", "MatMul", "Gemm", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Add", "Mul", "Concat", "Split", "Where"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Gather"),
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice"),
)  # fmt: skip
"""What ONNX Runtime's CPU provider fuses into integer kernels or passes through without a conversion."""
FLOAT_ANSWERING = ("Gemm", "MatMul")
"""Integer kernels of these have a form that answers in float32."""
REMEMBERED = 2


@dataclass(frozen=True, kw_only=True)
class QdqPlan:
    """What becomes int8 and how; ``ranges`` by tensor, ``float_nodes`` and ``seven_bit`` by node name."""

    ranges: Ranges
    rules: Int8Rules
    is_per_channel: bool
    reduce_range: bool = False
    float_nodes: Collection[str] = ()
    seven_bit: Collection[str] = field(default_factory=frozenset)
    """Layers whose weights use 7 bits, so that two products fit an int16."""


def write_qdq(proto: ModelProto, plan: QdqPlan) -> ModelProto:
    """The float32 model with Q/DQ pairs as planned; the argument is not changed.

    Raises:
        ArtifactError: ``quantization.failed`` when the quantizer refuses the model.
    """
    key = _key(proto, plan)
    if key not in _recent:
        while len(_recent) >= REMEMBERED:
            del _recent[next(iter(_recent))]
        _recent[key] = _write(proto, plan)
    result = type(proto)()
    result.CopyFrom(_recent[key])
    return result


_recent: dict[str, ModelProto] = {}
"""The last models by what they are made of: fixed candidates and the search ask for the same ones, and each takes seconds."""


def _key(proto: ModelProto, plan: QdqPlan) -> str:
    ranges = sorted((name, float(low), float(high)) for name, (low, high) in plan.ranges.items())
    flags = [plan.is_per_channel, plan.reduce_range, sorted(plan.float_nodes), sorted(plan.seven_bit)]
    text = json.dumps([ranges, flags]).encode() + msgspec.json.encode(plan.rules)
    return hashlib.sha256(hashlib.sha256(encode(proto)).digest() + text).hexdigest()


def _write(proto: ModelProto, plan: QdqPlan) -> ModelProto:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    kinds = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}
    pairs = {name: (np.float32(low), np.float32(high)) for name, (low, high) in plan.ranges.items()}
    options = {
        "ActivationSymmetric": plan.rules.activation_symmetric,
        "WeightSymmetric": plan.rules.weight_symmetric,
        "DedicatedQDQPair": False,
    }
    try:
        with quiet("onnxruntime.quantization", "root"), silenced_root():
            quantizer = QDQQuantizer(
                infer(proto),
                plan.is_per_channel,
                plan.reduce_range,
                kinds[plan.rules.weights],
                kinds[plan.rules.activations],
                TensorsData(CalibrationMethod.MinMax, pairs),
                [],
                sorted(plan.float_nodes),
                list(QUANTIZED_OPERATORS),
                options,
            )
            quantizer.quantize_model()
    except Exception as error:
        raise ArtifactError(
            "quantization.failed",
            f"onnxruntime's quantizer refuses the model: {type(error).__name__}: {str(error)[:200]}",
            hint="The fp32 candidates stand; report the model if it should quantize.",
        ) from error
    result: ModelProto = quantizer.model.model
    narrow_weights(result, plan.seven_bit)
    remove_float_pairs(result)
    return result


class silenced_root:  # noqa: N801  reads as a statement: with silenced_root():
    """The quantizer logs through the root logger; nothing of it is for the user."""

    def __enter__(self) -> None:
        self._before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)

    def __exit__(self, *_exception: object) -> None:
        logging.disable(self._before)


def infer(proto: ModelProto) -> ModelProto:
    """A copy with the shapes and types of inner tensors, marked as inferred for the quantizer."""
    from onnx import shape_inference

    inferred = shape_inference.infer_shapes(proto)
    entry = inferred.metadata_props.add()
    entry.key, entry.value = "onnx.infer", "onnxruntime.quant"
    return inferred


# --- read a QDQ graph -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """The integer weights of a layer inside a QDQ model, by initializer names; ``axis`` is that of the scales."""

    layer: str
    op_type: str
    values: str
    scale: str
    zero_point: str | None
    axis: int
    bias: str | None
    """The int32 bias's initializer."""
    activation: str | None
    """The scale's initializer of the input, where the input is quantized."""


class QdqGraph:
    """A QDQ model with what one asks of it: makers, uses, initializers by name."""

    def __init__(self, proto: ModelProto) -> None:
        self.proto = proto
        self.makers: dict[str, NodeProto] = {name: node for node in proto.graph.node for name in node.output}
        self.uses: dict[str, list[NodeProto]] = {}
        for node in proto.graph.node:
            for name in node.input:
                self.uses.setdefault(name, []).append(node)
        self.initializers = {item.name: item for item in proto.graph.initializer}
        self.outputs = {item.name for item in proto.graph.output}

    def array(self, name: str) -> Array:
        """An initializer's values."""
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(self.initializers[name]))

    def put(self, name: str, values: Array) -> None:
        """Replace an initializer's values."""
        from onnx import numpy_helper

        self.initializers[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))

    def dequantizer(self, name: str) -> NodeProto | None:
        """The DequantizeLinear that makes this tensor, or None."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def weights(self) -> Iterator[QuantizedWeight]:
        """Every computing layer with integer weights, in graph order."""
        for node in self.proto.graph.node:
            if node.op_type not in COMPUTING:
                continue
            weight = self.dequantizer(node.input[1])
            if weight is None or weight.input[0] not in self.initializers:
                continue
            bias = self.dequantizer(node.input[2]) if len(node.input) > 2 and node.input[2] else None
            data = self.dequantizer(node.input[0])
            axis = next((int(item.i) for item in weight.attribute if item.name == "axis"), 1)
            yield QuantizedWeight(
                layer=node.name,
                op_type=node.op_type,
                values=weight.input[0],
                scale=weight.input[1],
                zero_point=weight.input[2] if len(weight.input) > 2 else None,
                axis=axis,
                bias=bias.input[0] if bias is not None and bias.input[0] in self.initializers else None,
                activation=data.input[1] if data is not None else None,
            )


def along(scale: Array, axis: int, rank: int) -> Array:
    """Scales shaped to multiply a tensor of ``rank`` along ``axis``; a scalar stays one."""
    return (
        scale.reshape([-1 if place == axis % rank else 1 for place in range(rank)]) if scale.ndim and scale.size > 1 else scale
    )


def narrow_weights(proto: ModelProto, layers: Collection[str]) -> None:
    """Give the named layers 7-bit weights: the scale doubles, the values halve; int32 biases follow their scale."""
    if not layers:
        return
    graph = QdqGraph(proto)
    for weight in graph.weights():
        if weight.layer not in layers:
            continue
        values = graph.array(weight.values)
        if int(np.abs(values.astype(np.int32)).max(initial=0)) <= 64:
            continue
        graph.put(weight.values, np.clip(np.round(values.astype(np.float64) / 2), -64, 64).astype(values.dtype))
        graph.put(weight.scale, (graph.array(weight.scale) * 2).astype(np.float32))
        _halve_bias(graph, weight)


def _halve_bias(graph: QdqGraph, weight: QuantizedWeight) -> None:
    if weight.bias is None:
        return
    node = next(node for node in graph.uses[weight.bias] if node.op_type == "DequantizeLinear")
    graph.put(node.input[1], (graph.array(node.input[1]) * 2).astype(np.float32))
    graph.put(weight.bias, np.round(graph.array(weight.bias) / 2).astype(np.int32))


def remove_float_pairs(proto: ModelProto) -> int:
    """Take out Q/DQ pairs that stand between a matrix product and float32 consumers only; the number removed.

    The integer kernel of a matrix product can answer in float32: the pair would cost time and accuracy.
    """
    graph = QdqGraph(proto)
    int8_nodes = {
        node.name
        for node in proto.graph.node
        if node.op_type in QUANTIZED_OPERATORS and all(graph.dequantizer(name) is not None for name in data_inputs(node))
    }
    gone: list[Any] = []
    for node in proto.graph.node:
        ends = _ends_of_loose_pair(graph, node, int8_nodes)
        if not ends:
            continue
        source = node.input[0]
        for end in ends:
            if end.output[0] in graph.outputs:
                graph.makers[node.input[0]].output[0] = source = end.output[0]
        for end in ends:
            for user in graph.uses.get(end.output[0], []):
                user.input[:] = [source if name == end.output[0] else name for name in user.input]
        gone += [node, *ends]
    for node in gone:
        proto.graph.node.remove(node)
    return sum(node.op_type == "QuantizeLinear" for node in gone)


def _ends_of_loose_pair(graph: QdqGraph, node: NodeProto, int8_nodes: Collection[str]) -> list[NodeProto]:
    """The DequantizeLinear nodes behind a QuantizeLinear that only float32 consumers read; empty where it is needed."""
    if node.op_type != "QuantizeLinear" or len(graph.uses[node.input[0]]) > 1 or node.input[0] in graph.outputs:
        return []
    producer = graph.makers.get(node.input[0])
    ends = graph.uses.get(node.output[0], [])
    if producer is None or producer.op_type not in FLOAT_ANSWERING or any(end.op_type != "DequantizeLinear" for end in ends):
        return []
    consumers = [user for end in ends for user in graph.uses.get(end.output[0], [])]
    return [] if any(user.name in int8_nodes for user in consumers) else ends


DATA_INPUTS = {"Add": 2, "Mul": 2, "MatMul": 2, "Conv": 2, "Gemm": 2, "Where": 3}
"""How many of the first inputs hold data and weights; the rest are biases, shapes and indices."""


def data_inputs(node: NodeProto) -> list[str]:
    """The inputs that decide whether a node is int8: data and weights."""
    count = len(node.input) if node.op_type == "Concat" else DATA_INPUTS.get(node.op_type, 1)
    first = 1 if node.op_type == "Where" else 0
    return [name for name in node.input[first:count] if name]


def count_quantized(proto: ModelProto) -> tuple[int, int]:
    """Computing layers whose inputs come from DequantizeLinear, and all computing layers."""
    graph = QdqGraph(proto)
    layers = [node for node in proto.graph.node if node.op_type in COMPUTING]
    done = sum(all(graph.dequantizer(name) is not None for name in node.input[:2]) for node in layers)
    return done, len(layers)
