"""``optimize``: plan, make every candidate, evaluate all, time all together, judge, write.

A candidate that cannot be made becomes a ``failed`` one with its reason and never stops the others. Only a baseline that does
not work, or wrong input, ends the run. Everything finished lies in ``DIR/.work`` by content, so that the same request goes on
after Ctrl-C; the result replaces DIR only when it is whole.

    >>> result = optimize(OptimizeRequest(model="model.onnx", target="host", data="calibration.npz"))   # doctest: +SKIP
    >>> result.chosen.name, result.is_budget_met                                                         # doctest: +SKIP
    ('int8-per-channel', True)
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit import __version__
from edgekit.benchmark.fingerprint import fingerprint
from edgekit.benchmark.latency import measure
from edgekit.compiler.audit import audit_runtime
from edgekit.compiler.costs import LatencyTable
from edgekit.compiler.findings import Findings, RuntimeAudit
from edgekit.compiler.gate import Budget, Judgement, Measured, Term, default_budget, is_quality_met, judge, pick_fastest
from edgekit.compiler.graph import facts_of, read_onnx
from edgekit.compiler.memory import measure_peak_mb
from edgekit.compiler.output import LATENCY_TABLE, open_staging, swap_in
from edgekit.compiler.passes.base import Effort, WorkModel
from edgekit.compiler.passes.on_onnx.weights_only import halvable_bytes
from edgekit.compiler.passes.registry import BASELINE, KEEPING, OPTIMIZE, PassSpec, Recipe
from edgekit.compiler.preparation import Listener, OptimizeRequest, Prepared, Reporter, opened, prepare, run_step
from edgekit.compiler.repair import repair
from edgekit.compiler.result import DataDescription, OpLatency, OptimizeResult, RequestSummary
from edgekit.compiler.search import Search
from edgekit.dataset.data import Dataset
from edgekit.durable import write_durably
from edgekit.errors import ArtifactError, EdgekitError
from edgekit.evaluation.evaluate import BATCH_SIZE, evaluate, predict
from edgekit.runtime.parallel import processors
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import Session, SessionOptions
from edgekit.schema.artifact import ModelArtifact
from edgekit.schema.base import encode_json
from edgekit.schema.candidate import Candidate
from edgekit.schema.digest import digest_file
from edgekit.schema.measurement import EvalReport, LatencyReport

logger = logging.getLogger(__name__)
Array = NDArray[Any]
TIMING_SECONDS: dict[Effort, float] = {"fast": 0.15, "default": 0.4, "max": 4.0}
BYTES_PER_MB = 1e6
DYNAMIC = "int8-dynamic"


MAKE_SHARE, EVALUATE_SHARE, SEARCH_SHARE = 0.45, 0.6, 0.75
"""Of a time limit: what comes after these shares is no longer begun."""
MIN_TIMING_SECONDS = 0.1
MIN_RUNS: dict[Effort, int] = {"fast": 30, "default": 50, "max": 50}
FEWEST_RUNS = 10


class Clock:
    """A time limit; without one nothing is ever late."""

    def __init__(self, limit: float | None, started: float) -> None:
        self._limit = limit
        self._started = started

    def share_spent(self) -> float:
        """Share of the limit that is gone."""
        return (time.monotonic() - self._started) / self._limit if self._limit else 0.0

    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def left(self) -> float:
        """Seconds until the limit."""
        return self._started + self._limit - time.monotonic() if self._limit else float("inf")

    def deadline(self, share: float) -> float:
        """When this share of the limit is gone, on the monotonic clock."""
        return self._started + share * self._limit if self._limit else float("inf")

    def words(self) -> str:
        """For people."""
        return f"the time limit of {self._limit:g} s came first"


@dataclass(kw_only=True)
class Made:
    """A candidate on its way: a model or the reason why there is none, then what it measured."""

    name: str
    recipe: Recipe | None = None
    model: WorkModel | None = None
    failure: str | None = None
    update_bytes: int | None = None
    session: Session | None = None
    evaluation: EvalReport | None = None
    latency: LatencyReport | None = None

    def fail(self, reason: str) -> None:
        """Give up on it."""
        self.failure = reason
        if self.session is not None:
            self.session.close()
            self.session = None


def optimize(request: OptimizeRequest, on_event: Listener = lambda _event: None) -> OptimizeResult:
    """Run the whole optimization and write the output folder.

    Raises:
        UsageError: wrong target, budget, metric, model or data.
        ArtifactError: when the model cannot be loaded or the baseline does not run.
        TargetError: when the target cannot run this kind of model.
    """
    started = time.monotonic()
    reporter = Reporter(on_event)
    prepared = prepare(request, reporter)
    clock = Clock(prepared.request.time_limit, started)
    candidates = make_candidates(prepared, reporter, clock)
    try:
        evaluate_candidates(prepared, candidates, reporter, clock)
        search = search_candidates(prepared, candidates, reporter, clock)
        time_candidates(prepared, candidates, reporter, clock)
        budget = _whole_budget(prepared, candidates)
        if keep_previous(prepared, candidates, budget, reporter, clock):
            time_candidates(prepared, candidates, reporter, clock)  # all again: times of different runs are not compared
        reporter.tell("write", "judging and writing")
        judgement = judge([_measured(item) for item in candidates], budget, baseline=BASELINE, target=prepared.target.name)
        findings = search.findings(judgement.chosen) if search else Findings()
        audits = _audits(prepared, candidates, {BASELINE, judgement.chosen})
        result = msgspec.structs.replace(
            _assemble(prepared, candidates, budget, judgement, clock),
            op_latency={name: _by_operator(audit) for name, audit in audits.items()},
            findings=msgspec.structs.replace(findings, audits=audits),
        )
        table = search.costs.table if search and search.costs else None
        write_output(prepared, candidates, result, table)
    finally:
        for item in candidates:
            if item.session is not None:
                item.session.close()
    reporter.tell("write", "done", 1.0)
    return result


# --- make -------------------------------------------------------------------------------------------------------------------


def make_candidates(prepared: Prepared, reporter: Reporter, clock: Clock) -> list[Made]:
    """Run every recipe; passes that recipes share run once.

    Raises:
        ArtifactError: ``model.baseline_failed`` when the baseline cannot be made.
    """
    steps: dict[tuple[str, ...], WorkModel] = {}
    made = []
    count = len(prepared.recipes)
    for index, recipe in enumerate(prepared.recipes):
        part = _part(lambda text, done: reporter.tell("make", text, done), index, count)
        if recipe.name != BASELINE and clock.share_spent() > MAKE_SHARE:
            made.append(Made(name=recipe.name, failure=f"not made: {clock.words()}"))
            continue
        part(f"making {recipe.name}", 0.0)
        item = _make(recipe, prepared, steps, _prefixed(part, recipe.name))
        if recipe.name == BASELINE and item.failure is not None:
            raise ArtifactError(
                "model.baseline_failed",
                f"{prepared.source.model.spec}: the fp32 baseline cannot be made for {prepared.target.name}: {item.failure}.",
                hint="Everything is compared with it; make it work first.",
            )
        made.append(item)
    return made


def _make(
    recipe: Recipe, prepared: Prepared, steps: dict[tuple[str, ...], WorkModel], tell: Callable[[str, float], None]
) -> Made:
    """One candidate; ``tell`` takes the fraction of it that is done."""
    model = prepared.base
    done: tuple[str, ...] = ()
    for index, spec in enumerate(recipe.passes):
        done = (*done, spec.describe())
        if done in steps:
            model = steps[done]
            continue
        context = replace(prepared.context, on_progress=_part(tell, index, len(recipe.passes)))
        try:
            step = spec.load()
            if obstacle := step.find_obstacle(model, context):
                return Made(name=recipe.name, recipe=recipe, failure=f"not made: {obstacle}")
            model = run_step(step, model, context, prepared.cache, prepared.source.model.digest)
        except EdgekitError as error:
            return Made(name=recipe.name, recipe=recipe, failure=f"{spec.name} failed: {error.message}")
        except Exception as error:
            logger.debug("pass failed pass=%s", spec.name, exc_info=True)
            reason = f"{spec.name} failed: {type(error).__name__}: {str(error)[:200]}"
            return Made(name=recipe.name, recipe=recipe, failure=reason)
        steps[done] = model
    return Made(name=recipe.name, recipe=recipe, model=model)


def _prefixed(tell: Callable[[str, float], None], name: str) -> Callable[[str, float], None]:
    return lambda text, done: tell(f"{name}: {text}", done)


def _part(tell: Callable[[str, float], None], index: int, count: int) -> Callable[[str, float], None]:
    """Progress of one of several equal parts."""
    return lambda text, done: tell(text, (index + done) / count)


# --- evaluate ---------------------------------------------------------------------------------------------------------------


def evaluate_candidates(prepared: Prepared, candidates: list[Made], reporter: Reporter, clock: Clock) -> None:
    """Load and run every candidate on the evaluation data; one that answers wrongly becomes a failed one.

    Those that the time is not enough for are given up, the smallest files last.

    Raises:
        EdgekitError: when the baseline itself does not run on the data.
    """
    evaluator = Evaluator(prepared, candidates[0])
    waiting = [item for item in candidates if item.model is not None]
    for index, item in enumerate(waiting):
        if item is not candidates[0] and clock.share_spent() > EVALUATE_SHARE:
            item.fail(f"made, but not evaluated: {clock.words()}")
            continue
        reporter.tell("evaluate", f"evaluating {item.name} on {len(prepared.evaluation)} samples", index / len(waiting))
        evaluator.evaluate(item)


class Evaluator:
    """Evaluates candidates against the baseline, whose answers it keeps."""

    def __init__(self, prepared: Prepared, baseline: Made) -> None:
        self._prepared = prepared
        self._baseline = baseline
        self._expected: dict[str, Array] | None = None

    def evaluate(self, item: Made) -> None:
        """Open the candidate's session and measure its quality; what fails is noted in the candidate.

        Raises:
            EdgekitError: when the baseline itself does not run on the data.
        """
        assert item.model is not None
        prepared, baseline = self._prepared, self._baseline
        try:
            item.session = self._open(item)
            if item is not baseline:
                assert baseline.session is not None
                _check_interface(item.session, baseline.session)
            key = _evaluation_key(prepared, item, baseline)
            item.evaluation = prepared.cache.find_evaluation(key)
            if item.evaluation is not None:
                return
            if self._expected is None:
                self._expected = self._answer(baseline)
            outputs = self._expected if item is baseline else self._answer(item)
            item.evaluation = _evaluate(prepared, outputs, self._expected)
            prepared.cache.keep_evaluation(key, item.evaluation)
        except EdgekitError as error:
            if item is baseline:
                raise
            item.fail(f"made, but does not run: {error.message}")

    def _open(self, item: Made) -> Session:
        assert item.model is not None
        return open_session(item.model.path, options=SessionOptions(threads=self._prepared.threads))

    def _answer(self, item: Made) -> dict[str, Array]:
        """All answers; then the session is opened anew, since one keeps the memory of its largest batch as long as it lives."""
        assert item.session is not None
        outputs = _predict(item, self._prepared.evaluation)
        item.session.close()
        item.session = self._open(item)
        return outputs


# --- search -----------------------------------------------------------------------------------------------------------------


def search_candidates(prepared: Prepared, candidates: list[Made], reporter: Reporter, clock: Clock) -> Search | None:
    """Look for mixed precision that is faster or more accurate than the fixed candidates, and add what was found."""
    is_wanted = prepared.target.runtime == "onnxruntime" and prepared.target.int8.format == "qdq"
    optimized = next((item.model for item in candidates if item.name == "fp32-optimized" and item.failure is None), None)
    if not is_wanted or optimized is None or clock.share_spent() > SEARCH_SHARE:
        return None
    reporter.tell("search", "looking at every layer")
    evaluator = Evaluator(prepared, candidates[0])
    budget = _whole_budget(prepared, candidates)
    steps: dict[tuple[str, ...], WorkModel] = {(OPTIMIZE.describe(),): optimized}

    def attempt(recipe: Recipe) -> bool:
        item = _make(recipe, prepared, steps, lambda text, done: reporter.tell("search", f"{recipe.name}: {text}", done))
        candidates.append(item)
        if item.model is None:
            return False
        reporter.tell("search", f"evaluating {recipe.name}", 0.9)
        evaluator.evaluate(item)
        return item.failure is None and is_quality_met(_measured(item), budget)

    def apply(spec: PassSpec) -> WorkModel:
        made = run_step(spec.load(), optimized, prepared.context, prepared.cache, prepared.source.model.digest)
        steps[(OPTIMIZE.describe(), spec.describe())] = made
        return made

    def model_of(recipe: Recipe) -> WorkModel | None:
        item = next(item for item in reversed(candidates) if item.name == recipe.name)
        return item.model if item.session is not None else None

    def needs_repair(recipe: Recipe) -> bool:
        model = model_of(recipe)
        if model is None:
            return False
        audit = audit_runtime(model.path, None, threads=prepared.threads, is_timed=False)
        return bool(repair(read_onnx(model.path), audit)[1])

    def float_share(recipe: Recipe) -> float:
        model = model_of(recipe)
        return halvable_bytes(read_onnx(model.path)) / model.path.stat().st_size if model else 0.0

    with opened(optimized.path, prepared.threads) as session:
        feeds = one_sample(session, prepared.evaluation)
    search = Search(
        model=optimized,
        context=replace(prepared.context, on_progress=lambda text, done: reporter.tell("search", text, done)),
        feeds=feeds,
        threads=prepared.threads,
        host=fingerprint(candidates[0].session.runtime, candidates[0].session.runtime_version).cpu
        if candidates[0].session
        else "",
        attempt=attempt,
        run_pass=apply,
        needs_repair=needs_repair,
        float_share=float_share,
        is_on_target=prepared.is_on_target,
        deadline=clock.deadline(SEARCH_SHARE),
        table=prepared.latency_table,
        is_dynamic_worth=any(
            item.name == DYNAMIC and item.evaluation is not None and not is_quality_met(_measured(item), budget)
            for item in candidates
        ),
    )
    search.run()
    return search


def _predict(item: Made, data: Dataset) -> dict[str, Array]:
    """All answers; dynamic int8 takes its scales from the whole batch, so it is fed as a device would feed it."""
    assert item.session is not None
    is_dynamic = item.model is not None and item.model.precision == DYNAMIC
    workers = processors() if item.session.runtime == "onnxruntime" else 1
    return predict(item.session, data, batch_size=1 if is_dynamic else BATCH_SIZE, workers=workers)


def _evaluate(prepared: Prepared, outputs: Mapping[str, Array], expected: Mapping[str, Array]) -> EvalReport:
    return evaluate(
        outputs,
        expected,
        prepared.evaluation,
        prepared.metric,
        isa=prepared.isa,
        labels=prepared.contract.labels,
        seed=prepared.request.seed,
    )


def _evaluation_key(prepared: Prepared, item: Made, baseline: Made) -> str:
    assert item.model is not None
    assert baseline.model is not None
    digests = [digest_file(item.model.path), digest_file(baseline.model.path), prepared.evaluation.digest]
    metric = [prepared.metric.name, prepared.request.metric, list(prepared.contract.labels), prepared.request.seed]
    return prepared.cache.evaluation_key([*digests, metric, list(prepared.isa)])


def _check_interface(session: Session, baseline: Session) -> None:
    """Refuse a candidate whose inputs or outputs are not the baseline's.

    Raises:
        ArtifactError: ``model.interface_changed``.
    """
    for mine, theirs, what in ((session.inputs, baseline.inputs, "inputs"), (session.outputs, baseline.outputs, "outputs")):
        own = [(spec.name, spec.dtype, len(spec.shape)) for spec in mine]
        expected = [(spec.name, spec.dtype, len(spec.shape)) for spec in theirs]
        if own != expected:
            raise ArtifactError("model.interface_changed", f"its {what} are {own}, the baseline's {expected}.")


# --- time -------------------------------------------------------------------------------------------------------------------


def time_candidates(prepared: Prepared, candidates: list[Made], reporter: Reporter, clock: Clock) -> None:
    """One interleaved run over all candidates, a batch of one real sample."""
    sessions = {item.name: item.session for item in candidates if item.session is not None}
    text = f"timing {len(sessions)} candidates against each other"
    reporter.tell("time", text)
    assert candidates[0].model is not None
    with opened(candidates[0].model.path, prepared.threads) as twin:
        reports = measure(
            sessions,
            one_sample(twin, prepared.evaluation),
            baseline=BASELINE,
            is_on_target=prepared.is_on_target,
            threads=prepared.threads,
            twin=twin,
            seconds=min(TIMING_SECONDS[prepared.request.effort], max(MIN_TIMING_SECONDS, clock.left() / (len(sessions) + 2))),
            min_runs=MIN_RUNS[prepared.request.effort] if clock.left() > 0 else FEWEST_RUNS,
            seed=prepared.request.seed,
            on_progress=lambda _text, done: reporter.tell("time", text, done),
        )
    for item in candidates:
        item.latency = reports.get(item.name)
    if prepared.budget and any(term.quantity == "ram_mb" for term in prepared.budget.terms):
        measure_memory(prepared, candidates, reporter)


def measure_memory(prepared: Prepared, candidates: list[Made], reporter: Reporter) -> None:
    """Peak memory of every candidate, each in a process of its own; only where the budget asks for it."""
    for item in candidates:
        if item.latency is None or item.model is None or item.session is None:
            continue
        reporter.tell("time", f"measuring the memory of {item.name}", 1.0)
        peak = measure_peak_mb(item.model.path, one_sample(item.session, prepared.evaluation), threads=prepared.threads)
        item.latency = msgspec.structs.replace(item.latency, peak_rss_mb=peak)


def one_sample(session: Session, data: Dataset) -> dict[str, Array]:
    """The first sample as a batch; repeated where the model insists on a larger one."""
    fixed = next((spec.shape[0] for spec in session.inputs if spec.shape and isinstance(spec.shape[0], int)), 1)
    return {name: np.ascontiguousarray(np.repeat(array[:1], fixed, axis=0)) for name, array in data.inputs.items()}


# --- scales of the previous release -----------------------------------------------------------------------------------------


def keep_previous(prepared: Prepared, candidates: list[Made], budget: Budget, reporter: Reporter, clock: Clock) -> bool:
    """Add the best static int8 candidate once more, with the previous release's scales where they fit.

    What devices would download for either is measured, where the request says how. Returns whether there is a new model.
    """
    best = _best_int8(candidates, budget) if prepared.previous else None
    if prepared.previous is None or best is None or best.recipe is None or clock.share_spent() > 1:
        return False
    recipe = _keeping(best.recipe, prepared.previous)
    reporter.tell("time", f"making {recipe.name}", 1.0)
    item = _make(recipe, prepared, {}, lambda text, _done: reporter.tell("time", f"{recipe.name}: {text}", 1.0))
    candidates.append(item)
    if item.model is None:
        return False
    Evaluator(prepared, candidates[0]).evaluate(item)
    if item.session is None:
        return False
    if measure_update := prepared.request.update_bytes:
        for each in (best, item):
            assert each.model is not None
            reporter.tell("time", f"measuring the update to {each.name}", 1.0)
            each.update_bytes = measure_update(prepared.previous, each.model.path)
    return True


def _best_int8(candidates: list[Made], budget: Budget) -> Made | None:
    """The static int8 candidate that the gate would choose, had it only these; None where there is none."""
    able = [item for item in candidates if item.session is not None and item.recipe is not None and _is_static(item.recipe)]
    if not able:
        return None
    measured = [_measured(item) for item in (candidates[0], *able)]
    meeting = [item for item in measured[1:] if is_quality_met(item, budget)]
    chosen = pick_fastest(meeting) if meeting else max(measured[1:], key=_fidelity_of)
    return next(item for item in able if item.name == chosen.name)


def _fidelity_of(item: Measured) -> float:
    report = item.evaluation
    return -report.drop if report else float("-inf")


def _is_static(recipe: Recipe) -> bool:
    return any(spec.name in KEEPING for spec in recipe.passes)


def _keeping(recipe: Recipe, previous: Path) -> Recipe:
    """The recipe with the previous release's scales."""
    settings = {"previous": str(previous), "previous_digest": digest_file(previous)}
    passes = tuple(
        replace(spec, settings={**spec.settings, **settings}) if spec.name in KEEPING else spec for spec in recipe.passes
    )
    purpose = "the previous release's scales where they fit"
    return Recipe(name=f"{recipe.name}-kept-scales", purpose=purpose, passes=passes)


