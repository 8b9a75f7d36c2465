"""The search behind the plan: which nodes are worth int8 here, how far the ladder goes, and how much float32 the budget needs.

It starts where the fixed candidates end, from the optimized float32 model:

1. costs of every node in both forms, and the noise of every quantizer alone, on the samples that int8 degrades most;
2. ``int8-mixed``: the fastest choice of nodes by integer program, on channels scaled between layers where that gains, refined
   up the ladder; AdaRound where it still misses the accuracy of the budget and the time is there;
3. where that misses too, ``int8-guarded``: the limit of predicted noise is halved and doubled along the
   cumulative list until the fastest choice is found whose measured quality meets the budget. Each trial is a choice of its own,
   so that nodes come back to int8 when others pay for them better.

The best trial is kept, never the last one. Each step looks at the clock first.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.benchmark.latency import compare, measure
from edgekit.compiler.calibration import fixed_batch, whole_batches
from edgekit.compiler.costs import Costs, LatencyTable, costs_from_table
from edgekit.compiler.equalize import find_folds
from edgekit.compiler.findings import Findings, LadderStep, LayerSaturation
from edgekit.compiler.graph import encode, open_plain, read_onnx
from edgekit.compiler.lab import ADAROUND, STEPS, Climb, Lab
from edgekit.compiler.passes.base import Effort, PassContext, WorkModel
from edgekit.compiler.passes.on_onnx.quantize_dynamic import plan_dynamic, write_dynamic
from edgekit.compiler.passes.on_onnx.quantize_planned import calibration_samples, open_lab
from edgekit.compiler.passes.on_onnx.quantize_static import edge_layers, find_quantization_obstacle
from edgekit.compiler.passes.registry import DYNAMIC, EQUALIZE, HALVE, OPTIMIZE, PLANNED, REPAIR, PassSpec, Recipe
from edgekit.compiler.saturation import count_saturation
from edgekit.compiler.simulate import decibels
from edgekit.compiler.solve import Choice
from edgekit.dataset.data import Dataset, spread_indices
from edgekit.runtime.parallel import in_order
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import SessionOptions
from edgekit.schema.base import Scalar

if TYPE_CHECKING:
    from onnx import ModelProto

logger = logging.getLogger(__name__)
DOT_PRODUCT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
SWEEP_SECONDS: dict[Effort, float] = {"fast": 0.0, "default": 20.0, "max": 120.0}
LADDER: dict[Effort, tuple[str, ...]] = {"fast": (), "default": STEPS, "max": STEPS}
TRIALS: dict[Effort, int] = {"fast": 0, "default": 6, "max": 9}
STRENGTHS: dict[Effort, tuple[float, ...]] = {"fast": (), "default": (0.5,), "max": (0.25, 0.5, 0.75)}
"""Of SmoothQuant."""
EQUALIZING_DB = 0.3
"""Scaled channels must gain this much: everything is measured again with them."""
ADAROUND_SECONDS: dict[Effort, float] = {"fast": 0.0, "default": 20.0, "max": 300.0}
DISABLE_SECONDS: dict[Effort, float] = {"fast": 0.0, "default": 5.0, "max": 30.0}
LEAST_SAVED = 0.05
LOWEST_SHARE = 0.01
"""The smallest limit of noise that is tried, as a share of the noise of the fastest choice."""
Array = NDArray[Any]


SATURATION_SAMPLES = 16
MOST_DYNAMIC_LAYERS = 100
DYNAMIC_SAMPLES = 16
POLISH_SECONDS: dict[Effort, float] = {"fast": 0.0, "default": 4.0, "max": 40.0}
POLISHED = 12
"""Nodes whose two forms differ least are tried both ways."""
RACE_SECONDS = 0.15


class Race:
    """Times whole models that differ in which nodes are int8; the first of two that tie stays."""

    def __init__(self, lab: Lab, feeds: Mapping[str, Array], threads: int, folder: Path, seed: int) -> None:
        self._lab, self._feeds, self._threads, self._folder, self._seed = lab, feeds, threads, folder, seed
        self._paths: dict[frozenset[str], Path] = {}

    def fastest(self, choices: Sequence[frozenset[str]]) -> frozenset[str]:
        """The fastest of these; a later one must be faster than the noise."""
        distinct = list(dict.fromkeys(choices))
        sessions = {str(i): open_session(self._path(choice), options=self._options()) for i, choice in enumerate(distinct)}
        try:
            reports = measure(
                sessions,
                self._feeds,
                baseline="0",
                is_on_target=True,
                threads=self._threads,
                seconds=RACE_SECONDS,
                min_runs=20,
                seed=self._seed,
            )
        finally:
            for session in sessions.values():
                session.close()
        order = sorted(reports, key=lambda name: reports[name].ratio or 1.0)
        winner = order[0] if compare(reports[order[0]]) == "faster" else "0"
        return distinct[int(winner)]

    def _options(self) -> SessionOptions:
        return SessionOptions(threads=self._threads)

    def _path(self, choice: frozenset[str]) -> Path:
        if choice not in self._paths:
            path = self._folder / f"{len(self._paths)}.onnx"
            path.write_bytes(encode(self._lab.build(choice, {}, {}) if choice else self._lab.proto))
            self._paths[choice] = path
        return self._paths[choice]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate as the search sees it: whether its measured quality meets the budget, and its predicted saving."""

    recipe: Recipe
    is_good: bool
    choice: Choice


