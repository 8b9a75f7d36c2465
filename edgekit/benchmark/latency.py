"""Latency of any number of models against a baseline, in one interleaved run.

Every round runs each model once, in an order drawn anew, so that whatever the machine does meanwhile (other processes,
frequency, heat) falls on all alike. The baseline takes part twice, the second time as a session of its own where the caller
gives a twin (two sessions of one file differ by a percent: they lie elsewhere in memory); what the two may differ by, the
97.5 % bootstrap bound, is the noise floor. Ratios are of medians over the same rounds, with a paired bootstrap interval (Efron
and Tibshirani, "An Introduction to the Bootstrap", 1993, percentile method). Timings exclude the first runs, until the median
settles.

With several threads a runtime's workers go on spinning after a request (ONNX Runtime's for some 30 ms), on the CPUs that the
next session needs: ``has_rests`` waits for them.

    >>> from edgekit.benchmark.latency import measure
    >>> measure({"fp32": a, "int8": b}, feeds, baseline="fp32", is_on_target=True, threads=1)  # doctest: +SKIP
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.benchmark.fingerprint import fingerprint
from edgekit.errors import UsageError
from edgekit.runtime.session import Array, Session
from edgekit.schema.measurement import LatencyReport

Comparison = Literal["baseline", "faster", "slower", "tie"]
Progress = Callable[[str, float], None]
Times = NDArray[np.float64]

WARMUP_WINDOW = 8
WARMUP_WINDOWS = 3
WARMUP_TOLERANCE = 0.02
MAX_WARMUP_SECONDS = 2.0
MAX_ROUNDS = 20_000
RESAMPLES = 1000
BLOCK = 1_000_000
MIN_NOISE = 0.01
"""Two sessions of the very same file differ by up to a percent; less is never a difference."""
WATCH_SECONDS = 0.00005
REST_STEP_SECONDS = 0.0005
MAX_REST_SECONDS = 0.2
MAX_BUSY_SHARE = 0.2
_TWIN = "\0twin"


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """How many runs a session was warmed up with, and whether its median settled; None where too few runs fit to tell."""

    runs: int
    is_settled: bool | None


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Milliseconds by model, one row a round; ``twin`` is the baseline's second run in each round."""

    runs: dict[str, Times]
    twin: Times
    warmup_runs: dict[str, int]
    unsettled: tuple[str, ...] = ()
    """Models whose warm-up ran out of time before the median settled."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Ratio of the baseline's medians in the second and the first half of the rounds, with a 95 % bootstrap interval."""

    ratio: float
    low: float
    high: float


def _time_once(session: Session, feeds: Mapping[str, Array]) -> float:
    started = time.perf_counter_ns()
    session.run(feeds)
    return (time.perf_counter_ns() - started) / 1e6


def warm_up(session: Session, feeds: Mapping[str, Array]) -> int:
    """Run until the median settles, see :func:`settle`.

    Returns:
        How many runs it took.
    """
    return settle(session, feeds).runs


def settle(session: Session, feeds: Mapping[str, Array]) -> WarmUp:
    """Run until the medians of three windows of eight runs in a row lie within 2 %, or for two seconds."""
    times: list[float] = []
    deadline = time.perf_counter() + MAX_WARMUP_SECONDS
    while True:
        times.append(_time_once(session, feeds))
        is_full = len(times) >= WARMUP_WINDOWS * WARMUP_WINDOW
        if is_full and _is_stable(times[-WARMUP_WINDOWS * WARMUP_WINDOW :]):
            return WarmUp(runs=len(times), is_settled=True)
        if time.perf_counter() > deadline and len(times) >= 2:
            return WarmUp(runs=len(times), is_settled=False if is_full else None)


def _is_stable(times: list[float]) -> bool:
    medians = np.median(np.reshape(times, (WARMUP_WINDOWS, WARMUP_WINDOW)), axis=1)
    return bool(medians.max() - medians.min() <= WARMUP_TOLERANCE * medians.min())


def let_workers_rest() -> bool:
    """Wait until no other thread of this process is at work, 0.2 s at the most.

    Returns:
        Whether any was.
    """
    deadline = time.perf_counter() + MAX_REST_SECONDS
    has_waited = False
    while _is_any_worker_busy() and time.perf_counter() < deadline:
        has_waited = True
        time.sleep(REST_STEP_SECONDS)
    return has_waited


