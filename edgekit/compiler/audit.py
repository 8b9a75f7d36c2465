"""What ONNX Runtime really runs for a model on this host, what in it costs time or was not meant, and what can be repaired.

The runtime's own graph is dumped after its own optimization, with the time of each node, and compared with what the file asks
for. A layer whose inputs were quantized and that still runs in float32 is a *float island*; Q and DQ around something cheap, or
around nothing, are an *unfused pair*; other conversions are listed where they cost a share worth looking at. A layer that the
file never quantized is nothing of this: mixed precision is a choice. The rules are those of ONNX Runtime 1.32's CPU provider.

    >>> audit = audit_runtime(Path("model.onnx"), None)          # doctest: +SKIP
    >>> [finding.text for finding in audit.findings]             # doctest: +SKIP
    ['Conv stem was quantized and runs in float32: its input is uint8 and its result is int8']
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.benchmark.request import make_request
from edgekit.compiler.findings import AuditFinding, Kernel, RuntimeAudit
from edgekit.compiler.graph import STANDARD_DOMAINS, encode, read_onnx, walk_graphs
from edgekit.compiler.kernels import run_kernels
from edgekit.compiler.qdq import COMPUTING, QdqGraph, data_inputs
from edgekit.errors import ArtifactError
from edgekit.runtime.ort import load_onnxruntime
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import SessionOptions

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Array = NDArray[Any]
Precision = Literal["int8", "fp32", "fp16", "conversion", "other"]
CONVERSIONS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "Cast", "ReorderInput", "ReorderOutput", "DynamicQuantizeLinear"}
)
INTEGER = ("QLinear", "QGemm", "QAttention", "MatMulInteger", "ConvInteger", "DynamicQuantize", "GatherQuant", "NhwcMaxPool")
KNOWN_DOMAINS = STANDARD_DOMAINS | {"com.microsoft", "ai.onnx.ml", "ai.onnx.preview.training", "com.ms.internal.nhwc"}
HOST_DOMAIN = "com.microsoft.nchwc"
"""Blocked layouts of one machine: they belong into no file."""
SHARE = 0.03
"""Conversions of one kind are a finding from this share of the time on, without what the profiler itself adds to each node."""
PROFILER_MS = 0.005
"""At most so much of a node's time is the profiler's (1 to 2 microseconds on a PC); the fastest node tells how much it is."""
WITHOUT_KERNEL = frozenset({"ConvTranspose", "LSTM", "GRU", "RNN"})
LAYERS = frozenset({*COMPUTING, *WITHOUT_KERNEL, "FusedConv", "FusedMatMul", "FusedGemm"})
ARITHMETIC = frozenset({"Add", "Mul", "Sigmoid", "LeakyRelu", "Concat", "AveragePool", "GlobalAveragePool", "Softmax", "Where"})
"""What has an integer kernel besides the layers, if input and result are quantized."""
ACTIVATIONS = frozenset(
    {"Relu", "Clip", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu", "Celu", "Softplus", "Softsign", "Mish", "PRelu", "Erf"}
    | {"ThresholdedRelu", "Gelu", "FastGelu", "QuickGelu", "BiasGelu"}
)
CHEAP = (
    ARITHMETIC
    | ACTIVATIONS
    | {"Neg", "Abs", "Sqrt", "Exp", "Log", "Pow", "Sub", "Div", "Min", "Max", "Sum", "Identity", "Cast", "Pad", "Resize"}
    | {"Upsample", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "MaxPool"}
    | {"DepthToSpace", "SpaceToDepth", "ReduceMean", "Tile", "Expand"}
)
REGION = 8
"""Nodes between a DQ and a Q beyond which they are a part of the network left in float32, not one operator."""
UNSIGNED = (
    "make the activations uint8, zero points 128 higher for the same values"
    " (the runtime does so itself where they do not branch)"
)
OWN_DEQUANTIZER = "give each reader its own DequantizeLinear"
NO_PAIR = "take QuantizeLinear and DequantizeLinear out: both sides compute in float32"
OR_FLOAT = "or leave the layer in float32"
Reason = tuple[str, str]
"""Why, and the repair."""


@dataclass(frozen=True, kw_only=True)
class _Ran:
    """The graph that ran, beside the one of the file; ``ms`` by first output, ``types`` (of TensorProto) by tensor."""

    graph: QdqGraph
    file: QdqGraph
    types: dict[str, int]
    ms: dict[str, float]
    is_timed: bool
    asked: frozenset[str]
    """Names of the layers that the file quantizes."""
    transposes: frozenset[str]
    """Names of the file's own transpositions."""
    claimed: set[str] = field(default_factory=set)
    """Nodes that a finding already speaks of, by first output."""

    @property
    def nodes(self) -> list[NodeProto]:
        return list(self.graph.proto.graph.node)

    def readers(self, node: NodeProto) -> list[NodeProto]:
        return [user for name in node.output for user in self.graph.uses.get(name, [])]

    def is_constant(self, name: str) -> bool:
        return name in self.graph.initializers

    def activation_maker(self, name: str) -> NodeProto | None:
        """The DequantizeLinear that makes a tensor out of something computed, not out of weights."""
        node = self.graph.dequantizer(name)
        return node if node is not None and not self.is_constant(node.input[0]) else None

    def claim(self, *nodes: NodeProto) -> float | None:
        """Milliseconds of the nodes that no finding spoke of before; None where nothing was measured."""
        new = {node.output[0] for node in nodes} - self.claimed
        self.claimed.update(new)
        return sum(self.ms.get(name, 0.0) for name in new) if self.is_timed else None

    def is_claimed(self, node: NodeProto) -> bool:
        return node.output[0] in self.claimed

    def kernel(self, node: NodeProto) -> Precision:
        if node.op_type == "Transpose" and node.name not in self.transposes:
            return "conversion"
        return precision_of(node, self.types)


