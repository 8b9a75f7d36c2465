"""The pass that makes a dynamic int8 model: int8 weights, ranges of activations measured at run time.

Pays for MatMul-heavy models. Convolutions become ConvInteger, which takes uint8 weights only and is slow on most CPUs; they
are converted where they hold most of the weights, since they are a size lever, and the measured latency decides.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.compiler.export import quiet
from edgekit.compiler.graph import encode, facts_of, read_onnx, seal
from edgekit.compiler.passes.base import PassContext, WorkModel
from edgekit.compiler.passes.on_onnx.quantize_static import find_quantization_obstacle
from edgekit.compiler.passes.on_onnx.written import write_step
from edgekit.compiler.qdq import infer, silenced_root
from edgekit.errors import ArtifactError
from edgekit.runtime.ort import load_onnxruntime

if TYPE_CHECKING:
    from onnx import ModelProto

PACKAGES = ("onnx", "onnxruntime")
MATRIX_OPERATORS = ("MatMul", "Gemm", "LSTM", "Gather")
CONVOLUTION_SHARE = 0.5
INTEGER_OPERATORS = ("MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul")


class QuantizeDynamic:
    """fp32 to dynamic int8.

    Args:
        float_nodes: names of layers that stay float32, a list as JSON text.
    """

    name = "quantize-dynamic"
    target_fields = ("int8",)

    def __init__(self, *, float_nodes: str = "[]") -> None:
        self.float_nodes = float_nodes

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:  # noqa: ARG002  the protocol's signature
        """Why this pass cannot run on this model, or None when it can."""
        return find_quantization_obstacle(model)

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Write ``quantize-dynamic.onnx``.

        Raises:
            ArtifactError: ``quantization.nothing_quantized``, ``quantization.grew`` when the file became larger,
                ``quantization.failed`` when the quantizer refuses the model.
        """
        started = time.monotonic()
        proto = read_onnx(model.path)
        plan = plan_dynamic(proto, context)
        quantized = seal(write_dynamic(proto, plan, float_nodes=json.loads(self.float_nodes)))
        after = facts_of(quantized).operators
        count = sum(after.get(kind, 0) for kind in INTEGER_OPERATORS)
        _check(proto, quantized, count)
        return write_step(
            quantized,
            model,
            context,
            name=self.name,
            precision="int8-dynamic",
            settings={
                "weights": plan.weights,
                "is_per_channel": plan.is_per_channel,
                "reduce_range": plan.reduce_range,
                "operators": " ".join(plan.kinds),
                "float_nodes": self.float_nodes,
            },
            started=started,
            packages=PACKAGES,
            notes=(f"{count} layers compute in integers",),
        )


def _convolution_share(proto: ModelProto) -> float:
    """Share of the weights' bytes that belongs to convolutions."""
    sizes = {item.name: len(item.raw_data) or item.ByteSize() for item in proto.graph.initializer}
    total = sum(sizes.values())
    own = sum(sizes.get(node.input[1], 0) for node in proto.graph.node if node.op_type == "Conv")
    return own / total if total else 0.0


@dataclass(frozen=True, kw_only=True)
class DynamicPlan:
    """How dynamic int8 is written: the type of the weights, one scale per column or per tensor, which operators."""

    weights: str
    is_per_channel: bool
    reduce_range: bool
    kinds: tuple[str, ...]


def plan_dynamic(proto: ModelProto, context: PassContext) -> DynamicPlan:
    """Convolutions where they hold most of the weights; one scale per column where every kernel has that."""
    has_convolutions = _convolution_share(proto) > CONVOLUTION_SHARE
    kinds = (*MATRIX_OPERATORS, "Conv") if has_convolutions else MATRIX_OPERATORS
    is_recurrent = any(node.op_type == "LSTM" for node in proto.graph.node)
    return DynamicPlan(
        weights="uint8" if has_convolutions else context.target.int8.weights,
        is_per_channel=context.target.int8.per_channel and not has_convolutions and not is_recurrent,
        reduce_range=context.target.int8.reduce_range,
        kinds=kinds,
    )


def write_dynamic(
    proto: ModelProto, plan: DynamicPlan, *, nodes: Sequence[str] = (), float_nodes: Sequence[str] = ()
) -> ModelProto:
    """The model with dynamic int8 in the ``nodes`` (empty: all that can), but not in the ``float_nodes``.

    Raises:
        ArtifactError: ``quantization.failed`` when the quantizer refuses the model.
    """
    load_onnxruntime()
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode

    kind = QuantType.QUInt8 if plan.weights == "uint8" else QuantType.QInt8
    try:
        with quiet("onnxruntime.quantization"), silenced_root():
            quantizer = ONNXQuantizer(
                infer(proto),
                plan.is_per_channel,
                plan.reduce_range,
                QuantizationMode.IntegerOps,
                False,  # noqa: FBT003  static
                kind,
                QuantType.QUInt8,
                None,
                list(nodes),
                list(float_nodes),
                list(plan.kinds),
                {"MatMulConstBOnly": True},
            )
            quantizer.quantize_model()
    except Exception as error:
        raise ArtifactError(
            "quantization.failed",
            f"onnxruntime's quantizer refuses the model: {type(error).__name__}: {str(error)[:200]}",
            hint="The other candidates stand.",
        ) from error
    result: ModelProto = quantizer.model.model
    return result


def _check(before: ModelProto, after: ModelProto, count: int) -> None:
    if count == 0:
        raise ArtifactError(
            "quantization.nothing_quantized",
            "no layer became integer: the weights are not constants of MatMul, Gemm, LSTM or Conv.",
            hint="Export the model with its weights as initializers.",
        )
    old, new = len(encode(before)), len(encode(after))
    if new >= old:
        raise ArtifactError(
            "quantization.grew",
            f"the file grew from {old} to {new} bytes: what the integer operators add is more than the weights save.",
            hint="Dynamic quantization does not pay for a model this small.",
        )
