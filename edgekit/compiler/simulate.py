"""Quantization simulated in float32 with a switch at every quantizer, so that one session answers for every plan.

The graph is the one that :func:`edgekit.compiler.qdq.write_qdq` writes with everything in int8. Each Q/DQ pair and each
quantized weight gets a switch as an input of the model: off, the float32 values pass. A run with some switches on is what the
int8 kernels would answer on any machine that sums products without overflow: rounding is done in Q and DQ alone, the sums of
integers below 2^24 are exact in float32. Biases stay float32 (their int32 rounding is far below the rest).

    >>> simulator = Simulator(proto, quantized, samples)                      # doctest: +SKIP
    >>> simulator.noise({"conv_1"})                                           # doctest: +SKIP
    0.00021
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.calibration import fixed_batch, whole_batches
from edgekit.compiler.graph import encode
from edgekit.compiler.qdq import FLOAT_ANSWERING, QUANTIZED_OPERATORS, QdqGraph
from edgekit.dataset.data import Dataset
from edgekit.runtime.ort import load_onnxruntime

if TYPE_CHECKING:
    from onnx import ModelProto

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


class Simulator:
    """The model with switches, and the float32 answers that everything is compared with.

    Args:
        proto: the float32 model.
        quantized: the same model with everything in int8, from ``write_qdq``.
        data: samples to answer.
        batch_size: samples at a time; the model's own number where its batch is fixed.
    """

    def __init__(self, proto: ModelProto, quantized: ModelProto, data: Dataset, *, batch_size: int = BATCH_SIZE) -> None:
        switched, self.units, self._switches = add_switches(proto, quantized)
        self._switched = switched
        self.tensors = tuple(name for name in self._switches if not name.startswith("weight:"))
        self._session = _open(switched)
        self._names = [item.name for item in self._session.get_outputs()]
        self._is_fixed = fixed_batch(proto) is not None
        self._size = fixed_batch(proto) or min(batch_size, max(1, len(data)))
        self.data = data
        self.runs = 0
        self.reference = self.outputs(())
        self._signals = [max(NO_NOISE, _power(values)) for values in self.reference]

    def outputs(self, switches: Collection[str], overrides: Mapping[str, Array] | None = None) -> list[Array]:
        """Every output over all samples with these switches on; ``overrides`` replace initializers of the simulation."""
        feeds = self.feeds(switches, overrides)
        parts = [self._session.run(None, {**feeds, **batch}) for batch in self.batches()]
        self.runs += 1
        return [np.concatenate([part[place] for part in parts]) for place in range(len(self._names))]

    def probe(self, tensors: Iterable[str]) -> Probe:
        """A session of the same simulation that gives inner tensors; what a Relu swallowed is ``tensor/unclipped``."""
        return Probe(self, self._switched, tuple(tensors))

    def feeds(self, switches: Collection[str], overrides: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """The switches and overrides as inputs."""
        return {**{f"{SWITCH}{name}": np.array(name in switches) for name in self._switches}, **(overrides or {})}

    def batches(self) -> Iterator[dict[str, Array]]:
        """The samples, batch by batch."""
        return (batch for _done, batch in whole_batches(self.data, self._size, is_fixed=self._is_fixed))

    def noise(self, switches: Collection[str], overrides: Mapping[str, Array] | None = None) -> float:
        """Noise power over signal power of the worst floating-point output."""
        return self.noise_of(self.outputs(switches, overrides))

    def noise_of(self, outputs: list[Array]) -> float:
        """Noise power over signal power of the worst floating-point output."""
        pairs = zip(self.reference, outputs, self._signals, strict=True)
        return max((_power(a.astype(np.float64) - b) / signal for a, b, signal in pairs if a.dtype.kind == "f"), default=0.0)

    def initializer(self, name: str) -> Array | None:
        """A weight or bias of the simulation as it stands, or None where there is none of this name."""
        from onnx import numpy_helper

        found = next((item for item in self._switched.graph.initializer if item.name == name), None)
        return None if found is None else np.asarray(numpy_helper.to_array(found))

    def switches_of(self, units: Iterable[str]) -> frozenset[str]:
        """The switches that are on when these units are int8."""
        return frozenset(name for unit in units for name in self.units[unit].switches)

    @property
    def all_switches(self) -> frozenset[str]:
        """Everything in int8."""
        return frozenset(self._switches)


class Probe:
    """Inner tensors of a simulation."""

    def __init__(self, simulator: Simulator, switched: ModelProto, tensors: tuple[str, ...]) -> None:
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(switched)
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
        """The tensors by name (all of the probe, or the ones wanted), batch by batch."""
        feeds = self._simulator.feeds(switches, overrides)
        names = self.tensors if wanted is None else tuple(wanted)
        for batch in self._simulator.batches():
            yield dict(zip(names, self._session.run(list(names), {**feeds, **batch}), strict=True))


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


def add_switches(proto: ModelProto, quantized: ModelProto) -> tuple[ModelProto, dict[str, Unit], tuple[str, ...]]:
    """The quantized graph with a switch at every quantizer; its units by name and the switches in graph order."""
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
    switches: list[str] = []
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
            continue
        if is_weight and graph.initializers[node.input[0]].data_type == TensorProto.INT32:
            _add_initializer(model, originals[plain], result)  # a bias: its int32 rounding is not simulated
            continue
        if is_weight:
            _add_initializer(model, originals[plain], plain)
        switch = f"weight:{node.input[0]}" if is_weight else plain
        node.output[0] = f"{result}/rounded"
        choice = helper.make_node("Where", [f"{SWITCH}{switch}", node.output[0], plain], [result], name=f"{result}/switch")
        nodes += [node, choice]
        if switch not in switches:
            switches.append(switch)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    shaped = [helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)) for item in model.graph.initializer]
    known = {item.name for item in model.graph.input}
    model.graph.input.extend(item for item in shaped if item.name not in known)  # inputs with a default: a run can replace them
    model.graph.input.extend(helper.make_tensor_value_info(f"{SWITCH}{name}", TensorProto.BOOL, []) for name in switches)
    return model, units, tuple(switches)


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
