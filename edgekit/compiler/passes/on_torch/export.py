"""The pass that writes a torch module as an ONNX file."""

from __future__ import annotations

import time
from importlib.metadata import version

from edgekit.compiler.export import OPSET, export_onnx, read_names
from edgekit.compiler.passes.base import PassContext, WorkModel
from edgekit.schema.artifact import ModelFormat
from edgekit.schema.candidate import PassStep
from edgekit.schema.digest import digest_file

ONNX: ModelFormat = "onnx"


def find_torch_obstacle(model: WorkModel, context: PassContext) -> str | None:
    """Why a pass over torch modules cannot run, or None."""
    if model.module is None:
        return "needs a torch source; this model is a file"
    if not context.example_inputs:
        return "needs the torch model's example inputs"
    return None


def names_of(model: WorkModel) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Input and output names to keep, where the model is an ONNX file already."""
    return read_names(model.path) if model.format == ONNX and model.path.is_file() else (None, None)


class ExportOnnx:
    """Torch module to ONNX, verified against the module."""

    name = "export-onnx"
    target_fields = ()

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:
        """Why this pass cannot run on this model, or None when it can."""
        return find_torch_obstacle(model, context)

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Write ``exported.onnx``; names stay those of the input model where it is an ONNX file.

        Raises:
            ArtifactError: ``model.export_failed`` or ``model.export_mismatch``.
        """
        started = time.monotonic()
        context.on_progress("exporting to ONNX", 0.0)
        inputs, outputs = names_of(model)
        path = context.work_dir / "exported.onnx"
        assert model.module is not None
        exported = export_onnx(model.module, context.example_inputs, path, input_names=inputs, output_names=outputs)
        step = PassStep(
            name=self.name,
            settings={"opset": OPSET, "is_batch_dynamic": exported.is_batch_dynamic},
            parent=digest_file(model.path) if model.path.is_file() else None,
            output=digest_file(path),
            seconds=time.monotonic() - started,
            versions={package: version(package) for package in ("torch", "onnx", "onnxscript")},
            notes=(f"differs from torch by at most {exported.worst_error:.2g} on random input", *exported.notes),
        )
        context.on_progress("exported to ONNX", 1.0)
        return WorkModel(path=path, format=ONNX, precision="fp32", lineage=(*model.lineage, step), module=model.module)
