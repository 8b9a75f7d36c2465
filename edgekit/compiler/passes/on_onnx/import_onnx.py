"""The pass that takes in the user's ONNX file: the same network, self-contained, of an operator set that tools know."""

from __future__ import annotations

import time

from edgekit.compiler.graph import facts_of, lift_opset, normalize, read_onnx
from edgekit.compiler.passes.base import PassContext, WorkModel
from edgekit.compiler.passes.on_onnx.written import write_step

PACKAGES = ("onnx", "onnx-ir")


class ImportOnnx:
    """External data and Constant nodes become initializers, metadata and doc strings go; nothing is fused or folded."""

    name = "import-onnx"
    target_fields = ()

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:  # noqa: ARG002  the protocol's signature
        """Why this pass cannot run on this model, or None when it can."""
        return None if model.format == "onnx" else "needs an ONNX file"

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Write ``import-onnx.onnx``; its precision is what the file turns out to be.

        Raises:
            ArtifactError: ``model.unloadable``, ``model.external_data``, ``model.opset``.
        """
        started = time.monotonic()
        source = read_onnx(model.path)
        before = facts_of(source)
        lifted, notes = lift_opset(source, model.path.name)
        proto = normalize(lifted)
        found = [*notes]
        if before.constants:
            found.append(f"{before.constants} Constant nodes became initializers")
        if before.inner_layers:
            found.append(f"{before.inner_layers} computing layers lie inside If, Loop or Scan subgraphs")
        if before.foreign_domains:
            found.append(f"operators outside the standard: {', '.join(before.foreign_domains)}")
        precision = "int8" if before.is_quantized else "fp16" if before.has_float16_weights else "fp32"
        return write_step(
            proto,
            model,
            context,
            name=self.name,
            precision=precision,
            settings={"opset": facts_of(proto).opset},
            started=started,
            packages=PACKAGES,
            notes=found,
        )
