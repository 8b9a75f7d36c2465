"""Everything that is checked and loaded before the first candidate is made, cheapest first.

The dry run stops after it, so that what it prints is what the real run would execute.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgekit.compiler.cache import StepCache
from edgekit.compiler.costs import LatencyTable
from edgekit.compiler.gate import Budget, parse_budget
from edgekit.compiler.output import check_out, default_out, open_work
from edgekit.compiler.passes.base import Effort, Pass, PassContext, WorkModel
from edgekit.compiler.passes.registry import Recipe, plan_recipes, source_pass
from edgekit.compiler.previous import find_previous
from edgekit.compiler.source import Source, load_source
from edgekit.dataset.contract import infer_contract
from edgekit.dataset.data import Dataset
from edgekit.dataset.load import load_dataset
from edgekit.errors import ArtifactError, EdgekitError, TargetError, UsageError
from edgekit.evaluation.metric import Metric, resolve_metric
from edgekit.runtime.ort import load_onnxruntime
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import Session, SessionOptions
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.contract import Contract
from edgekit.schema.digest import digest_bytes
from edgekit.schema.target import TargetProfile
from edgekit.schema.tensor import TensorSpec
from edgekit.target.load import find_latency_table, load_target, target_digest
from edgekit.target.probe import host_isa, is_host

FEW_SAMPLES = 500
"""Below this many evaluation samples one wrong answer is 0.2 points or more."""
DOT_PRODUCT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
STAGES = {
    "prepare": (0.0, 0.08),
    "make": (0.08, 0.3),
    "evaluate": (0.3, 0.4),
    "search": (0.4, 0.75),
    "time": (0.75, 0.97),
    "write": (0.97, 1.0),
}


UpdateBytes = Callable[[Path, Path], int]


@dataclass(frozen=True, kw_only=True)
class OptimizeRequest:
    """What the user asked for; see ``edgekit optimize --help``. ``threads`` None follows the target."""

    model: str
    target: str
    data: str
    evaluation: str | None = None
    metric: str | None = None
    budget: str | None = None
    out: Path | None = None
    effort: Effort = "default"
    seed: int = 0
    weights: Path | None = None
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    threads: int | None = None
    time_limit: float | None = None
    """Seconds for the whole run; what is not begun by then is left out, and the best so far wins."""
    latency_table: Path | None = None
    """Times of nodes that were measured on the target, in place of this host's, for the choice of what runs in int8."""
    work: Path | None = None
    """Folder whose ``.work`` keeps finished steps; runs for several targets share one. None: the output folder."""
    previous: Path | None = None
    """The previous release: its output folder or its quantized ``.onnx``, whose scales one more candidate keeps."""
    update_bytes: UpdateBytes | None = None
    """Bytes that a device with the first file downloads to get the second; without it no candidate is preferred for that."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Progress: a line for people and the fraction of the whole run that is done, 0..1."""

    stage: str
    done: float


Listener = Callable[[Event], None]


class Reporter:
    """Turns progress inside a stage into progress of the whole run, which never goes back: a search tells its steps anew."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._done = 0.0

    def tell(self, stage: str, text: str, done: float = 0.0) -> None:
        """``done`` is the fraction of the stage, 0..1."""
        start, end = STAGES[stage]
        self._done = max(self._done, start + (end - start) * min(max(done, 0.0), 1.0))
        self._listener(Event(stage=text, done=self._done))


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request with everything loaded. ``base`` is the source as ONNX, ``budget`` None where none was given."""

    request: OptimizeRequest
    target: TargetProfile
    target_digest: str
    is_on_target: bool
    source: Source
    out: Path
    budget: Budget | None
    metric: Metric
    recipes: tuple[Recipe, ...]
    base: WorkModel
    calibration: Dataset
    evaluation: Dataset
    contract: Contract
    context: PassContext
    cache: StepCache
    threads: int
    isa: tuple[str, ...]
    warnings: tuple[str, ...]
    latency_table: LatencyTable | None = None
    previous: Path | None = None
    """The previous release's quantized model."""