# --- judge and write --------------------------------------------------------------------------------------------------------


def _whole_budget(prepared: Prepared, candidates: list[Made]) -> Budget:
    """The user's budget or the default, and the hardware's own limit."""
    baseline = candidates[0].evaluation
    assert baseline is not None
    budget = prepared.budget or default_budget(prepared.metric, baseline.value)
    flash = prepared.target.budget.flash_mb or prepared.target.flash_mb
    if flash is None:
        return budget
    limit = Term(name="flash_mb", quantity="size_mb", operator="<=", limit=flash, note=f"limit of {prepared.target.name}")
    return replace(budget, terms=(*budget.terms, limit))


def _measured(item: Made) -> Measured:
    return Measured(
        name=item.name,
        size_bytes=item.model.path.stat().st_size if item.model else 0,
        evaluation=item.evaluation,
        latency=item.latency,
        ram_mb=item.latency.peak_rss_mb if item.latency else None,
        failure=item.failure,
        update_bytes=item.update_bytes,
    )


def _assemble(prepared: Prepared, candidates: list[Made], budget: Budget, judgement: Judgement, clock: Clock) -> OptimizeResult:
    now = datetime.now(UTC).replace(microsecond=0)
    records = {item.name: _record(prepared, item, judgement, now) for item in candidates}
    chosen = next(item for item in candidates if item.name == judgement.chosen)
    assert chosen.session is not None
    return OptimizeResult(
        request=_summarize(prepared, budget),
        target=prepared.target,
        baseline=records[BASELINE],
        candidates=tuple(records.values()),
        chosen=records[judgement.chosen],
        data=_describe_data(prepared),
        is_budget_met=judgement.is_budget_met,
        verdict=judgement.sentence,
        seconds=clock.spent(),
        host=fingerprint(chosen.session.runtime, chosen.session.runtime_version),
        warnings=(*prepared.warnings, *_doubts(records[judgement.chosen])),
    )


