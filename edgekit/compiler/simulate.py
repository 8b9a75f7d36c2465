"""Quantization simulated in float32 with a switch at every quantizer, so that one session answers for every plan.

The graph is the one that :func:`edgekit.compiler.qdq.write_qdq` writes with everything in int8. Each Q/DQ pair stands in a
branch that a switch takes or leaves, so that those that are off cost nothing; a quantized weight is fed in place of the float32
one. A run with some switches on is what the int8 kernels would answer on any machine that sums products without overflow:
rounding is done in Q and DQ alone, the sums of integers below 2^24 are exact in float32. Biases stay float32 (their int32
rounding is far below the rest).

    >>> simulator = Simulator(proto, quantized, samples)                      # doctest: +SKIP
    >>> simulator.noise({"conv_1"})                                           # doctest: +SKIP
    0.00021
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.calibration import fixed_batch, whole_batches
from edgekit.compiler.graph import encode
from edgekit.compiler.qdq import FLOAT_ANSWERING, QUANTIZED_OPERATORS, QdqGraph, along
from edgekit.dataset.data import Dataset
from edgekit.runtime.ort import load_onnxruntime
from edgekit.runtime.parallel import in_order

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

Array = NDArray[Any]
BATCH_SIZE = 16
SWITCH = "edgekit.on."
NO_NOISE = 1e-20


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A node that can be int8: the switches of its activations (data in, result out) and of its weights.

    The result of a matrix product is not among them: its kernel can answer in float32, and what reads it decides.
    """

    name: str
    op_type: str
    activations: tuple[str, ...]
    weights: tuple[str, ...]

    @property
    def switches(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.activations, *self.weights)


class Sessions:
    """The model with switches, opened when it is first needed; simulations on different samples share it."""

    def __init__(self, switched: Switched) -> None:
        self.switched = switched

    @cached_property
    def constant(self) -> Any:
        """With constant weights, which the runtime prepares for its fastest kernels."""
        return _open(self.switched.model)

    @cached_property
    def replaceable(self) -> Any:
        """With every weight and bias as an input that a run can replace."""
        return _open(self.switched.with_open_weights())