@dataclass(frozen=True, kw_only=True)
class PlannedCandidate:
    """One line of the dry run; ``obstacle`` is known only where the first pass says so without running."""

    recipe: Recipe
    obstacle: str | None


def plan_candidates(prepared: Prepared) -> tuple[PlannedCandidate, ...]:
    """What a run would make of this."""
    return tuple(PlannedCandidate(recipe=recipe, obstacle=_first_obstacle(recipe, prepared)) for recipe in prepared.recipes)


def _first_obstacle(recipe: Recipe, prepared: Prepared) -> str | None:
    """What is known without running a pass; a graph clean-up does not change what the next pass thinks of the model."""
    model = prepared.base
    for spec in recipe.passes:
        try:
            if obstacle := spec.load().find_obstacle(model, prepared.context):
                return obstacle
        except EdgekitError as error:
            return error.message
        if spec.name != "optimize-graph":
            return None
    return None


def prepare(request: OptimizeRequest, reporter: Reporter) -> Prepared:
    """Check and load everything that the user gave.

    Raises:
        UsageError: wrong target, budget, metric, model, data or output folder.
        ArtifactError: when the model cannot be loaded.
        TargetError: ``target.source_unsupported`` when the target cannot run this kind of model.
    """
    reporter.tell("prepare", "loading the target and the model")
    load_onnxruntime()  # before torch's exporter imports it: its telemetry is switched off at the first import or never
    target = load_target(request.target)
    previous = find_previous(request.previous) if request.previous else None
    table = _read_table(request.latency_table or find_latency_table(target, request.target))
    budget = parse_budget(request.budget, metric=request.metric) if request.budget is not None else None
    source = load_source(
        request.model, weights=request.weights, input_shapes=request.input_shapes, data=request.data, seed=request.seed
    )
    _check_runnable(target, source)
    out = request.out or default_out(source.stem, target.name)
    check_out(out)
    cache = StepCache(open_work(request.work or out))
    base, context = import_source(request, target, source, cache, reporter)
    with opened(base.path) as session:
        inputs, outputs = session.inputs, session.outputs
    reporter.tell("prepare", "loading the data", 0.8)
    calibration = load_dataset(request.data, inputs, class_names=request.labels)
    given = request.evaluation
    evaluation = load_dataset(given, inputs, class_names=request.labels or calibration.class_names) if given else calibration
    contract = _infer_contract(calibration, evaluation, inputs, outputs, request.labels)
    name = request.metric or (budget.metric if budget else None)
    return Prepared(
        request=request,
        target=target,
        target_digest=target_digest(target),
        is_on_target=is_host(target),
        source=source,
        out=out,
        budget=budget,
        metric=resolve_metric(name, has_labels=evaluation.labels is not None, task=contract.task),
        recipes=plan_recipes(target, request.effort, has_task=source.task is not None, has_module=source.module is not None),
        base=base,
        calibration=calibration,
        evaluation=evaluation,
        contract=contract,
        context=replace(context, calibration=calibration),
        cache=cache,
        threads=request.threads or target.threads,
        isa=host_isa(),
        warnings=_warnings(request, target, source, calibration, evaluation),
        latency_table=table,
        previous=previous if target.int8.format == "qdq" and target.runtime == "onnxruntime" else None,
    )


def _read_table(path: Path | None) -> LatencyTable | None:
    """The table that the user or the target names.

    Raises:
        UsageError: ``latency_table.unreadable``.
    """
    if path is None:
        return None
    try:
        return decode_json(path.read_bytes(), LatencyTable, name=str(path))
    except (OSError, ArtifactError) as error:
        raise UsageError(
            "latency_table.unreadable",
            f"{path}: no latency table: {error}",
            hint="Give the latency-table.json that edgekit optimize wrote on the target.",
        ) from error


@contextlib.contextmanager
def opened(path: Path, threads: int = 1) -> Iterator[Session]:
    """A session that is closed at the end."""
    session = open_session(path, options=SessionOptions(threads=threads))
    try:
        yield session
    finally:
        session.close()