Try = Callable[[Recipe], bool]
"""Make and evaluate a recipe; whether its quality meets the budget."""


@dataclass(kw_only=True)
class Search:
    """One search; ``trials`` and ``notes`` grow while it runs."""

    model: WorkModel
    context: PassContext
    feeds: Mapping[str, Array]
    threads: int
    host: str
    attempt: Try
    run_pass: Callable[[PassSpec], WorkModel]
    """Run a pass on ``model``, or take what it made before."""
    deadline: float = float("inf")
    needs_repair: Callable[[Recipe], bool] = lambda _recipe: False
    """Whether the runtime's graph of a recipe's model shows something that can be repaired."""
    float_share: Callable[[Recipe], float] = lambda _recipe: 0.0
    """Share of a recipe's file that storing float32 weights as float16 would save."""
    is_on_target: bool = True
    table: LatencyTable | None = None
    is_dynamic_worth: bool = False
    """Whether dynamic int8 was made, and misses the quality of the budget."""
    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    climbed: Climb | None = None
    before: tuple[PassSpec, ...] = ()
    """Passes between the optimized model and the quantization."""
    equalizations: list[LadderStep] = field(default_factory=list)
    saturation: tuple[LayerSaturation, ...] = ()
    seven_bit: tuple[str, ...] = ()
    lab: Lab | None = None
    costs: Costs | None = None

    def run(self) -> None:
        """Search until done or late; nothing that goes wrong here ends the run, the fixed candidates stand."""
        obstacle = find_quantization_obstacle(self.model)
        try:
            if obstacle:
                self.notes.append(f"no search for mixed precision: {obstacle}")
                self._repair(Recipe(name="fp32-optimized", purpose="", passes=(OPTIMIZE,)))
                return
            self._explore()
            self._explore_dynamic()
        except Exception as error:
            logger.debug("search failed", exc_info=True)
            self.notes.append(f"the search for mixed precision stopped: {type(error).__name__}: {str(error)[:200]}")

    def _explore(self) -> None:
        effort = self.context.effort
        lab = self.lab = self._open(read_onnx(self.model.path))
        if not lab.units or self._is_late():
            return
        lab = self.lab = self._equalize(lab)
        costs = self.costs = self._find_costs(lab)
        if SWEEP_SECONDS[effort] and not lab.sweep(min(self.deadline, time.monotonic() + 3 * SWEEP_SECONDS[effort])):
            self.notes.append("the sensitivity of some layers was estimated: the time was not enough to measure all")
        fastest = lab.choose(costs)
        if self.table is None or costs.table is not self.table:  # this host's clock says nothing about another one's table
            fastest = self._polish(lab, costs, fastest)
        if not fastest.int8:
            where = "by the latency table" if self.table is costs.table else "on this host"
            self.notes.append(f"no layer is faster in int8 {where}, conversions included")
            return
        if self._is_late():
            return
        self.climbed = lab.climb(fastest.int8, LADDER[effort], self.deadline)
        self._count_saturation(lab, fastest)
        is_good = self._try("int8-mixed", "int8 where it pays in milliseconds, refined", fastest)
        if not TRIALS[effort]:
            return
        if not is_good and not self._learn_rounding(lab, fastest):
            self._guard(lab, costs, fastest)
        good = [trial for trial in reversed(self.trials) if trial.is_good]
        if good:
            self._shrink(max(good, key=lambda trial: trial.choice.saved_ms).recipe)
        lab.sweep_disabled(fastest.int8, self.climbed, min(self.deadline, time.monotonic() + DISABLE_SECONDS[effort]))

    def _equalize(self, lab: Lab) -> Lab:
        """Scale channels between layers where that gains on samples that nothing was made from; else the lab as it was."""
        effort, is_per_channel = self.context.effort, self.context.target.int8.per_channel
        wanted: list[dict[str, Scalar]] = [] if is_per_channel else [{"rule": "weights"}]
        wanted += [{"rule": "activations", "strength": strength} for strength in STRENGTHS[effort]]
        if not wanted or not find_folds(lab.proto):
            return lab
        best, chosen = lab.judge.noise(lab.simulator.all_switches), None
        for settings in wanted:
            spec = replace(EQUALIZE, settings=settings)
            if self._is_late():
                break
            started, before = time.monotonic(), best
            self.context.on_progress(f"trying {spec.describe()}", 0.0)
            trial = lab.with_model(read_onnx(self.run_pass(spec).path))
            noise = trial.judge.noise(trial.simulator.all_switches)
            gain = decibels(noise) - decibels(best)
            if gain >= EQUALIZING_DB:
                best, chosen = noise, spec
            step = LadderStep(
                name=spec.describe(),
                is_kept=False,
                reason=f"{gain:+.2f} dB on samples it has not seen",
                before_db=decibels(before),
                score_db=decibels(noise),
                seconds=time.monotonic() - started,
            )
            self.equalizations.append(step)
        if chosen is None:
            return lab
        self.before = (chosen,)
        self.equalizations = [
            msgspec.structs.replace(step, is_kept=step.name == chosen.describe()) for step in self.equalizations
        ]
        return self._open(read_onnx(self.run_pass(chosen).path))

    def _learn_rounding(self, lab: Lab, fastest: Choice) -> bool:
        """AdaRound where the quality still fails and the time is there for it; whether that was enough."""
        assert self.climbed is not None
        seconds = lab.seconds_of_adaround(fastest.int8)
        if seconds > ADAROUND_SECONDS[self.context.effort] or time.monotonic() + seconds > self.deadline:
            self.notes.append(f"AdaRound was left out: it would take about {seconds:.0f} s")
            return False
        before = self.climbed.steps
        self.climbed = lab.climb(fastest.int8, ADAROUND, self.deadline, start=self.climbed)
        return self.climbed.steps != before and self._try("int8-adaround", "rounding learned layer by layer", fastest)

    def _open(self, proto: ModelProto) -> Lab:
        return open_lab(
            proto,
            self.context,
            is_per_channel=self.context.target.int8.per_channel,
            reduce_range=False,  # where it matters, single layers are narrowed instead
            sweep_seconds=SWEEP_SECONDS[self.context.effort],
            threads=self.threads,
            host=self.host,
        )

    def _find_costs(self, lab: Lab) -> Costs:
        """From the table that was given where it has every node of this model, else measured here."""
        if self.table is not None:
            found = costs_from_table(self.table, lab.proto, lab.units, self.feeds)
            if found is not None:
                self.notes.append(f"what runs in int8 was chosen by the latency table of {self.table.host}")
                return found
            self.notes.append("the latency table lacks nodes of this model: times of this host were used")
        return lab.measure_costs(self.feeds)

    def _count_saturation(self, lab: Lab, choice: Choice) -> None:
        """Count what would overflow without a dot-product instruction; on targets without one, narrow those layers' weights."""
        target = self.context.target
        if target.arch != "x86-64" or target.int8.weights != "int8":
            return
        assert self.climbed is not None
        overrides = lab.replay(self.climbed.units, self.climbed.methods, self.climbed.steps)
        counted = count_saturation(
            lab.build(choice.int8, self.climbed.methods, overrides), lab.calibration, samples=SATURATION_SAMPLES
        )
        is_cured = target.int8.reduce_range or not DOT_PRODUCT & set(target.isa)
        self.seven_bit = tuple(item.layer for item in counted if item.overflowing) if is_cured else ()
        self.saturation = tuple(
            msgspec.structs.replace(item, cure="7-bit" if item.layer in self.seven_bit else "none") for item in counted
        )

    def _polish(self, lab: Lab, costs: Costs, planned: Choice) -> Choice:
        """Settle close calls by timing whole models: single nodes' times do not add up to the last microsecond."""
        if not POLISH_SECONDS[self.context.effort]:
            return planned
        until = min(self.deadline, time.monotonic() + POLISH_SECONDS[self.context.effort])
        with tempfile.TemporaryDirectory(prefix="edgekit-polish-") as folder:
            race = Race(lab, self.feeds, self.threads, Path(folder), self.context.seed)
            everything, edges = frozenset(lab.units), frozenset(edge_layers(lab.proto))
            alone = frozenset(name for name, item in costs.units.items() if item.int8_ms < item.float_ms)
            best = race.fastest([planned.int8, everything, everything - edges, alone, frozenset()])
            gains = {name: abs(item.float_ms - item.int8_ms) for name, item in costs.units.items()}
            for index, name in enumerate(sorted(gains, key=lambda name: gains[name])[:POLISHED]):
                if time.monotonic() > until:
                    break
                self.context.on_progress("settling close calls by timing", index / POLISHED)
                best = race.fastest([best, best ^ {name}]) if best else best
        return lab.describe(best, planned)

    def _guard(self, lab: Lab, costs: Costs, fastest: Choice) -> None:
        """Bisect the limit of noise on a logarithmic scale for the fastest choice that meets the budget."""
        assert self.climbed is not None
        if SWEEP_SECONDS[self.context.effort]:
            lab.sweep_refined(self.climbed, min(self.deadline, time.monotonic() + 2 * SWEEP_SECONDS[self.context.effort]))
        fastest = lab.describe(fastest.int8, fastest)
        high, low = max(fastest.noise, 1e-12), max(fastest.noise, 1e-12) * LOWEST_SHARE
        seen = {fastest.int8}
        for _ in range(TRIALS[self.context.effort]):
            if self._is_late():
                self.notes.append("the time limit ended the search for the accuracy that the budget asks for")
                break
            limit = (high * low) ** 0.5
            choice = lab.choose(costs, limit)
            if not choice.int8:
                low = limit
                continue
            if choice.int8 in seen:
                high = limit
                continue
            seen.add(choice.int8)
            name = f"int8-guarded-{len(seen) - 1}"
            if self._try(name, "some layers back in fp32 for accuracy", choice):
                low = limit
            else:
                high = limit

    def _explore_dynamic(self) -> None:
        """Where dynamic int8 is fast and misses the accuracy, give the worst layers back to float32, fewest first.

        Layers are ordered by noise per weight (the time of a matrix product goes with its weights); the number that goes back
        is found by bisection along that list, from few to many.
        """
        if not self.is_dynamic_worth or not TRIALS[self.context.effort] or self._is_late():
            return
        proto = read_onnx(self.model.path)
        plan = plan_dynamic(proto, self.context)
        sizes = {item.name: int(np.prod(item.dims)) for item in proto.graph.initializer}
        layers = {
            node.name: sizes[node.input[1]]
            for node in proto.graph.node
            if node.op_type in ("MatMul", "Gemm") and node.input[1] in sizes
        }
        if not 1 < len(layers) <= MOST_DYNAMIC_LAYERS:
            return
        data = calibration_samples(self.context)
        samples = data.select(spread_indices(len(data), min(len(data), DYNAMIC_SAMPLES)))
        expected = _answers(proto, samples)
        noise = {}
        for index, name in enumerate(layers):
            if self._is_late():
                return
            self.context.on_progress(f"dynamic int8, layer by layer: {len(layers)}", index / len(layers))
            noise[name] = _noise(expected, _answers(write_dynamic(proto, plan, nodes=[name]), samples))
        order = sorted(layers, key=lambda name: -noise[name] / layers[name])
        low, high = 0, len(order)
        found: Recipe | None = None
        while high - low > 1 and not self._is_late():
            middle = min(max(1, 2 * low), high - 1) if high == len(order) else (low + high) // 2
            kept = json.dumps(sorted(order[:middle]))
            recipe = Recipe(
                name=f"int8-dynamic-{middle}-fp32",
                purpose=f"dynamic int8, the {middle} most sensitive layers in fp32",
                passes=(OPTIMIZE, replace(DYNAMIC, settings={"float_nodes": kept})),
            )
            if self.attempt(recipe):
                high, found = middle, recipe
            else:
                low = middle
        if found is not None:
            self._shrink(found)

    def _try(self, name: str, purpose: str, choice: Choice) -> bool:
        recipe = Recipe(name=name, purpose=purpose, passes=(OPTIMIZE, *self.before, self._planned(choice)))
        is_good = self.attempt(recipe)
        self.trials.append(Trial(recipe=recipe, is_good=is_good, choice=choice))
        self._repair(recipe)
        return is_good

    def _shrink(self, recipe: Recipe) -> None:
        """A candidate more with the weights of its float32 layers stored as float16, where that makes the file smaller."""
        if TRIALS[self.context.effort] and not self._is_late() and self.float_share(recipe) > LEAST_SAVED:
            purpose = "the weights of its fp32 layers stored as fp16"
            self.attempt(Recipe(name=f"{recipe.name}-fp16", purpose=purpose, passes=(*recipe.passes, HALVE)))

    def _repair(self, recipe: Recipe) -> None:
        """A candidate more where the runtime does not run what the file asks for and that can be mended; timing decides."""
        if self.is_on_target and not self._is_late() and self.needs_repair(recipe):
            name = "repaired" if recipe.name == "fp32-optimized" else f"{recipe.name}-repaired"
            repaired = Recipe(name=name, purpose="what the runtime ran otherwise mended", passes=(*recipe.passes, REPAIR))
            self.attempt(repaired)

    def _planned(self, choice: Choice) -> PassSpec:
        assert self.lab is not None
        assert self.climbed is not None
        everything = frozenset(self.lab.units)
        kept = sorted(everything - choice.int8)
        refined = sorted(everything - self.climbed.units)
        settings: dict[str, Scalar] = {
            "is_per_channel": self.lab.is_per_channel,
            "reduce_range": self.lab.reduce_range,
            "float_nodes": json.dumps(kept),
            "methods": json.dumps(self.climbed.methods, sort_keys=True),
            "steps": ",".join(self.climbed.steps),
            "refined_float": "" if refined == kept else json.dumps(refined),
            "ranked": json.dumps(list(self.lab.ranked)),
            "made": json.dumps(list(self.lab.made)),
            "seven_bit": json.dumps(list(self.seven_bit)),
        }
        return replace(PLANNED, settings=settings)

    def _is_late(self) -> bool:
        return time.monotonic() > self.deadline

    # --- what was learned -------------------------------------------------------------------------------------------------

    def findings(self, chosen: str) -> Findings:
        """What the report shows; ``chosen`` is the name of the winner."""
        if self.lab is None:
            return Findings(notes=tuple(self.notes))
        trial = next((item for item in self.trials if item.recipe.name == chosen), self.trials[0] if self.trials else None)
        int8 = trial.choice.int8 if trial else frozenset()
        methods = self.climbed.methods if self.climbed else {}
        ladder = (*self.equalizations, *(self.climbed.ladder if self.climbed else ()))
        tensors = [name for name in self.lab.simulator.tensors if name in self.lab.simulator.switches_of(int8)]
        layers = self.lab.layer_records(self.costs, int8) if self.lab.sensitivity else ()
        return Findings(
            layers=layers,
            ranges=self.lab.range_records(methods, tensors),
            ladder=ladder,
            notes=tuple(self.notes),
            saturation=self.saturation,
        )


def _answers(proto: ModelProto, data: Dataset) -> list[Array]:
    """Outputs sample by sample: dynamic int8 takes its scales from the request."""
    session = open_plain(encode(proto), level="all")
    size = fixed_batch(proto) or 1
    batches = (feeds for _done, feeds in whole_batches(data, size, is_fixed=True))
    parts = list(in_order(lambda feeds: session.run(None, feeds), batches))
    return [np.concatenate(values) for values in zip(*parts, strict=True)]


def _noise(expected: list[Array], found: list[Array]) -> float:
    """Noise power over signal power of the worst floating-point output."""
    ratios = []
    for a, b in zip(expected, found, strict=True):
        if a.dtype.kind == "f":
            signal = float(np.square(a, dtype=np.float64).sum())
            ratios.append(float(np.square(a.astype(np.float64) - b).sum()) / max(signal, 1e-20))
    return max(ratios, default=0.0)
