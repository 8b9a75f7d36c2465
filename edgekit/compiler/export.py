"""Torch module to ONNX file: one self-contained file, the same bytes each time, without traces of this machine.

The batch axis is exported under the name ``batch`` where the module allows it; else the file has the example's fixed batch and
the returned record says why. The exporter's stack traces, source lines and metadata are cleared (they hold absolute paths).
The file is run by ONNX Runtime on random input and must answer what torch answers.

    >>> exported = export_onnx(module, (torch.zeros(1, 1, 28, 28),), Path("model.onnx"))  # doctest: +SKIP
    >>> exported.is_batch_dynamic                                                          # doctest: +SKIP
    True
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.durable import write_durably
from edgekit.errors import ArtifactError, DataError, EnvironmentFault

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor, nn

OPSET = 20
BATCH_AXIS = "batch"
RELATIVE_TOLERANCE = 1e-3
"""float32 sums of another order: errors seen are 1e-7 to 1e-5 of the output's range; a wrong graph is off by the range."""
NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "torch._inductor", "onnxscript", "onnx_ir", "onnx")


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """What came out: names in the order of the module's arguments and results, and what is worth knowing."""

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    is_batch_dynamic: bool
    worst_error: float
    """Largest absolute difference to torch on random input."""
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keep a framework's progress lines, warnings and prints away from the user; its exceptions pass."""
    chosen = [logging.getLogger(name) for name in loggers]
    before = [logger.level for logger in chosen]
    for logger in chosen:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(chosen, before, strict=True):
            logger.setLevel(level)