def _doubts(chosen: Candidate) -> tuple[str, ...]:
    """Terms that the chosen candidate meets with a reservation."""
    checks = [check for check in chosen.verdict.checks if check.is_met and check.note]
    doubts = [check for check in checks if "interval" in check.note]
    return tuple(f"{check.name}{check.operator}{check.limit:g} is met, but {check.note}" for check in doubts)


def _record(prepared: Prepared, item: Made, judgement: Judgement, now: datetime) -> Candidate:
    return Candidate(
        name=item.name,
        target=prepared.target.name,
        target_digest=prepared.target_digest,
        source=prepared.source.model,
        contract=prepared.contract,
        verdict=judgement.verdicts[item.name],
        seed=prepared.request.seed,
        created_at=now,
        edgekit_version=__version__,
        artifact=_artifact(item),
        lineage=item.model.lineage if item.model else (),
        evaluation=item.evaluation,
        latency=item.latency,
        is_on_pareto_front=item.name in judgement.pareto,
    )


def _artifact(item: Made) -> ModelArtifact | None:
    if item.model is None or item.session is None:
        return None
    model = item.model
    return ModelArtifact(
        path=f"model.{model.format}",
        digest=digest_file(model.path),
        size_bytes=model.path.stat().st_size,
        format=model.format,
        inputs=item.session.inputs,
        outputs=item.session.outputs,
        precision=model.precision,
        parameters=facts_of(read_onnx(model.path)).parameters if model.format == "onnx" else None,
    )


