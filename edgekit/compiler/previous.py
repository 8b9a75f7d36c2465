"""Scales of the previous release, kept where the new model's ranges still fit them.

A model that was trained a little further and is quantized anew gets slightly other scales everywhere. With the old scales most
activations' parameters do not change at all, and weights change only where they moved by a step. Whether that makes the update
smaller is measured, never assumed: a codec that rescales the old bytes may gain nothing by it.

What is kept, by name of the initializer:

- activations: scale and zero point, where the new range lies in the old one times 1.1 and is at least half of it;
- weights: the scale of each channel, where the new range is at most 1.02 times the old one and at least half of it. The weights
  are rounded again from float32, to the nearest: learned roundings belong to the scale that they were learned for.

Biases follow: their scale is the product of both. Everything else stays as it was quantized.

    >>> kept = keep_scales(quantized, originals, read_previous(Path("old/model.onnx")))   # doctest: +SKIP
    >>> kept.describe()                                                                   # doctest: +SKIP
    'kept from the previous release: 17 of 18 activation scales, 310 of 346 weight scales'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.graph import facts_of, read_onnx
from edgekit.compiler.qdq import QdqGraph, QuantizedWeight, along
from edgekit.errors import ArtifactError, EdgekitError, UsageError
from edgekit.schema.base import decode_json
from edgekit.schema.candidate import Candidate
from edgekit.schema.digest import digest_file, short

if TYPE_CHECKING:
    from onnx import ModelProto

Array = NDArray[Any]
ACTIVATION_SLACK = 1.1
WEIGHT_SLACK = 1.02
LEAST_SHARE = 0.5
"""A new range below this share of the old one would waste a bit: it gets a scale of its own."""
SEVEN_BITS, EIGHT_BITS = 64, 127
MAX_BIAS = 2**31 - 1
HINT = "Give the output folder of edgekit optimize for the previous release, or its quantized .onnx file."


@dataclass(frozen=True)
class Kept:
    """How many scales were kept, of how many."""

    activations: int
    all_activations: int
    channels: int
    all_channels: int

    def describe(self) -> str:
        """For the lineage."""
        return (
            f"kept from the previous release: {self.activations} of {self.all_activations} activation scales, "
            f"{self.channels} of {self.all_channels} weight scales"
        )


def find_previous(path: Path) -> Path:
    """The model file of the previous release.

    Args:
        path: an output folder of ``edgekit optimize``, or an ``.onnx`` file.

    Raises:
        UsageError: ``previous.unreadable`` when there is no such model, ``previous.not_quantized`` when it has no scales.
    """
    model = path
    try:
        if path.is_dir():
            record = decode_json((path / "candidate.json").read_bytes(), Candidate, name=str(path / "candidate.json"))
            model = path / (record.artifact.path if record.artifact else "model.onnx")
        facts = facts_of(read_onnx(model))
    except (OSError, EdgekitError) as error:
        reason = error.message if isinstance(error, EdgekitError) else str(error)
        raise UsageError(
            "previous.unreadable", f"--previous {path}: no model to read scales from: {reason}", hint=HINT
        ) from error
    if not facts.is_quantized:
        raise UsageError(
            "previous.not_quantized", f"--previous {path}: {model.name} is not quantized, it has no scales.", hint=HINT
        )
    return model


def read_previous(path: str, digest: str) -> QdqGraph:
    """The model of the previous release, which must be the one that the plan was made with.

    Raises:
        ArtifactError: ``previous.changed``.
    """
    found = digest_file(Path(path)) if Path(path).is_file() else "missing"
    if found != digest:
        raise ArtifactError(
            "previous.changed",
            f"{path}: it is {short(found) if found != 'missing' else found}, the scales came from {short(digest)}.",
            hint="Put the previous release's model back there.",
        )
    return QdqGraph(read_onnx(Path(path)))


def keep_scales(quantized: ModelProto, originals: Mapping[str, Array], previous: QdqGraph) -> Kept:
    """Give a finished QDQ model, in place, the old scales where they fit.

    Args:
        quantized: the model with scales of its own.
        originals: float32 weights by name.
        previous: the older model.

    Raises:
        ArtifactError: ``previous.nothing_kept`` when no scale fits.
    """
    graph = QdqGraph(quantized)
    weights = list(graph.weights())
    before = {name: graph.array(name).copy() for name in _activation_scales(graph)}
    own = {weight.scale: graph.array(weight.scale).copy() for weight in weights}
    activations = [name for name in before if _keep_activation(graph, previous, name)]
    channels = all_channels = 0
    biases: dict[str, QuantizedWeight] = {}
    olds = {weight.values: weight for weight in previous.weights()}
    for weight in weights:
        mask = _fitting_channels(graph, previous, weight, olds.get(weight.values), originals)
        if mask.any():
            _requantize(graph, weight, previous.array(weight.scale), mask, originals)
        channels, all_channels = channels + int(mask.sum()), all_channels + mask.size
        if weight.bias is not None and (mask.any() or weight.activation in activations):
            biases[weight.bias] = weight
    for weight in biases.values():
        _requantize_bias(graph, weight, own[weight.scale], before)
    if not activations and not channels:
        raise ArtifactError(
            "previous.nothing_kept",
            "no scale of the previous release has the same name and still fits.",
            hint="Is it the same network? Names of tensors must be the same.",
        )
    return Kept(len(activations), len(before), channels, all_channels)


def _activation_scales(graph: QdqGraph) -> list[str]:
    """Scales that quantize what is computed, by initializer name; a scale that several pairs share is there once."""
    names = [node.input[1] for node in graph.proto.graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2]
    return [name for name in dict.fromkeys(names) if name in graph.initializers and graph.array(name).size == 1]


def _zero_point_of(graph: QdqGraph, scale: str) -> str | None:
    """The zero point that belongs to an activation's scale; None where one scale has several."""
    found = {node.input[2] for node in graph.uses.get(scale, []) if len(node.input) > 2 and node.input[1] == scale}
    name = found.pop() if len(found) == 1 else ""
    return name if name in graph.initializers else None


