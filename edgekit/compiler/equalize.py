"""Equalization: move scale between neighbouring layers, channel by channel, so that both fit eight bits better.

A channel's values are divided by a factor where they are made and multiplied where they are read; what lies between must let a
positive factor through (Relu, pooling). The model answers the same in float32. Two rules give the factors:

- ``weights``: the ranges of both layers' weights become equal (cross-layer equalization, Nagel et al., "Data-Free Quantization
  Through Weight Equalization and Bias Correction", 2019), again and again until nothing moves; for one scale per tensor.
- ``activations``: part of what the activations vary by goes into the weights that read them (SmoothQuant, Xiao et al., 2023).

    >>> equalized, count = equalize(proto, data, rule="activations")        # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.calibration import affordable_batch, fixed_batch, whole_batches
from edgekit.compiler.graph import encode, open_plain
from edgekit.compiler.qdq import QdqGraph, along
from edgekit.dataset.data import Dataset
from edgekit.runtime.parallel import in_order

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Array = NDArray[Any]
Rule = Literal["weights", "activations"]
PASSING = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Dropout", "Identity"})
"""What a positive factor per channel goes through."""
LAYERS = ("Conv", "Gemm", "MatMul")
WIDEST = 64.0
"""Factors stay between its inverse and it."""
ROUNDS = 20
SETTLED = 1e-3
BATCH_BYTES = 64 * 2**20
BATCH_SIZE = 16
SMALLEST = 1e-8


@dataclass(frozen=True, kw_only=True)
class Fold:
    """A tensor whose channels can be scaled: who makes it, who reads it, and through what it goes to them."""

    maker: NodeProto
    tensor: str
    """What the readers read."""
    readers: tuple[NodeProto, ...]
    is_last: bool
    """Channels are the last axis, not axis 1."""


def find_folds(proto: ModelProto) -> list[Fold]:
    """Every place where channels can be scaled without a change of the answers, in graph order."""
    graph = QdqGraph(proto)
    folds = []
    for node in proto.graph.node:
        is_layer = _is_layer(graph, node)
        if not is_layer and not (node.op_type == "LayerNormalization" and _owns(graph, node, node.input[1:])):
            continue
        is_last = node.op_type != "Conv"
        tensor = node.output[0]
        while True:
            users = graph.uses.get(tensor, [])
            if tensor in graph.outputs or not users:
                break
            if all(_is_reader(graph, user, tensor, is_last=is_last) for user in users):
                folds.append(Fold(maker=node, tensor=tensor, readers=tuple(users), is_last=is_last))
                break
            is_bias = is_layer and node.op_type == "MatMul" and len(users) == 1 and _is_bias(graph, users[0], tensor)
            if len(users) != 1 or not (is_bias or _is_passing(users[0], is_last=is_last)):
                break
            tensor = users[0].output[0]
    return folds


def _owns(graph: QdqGraph, node: NodeProto, names: Sequence[str]) -> bool:
    """Whether these are initializers that no other node reads."""
    return all(not name or (name in graph.initializers and graph.uses[name] == [node]) for name in names)


def _is_layer(graph: QdqGraph, node: NodeProto) -> bool:
    if node.op_type not in LAYERS or not _owns(graph, node, node.input[1:]):
        return False
    return node.op_type != "MatMul" or len(graph.initializers[node.input[1]].dims) == 2


def _is_passing(node: NodeProto, *, is_last: bool) -> bool:
    return node.op_type in PASSING and not (is_last and "Pool" in node.op_type) and len(node.output) == 1


def _is_bias(graph: QdqGraph, node: NodeProto, tensor: str) -> bool:
    """An addition of a constant per channel behind a matrix product."""
    others = [name for name in node.input if name != tensor]
    if node.op_type != "Add" or len(others) != 1 or not _owns(graph, node, others):
        return False
    dims = graph.initializers[others[0]].dims
    return len(dims) >= 1 and int(np.prod(dims, dtype=np.int64)) == dims[-1]


def _is_reader(graph: QdqGraph, node: NodeProto, tensor: str, *, is_last: bool) -> bool:
    """A layer that can take the factors into its weights."""
    if not _is_layer(graph, node) or node.input[0] != tensor or list(node.input).count(tensor) != 1:
        return False
    if node.op_type == "Conv":
        weight, groups = graph.initializers[node.input[1]], _number(node, "group", 1)
        return not is_last and (groups == 1 or (groups == weight.dims[0] and weight.dims[1] == 1))
    return is_last and not _number(node, "transA", 0)


def _number(node: NodeProto, name: str, default: int) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), default)


# --- scale ------------------------------------------------------------------------------------------------------------------


class Weights:
    """Initializers as float64 arrays while they are scaled, written back at the end."""

    def __init__(self, proto: ModelProto) -> None:
        self.graph = QdqGraph(proto)
        self._changed: dict[str, Array] = {}

    def get(self, name: str) -> Array:
        """The values as they stand."""
        if name not in self._changed:
            self._changed[name] = self.graph.array(name).astype(np.float64)
        return self._changed[name]

    def write(self) -> None:
        """Into the model."""
        for name, values in self._changed.items():
            self.graph.put(name, values.astype(self.graph.array(name).dtype))

    def made(self, node: NodeProto) -> Array:
        """Largest absolute weight by output channel."""
        values = np.abs(self.get(node.input[1]))
        return _largest_along(values, self._output_axis(node, values.ndim))

    def read(self, node: NodeProto) -> Array:
        """Largest absolute weight by input channel."""
        return _largest_along(np.abs(self.get(node.input[1])), self._input_axis(node))

    @staticmethod
    def _output_axis(node: NodeProto, rank: int) -> int:
        is_first = node.op_type == "Conv" or (node.op_type == "Gemm" and _number(node, "transB", 0))
        return 0 if is_first else rank - 1

    def _input_axis(self, node: NodeProto) -> int:
        if node.op_type == "Conv":
            return 0 if _number(node, "group", 1) > 1 else 1
        return 1 if node.op_type == "Gemm" and _number(node, "transB", 0) else 0

    def divide(self, node: NodeProto, factors: Array) -> None:
        """Divide what a layer makes."""
        values = self.get(node.input[1])
        self._changed[node.input[1]] = values / along(factors, self._output_axis(node, values.ndim), values.ndim)
        if len(node.input) > 2 and node.input[2]:
            self._changed[node.input[2]] = self.get(node.input[2]) / factors
        if node.op_type == "MatMul":
            for user in self.graph.uses.get(node.output[0], []):
                for name in user.input:
                    if user.op_type == "Add" and name in self.graph.initializers:
                        self._changed[name] = self.get(name) / factors

    def multiply(self, node: NodeProto, factors: Array) -> None:
        """Multiply what a layer reads."""
        values = self.get(node.input[1])
        self._changed[node.input[1]] = values * along(factors, self._input_axis(node), values.ndim)


def _largest_along(values: Array, axis: int) -> Array:
    """The largest value at each place of an axis."""
    return np.asarray(values.max(axis=tuple(place for place in range(values.ndim) if place != axis)))


def equalize(proto: ModelProto, data: Dataset, *, rule: Rule, strength: float = 0.5) -> tuple[ModelProto, int]:
    """The same model with its channels scaled, and at how many places.

    Args:
        proto: the float32 model; it is not changed.
        data: samples that tell how large the activations are.
        rule: ``weights`` or ``activations``, see the module.
        strength: of the rule ``activations``, 0..1: how much of the activations' range goes into the weights.
    """
    result = type(proto)()
    result.CopyFrom(proto)
    folds = find_folds(result)
    if not folds:
        return result, 0
    weights = Weights(result)
    if rule == "weights":
        _balance(weights, folds)
    else:
        largest = channel_maxima(proto, data, {fold.tensor: fold.is_last for fold in folds})
        for fold in folds:
            read = np.max([weights.read(reader) for reader in fold.readers], axis=0)
            _move(weights, fold, largest[fold.tensor], read, strength)
    weights.write()
    return result, len(folds)


def _balance(weights: Weights, folds: Sequence[Fold]) -> None:
    for _ in range(ROUNDS):
        most = 0.0
        for fold in folds:
            read = np.max([weights.read(reader) for reader in fold.readers], axis=0)
            factors = _move(weights, fold, weights.made(fold.maker), read, 0.5)
            most = max(most, float(np.abs(np.log(factors)).max(initial=0.0)))
        if most < SETTLED:
            return


def _move(weights: Weights, fold: Fold, made: Array, read: Array, strength: float) -> Array:
    """Apply factors of geometric mean 1, within bounds; a channel that is zero on one side stays as it is."""
    is_used = (made > SMALLEST) & (read > SMALLEST)
    factors = np.ones(made.shape)
    factors[is_used] = made[is_used] ** strength / read[is_used] ** (1 - strength)
    factors[is_used] = np.clip(factors[is_used] / np.exp(np.mean(np.log(factors[is_used]))), 1 / WIDEST, WIDEST)
    weights.divide(fold.maker, factors)
    for reader in fold.readers:
        weights.multiply(reader, factors)
    return factors


def channel_maxima(proto: ModelProto, data: Dataset, tensors: Mapping[str, bool]) -> dict[str, Array]:
    """Largest absolute value by channel of these tensors; the value says that channels are the last axis."""
    import onnx

    probed = onnx.ModelProto()
    probed.CopyFrom(proto)
    known = {item.name for item in probed.graph.output}
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in known)
    session = open_plain(encode(probed), level="all")
    size = affordable_batch(proto, data, limit=BATCH_BYTES, most=BATCH_SIZE)

    def largest(batch: tuple[int, dict[str, Array]]) -> dict[str, Array]:
        found = {}
        for (name, is_last), values in zip(tensors.items(), session.run(list(tensors), batch[1]), strict=True):
            found[name] = _largest_along(np.abs(values), values.ndim - 1 if is_last else 1)
        return found

    result: dict[str, Array] = {}
    for found in in_order(largest, whole_batches(data, size, is_fixed=fixed_batch(proto) is not None)):
        for name, values in found.items():
            result[name] = np.maximum(result[name], values) if name in result else values
    return result
