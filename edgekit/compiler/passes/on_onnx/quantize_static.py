"""The pass that makes a static int8 model in QDQ form, as the target's int8 rules say.

Ranges come from the calibration data (``edgekit.compiler.calibration``), the Q/DQ nodes from onnxruntime's quantizer. Only
operators that ONNX Runtime's CPU kernels run in int8 are quantized, and the pair at an output whose producer can answer in
float32 is left out: it would cost accuracy and save nothing.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgekit.compiler.calibration import Method, Ranges, collect_ranges
from edgekit.compiler.export import quiet
from edgekit.compiler.graph import facts_of, read_onnx, seal
from edgekit.compiler.passes.base import Effort, PassContext, WorkModel
from edgekit.compiler.passes.on_onnx.written import write_step
from edgekit.dataset.data import spread_indices
from edgekit.errors import ArtifactError
from edgekit.schema.digest import short

if TYPE_CHECKING:
    from onnx import ModelProto

logger = logging.getLogger(__name__)
PACKAGES = ("onnx", "onnxruntime")
SAMPLES: dict[Effort, int] = {"fast": 100, "default": 400, "max": 2000}
Kept = Literal["none", "edges"]
COMPUTING = ("Conv", "ConvTranspose", "MatMul", "Gemm")
QUANTIZED_OPERATORS = (
    *("Conv", "MatMul", "Gemm", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Add", "Mul", "Concat", "Split", "Where"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Gather"),
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice"),
)  # fmt: skip
"""What ONNX Runtime's CPU provider fuses into integer kernels or passes through without a conversion."""
FLOAT_ANSWERING = ("Gemm", "MatMul")
"""Integer kernels of these have a form that answers in float32."""


def find_quantization_obstacle(model: WorkModel) -> str | None:
    """Why no quantizer can start from this model, or None."""
    if model.format != "onnx":
        return "needs an ONNX model"
    facts = facts_of(read_onnx(model.path))
    if facts.is_quantized:
        return "the model is already quantized; only cleaning it up is offered"
    if facts.has_float16_weights:
        return "the weights are float16; int8 starts from a float32 model: export it in float32"
    if facts.layers == 0 and facts.inner_layers == 0:
        return "nothing to quantize: no convolution, matrix product or recurrent layer"
    if facts.inner_layers > facts.layers:
        inside = f"{facts.inner_layers} of {facts.layers + facts.inner_layers} computing layers"
        return (
            f"{inside} lie inside If, Loop or Scan subgraphs, which the quantizer does not enter; export without control flow"
        )
    return None