def _put(graph: QdqGraph, name: str, values: Array) -> None:
    """Replace values and keep the shape: the runtime fuses pairs whose scale is a scalar, not a list of one."""
    from onnx import numpy_helper

    shaped = values.reshape(tuple(graph.initializers[name].dims))
    graph.initializers[name].CopyFrom(numpy_helper.from_array(shaped, name))


def _ends(graph: QdqGraph, scale: str, zero_point: str) -> tuple[float, float, float]:
    """Low end, high end and step of what an activation's parameters can say."""
    step, zero = float(graph.array(scale).item()), graph.array(zero_point)
    info = np.iinfo(zero.dtype)
    return (info.min - int(zero.item())) * step, (info.max - int(zero.item())) * step, step


def _keep_activation(graph: QdqGraph, previous: QdqGraph, scale: str) -> bool:
    """Take the old parameters of one activation, where they fit."""
    zero_point = _zero_point_of(graph, scale)
    if zero_point is None or not {scale, zero_point} <= previous.initializers.keys():
        return False
    old = previous.array(scale), previous.array(zero_point)
    if any(array.size != 1 for array in old) or old[1].dtype != graph.array(zero_point).dtype:
        return False
    low, high, _step = _ends(graph, scale, zero_point)
    old_low, old_high, step = _ends(previous, scale, zero_point)
    is_inside = low >= ACTIVATION_SLACK * old_low - step and high <= ACTIVATION_SLACK * old_high + step
    if not is_inside or high - low < LEAST_SHARE * (old_high - old_low):
        return False
    _put(graph, scale, old[0])
    _put(graph, zero_point, old[1])
    return True


def _limit(values: Array) -> int:
    """The largest integer that these weights may use: 7-bit weights stay within 64."""
    return SEVEN_BITS if int(np.abs(values.astype(np.int32)).max(initial=0)) <= SEVEN_BITS else EIGHT_BITS


