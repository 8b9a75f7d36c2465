"""What each quantizable node costs on this host in float32 and in int8, and what it costs to go from one to the other.

Node times are taken where they count, inside the model: once from the float32 model and once from the model with everything in
int8, both after the runtime's own fusions. Conversions (Q, DQ, and the reordering between blocked and plain layouts) are timed
alone at several sizes, since a mixed model has them at places where neither of the two has one; a straight line through the
sizes gives the rest. All of it goes into a :class:`LatencyTable` that can be kept and shipped with a target.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.graph import encode, open_plain
from edgekit.compiler.kernels import run_kernels
from edgekit.compiler.simulate import Unit
from edgekit.runtime.ort import load_onnxruntime
from edgekit.schema.base import SCHEMA_VERSION, Record

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Array = NDArray[Any]
SIZES = (2**10, 2**16, 2**19)
CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput", "Cast"})
_TOKEN = re.compile(r"(_token_\d+|_nchwc|_QuantizeLinear_Output|_DequantizeLinear_Output)+$")


class LatencyTable(Record, frozen=True, kw_only=True):
    """Measured milliseconds by node signature (operator, shapes, attributes, precision), for one host, runtime and threads.

    ``conversions`` has an offset in ms and ms per element by name (``quantize``, ``dequantize``, ``reorder``).
    """

    host: str
    threads: int
    entries: dict[str, float]
    conversions: dict[str, tuple[float, float]]
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class UnitCost:
    """Milliseconds of a node in both forms, what else the runtime fused into it included."""

    float_ms: float
    int8_ms: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs by unit, conversions by tensor (into int8, back to float32), and the signature of each unit for the table."""

    units: dict[str, UnitCost]
    into: dict[str, float]
    back: dict[str, float]
    table: LatencyTable


def measure_costs(
    proto: ModelProto, quantized: ModelProto, units: Mapping[str, Unit], feeds: Mapping[str, Array], *, threads: int, host: str
) -> Costs:
    """Profile both forms of the model on this host.

    Args:
        proto: the float32 model.
        quantized: the same with everything in int8.
        units: quantizable nodes by name.
        feeds: one request.
        threads: of the sessions.
        host: names the machine and the runtime, for the table.
    """
    owners = find_owners(proto, units)
    float_ms = unit_times(*run_kernels(proto, feeds, threads=threads), owners)
    int8_ms = unit_times(*run_kernels(quantized, feeds, threads=threads), owners)
    shapes = tensor_shapes(proto, feeds)
    conversions = measure_conversions()
    tensors = dict.fromkeys(name for unit in units.values() for name in unit.activations)
    sizes = {name: int(np.prod(shapes.get(name, ()), dtype=np.int64)) for name in tensors}
    has_planes = {name for name in tensors if len(shapes.get(name, ())) == 4}

    def cost(kind: str, name: str) -> float:
        offset, slope = conversions[kind]
        reorder = conversions["reorder"] if name in has_planes else (0.0, 0.0)
        return offset + slope * sizes[name] + reorder[0] + reorder[1] * sizes[name]

    nodes = {node.name: node for node in proto.graph.node}
    costs = {name: UnitCost(float_ms=float_ms.get(name, 0.0), int8_ms=int8_ms.get(name, 0.0)) for name in units}
    entries: dict[str, list[float]] = {}
    for name, item in costs.items():
        for precision, value in (("fp32", item.float_ms), ("int8", item.int8_ms)):
            entries.setdefault(f"{signature(nodes[name], shapes)} {precision}", []).append(value)
    return Costs(
        units=costs,
        into={name: cost("quantize", name) for name in tensors},
        back={name: cost("dequantize", name) for name in tensors},
        table=LatencyTable(
            host=host,
            threads=threads,
            entries={key: float(np.median(values)) for key, values in sorted(entries.items())},
            conversions=conversions,
        ),
    )


def costs_from_table(
    table: LatencyTable, proto: ModelProto, units: Mapping[str, Unit], feeds: Mapping[str, Array]
) -> Costs | None:
    """Costs out of a table that was measured elsewhere, or None where it lacks a node of this model."""
    shapes = tensor_shapes(proto, feeds)
    nodes = {node.name: node for node in proto.graph.node}
    costs = {}
    for name in units:
        key = signature(nodes[name], shapes)
        if f"{key} fp32" not in table.entries or f"{key} int8" not in table.entries:
            return None
        costs[name] = UnitCost(float_ms=table.entries[f"{key} fp32"], int8_ms=table.entries[f"{key} int8"])

    def cost(kind: str, name: str) -> float:
        size = int(np.prod(shapes.get(name, ()), dtype=np.int64))
        kinds = (kind, "reorder") if len(shapes.get(name, ())) == 4 else (kind,)
        return sum(table.conversions[each][0] + table.conversions[each][1] * size for each in kinds)

    tensors = dict.fromkeys(name for unit in units.values() for name in unit.activations)
    into = {name: cost("quantize", name) for name in tensors}
    return Costs(units=costs, into=into, back={name: cost("dequantize", name) for name in tensors}, table=table)


