"""Better int8 weights and biases for a chosen plan: per-channel clipping, error feedback in rounding, bias correction.

Each function takes a simulation with the plan's switches on and gives *overrides*: new values for initializers of the QDQ
graph. The simulation takes them as they are, so that a step is measured before it is kept; :func:`apply` writes them into the
model.

Sources: clipping by squared error per channel (as in OCTAV, Sakr et al. 2022, here by search); rounding with error feedback
through the inverse Hessian of the layer's inputs (GPTQ, Frantar et al. 2023, the fast form of Optimal Brain Quantization);
sequential bias correction (Nagel et al., "Data-Free Quantization", 2019, with means from data).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.adaround import learn_rounding, output_error
from edgekit.compiler.qdq import QdqGraph, QuantizedWeight, along
from edgekit.compiler.simulate import Probe, Simulator

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Array = NDArray[Any]
Overrides = dict[str, Array]
SHRINKS = np.linspace(0.5, 1.0, 26)
MAX_INPUTS = 2304
"""Layers with more inputs per output than this are not rounded with feedback: the Hessian has that many rows."""
ROWS = 4096
"""Input vectors that a layer's Hessian is made of."""
DAMPING = 0.01
CHUNKS = 12
"""Layers are rounded in so many groups, front to back; each group sees the inputs that the groups before it make."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a step works on: a simulation with the ``switches`` on, the layers that it may change, what was changed before."""

    simulator: Simulator
    graph: QdqGraph
    originals: Mapping[str, Array]
    layers: Collection[str]
    switches: Collection[str]
    overrides: Mapping[str, Array]
    seed: int = 0

    @property
    def nodes(self) -> dict[str, NodeProto]:
        """Nodes of the QDQ graph by name."""
        return {node.name: node for node in self.graph.proto.graph.node}


def fit_scales(graph: QdqGraph, originals: Mapping[str, Array], layers: Collection[str]) -> Overrides:
    """Per-channel weight scales of least squared error; the clipped outliers pay for finer steps elsewhere."""
    overrides: Overrides = {}
    for weight in graph.weights():
        plain = originals.get(weight.values.removesuffix("_quantized"))
        if weight.layer not in layers or plain is None or graph.array(weight.values).dtype != np.int8:
            continue
        old = graph.array(weight.scale).astype(np.float64)
        limit = int(np.abs(graph.array(weight.values).astype(np.int32)).max(initial=1))
        best_scale, best_error = old.copy(), np.full(old.shape, np.inf)
        for share in SHRINKS[::-1]:
            scale = old * share
            wide = along(scale, weight.axis, plain.ndim)
            error = (np.clip(np.round(plain / wide), -limit, limit) * wide - plain) ** 2
            axes = tuple(place for place in range(plain.ndim) if place != weight.axis % plain.ndim)
            total = error.sum(axis=axes) if old.ndim and old.size > 1 else np.asarray(error.sum()).reshape(old.shape)
            better = total < best_error * (1 - 1e-9)
            best_scale, best_error = np.where(better, scale, best_scale), np.where(better, total, best_error)
        wide = along(best_scale, weight.axis, plain.ndim)
        overrides[weight.scale] = best_scale.astype(np.float32)
        overrides[weight.values] = np.clip(np.round(plain / wide), -limit, limit).astype(np.int8)
    return overrides


def round_with_feedback(setting: Setting) -> Overrides:
    """Round the weights of each layer one input at a time; the error made so far is taken into the inputs still to come."""
    return _round_again(setting, lambda _now, weights, steps, hessian, limit: _feed_back(weights, steps, hessian, limit))


def learn_roundings(setting: Setting) -> Overrides:
    """AdaRound of each layer; where its output error is no less than before, the layer keeps its integers."""

    def learn(now: Array, weights: Array, steps: Array, hessian: Array, limit: int) -> Array:
        learned = learn_rounding(weights, steps, hessian, limit)
        is_better = output_error(learned, weights, steps, hessian) < output_error(now, weights, steps, hessian)
        return learned if is_better else now

    return _round_again(setting, learn)


Rounding = Callable[[Array, Array, Array, Array, int], Array]
"""Integers from integers so far, weights, steps [groups, outputs, k], Gram matrix of the inputs, and the largest integer."""


def _round_again(setting: Setting, rounding: Rounding) -> Overrides:
    """New integers for each layer, front to back."""
    graph, nodes = setting.graph, setting.nodes
    weights = [item for item in graph.weights() if item.layer in setting.layers and graph.array(item.values).dtype == np.int8]
    changed: Overrides = {}
    for chunk in _chunks(weights):
        current = {**setting.overrides, **changed}
        hessians = _hessians(setting, chunk, nodes, current)
        for item in chunk:
            plain = setting.originals.get(item.values.removesuffix("_quantized"))
            if plain is None or item.layer not in hessians:
                continue
            stored = graph.array(item.values)
            scale = np.asarray(current.get(item.scale, graph.array(item.scale)), dtype=np.float64)
            limit = max(64, int(np.abs(stored.astype(np.int32)).max(initial=1)))
            steps = np.broadcast_to(along(scale, item.axis, plain.ndim), plain.shape).astype(np.float64)
            now = np.asarray(current.get(item.values, stored), dtype=np.float64)
            hessian = hessians[item.layer]
            node, groups = nodes[item.layer], len(hessian)
            before, exact = _flatten(now, node, groups), _flatten(plain.astype(np.float64), node, groups)
            integers = rounding(before, exact, _flatten(steps, node, groups), hessian, limit)
            changed[item.values] = _unflatten(integers, node, plain.shape)
    return changed