def _is_any_worker_busy() -> bool:
    """Whether other threads get CPU time while this one watches; it does not sleep, so that its own CPU stays awake."""
    started, used = time.perf_counter(), time.process_time() - time.thread_time()
    while (spent := time.perf_counter() - started) < WATCH_SECONDS:
        pass
    return time.process_time() - time.thread_time() - used > MAX_BUSY_SHARE * spent


def collect(
    sessions: Mapping[str, Session],
    feeds: Mapping[str, Array],
    *,
    baseline: str,
    twin: Session | None = None,
    requests: Mapping[str, Mapping[str, Array]] | None = None,
    seconds: float,
    min_runs: int,
    seed: int,
    on_progress: Progress | None = None,
    on_start: Callable[[], None] | None = None,
    has_rests: bool = False,
) -> Timings:
    """Warm every session up, then time them round by round.

    Args:
        sessions: models by name.
        feeds: one request, for every session that ``requests`` does not name.
        baseline: the name of the session to compare with.
        twin: a second session of the baseline's model; without it the baseline's own session runs twice a round.
        requests: the same request as other sessions take it, by session name.
        seconds: time for each session; the whole run takes about (number of sessions + 1) times as long.
        min_runs: at least so many rounds, whatever they take.
        seed: draws the order within the rounds.
        on_progress: called now and then with a text and the fraction done.
        on_start: called between the warm-up and the first round.
        has_rests: wait before each run while workers of other sessions spin, and then run once untimed to wake one's own.
    """
    requests = requests or {}
    entries = [(name, session, requests.get(name, feeds)) for name, session in sessions.items()]
    warmups = {name: settle(session, request) for name, session, request in entries}
    entries.append((_TWIN, twin or sessions[baseline], requests.get(baseline, feeds)))
    if twin:
        warm_up(*entries[-1][1:])
    if on_start:
        on_start()
    rows: list[list[float]] = []
    generator = np.random.default_rng(seed)
    started = time.perf_counter()
    budget = seconds * len(entries)
    while len(rows) < MAX_ROUNDS:
        row = [0.0] * len(entries)
        for position in generator.permutation(len(entries)):
            if has_rests and let_workers_rest():
                _time_once(*entries[position][1:])
            row[position] = _time_once(*entries[position][1:])
        rows.append(row)
        spent = time.perf_counter() - started
        if len(rows) >= min_runs and spent >= budget:
            break
        if on_progress and len(rows) % 16 == 0:
            done = min(1.0, len(rows) / min_runs, max(spent / budget, 0.0) if budget else 1.0)
            on_progress(f"timing {len(sessions)} models", done)
    table = np.asarray(rows, dtype=np.float64)
    runs = {name: table[:, i] for i, (name, _session, _request) in enumerate(entries) if name != _TWIN}
    return Timings(
        runs=runs,
        twin=table[:, -1],
        warmup_runs={name: found.runs for name, found in warmups.items()},
        unsettled=tuple(name for name, found in warmups.items() if found.is_settled is False),
    )


