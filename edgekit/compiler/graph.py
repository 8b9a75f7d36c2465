"""ONNX graphs: read them safely, say what is in them, clean and fuse them, write them without traces of this machine.

Every function takes a model and gives a new one; nothing is changed in place that the caller still holds. What is written is
one self-contained file with the same bytes each time: no external data, no metadata, no doc strings (they hold paths and source
lines). Only portable operators are written: ONNX Runtime's extended and layout optimizations belong to the host they were made
on and are never stored.

    >>> proto = read_onnx(Path("model.onnx"))            # doctest: +SKIP
    >>> facts_of(proto).operators["Conv"]                # doctest: +SKIP
    9
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.export import quiet
from edgekit.durable import write_durably
from edgekit.errors import ArtifactError
from edgekit.runtime.ort import load_onnxruntime

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

logger = logging.getLogger(__name__)
MINIMUM_OPSET = 13
"""Per-channel QuantizeLinear came with opset 13."""
WRITTEN_OPSET = 17
"""What older models are lifted to: every runtime since 2022 reads it."""
WRITTEN_IR = 8
QUANTIZED_OPERATORS = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"})
LAYERS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN"})
STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
MAXIMUM_BYTES = 2**31 - 1
"""A protobuf message ends here; an edge model that is larger has another problem."""
FOREIGN_LOGGERS = ("onnxscript", "onnx_ir", "onnx", "root")
Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """What a model consists of, subgraphs of If, Loop and Scan included."""

    opset: int
    operators: dict[str, int]
    parameters: int
    """Elements of all weights, wherever they are kept; scales and zero points are not weights."""
    is_quantized: bool
    has_float16_weights: bool
    subgraph_share: float
    """Share of the parameters that lies inside subgraphs, 0..1."""
    layers: int
    """Convolutions, matrix products and recurrent layers of the main graph."""
    inner_layers: int
    """Such layers inside subgraphs, where no quantizer reaches them."""
    foreign_domains: tuple[str, ...]
    constants: int
    """Weights that are kept as Constant nodes."""


def read_onnx(path: Path) -> ModelProto:
    """Read a file with its external data.

    Raises:
        ArtifactError: ``model.unloadable`` when it is not a readable ONNX model, ``model.external_data`` when a file that it
            refers to is missing.
    """
    import onnx

    hint = "The file is cut off, or is something else than ONNX: export it again."
    if not path.is_file():
        raise ArtifactError("model.unloadable", f"{path}: no such file.", hint="Check the path of MODEL.")
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ArtifactError("model.unloadable", f"{path}: not an ONNX model: {_one_line(error)}.", hint=hint) from error
    if not proto.graph.node and not proto.graph.output:
        raise ArtifactError("model.unloadable", f"{path}: not an ONNX model: it has no nodes and no outputs.", hint=hint)
    try:
        onnx.external_data_helper.load_external_data_for_model(proto, str(path.resolve().parent))
    except Exception as error:
        raise ArtifactError(
            "model.external_data",
            f"{path}: its external data cannot be read: {_one_line(error)}.",
            hint="Keep the data file beside the model, under the name that it was exported with.",
        ) from error
    if proto.ByteSize() > MAXIMUM_BYTES:
        raise ArtifactError("model.too_large", f"{path}: {proto.ByteSize()} bytes; one ONNX file holds at most 2 GB.")
    return proto


def encode(proto: ModelProto) -> bytes:
    """The file's bytes; the same graph gives the same bytes."""
    return bytes(proto.SerializeToString(deterministic=True))


def write_onnx(proto: ModelProto, path: Path) -> bytes:
    """Write a self-contained file, durably."""
    data = encode(proto)
    write_durably(path, data)
    return data


def _one_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line[:200].rstrip(".")


def subgraphs_of(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs inside a node (branches of If, bodies of Loop and Scan)."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def walk_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and every graph inside it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs_of(node):
            yield from walk_graphs(inner)


def _weights_of(graph: GraphProto) -> Iterator[TensorProto]:
    """Initializers and tensors of Constant nodes, without the scales and zero points of quantization."""
    quantizers = ("QuantizeLinear", "DequantizeLinear")
    parameters = {name for node in graph.node if node.op_type in quantizers for name in node.input[1:]}
    yield from (tensor for tensor in graph.initializer if tensor.name not in parameters)
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] not in parameters:
            yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