def _summarize(prepared: Prepared, budget: Budget) -> RequestSummary:
    request = prepared.request
    return RequestSummary(
        model=request.model,
        target=request.target,
        data=request.data,
        evaluation=request.evaluation,
        metric=prepared.metric.name,
        budget=budget.text,
        is_default_budget=budget.is_default,
        effort=request.effort,
        seed=request.seed,
        threads=prepared.threads,
        weights=str(request.weights) if request.weights else None,
    )


def _describe_data(prepared: Prepared) -> tuple[DataDescription, ...]:
    return tuple(
        DataDescription(
            role=role,
            source=data.source,
            digest=data.digest,
            samples=len(data),
            has_labels=data.labels is not None,
            class_names=data.class_names,
            class_counts=_count_classes(data) if prepared.contract.task == "classification" else {},
        )
        for role, data in (("calibration", prepared.calibration), ("evaluation", prepared.evaluation))
    )


def _count_classes(data: Dataset) -> dict[str, int]:
    """Samples by class: its name where there are names, else its index."""
    if data.labels is None:
        return {}
    values, counts = np.unique(data.labels, return_counts=True)
    names = data.class_names
    return {
        names[int(value)] if 0 <= int(value) < len(names) else str(value): int(count)
        for value, count in zip(values, counts, strict=True)
    }