def _hessians(
    setting: Setting, chunk: Sequence[QuantizedWeight], nodes: Mapping[str, NodeProto], overrides: Mapping[str, Array]
) -> dict[str, Array]:
    """X^T X [groups, k, k] of each layer's inputs in the order of its flattened weights."""
    generator = np.random.default_rng(setting.seed)
    inputs = {item.layer: nodes[item.layer].input[0] for item in chunk}
    probe = setting.simulator.probe(dict.fromkeys(inputs.values()))
    found: dict[str, Array] = {}
    for values in probe.run(setting.switches, overrides):
        for item in chunk:
            plain = setting.originals.get(item.values.removesuffix("_quantized"))
            if plain is None or inputs[item.layer] not in values:
                continue
            rows = _input_rows(values[inputs[item.layer]], nodes[item.layer], plain, generator)
            if rows is None:
                continue
            product = np.matmul(rows.transpose(0, 2, 1), rows).astype(np.float64)
            found[item.layer] = found[item.layer] + product if item.layer in found else product
    return found


def _input_rows(data: Array, node: NodeProto, weight: Array, generator: np.random.Generator) -> Array | None:
    """Input vectors [groups, rows, k] of a layer; None where they are too wide, or the operator has another form."""
    from onnx import helper

    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type in ("MatMul", "Gemm"):
        is_plain = weight.ndim == 2 and weight.shape[0 if not attributes.get("transB") else 1] <= MAX_INPUTS
        if not is_plain or attributes.get("transA"):
            return None
        rows = data.reshape(-1, data.shape[-1])
        chosen = generator.permutation(len(rows))[:ROWS]
        return np.asarray(rows[chosen][None])
    if node.op_type != "Conv" or data.ndim != 4 or int(np.prod(weight.shape[1:])) > MAX_INPUTS:
        return None
    return _patches(data, attributes, weight.shape, generator)


def _patches(
    data: Array, attributes: Mapping[str, Any], shape: tuple[int, ...], generator: np.random.Generator
) -> Array | None:
    """Random patches [groups, rows, channels x height x width] under a convolution's window."""
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    groups = int(attributes.get("group", 1))
    kernel = shape[2:]
    strides = attributes.get("strides", [1, 1])
    dilations = attributes.get("dilations", [1, 1])
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    padded = np.pad(data, ((0, 0), (0, 0), (top, bottom), (left, right)))
    height = (padded.shape[2] - (kernel[0] - 1) * dilations[0] - 1) // strides[0] + 1
    width = (padded.shape[3] - (kernel[1] - 1) * dilations[1] - 1) // strides[1] + 1
    count = min(ROWS // 4, len(data) * height * width)
    places = generator.choice(len(data) * height * width, count, replace=False)
    sample, place = np.divmod(places, height * width)
    row, column = np.divmod(place, width)
    rows = np.empty((count, data.shape[1], *kernel), np.float32)
    for y in range(kernel[0]):
        for x in range(kernel[1]):
            rows[:, :, y, x] = padded[sample, :, row * strides[0] + y * dilations[0], column * strides[1] + x * dilations[1]]
    return np.ascontiguousarray(rows.reshape(count, groups, -1).transpose(1, 0, 2))


def _is_transposed(node: NodeProto) -> bool:
    """Whether a layer's weights have their inputs first."""
    return node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    )


