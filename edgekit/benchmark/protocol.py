"""One benchmark from request to record: the same steps on a workstation, in CI and on a device.

For each thread count: pin to CPUs, open a session for each model and a twin of the baseline, measure memory in processes of
their own, warm up, time in interleaved rounds, and look at the machine before and after. Notes say what may have moved the
figures.

    >>> run_benchmark(BenchmarkRequest(models=("fp32.onnx", "int8.onnx"), threads=(1, 2)))  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

import edgekit
from edgekit.benchmark.conditions import judge, take_snapshot
from edgekit.benchmark.latency import Drift, Progress, Timings, collect, drift_of, summarize
from edgekit.benchmark.memory import measure_peak_rss
from edgekit.benchmark.pinning import allowed_cpus, choose_cpus, pinned
from edgekit.benchmark.request import fit_request, make_request, take_samples
from edgekit.dataset.load import load_dataset
from edgekit.errors import UsageError
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import Array, Session, SessionOptions
from edgekit.schema.benchmark import BenchmarkRequest, BenchmarkRun, Conditions, Snapshot, ThreadRun, TimedModel
from edgekit.schema.digest import digest_file
from edgekit.schema.measurement import LatencyReport

MAX_KEPT_ROUNDS = 2000
NOISY = 0.05
MIN_DRIFT = 0.02
"""Interleaving keeps the ratios right through a drift; smaller ones are not worth a word."""
_DECIMALS = 5
Requests = dict[str, dict[str, Array]]


def name_models(paths: Sequence[str]) -> list[str]:
    """Short, distinct names: the file's name, with as many folders as tell two files apart, numbered where they are the same.

    >>> name_models(["a/fp32.onnx", "b/x/int8.onnx", "c/x/int8.onnx", "a/fp32.onnx"])
    ['fp32.onnx', 'b/x/int8.onnx', 'c/x/int8.onnx', 'fp32.onnx (2)']
    """
    files = [Path(path) for path in paths]
    names: list[str] = []
    for file in files:
        depth = 1
        while depth < len(file.parts) and any(file != other and _end(file, depth) == _end(other, depth) for other in files):
            depth += 1
        name = _end(file, depth)
        count = names.count(name) + sum(1 for used in names if used.startswith(f"{name} ("))
        names.append(f"{name} ({count + 1})" if count else name)
    return names


def _end(file: Path, depth: int) -> str:
    return str(Path(*file.parts[-depth:]))


def find_model(wanted: str, names: Sequence[str], paths: Sequence[str]) -> str:
    """The name of a model that was given by name or path.

    Raises:
        UsageError: ``benchmark.baseline``.
    """
    for name, path in zip(names, paths, strict=True):
        if wanted in {name, path}:
            return name
    raise UsageError("benchmark.baseline", f"{wanted}: not among the models.", hint=f"Choose from {', '.join(names)}.")


def _make_requests(request: BenchmarkRequest, sessions: Mapping[str, Session]) -> tuple[Requests, list[str]]:
    """The request of each session, the first one's fitted to the others, and notes."""
    first = next(iter(sessions.values())).inputs
    if request.data is None:
        values = make_request(first, batch=request.batch)
    else:
        values = take_samples(load_dataset(request.data, first).inputs, first, batch=request.batch)
    requests, notes = {}, []
    for name, session in sessions.items():
        requests[name], is_same = fit_request(values, session.inputs, name=name, batch=request.batch)
        if not is_same and request.data is not None:
            notes.append(f"{name} takes its input in another form: it is timed on random values")
    return requests, notes