def _count(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64))


def facts_of(proto: ModelProto) -> GraphFacts:
    """Count what is in a model."""
    from onnx import TensorProto

    graphs = list(walk_graphs(proto.graph))
    nodes = [node for graph in graphs for node in graph.node]
    operators = Counter(node.op_type for node in nodes)
    inner = sum(_count(tensor) for graph in graphs[1:] for tensor in _weights_of(graph))
    total = inner + sum(_count(tensor) for tensor in _weights_of(proto.graph))
    is_quantized = any(name in QUANTIZED_OPERATORS or name.startswith(("QLinear", "DynamicQuantize")) for name in operators)
    return GraphFacts(
        opset=opset_of(proto),
        operators=dict(operators),
        parameters=total,
        is_quantized=is_quantized or bool(operators.get("DequantizeLinear")),
        has_float16_weights=any(
            tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) and _count(tensor) > 1
            for graph in graphs
            for tensor in _weights_of(graph)
        ),
        subgraph_share=inner / total if total else 0.0,
        layers=_count_layers(proto.graph),
        inner_layers=sum(_count_layers(graph) for graph in graphs[1:]),
        foreign_domains=tuple(sorted({node.domain for node in nodes} - STANDARD_DOMAINS)),
        constants=operators.get("Constant", 0),
    )


def _count_layers(graph: GraphProto) -> int:
    return sum(node.op_type in LAYERS for node in graph.node)


def opset_of(proto: ModelProto) -> int:
    """Version of the standard operator set; 1 where the model does not say."""
    return max((item.version for item in proto.opset_import if item.domain in STANDARD_DOMAINS), default=1)


def lift_opset(proto: ModelProto, name: str) -> tuple[ModelProto, tuple[str, ...]]:
    """Bring a model of an old operator set to one that quantization knows; a newer one stays as it is.

    Raises:
        ArtifactError: ``model.opset`` when the conversion fails.
    """
    from onnx import version_converter

    before = opset_of(proto)
    if before >= MINIMUM_OPSET:
        return proto, ()
    try:
        converted = version_converter.convert_version(proto, WRITTEN_OPSET)
    except Exception as error:
        raise ArtifactError(
            "model.opset",
            f"{name}: operator set {before} cannot be converted to {WRITTEN_OPSET}: {_one_line(error)}.",
            hint=f"Export the model again with operator set {MINIMUM_OPSET} or newer.",
        ) from error
    converted.ir_version = max(converted.ir_version, WRITTEN_IR)
    return converted, (f"operator set {before} converted to {WRITTEN_OPSET}",)


