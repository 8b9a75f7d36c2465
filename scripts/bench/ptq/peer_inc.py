"""Intel Neural Compressor's static quantization of an ONNX model; runs in an environment of its own, without edgekit.

Version 3 quantizes torch modules only: the model goes through onnx2torch, PT2E static quantization with its default settings,
and torch's ONNX exporter; ONNX Runtime's basic level then stores the weights as int8. A model that onnx2torch does not convert
ends with "needs a torch model" and the reason.

    python peer_inc.py --model model.onnx --calibration calibration.npz --out quantized.onnx
"""

from __future__ import annotations

import operator
import sys
import types
from pathlib import Path
from typing import Any

import onnx
import onnx.version_converter
import onnxruntime
import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import INT8StaticQuantConfig, convert, prepare
from peers import PeerArguments, input_names, peer_arguments, samples

VARIANTS = ("default",)
OLDER_OPSETS = (17, 13)
"""What onnx2torch knows better."""


def to_torch(path: Path) -> Any:
    """The module of an ONNX file.

    Raises:
        SystemExit: when onnx2torch does not convert it.
    """
    # onnx2torch imports torchvision for two operators of detectors; its wheel only works beside the CUDA build of torch
    vision, operators = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
    operators.roi_align = None  # type: ignore[attr-defined]
    sys.modules.update({"torchvision": vision, "torchvision.ops": operators})
    import onnx2torch  # noqa: PLC0415 - after torchvision's stand-in

    model = onnx.load(path)
    reasons = []
    for opset in (None, *OLDER_OPSETS):
        try:
            older = model if opset is None else onnx.version_converter.convert_version(model, opset)
            return _with_fixed_shapes(onnx2torch.convert(_without_flags(older)).eval())
        except Exception as error:  # noqa: BLE001 - whatever it meets is the reason
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])
    raise SystemExit(f"error: needs a torch model; onnx2torch: {reasons[0]}")


def _without_flags(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model without two flags that torch's exporter writes, that mean nothing here and that onnx2torch refuses."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        kept = [item for item in node.attribute if item.name not in {"allowzero", "noop_with_empty_axes"}]
        del node.attribute[:]
        node.attribute.extend(kept)
    return result


class FixedReshape(torch.nn.Module):
    """A reshape whose target is a constant of the model, as in ONNX: 0 is the input's own size, -1 what is left."""

    def __init__(self, shape: list[int]) -> None:
        super().__init__()
        self._shape = shape

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """The value in its new shape."""
        return value.reshape([value.shape[axis] if size == 0 else size for axis, size in enumerate(self._shape)])


def _with_fixed_shapes(module: Any) -> Any:
    """The module with its constant reshapes as such: onnx2torch looks at the values at run time, which torch.export refuses."""
    for node in list(module.graph.nodes):
        is_reshape = node.op == "call_module" and type(module.get_submodule(node.target)).__name__ == "OnnxReshape"
        if is_reshape and node.args[1].op == "get_attr":
            shape = operator.attrgetter(node.args[1].target)(module)
            module.set_submodule(node.target, FixedReshape(shape.tolist()))
            node.args = node.args[:1]
    module.recompile()
    return module


def export_graph(module: Any, feeds: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], Any]:
    """The module's graph with a free batch axis where it has one; and the example batch and axes that it took.

    Raises:
        SystemExit: when torch.export refuses it.
    """
    batch = tuple(torch.cat([feed, feed]) for feed in feeds)
    axis = torch.export.Dim("batch")
    shapes = tuple({0: axis} for _ in batch)
    for examples, axes in ((batch, shapes), (feeds, None)):
        try:
            return export(module, examples, axes), examples, axes
        except RuntimeError as error:
            print(error, file=sys.stderr)
    raise SystemExit("error: needs a torch model; torch.export refuses the module that onnx2torch makes of this one")


def quantize(arguments: PeerArguments) -> None:
    """Write the quantized model."""
    torch.set_num_threads(1)
    original = onnx.load(arguments.model)
    names = input_names(original)
    rows = [tuple(torch.from_numpy(row[name]) for name in names) for row in samples(arguments.calibration, names)]
    graph, examples, shapes = export_graph(to_torch(arguments.model), rows[0])
    prepared = prepare(graph, INT8StaticQuantConfig(), example_inputs=examples)
    with torch.no_grad():
        for row in rows:
            prepared(*row)
        quantized = convert(prepared)
    outputs = [value.name for value in original.graph.output]
    exported = arguments.out.with_suffix(".exported.onnx")
    settings: dict[str, Any] = {"input_names": names, "output_names": outputs, "dynamic_shapes": shapes, "dynamo": True}
    torch.onnx.export(quantized, examples, exported, external_data=False, verbose=False, **settings)
    fold(exported, arguments.out)
    exported.unlink()


def fold(source: Path, target: Path) -> None:
    """Write a model with its constants computed."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    quantize(peer_arguments(sys.argv[1:], VARIANTS))