class Simulator:
    """The model with switches, and the float32 answers that everything is compared with.

    Args:
        proto: the float32 model.
        quantized: the same model with everything in int8, from ``write_qdq``.
        data: samples to answer.
        batch_size: samples at a time; the model's own number where its batch is fixed.
        sessions: of another simulation of the same model, which differs in its samples alone.
    """

    def __init__(
        self,
        proto: ModelProto,
        quantized: ModelProto,
        data: Dataset,
        *,
        batch_size: int = BATCH_SIZE,
        sessions: Sessions | None = None,
    ) -> None:
        self.sessions = sessions or Sessions(add_switches(proto, quantized))
        self._switched = self.sessions.switched
        self.units = self._switched.units
        self.tensors = self._switched.tensors
        self._is_fixed = fixed_batch(proto) is not None
        self._size = fixed_batch(proto) or min(batch_size, max(1, len(data)))
        self.data = data
        self.runs = 0
        self._rounded: dict[str, tuple[Array, Array, Array]] = {}

    @cached_property
    def _names(self) -> list[str]:
        return [item.name for item in self._switched.model.graph.output]

    @cached_property
    def reference(self) -> list[Array]:
        """The float32 answers; made when they are first asked for."""
        return self.outputs(())

    @cached_property
    def _signals(self) -> list[float]:
        return [max(NO_NOISE, _power(values)) for values in self.reference]

    def outputs(
        self, switches: Collection[str], overrides: Mapping[str, Array] | None = None, *, workers: int | None = None
    ) -> list[Array]:
        """Every output over all samples with these switches on; ``overrides`` replace initializers of the simulation."""
        feeds = self.feeds(switches, overrides)
        is_plain = feeds.keys() <= self._switched.inputs
        session = self.sessions.constant if is_plain else self.sessions.replaceable
        answers = in_order(lambda batch: session.run(None, {**feeds, **batch}), self.batches(), workers)
        parts: list[list[Array]] = list(answers)
        self.runs += 1
        return [np.concatenate([part[place] for part in parts]) for place in range(len(self._names))]

    def probe(self, tensors: Iterable[str]) -> Probe:
        """A session of the same simulation that gives inner tensors; what a Relu swallowed is ``tensor/unclipped``."""
        return Probe(self, self._switched.with_open_weights(), tuple(tensors))

    def feeds(self, switches: Collection[str], overrides: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Switches, weights that are not the float32 ones, and other overrides as inputs."""
        given = dict(overrides or {})
        feeds = {f"{SWITCH}{name}": np.array(name in switches) for name in self.tensors}
        for name, weight in self._switched.weights.items():
            values, scale = given.pop(weight.values, None), given.pop(weight.scale, None)
            if name in switches:
                feeds.update(dict.fromkeys(weight.results, self._round(name, weight, values, scale)))
        return {**feeds, **given}

    def _round(self, name: str, weight: SwitchedWeight, values: Array | None, scale: Array | None) -> Array:
        """The float32 values that integer weights stand for."""
        wanted = self._switched.array(weight.values) if values is None else values
        steps = self._switched.array(weight.scale) if scale is None else scale
        known = self._rounded.get(name)
        if known is None or known[0] is not wanted or known[1] is not steps:
            zero = self._switched.array(weight.zero_point).astype(np.int32) if weight.zero_point else np.zeros((), np.int32)
            shifted = (wanted.astype(np.int32) - along(zero, weight.axis, wanted.ndim)).astype(np.float32)
            known = (wanted, steps, np.asarray(shifted * along(steps, weight.axis, wanted.ndim)))
            self._rounded[name] = known
        return known[2]

    def batches(self) -> Iterator[dict[str, Array]]:
        """The samples, batch by batch."""
        return (batch for _done, batch in whole_batches(self.data, self._size, is_fixed=self._is_fixed))

    def noise(self, switches: Collection[str], overrides: Mapping[str, Array] | None = None) -> float:
        """Noise power over signal power of the worst floating-point output."""
        return self.noise_of(self.outputs(switches, overrides))

    def noises(self, alone: Iterable[str], overrides: Mapping[str, Array] | None = None) -> Iterator[tuple[str, float]]:
        """The noise of each of these switches alone, in their order."""

        def measure(name: str) -> tuple[str, float]:
            return name, self.noise_of(self.outputs({name}, overrides, workers=1))

        if self._signals:  # made once, before several threads ask for them
            yield from in_order(measure, alone)

    def noise_of(self, outputs: list[Array]) -> float:
        """Noise power over signal power of the worst floating-point output."""
        pairs = zip(self.reference, outputs, self._signals, strict=True)
        return max((_power(a.astype(np.float64) - b) / signal for a, b, signal in pairs if a.dtype.kind == "f"), default=0.0)

    def initializer(self, name: str) -> Array | None:
        """A weight or bias of the simulation as it stands, or None where there is none of this name."""
        return self._switched.array(name) if name in self._switched.initializers else None

    def switches_of(self, units: Iterable[str]) -> frozenset[str]:
        """The switches that are on when these units are int8."""
        return frozenset(name for unit in units for name in self.units[unit].switches)

    @property
    def all_switches(self) -> frozenset[str]:
        """Everything in int8."""
        return frozenset((*self.tensors, *self._switched.weights))


class Probe:
    """Inner tensors of a simulation."""

    def __init__(self, simulator: Simulator, model: ModelProto, tensors: tuple[str, ...]) -> None:
        import onnx

        made = {name for node in model.graph.node for name in node.output}
        self.tensors = tuple(name for name in tensors if name in made)
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.tensors)
        self._simulator = simulator
        self._session = _open(model)

    def run(
        self,
        switches: Collection[str],
        overrides: Mapping[str, Array] | None = None,
        wanted: Iterable[str] | None = None,
    ) -> Iterator[dict[str, Array]]:
        """The tensors by name (all of the probe, or the ones wanted), batch by batch; what is behind them is not computed."""
        feeds = self._simulator.feeds(switches, overrides)
        names = self.tensors if wanted is None else tuple(wanted)
        options = load_onnxruntime().RunOptions()
        options.only_execute_path_to_fetches = True
        answers = in_order(lambda batch: self._session.run(list(names), {**feeds, **batch}, options), self._simulator.batches())
        for values in answers:
            yield dict(zip(names, values, strict=True))


def decibels(noise: float) -> float:
    """SQNR in dB of a noise-to-signal ratio, at most 200."""
    return 200.0 if noise <= NO_NOISE else float(-10 * np.log10(noise))


def _power(values: Array) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _open(proto: ModelProto) -> Any:
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # a batch of all activations would stay allocated for each session
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(encode(proto), options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True, kw_only=True)
class SwitchedWeight:
    """A quantized weight by its initializers, and the tensors that layers read it from."""

    values: str
    scale: str
    zero_point: str
    axis: int
    results: list[str]


@dataclass(frozen=True, kw_only=True)
class Switched:
    """The float32 model with a branch at every quantizer; ``weights`` by switch, ``tensors`` the switches of activations."""

    model: ModelProto
    quantized: QdqGraph
    units: dict[str, Unit]
    tensors: tuple[str, ...]
    weights: dict[str, SwitchedWeight]

    @cached_property
    def inputs(self) -> set[str]:
        """What the model takes besides data: switches, scales and zero points."""
        return {item.name for item in self.model.graph.input}

    @cached_property
    def initializers(self) -> dict[str, TensorProto]:
        """The model's own and those of the quantized one, by name."""
        return {**self.quantized.initializers, **{item.name: item for item in self.model.graph.initializer}}

    @cached_property
    def _arrays(self) -> dict[str, Array]:
        return {}

    def array(self, name: str) -> Array:
        """An initializer's values; the same object each time."""
        from onnx import numpy_helper

        if name not in self._arrays:
            self._arrays[name] = np.asarray(numpy_helper.to_array(self.initializers[name]))
        return self._arrays[name]

    def with_open_weights(self) -> ModelProto:
        """A copy in which every initializer can be replaced in a run."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        _open_inputs(model, (item.name for item in model.graph.initializer))
        return model


def _open_inputs(model: ModelProto, names: Iterable[str]) -> None:
    """Make initializers inputs with a default."""
    from onnx import helper

    wanted = set(names) - {item.name for item in model.graph.input}
    items = [item for item in model.graph.initializer if item.name in wanted]
    model.graph.input.extend(helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)) for item in items)


def add_switches(proto: ModelProto, quantized: ModelProto) -> Switched:
    """The quantized graph in float32, with a branch at every quantizer."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    model.ir_version = max(model.ir_version, 8)
    graph = QdqGraph(model)
    units = {unit.name: unit for unit in find_units(graph)}
    originals = {item.name: item for item in proto.graph.initializer}
    clips = {node.output[0]: node for node in proto.graph.node if node.op_type in ("Relu", "Clip")}
    nodes: list[Any] = []
    tensors: list[str] = []
    weights: dict[str, SwitchedWeight] = {}
    parameters: list[str] = []
    gone: set[str] = set()
    for node in model.graph.node:
        swallowed = clips.get(node.output[0]) if node.output and node.op_type not in ("Relu", "Clip") else None
        if swallowed is not None:  # the quantizer left it to Q's own clipping, which a switch can turn off
            nodes += _restore_clip(model, node, swallowed, originals)
            continue
        if node.op_type != "DequantizeLinear":
            nodes.append(node)
            continue
        result = node.output[0]
        quantizer = graph.makers.get(node.input[0])
        is_weight = quantizer is None or quantizer.op_type != "QuantizeLinear"
        plain = quantizer.input[0] if quantizer is not None and not is_weight else _original(node.input[0], originals)
        if not plain:
            nodes.append(node)
        elif is_weight:
            _add_initializer(model, originals[plain], result)
            if graph.initializers[node.input[0]].data_type != TensorProto.INT32:  # a bias's int32 rounding is not simulated
                _note_weight(weights, node)
        else:
            assert quantizer is not None
            nodes.append(_branch(quantizer, node, plain))
            gone.add(quantizer.output[0])
            parameters += [*quantizer.input[1:], *node.input[1:]]
            if plain not in tensors:
                tensors.append(plain)
    del model.graph.node[:]
    read = {name for node in nodes for name in node.input}
    model.graph.node.extend(node for node in nodes if node.output[0] not in gone or node.output[0] in read)
    del model.graph.value_info[:]
    _drop_unread(model, parameters)
    _open_inputs(model, parameters)
    model.graph.input.extend(helper.make_tensor_value_info(f"{SWITCH}{name}", TensorProto.BOOL, []) for name in tensors)
    return Switched(model=model, quantized=QdqGraph(quantized), units=units, tensors=tuple(tensors), weights=weights)


def _note_weight(weights: dict[str, SwitchedWeight], node: Any) -> None:
    switch = f"weight:{node.input[0]}"
    if switch in weights:
        weights[switch].results.append(node.output[0])
        return
    weights[switch] = SwitchedWeight(
        values=node.input[0],
        scale=node.input[1],
        zero_point=node.input[2] if len(node.input) > 2 else "",
        axis=next((int(item.i) for item in node.attribute if item.name == "axis"), 1),
        results=[node.output[0]],
    )


def _branch(quantizer: Any, dequantizer: Any, plain: str) -> Any:
    """Q and DQ of a tensor where its switch is on, the tensor itself where it is off."""
    from onnx import TensorProto, helper

    result = dequantizer.output[0]
    first, second = type(quantizer)(), type(dequantizer)()
    first.CopyFrom(quantizer)
    second.CopyFrom(dequantizer)
    first.output[0] = second.input[0] = f"{result}/integers"
    second.output[0] = f"{result}/rounded"
    passed = helper.make_node("Identity", [plain], [f"{result}/plain"], name=f"{result}/pass")

    def graph(nodes: list[Any]) -> Any:
        value = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
        return helper.make_graph(nodes, nodes[-1].output[0], [], [value])

    return helper.make_node(
        "If",
        [f"{SWITCH}{plain}"],
        [result],
        name=f"{result}/switch",
        then_branch=graph([first, second]),
        else_branch=graph([passed]),
    )


def _drop_unread(model: ModelProto, parameters: Iterable[str]) -> None:
    """Leave out integer weights and their scales, which nothing reads any more."""
    read = {name for node in model.graph.node for name in node.input} | set(parameters)
    kept = [item for item in model.graph.initializer if item.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _restore_clip(model: ModelProto, node: Any, clip: Any, originals: Mapping[str, Any]) -> list[Any]:
    """The node and the Relu or Clip behind it that the quantizer took out."""
    for name in clip.input[1:]:
        if name in originals:
            _add_initializer(model, originals[name], name)
    restored = type(clip)()
    restored.CopyFrom(clip)
    restored.input[0] = f"{clip.output[0]}/unclipped"
    node.output[0] = restored.input[0]
    return [node, restored]


def _add_initializer(model: ModelProto, tensor: Any, name: str) -> None:
    if all(item.name != name for item in model.graph.initializer):
        model.graph.initializer.append(tensor)
        model.graph.initializer[-1].name = name


def _original(quantized: str, originals: Mapping[str, Any]) -> str:
    """The float32 initializer that a quantized one was made from; empty where there is none."""
    name = quantized.removesuffix("_quantized")
    return name if name in originals else ""


def find_units(graph: QdqGraph) -> Iterator[Unit]:
    """Nodes of a QDQ graph with quantized data, in graph order."""
    for node in graph.proto.graph.node:
        if node.op_type not in QUANTIZED_OPERATORS:
            continue
        data, weights = [], []
        for name in node.input:
            dequantizer = graph.dequantizer(name)
            if dequantizer is None:
                continue
            quantizer = graph.makers.get(dequantizer.input[0])
            if quantizer is not None:
                data.append(quantizer.input[0])
            elif graph.initializers[dequantizer.input[0]].data_type != 6:
                weights.append(f"weight:{dequantizer.input[0]}")
        if not data:
            continue
        outputs = () if node.op_type in FLOAT_ANSWERING else node.output
        results = [name for name in outputs if any(user.op_type == "QuantizeLinear" for user in graph.uses.get(name, ()))]
        yield Unit(
            name=node.name, op_type=node.op_type, activations=tuple(dict.fromkeys((*data, *results))), weights=tuple(weights)
        )