def find_owners(proto: ModelProto, units: Mapping[str, Unit]) -> dict[str, str]:
    """The unit that a kernel's time counts for, by every name that a runtime's kernel may carry.

    A kernel is named after the node or after the last tensor that was fused into it: the unit's own tensors, and those of the
    nodes behind it that are no units themselves (a Relu that disappears into the convolution).
    """
    users: dict[str, list[NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    owners: dict[str, str] = {}
    for node in proto.graph.node:
        if node.name not in units:
            continue
        owners[node.name] = node.name
        current: NodeProto | None = node
        while current is not None:
            owners.update({name: node.name for name in current.output if name not in owners})
            following = users.get(current.output[0], [])
            is_alone = len(following) == 1 and following[0].name not in units
            current = following[0] if is_alone and following[0].op_type in ("Relu", "Clip", "Sigmoid", "HardSwish") else None
    return owners


def unit_times(graph: ModelProto, times: Mapping[str, float], owners: Mapping[str, str]) -> dict[str, float]:
    """Milliseconds by unit; conversions belong to none."""
    found: dict[str, float] = {}
    for node in graph.graph.node:
        if node.op_type in CONVERSIONS:
            continue
        names = [node.name, _TOKEN.sub("", node.name), *(_TOKEN.sub("", name) for name in node.output)]
        owner = next((owners[name] for name in names if name in owners), None)
        if owner is not None:
            found[owner] = found.get(owner, 0.0) + times.get(node.name, 0.0)
    return found


def tensor_shapes(proto: ModelProto, feeds: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor for this request; a tensor that cannot be an output is left out."""
    import onnx

    probed = onnx.ModelProto()
    probed.CopyFrom(proto)
    known = {item.name for item in proto.graph.output}
    names = [name for node in proto.graph.node for name in node.output if name]
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    session = open_plain(encode(probed))
    outputs = [item.name for item in session.get_outputs()]
    shapes = {name: tuple(np.shape(value)) for name, value in zip(outputs, session.run(outputs, dict(feeds)), strict=True)}
    shapes.update({name: value.shape for name, value in feeds.items()})
    shapes.update({item.name: tuple(item.dims) for item in proto.graph.initializer})
    return shapes


def signature(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Operator, shapes of the inputs and a digest of the attributes."""
    sizes = " ".join("x".join(map(str, shapes.get(name, ()))) or "-" for name in node.input)
    attributes = sorted(item.SerializeToString(deterministic=True) for item in node.attribute)
    digest = hashlib.sha256(b"".join(attributes)).hexdigest()[:12] if attributes else "-"
    return f"{node.op_type} {sizes} {digest}"


_measured: dict[str, dict[str, tuple[float, float]]] = {}


def measure_conversions() -> dict[str, tuple[float, float]]:
    """Offset in ms and ms per element of each conversion on this host, one thread; measured once per process."""
    if "here" not in _measured:
        _measured["here"] = {
            kind: _fit([(size, _time_conversion(kind, size)) for size in SIZES])
            for kind in ("quantize", "dequantize", "reorder")
        }
    return _measured["here"]


def _fit(points: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """A line through the smallest size and the least squares of the rest; never negative."""
    pairs = list(points)
    (first, offset), rest = pairs[0], pairs[1:]
    slope = max(0.0, float(np.mean([(value - offset) / (size - first) for size, value in rest])))
    return max(0.0, offset - slope * first), slope


def _time_conversion(kind: str, size: int) -> float:
    """Milliseconds of one conversion of ``size`` elements, the call of a session taken off."""
    from onnx import TensorProto, helper, numpy_helper

    side = int((size / 32) ** 0.5)
    shape = [1, 32, side, side]
    scale = numpy_helper.from_array(np.array(0.05, np.float32), "scale")
    zero = numpy_helper.from_array(np.array(128, np.uint8), "zero")
    to_float, to_byte = TensorProto.FLOAT, TensorProto.UINT8
    count = 8
    if kind == "quantize":
        nodes = [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], [f"y{i}"]) for i in range(count)]
        given, made = to_float, to_byte
    elif kind == "dequantize":
        nodes = [helper.make_node("DequantizeLinear", ["x", "scale", "zero"], [f"y{i}"]) for i in range(count)]
        given, made = to_byte, to_float
    else:
        nodes = [helper.make_node("Transpose", ["x"], [f"y{i}"], perm=[0, 2, 3, 1]) for i in range(count)]
        given, made = to_byte, to_byte
    outputs = [helper.make_tensor_value_info(f"y{i}", made, None) for i in range(count)]
    graph = helper.make_graph(nodes, "conversion", [helper.make_tensor_value_info("x", given, shape)], outputs, [scale, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": np.zeros(shape, np.float32 if given == to_float else np.uint8)}
    times = []
    for _ in range(40):
        started = time.perf_counter()
        session.run(None, feeds)
        times.append((time.perf_counter() - started) * 1000)
    return float(np.median(times[8:])) / count
