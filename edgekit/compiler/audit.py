"""What ONNX Runtime really runs for a model on this host, and what in it costs time or was not meant.

The runtime's own graph is dumped after its own optimization, with the time of each node, and compared with what the file asks
for: a layer whose inputs were quantized and that still runs in float32 is a *float island*; a pair of Q and DQ that stayed
between two nodes is *unfused*; conversions are listed where they cost a share worth looking at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from edgekit.compiler.findings import AuditFinding, Kernel, RuntimeAudit
from edgekit.compiler.graph import STANDARD_DOMAINS, read_onnx
from edgekit.compiler.kernels import run_kernels
from edgekit.compiler.qdq import COMPUTING, QdqGraph, data_inputs

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Array = NDArray[Any]
Precision = Literal["int8", "fp32", "fp16", "conversion", "other"]
CONVERSIONS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "Cast", "ReorderInput", "ReorderOutput", "DynamicQuantizeLinear"}
)
INTEGER = ("QLinear", "QGemm", "QAttention", "MatMulInteger", "ConvInteger", "DynamicQuantize", "GatherQuant")
KNOWN_DOMAINS = STANDARD_DOMAINS | {"com.microsoft", "com.microsoft.nchwc", "ai.onnx.ml", "com.ms.internal.nhwc"}
SHARE = 0.03
"""Conversions of one kind are a finding from this share of the time on."""
FLOAT_LAYERS = frozenset(
    {*COMPUTING, "FusedConv", "FusedMatMul", "FusedGemm", "Add", "Mul", "Concat", "AveragePool", "Sigmoid"}
)


def audit_runtime(path: Path, feeds: Mapping[str, Array], *, threads: int = 1) -> RuntimeAudit:
    """Open the model as a device would, run it, and look at what ran.

    Args:
        path: an ONNX file.
        feeds: one request.
        threads: of the session.

    Raises:
        ArtifactError: when the file is no ONNX model.
    """
    proto = read_onnx(path)
    graph, times = run_kernels(path, feeds, threads=threads)
    kernels = tuple(
        Kernel(
            node=node.name,
            op_type=node.op_type,
            domain=node.domain,
            precision=precision_of(node),
            ms=times.get(node.name),
        )
        for node in graph.graph.node
    )
    total = sum(kernel.ms or 0.0 for kernel in kernels)
    findings = (*_islands(proto, graph, times), *_pairs(graph, times), *_conversions(kernels, total), *_unknown(proto))
    return RuntimeAudit(model=path.name, kernels=kernels, findings=findings, total_ms=total)


def precision_of(node: NodeProto) -> Precision:
    """The kind of arithmetic of one node of the runtime's graph."""
    if node.op_type in CONVERSIONS:
        return "conversion"
    if node.op_type.startswith(INTEGER):
        return "int8"
    return "other" if node.op_type in ("MatMulNBits", "Shape", "Reshape", "Squeeze", "Unsqueeze", "Identity") else "fp32"


def _islands(proto: ModelProto, ran: ModelProto, times: Mapping[str, float]) -> list[AuditFinding]:
    """Layers that the file quantizes and the runtime runs in float32."""
    asked = QdqGraph(proto)
    quantized = {
        node.name
        for node in proto.graph.node
        if node.op_type in FLOAT_LAYERS and all(asked.dequantizer(name) is not None for name in data_inputs(node))
    }
    makers = {name: node for node in ran.graph.node for name in node.output}
    uses: dict[str, list[NodeProto]] = {}
    for node in ran.graph.node:
        for name in node.input:
            uses.setdefault(name, []).append(node)
    found = []
    for node in ran.graph.node:
        if node.name not in quantized or precision_of(node) == "int8":
            continue
        sources = [makers[name] for name in node.input[:2] if name in makers]
        if not sources or not any(source.op_type == "DequantizeLinear" for source in sources):
            continue
        float_inputs = [name for name in node.input[:2] if name in makers and makers[name].op_type != "DequantizeLinear"]
        has_end = any(user.op_type == "QuantizeLinear" for user in uses.get(node.output[0], []))
        if float_inputs:
            reason, repair = f"its input {float_inputs[0]} is float32", "quantize that input too, or leave the layer in fp32"
        elif not has_end:
            reason, repair = "its result is not quantized", "add Q and DQ behind it, or leave the layer in fp32"
        else:
            reason = "the runtime has no integer kernel for these types, or an input has several readers"
            repair = "use uint8 activations on x86, one DequantizeLinear for each reader, or leave the layer in fp32"
        text = f"{node.op_type} {node.name} was quantized and runs in float32: {reason}"
        found.append(
            AuditFinding(
                kind="float-island", node=node.name, op_type=node.op_type, text=text, ms=times.get(node.name), repair=repair
            )
        )
    return found


def _pairs(ran: ModelProto, times: Mapping[str, float]) -> list[AuditFinding]:
    """DequantizeLinear whose only reader quantizes again."""
    makers = {name: node for node in ran.graph.node for name in node.output}
    found = []
    for node in ran.graph.node:
        before = makers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if before is not None and before.op_type == "DequantizeLinear":
            ms = times.get(node.name, 0.0) + times.get(before.name, 0.0)
            text = f"{before.name} and {node.name} convert back and forth"
            repair = "give both sides one scale and zero point"
            found.append(
                AuditFinding(kind="unfused-pair", node=node.name, op_type=node.op_type, text=text, ms=ms, repair=repair)
            )
    return found


def _conversions(kernels: tuple[Kernel, ...], total: float) -> list[AuditFinding]:
    """Kinds of conversion that take a share worth looking at."""
    spent: dict[str, list[float]] = {}
    for kernel in kernels:
        if kernel.precision == "conversion":
            spent.setdefault(kernel.op_type, []).append(kernel.ms or 0.0)
    repairs = {
        "Cast": "store the model in the type that the runtime computes in",
        "ReorderInput": "operators between convolutions that have no blocked kernel leave their layout: rewrite or fuse them",
        "ReorderOutput": "operators between convolutions that have no blocked kernel leave their layout: rewrite or fuse them",
    }
    default = "fewer changes between int8 and float32: let edgekit optimize choose where they pay"
    return [
        AuditFinding(
            kind="conversion",
            node="",
            op_type=kind,
            text=f"{len(values)} {kind} take {sum(values) / total:.0%} of the time",
            ms=sum(values),
            repair=repairs.get(kind, default),
        )
        for kind, values in sorted(spent.items(), key=lambda item: -sum(item[1]))
        if total and sum(values) / total > SHARE
    ]


def _unknown(proto: ModelProto) -> list[AuditFinding]:
    return [
        AuditFinding(
            kind="unknown-operator",
            node=node.name,
            op_type=node.op_type,
            text=f"{node.domain}.{node.op_type} is not an operator of ONNX or ONNX Runtime",
            repair="the device needs the library that it comes from",
        )
        for node in proto.graph.node
        if node.domain not in KNOWN_DOMAINS
    ]
