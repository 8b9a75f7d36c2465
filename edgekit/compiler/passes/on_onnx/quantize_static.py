"""The pass that makes a static int8 model in QDQ form, as the target's int8 rules say.

Ranges come from the calibration data (``edgekit.compiler.calibration``), the Q/DQ nodes from onnxruntime's quantizer. Only
operators that ONNX Runtime's CPU kernels run in int8 are quantized, and the pair at an output whose producer can answer in
float32 is left out: it would cost accuracy and save nothing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgekit.compiler.calibration import Method, collect_ranges
from edgekit.compiler.graph import facts_of, read_onnx, seal
from edgekit.compiler.passes.base import Effort, PassContext, WorkModel
from edgekit.compiler.passes.on_onnx.written import write_step
from edgekit.compiler.previous import keep_scales, read_previous
from edgekit.compiler.qdq import COMPUTING, QdqPlan, count_quantized, write_qdq
from edgekit.dataset.data import spread_indices
from edgekit.errors import ArtifactError
from edgekit.schema.digest import short

if TYPE_CHECKING:
    from onnx import ModelProto

PACKAGES = ("onnx", "onnxruntime")
SAMPLES: dict[Effort, int] = {"fast": 100, "default": 400, "max": 2000}
Kept = Literal["none", "edges"]


def find_quantization_obstacle(model: WorkModel) -> str | None:
    """Why no quantizer can start from this model, or None."""
    if model.format != "onnx":
        return "needs an ONNX model"
    facts = facts_of(read_onnx(model.path))
    if facts.is_quantized:
        return "the model is already quantized; only cleaning it up is offered"
    if facts.has_float16_weights:
        return "the weights are float16; int8 starts from a float32 model: export it in float32"
    if facts.layers == 0 and facts.inner_layers == 0:
        return "nothing to quantize: no convolution, matrix product or recurrent layer"
    if facts.inner_layers > facts.layers:
        inside = f"{facts.inner_layers} of {facts.layers + facts.inner_layers} computing layers"
        return (
            f"{inside} lie inside If, Loop or Scan subgraphs, which the quantizer does not enter; export without control flow"
        )
    return None


class QuantizeStatic:
    """fp32 to static int8.

    Args:
        is_per_channel: one scale per output channel of the weights, or one per tensor.
        method: how ranges of activations are found.
        kept: ``edges`` leaves the first and the last layer with weights in fp32.
        reduce_range: 7-bit weights; None follows the target's rule.
        previous: the previous release's quantized model, whose scales are kept where they fit; empty: none.
        previous_digest: the digest that it must have.
    """

    name = "quantize-static"
    target_fields = ("int8",)

    def __init__(
        self,
        *,
        is_per_channel: bool,
        method: Method = "minmax",
        kept: Kept = "none",
        reduce_range: bool | None = None,
        previous: str = "",
        previous_digest: str = "",
    ) -> None:
        self.is_per_channel = is_per_channel
        self.method = method
        self.kept = kept
        self.reduce_range = reduce_range
        self.previous = previous
        self.previous_digest = previous_digest

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:
        """Why this pass cannot run on this model, or None when it can."""
        if context.target.int8.format != "qdq":
            return f"the target wants int8 as {context.target.int8.format}; this pass writes QDQ"
        if self.is_per_channel and not context.target.int8.per_channel:
            return f"{context.target.name} has no kernels for one scale per channel"
        if obstacle := find_quantization_obstacle(model):
            return obstacle
        if self.kept == "edges" and not _inner_layers(read_onnx(model.path)):
            return "no layers between the first and the last one"
        return None

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Write ``quantize-static.onnx``.

        Raises:
            ArtifactError: ``quantization.nothing_quantized`` when no computing layer became int8,
                ``quantization.failed`` when the quantizer refuses the model, ``previous.changed`` or
                ``previous.nothing_kept`` with scales to keep.
        """
        from onnx import numpy_helper

        started = time.monotonic()
        proto = read_onnx(model.path)
        count = min(SAMPLES[context.effort], len(context.calibration))
        samples = context.calibration.select(spread_indices(len(context.calibration), count))
        text = f"calibrating with {count} samples"
        context.on_progress(text, 0.0)
        ranges = collect_ranges(
            proto,
            samples,
            method=self.method,
            on_progress=lambda done: context.on_progress(text, 0.9 * done),
        )
        excluded = edge_layers(proto) if self.kept == "edges" else ()
        plan = QdqPlan(
            ranges=ranges,
            rules=context.target.int8,
            is_per_channel=self.is_per_channel,
            reduce_range=self._reduces(context),
            float_nodes=excluded,
        )
        quantized = write_qdq(proto, plan)
        notes = _describe(quantized, excluded)
        if self.previous:
            originals = {item.name: np.asarray(numpy_helper.to_array(item)) for item in proto.graph.initializer}
            kept = keep_scales(quantized, originals, read_previous(self.previous, self.previous_digest))
            notes = (*notes, kept.describe())
        return write_step(
            seal(quantized),
            model,
            context,
            name=self.name,
            precision="int8",
            settings=self._settings(context, count),
            started=started,
            packages=PACKAGES,
            notes=notes,
        )

    def _reduces(self, context: PassContext) -> bool:
        return context.target.int8.reduce_range if self.reduce_range is None else self.reduce_range

    def _settings(self, context: PassContext, count: int) -> dict[str, str | int | float | bool | None]:
        rules = context.target.int8
        kept = {"previous": self.previous, "previous_digest": self.previous_digest} if self.previous else {}
        return {
            **kept,
            "weights": f"{rules.weights} {'symmetric' if rules.weight_symmetric else 'asymmetric'}",
            "activations": f"{rules.activations} {'symmetric' if rules.activation_symmetric else 'asymmetric'}",
            "is_per_channel": self.is_per_channel,
            "reduce_range": self._reduces(context),
            "method": self.method,
            "kept_fp32": self.kept,
            "samples": count,
            "calibration": short(context.calibration.digest),
        }


def edge_layers(proto: ModelProto) -> tuple[str, ...]:
    """Names of the first and the last layer that has weights."""
    weights = {item.name for item in proto.graph.initializer}
    layers = [node.name for node in proto.graph.node if node.op_type in COMPUTING and set(node.input[1:2]) & weights]
    return tuple(dict.fromkeys((layers[0], layers[-1]))) if layers else ()


def _inner_layers(proto: ModelProto) -> int:
    """How many computing layers are neither the first nor the last one with weights."""
    edges = edge_layers(proto)
    return sum(node.op_type in COMPUTING and node.name not in edges for node in proto.graph.node)


def _describe(proto: ModelProto, excluded: tuple[str, ...]) -> tuple[str, ...]:
    """Notes for the lineage.

    Raises:
        ArtifactError: ``quantization.nothing_quantized``.
    """
    done, all_layers = count_quantized(proto)
    if done == 0:
        raise ArtifactError(
            "quantization.nothing_quantized",
            f"none of the {all_layers} computing layers became int8.",
            hint="Are the weights computed inside the graph, or inside a subgraph? Export with constant weights.",
        )
    notes = [f"{done} of {all_layers} computing layers are int8"]
    if excluded:
        notes.append(f"kept in fp32: {', '.join(excluded)}")
    return tuple(notes)