def normalize(proto: ModelProto) -> ModelProto:
    """The same network, self-contained: weights as initializers, no metadata, no unused parts. Names of nodes are filled in."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    model = ir.serde.deserialize_model(proto)
    with quiet(*FOREIGN_LOGGERS):
        for step in (
            common.InlinePass(),
            common.RemoveInitializersFromInputsPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.LiftSubgraphInitializersToMainGraphPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            common.RemoveUnusedOpsetsPass(),
            common.ClearMetadataAndDocStringPass(),
        ):
            model = step(model).model
    return seal(ir.serde.serialize_model(model))


def seal(proto: ModelProto) -> ModelProto:
    """Clear what names this machine or changes between runs, drop unused operator sets, name every node."""
    proto.producer_name, proto.producer_version, proto.doc_string, proto.domain = "edgekit", "", "", ""
    del proto.metadata_props[:]
    used = {node.domain for graph in walk_graphs(proto.graph) for node in graph.node} | {""}
    used |= {node.domain for function in proto.functions for node in function.node}
    imports = [item for item in proto.opset_import if item.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(sorted(imports, key=lambda item: str(item.domain)))
    _drop_unused_weights(proto)
    taken = {node.name for graph in walk_graphs(proto.graph) for node in graph.node}
    for graph in walk_graphs(proto.graph):
        graph.doc_string = ""
        del graph.metadata_props[:]
        for index, node in enumerate(graph.node):
            node.doc_string = ""
            del node.metadata_props[:]
            if not node.name:
                node.name = _free_name(f"{node.op_type}_{index}", taken)
        for items in (graph.value_info, graph.input, graph.output, graph.initializer):
            for item in items:
                item.doc_string = ""
                del item.metadata_props[:]
    return proto


def _drop_unused_weights(proto: ModelProto) -> None:
    graphs = list(walk_graphs(proto.graph))
    used = {name for graph in graphs for node in graph.node for name in node.input}
    used |= {item.name for graph in graphs for item in graph.output}
    kept = [item for item in proto.graph.initializer if item.name in used]
    if len(kept) < len(proto.graph.initializer):
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)


def _free_name(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 0
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


Cleaner = Callable[["ModelProto"], "ModelProto"]


def clean(proto: ModelProto, feeds: dict[str, Array]) -> tuple[ModelProto, tuple[str, ...]]:
    """Fold constants and BatchNorm, remove what does nothing, fuse what has a portable form.

    Each step is kept only if the model still answers the same on ``feeds``; a step that fails is left out and noted.
    """
    notes: list[str] = []
    current = proto
    expected = run_once(proto, feeds)
    for name, step in (
        ("fold", _fold),
        ("pool", _use_global_pool),
        ("activations", _use_whole_activations),
        ("gelu", _order_gelu),
        ("sum", _keep_layer_norm),
        ("fuse", _fuse_portably),
    ):
        before = Counter(facts_of(current).operators)
        try:
            with quiet(*FOREIGN_LOGGERS):
                changed = seal(step(_copy(current)))
            if _is_unchanged(current, changed):
                continue
            check_same(expected, run_once(changed, feeds))
        except Exception as error:  # noqa: BLE001  foreign optimizers raise anything; the model before the step stands
            logger.debug("graph step left out step=%s reason=%s", name, error)
            notes.append(f"step {name} left out: {_one_line(error)}")
            continue
        current = changed
        notes.extend(_describe_change(name, before, Counter(facts_of(current).operators)))
    return current, tuple(notes)


def _is_unchanged(before: ModelProto, after: ModelProto) -> bool:
    """Whether a step left nodes and weights as they were; a step that changes a weight gives it another name."""
    weights = [[(item.name, tuple(item.dims)) for item in proto.graph.initializer] for proto in (before, after)]
    return weights[0] == weights[1] and list(before.graph.node) == list(after.graph.node)


def _copy(proto: ModelProto) -> ModelProto:
    import onnx

    other = onnx.ModelProto()
    other.CopyFrom(proto)
    return other


def _describe_change(name: str, before: Counter[str], after: Counter[str]) -> Iterator[str]:
    removed, added = before - after, after - before
    if removed or added:
        parts = [f"-{count} {kind}" for kind, count in sorted(removed.items())]
        parts += [f"+{count} {kind}" for kind, count in sorted(added.items())]
        yield f"{name}: {', '.join(parts)}"


def _fold(proto: ModelProto) -> ModelProto:
    """Constant folding, identities, common subexpressions, dead code, and onnxscript's rewrite rules."""
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript import optimizer

    model = ir.serde.deserialize_model(proto)
    for first in (common.IdentityEliminationPass(), common.CommonSubexpressionEliminationPass()):
        model = first(model).model
    optimizer.optimize_ir(model)
    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateHashedInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.ShapeInferencePass(),
    ):
        model = step(model).model
    return ir.serde.serialize_model(model)


