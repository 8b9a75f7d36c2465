"""The pass that moves scale between layers so that int8 loses less; the model answers the same in float32."""

from __future__ import annotations

import time

from edgekit.compiler.calibration import fixed_batch
from edgekit.compiler.equalize import Rule, equalize, find_folds
from edgekit.compiler.graph import check_same, read_onnx, run_once, seal
from edgekit.compiler.passes.base import PassContext, WorkModel
from edgekit.compiler.passes.on_onnx.quantize_static import find_quantization_obstacle
from edgekit.compiler.passes.on_onnx.written import sample_feeds, write_step
from edgekit.dataset.data import spread_indices

PACKAGES = ("numpy", "onnx", "onnxruntime")
SAMPLES = 64


class EqualizeChannels:
    """fp32 to fp32 with channels scaled.

    Args:
        rule: ``weights``: cross-layer equalization; ``activations``: SmoothQuant, as far as it needs no new operator.
        strength: of the rule ``activations``, 0..1.
    """

    name = "equalize-channels"
    target_fields = ()

    def __init__(self, *, rule: Rule, strength: float = 0.5) -> None:
        self.rule: Rule = rule
        self.strength = strength

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:  # noqa: ARG002  the protocol's signature
        """Why this pass cannot run on this model, or None when it can."""
        if obstacle := find_quantization_obstacle(model):
            return obstacle
        if not find_folds(read_onnx(model.path)):
            return "no two layers with only Relu or pooling between them"
        return None

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Write ``equalize-channels.onnx``.

        Raises:
            ArtifactError: ``model.changed`` when the result does not answer like the input.
        """
        started = time.monotonic()
        proto = read_onnx(model.path)
        count = max(fixed_batch(proto) or 1, min(SAMPLES, len(context.calibration)))
        data = context.calibration.select(spread_indices(len(context.calibration), count))
        equalized, places = equalize(proto, data, rule=self.rule, strength=self.strength)
        feeds = sample_feeds(proto, context.calibration)
        check_same(run_once(proto, feeds), run_once(equalized, feeds))
        return write_step(
            seal(equalized),
            model,
            context,
            name=self.name,
            precision=model.precision,
            settings={"rule": self.rule, "strength": self.strength, "samples": count},
            started=started,
            packages=PACKAGES,
            notes=(f"channels scaled at {places} places",),
        )
