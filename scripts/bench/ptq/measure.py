"""Quality, size and latency of what every tool made of one model.

All models of one thread count are timed in one interleaved run against fp32, a batch of one real sample. Quality is measured on
data that no tool has seen. A tool that failed, or whose model does not run, is a row with its reason.

    >>> report = measure_model(Path("cache"), "convnet", ["ort-good", "nncf", "edgekit"])  # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
from runs import Run, given_to, read_run

from edgekit.benchmark.latency import Comparison, compare, measure
from edgekit.dataset.data import Array, Dataset
from edgekit.dataset.load import load_dataset
from edgekit.errors import EdgekitError
from edgekit.evaluation.evaluate import evaluate, predict
from edgekit.evaluation.metric import Metric, resolve_metric
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import Session, SessionOptions
from edgekit.schema.base import Record
from edgekit.schema.measurement import EvalReport, LatencyReport
from edgekit.target.probe import host_isa

BASELINE = "fp32"
THREADS = (1, 2)
SECONDS = 1.0
MAX_RELATIVE_DROP = 0.01
MIN_AGREEMENT = 0.99
MIN_SQNR_DB = 20.0
ROUNDING = 1e-12


class Quality(Record, frozen=True, kw_only=True):
    """What the evaluation found; ``drop`` is in the metric's unit and positive when worse than fp32."""

    value: float
    drop: float
    sqnr_db: float
    agreement: float | None
    is_in_budget: bool


class Timing(Record, frozen=True, kw_only=True):
    """Latency with so many threads; ``ratio`` to fp32 with its 95 % interval, below 1 is faster."""

    threads: int
    p50_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    noise: float
    verdict: Comparison


class Row(Record, frozen=True, kw_only=True):
    """One tool on one model; without ``quality`` and ``timings`` where it failed, then with the reason."""

    tool: str
    version: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss_mb: float = 0.0
    size_bytes: int = 0
    failure: str | None = None
    quality: Quality | None = None
    timings: tuple[Timing, ...] = ()

    @property
    def is_usable(self) -> bool:
        """Whether it made a model that is good enough."""
        return self.quality is not None and self.quality.is_in_budget

    def ratio(self, threads: int) -> float:
        """Latency over fp32's with so many threads."""
        return next(item.ratio for item in self.timings if item.threads == threads)


class ModelReport(Record, frozen=True, kw_only=True):
    """All tools on one model; the first row is fp32."""

    model: str
    metric: str
    samples: int
    rows: tuple[Row, ...]

    def row(self, tool: str) -> Row | None:
        """A tool's row."""
        return next((row for row in self.rows if row.tool == tool), None)


def is_in_budget(report: EvalReport) -> bool:
    """Whether a model keeps enough: 20 dB, 99 % agreement, or 99 % of a metric that the labels decide (by the metric)."""
    match report.metric:
        case "sqnr_db":
            return report.value >= MIN_SQNR_DB
        case "agreement":
            return report.value >= MIN_AGREEMENT
        case _:
            return report.drop <= MAX_RELATIVE_DROP * abs(report.baseline) + ROUNDING


def measure_model(
    cache: Path, model: str, tools: Sequence[str], *, threads: Sequence[int] = THREADS, seconds: float = SECONDS
) -> ModelReport:
    """Evaluate and time fp32 and the model of every tool.

    Args:
        cache: the benchmark's folder: ``models/MODEL`` and ``results/MODEL/TOOL``.
        model: the model's name.
        tools: rows of the report; one without a record of these files is left out.
        threads: thread counts, each an interleaved run of its own.
        seconds: time for each model in each of them.
    """
    source, results = cache / "models" / model, cache / "results" / model
    about = json.loads((source / "about.json").read_text(encoding="utf-8"))
    paths = {BASELINE: source / "model.onnx"}
    given = given_to(source)
    runs = {tool: run for tool in tools if (run := read_run(results / tool / "run.json")) and run.given in {given, ""}}
    paths |= {tool: results / tool / "model.onnx" for tool, run in runs.items() if run.failure is None}
    failures: dict[str, str] = {}
    data, qualities = _evaluate_all(paths, source / "evaluation.npz", about["metric"], failures)
    timings = {count: _time_all({n: paths[n] for n in qualities}, data, count, seconds, failures) for count in threads}
    rows = [Row(tool=BASELINE, size_bytes=paths[BASELINE].stat().st_size, quality=qualities[BASELINE])]
    rows += [_row(tool, run, paths.get(tool), failures.get(tool)) for tool, run in runs.items()]
    return ModelReport(
        model=model,
        metric=about["metric"],
        samples=len(data),
        rows=tuple(_filled(row, qualities, timings) for row in rows),
    )