def _use_global_pool(proto: ModelProto) -> ModelProto:
    """A mean over height and width becomes GlobalAveragePool, which has blocked and int8 kernels; ReduceMean has none."""
    from onnx import helper, numpy_helper

    constants = {item.name: item for item in proto.graph.initializer}
    ranks = _ranks(proto)
    nodes: list[NodeProto] = []
    for node in proto.graph.node:
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        axes = attributes.get("axes")
        if node.op_type == "ReduceMean" and len(node.input) > 1 and node.input[1] in constants:
            axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
        rank = ranks.get(node.input[0]) if node.input else None
        if node.op_type != "ReduceMean" or rank != 4 or sorted(axis % 4 for axis in axes or ()) != [2, 3]:
            nodes.append(node)
            continue
        keeps = attributes.get("keepdims", 1)
        pooled = node.output[0] if keeps else f"{node.output[0]}_pooled"
        nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name))
        if not keeps:
            nodes.append(helper.make_node("Flatten", [pooled], [node.output[0]], name=f"{node.name}_flatten", axis=1))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


HARD_SWISH_OPSET = 14


def _use_whole_activations(proto: ModelProto) -> ModelProto:
    """X * clip(x + 3, 0, 6) / 6 in pieces becomes HardSwish, which ONNX Runtime computes inside the convolution before it.

    In pieces it is four passes over the tensor and leaves the blocked layout of the convolutions each time.
    """
    from onnx import helper

    if opset_of(proto) < HARD_SWISH_OPSET:
        return proto
    values = _scalars(proto)
    makers = {name: node for node in proto.graph.node for name in node.output}
    uses = Counter(name for node in proto.graph.node for name in node.input)
    uses.update(item.name for item in proto.graph.output)
    replaced: dict[int, Any] = {}
    for node in proto.graph.node:
        found = _match_hard_swish(node, makers, values)
        if found is None or any(uses[inner] > 1 for part in found[1] for inner in part.output):
            continue
        replaced[id(node)] = helper.make_node("HardSwish", [found[0]], [node.output[0]], name=node.name)
        replaced.update({id(part): None for part in found[1]})
    nodes = [replaced.get(id(node), node) for node in proto.graph.node]
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes if node is not None]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    return proto


def _order_gelu(proto: ModelProto) -> ModelProto:
    """Bring x * (0.5 * (1 + erf(x / sqrt 2))) into the form (x * (1 + erf(..))) * 0.5, which runtimes fuse into one Gelu."""
    values = _scalars(proto)
    makers = {name: node for node in proto.graph.node for name in node.output}
    uses = Counter(name for node in proto.graph.node for name in node.input)
    for node in proto.graph.node:
        if node.op_type != "Mul":
            continue
        for place in (0, 1):
            x, half = node.input[place], makers.get(node.input[1 - place])
            if half is None or half.op_type != "Mul" or uses[half.output[0]] > 1:
                continue
            inner, factor = _times(half, values)
            add = makers.get(inner or "")
            if factor != 0.5 or add is None or add.op_type != "Add":
                continue
            erf = next((makers[name] for name in add.input if name in makers and makers[name].op_type == "Erf"), None)
            if erf is None or x not in makers.get(erf.input[0], erf).input:
                continue
            constant = next(name for name in half.input if name in values)
            half.input[:] = [x, add.output[0]]
            node.input[:] = [half.output[0], constant]
            break
    return proto