def _check_runnable(target: TargetProfile, source: Source) -> None:
    if target.runtime != "onnxruntime" and source.model.kind == "onnx":
        raise TargetError(
            "target.source_unsupported",
            f"{source.model.spec}: {target.name} runs .tflite models, and an ONNX file cannot be converted to one.",
            hint="Give the torch model (file.py:factory with --weights), or a target that runs ONNX: edgekit target list.",
        )


def import_source(
    request: OptimizeRequest, target: TargetProfile, source: Source, cache: StepCache, reporter: Reporter | None = None
) -> tuple[WorkModel, PassContext]:
    """The source as an ONNX file, and the context of all passes (its calibration data comes later)."""
    told = reporter or Reporter(lambda _event: None)
    spec = source_pass(source.model.kind)
    nothing = Dataset(inputs={}, labels=None, class_names=(), digest=digest_bytes(b""), source="")
    context = PassContext(
        target=target,
        calibration=nothing,
        work_dir=cache.folder,
        seed=request.seed,
        effort=request.effort,
        task=source.task,
        example_inputs=source.example_inputs,
        on_progress=lambda text, done: told.tell("prepare", text, 0.1 + 0.7 * done),
    )
    path = source.path or cache.folder / "source.onnx"
    model = WorkModel(path=path, format="onnx", precision="fp32", lineage=(), module=source.module)
    return run_step(spec.load(), model, context, cache, source.model.digest), context


def run_step(step: Pass, model: WorkModel, context: PassContext, cache: StepCache, source: str) -> WorkModel:
    """Run a pass in a folder of its own, or take its result from an earlier run."""
    facts = {name: getattr(context.target, name) for name in step.target_fields}
    key = cache.step_key(step, model, context, source=source, target=digest_bytes(encode_json(facts)))
    if found := cache.find_step(key, model):
        return found
    folder = cache.step_dir(key)
    folder.mkdir(parents=True, exist_ok=True)
    result = step.run(model, replace(context, work_dir=folder))
    cache.keep_step(key, result, model)
    return result


def _infer_contract(
    calibration: Dataset,
    evaluation: Dataset,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    labels: tuple[str, ...],
) -> Contract:
    """Ranges from the calibration data; labels, and with them the task, from whichever data has them."""
    labelled = calibration if calibration.labels is not None else evaluation
    names = labels or calibration.class_names or evaluation.class_names
    return infer_contract(replace(calibration, labels=labelled.labels), inputs, outputs, names)


def _warnings(
    request: OptimizeRequest, target: TargetProfile, source: Source, calibration: Dataset, evaluation: Dataset
) -> tuple[str, ...]:
    found = [*source.notes, *calibration.notes]
    if request.evaluation is None:
        found.append("no --eval data: quality is measured on the calibration data, which flatters int8")
    else:
        found.extend(note for note in evaluation.notes if note not in found)
    if len(evaluation) < FEW_SAMPLES:
        found.append(f"only {len(evaluation)} evaluation sample{'s' if len(evaluation) > 1 else ''}: quality is known roughly")
    if not is_host(target):
        found.append(f"this host is not {target.name}: latencies are this host's and say little about the target")
    if request.previous is not None and not (target.int8.format == "qdq" and target.runtime == "onnxruntime"):
        found.append(f"--previous: scales are kept in ONNX models only, and {target.name} runs others")
    found.extend(_isa_warnings(target))
    return tuple(found)


def _isa_warnings(target: TargetProfile) -> list[str]:
    """int8 results depend on the instruction set: what was measured here may not be what the device answers."""
    host = frozenset(host_isa())
    own = "x86-64" if platform.machine() in ("x86_64", "AMD64") else platform.machine()
    if target.arch != own:
        return [f"int8 quality was measured with {own} kernels; {target.arch} kernels may answer differently"]
    if own == "x86-64" and host & DOT_PRODUCT and not DOT_PRODUCT & set(target.isa) and not target.int8.reduce_range:
        text = f"int8 quality was measured with dot-product instructions that {target.name} lacks:"
        return [f"{text} without them int8 sums can saturate, and quality can be lower there"]
    return []
