"""The pass that quantizes a torch module with Intel Neural Compressor 3 and writes it as a static int8 model in QDQ form.

Neural Compressor places and calibrates the quantizers (PT2E, rules of its x86 quantizer), torch exports the quantized graph and
ONNX Runtime's basic level folds the weights, which are stored as int8. Inputs and outputs are those of the ONNX file that the
pass was given. Three things are done around the tool:

- Its ranges are moving averages that follow the first batch most, so every batch is drawn from the whole calibration set.
- It has no 7-bit weights. Where the target wants them, the scales of the weights are doubled: min-max ranges of 7 bits.
- The file is run beside the quantized module and must answer the same but for values that fall on the border of two steps.
- Convolutions before a sum get the quantizers that ONNX Runtime's integer kernels need (``on_onnx.completion``).

Neural Compressor's other algorithms are not offered. In 3.10 on a CPU, PT2E dynamic does not export to ONNX; eager static,
SmoothQuant, GPTQ, AWQ, HQQ and AutoRound stop with an error of their own; round-to-nearest (which needs accelerate, and knows
linear layers only) is exported with float32 weights, in a file as big as the source.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgekit.compiler.calibration import BATCH_SIZE, fixed_batch
from edgekit.compiler.export import BATCH_AXIS, NOISY_LOGGERS, OPSET, flatten_outputs, quiet, read_names
from edgekit.compiler.graph import encode, facts_of, normalize, open_plain, read_onnx, run_once, seal
from edgekit.compiler.passes.base import Effort, PassContext, WorkModel
from edgekit.compiler.passes.on_onnx.completion import complete_quantizers
from edgekit.compiler.passes.on_onnx.quantize_static import find_quantization_obstacle
from edgekit.compiler.passes.on_onnx.written import Array, sample_feeds, write_step
from edgekit.compiler.qdq import count_quantized, silenced_root
from edgekit.dataset.data import Dataset, spread_indices
from edgekit.errors import ArtifactError, EdgekitError
from edgekit.schema.base import Scalar
from edgekit.schema.digest import short
from edgekit.schema.target import Int8Rules

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto
    from torch import Tensor, nn

Algorithm = Literal["pt2e-static"]
Method = Literal["minmax", "kl"]
SAMPLES: dict[Effort, int] = {"fast": 100, "default": 300, "max": 300}
PACKAGES = ("neural-compressor", "torchao", "torch", "onnx", "onnxruntime")
NEEDED = ("neural_compressor", "torchao", "prettytable", "psutil", "cpuinfo", "pydantic")
OLDEST, NEWEST = (3, 10), (4, 0)
INSTALL = "pip install 'edgekit[inc]'"
MOST_NOISE = 2.0
"""File beside quantized module, in units of the quantization's own noise: correct files are at 0 to 0.5, wrong ones at 5 up."""
NOISE_FLOOR = 1e-3
"""Of the output's range: below that, another order of sums is all there is."""


def find_package_obstacle() -> str | None:
    """Why Neural Compressor cannot be used here, or None: a part is not installed, or the version is another."""
    missing = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    if missing:
        return f"needs the package {missing[0].replace('_', '-')}, which is not installed: {INSTALL}"
    found = version("neural-compressor")
    parts = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if not OLDEST <= parts < NEWEST:
        return f"needs neural-compressor {_dotted(OLDEST)} or newer, below {_dotted(NEWEST)}; installed is {found}: {INSTALL}"
    return None


def _find_target_obstacle(rules: Int8Rules) -> str | None:
    if rules.format != "qdq":
        return f"the target wants int8 as {rules.format}; this pass writes QDQ"
    if rules.weights != "int8" or not rules.weight_symmetric:
        return "the target wants other weights than symmetric int8, which Neural Compressor's quantizer does not make"
    return None


def _dotted(parts: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in parts)