def _flatten(values: Array, node: NodeProto, groups: int) -> Array:
    """A tensor of the weights' shape as [groups, outputs, k]."""
    rows = values.T if _is_transposed(node) else values
    return rows.reshape(groups, rows.shape[0] // groups, -1)


def _unflatten(integers: Array, node: NodeProto, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """[groups, outputs, k] in the weights' shape."""
    values = integers.reshape(shape[::-1]).T if _is_transposed(node) else integers.reshape(shape)
    return np.ascontiguousarray(values).astype(np.int8)


def _feed_back(weights: Array, steps: Array, hessian: Array, limit: int) -> Array:
    """Integers [groups, outputs, k]: round column after column, spread each error over the columns to come (Cholesky form).

    Args:
        weights: float [groups, outputs, k].
        steps: of the integers, the same shape.
        hessian: [groups, k, k].
        limit: the largest integer.
    """
    count = weights.shape[2]
    diagonal = np.diagonal(hessian, axis1=1, axis2=2)
    matrix = hessian.copy()
    places = np.arange(count)
    matrix[:, places, places] += np.where(diagonal <= 0, 1.0, 0.0) + DAMPING * diagonal.mean(axis=1, keepdims=True) + 1e-9
    order = np.argsort(-diagonal, axis=1, kind="stable")
    permuted = np.take_along_axis(np.take_along_axis(matrix, order[:, :, None], 1), order[:, None, :], 2)
    upper = np.linalg.cholesky(np.linalg.inv(permuted)).transpose(0, 2, 1)
    left = np.take_along_axis(weights, order[:, None, :], 2)
    sizes = np.take_along_axis(steps, order[:, None, :], 2)
    integers = np.empty_like(left)
    for column in range(count):
        value = left[:, :, column]
        integers[:, :, column] = np.clip(np.round(value / sizes[:, :, column]), -limit, limit)
        error = (value - integers[:, :, column] * sizes[:, :, column]) / upper[:, column, column, None]
        left[:, :, column + 1 :] -= error[:, :, None] * upper[:, None, column, column + 1 :]
    result = np.empty_like(integers)
    np.put_along_axis(result, np.broadcast_to(order[:, None, :], integers.shape), integers, 2)
    return result


def correct_biases(setting: Setting) -> Overrides:
    """Shift each bias by the mean error of its channel, front to back; biases as float32 by their tensor's name."""
    nodes = setting.nodes
    weights = [item for item in setting.graph.weights() if item.layer in setting.layers and item.bias is not None]
    if not weights:
        return {}
    results = {item.layer: nodes[item.layer].output[0] for item in weights}
    probe = setting.simulator.probe([name for out in results.values() for name in (f"{out}/unclipped", out)])
    seen = {layer: f"{out}/unclipped" if f"{out}/unclipped" in probe.tensors else out for layer, out in results.items()}
    feeds = Feeds(probe=probe, nodes=nodes)
    wanted = feeds.means(seen, (), {})
    biases: Overrides = {}
    for item in weights:
        found = feeds.means({item.layer: seen[item.layer]}, setting.switches, {**setting.overrides, **biases})
        name = nodes[item.layer].input[2]
        current = setting.overrides.get(name, setting.simulator.initializer(name))
        shift = wanted[item.layer] - found[item.layer]
        if current is not None and current.shape == shift.shape and np.isfinite(shift).all():
            biases[name] = (current + shift).astype(np.float32)
    return biases


@dataclass(frozen=True, kw_only=True)
class Feeds:
    """Means of inner tensors."""

    probe: Probe
    nodes: Mapping[str, NodeProto]

    def means(self, tensors: Mapping[str, str], switches: Collection[str], overrides: Mapping[str, Array]) -> dict[str, Array]:
        """Mean of each layer's output by channel: axis 1 of a convolution, the last axis of a matrix product."""
        totals: dict[str, Array] = {}
        counts: dict[str, int] = {}
        for values in self.probe.run(switches, overrides, wanted=dict.fromkeys(tensors.values())):
            for layer, name in tensors.items():
                array = values[name]
                channel = 1 if self.nodes[layer].op_type.startswith("Conv") else array.ndim - 1
                axes = tuple(axis for axis in range(array.ndim) if axis != channel)
                total = array.sum(axis=axes, dtype=np.float64)
                totals[layer] = totals[layer] + total if layer in totals else total
                counts[layer] = counts.get(layer, 0) + array.size // array.shape[channel]
        return {layer: totals[layer] / counts[layer] for layer in totals}


def _chunks(items: Sequence[QuantizedWeight]) -> list[Sequence[QuantizedWeight]]:
    size = max(1, -(-len(items) // CHUNKS))
    return [items[start : start + size] for start in range(0, len(items), size)]


def apply(proto: ModelProto, overrides: Mapping[str, Array], originals: Mapping[str, Array]) -> None:
    """Write overrides into a QDQ model in place; int32 biases are made anew for changed scales and shifted biases."""
    graph = QdqGraph(proto)
    nodes = {node.name: node for node in proto.graph.node}
    for weight in graph.weights():
        for name in (weight.values, weight.scale):
            if name in overrides:
                graph.put(name, overrides[name])
        bias = nodes[weight.layer].input[2] if len(nodes[weight.layer].input) > 2 else ""
        if weight.bias is None or weight.activation is None or not ({weight.scale, bias} & set(overrides)):
            continue
        plain = overrides.get(bias, originals.get(bias))
        if plain is None:
            continue
        scale = (graph.array(weight.activation) * graph.array(weight.scale)).astype(np.float32)
        node = graph.makers[bias]
        stored = graph.array(node.input[1])
        graph.put(node.input[1], np.broadcast_to(scale.reshape(-1), stored.reshape(-1).shape).reshape(stored.shape))
        bounds = np.iinfo(np.int32)
        values = np.round(plain.astype(np.float64) / np.maximum(scale.astype(np.float64), 1e-30))
        graph.put(weight.bias, np.clip(values, bounds.min, bounds.max).astype(np.int32))
