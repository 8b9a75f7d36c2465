"""The pass that makes a static int8 model from a plan that the search worked out.

The plan is in the settings, so that a lineage holds everything to make the same bytes again: which nodes stay float32, the
calibrator of each activation, the steps that refined weights and biases, and the samples these steps looked at.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import TYPE_CHECKING

import msgspec

from edgekit.compiler.graph import encode, read_onnx, seal
from edgekit.compiler.lab import Lab
from edgekit.compiler.passes.base import PassContext, WorkModel
from edgekit.compiler.passes.on_onnx.quantize_static import SAMPLES, find_quantization_obstacle
from edgekit.compiler.passes.on_onnx.written import write_step
from edgekit.compiler.previous import keep_scales, read_previous
from edgekit.compiler.qdq import count_quantized, narrow_weights
from edgekit.dataset.data import Dataset, spread_indices
from edgekit.errors import ArtifactError
from edgekit.schema.digest import short

if TYPE_CHECKING:
    from onnx import ModelProto

PACKAGES = ("numpy", "onnx", "onnxruntime")
SHOWN = 6
_labs: dict[str, Lab] = {}
"""The last labs by what they are made of: the search and the pass share them."""
REMEMBERED = 2


def open_lab(
    proto: ModelProto,
    context: PassContext,
    *,
    is_per_channel: bool,
    reduce_range: bool,
    ranked: tuple[int, ...] = (),
    made: tuple[int, ...] = (),
    sweep_seconds: float = 0.0,
    threads: int = 1,
    host: str = "",
) -> Lab:
    """The lab of a model, made once."""
    samples = calibration_samples(context)
    rules = msgspec.json.encode(context.target.int8)
    settings = json.dumps([is_per_channel, reduce_range, context.seed, samples.digest, list(ranked), list(made)]).encode()
    key = hashlib.sha256(encode(proto) + rules + settings).hexdigest()
    if key not in _labs:
        while len(_labs) >= REMEMBERED:
            del _labs[next(iter(_labs))]
        lab = Lab(
            proto=proto,
            calibration=samples,
            rules=context.target.int8,
            is_per_channel=is_per_channel,
            reduce_range=reduce_range,
            seed=context.seed,
            threads=threads,
            host=host,
            sweep_seconds=sweep_seconds,
            ranked=ranked,
            made=made,
            has_histograms=context.effort != "fast",
            tell=context.on_progress,
        )
        settings = json.dumps(
            [is_per_channel, reduce_range, context.seed, samples.digest, list(lab.ranked), list(lab.made)]
        ).encode()
        _labs[hashlib.sha256(encode(proto) + rules + settings).hexdigest()] = lab
        return lab
    return _labs[key]


def calibration_samples(context: PassContext) -> Dataset:
    """The samples that ranges come from."""
    count = min(SAMPLES[context.effort], len(context.calibration))
    return context.calibration.select(spread_indices(len(context.calibration), count))


class QuantizePlanned:
    """fp32 to static int8 as planned; lists and tables are JSON texts.

    Args:
        is_per_channel: one scale per output channel of the weights, or one per tensor.
        reduce_range: 7-bit weights everywhere.
        float_nodes: names of the nodes that stay float32, a list.
        methods: calibrator by tensor; min-max where none is named.
        steps: refinements in their order, comma-separated.
        refined_float: the float32 nodes while the refinements were made; empty: ``float_nodes``.
        ranked: indices of the calibration samples that int8 degrades most, a list.
        made: indices of those that the refinements are made from, a list; empty: ``ranked``.
        seven_bit: layers whose weights use 7 bits, a list.
        previous: the previous release's quantized model, whose scales are kept where they fit; empty: none.
        previous_digest: the digest that it must have.
    """

    name = "quantize-planned"
    target_fields = ("int8",)

    def __init__(
        self,
        *,
        is_per_channel: bool,
        reduce_range: bool = False,
        float_nodes: str = "[]",
        methods: str = "{}",
        steps: str = "",
        refined_float: str = "",
        ranked: str = "[]",
        made: str = "[]",
        seven_bit: str = "[]",
        previous: str = "",
        previous_digest: str = "",
    ) -> None:
        self.is_per_channel = is_per_channel
        self.reduce_range = reduce_range
        self.float_nodes = float_nodes
        self.methods = methods
        self.steps = steps
        self.refined_float = refined_float
        self.ranked = ranked
        self.made = made
        self.seven_bit = seven_bit
        self.previous = previous
        self.previous_digest = previous_digest

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:
        """Why this pass cannot run on this model, or None when it can."""
        if context.target.int8.format != "qdq":
            return f"the target wants int8 as {context.target.int8.format}; this pass writes QDQ"
        return find_quantization_obstacle(model)

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Write ``quantize-planned.onnx``.

        Raises:
            ArtifactError: ``quantization.nothing_quantized`` when the plan leaves nothing in int8,
                ``quantization.failed`` when the quantizer refuses the model, ``previous.changed`` or
                ``previous.nothing_kept`` with scales to keep.
        """
        started = time.monotonic()
        proto = read_onnx(model.path)
        lab = open_lab(
            proto,
            context,
            is_per_channel=self.is_per_channel,
            reduce_range=self.reduce_range,
            ranked=tuple(json.loads(self.ranked)),
            made=tuple(json.loads(self.made)),
        )
        kept_float = frozenset(json.loads(self.float_nodes))
        int8 = frozenset(lab.units) - kept_float
        refined = frozenset(lab.units) - frozenset(json.loads(self.refined_float or self.float_nodes))
        methods = json.loads(self.methods)
        steps = tuple(step for step in self.steps.split(",") if step)
        overrides = lab.replay(refined, methods, steps)
        quantized = lab.build(int8, methods, overrides)
        narrow_weights(quantized, json.loads(self.seven_bit))
        done, layers = count_quantized(quantized)
        if not int8 or not done:
            raise ArtifactError(
                "quantization.nothing_quantized", f"the plan leaves none of the {layers} computing layers in int8."
            )
        notes = [f"{done} of {layers} computing layers are int8"]
        if kept_float:
            names = sorted(kept_float)
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            notes.append(f"faster or safer in fp32, by measurement: {', '.join(names[:SHOWN])}{more}")
        if steps or methods:
            notes.append(f"refined: {', '.join([*(['calibrator'] if methods else []), *steps])}")
        if self.previous:
            kept = keep_scales(quantized, lab.originals, read_previous(self.previous, self.previous_digest))
            notes.append(kept.describe())
        unused = () if self.previous else ("previous", "previous_digest")
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_") and name not in unused}
        return write_step(
            seal(quantized),
            model,
            context,
            name=self.name,
            precision="int8",
            settings={**settings, "samples": len(lab.calibration), "calibration": short(context.calibration.digest)},
            started=started,
            packages=PACKAGES,
            notes=notes,
        )