class NeuralCompressorStatic:
    """Torch module to static int8, by Neural Compressor.

    Args:
        algorithm: which of its algorithms; one today.
        method: how it finds the ranges of activations: ``minmax`` moving averages of the ends, ``kl`` by histogram.
    """

    name = "neural-compressor-pt2e"
    target_fields = ("int8",)

    def __init__(self, *, algorithm: Algorithm = "pt2e-static", method: Method = "minmax") -> None:
        self.algorithm = algorithm
        self.method = method

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:
        """Why this pass cannot run on this model, or None when it can."""
        if model.module is None:
            return "the source is an ONNX file; Neural Compressor 3 quantizes torch models"
        if not context.example_inputs:
            return "needs the torch model's example inputs"
        if obstacle := _find_target_obstacle(context.target.int8) or find_quantization_obstacle(model):
            return obstacle
        inputs, _ = read_names(model.path)
        if len(inputs) != len(context.example_inputs):
            return f"the ONNX file has {len(inputs)} inputs, the torch model takes {len(context.example_inputs)}"
        return find_package_obstacle()

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Write ``neural-compressor-pt2e.onnx``.

        Raises:
            ArtifactError: ``quantization.failed`` when Neural Compressor or the export refuses the module,
                ``quantization.nothing_quantized`` when no computing layer became int8,
                ``model.export_mismatch`` when the file answers something else than the quantized module,
                ``model.not_portable`` when it has operators outside the ONNX standard.
        """
        started = time.monotonic()
        reference = read_onnx(model.path)
        chosen = spread_indices(len(context.calibration), SAMPLES[context.effort])
        samples = context.calibration.select(chosen)
        rules = context.target.int8
        with _tool_errors(model.module):
            module = self._quantize(model.module, reference, samples, context)
            context.on_progress("exporting the quantized model", 0.6)
            examples, shapes = _example_batch(context.example_inputs, reference)
            proto = _fold(_export(module, examples, shapes, _names(reference.graph.input), _names(reference.graph.output)))
        _take_interface(proto, reference)
        feeds = sample_feeds(reference, samples)
        _check_same(proto, reference, module, feeds)
        if completed := complete_quantizers(proto, samples, rules):
            proto = seal(proto)
        notes = _describe(proto, reference, feeds, completed)
        settings: dict[str, Scalar] = {
            "algorithm": self.algorithm,
            "method": self.method,
            "weights": "int8 symmetric",
            "activations": f"{rules.activations} {'symmetric' if rules.activation_symmetric else 'asymmetric'}",
            "is_per_channel": rules.per_channel,
            "reduce_range": rules.reduce_range,
            "samples": len(samples),
            "calibration": short(context.calibration.digest),
        }
        result = write_step(
            proto,
            model,
            context,
            name=self.name,
            precision="int8",
            settings=settings,
            started=started,
            packages=PACKAGES,
            notes=notes,
        )
        context.on_progress("quantized by Neural Compressor", 1.0)
        return result

    def _quantize(self, module: Any, reference: ModelProto, samples: Dataset, context: PassContext) -> nn.Module:
        """The quantized graph module; the source's module is not touched."""
        import torch

        context.on_progress("loading Neural Compressor", 0.0)
        with _silence():
            from neural_compressor.torch.export import export
            from neural_compressor.torch.quantization import INT8StaticQuantConfig, convert, prepare

            examples, shapes = _example_batch(context.example_inputs, reference)
            graph = export(copy.deepcopy(module), examples, shapes)
            prepared = prepare(graph, INT8StaticQuantConfig(**self._config(context.target.int8)), example_inputs=examples)
            names = _names(reference.graph.input)
            size = fixed_batch(reference)
            text = f"calibrating with {len(samples)} samples"
            with torch.no_grad():
                for done, feeds in interleaved_batches(samples, size or BATCH_SIZE, is_fixed=size is not None):
                    prepared(*_to_tensors(feeds, names, context.example_inputs))
                    context.on_progress(text, 0.2 + 0.3 * done)
            converted: nn.Module = convert(prepared)
        if context.target.int8.reduce_range:
            _halve_weights(converted)
        return converted

    def _config(self, rules: Int8Rules) -> dict[str, Any]:
        return {
            "w_dtype": rules.weights,
            "w_sym": rules.weight_symmetric,
            "w_granularity": "per_channel" if rules.per_channel else "per_tensor",
            "act_dtype": rules.activations,
            "act_sym": rules.activation_symmetric,
            "act_algo": self.method,
        }


