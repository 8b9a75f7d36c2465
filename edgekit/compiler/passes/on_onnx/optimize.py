"""The pass that cleans and fuses an fp32 graph, with portable operators only."""

from __future__ import annotations

import time

from edgekit.compiler.graph import clean, facts_of, read_onnx
from edgekit.compiler.passes.base import PassContext, WorkModel
from edgekit.compiler.passes.on_onnx.written import sample_feeds, write_step

PACKAGES = ("onnx", "onnx-ir", "onnxscript", "onnxruntime")


class OptimizeGraph:
    """Constant folding, BatchNorm folding, dead code, identities, portable fusions; every step is checked on samples."""

    name = "optimize-graph"
    target_fields = ()

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:  # noqa: ARG002  the protocol's signature
        """Why this pass cannot run on this model, or None when it can."""
        return None if model.format == "onnx" else "needs an ONNX model"

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Write ``optimize-graph.onnx``; the precision stays.

        Raises:
            ArtifactError: when the input cannot be read or run.
        """
        started = time.monotonic()
        proto = read_onnx(model.path)
        before = facts_of(proto)
        cleaned, notes = clean(proto, sample_feeds(proto, context.calibration))
        after = facts_of(cleaned)
        nodes = f"{sum(before.operators.values())} -> {sum(after.operators.values())} nodes"
        return write_step(
            cleaned,
            model,
            context,
            name=self.name,
            precision=model.precision,
            settings={"level": "basic"},
            started=started,
            packages=PACKAGES,
            notes=(nodes, *notes),
        )
