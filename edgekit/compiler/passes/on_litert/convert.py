"""The pass that makes an fp32 ``.tflite`` from a torch module (litert-torch), verified against the module.

The contract stays the source's: the signature's input and output names are the source's names, the layout stays the source's
(NCHW for images; the converter inserts what transposes it needs) and values are float32. Two things differ from the ONNX file:
the batch is fixed at one sample, since litert-torch 0.10 cannot lower a free batch axis, and BatchNorm is folded.

The converter and its dependencies write progress and log lines straight to the process's stdout and stderr, from C++ too;
during the conversion they go to ``litert.log`` in the pass's folder. Importing the converter takes 5 to 9 seconds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.compiler.export import (
    NOISY_LOGGERS,
    check_match,
    flatten_outputs,
    name_inputs,
    name_outputs,
    quiet,
    random_inputs,
)
from edgekit.compiler.passes.base import PassContext, WorkModel
from edgekit.compiler.passes.on_torch.export import names_of
from edgekit.durable import write_durably
from edgekit.errors import ArtifactError
from edgekit.schema.candidate import PassStep
from edgekit.schema.digest import digest_file

if TYPE_CHECKING:
    from torch import Tensor, nn

LOG_NAME = "litert.log"
LOGGERS = (*NOISY_LOGGERS, "jax", "absl", "torchao", "litert_torch")


@contextlib.contextmanager
def captured_output(log: Path) -> Iterator[None]:
    """Send what this process writes to stdout and stderr, native code included, to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(descriptor, os.dup(descriptor)) for descriptor in (1, 2)]
    try:
        with log.open("ab") as file:
            for descriptor, _ in kept:
                os.dup2(file.fileno(), descriptor)
        with quiet(*LOGGERS):
            yield
    finally:
        for descriptor, copy in kept:
            os.dup2(copy, descriptor)
            os.close(copy)


def find_missing_package(*modules: str) -> str | None:
    """What to say when one of these modules is not installed, or None."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if not missing:
        return None
    name = missing[0].replace("_", "-")
    return f'needs the package {name}, which is not installed: pip install "edgekit[litert]" (Linux x86-64)'


def open_tflite(data: bytes) -> Any:
    """A ``.tflite`` model's only signature, to be called with inputs by name; it answers a dictionary of arrays."""
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(model_content=data, num_threads=1).get_signature_runner()


def _wrap(module: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> nn.Module:
    """The module with named inputs and a dictionary of named outputs: the converter makes them the signature's names."""
    from torch import nn

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, **feeds: Tensor) -> dict[str, Tensor]:
            results = flatten_outputs(self.module(*(feeds[name] for name in inputs)))
            return dict(zip(outputs, results, strict=True))

    Named.__module__, Named.__qualname__ = "edgekit", "Named"  # these become part of the tensors' names
    return Named().eval()


class ConvertToLiteRT:
    """Torch module to fp32 ``.tflite``."""

    name = "convert-to-litert"
    target_fields = ()

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:
        """Why this pass cannot run on this model, or None when it can."""
        if model.module is None:
            return "LiteRT conversion needs a torch source"
        if not context.example_inputs:
            return "LiteRT conversion needs the torch model's example inputs"
        return find_missing_package("litert_torch", "ai_edge_litert")

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Write ``fp32-<digest>.tflite``, verified against the module on random input.

        Raises:
            ArtifactError: ``model.conversion_failed`` or ``model.export_mismatch``.
        """
        started = time.monotonic()
        context.on_progress("loading the LiteRT converter", 0.0)
        module: nn.Module = model.module  # type: ignore[assignment]
        samples = tuple(example[:1].contiguous() for example in context.example_inputs)
        data, worst = _convert(module, samples, names_of(model), context)
        parent = digest_file(model.path) if model.path.is_file() else None
        path = context.work_dir / f"fp32-{(parent or 'sha256:source')[7:19]}.tflite"
        write_durably(path, data)
        step = PassStep(
            name=self.name,
            settings={"batch": 1, "layout": "as the source"},
            parent=parent,
            output=digest_file(path),
            seconds=time.monotonic() - started,
            versions={package: version(package) for package in ("litert-torch", "ai-edge-litert", "torch")},
            notes=(f"differs from torch by at most {worst:.2g} on random input", "batch size is fixed at 1"),
        )
        context.on_progress("converted to LiteRT", 1.0)
        return WorkModel(path=path, format="tflite", precision="fp32", lineage=(*model.lineage, step), module=module)


def _convert(
    module: nn.Module,
    samples: tuple[Tensor, ...],
    names: tuple[tuple[str, ...] | None, tuple[str, ...] | None],
    context: PassContext,
) -> tuple[bytes, float]:
    """The flatbuffer, and its largest difference to the module."""
    import torch

    module.eval()
    values = random_inputs(samples, seed=context.seed)
    with torch.no_grad():
        expected = flatten_outputs(module(*values))
    inputs = names[0] or name_inputs(module, len(samples))
    outputs = names[1] or name_outputs(expected)
    feeds = dict(zip(inputs, samples, strict=True))
    try:
        with captured_output(context.work_dir / LOG_NAME):
            import litert_torch

        context.on_progress("converting to LiteRT", 0.4)
        with captured_output(context.work_dir / LOG_NAME):
            edge_model = litert_torch.convert(_wrap(module, inputs, outputs), sample_kwargs=feeds)
            data = bytes(edge_model.model_content())
            found = open_tflite(data)(**{name: value.numpy() for name, value in zip(inputs, values, strict=True)})
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ArtifactError(
            "model.conversion_failed",
            f"{type(module).__name__}: litert-torch cannot convert it: {line[:200]}",
            hint=f"The converter's own output is in {context.work_dir.name}/{LOG_NAME}.",
        ) from error
    ordered = [found[name] for name in outputs]
    return data, check_match([tensor.numpy() for tensor in expected], ordered, what="the .tflite file")