@contextmanager
def _silence() -> Iterator[None]:
    """Neural Compressor, torchao and torch log to handlers of their own; nothing of it is for the user."""
    with quiet(*NOISY_LOGGERS), silenced_root():
        yield


@contextmanager
def _tool_errors(module: Any) -> Iterator[None]:
    """Name the module in whatever the tools raise; edgekit's own errors pass."""
    try:
        yield
    except EdgekitError:
        raise
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ArtifactError(
            "quantization.failed",
            f"{type(module).__name__}: Neural Compressor cannot quantize it: {type(error).__name__}: {line[:200]}",
            hint="The other int8 candidates stand; they start from the ONNX file.",
        ) from error


def _names(items: Sequence[ValueInfoProto]) -> tuple[str, ...]:
    return tuple(item.name for item in items)


def _example_batch(examples: tuple[Tensor, ...], reference: ModelProto) -> tuple[tuple[Tensor, ...], Any]:
    """The examples with the batch axis as in the reference file: free (then of two samples, one is a constant) or fixed."""
    import torch

    if fixed_batch(reference) is not None:
        return examples, None
    axis = torch.export.Dim(BATCH_AXIS)
    batch = tuple(item if item.shape[0] > 1 else torch.cat([item, item]) for item in examples)
    return batch, tuple({0: axis} for _ in batch)


