"""Sums of two products that leave int16: what x86 processors without a dot-product instruction make of an int8 model.

With AVX2 (or AVX-512 without VNNI) ONNX Runtime multiplies uint8 activations with int8 weights by VPMADDUBSW: the products of
two neighbours along the summed axis are added into a saturating int16: ``a0 * w0 + a1 * w1`` is clipped to -32768..32767. The
zero point is subtracted later: a is the stored 0..255, and only two weights of one sign with ``|w0| + |w1| >= 129`` overflow.

The rules kept here, all of them checked against ONNX Runtime's kernels on an emulated processor by scripts/bench/saturation.py:

* the summed axis is (kernel position, input channel) with the channel innermost, per group; pairs start at even places;
* padding is the zero point of the activation;
* a convolution with one input and one output channel a group has a kernel of its own that does not saturate;
* a layer that the runtime leaves in float32 (a Conv whose result is not quantized, an input that is not) does not saturate.

>>> import numpy as np
>>> cannot_saturate(np.array([[127, 1, 127, -127]], np.int8)), cannot_saturate(np.array([[100, 100]], np.int8))
(True, False)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.calibration import fixed_batch, whole_batches
from edgekit.compiler.findings import LayerSaturation
from edgekit.compiler.graph import encode, open_plain, subgraphs_of
from edgekit.compiler.qdq import QdqGraph
from edgekit.dataset.data import Dataset, spread_indices

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Array = NDArray[Any]
LOW, HIGH = -(2**15), 2**15 - 1
TOP = 255
"""The largest activation."""
PRODUCTS = 4 * 2**20
"""Sums computed at a time: int32, with temporaries about 60 MB."""
BATCH_SIZE = 8


def cannot_saturate(weights: Array) -> bool:
    """Whether no activation can make a pair of these weights overflow.

    Args:
        weights: int8 [out, k...] in the kernel's order: for a convolution (position, input channel), the channel innermost.
    """
    return not bool(_overflow_possible(_even(weights.reshape(len(weights), -1))).any())


def _even(weights: Array) -> Array:
    """With a zero behind an odd last axis, as the kernel pads it."""
    return np.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, weights.shape[-1] % 2)])


def _pairs_at_top(weights: Array) -> Array:
    """The largest absolute sum of each pair over all activations: int32 [..., k / 2]."""
    pairs = weights.astype(np.int32).reshape(*weights.shape[:-1], -1, 2)
    positive, negative = np.maximum(pairs, 0).sum(-1), np.minimum(pairs, 0).sum(-1)
    return np.asarray(TOP * np.where(positive >= -negative, positive, negative))


def _overflow_possible(weights: Array) -> Array:
    at_top = _pairs_at_top(weights)
    return np.asarray((at_top > HIGH) | (at_top < LOW))


# --- layers that run in integers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
    """A layer whose kernel sums pairs.

    ``weights`` int8 [groups, out, k], k in the kernel's order and even; ``pairs`` of one output really summed; ``data`` the
    quantized activation; ``scale`` of one unit of the integer sum, per output channel or one for all.
    """

    node: NodeProto
    name: str
    data: str
    weights: Array
    pairs: int
    scale: Array
    zero_point: int
    kernel: tuple[int, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_affected(self) -> bool:
        return bool(_overflow_possible(self.weights).any())


def _find_layers(graph: QdqGraph) -> Iterator[_Layer]:
    """Every layer whose kernel sums pairs, in graph order."""
    for node in graph.proto.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm") and _runs_in_integers(graph, node):
            layer = _read_layer(graph, node)
            if layer is not None:
                yield layer


def _runs_in_integers(graph: QdqGraph, node: NodeProto) -> bool:
    """Whether ONNX Runtime puts an integer kernel in its place: what it asks of the nodes around it."""
    if any(graph.dequantizer(name) is None for name in node.input[:2]):
        return False
    if any(name and graph.dequantizer(name) is None and name not in graph.initializers for name in node.input[2:]):
        return False  # a float32 bias is no hindrance as long as it is a constant: the runtime quantizes it
    users = graph.uses.get(node.output[0], [])
    if len(users) == 1 and users[0].op_type in ("Relu", "Clip") and users[0].output[0] not in graph.outputs:
        behind = graph.uses.get(users[0].output[0], [])
        if len(behind) == 1:
            return behind[0].op_type == "QuantizeLinear" and _is_redundant(graph, users[0], behind[0])
    if not any(user.op_type == "QuantizeLinear" for user in users):
        return node.op_type != "Conv"
    return len(users) == 1 and node.output[0] not in graph.outputs


def _is_redundant(graph: QdqGraph, clip: NodeProto, quantizer: NodeProto) -> bool:
    """Whether the quantizer itself clips as much as the Relu or Clip before it."""
    limits = [0.0, np.inf]
    if clip.op_type == "Clip":
        names = [*clip.input[1:], "", ""][:2]
        if any(name and name not in graph.initializers for name in names):
            return False
        limits = [float(graph.array(name)) if name else end for name, end in zip(names, (-np.inf, np.inf), strict=True)]
    scale = float(graph.array(quantizer.input[1]).reshape(()))
    zero_point = graph.array(quantizer.input[2]) if len(quantizer.input) > 2 else np.zeros((), np.uint8)
    info = np.iinfo(zero_point.dtype)
    low, high = (scale * (end - int(zero_point.reshape(()))) for end in (info.min, info.max))
    return low >= limits[0] - 1e-6 and high <= limits[1] + 1e-6


def _read_layer(graph: QdqGraph, node: NodeProto) -> _Layer | None:
    from onnx import helper

    data, weight = graph.makers[node.input[0]], graph.makers[node.input[1]]
    if weight.input[0] not in graph.initializers or len(data.input) < 3 or data.input[0] in graph.initializers:
        return None
    stored, zero_point = graph.array(weight.input[0]), graph.array(data.input[2])
    if stored.dtype != np.int8 or zero_point.dtype not in (np.uint8, np.int8) or zero_point.size != 1:
        return None
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    groups = int(attributes.get("group", 1))
    kernel: tuple[int, ...] = ()
    if node.op_type == "Conv":
        if stored.shape[1] == 1 and stored.shape[0] == groups:
            return None
        kernel = stored.shape[2:]
        stored = np.moveaxis(stored, 1, -1)
        stored = stored.reshape(groups, stored.shape[0] // groups, -1)
    elif stored.ndim != 2:
        return None
    else:
        stored = (stored if attributes.get("transB", 0) else stored.T)[None]
    scale = graph.array(data.input[1]).astype(np.float64).reshape(()) * graph.array(weight.input[1]).reshape(-1)
    return _Layer(
        node=node,
        name=node.name or node.output[0],
        data=data.input[0],
        weights=_even(stored),
        pairs=(stored.shape[-1] + 1) // 2,
        scale=scale * float(attributes.get("alpha", 1.0)),
        zero_point=int(_as_kernel_sees(zero_point).reshape(())),
        kernel=kernel,
        attributes=attributes,
    )


# --- which activation meets which weight -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Places:
    """Where the activations of a layer lie: ``flat[rows[r] + group * step + places[k]]`` meets weight k in row r.

    ``shape`` of the rows; their axes are those of the output without its channels (last for a matrix, second for images).
    """

    flat: Array
    rows: Array
    places: Array
    step: int
    shape: tuple[int, ...]


def _as_kernel_sees(values: Array) -> Array:
    """Stored activations as uint8: the runtime turns int8 ones into uint8 by adding 128, and their zero point with them."""
    return values if values.dtype == np.uint8 else values.view(np.uint8) ^ np.uint8(128)


def _locate(layer: _Layer, values: Array) -> _Places:
    """Lay out the stored activations [N, C, ...] or [..., K] of a layer."""
    values = _as_kernel_sees(values)
    if layer.node.op_type == "Conv":
        return _locate_images(layer, values)
    is_turned = bool(layer.attributes.get("transA", 0))
    shape = values.shape[1:] if is_turned else values.shape[:-1]
    count, depth = int(np.prod(shape)), values.shape[0 if is_turned else -1]
    along_rows, along_depth = (1, count) if is_turned else (depth, 1)
    return _Places(
        flat=values.reshape(-1),
        rows=np.arange(count) * along_rows,
        places=_padded(np.arange(depth) * along_depth),
        step=0,
        shape=shape,
    )


def _padded(places: Array) -> Array:
    """One more place for the zero weight behind an odd number of them; which activation it meets does not matter."""
    return np.pad(places, (0, len(places) % 2))


def _locate_images(layer: _Layer, values: Array) -> _Places:
    rank, sizes = len(layer.kernel), values.shape[2:]
    strides = layer.attributes.get("strides", [1] * rank)
    dilations = layer.attributes.get("dilations", [1] * rank)
    reach = [(size - 1) * step + 1 for size, step in zip(layer.kernel, dilations, strict=True)]
    pads = _pads(layer, sizes, strides, reach)
    padded = np.pad(values, [(0, 0), (0, 0), *pads], constant_values=layer.zero_point)
    area = padded.shape[2:]
    units = [int(np.prod(area[axis + 1 :])) for axis in range(rank)]
    outputs = [(size - span) // stride + 1 for size, span, stride in zip(area, reach, strides, strict=True)]
    whole, channels = int(np.prod(area)), padded.shape[1]
    rows = _grid([len(padded), *outputs], [channels * whole, *(s * unit for s, unit in zip(strides, units, strict=True))])
    group_channels = channels // len(layer.weights)
    steps = [*(d * unit for d, unit in zip(dilations, units, strict=True)), whole]
    return _Places(
        flat=padded.reshape(-1),
        rows=rows,
        places=_padded(_grid([*layer.kernel, group_channels], steps)),
        step=group_channels * whole,
        shape=(len(padded), *outputs),
    )


def _pads(layer: _Layer, sizes: tuple[int, ...], strides: list[int], reach: list[int]) -> list[tuple[int, int]]:
    rank, kind = len(sizes), layer.attributes.get("auto_pad", b"NOTSET")
    if kind == b"NOTSET":
        pads = layer.attributes.get("pads", [0] * (2 * rank))
        return list(zip(pads[:rank], pads[rank:], strict=True))
    if kind == b"VALID":
        return [(0, 0)] * rank
    totals = [max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(sizes, strides, reach, strict=True)]
    smaller = [(total // 2, total - total // 2) for total in totals]
    return smaller if kind == b"SAME_UPPER" else [(b, a) for a, b in smaller]


def _grid(counts: list[int], steps: list[int]) -> Array:
    """Sums of all combinations of multiples of the steps, the last axis fastest."""
    total = np.zeros(1, np.int64)
    for count, step in zip(counts, steps, strict=True):
        total = (total[:, None] + np.arange(count) * step).reshape(-1)
    return total


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """Sums that could overflow: int32 [pairs, rows] with the output channel of each pair, ascending."""

    channels: Array
    rows: slice
    sums: Array


def _sums(layer: _Layer, places: _Places, rows: Array, group: int) -> Iterator[_Block]:
    """The sums of all pairs that these activations could make overflow, in blocks of bounded size."""
    weights = layer.weights[group].astype(np.int32)
    channels, pairs = np.nonzero(_overflow_possible(layer.weights[group]))
    used, pairs = np.unique(pairs, return_inverse=True)
    kept = np.stack([2 * used, 2 * used + 1], -1).reshape(-1)
    first, second = weights[:, kept[0::2]][channels, pairs], weights[:, kept[1::2]][channels, pairs]
    size = max(1, PRODUCTS // max(1, len(kept)))
    for start in range(0, len(rows) if len(kept) else 0, size):
        part = slice(start, min(len(rows), start + size))
        columns = places.flat[rows[part] + (group * places.step + places.places[kept])[:, None]]
        top = columns.max(1).astype(np.int32)
        limit = top[2 * pairs] * first + top[2 * pairs + 1] * second
        chosen = np.flatnonzero((limit > HIGH) | (limit < LOW))
        step = max(1, PRODUCTS // columns.shape[1])
        for at in range(0, len(chosen), step):
            block = chosen[at : at + step]
            sums = columns[2 * pairs[block]] * first[block, None] + columns[2 * pairs[block] + 1] * second[block, None]
            yield _Block(channels=channels[block], rows=part, sums=sums)


# --- count -------------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Tally:
    pairs: int = 0
    overflowing: int = 0
    bound: int = 0
    worst: int = 0


def count_saturation(
    quantized: ModelProto, data: Dataset, *, samples: int = 32, rows: int = 256, seed: int = 0
) -> tuple[LayerSaturation, ...]:
    """Overflowing sums of every layer whose kernel sums pairs, exactly, on the activations of some samples; graph order.

    ``worst`` is a bound where no sum overflows: nothing is summed that the weights, or the largest activation of each place,
    rule out. Layers that can not saturate for another reason than their weights (see the module's rules) are left out.

    Args:
        quantized: a model in QDQ form.
        data: calibration samples.
        samples: how many of them are used, evenly spaced.
        rows: output places counted of each sample, drawn with ``seed``.
        seed: of the draw.
    """
    import onnx

    layers = list(_find_layers(QdqGraph(quantized)))
    if not layers:
        return ()
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    names = list(dict.fromkeys(layer.data for layer in layers))
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = open_plain(encode(model))
    random = np.random.default_rng(seed)
    tallies = [_Tally() for _ in layers]
    for feeds in _batches(quantized, data, samples):
        values = dict(zip(names, session.run(names, feeds), strict=True))
        for layer, tally in zip(layers, tallies, strict=True):
            _count_batch(layer, values[layer.data], tally, rows, random)
    return tuple(
        LayerSaturation(
            layer=layer.name,
            op_type=str(layer.node.op_type),
            pairs=tally.pairs,
            overflowing=tally.overflowing,
            worst=tally.worst if tally.overflowing else min(tally.bound, HIGH),
        )
        for layer, tally in zip(layers, tallies, strict=True)
    )


def _batches(proto: ModelProto, data: Dataset, samples: int) -> Iterator[dict[str, Array]]:
    chosen = data.select(spread_indices(len(data), samples))
    size = fixed_batch(proto)
    for _done, feeds in whole_batches(chosen, size or BATCH_SIZE, is_fixed=size is not None):
        yield feeds


def _count_batch(layer: _Layer, values: Array, tally: _Tally, rows: int, random: np.random.Generator) -> None:
    places = _locate(layer, values)
    chosen = _draw(places.rows, max(1, places.shape[0] if places.shape else 1), rows, random)
    groups, outputs, _depth = layer.weights.shape
    tally.pairs += len(chosen) * groups * outputs * layer.pairs
    tally.bound = max(tally.bound, int(np.abs(_pairs_at_top(layer.weights)).max(initial=0)))
    for group in range(groups):
        for block in _sums(layer, places, chosen, group):
            tally.overflowing += int(((block.sums > HIGH) | (block.sums < LOW)).sum())
            tally.worst = max(tally.worst, int(np.abs(block.sums).max()))


def _draw(rows: Array, samples: int, count: int, random: np.random.Generator) -> Array:
    """Up to ``count`` rows of each sample."""
    each = rows.reshape(samples, -1)
    if each.shape[1] <= count:
        return rows
    return random.permuted(each, axis=1)[:, :count].reshape(-1)


# --- simulate ----------------------------------------------------------------------------------------------------------------


def simulate_saturation(quantized: ModelProto, data: Dataset, *, samples: int) -> dict[str, Array]:
    """The outputs of a QDQ model, by name, as a processor without a dot-product instruction would give them.

    The graph runs in float32 between the layers that can saturate; the result of each of those is moved by what clipping takes
    from its sums. Evenly spaced samples, [samples, ...].
    """
    run = _Segments(quantized)
    parts = [run(feeds) for feeds in _batches(quantized, data, samples)]
    names = [item.name for item in quantized.graph.output]
    return {name: np.concatenate([part[name] for part in parts]) for name in names} if parts else {}


class _Segments:
    """A model cut behind every layer that can saturate, so that its result can be corrected before the rest runs."""

    def __init__(self, proto: ModelProto) -> None:
        layers = {id(layer.node): layer for layer in _find_layers(QdqGraph(proto)) if layer.is_affected}
        self._proto = proto
        self._weights = {item.name: item for item in proto.graph.initializer}
        self._outputs = [item.name for item in proto.graph.output]
        self._parts: list[tuple[list[NodeProto], _Layer | None]] = []
        nodes: list[NodeProto] = []
        for node in proto.graph.node:
            nodes.append(node)
            if id(node) in layers:
                self._parts.append((nodes, layers[id(node)]))
                nodes = []
        self._parts.append((nodes, None))
        self._sessions: dict[int, tuple[Any, list[str], list[str]]] = {}

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for one batch."""
        known = dict(feeds)
        for place, (nodes, layer) in enumerate(self._parts):
            if nodes:
                session, reads, makes = self._open(place, known)
                known.update(zip(makes, session.run(makes, {name: known[name] for name in reads}), strict=True))
            if layer is not None:
                result = layer.node.output[0]
                known[result] = known[result] + _correction(layer, known[layer.data]).astype(known[result].dtype)
            self._forget(place, known)
        return {name: known[name] for name in self._outputs}

    def _needed_after(self, place: int) -> set[str]:
        needed = set(self._outputs)
        for nodes, layer in self._parts[place + 1 :]:
            needed |= _read_by(nodes) | ({layer.data} if layer else set())
        return needed

    def _forget(self, place: int, known: dict[str, Array]) -> None:
        needed = self._needed_after(place)
        for name in [name for name in known if name not in needed]:
            del known[name]

    def _open(self, place: int, known: Mapping[str, Array]) -> tuple[Any, list[str], list[str]]:
        """A session of one part, and what it reads and makes; its inputs have the types of the first batch."""
        if place not in self._sessions:
            nodes, layer = self._parts[place]
            made = {name for node in nodes for name in node.output if name}
            wanted = self._needed_after(place) | ({layer.data, layer.node.output[0]} if layer else set())
            reads, makes = sorted((_read_by(nodes) - made) & set(known)), sorted(made & wanted)
            model = self._cut(nodes, {name: known[name].dtype for name in reads}, makes)
            self._sessions[place] = open_plain(encode(model)), reads, makes
        return self._sessions[place]

    def _cut(self, nodes: list[NodeProto], reads: Mapping[str, Any], makes: list[str]) -> ModelProto:
        import onnx
        from onnx import helper

        kinds = {name: helper.np_dtype_to_tensor_dtype(kind) for name, kind in reads.items()}
        inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
        weights = [item for name, item in self._weights.items() if name in _read_by(nodes)]
        graph = helper.make_graph(nodes, "part", inputs, [onnx.ValueInfoProto(name=name) for name in makes], weights)
        model = onnx.ModelProto(ir_version=self._proto.ir_version, graph=graph)
        model.opset_import.extend(self._proto.opset_import)
        model.functions.extend(self._proto.functions)
        return model


def _read_by(nodes: list[NodeProto]) -> set[str]:
    """What nodes read, with what the graphs inside them take from around them."""
    names = {name for node in nodes for name in node.input if name}
    for node in nodes:
        for inner in subgraphs_of(node):
            names |= _read_by(list(inner.node)) | {item.name for item in inner.output}
    return names


def _correction(layer: _Layer, values: Array) -> Array:
    """What clipping adds to the float result of a layer: float64, shaped like the result."""
    places = _locate(layer, values)
    groups, outputs, _depth = layer.weights.shape
    lost = np.zeros((groups, outputs, len(places.rows)), np.int64)
    for group in range(groups):
        for block in _sums(layer, places, places.rows, group):
            excess = np.clip(block.sums, LOW, HIGH) - block.sums
            starts = np.flatnonzero(np.diff(block.channels, prepend=-1))
            lost[group, block.channels[starts], block.rows] += np.add.reduceat(excess, starts, axis=0)
    moved = lost.reshape(groups * outputs, -1) * layer.scale.reshape(-1, 1)
    axis = 1 if layer.node.op_type == "Conv" else -1
    return np.asarray(np.moveaxis(moved.reshape(groups * outputs, *places.shape), 0, axis))
