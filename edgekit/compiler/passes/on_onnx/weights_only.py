"""Passes that make the file smaller and leave the arithmetic in float32: a size lever where int8 costs too much accuracy.

``HalveWeights`` stores weights as float16 behind a Cast, which the runtime folds when it loads the model: float32 speed at half
the size. ``QuantizeWeights`` stores the weights of matrix products in blocks of 4 or 8 bits (MatMulNBits of ONNX Runtime).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgekit.compiler.export import quiet
from edgekit.compiler.graph import facts_of, read_onnx, seal
from edgekit.compiler.passes.base import PassContext, WorkModel
from edgekit.compiler.passes.on_onnx.quantize_static import find_quantization_obstacle
from edgekit.compiler.passes.on_onnx.written import write_step
from edgekit.compiler.qdq import silenced_root
from edgekit.errors import ArtifactError
from edgekit.runtime.ort import load_onnxruntime

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

Algorithm = Literal["nearest", "hqq"]
SMALLEST = 256
"""Weights with fewer elements stay as they are: a Cast node takes as much room."""
HALF_MAX = 65504.0


class HalveWeights:
    """fp32 weights stored as fp16, computed in fp32; in a quantized model those of the layers that stayed fp32."""

    name = "halve-weights"
    target_fields = ()

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:  # noqa: ARG002  the protocol's signature
        """Why this pass cannot run on this model, or None when it can."""
        return None if model.format == "onnx" else "needs an ONNX model"

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Write ``halve-weights.onnx``.

        Raises:
            ArtifactError: ``quantization.nothing_quantized`` when no weight is large enough and within the range of float16.
        """
        started = time.monotonic()
        proto = read_onnx(model.path)
        count = _halve(proto)
        if not count:
            raise ArtifactError("quantization.nothing_quantized", "no weight is large enough and fits float16.")
        return write_step(
            seal(proto),
            model,
            context,
            name=self.name,
            precision="fp16-weights" if model.precision == "fp32" else model.precision,
            settings={"smallest": SMALLEST},
            started=started,
            packages=("onnx",),
            notes=(f"{count} weights stored as float16",),
        )


def halvable_bytes(proto: ModelProto) -> int:
    """Bytes that :class:`HalveWeights` would save."""
    return sum(int(np.prod(tensor.dims, dtype=np.int64)) * 2 for tensor in _halvable(proto))


def _halvable(proto: ModelProto) -> list[TensorProto]:
    """Large float32 weights; scales stay what they are, since the runtime looks for them beside Q and DQ."""
    from onnx import TensorProto

    kinds = ("QuantizeLinear", "DequantizeLinear")
    scales = {name for node in proto.graph.node if node.op_type in kinds for name in node.input[1:]}
    return [
        tensor
        for tensor in proto.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
        and int(np.prod(tensor.dims, dtype=np.int64)) >= SMALLEST
        and tensor.name not in scales
    ]


def _halve(proto: ModelProto) -> int:
    """Store large weights as float16 behind a Cast, in place; how many."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in _halvable(proto):
        values = numpy_helper.to_array(tensor)
        if not np.abs(values).max(initial=0.0) <= HALF_MAX:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        casts.append(helper.make_node("Cast", [f"{name}_half"], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
    for index, node in enumerate(casts):
        proto.graph.node.insert(index, node)
    return len(casts)


class QuantizeWeights:
    """Weights of matrix products in blocks of few bits, activations in float32.

    Args:
        bits: 4 or 8.
        block: weights that share a scale.
        algorithm: ``nearest``: scales from the largest weight of a block; ``hqq``: half-quadratic quantization (Badri and
            Shaji, 2023), which fits the zero points so that outliers cost less; 4 bits only.
    """

    name = "quantize-weights"
    target_fields = ()

    def __init__(self, *, bits: Literal[4, 8], block: int = 32, algorithm: Algorithm = "nearest") -> None:
        self.bits = bits
        self.block = block
        self.algorithm = algorithm

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:  # noqa: ARG002  the protocol's signature
        """Why this pass cannot run on this model, or None when it can."""
        if obstacle := find_quantization_obstacle(model):
            return obstacle
        operators = facts_of(read_onnx(model.path)).operators
        return None if operators.get("MatMul") else "no matrix products (MatMul)"

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Write ``quantize-weights.onnx``.

        Raises:
            ArtifactError: ``quantization.nothing_quantized`` when no MatMul has constant weights.
        """
        started = time.monotonic()
        load_onnxruntime()
        from onnxruntime.quantization import matmul_nbits_quantizer as quantizers

        config = (
            quantizers.HQQWeightOnlyQuantConfig(block_size=self.block, bits=self.bits)
            if self.algorithm == "hqq"
            else quantizers.DefaultWeightOnlyQuantConfig(block_size=self.block, is_symmetric=True, bits=self.bits)
        )
        with quiet("onnxruntime.quantization", "root"), silenced_root():
            quantizer = quantizers.MatMulNBitsQuantizer(read_onnx(model.path), algo_config=config)
            quantizer.process()
        proto: ModelProto = quantizer.model.model
        count = facts_of(proto).operators.get("MatMulNBits", 0)
        if not count:
            raise ArtifactError("quantization.nothing_quantized", "no MatMul has constant weights.")
        return write_step(
            seal(proto),
            model,
            context,
            name=self.name,
            precision=f"int{self.bits}-weights",
            settings={"bits": self.bits, "block": self.block, "algorithm": self.algorithm},
            started=started,
            packages=("onnx", "onnxruntime", *(("torch",) if self.algorithm == "hqq" else ())),
            notes=(f"{count} matrix products with {self.bits}-bit weights",),
        )
