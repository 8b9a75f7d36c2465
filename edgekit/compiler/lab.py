"""The workbench of the search: one float32 model with its statistics, simulation, sensitivities and costs.

Everything is decided on calibration data: sensitivities on the samples that int8 degrades most (a mean over easy samples hides
what breaks), each step of the ladder on other samples than it was made from. The evaluation data judges finished candidates
only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.adaround import ITERATIONS
from edgekit.compiler.calibration import (
    METHODS,
    Method,
    Statistics,
    affordable_batch,
    collect_ranges,
    collect_statistics,
    fixed_batch,
)
from edgekit.compiler.costs import Costs, measure_costs
from edgekit.compiler.findings import LadderStep, LayerSensitivity, TensorRange
from edgekit.compiler.qdq import QdqGraph, QdqPlan, write_qdq
from edgekit.compiler.refine import (
    Overrides,
    Setting,
    apply,
    correct_biases,
    fit_scales,
    learn_roundings,
    round_with_feedback,
)
from edgekit.compiler.simulate import BATCH_SIZE, Sessions, Simulator, add_switches, decibels
from edgekit.compiler.solve import Choice, Wiring, choose, wire
from edgekit.dataset.data import Dataset, spread_indices
from edgekit.errors import ArtifactError
from edgekit.runtime.parallel import in_order
from edgekit.schema.target import Int8Rules

if TYPE_CHECKING:
    from onnx import ModelProto

Array = NDArray[Any]
Tell = Callable[[str, float], None]
BATCH_BYTES = 64 * 2**20
"""All activations of one batch of a simulation."""
OUTPUT_SUFFIX = "_QuantizeLinear_Input"
POOL = 64
"""Calibration samples out of which the worst-degraded are ranked on."""
RANKED = 32
JUDGED = 24
MADE = 48
STEP_SECONDS = 8.0
DISABLED = 40
"""Layers that go back to float32 one by one, for the report."""
GAIN_DB = 0.05
"""A step must gain this much on samples it has not seen."""
MIN_RELATIVE_GAIN = 0.95
"""Another calibrator must bring a tensor's noise below this share of min-max's."""
STEPS = ("calibrator", "scales", "feedback", "bias")
ADAROUND = ("adaround", "bias")
"""What may come after the ladder where the quality still fails: AdaRound, then the biases that fit its weights."""
LEARNED_PER_SECOND = 1.5e10
"""Products a second, roughly: how long AdaRound takes is told before it begins."""


@dataclass(frozen=True, kw_only=True)
class Climb:
    """How far a ladder went: the units it was walked with, the calibrator by tensor, the steps kept, what each measured."""

    units: frozenset[str]
    methods: dict[str, Method]
    steps: tuple[str, ...]
    ladder: tuple[LadderStep, ...]
    noise: float


@dataclass(kw_only=True)
class Lab:
    """Statistics, simulation and costs of one float32 model; parts are made when they are asked for."""

    proto: ModelProto
    calibration: Dataset
    rules: Int8Rules
    is_per_channel: bool
    reduce_range: bool
    seed: int
    threads: int
    host: str
    sweep_seconds: float = 0.0
    ranked: tuple[int, ...] = ()
    """Indices of the calibration samples to rank on; empty: chosen here, as many as ``sweep_seconds`` allow."""
    made: tuple[int, ...] = ()
    """Those that the steps of the ladder are made from; empty: chosen here, or the ranked ones where those are given."""
    has_histograms: bool = True
    """Without them there is only the min-max calibrator, for half the time."""
    tell: Tell = field(default=lambda _text, _done: None)

    def __post_init__(self) -> None:
        from onnx import numpy_helper

        self.statistics: dict[str, Statistics] = self._collect()
        self.originals = {item.name: np.asarray(numpy_helper.to_array(item)) for item in self.proto.graph.initializer}
        self.quantized = write_qdq(self.proto, self.plan({}, ()))
        self._batch = affordable_batch(self.proto, self.calibration, limit=BATCH_BYTES, most=BATCH_SIZE)
        self.graph = QdqGraph(self.quantized)
        self.seconds_per_sample = 0.0
        self._sessions = Sessions(add_switches(self.proto, self.quantized))
        if not self.ranked:
            self.ranked = self._pick_samples()
            self.made = self._pick_made()
        self.made = self.made or self.ranked
        self.simulator = self._simulate(self.ranked)
        self._judge: Simulator | None = None
        self._maker: Simulator | None = None
        self.units = self.simulator.units
        self.wiring: Wiring = wire(self.proto, self.units)
        self.sensitivity: dict[str, float] = {}
        self.disabled: dict[str, float] = {}
        self._replayed: dict[tuple[Any, ...], Overrides] = {}

    def _collect(self) -> dict[str, Statistics]:
        if self.has_histograms:
            return collect_statistics(self.proto, self.calibration)
        nothing = np.zeros(0, np.int64)
        return {name: Statistics(*ends, nothing) for name, ends in collect_ranges(self.proto, self.calibration).items()}

    def _simulate(self, samples: Sequence[int] | Array) -> Simulator:
        """A simulation on these calibration samples."""
        data = self.calibration.select(samples)
        return Simulator(self.proto, self.quantized, data, batch_size=self._batch, sessions=self._sessions)

    @property
    def judge(self) -> Simulator:
        """A simulation on samples that no step is made from (where there are enough)."""
        if self._judge is None:
            rest = np.setdiff1d(np.arange(len(self.calibration)), (*self.ranked, *self.made))
            if len(rest) == 0:
                rest = np.asarray(self.ranked)
            count = max(fixed_batch(self.proto) or 1, min(len(rest), JUDGED, 2 * len(self.made)))
            chosen = rest[spread_indices(len(rest), count)]
            self._judge = self._simulate(chosen)
        return self._judge

    def with_model(self, proto: ModelProto) -> Lab:
        """The same samples with another model, and no more than min-max ranges: enough to compare the two."""
        return replace(self, proto=proto, has_histograms=False)

    # --- plans ------------------------------------------------------------------------------------------------------------

    def plan(self, methods: Mapping[str, Method], float_nodes: Iterable[str]) -> QdqPlan:
        """A plan with the range of each tensor by its method, min-max where none is named."""
        ranges = {name: item.range_by(methods.get(name, "minmax")) for name, item in self.statistics.items()}
        return QdqPlan(
            ranges=ranges,
            rules=self.rules,
            is_per_channel=self.is_per_channel,
            reduce_range=self.reduce_range,
            float_nodes=tuple(float_nodes),
        )

    def build(self, int8: Iterable[str], methods: Mapping[str, Method], overrides: Mapping[str, Array]) -> ModelProto:
        """The QDQ model with these units in int8."""
        chosen = set(int8)
        model = write_qdq(self.proto, self.plan(methods, sorted(name for name in self.units if name not in chosen)))
        apply(model, overrides, self.originals)
        return model

    def seen(self, tensor: str) -> Statistics:
        """Statistics of a tensor; the quantizer gives what a quantized output of the model is made from a name of its own."""
        return self.statistics[tensor.removesuffix(OUTPUT_SUFFIX)]

    # --- samples ----------------------------------------------------------------------------------------------------------

    def _pick_samples(self) -> tuple[int, ...]:
        """The worst-degraded samples of a pool for ranking, as many as the time allows."""
        count = len(self.calibration)
        size = fixed_batch(self.proto) or 1
        if not self.sweep_seconds:
            return tuple(int(index) for index in spread_indices(count, min(count, max(size, 4))))
        pool = spread_indices(count, min(count, max(size, POOL)))
        probe = pool[: max(size, min(len(pool), 4))]
        simulator = self._simulate(probe)
        started = time.perf_counter()
        simulator.outputs(simulator.all_switches)
        per_sample = self.seconds_per_sample = (time.perf_counter() - started) / len(probe)
        runs = max(1, len(simulator.all_switches))
        affordable = int(self.sweep_seconds / max(1e-6, runs * per_sample))
        ranked = min(RANKED, len(pool), max(size, 4, affordable))
        if affordable < len(pool) // 4 or ranked >= len(pool):  # ranking the pool would cost more than it brings
            return tuple(int(index) for index in pool[spread_indices(len(pool), ranked)])
        whole = self._simulate(pool)
        order = np.argsort(-_degradation(whole.reference, whole.outputs(whole.all_switches)), kind="stable")
        return tuple(sorted(int(index) for index in pool[order[:ranked]]))

    def _pick_made(self) -> tuple[int, ...]:
        """The ranked samples and as many others as the slowest step, one run a layer, can take in time."""
        count, size = len(self.calibration), fixed_batch(self.proto) or 1
        layers = sum(1 for _item in self.graph.weights())
        affordable = int(STEP_SECONDS / max(1e-6, layers * self.seconds_per_sample / 2))
        wanted = max(len(self.ranked), min(MADE, count // 2, affordable)) // size * size
        others = np.setdiff1d(np.arange(count), self.ranked)
        missing = min(len(others), wanted - len(self.ranked))
        more = others[spread_indices(len(others), missing)] if missing > 0 else ()
        return tuple(sorted({*self.ranked, *(int(index) for index in more)}))

    # --- what int8 does ---------------------------------------------------------------------------------------------------

    def sweep(self, deadline: float) -> bool:
        """Measure the noise of each switch alone; False where the deadline came first (the rest is estimated)."""
        names = sorted(self.simulator.all_switches)
        waiting = (name for name in names if name not in self.sensitivity and time.monotonic() <= deadline)
        for name, noise in self.simulator.noises(waiting):
            self.sensitivity[name] = noise
            self.tell(f"sensitivity of {len(names)} quantizers", len(self.sensitivity) / len(names))
        is_whole = len(self.sensitivity) == len(names)
        if not is_whole:
            self._estimate(names)
        return is_whole

    def sweep_refined(self, climbed: Climb, deadline: float) -> None:
        """Measure again what the ladder changed: the weights, and the activations with another calibrator."""
        overrides = self.replay(climbed.units, climbed.methods, climbed.steps)
        names = [name for name in sorted(self.simulator.all_switches) if name.startswith("weight:") or name in climbed.methods]
        waiting = (name for name in names if time.monotonic() <= deadline)
        for index, (name, noise) in enumerate(self.simulator.noises(waiting, overrides)):
            self.sensitivity[name] = noise
            self.tell("sensitivity after the ladder", index / len(names))

    def sweep_disabled(self, int8: Iterable[str], climbed: Climb | None, deadline: float) -> None:
        """Measure the noise of these units in int8 with one of them back in float32, for each of the worst layers."""
        chosen = frozenset(int8)
        overrides = self.replay(climbed.units, climbed.methods, climbed.steps) if climbed else {}
        share = {name: sum(self.sensitivity.get(each, 0.0) for each in self.units[name].switches) for name in chosen}
        worst = sorted(chosen, key=lambda name: (-share[name], name))[:DISABLED]

        def measure(name: str) -> tuple[str, float]:
            switches = self.simulator.switches_of(chosen - {name})
            return name, self.simulator.noise_of(self.simulator.outputs(switches, overrides, workers=1))

        self.simulator.noise(
            self.simulator.switches_of(chosen), overrides
        )  # rounds the weights before several threads need them
        waiting = (name for name in worst if time.monotonic() <= deadline)
        for index, (name, noise) in enumerate(in_order(measure, waiting)):
            self.disabled[name] = noise
            self.tell("sensitivity: all but one layer in int8", index / max(1, len(worst)))

    def describe(self, int8: Iterable[str], planned: Choice) -> Choice:
        """A choice of these units with its predicted noise; the saving is that of the plan it came from."""
        units = frozenset(int8)
        noise = sum(self.sensitivity.get(name, 0.0) for name in self.simulator.switches_of(units))
        return Choice(int8=units, saved_ms=planned.saved_ms, noise=noise)

    def _estimate(self, names: list[str]) -> None:
        """Switches that were not measured count as much as the median of those that were."""
        known = list(self.sensitivity.values())
        middle = float(np.median(known)) if known else 0.0
        for name in names:
            self.sensitivity.setdefault(name, middle)

    def measure_costs(self, feeds: Mapping[str, Array]) -> Costs:
        """Profile both forms of the model here."""
        return measure_costs(self.proto, self.quantized, self.units, feeds, threads=self.threads, host=self.host)

    def choose(self, costs: Costs, limit: float = float("inf"), fixed_float: Iterable[str] = ()) -> Choice:
        """The fastest choice within a limit of predicted noise."""
        found = choose(self.units, self.wiring, costs, self.sensitivity, limit=limit, fixed_float=tuple(fixed_float))
        return self.describe(found.int8, found)

    # --- the ladder -------------------------------------------------------------------------------------------------------

    def seconds_of_adaround(self, int8: Iterable[str]) -> float:
        """How long AdaRound of these units would take, roughly."""
        units = set(int8)
        weights = [item for item in self.graph.weights() if item.layer in units]
        sizes = [self.graph.array(item.values).shape for item in weights]
        products = sum(
            float(np.prod(shape)) * (np.prod(shape[1:]) if item.op_type == "Conv" else max(shape))
            for item, shape in zip(weights, sizes, strict=True)
        )
        return products * ITERATIONS / LEARNED_PER_SECOND

    def climb(
        self, int8: Iterable[str], steps: Iterable[str], deadline: float = float("inf"), start: Climb | None = None
    ) -> Climb:
        """Walk up the ladder with these units in int8; a step stays only if it gains on samples it has not seen.

        Args:
            int8: the units.
            steps: what is tried, in this order.
            deadline: on the monotonic clock; what comes later is left out.
            start: goes on from there, with its units.
        """
        units, wanted = start.units if start else frozenset(int8), tuple(steps)
        switches = self.simulator.switches_of(units)
        methods: dict[str, Method] = dict(start.methods) if start else {}
        kept: list[str] = list(start.steps) if start else []
        ladder: list[LadderStep] = list(start.ladder) if start else []
        best = start.noise if start else self.judge.noise(switches) if wanted else 0.0
        for place, name in enumerate(wanted):
            if time.monotonic() > deadline:
                ladder.append(LadderStep(name=name, is_kept=False, reason="the time limit came first"))
                continue
            started = time.monotonic()
            self.tell(f"ladder: {name}", place / len(wanted))
            tried = self._pick_methods(switches) if name == "calibrator" else methods
            trial = kept if name == "calibrator" else [*kept, name]
            try:
                noise = self.judge.noise(switches, self.replay(units, tried, trial))
            except np.linalg.LinAlgError as error:
                ladder.append(LadderStep(name=name, is_kept=False, reason=f"failed: {error}"))
                continue
            gain = decibels(noise) - decibels(best)
            ladder.append(
                LadderStep(
                    name=name,
                    is_kept=gain >= GAIN_DB,
                    reason=f"{gain:+.2f} dB on samples it has not seen",
                    before_db=decibels(best),
                    score_db=decibels(noise),
                    seconds=time.monotonic() - started,
                )
            )
            if gain >= GAIN_DB:
                best, methods, kept = noise, dict(tried), list(trial)
        return Climb(units=units, methods=methods, steps=tuple(kept), ladder=tuple(ladder), noise=best)

    def replay(self, int8: Iterable[str], methods: Mapping[str, Method], steps: Iterable[str]) -> Overrides:
        """The overrides that these steps give, one after the other; the same ones each time."""
        units, wanted = frozenset(int8), tuple(steps)
        key = (units, tuple(sorted(methods.items())), wanted)
        if key in self._replayed:
            return self._replayed[key]
        if not wanted:
            overrides: Overrides = {}
            for name, method in methods.items():
                overrides.update(self._activation(name, self.seen(name).range_by(method)))
        else:
            overrides = dict(self.replay(units, methods, wanted[:-1]))
            overrides.update(self._step(wanted[-1], units, overrides))
        self._replayed[key] = overrides
        return overrides

    @property
    def maker(self) -> Simulator:
        """The simulation that steps are made from."""
        if self._maker is None:
            self._maker = self.simulator if self.made == self.ranked else self._simulate(self.made)
        return self._maker

    def _step(self, name: str, units: frozenset[str], overrides: Overrides) -> Overrides:
        """One step; on one thread of linear algebra, since the order of its sums would depend on their number."""
        from threadpoolctl import threadpool_limits

        with threadpool_limits(limits=1, user_api="blas"):
            return self._refine(name, units, overrides)

    def _refine(self, name: str, units: frozenset[str], overrides: Overrides) -> Overrides:
        layers = {unit for unit in units if self.units[unit].weights}
        setting = Setting(
            simulator=self.maker,
            graph=self.graph,
            originals=self.originals,
            layers=layers,
            switches=self.simulator.switches_of(units),
            overrides=overrides,
            seed=self.seed,
        )
        match name:
            case "scales":
                return fit_scales(self.graph, self.originals, layers)
            case "feedback":
                return round_with_feedback(setting)
            case "adaround":
                return learn_roundings(setting)
            case "bias":
                return correct_biases(setting)
            case _:
                raise ArtifactError(
                    "quantization.step_unknown", f"{name}: no such step.", hint=f"Steps: {', '.join((*STEPS, 'adaround'))}."
                )

    def _pick_methods(self, switches: frozenset[str]) -> dict[str, Method]:
        """The calibrator of each tensor: the one with the least noise at the model's output, tried one tensor at a time."""
        methods: dict[str, Method] = {}
        tensors = [name for name in self.simulator.tensors if name in switches]
        tensors.sort(key=lambda name: -self.sensitivity.get(name, 0.0))
        for name in tensors[: max(8, len(tensors) // 4)]:
            best = self.sensitivity.get(name) or self.simulator.noise({name})
            seen = self.seen(name).range_by("minmax")
            for method in METHODS[1:]:
                ends = self.seen(name).range_by(method)
                trial = self._activation(name, ends) if ends != seen else {}
                noise = self.simulator.noise({name}, trial) if trial else np.inf
                if noise < best * MIN_RELATIVE_GAIN:
                    best = noise
                    methods[name] = method
        return methods

    def _activation(self, tensor: str, ends: tuple[float, float]) -> Overrides:
        """Scale and zero point of an activation for a range, as the quantizer computes them."""
        node = next(
            (item for item in self.quantized.graph.node if item.op_type == "QuantizeLinear" and item.input[0] == tensor), None
        )
        if node is None or node.input[2] not in self.graph.initializers:
            return {}
        low, high = min(0.0, ends[0]), max(0.0, ends[1])
        zero = self.graph.array(node.input[2])
        bounds = np.iinfo(zero.dtype)
        if self.rules.activation_symmetric:
            high = max(abs(low), abs(high))
            low = -high
        scale = (high - low) / float(bounds.max - bounds.min)
        if scale <= 0:
            return {}
        point = np.clip(round(bounds.min - low / scale), bounds.min, bounds.max)
        return {node.input[1]: np.array(scale, np.float32), node.input[2]: np.array(point, zero.dtype)}

    # --- findings ---------------------------------------------------------------------------------------------------------

    def layer_records(self, costs: Costs | None, int8: Iterable[str]) -> tuple[LayerSensitivity, ...]:
        """Sensitivity of each computing layer, most sensitive first; enable-one is the sum of its parts."""
        chosen = set(int8)
        records = []
        for unit in self.units.values():
            activations = sum(self.sensitivity.get(name, 0.0) for name in unit.activations)
            weights = sum(self.sensitivity.get(name, 0.0) for name in unit.weights)
            cost = costs.units.get(unit.name) if costs else None
            records.append(
                LayerSensitivity(
                    layer=unit.name,
                    op_type=unit.op_type,
                    enable_one_db=decibels(activations + weights),
                    weights_only_db=decibels(weights) if unit.weights else None,
                    activations_only_db=decibels(activations),
                    disable_one_db=decibels(self.disabled[unit.name]) if unit.name in self.disabled else None,
                    float_ms=cost.float_ms if cost else None,
                    int8_ms=cost.int8_ms if cost else None,
                    is_int8=unit.name in chosen,
                )
            )
        return tuple(sorted(records, key=lambda item: item.enable_one_db))

    def range_records(self, methods: Mapping[str, Method], tensors: Iterable[str]) -> tuple[TensorRange, ...]:
        """The ranges that a candidate uses, worst first; nothing where there are no histograms to judge them by."""
        records: list[TensorRange] = []
        if not self.has_histograms:
            return ()
        for name in tensors:
            item = self.seen(name)
            low, high = item.range_by(methods.get(name, "minmax"))
            records.append(
                TensorRange(
                    tensor=name,
                    seen_low=item.low,
                    seen_high=item.high,
                    low=low,
                    high=high,
                    method=methods.get(name, "minmax"),
                    sqnr_db=item.sqnr_db(low, high),
                    clipped=item.clipped(low, high),
                )
            )
        return tuple(sorted(records, key=lambda record: record.sqnr_db))


def _degradation(reference: list[Array], found: list[Array]) -> Array:
    """Noise-to-signal ratio by sample, the worst floating-point output."""
    worst = np.zeros(len(reference[0]))
    for a, b in zip(reference, found, strict=True):
        if a.dtype.kind != "f" or len(a) != len(worst):
            continue
        rows = a.reshape(len(a), -1).astype(np.float64)
        noise = np.square(rows - b.reshape(len(a), -1)).sum(axis=1)
        worst = np.maximum(worst, noise / np.maximum(np.square(rows).sum(axis=1), 1e-20))
    return worst