def _audits(prepared: Prepared, candidates: list[Made], names: set[str]) -> dict[str, RuntimeAudit]:
    """What the runtime really runs of these candidates; an audit that fails is left out."""
    audits = {}
    for item in candidates:
        if item.name not in names or item.session is None or item.model is None or item.model.format != "onnx":
            continue
        try:
            feeds = one_sample(item.session, prepared.evaluation)
            audits[item.name] = audit_runtime(item.model.path, feeds, threads=prepared.threads)
        except Exception:
            logger.debug("no audit candidate=%s", item.name, exc_info=True)
    return audits


def _by_operator(audit: RuntimeAudit) -> tuple[OpLatency, ...]:
    """Time by kind of operator, slowest first."""
    counts = Counter(kernel.op_type for kernel in audit.kernels)
    spent = dict.fromkeys(counts, 0.0)
    for kernel in audit.kernels:
        spent[kernel.op_type] += kernel.ms or 0.0
    total = sum(spent.values()) or 1.0
    order = sorted(spent, key=lambda kind: -spent[kind])
    return tuple(OpLatency(op_type=kind, count=counts[kind], ms=spent[kind], share=spent[kind] / total) for kind in order)


def write_output(prepared: Prepared, candidates: list[Made], result: OptimizeResult, table: LatencyTable | None = None) -> None:
    """Write everything beside the output folder, then swap it in."""
    from edgekit.compiler.report import write_report

    staging = open_staging(prepared.out)
    models = {item.name: item.model for item in candidates if item.session is not None}
    for record in result.candidates:
        folder = staging if record.name == result.chosen.name else staging / "candidates" / record.name
        model = models.get(record.name)
        if model is not None and record.artifact is not None:
            write_durably(folder / record.artifact.path, model.path.read_bytes())
        write_durably(folder / "candidate.json", encode_json(record))
    write_report(staging, result)
    if table is not None:
        write_durably(staging / LATENCY_TABLE, encode_json(table))
    swap_in(staging, prepared.out)