def audit_runtime(path: Path, feeds: Mapping[str, Array] | None, *, threads: int = 1, is_timed: bool = True) -> RuntimeAudit:
    """Open the model as a device would, run it, and look at what ran.

    A model that the runtime refuses because of operators it does not know gives an audit without kernels that names them.

    Args:
        path: an ONNX file.
        feeds: one request; None for random values of the right shapes.
        threads: of the session.
        is_timed: False leaves out the runs, and with them every time and what is judged by its share.

    Raises:
        ArtifactError: ``model.unloadable`` when the file is no ONNX model or the runtime refuses it, ``model.run_failed``.
    """
    proto = read_onnx(path)
    unknown = tuple(_unknown(proto))
    try:
        ran_proto, times = _run(proto, path, feeds, threads) if is_timed else (_optimized(proto, path, threads), {})
    except ArtifactError:
        if unknown:
            return RuntimeAudit(model=path.name, kernels=(), findings=unknown)
        _optimized(proto, path, threads)  # a model that cannot even be loaded is a clearer error than that it does not run
        raise
    file = QdqGraph(proto)
    ran = _Ran(
        graph=graph_of(ran_proto),
        file=file,
        types=_types_of(ran_proto),
        ms=_by_output(ran_proto, times),
        is_timed=is_timed,
        asked=frozenset(node.name for node in proto.graph.node if _is_asked(file, node)),
        transposes=frozenset(node.name for node in proto.graph.node if node.op_type == "Transpose"),
    )
    kernels = tuple(
        Kernel(
            node=name_of(node),
            op_type=node.op_type,
            domain=node.domain,
            precision=ran.kernel(node),
            ms=ran.ms.get(node.output[0]),
        )
        for node in ran.nodes
    )
    total = sum(kernel.ms or 0.0 for kernel in kernels) if is_timed else None
    findings = (*_islands(ran), *_pairs(ran), *_conversions(ran, total), *unknown)
    return RuntimeAudit(model=path.name, kernels=kernels, findings=findings, total_ms=total)


