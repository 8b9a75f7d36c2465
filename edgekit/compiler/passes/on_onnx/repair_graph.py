"""The pass that mends in a QDQ file what the runtime's own graph shows: shared dequantizers, signs, pairs around nothing."""

from __future__ import annotations

import time

from edgekit.compiler.graph import facts_of, read_onnx, seal
from edgekit.compiler.passes.base import PassContext, WorkModel
from edgekit.compiler.passes.on_onnx.written import write_step
from edgekit.compiler.repair import repair_fully
from edgekit.errors import ArtifactError

PACKAGES = ("numpy", "onnx", "onnxruntime")


class RepairGraph:
    """int8 in QDQ form to the same model, in a form that this runtime runs in integers."""

    name = "repair-graph"
    target_fields = ()

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:  # noqa: ARG002  the protocol's signature
        """Why this pass cannot run on this model, or None when it can."""
        if model.format != "onnx":
            return "needs an ONNX model"
        return None if facts_of(read_onnx(model.path)).is_quantized else "the model is not quantized"

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Write ``repair-graph.onnx``.

        Raises:
            ArtifactError: ``repair.nothing`` when the audit finds nothing that can be mended.
        """
        started = time.monotonic()
        proto, notes = repair_fully(read_onnx(model.path))
        if not notes:
            raise ArtifactError("repair.nothing", "the runtime's graph shows nothing that can be repaired in the file.")
        return write_step(
            seal(proto),
            model,
            context,
            name=self.name,
            precision=model.precision,
            settings={},
            started=started,
            packages=PACKAGES,
            notes=notes,
        )