def _choose(threads: int, *, wanted: bool | None) -> tuple[tuple[int, ...], list[str]]:
    """The CPUs to pin to, none where it is not wanted or not possible, and why."""
    if wanted is False:
        return (), []
    allowed = allowed_cpus()
    if not allowed:
        return (), ["not pinned: this system has no CPU masks"] if wanted else []
    if threads > len(allowed) or (threads == len(allowed) and wanted is None):
        return (), [f"{threads} threads on {len(allowed)} CPUs: not pinned"] if wanted else []
    return choose_cpus(threads, allowed=allowed), []


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One thread count, with its share of the progress."""

    request: BenchmarkRequest
    models: Mapping[str, Path]
    baseline: str
    threads: int
    on_progress: Progress

    def measure(self) -> tuple[ThreadRun, list[str]]:
        """Time the models; the run, and notes that hold for every thread count."""
        cpus, why = _choose(self.threads, wanted=self.request.is_pinned)
        with ExitStack() as stack:
            with pinned(cpus):
                sessions = {name: self._open(path, stack) for name, path in self.models.items()}
                requests, notes = _make_requests(self.request, sessions)
                peaks = self._measure_memory(requests)
                timings, conditions = self._time(sessions, self._open(self.models[self.baseline], stack), requests, cpus)
            reports = self._report(timings, sessions, peaks)  # names the machine, all its CPUs: not while pinned
        drift = drift_of(timings.runs[self.baseline], seed=self.request.seed)
        run = ThreadRun(
            threads=self.threads,
            cpus=cpus,
            reports=reports,
            drift=drift.ratio,
            drift_low=drift.low,
            drift_high=drift.high,
            conditions=conditions,
            times_ms=_keep(timings),
            notes=(*why, *_timing_notes(reports[self.baseline], drift, timings), *conditions.notes),
        )
        return run, notes

    @property
    def _options(self) -> SessionOptions:
        return SessionOptions(threads=self.threads)

    def _open(self, path: Path, stack: ExitStack) -> Session:
        session = open_session(path, options=self._options)
        stack.callback(session.close)
        return session

    def _measure_memory(self, requests: Requests) -> dict[str, float | None]:
        self.on_progress("measuring memory", 0.0)
        return {name: measure_peak_rss(path, requests[name], options=self._options) for name, path in self.models.items()}

    def _time(
        self, sessions: Mapping[str, Session], twin: Session, requests: Requests, cpus: tuple[int, ...]
    ) -> tuple[Timings, Conditions]:
        snapshots: list[Snapshot] = []
        timings = collect(
            sessions,
            requests[self.baseline],
            baseline=self.baseline,
            twin=twin,
            requests=requests,
            seconds=self.request.seconds,
            min_runs=self.request.min_runs,
            seed=self.request.seed,
            on_progress=self.on_progress,
            on_start=lambda: snapshots.append(take_snapshot()),
            has_rests=self.threads > 1,
        )
        return timings, judge(snapshots[0], take_snapshot(), cpus=cpus)

    def _report(
        self, timings: Timings, sessions: Mapping[str, Session], peaks: Mapping[str, float | None]
    ) -> dict[str, LatencyReport]:
        reports = summarize(
            timings,
            sessions,
            baseline=self.baseline,
            is_on_target=True,  # no target was named: the host is what is measured
            threads=self.threads,
            seed=self.request.seed,
        )
        return {name: msgspec.structs.replace(report, peak_rss_mb=peaks[name]) for name, report in reports.items()}


def _timing_notes(report: LatencyReport, drift: Drift, timings: Timings) -> Iterator[str]:
    if timings.unsettled:
        yield f"the warm-up did not settle within its time: {', '.join(timings.unsettled)}"
    if not drift.low <= 1 <= drift.high and abs(drift.ratio - 1) > max(report.noise, MIN_DRIFT):
        way = "slower" if drift.ratio > 1 else "faster"
        yield f"the machine drifted: the second half of the rounds was {abs(drift.ratio - 1):.1%} {way} than the first"
    if report.noise > NOISY:
        yield f"the machine is noisy, {report.noise:.1%}: close what else runs, or give more --seconds"


def _keep(timings: Timings) -> dict[str, tuple[float, ...]]:
    """Some of the rounds, evenly spread; the same for every model."""
    rounds = len(timings.twin)
    kept = np.linspace(0, rounds - 1, min(rounds, MAX_KEPT_ROUNDS)).astype(int)
    return {name: tuple(np.round(times[kept], _DECIMALS).tolist()) for name, times in timings.runs.items()}


def _quiet(_text: str, _done: float) -> None:
    pass


def run_benchmark(request: BenchmarkRequest, *, on_progress: Progress = _quiet) -> BenchmarkRun:
    """Time models against each other.

    Args:
        request: what and how.
        on_progress: called with a text and the fraction of the whole run that is done.

    Returns:
        A run for each thread count, in the request's order.

    Raises:
        UsageError: ``benchmark.baseline``, or ``benchmark.no_models`` without any model or thread count.
        DataError: when one request does not fit every model.
        ArtifactError: when a model cannot be loaded or run.
    """
    if not request.models or not request.threads:
        raise UsageError("benchmark.no_models", "there is nothing to time.", hint="Name a model and a number of threads.")
    names = name_models(request.models)
    models = {name: Path(path) for name, path in zip(names, request.models, strict=True)}
    baseline = find_model(request.baseline, names, request.models) if request.baseline else names[0]
    runs: list[ThreadRun] = []
    notes: dict[str, None] = {}
    for i, threads in enumerate(request.threads):
        stage = _Stage(
            request=request,
            models=models,
            baseline=baseline,
            threads=threads,
            on_progress=_part(on_progress, i, len(request.threads), threads),
        )
        run, found = stage.measure()
        runs.append(run)
        notes |= dict.fromkeys(found)
    return BenchmarkRun(
        created_at=datetime.now(UTC),
        edgekit_version=edgekit.__version__,
        request=request,
        baseline=baseline,
        models=tuple(
            TimedModel(name=name, path=str(path), digest=digest_file(path), size_bytes=path.stat().st_size)
            for name, path in models.items()
        ),
        runs=tuple(runs),
        notes=tuple(notes),
    )


def _part(on_progress: Progress, index: int, count: int, threads: int) -> Callable[[str, float], None]:
    """The progress of one of several parts."""
    suffix = f", {threads} thread{'s' if threads > 1 else ''}" if count > 1 else ""
    return lambda text, done: on_progress(text + suffix, (index + done) / count)