def bootstrap_medians(samples: Times, *, seed: int) -> Times:
    """Medians of resampled rounds.

    Args:
        samples: float64 [rounds, models].
        seed: draws the resamples.

    Returns:
        float64 [resamples, models]; the same rounds for every model, so that ratios are paired.
    """
    rounds = len(samples)
    if rounds > 2000:  # the interval of a median settles long before; a regular subset keeps this fast
        samples = samples[:: rounds // 1000]
        rounds = len(samples)
    generator = np.random.default_rng(seed)
    step = max(1, BLOCK // (rounds * samples.shape[1]))
    parts = [
        np.median(samples[generator.integers(0, rounds, (min(step, RESAMPLES - start), rounds))], axis=1)
        for start in range(0, RESAMPLES, step)
    ]
    return np.concatenate(parts)


def _interval(values: Times) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def measure(
    sessions: Mapping[str, Session],
    feeds: Mapping[str, Array],
    *,
    baseline: str,
    is_on_target: bool,
    threads: int,
    twin: Session | None = None,
    requests: Mapping[str, Mapping[str, Array]] | None = None,
    seconds: float = 2.0,
    min_runs: int = 50,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, LatencyReport]:
    """Time models against each other.

    Args:
        sessions: models by name, loaded with ``threads`` threads.
        feeds: one request by input name, for every session that ``requests`` does not name.
        baseline: the name of the session that ratios compare with.
        is_on_target: whether this machine is the target's hardware.
        threads: for the report.
        twin: a second session of the baseline's model, for the noise floor.
        requests: the same request as other sessions take it (other input names or types), by session name.
        seconds: time for each session.
        min_runs: at least so many runs of each.
        seed: draws orders and resamples.
        on_progress: called with a text and the fraction done.

    Returns:
        A report by name; the baseline's has no ratio.

    Raises:
        UsageError: ``benchmark.baseline`` when the baseline is not among the sessions.
    """
    if baseline not in sessions:
        raise UsageError("benchmark.baseline", f"{baseline}: not among the models.", hint=f"Choose from {', '.join(sessions)}.")
    timings = collect(
        sessions,
        feeds,
        baseline=baseline,
        twin=twin,
        requests=requests,
        seconds=seconds,
        min_runs=min_runs,
        seed=seed,
        on_progress=on_progress,
    )
    return summarize(timings, sessions, baseline=baseline, is_on_target=is_on_target, threads=threads, seed=seed)


def noise_floor(runs: Times, twin: Times, *, seed: int) -> float:
    """How far apart two sessions of one model may lie: the 97.5 % bootstrap bound of |ratio of medians - 1|.

    Args:
        runs: float64 [rounds], milliseconds.
        twin: float64 [rounds], the other session in the same rounds.
        seed: draws the resamples.
    """
    resampled = bootstrap_medians(np.stack([runs, twin], axis=1), seed=seed)
    return float(np.percentile(np.abs(resampled[:, 0] / resampled[:, 1] - 1.0), 97.5))


def drift_of(runs: Times, *, seed: int) -> Drift:
    """How a model's time changed over the run.

    Args:
        runs: float64 [rounds], milliseconds, in order; two rounds at least.
        seed: draws the resamples.
    """
    middle = len(runs) // 2
    halves = [bootstrap_medians(half[:, None], seed=seed + i)[:, 0] for i, half in enumerate((runs[:middle], runs[middle:]))]
    low, high = _interval(halves[1] / halves[0])
    return Drift(ratio=float(np.median(runs[middle:]) / np.median(runs[:middle])), low=low, high=high)


def summarize(
    timings: Timings, sessions: Mapping[str, Session], *, baseline: str, is_on_target: bool, threads: int, seed: int
) -> dict[str, LatencyReport]:
    """The figures of what :func:`collect` timed; arguments and result as of :func:`measure`."""
    names = list(timings.runs)
    samples = np.stack([timings.runs[name] for name in names], axis=1)
    noise = noise_floor(timings.runs[baseline], timings.twin, seed=seed)
    resampled = bootstrap_medians(samples, seed=seed)
    base = names.index(baseline)
    base_median = float(np.median(samples[:, base]))
    reports = {}
    for i, name in enumerate(names):
        p50, p90, p99 = (float(value) for value in np.percentile(samples[:, i], [50, 90, 99]))
        low, high = _interval(resampled[:, i])
        ratio_low, ratio_high = _interval(resampled[:, i] / resampled[:, base])
        is_baseline = name == baseline
        reports[name] = LatencyReport(
            host=fingerprint(sessions[name].runtime, sessions[name].runtime_version),
            is_on_target=is_on_target,
            threads=threads,
            warmup_runs=timings.warmup_runs[name],
            runs=len(samples),
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            mean_ms=float(samples[:, i].mean()),
            p50_low_ms=low,
            p50_high_ms=high,
            noise=noise,
            ratio=None if is_baseline else p50 / base_median,
            ratio_low=None if is_baseline else ratio_low,
            ratio_high=None if is_baseline else ratio_high,
            is_settled=name not in timings.unsettled,
        )
    return reports


def compare(report: LatencyReport) -> Comparison:
    """What a report says against its baseline: a difference inside the interval or the noise is a tie."""
    if report.ratio is None or report.ratio_low is None or report.ratio_high is None:
        return "baseline"
    if report.ratio_low <= 1 <= report.ratio_high or abs(report.ratio - 1) <= max(report.noise, MIN_NOISE):
        return "tie"
    return "faster" if report.ratio < 1 else "slower"