class QuantizeStatic:
    """fp32 to static int8.

    Args:
        is_per_channel: one scale per output channel of the weights, or one per tensor.
        method: how ranges of activations are found.
        kept: ``edges`` leaves the first and the last layer with weights in fp32.
        reduce_range: 7-bit weights; None follows the target's rule.
    """

    name = "quantize-static"

    def __init__(
        self, *, is_per_channel: bool, method: Method = "minmax", kept: Kept = "none", reduce_range: bool | None = None
    ) -> None:
        self.is_per_channel = is_per_channel
        self.method = method
        self.kept = kept
        self.reduce_range = reduce_range

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:
        """Why this pass cannot run on this model, or None when it can."""
        if context.target.int8.format != "qdq":
            return f"the target wants int8 as {context.target.int8.format}; this pass writes QDQ"
        if self.is_per_channel and not context.target.int8.per_channel:
            return f"{context.target.name} has no kernels for one scale per channel"
        if obstacle := find_quantization_obstacle(model):
            return obstacle
        if self.kept == "edges" and not _inner_layers(read_onnx(model.path)):
            return "no layers between the first and the last one"
        return None

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Write ``quantize-static.onnx``.

        Raises:
            ArtifactError: ``quantization.nothing_quantized`` when no computing layer became int8,
                ``quantization.failed`` when the quantizer refuses the model.
        """
        started = time.monotonic()
        proto = read_onnx(model.path)
        count = min(SAMPLES[context.effort], len(context.calibration))
        samples = context.calibration.select(spread_indices(len(context.calibration), count))
        text = f"calibrating with {count} samples"
        context.on_progress(text, 0.0)
        ranges = collect_ranges(
            proto,
            samples,
            method=self.method,
            on_progress=lambda done: context.on_progress(text, 0.9 * done),
        )
        excluded = edge_layers(proto) if self.kept == "edges" else ()
        quantized = self._quantize(proto, ranges, context, excluded)
        loose = remove_output_pairs(quantized)
        notes = _describe(quantized, excluded, loose)
        return write_step(
            seal(quantized),
            model,
            context,
            name=self.name,
            precision="int8",
            settings=self._settings(context, count),
            started=started,
            packages=PACKAGES,
            notes=notes,
        )

    def _reduces(self, context: PassContext) -> bool:
        return context.target.int8.reduce_range if self.reduce_range is None else self.reduce_range

    def _settings(self, context: PassContext, count: int) -> dict[str, str | int | float | bool | None]:
        rules = context.target.int8
        return {
            "weights": f"{rules.weights} {'symmetric' if rules.weight_symmetric else 'asymmetric'}",
            "activations": f"{rules.activations} {'symmetric' if rules.activation_symmetric else 'asymmetric'}",
            "is_per_channel": self.is_per_channel,
            "reduce_range": self._reduces(context),
            "method": self.method,
            "kept_fp32": self.kept,
            "samples": count,
            "calibration": short(context.calibration.digest),
        }

    def _quantize(self, proto: ModelProto, ranges: Ranges, context: PassContext, excluded: tuple[str, ...]) -> ModelProto:
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        rules = context.target.int8
        kinds = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}
        pairs = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
        options = {
            "ActivationSymmetric": rules.activation_symmetric,
            "WeightSymmetric": rules.weight_symmetric,
            "DedicatedQDQPair": False,
        }
        try:
            with quiet("onnxruntime.quantization", "root"), silenced_root():
                quantizer = QDQQuantizer(
                    infer(proto),
                    self.is_per_channel,
                    self._reduces(context),
                    kinds[rules.weights],
                    kinds[rules.activations],
                    TensorsData(CalibrationMethod.MinMax, pairs),
                    [],
                    list(excluded),
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


def edge_layers(proto: ModelProto) -> tuple[str, ...]:
    """Names of the first and the last layer that has weights."""
    weights = {item.name for item in proto.graph.initializer}
    layers = [node.name for node in proto.graph.node if node.op_type in COMPUTING and set(node.input[1:2]) & weights]
    return tuple(dict.fromkeys((layers[0], layers[-1]))) if layers else ()


def _inner_layers(proto: ModelProto) -> int:
    """How many computing layers are neither the first nor the last one with weights."""
    edges = edge_layers(proto)
    return sum(node.op_type in COMPUTING and node.name not in edges for node in proto.graph.node)


def remove_output_pairs(proto: ModelProto) -> int:
    """Take out the Q/DQ pair before an output whose producer answers in float32; the number of pairs removed."""
    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output}
    uses: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    gone: list[Any] = []
    for output in graph.output:
        dequantize = makers.get(output.name)
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or uses.get(output.name):
            continue
        quantize = makers.get(dequantize.input[0])
        if quantize is None or quantize.op_type != "QuantizeLinear" or uses[dequantize.input[0]] > 1:
            continue
        producer = makers.get(quantize.input[0])
        if producer is None or producer.op_type not in FLOAT_ANSWERING or uses[quantize.input[0]] > 1:
            continue
        producer.output[0] = output.name
        gone += [quantize, dequantize]
    for node in gone:
        graph.node.remove(node)
    return len(gone) // 2


def _describe(proto: ModelProto, excluded: tuple[str, ...], loose: int) -> tuple[str, ...]:
    """Notes for the lineage.

    Raises:
        ArtifactError: ``quantization.nothing_quantized``.
    """
    done, all_layers = count_quantized(proto)
    if done == 0:
        raise ArtifactError(
            "quantization.nothing_quantized",
            f"none of the {all_layers} computing layers became int8.",
            hint="Are the weights computed inside the graph, or inside a subgraph? Export with constant weights.",
        )
    notes = [f"{done} of {all_layers} computing layers are int8"]
    if excluded:
        notes.append(f"kept in fp32: {', '.join(excluded)}")
    if loose:
        notes.append(f"{loose} output(s) answer in float32 directly")
    return tuple(notes)


def count_quantized(proto: ModelProto) -> tuple[int, int]:
    """Computing layers whose inputs come from DequantizeLinear, and all computing layers."""
    made_by = {name: node.op_type for node in proto.graph.node for name in node.output}
    layers = [node for node in proto.graph.node if node.op_type in COMPUTING]
    done = sum(all(made_by.get(name) == "DequantizeLinear" for name in node.input[:2]) for node in layers)
    return done, len(layers)
