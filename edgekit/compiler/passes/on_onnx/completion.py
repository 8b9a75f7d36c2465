"""Quantizers that a QDQ model of another tool lacks for ONNX Runtime's integer kernels.

A convolution runs in int8 only where its answer is quantized too. Some tools count on one kernel for convolution, sum and
activation and leave the quantizer between them out; ONNX Runtime then converts the weights to float32 in every run, which is
slower than the float32 model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.calibration import collect_ranges
from edgekit.dataset.data import Dataset
from edgekit.schema.target import Int8Rules

if TYPE_CHECKING:
    from onnx import ModelProto

Array = NDArray[Any]
ACTIVATIONS = frozenset({"Relu", "Clip"})
"""ONNX Runtime fuses these into the quantizer behind them."""


def complete_quantizers(proto: ModelProto, samples: Dataset, rules: Int8Rules) -> int:
    """Quantize, in place, the answers of int8 convolutions that lack a quantizer; the number of quantizers added.

    Args:
        proto: a model in QDQ form.
        samples: give the ranges, by minimum and maximum.
        rules: type and symmetry of activations.
    """
    open_answers = _find_open_answers(proto)
    if not open_answers:
        return 0
    ranges = collect_ranges(proto, samples)
    outputs = {item.name for item in proto.graph.output}
    count = 0
    for name in open_answers:
        if name in ranges and name not in outputs:
            _insert_pair(proto, name, *_scale_of(*ranges[name], rules))
            count += 1
    return count


def _find_open_answers(proto: ModelProto) -> list[str]:
    """What quantized convolutions answer, after their activation, where anything but a quantizer reads it."""
    readers: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    makers = {name: node.op_type for node in proto.graph.node for name in node.output}
    found = []
    for node in proto.graph.node:
        if node.op_type != "Conv" or any(makers.get(name) != "DequantizeLinear" for name in node.input[:2]):
            continue
        answer = node.output[0]
        while len(after := readers.get(answer, [])) == 1 and after[0].op_type in ACTIVATIONS:
            answer = after[0].output[0]
        if any(reader.op_type != "QuantizeLinear" for reader in after):
            found.append(answer)
    return found


def _scale_of(low: float, high: float, rules: Int8Rules) -> tuple[Array, Array]:
    """Scale, float32 [], and zero point, int8 or uint8 [], of activations within these ends; zero is exact."""
    kind = np.dtype(rules.activations)
    least = int(np.iinfo(kind).min)
    if rules.activation_symmetric:
        low, high = -max(-low, high), max(-low, high)
    scale = np.float32(max(high - low, 1e-8) / 255)
    middle = least + 128 if rules.activation_symmetric else least - round(low / float(scale))
    return np.asarray(scale), np.asarray(min(max(middle, least), least + 255), kind)


def _insert_pair(proto: ModelProto, name: str, scale: Array, zero_point: Array) -> None:
    """Let everything but quantizers read this tensor through a quantizer and a dequantizer."""
    from onnx import helper, numpy_helper

    parameters = [f"{name}_scale", f"{name}_zero_point"]
    values = (scale, zero_point)
    proto.graph.initializer.extend(numpy_helper.from_array(item, key) for item, key in zip(values, parameters, strict=True))
    quantized, read = f"{name}_quantized", f"{name}_dequantized"
    for node in proto.graph.node:
        if node.op_type != "QuantizeLinear":
            for index, item in enumerate(node.input):
                node.input[index] = read if item == name else item
    place = next(index for index, node in enumerate(proto.graph.node) if name in node.output) + 1
    dequantize = helper.make_node("DequantizeLinear", [quantized, *parameters], [read], name=f"{name}_DequantizeLinear")
    proto.graph.node.insert(place, dequantize)
    quantize = helper.make_node("QuantizeLinear", [name, *parameters], [quantized], name=f"{name}_QuantizeLinear")
    proto.graph.node.insert(place, quantize)