def _keep_layer_norm(proto: ModelProto) -> ModelProto:
    """A residual Add before LayerNormalization becomes Sum: ONNX Runtime would fuse the two into a far slower kernel."""
    normalized = {node.input[0] for node in proto.graph.node if node.op_type == "LayerNormalization"}
    weights = {item.name for item in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Add" and node.output[0] in normalized and not set(node.input) & weights:
            node.op_type = "Sum"
    return proto


def _scalars(proto: ModelProto) -> dict[str, float]:
    """Initializers that are one number."""
    from onnx import numpy_helper

    single = (item for item in proto.graph.initializer if _count(item) == 1)
    return {item.name: float(numpy_helper.to_array(item).reshape(-1)[0]) for item in single}


def _match_hard_swish(
    last: NodeProto, makers: dict[str, NodeProto], values: dict[str, float]
) -> tuple[str, list[NodeProto]] | None:
    """The input of a HardSwish whose last node this is, and the nodes before the last one; None for anything else."""
    product, outer = _times(last, values)
    if product is None or abs(outer - 1 / 6) > EXACT:
        return None
    inner = makers.get(product)
    if inner is None or inner.op_type != "Mul":
        return None
    for x, gate in (tuple(inner.input), tuple(inner.input)[::-1]):
        clip = makers.get(gate)
        if clip is None or clip.op_type != "Clip" or [values.get(name) for name in clip.input[1:3]] != [0.0, 6.0]:
            continue
        add = makers.get(clip.input[0])
        if add is None or add.op_type != "Add" or x not in add.input:
            continue
        if any(values.get(name) == 3.0 for name in add.input if name != x):
            return x, [inner, clip, add]
    return None


EXACT = 1e-6


def _times(node: NodeProto, values: dict[str, float]) -> tuple[str | None, float]:
    """The tensor that a node multiplies by one number, and the number."""
    if node.op_type == "Div" and node.input[1] in values and values[node.input[1]]:
        return node.input[0], 1 / values[node.input[1]]
    if node.op_type == "Mul":
        for tensor, factor in (tuple(node.input), tuple(node.input)[::-1]):
            if factor in values and tensor not in values:
                return tensor, values[factor]
    return None, 1.0


def _ranks(proto: ModelProto) -> dict[str, int]:
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(proto).graph
    items = [*graph.input, *graph.value_info, *graph.output]
    return {item.name: len(item.type.tensor_type.shape.dim) for item in items if item.type.tensor_type.HasField("shape")}


def _fuse_portably(proto: ModelProto) -> ModelProto:
    """ONNX Runtime's basic level, stored: BatchNorm, Mul and Add into Conv, MatMul and Add into Gemm, redundant nodes removed.

    Raises:
        ArtifactError: ``model.not_portable`` when the result uses operators that the source did not.
    """
    import tempfile

    import onnx

    with tempfile.TemporaryDirectory(prefix="edgekit-fuse-") as folder:
        path = Path(folder) / "fused.onnx"
        open_plain(encode(proto), level="basic", stored=path)
        fused = onnx.load(path)
    allowed = set(facts_of(proto).foreign_domains)
    foreign = [domain for domain in facts_of(fused).foreign_domains if domain not in allowed]
    if foreign:
        raise ArtifactError("model.not_portable", f"fusion introduced operators of {', '.join(foreign)}")
    return fused


def open_plain(data: bytes, *, level: str = "none", stored: Path | None = None) -> Any:
    """An onnxruntime session for the compiler's own use: one thread, optimization ``none``, ``basic`` or ``all``.

    Raises:
        ArtifactError: ``model.unloadable`` when the runtime refuses the model.
    """
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    chosen = {"none": levels.ORT_DISABLE_ALL, "basic": levels.ORT_ENABLE_BASIC, "all": levels.ORT_ENABLE_ALL}
    options.graph_optimization_level = chosen[level]
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if stored is not None:
        options.optimized_model_filepath = str(stored)
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ArtifactError("model.unloadable", f"onnxruntime cannot load the model: {_one_line(error)}") from error


def run_once(proto: ModelProto, feeds: dict[str, Array]) -> list[Array]:
    """Outputs of the model on one batch, without runtime optimization."""
    results: list[Array] = open_plain(encode(proto)).run(None, feeds)
    return results


TOLERANCE = 1e-3
"""Of the output's range: fp32 sums in another order differ by 1e-7 to 1e-5, a wrong rewrite by the range itself."""


def check_same(expected: Sequence[Array], found: Sequence[Array]) -> None:
    """Refuse outputs that differ by more than rounding.

    Raises:
        ArtifactError: ``model.changed``.
    """
    for index, (left, right) in enumerate(zip(expected, found, strict=True)):
        if left.shape != right.shape or left.dtype != right.dtype:
            raise ArtifactError("model.changed", f"output {index} changed from {left.shape} to {right.shape}")
        if left.size == 0 or left.dtype.kind not in "fiub":
            continue
        scale = max(1e-3, float(np.nanmax(np.abs(left.astype(np.float64)))))
        error = float(np.nanmax(np.abs(left.astype(np.float64) - right.astype(np.float64))))
        if not error <= TOLERANCE * scale:
            raise ArtifactError("model.changed", f"output {index} changed by {error:.3g}")
