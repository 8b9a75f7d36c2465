"""The pass that makes a full-integer int8 ``.tflite`` (ai-edge-quantizer).

Weights are int8, symmetric and per output channel; activations int8, asymmetric and per tensor: the LiteRT quantization
specification. The ranges are the true minimum and maximum over the calibration samples: the library's own ``calibrate``
averages them, which clips (20 dB instead of 45 dB on a small network).

Inputs and outputs stay float32 by default, with one QUANTIZE at the start and one DEQUANTIZE at the end, so that feeds and
contract are the fp32 model's; LiteRT and LiteRT for Microcontrollers both have these kernels. ``QuantizeLiteRT(io="int8")``
leaves them out for firmware that feeds int8 itself, with the scale and zero point in the file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.passes.base import Effort, PassContext, WorkModel
from edgekit.compiler.passes.on_litert.convert import LOG_NAME, captured_output, find_missing_package, open_tflite
from edgekit.dataset.data import Dataset
from edgekit.durable import write_durably
from edgekit.errors import ArtifactError
from edgekit.schema.candidate import PassStep
from edgekit.schema.digest import digest_file, short

Array = NDArray[Any]
SAMPLES: dict[Effort, int] = {"fast": 100, "default": 400, "max": 2000}
SIGNATURE = "serving_default"
CHECKED_SAMPLES = 32


class QuantizeLiteRT:
    """fp32 ``.tflite`` to full-integer int8.

    Args:
        io: type of the inputs and outputs.
    """

    name = "quantize-litert-int8"
    target_fields = ()

    def __init__(self, *, io: Literal["float32", "int8"] = "float32") -> None:
        self.io = io

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:
        """Why this pass cannot run on this model, or None when it can."""
        if model.format != "tflite":
            return "needs a .tflite model"
        if model.precision != "fp32":
            return f"needs an fp32 model, this one is {model.precision}"
        if len(context.calibration) == 0:
            return "needs calibration data"
        return find_missing_package("ai_edge_quantizer", "ai_edge_litert")

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Calibrate, quantize and run the result on calibration samples.

        Raises:
            ArtifactError: ``model.quantization_failed`` when the quantizer refuses the model or its result does not run.
        """
        started = time.monotonic()
        samples = min(len(context.calibration), SAMPLES[context.effort])
        source = model.path.read_bytes()
        data, sqnr_db = self._quantize(source, context, samples)
        parent = digest_file(model.path)
        path = context.work_dir / f"int8-{short(parent)}.tflite"
        write_durably(path, data)
        step = PassStep(
            name=self.name,
            settings={
                "weights": "int8 symmetric per channel",
                "activations": "int8 asymmetric per tensor",
                "io": self.io,
                "range": "min-max",
                "samples": samples,
                "calibration": short(context.calibration.digest),
            },
            parent=parent,
            output=digest_file(path),
            seconds=time.monotonic() - started,
            versions={package: version(package) for package in ("ai-edge-quantizer", "ai-edge-litert")},
            notes=_describe(data, sqnr_db),
        )
        context.on_progress("quantized to int8", 1.0)
        return WorkModel(path=path, format="tflite", precision="int8", lineage=(*model.lineage, step))

    def _quantize(self, source: bytes, context: PassContext, samples: int) -> tuple[bytes, float | None]:
        context.on_progress(f"calibrating with {samples} samples", 0.0)
        try:
            with captured_output(context.work_dir / LOG_NAME):
                types = _input_types(source)
                data = _run_quantizer(source, list(_feeds(context.calibration, types, samples)), self.io)
            context.on_progress("checking the int8 model", 0.9)
            with captured_output(context.work_dir / LOG_NAME):
                checked = list(_feeds(context.calibration, types, min(samples, CHECKED_SAMPLES)))
                sqnr_db = measure_sqnr(source, data, checked) if self.io == "float32" else None
        except ArtifactError:
            raise
        except Exception as error:
            line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ArtifactError(
                "model.quantization_failed",
                f"ai-edge-quantizer cannot quantize the model: {line[:200]}",
                hint=f"The quantizer's own output is in {context.work_dir.name}/{LOG_NAME}.",
            ) from error
        return data, sqnr_db


def _input_types(source: bytes) -> dict[str, np.dtype[Any]]:
    """Type of each input of the signature, by name."""
    from ai_edge_litert.interpreter import Interpreter

    details = Interpreter(model_content=source).get_signature_runner(SIGNATURE).get_input_details()
    return {name: np.dtype(detail["dtype"]) for name, detail in details.items()}


def _feeds(data: Dataset, types: Mapping[str, np.dtype[Any]], samples: int) -> Iterator[dict[str, Array]]:
    """The first samples, one a feed, in the model's types."""
    for index in range(samples):
        yield {name: np.ascontiguousarray(data.inputs[name][index : index + 1], dtype=kind) for name, kind in types.items()}


def _run_quantizer(source: bytes, feeds: list[dict[str, Array]], io: str) -> bytes:
    from ai_edge_quantizer import algorithm_manager, calibrator, quantizer, recipe, recipe_manager
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.utils import qsv_utils

    tool = quantizer.Quantizer(bytearray(source), recipe.static_wi8_ai8())
    if io == "float32":
        for end in (TFLOperationName.INPUT, TFLOperationName.OUTPUT):
            tool.update_quantization_recipe(".*", end, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE)
    recipes = recipe_manager.RecipeManager()
    recipes.load_quantization_recipe(tool.get_quantization_recipe())
    ranges = calibrator.Calibrator(source, num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    ranges.calibrate({SIGNATURE: feeds}, recipes)
    result = tool.quantize(ranges.get_model_qsvs(), enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)


def _describe(data: bytes, sqnr_db: float | None) -> tuple[str, ...]:
    """Notes for the lineage: noise, and operators that found no int8 form."""
    notes = [] if sqnr_db is None else [f"output SQNR on calibration samples: {sqnr_db:.1f} dB"]
    if count := count_float_tensors(data):
        notes.append(f"not integer throughout: {count} inner tensors stay float32, for operators without an int8 form")
    return tuple(notes)


def count_float_tensors(data: bytes) -> int:
    """Tensors of type float32 that are neither inputs nor outputs."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    # Without delegates the list is the file's own, not XNNPACK's.
    interpreter = Interpreter(
        model_content=data, experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    ends = {detail["index"] for detail in [*interpreter.get_input_details(), *interpreter.get_output_details()]}
    return sum(
        1 for detail in interpreter.get_tensor_details() if detail["dtype"] is np.float32 and detail["index"] not in ends
    )


def measure_sqnr(source: bytes, data: bytes, feeds: list[dict[str, Array]]) -> float:
    """Output signal-to-quantization-noise ratio in dB over all outputs: 10 log10(sum y^2 / sum (y' - y)^2).

    Raises:
        ArtifactError: ``model.quantization_failed`` when an output is not finite or has another shape.
    """
    signal = noise = 0.0
    fp32, int8 = open_tflite(source), open_tflite(data)
    for feed in feeds:
        expected, found = fp32(**feed), int8(**feed)
        for name, value in expected.items():
            if found[name].shape != value.shape or not np.isfinite(found[name]).all():
                raise ArtifactError(
                    "model.quantization_failed",
                    f"output {name} of the int8 model is not finite, or has another shape than the fp32 model's.",
                    hint="This model does not stand int8 quantization with this tool; leave int8 out for it.",
                )
            signal += float(np.sum(value.astype(np.float64) ** 2))
            noise += float(np.sum((found[name].astype(np.float64) - value) ** 2))
    return float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else float("inf")