def interleaved_batches(data: Dataset, size: int, *, is_fixed: bool) -> Iterator[tuple[float, dict[str, Array]]]:
    """Batches that each span the whole data set, with the fraction done; a fixed size repeats samples to be full.

    >>> from edgekit.dataset.data import make_dataset
    >>> data = make_dataset({"x": np.arange(5)}, source="made here")
    >>> [feeds["x"].tolist() for _, feeds in interleaved_batches(data, 2, is_fixed=False)]
    [[0, 3], [1, 4], [2]]
    """
    count = -(-len(data) // size)
    for index in range(count):
        chosen = np.arange(index, len(data), count)
        chosen = np.resize(chosen, size) if is_fixed else chosen
        yield (index + 1) / count, {name: array[chosen] for name, array in data.inputs.items()}


def _to_tensors(feeds: dict[str, Array], names: Sequence[str], examples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    import torch

    return tuple(torch.from_numpy(feeds[name]).to(example.dtype) for name, example in zip(names, examples, strict=True))


def _halve_weights(module: Any) -> None:
    """7-bit weights: twice the scale of every weight, for its quantizer and its dequantizer."""
    tensors: set[str] = set()
    for node in module.graph.nodes:
        if "quantize_per" not in str(node.target) or "dequantize" in str(node.target) or node.args[0].op != "get_attr":
            continue
        if isinstance(node.args[1], float):
            for user in (node, *node.users):
                user.args = (user.args[0], 2 * user.args[1], *user.args[2:])
        else:
            tensors.add(node.args[1].target)
    for name in tensors:
        module.get_buffer(name).mul_(2)
    module.recompile()


def _export(
    module: nn.Module, examples: tuple[Tensor, ...], shapes: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> ModelProto:
    import torch.onnx

    with _silence():
        program = torch.onnx.export(
            module,
            examples,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _fold(proto: ModelProto) -> ModelProto:
    """Weights as int8: the export holds them in float32 before their quantizers, in a file bigger than the source."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="edgekit-fold-") as folder:
        path = Path(folder) / "folded.onnx"
        open_plain(encode(proto), level="basic", stored=path)
        folded = onnx.load(path)
    result = seal(normalize(folded))
    if foreign := facts_of(result).foreign_domains:
        raise ArtifactError("model.not_portable", f"folding introduced operators of {', '.join(foreign)}")
    weights = {item.name for item in result.graph.initializer}
    if any(node.op_type == "QuantizeLinear" and node.input[0] in weights for node in result.graph.node):
        raise ArtifactError(
            "quantization.failed",
            "onnxruntime did not fold the quantizers of the weights; they would be stored in float32.",
            hint="The other int8 candidates stand; they start from the ONNX file.",
        )
    return result


def _take_interface(proto: ModelProto, reference: ModelProto) -> None:
    """Inputs and outputs as the reference declares them, shapes included.

    Raises:
        ArtifactError: ``model.export_mismatch`` when a name or a type is another.
    """
    for new, old in ((proto.graph.input, reference.graph.input), (proto.graph.output, reference.graph.output)):
        found = [(item.name, item.type.tensor_type.elem_type) for item in new]
        wanted = [(item.name, item.type.tensor_type.elem_type) for item in old]
        if found != wanted:
            raise ArtifactError(
                "model.export_mismatch",
                f"the quantized export has the inputs or outputs {found}, the float32 file has {wanted}.",
                hint="The other int8 candidates stand; they start from the ONNX file.",
            )
        del new[:]
        new.extend(old)


def _check_same(proto: ModelProto, reference: ModelProto, module: nn.Module, feeds: dict[str, Array]) -> None:
    """The file against the quantized module.

    Raises:
        ArtifactError: ``model.export_mismatch`` when they differ by more than rounding.
    """
    import torch

    with torch.no_grad():
        answers = flatten_outputs(module(*(torch.from_numpy(feeds[name]) for name in _names(reference.graph.input))))
    for index, (exact, answer, found) in enumerate(
        zip(run_once(reference, feeds), answers, run_once(proto, feeds), strict=True)
    ):
        wanted = answer.numpy()
        noise = max(_rms(wanted, exact), NOISE_FLOOR * float(np.max(np.abs(exact), initial=1e-9)))
        if not _rms(found, wanted) <= MOST_NOISE * noise:
            raise ArtifactError(
                "model.export_mismatch",
                f"output {index} of the file differs from the quantized torch module by {_rms(found, wanted):.3g} (root mean "
                f"square), expected at most {MOST_NOISE:g} times the quantization's own {noise:.3g}.",
                hint="The exporter translates a quantized operator wrongly; the other int8 candidates stand.",
            )


def _rms(left: Array, right: Array) -> float:
    """Root mean square of the difference; infinite where the shapes differ."""
    if left.shape != right.shape:
        return float("inf")
    return float(np.sqrt(np.mean(np.square(left.astype(np.float64) - right)))) if left.size else 0.0


def _describe(proto: ModelProto, reference: ModelProto, feeds: dict[str, Array], completed: int) -> tuple[str, ...]:
    """Notes for the lineage.

    Raises:
        ArtifactError: ``quantization.nothing_quantized``.
    """
    done, layers = count_quantized(proto)
    if done == 0:
        raise ArtifactError(
            "quantization.nothing_quantized",
            f"none of the {layers} computing layers became int8.",
            hint="Neural Compressor's quantizer knows two-dimensional convolutions and linear layers.",
        )
    pairs = zip(run_once(reference, feeds), run_once(proto, feeds), strict=True)
    noise = min(signal_to_noise_db(left, right) for left, right in pairs)
    notes = [f"{done} of {layers} computing layers are int8"]
    if completed:
        notes.append(f"{completed} quantizer(s) added where ONNX Runtime would compute a convolution in float32")
    count = len(next(iter(feeds.values())))
    return (*notes, f"signal to quantization noise {noise:.1f} dB on {count} calibration samples")


def signal_to_noise_db(expected: Array, found: Array) -> float:
    """Power of the expected values over the power of the difference, in decibels, 0 to 120.

    >>> signal_to_noise_db(np.array([10.0]), np.array([11.0]))
    20.0
    """
    signal = float(np.sum(np.square(expected, dtype=np.float64)))
    noise = float(np.sum(np.square(expected.astype(np.float64) - found)))
    if noise <= signal * 1e-12:
        return 120.0
    return max(0.0, float(10 * np.log10(signal / noise))) if signal > 0 else 0.0
