"""ONNX Runtime's quantization tools on one model; runs in an environment of its own, without edgekit.

default     quantize_static with all its defaults, after quant_pre_process
good        what its documentation advises on x86: QDQ, U8 activations, S8 weights by channel, 7-bit weights without VNNI
percentile  the same, with ranges from percentiles of the activations
dynamic     quantize_dynamic; uint8 weights for convolutions, since the CPU has no kernel for the default there

    python peer_ort.py --model model.onnx --calibration calibration.npz --out quantized.onnx --variant good
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from peers import PeerArguments, input_names, peer_arguments, samples

VARIANTS = ("default", "good", "percentile", "dynamic")


class Reader(CalibrationDataReader):
    """The calibration samples, one at a time."""

    def __init__(self, feeds: list[dict[str, object]]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, object] | None:
        """The next sample, or None at the end."""
        return next(self._left, None)


def has_vnni() -> bool:
    """Whether this processor multiplies int8 without the saturation that 8-bit weights meet on AVX2."""
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    return any(name in flags for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def quantize(arguments: PeerArguments) -> None:
    """Write the quantized model."""
    prepared = arguments.out.with_suffix(".prepared.onnx")
    try:
        quant_pre_process(str(arguments.model), str(prepared))
    except Exception:  # noqa: BLE001  its symbolic shape inference fails on several real models; its users leave that part out
        quant_pre_process(str(arguments.model), str(prepared), skip_symbolic_shape=True)
    model = onnx.load(prepared)
    if arguments.variant == "dynamic":
        has_conv = any(node.op_type == "Conv" for node in model.graph.node)
        quantize_dynamic(prepared, arguments.out, weight_type=QuantType.QUInt8 if has_conv else QuantType.QInt8)
    else:
        reader = Reader(samples(arguments.calibration, input_names(model)))
        options = {} if arguments.variant == "default" else _advised(arguments.variant)
        quantize_static(prepared, arguments.out, reader, **options)
    prepared.unlink()


def _advised(variant: str) -> dict[str, object]:
    method = CalibrationMethod.Percentile if variant == "percentile" else CalibrationMethod.MinMax
    return {
        "quant_format": QuantFormat.QDQ,
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "per_channel": True,
        "reduce_range": not has_vnni(),
        "calibrate_method": method,
    }


if __name__ == "__main__":
    quantize(peer_arguments(sys.argv[1:], VARIANTS))