def _row(tool: str, run: Run, path: Path | None, failure: str | None) -> Row:
    return Row(
        tool=tool,
        version=run.version,
        seconds=run.cost.seconds,
        cpu_seconds=run.cost.cpu_seconds,
        peak_rss_mb=run.cost.peak_rss_mb,
        size_bytes=path.stat().st_size if path else 0,
        failure=run.failure or failure,
    )


def _filled(row: Row, qualities: Mapping[str, Quality], timings: Mapping[int, Mapping[str, LatencyReport]]) -> Row:
    """The row with its measurements; none where it failed on the way."""
    if row.failure is not None:
        return row
    reports = [_timing(timings[threads][row.tool]) for threads in timings]
    fields = {name: getattr(row, name) for name in row.__struct_fields__}
    return Row(**{**fields, "quality": qualities[row.tool], "timings": tuple(reports)})


def _timing(report: LatencyReport) -> Timing:
    return Timing(
        threads=report.threads,
        p50_ms=report.p50_ms,
        ratio=1.0 if report.ratio is None else report.ratio,
        ratio_low=1.0 if report.ratio_low is None else report.ratio_low,
        ratio_high=1.0 if report.ratio_high is None else report.ratio_high,
        noise=report.noise,
        verdict=compare(report),
    )


# --- quality ----------------------------------------------------------------------------------------------------------------


def _evaluate_all(
    paths: Mapping[str, Path], evaluation: Path, metric_name: str, failures: dict[str, str]
) -> tuple[Dataset, dict[str, Quality]]:
    """The evaluation data, and the quality of every model that runs on it; the others' reasons go to ``failures``."""
    with closing(open_session(paths[BASELINE])) as session:
        data = load_dataset(str(evaluation), session.inputs)
        expected = _answers(paths[BASELINE], data)
    metric = resolve_metric(metric_name, has_labels=data.labels is not None, task="other")
    qualities = {}
    for name, path in paths.items():
        try:
            outputs = expected if name == BASELINE else _answers(path, data)
            qualities[name] = _quality(outputs, expected, data, metric)
        except EdgekitError as error:
            if name == BASELINE:
                raise
            failures[name] = f"made, but does not run: {error.message}"
    return data, qualities


def _answers(path: Path, data: Dataset) -> dict[str, Array]:
    """All outputs; one sample at a time where scales depend on the batch, or where the tool lost the batch axis."""
    is_dynamic = b"DynamicQuantizeLinear" in path.read_bytes()
    with closing(open_session(path)) as session:
        try:
            return predict(session, data, batch_size=1) if is_dynamic else predict(session, data)
        except EdgekitError:
            return predict(session, data, batch_size=1)


def _quality(outputs: Mapping[str, Array], expected: Mapping[str, Array], data: Dataset, metric: Metric) -> Quality:
    report = evaluate(outputs, expected, data, metric, isa=host_isa())
    figures = {**report.extra, report.metric: report.value}
    return Quality(
        value=report.value,
        drop=report.drop,
        sqnr_db=figures["sqnr_db"],
        agreement=figures.get("agreement"),
        is_in_budget=is_in_budget(report),
    )


# --- latency ----------------------------------------------------------------------------------------------------------------


def _time_all(
    paths: Mapping[str, Path], data: Dataset, threads: int, seconds: float, failures: dict[str, str]
) -> dict[str, LatencyReport]:
    """One interleaved run of all models with so many threads."""
    options = SessionOptions(threads=threads)
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(closing(open_session(path, options=options))) for name, path in paths.items()}
        twin = stack.enter_context(closing(open_session(paths[BASELINE], options=options)))
        requests = {name: _request(session, data) for name, session in sessions.items() if name not in failures}
        return measure(
            sessions,
            requests[BASELINE],
            baseline=BASELINE,
            is_on_target=True,
            threads=threads,
            twin=twin,
            requests=requests,
            seconds=seconds,
        )


def _request(session: Session, data: Dataset) -> dict[str, Array]:
    """The first sample as the model takes it: by name, or by place where a tool renamed a single input."""
    size = next((spec.shape[0] for spec in session.inputs if spec.shape and isinstance(spec.shape[0], int)), 1)
    rows = {name: np.ascontiguousarray(np.repeat(array[:1], size, axis=0)) for name, array in data.inputs.items()}
    return rows if len(rows) > 1 else {session.inputs[0].name: next(iter(rows.values()))}