def export_onnx(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    path: Path,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> ExportedModel:
    """Export a module and check the file against it.

    Args:
        module: the module; exported in eval mode, given back in the mode it had.
        example_inputs: one tensor an input, axis 0 is the batch.
        path: the file to write.
        input_names: default: the names of ``forward``'s parameters.
        output_names: default: ``logits`` for a single output of two axes, else ``output`` or ``output_0``, ...

    Raises:
        DataError: ``data.example_inputs`` when there is none, one without a batch axis, or one that the module cannot take.
        ArtifactError: ``model.export_failed`` when torch cannot export it, ``model.export_mismatch`` when the file answers
            something else than the module.
        EnvironmentFault: ``package.missing`` when onnx or onnxscript is not installed.
    """
    import torch

    _check_examples(example_inputs)
    was_training = module.training
    module.eval()
    try:
        batch = tuple(_two_samples(example) for example in example_inputs)
        with torch.no_grad():
            expected = flatten_outputs(_call(module, batch))
        names = tuple(input_names or name_inputs(module, len(batch)))
        results = tuple(output_names or name_outputs(expected))
        proto, notes = _export(module, example_inputs, batch, names, results)
        _strip(proto)
        data = proto.SerializeToString(deterministic=True)
        shapes = (example_inputs,) if notes else (batch, tuple(example[:1] for example in example_inputs))
        worst = max(_verify(module, data, examples, names, path.name) for examples in shapes)
    finally:
        module.train(was_training)
    write_durably(path, data)
    return ExportedModel(path=path, inputs=names, outputs=results, is_batch_dynamic=not notes, worst_error=worst, notes=notes)


def read_names(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of an ONNX file's inputs and outputs.

    Raises:
        ArtifactError: ``model.unloadable`` when it is not an ONNX file.
    """
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:
        raise ArtifactError("model.unloadable", f"{path.name}: not a readable ONNX file: {error}.") from error
    weights = {item.name for item in graph.initializer}
    return tuple(item.name for item in graph.input if item.name not in weights), tuple(item.name for item in graph.output)


def _check_examples(examples: tuple[Tensor, ...]) -> None:
    if not examples:
        raise DataError(
            "data.example_inputs",
            "the torch model has no example inputs.",
            hint="Give a function example_inputs() beside the factory; it returns a tuple of tensors, batch axis first.",
        )
    for index, example in enumerate(examples):
        if example.ndim == 0 or example.shape[0] == 0:
            raise DataError(
                "data.example_inputs",
                f"example input {index}: shape is {tuple(example.shape)}, expected a batch axis of at least 1 first.",
                hint="Give each example as a batch, for example torch.zeros(1, 3, 224, 224).",
            )


def _call(module: nn.Module, batch: tuple[Tensor, ...]) -> Any:
    """The module's answer to two samples; shapes that it cannot take are the caller's."""
    try:
        return module(*batch)
    except Exception as error:
        shapes = ", ".join(str(list(example.shape)) for example in batch)
        raise DataError(
            "data.example_inputs",
            f"the torch model cannot run inputs of shape {shapes}: {type(error).__name__}: {error}.",
            hint="Check example_inputs() or --input: the batch axis comes first, for example --input name=1,3,224,224.",
        ) from error


def _two_samples(example: Tensor) -> Tensor:
    """The example with at least two samples: a batch of one would be taken for a constant."""
    import torch

    return example if example.shape[0] > 1 else torch.cat([example, example])


def name_inputs(module: nn.Module, count: int) -> tuple[str, ...]:
    """The names of ``forward``'s first parameters."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in inspect.signature(module.forward).parameters.values() if parameter.kind in kinds]
    return tuple(names[:count]) if len(names) >= count else tuple(f"input_{index}" for index in range(count))


def name_outputs(outputs: Sequence[Tensor]) -> tuple[str, ...]:
    """Default names of the outputs."""
    if len(outputs) == 1:
        return ("logits" if outputs[0].ndim == 2 and outputs[0].shape[1] > 1 else "output",)
    return tuple(f"output_{index}" for index in range(len(outputs)))


def flatten_outputs(outputs: Any) -> list[Tensor]:
    """A module's result as a flat list of tensors, in the order the exporter uses."""
    from torch.utils import _pytree

    return [leaf for leaf in _pytree.tree_leaves(outputs) if hasattr(leaf, "shape")]


def _export(
    module: nn.Module, single: tuple[Tensor, ...], batch: tuple[Tensor, ...], inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> tuple[ModelProto, tuple[str, ...]]:
    """The model with a dynamic batch axis, or with the example's and a note why."""
    import torch

    try:
        axis = torch.export.Dim(BATCH_AXIS)
        proto = _run_exporter(module, batch, inputs, outputs, tuple({0: axis} for _ in batch))
        if _is_batch_free(proto):
            return proto, ()
        reason = "the module only takes the batch size that it is exported with"
    except EnvironmentFault:
        raise
    except Exception as error:  # noqa: BLE001  the exporter raises anything; the second attempt decides
        reason = _first_line(error)
    try:
        proto = _run_exporter(module, single, inputs, outputs, None)
    except Exception as error:
        raise ArtifactError(
            "model.export_failed",
            f"{type(module).__name__}: torch cannot export it to ONNX: {_first_line(error)}",
            hint="torch.onnx.export(module, inputs, dynamo=True) shows the whole report; often it is control flow on values.",
        ) from error
    size = single[0].shape[0]
    return proto, (f"batch size is fixed at {size}: the export with a free batch axis failed ({reason})",)


def _is_batch_free(proto: ModelProto) -> bool:
    """Whether the batch axis of every input is still a name: the exporter turns it into a number without a word."""
    dims = [item.type.tensor_type.shape.dim for item in proto.graph.input]
    return all(len(dim) > 0 and dim[0].HasField("dim_param") for dim in dims)


def _run_exporter(
    module: nn.Module, args: tuple[Tensor, ...], inputs: tuple[str, ...], outputs: tuple[str, ...], shapes: Any
) -> ModelProto:
    try:
        import onnxscript  # noqa: F401
        import torch.onnx
    except ImportError as error:
        raise EnvironmentFault(
            "package.missing", f"the ONNX export needs the package {error.name}.", hint='pip install "edgekit[optimize]"'
        ) from error
    with quiet(*NOISY_LOGGERS):
        program = torch.onnx.export(
            module,
            args,
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


def _first_line(error: BaseException) -> str:
    """The first telling line of an exporter's report, without absolute paths."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    line = next((line for line in lines if "Error" in line), lines[0] if lines else type(error).__name__)
    return re.sub(r"/[^\s:'\"]*/", "", line)[:200]


def _strip(proto: ModelProto) -> None:
    """Clear metadata, doc strings and the producer's version: they hold paths and source lines, or change between runs."""
    proto.producer_name, proto.producer_version, proto.doc_string, proto.domain = "edgekit", "", "", ""
    del proto.metadata_props[:]
    graphs: list[Any] = [proto.graph, *proto.functions]
    while graphs:
        graph = graphs.pop()
        graph.doc_string = ""
        del graph.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            for attribute in node.attribute:
                attribute.doc_string = ""
                graphs.extend([attribute.g] if attribute.HasField("g") else [])
                graphs.extend(attribute.graphs)
        for field in ("value_info", "input", "output", "initializer"):
            for item in getattr(graph, field, []):
                if hasattr(item, "metadata_props"):
                    del item.metadata_props[:]
                if hasattr(item, "doc_string"):
                    item.doc_string = ""


def random_inputs(examples: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Normal random values for float inputs; the example's own values, which are known to be valid, for the others."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(example.shape, generator=generator).to(example.dtype) if example.is_floating_point() else example
        for example in examples
    )


def check_match(expected: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]], *, what: str) -> float:
    """The largest absolute difference, which must be small beside the output's range.

    Raises:
        ArtifactError: ``model.export_mismatch`` when a shape or a value differs.
    """
    worst = 0.0
    hint = "The model does something that the converter translates wrongly; report it with the model's source."
    if len(expected) != len(found):
        raise ArtifactError(
            "model.export_mismatch", f"{what}: gives {len(found)} outputs, torch gives {len(expected)}.", hint=hint
        )
    for index, (left, right) in enumerate(zip(expected, found, strict=True)):
        if left.shape != right.shape:
            raise ArtifactError(
                "model.export_mismatch", f"{what}: output {index} has shape {right.shape}, torch gives {left.shape}.", hint=hint
            )
        if left.size == 0:
            continue
        error = float(np.max(np.abs(left.astype(np.float64) - right.astype(np.float64))))
        limit = RELATIVE_TOLERANCE * max(1e-3, float(np.max(np.abs(left.astype(np.float64)))))
        if not error <= limit:
            raise ArtifactError(
                "model.export_mismatch",
                f"{what}: output {index} differs from torch by {error:.3g} on random input, expected at most {limit:.3g}.",
                hint=hint,
            )
        worst = max(worst, error)
    return worst


def _verify(module: nn.Module, data: bytes, examples: tuple[Tensor, ...], names: tuple[str, ...], what: str) -> float:
    """Run the file and the module on the same random input."""
    import onnxruntime
    import torch

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    values = random_inputs(examples, seed=0)
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in flatten_outputs(module(*values))]
    used = {node.name for node in session.get_inputs()}
    feeds = {name: value.numpy() for name, value in zip(names, values, strict=True) if name in used}
    return check_match(expected, session.run(None, feeds), what=what)