def _fitting_channels(
    graph: QdqGraph, previous: QdqGraph, weight: QuantizedWeight, old: QuantizedWeight | None, originals: Mapping[str, Array]
) -> NDArray[np.bool_]:
    """Channels whose range fits the old scale, a mask like the scale."""
    scale = graph.array(weight.scale)
    nothing = np.zeros(scale.shape, np.bool_)
    plain = originals.get(weight.values.removesuffix("_quantized"))
    if old is None or plain is None or old.scale != weight.scale or old.axis != weight.axis:
        return nothing
    mine, theirs, old_scale = graph.array(weight.values), previous.array(old.values), previous.array(old.scale)
    is_alike = mine.dtype == theirs.dtype == np.int8 and mine.shape == theirs.shape and scale.shape == old_scale.shape
    is_centred = not _offsets(graph, weight).any() and not _offsets(previous, old).any()
    if not is_alike or not is_centred or _limit(mine) != _limit(theirs):
        return nothing
    share = scale / np.maximum(old_scale, np.finfo(np.float32).tiny)
    fits = (old_scale > 0) & (share <= WEIGHT_SLACK) & (share >= LEAST_SHARE)
    return np.asarray(fits & _has_weights(plain, weight, scale))


def _offsets(graph: QdqGraph, weight: QuantizedWeight) -> Array:
    return graph.array(weight.zero_point) if weight.zero_point is not None else np.zeros(1, np.int8)


def _has_weights(plain: Array, weight: QuantizedWeight, scale: Array) -> NDArray[np.bool_]:
    """Channels that are not all zero."""
    if scale.size == 1:
        return np.full(scale.shape, plain.any())
    axes = tuple(place for place in range(plain.ndim) if place != weight.axis % plain.ndim)
    return np.asarray(np.abs(plain).max(axis=axes) > 0)


def _requantize(
    graph: QdqGraph, weight: QuantizedWeight, old: Array, mask: NDArray[np.bool_], originals: Mapping[str, Array]
) -> None:
    """Round the weights of these channels at the old scales."""
    values = graph.array(weight.values)
    plain = originals[weight.values.removesuffix("_quantized")].astype(np.float64)
    limit = _limit(values)
    rounded = np.clip(np.round(plain / along(old.astype(np.float64), weight.axis, plain.ndim)), -limit, limit)
    wide = along(mask, weight.axis, values.ndim)
    _put(graph, weight.values, np.where(wide, rounded, values).astype(values.dtype))
    _put(graph, weight.scale, np.where(mask, old, graph.array(weight.scale)).astype(np.float32))


def _requantize_bias(graph: QdqGraph, weight: QuantizedWeight, scales: Array, before: Mapping[str, Array]) -> None:
    """Bring an int32 bias to its new scale; what it stood for, corrections included, stays.

    Args:
        graph: has the new scales of activation and weights.
        weight: the layer.
        scales: its weights' scales before.
        before: activations' scales before, by name.
    """
    assert weight.bias is not None
    node = next(node for node in graph.uses[weight.bias] if node.op_type == "DequantizeLinear")
    values, own = graph.array(weight.bias), graph.array(node.input[1])
    change = (graph.array(weight.scale).astype(np.float64) / scales).reshape(-1)
    if weight.activation is not None and weight.activation in before:
        change = change * graph.array(weight.activation).item() / before[weight.activation].item()
    factor = change if own.size > 1 else change[:1]
    new = (own.astype(np.float64).reshape(-1) * factor).reshape(own.shape)
    stood_for = values.astype(np.float64) * (own if own.size > 1 else float(own.reshape(-1)[0]))
    _put(graph, node.input[1], new.astype(np.float32))
    wide = new if own.size > 1 else float(new.reshape(-1)[0])
    _put(graph, weight.bias, np.clip(np.round(stood_for / wide), -MAX_BIAS, MAX_BIAS).astype(np.int32))