def _optimized(proto: ModelProto, path: Path, threads: int) -> ModelProto:
    """The graph after the runtime's own optimization, as :class:`edgekit.runtime.ort.OrtSession` would run it.

    From memory: the dump of a model with external data would look for them beside itself.
    """
    import onnx

    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="edgekit-audit-") as folder:
        options.optimized_model_filepath = str(Path(folder) / "ran.onnx")
        try:
            onnxruntime.InferenceSession(encode(proto), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ArtifactError(
                "model.unloadable",
                f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {_first_line(error)}.",
                hint="Check that it is a complete .onnx file whose operators this version of ONNX Runtime has.",
            ) from error
        return onnx.load(Path(folder) / "ran.onnx")


def _run(proto: ModelProto, path: Path, feeds: Mapping[str, Array] | None, threads: int) -> tuple[ModelProto, dict[str, float]]:
    if feeds is None:
        session = open_session(path, options=SessionOptions(threads=threads))
        feeds = make_request(session.inputs)
        session.close()
    try:
        return run_kernels(proto, feeds, threads=threads)
    except Exception as error:
        shapes = ", ".join(f"{name} {list(values.shape)}" for name, values in feeds.items())
        raise ArtifactError(
            "model.run_failed",
            f"{path}: ONNX Runtime failed on {shapes}: {_first_line(error)}.",
            hint="Give a request that it takes with --data: it may not accept random values or the smallest shape.",
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


def graph_of(proto: ModelProto) -> QdqGraph:
    """The graph, where what the branches of If and the bodies of Loop and Scan read counts as an output: it must stay."""
    graph = QdqGraph(proto)
    inner = list(walk_graphs(proto.graph))[1:]
    graph.outputs.update(name for item in inner for node in item.node for name in node.input)
    graph.outputs.update(value.name for item in inner for value in item.output)
    return graph


def name_of(node: NodeProto) -> str:
    """The node's name; its first output's where it has none."""
    return str(node.name or node.output[0])


def _by_output(ran: ModelProto, times: Mapping[str, float]) -> dict[str, float]:
    """Times by first output. The profiler calls nodes without a name after their kind and number, in the order of the graph."""
    named = {node.name for node in ran.graph.node}
    spare = [name for name in times if name not in named]
    result = {}
    for node in ran.graph.node:
        key = node.name
        if not key:
            key = next((name for name in spare if re.fullmatch(rf"{re.escape(node.op_type)}_\d+", name)), "")
            spare = [name for name in spare if name != key]
        if key in times:
            result[node.output[0]] = times[key]
    return result


# --- kinds of arithmetic ----------------------------------------------------------------------------------------------------


def precision_of(node: NodeProto, types: Mapping[str, int] | None = None) -> Precision:
    """The kind of arithmetic of one node of the runtime's graph.

    Args:
        node: of the runtime's graph.
        types: of the tensors, as numbers of TensorProto; without them what is not told by the operator counts as fp32.
    """
    from onnx import TensorProto

    if node.op_type in CONVERSIONS:
        return "conversion"
    if node.op_type.startswith(INTEGER):
        return "int8"
    if node.op_type == "MatMulNBits":
        return "other"
    by_type: dict[int | None, Precision] = {
        TensorProto.FLOAT: "fp32",
        TensorProto.FLOAT16: "fp16",
        TensorProto.INT8: "int8",
        TensorProto.UINT8: "int8",
    }
    return by_type.get(types.get(node.output[0]), "other") if types is not None else "fp32"


def _types_of(ran: ModelProto) -> dict[str, int]:
    """Element type of every tensor: the runtime's own operators are unknown to ONNX's shape inference."""
    types = {item.name: int(item.data_type) for item in ran.graph.initializer}
    types |= {item.name: int(item.type.tensor_type.elem_type) for item in ran.graph.input}
    for node in ran.graph.node:
        found = _result_type(node, types)
        if found is not None:
            types.update(dict.fromkeys(node.output, found))
        if node.op_type == "DynamicQuantizeLinear":
            types[node.output[1]] = types[node.input[0]]
    return types


FIXED_TYPES = {
    **dict.fromkeys(("Shape", "Size", "ArgMax", "ArgMin", "NonZero"), "INT64"),
    **dict.fromkeys(("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "IsNaN", "IsInf"), "BOOL"),
    **dict.fromkeys(("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention"), "FLOAT"),
    **dict.fromkeys(("ConvInteger", "MatMulInteger"), "INT32"),
    "DynamicQuantizeLinear": "UINT8",
}
TYPED_BY = {"QuantizeLinear": 2, "DequantizeLinear": 1, "QLinearConcat": 1, "Where": 1, "QLinearWhere": 1, "QGemm": 8}
"""The input that has the result's type; otherwise the first one of which it is known."""


def _result_type(node: NodeProto, types: Mapping[str, int]) -> int | None:
    from onnx import TensorProto

    attributes = {item.name: item for item in node.attribute}
    if node.op_type in FIXED_TYPES:
        return int(TensorProto.DataType.Value(FIXED_TYPES[node.op_type]))
    if node.op_type == "Cast":
        return int(attributes["to"].i)
    if node.op_type in ("Constant", "ConstantOfShape"):
        return int(attributes["value"].t.data_type) if "value" in attributes else int(TensorProto.FLOAT)
    if node.op_type in TYPED_BY:
        place = TYPED_BY[node.op_type]
        given = types.get(node.input[place]) if len(node.input) > place else None
        asked = int(attributes["output_dtype"].i) if "output_dtype" in attributes else 0
        default = {"QuantizeLinear": TensorProto.UINT8, "QGemm": TensorProto.FLOAT}
        return given or asked or default.get(node.op_type)
    return next((types[name] for name in node.input if name in types), None)


def _type_name(kind: int | None) -> str:
    from onnx import TensorProto

    return TensorProto.DataType.Name(kind).lower() if kind else "unknown"


# --- float islands ----------------------------------------------------------------------------------------------------------


def _islands(ran: _Ran) -> list[AuditFinding]:
    """Layers that the file quantizes and the runtime runs in float32; their time includes the Q and DQ around them."""
    found = []
    for node in ran.nodes:
        if not _was_quantized(ran, node):
            continue
        reason, repair = _why_float(ran, node)
        sources = [ran.graph.dequantizer(name) for name in node.input]
        readers = [user for user in ran.readers(node) if user.op_type == "QuantizeLinear"]
        around = [item for item in (*sources, *readers) if item is not None]
        ms = ran.claim(node, *around)
        found.append(
            AuditFinding(
                kind="float-island",
                node=name_of(node),
                op_type=node.op_type,
                text=f"{node.op_type} {name_of(node)} was quantized and runs in float32: {reason}",
                ms=ms,
                repair=repair,
            )
        )
    return found


def _was_quantized(ran: _Ran, node: NodeProto) -> bool:
    """Whether a float node of the graph that ran was meant to be an integer one."""
    if node.op_type in LAYERS and node.domain != HOST_DOMAIN:
        inputs = list(node.input[:2])
        has_all = all(ran.graph.dequantizer(name) is not None for name in inputs)
        return any(ran.activation_maker(name) is not None for name in inputs) and (has_all or node.name in ran.asked)
    if node.op_type in ARITHMETIC:
        inputs = data_inputs(node)
        has_all = all(ran.is_constant(name) or ran.graph.dequantizer(name) is not None for name in inputs)
        has_end = any(user.op_type == "QuantizeLinear" for user in ran.readers(node))
        return has_all and has_end and any(ran.activation_maker(name) is not None for name in inputs)
    return False


def _is_asked(file: QdqGraph, node: NodeProto) -> bool:
    return (
        node.op_type in LAYERS and bool(node.name) and all(file.dequantizer(name) is not None for name in data_inputs(node)[:2])
    )


def _why_float(ran: _Ran, node: NodeProto) -> Reason:
    for check in (_check_operator, _check_width, _check_bias, _check_weights, _check_attributes, _check_result, _check_sign):
        reason = check(ran, node)
        if reason is not None:
            return reason
    shared = [name for name in node.input if ran.graph.dequantizer(name) is not None and len(ran.graph.uses[name]) > 1]
    if shared:
        return f"its input {shared[0]} has several readers", OWN_DEQUANTIZER
    return "the runtime did not fuse it", f"compare its Q and DQ with those of a layer that fused, {OR_FLOAT}"


def _check_operator(_ran: _Ran, node: NodeProto) -> Reason | None:
    if node.op_type not in WITHOUT_KERNEL:
        return None
    repair = "dynamic quantization has a kernel for it" if node.op_type == "LSTM" else "leave the layer in float32"
    return f"the runtime has no integer kernel for {node.op_type} in this form", repair


def _activation_types(ran: _Ran, node: NodeProto) -> tuple[list[str], list[str]]:
    """Types of the quantized activations that it reads and gives."""
    makers = [ran.activation_maker(name) for name in data_inputs(node)]
    inputs = [_type_name(ran.types.get(item.input[0])) for item in makers if item is not None]
    results = [_type_name(ran.types.get(user.output[0])) for user in ran.readers(node) if user.op_type == "QuantizeLinear"]
    return inputs, results


def _check_width(ran: _Ran, node: NodeProto) -> Reason | None:
    wide = [kind for part in _activation_types(ran, node) for kind in part if kind not in ("int8", "uint8")]
    return (f"its activations are {wide[0]}", f"8-bit activations have integer kernels, {OR_FLOAT}") if wide else None


def _check_bias(ran: _Ran, node: NodeProto) -> Reason | None:
    if not node.op_type.endswith(("Conv", "Gemm")) or len(node.input) < 3 or not node.input[2]:
        return None
    wanted = "int32 with the scale of the input times that of the weights"
    maker = ran.graph.dequantizer(node.input[2])
    if maker is None:
        is_fixed = ran.is_constant(node.input[2])
        return None if is_fixed else ("its bias is computed while it runs", f"store the bias as a constant, {OR_FLOAT}")
    kind = _type_name(ran.types.get(maker.input[0]))
    if kind != "int32":
        return f"its bias is {kind}, not int32", f"quantize the bias to {wanted}"
    sources = [ran.graph.dequantizer(name) for name in node.input[:2]]
    names = [item.input[1] for item in (*sources, maker) if item is not None]
    if len(names) == 3 and all(ran.is_constant(name) for name in names):
        data, weights, bias = (ran.graph.array(name).astype(np.float64) for name in names)
        if not np.allclose(bias, data * weights, rtol=1e-3):
            return "its bias has a scale of its own", f"quantize the bias to {wanted}"
    return None


def _check_weights(ran: _Ran, node: NodeProto) -> Reason | None:
    weights = ran.graph.dequantizer(node.input[1]) if node.op_type.endswith("MatMul") and len(node.input) > 1 else None
    if weights is None or not ran.is_constant(weights.input[0]) or not ran.is_constant(weights.input[1]):
        return None
    values, scale = ran.graph.array(weights.input[0]), ran.graph.array(weights.input[1])
    axis = next((int(item.i) for item in weights.attribute if item.name == "axis"), 1)
    if scale.size > 1 and axis % values.ndim != values.ndim - 1:
        return "its weights have one scale for each row", f"one scale for each column (the last axis), {OR_FLOAT}"
    return None


def _check_attributes(_ran: _Ran, node: NodeProto) -> Reason | None:
    if not node.op_type.endswith("Gemm"):
        return None
    given = {item.name: item.f if item.name in ("alpha", "beta") else item.i for item in node.attribute}
    if given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0 or given.get("transA", 0):
        return "alpha and beta must be 1 and transA 0 for an integer kernel", f"multiply them into weights and bias, {OR_FLOAT}"
    return None


def _check_result(ran: _Ran, node: NodeProto) -> Reason | None:
    readers = ran.readers(node)
    ends = [user for user in readers if user.op_type == "QuantizeLinear"]
    others = [user for user in readers if user.op_type != "QuantizeLinear"]
    fused = next((item.s.decode() for item in node.attribute if item.name == "activation"), "")
    if not fused and not ends and len(others) == 1 and others[0].op_type in ACTIVATIONS:
        fused = others[0].op_type if any(user.op_type == "QuantizeLinear" for user in ran.readers(others[0])) else ""
    if fused:
        cure = "choose the range so that it begins at 0" if fused in ("Relu", "Clip") else "quantize between the two as well"
        return f"{fused} stands between it and its QuantizeLinear", f"{cure}, {OR_FLOAT}"
    if not ends and node.op_type.endswith(("MatMul", "Gemm")):
        return None  # these kernels can answer in float32
    if not ends:
        return "its result is not quantized", f"add Q and DQ behind it, {OR_FLOAT}"
    if len(ends) > 1:
        return f"its result is quantized {len(ends)} times, differently", "give its readers one scale and zero point"
    if others or node.output[0] in ran.graph.outputs:
        reader = name_of(others[0]) if others else "an output of the model"
        return f"its result is also read in float32 by {reader}", f"let every reader take the quantized result, {OR_FLOAT}"
    return None


def _check_sign(ran: _Ran, node: NodeProto) -> Reason | None:
    inputs, results = _activation_types(ran, node)
    if "int8" not in (*inputs, *results):
        return None
    if len({*inputs, *results}) == 1:
        return "its activations are int8, for which this processor has no kernel", UNSIGNED
    if len(set(inputs)) > 1:
        return "one of its inputs is uint8 and another int8", UNSIGNED
    return f"its input is {inputs[0]} and its result {results[0]}", UNSIGNED


# --- pairs and conversions --------------------------------------------------------------------------------------------------


def _pairs(ran: _Ran) -> Iterator[AuditFinding]:
    """Q and DQ that stayed around nothing, around something cheap, or between two sides in float32."""
    for node in ran.nodes:
        before = ran.activation_maker(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if before is not None:
            text = f"{name_of(before)} and {name_of(node)} only change the scale between integer kernels"
            yield _pair(node, text, ran.claim(before, node), "give both sides one scale and zero point")
    for node in ran.nodes:
        ends = ran.readers(node) if node.op_type == "QuantizeLinear" and not ran.is_claimed(node) else []
        if ends and all(_is_loose_end(ran, end) for end in ends) and node.output[0] not in ran.graph.outputs:
            back = name_of(ends[0]).removesuffix("/duplicated")
            text = f"{name_of(node)} quantizes and {back} takes it back, float32 on both sides"
            yield _pair(node, text, ran.claim(node, *ends), NO_PAIR)
    for node in ran.nodes:
        if node.op_type != "DequantizeLinear" or ran.is_claimed(node) or ran.is_constant(node.input[0]):
            continue
        for reader in ran.readers(node):
            region, edges = _region_from(ran, reader)
            if not region or any(ran.is_claimed(item) for item in region):
                continue
            kinds = ", ".join(dict.fromkeys(item.op_type for item in region))
            text = f"{kinds} behind {name_of(node).removesuffix('/duplicated')}: integers become float32 and integers again"
            repair = (
                "an activation with an integer kernel (Relu, Clip, LeakyRelu, Sigmoid), or the layers around in float32 too"
            )
            yield _pair(region[0], text, ran.claim(*region, *edges), repair)


def _pair(node: NodeProto, text: str, ms: float | None, repair: str) -> AuditFinding:
    return AuditFinding(kind="unfused-pair", node=name_of(node), op_type=node.op_type, text=text, ms=ms, repair=repair)


def _is_loose_end(ran: _Ran, node: NodeProto) -> bool:
    """A DequantizeLinear that only float32 nodes read, none of which was meant to be an integer one."""
    if node.op_type != "DequantizeLinear" or ran.is_claimed(node):
        return False
    return all(user.op_type != "QuantizeLinear" and not ran.is_claimed(user) for user in ran.readers(node))


def _region_from(ran: _Ran, start: NodeProto) -> tuple[list[NodeProto], list[NodeProto]]:
    """Cheap float nodes that are bounded by DQ before and Q behind, and those; empty where anything else touches them."""
    region: dict[str, NodeProto] = {}
    edges: dict[str, NodeProto] = {}
    queue = [start]
    while queue:
        node = queue.pop()
        if node.output[0] in region:
            continue
        region[node.output[0]] = node
        if node.op_type not in CHEAP or len(region) > REGION or set(node.output) & ran.graph.outputs:
            return [], []
        for name in filter(None, node.input):
            maker = ran.graph.makers.get(name)
            if maker is None and not ran.is_constant(name):
                return [], []
            if maker is not None:
                edges.update({name: maker} if maker.op_type == "DequantizeLinear" else {})
                queue += [] if maker.op_type == "DequantizeLinear" else [maker]
        for user in ran.readers(node):
            edges.update({user.output[0]: user} if user.op_type == "QuantizeLinear" else {})
            queue += [] if user.op_type == "QuantizeLinear" else [user]
    ordered = [node for node in ran.nodes if node.output[0] in region]
    return ordered, list(edges.values())


DYNAMIC = "this is the price of dynamic quantization: static quantization needs data, but looks for no ranges at every run"
CURES = {
    "DynamicQuantizeLinear": DYNAMIC,
    "Cast": "store the model in the type that the runtime computes in",
    "Transpose": "int8 convolutions want channels last: others between them cost two transpositions each",
    "ReorderInput": "operators between convolutions that have no blocked kernel leave their layout: rewrite or fuse them",
    "ReorderOutput": "operators between convolutions that have no blocked kernel leave their layout: rewrite or fuse them",
}
AT_EDGE = "cut the conversion off: the application gives the model integers, or reads integers from it"
OF_CONSTANTS = "store these weights in float32: they are converted at every run"
BETWEEN = "fewer changes between int8 and float32: let edgekit optimize choose where they pay"


def _conversions(ran: _Ran, total: float | None) -> Iterator[AuditFinding]:
    """Kinds of conversion that take a share worth looking at, that stand between integer kernels, or that float16 caused."""
    kinds: dict[str, list[NodeProto]] = {}
    for node in ran.nodes:
        if ran.kernel(node) == "conversion" and not ran.is_claimed(node):
            kinds.setdefault(node.op_type, []).append(node)
    overhead = min([PROFILER_MS, *ran.ms.values()])
    spent = sum(ms - overhead for ms in ran.ms.values())
    found = []
    for kind, nodes in kinds.items():
        ms = sum(ran.ms.get(node.output[0], 0.0) for node in nodes) if total is not None else None
        share = (ms - overhead * len(nodes)) / spent if ms is not None and spent else 0.0
        inner = [node for node in nodes if kind != "Transpose" and _is_between(ran, node)]
        halves = [node for node in nodes if kind == "Cast" and _is_inserted(ran, node)]
        if share > SHARE or inner or halves:
            found.append(_conversion(ran, kind, nodes, ms=ms, total=total, halves=len(halves), between=len(inner)))
    yield from sorted(found, key=lambda item: -(item.ms or 0.0))


def _conversion(
    ran: _Ran, kind: str, nodes: list[NodeProto], *, ms: float | None, total: float | None, halves: int, between: int
) -> AuditFinding:
    graph = ran.graph.proto.graph
    inputs = {item.name for item in graph.input}
    edge = [node for node in nodes if node.input[0] in inputs or node.output[0] in ran.graph.outputs]
    fixed = [node for node in nodes if ran.is_constant(node.input[0])]
    counts = {"at the model's edges": len(edge), "of constants": len(fixed), "between integer kernels": between}
    places = [place if count == len(nodes) else f"{count} {place}" for place, count in counts.items() if count]
    where = f" ({', '.join(places)})" if places else ""
    took = f" take{'s' if len(nodes) == 1 else ''} {ms / total:.1%} of the time" if ms is not None and total else ""
    text = f"{len(nodes)} {kind}{where}{took}"
    cure = CURES.get(kind, BETWEEN)
    if halves:
        text = f"the file is float16 and this processor computes it in float32: {text}"
        cure = "use the float32 model on this processor, or keep inputs and outputs in float32 if the edges are all"
    elif kind == "Cast" and all(_maker_type(ran, node) in ("ConvInteger", "MatMulInteger") for node in nodes):
        cure = DYNAMIC
    elif kind in ("QuantizeLinear", "DequantizeLinear"):
        cure = OF_CONSTANTS if len(fixed) * 2 > len(nodes) else AT_EDGE if len(edge) == len(nodes) else BETWEEN
    return AuditFinding(
        kind="conversion", node=name_of(nodes[0]) if len(nodes) == 1 else "", op_type=kind, text=text, ms=ms, repair=cure
    )


def _maker_type(ran: _Ran, node: NodeProto) -> str:
    maker = ran.graph.makers.get(node.input[0])
    return maker.op_type if maker is not None else ""


def _is_between(ran: _Ran, node: NodeProto) -> bool:
    before = ran.graph.makers.get(node.input[0])
    after = ran.readers(node)
    return before is not None and bool(after) and all(ran.kernel(item) == "int8" for item in (before, *after))


def _is_inserted(ran: _Ran, node: NodeProto) -> bool:
    """A Cast that the runtime added because it has no float16 kernel."""
    from onnx import TensorProto

    kinds = {ran.types.get(node.input[0]), ran.types.get(node.output[0])}
    is_own = node.name in {other.name for other in ran.file.proto.graph.node if other.op_type == "Cast"}
    return not is_own and TensorProto.FLOAT16 in kinds


def _unknown(proto: ModelProto) -> Iterator[AuditFinding]:
    """Operators of other libraries, once each; those that the file itself defines are not unknown."""
    own = {(function.domain, function.name) for function in proto.functions}
    nodes = [node for graph in walk_graphs(proto.graph) for node in graph.node if (node.domain, node.op_type) not in own]
    counts = Counter((node.domain, node.op_type) for node in nodes if node.domain not in {*KNOWN_DOMAINS, HOST_DOMAIN})
    for (domain, kind), count in counts.items():
        node = next(node for node in nodes if (node.domain, node.op_type) == (domain, kind))
        times = f", used {count} times" if count > 1 else ""
        text = f"{domain}.{kind}{times}: not an operator of ONNX or ONNX Runtime"
        repair = "the device needs the library that it comes from; edgekit's agent loads none"
        yield AuditFinding(kind="unknown-operator", node=name_of(node), op_type=kind, text=text, repair=repair)
    blocked = [node for node in nodes if node.domain == HOST_DOMAIN]
    if blocked:
        text = f"{len(blocked)} nodes of {HOST_DOMAIN}: the file was optimized for the processor of one machine"
        repair = "store the model before the runtime's own optimization, or after its basic level"
        first = blocked[0]
        yield AuditFinding(kind="unknown-operator", node=name_of(first), op_type=first.op_type, text=text, repair=repair)
