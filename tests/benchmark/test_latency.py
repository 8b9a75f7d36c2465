"""Timing by sessions that do a known amount of work; nothing here asserts a duration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.benchmark import latency
from edgekit.benchmark.fingerprint import fingerprint
from edgekit.benchmark.latency import bootstrap_medians, collect, compare, drift_of, measure, noise_floor, settle, warm_up
from edgekit.errors import UsageError
from edgekit.runtime.registry import open_session
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.measurement import LatencyReport
from edgekit.target.probe import probe_target


class FakeClock:
    """Time that only moves when a session works, so that every figure is known beforehand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 0
        monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: self.now_ns)
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now_ns / 1e9)


class ScriptedSession:
    """A session whose n-th run takes ``milliseconds(n)`` of the fake clock."""

    runtime = "scripted"
    runtime_version = "1"
    inputs = ()
    outputs = ()

    def __init__(self, clock: FakeClock, milliseconds, journal: list[Any] | None = None, name: str = "") -> None:
        self.clock, self.milliseconds, self.count = clock, milliseconds, 0
        self.journal, self.name = journal, name
        self.seen: list[Mapping[str, Any]] = []

    def run(self, feeds):
        self.clock.now_ns += round(self.milliseconds(self.count) * 1e6)
        self.count += 1
        self.seen.append(feeds)
        if self.journal is not None:
            self.journal.append(self.name)
        return {}

    def close(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch) -> FakeClock:
    return FakeClock(monkeypatch)


def jitter(base: float, seed: int, spread: float = 0.02):
    noise = np.random.default_rng(seed).normal(1, spread, 200_000)
    return lambda n: base * abs(noise[n % len(noise)])


def run_measure(sessions, **options) -> dict[str, LatencyReport]:
    defaults = {"baseline": "base", "is_on_target": False, "threads": 1, "seconds": 0.2, "min_runs": 50}
    return measure(sessions, {}, **(defaults | options))


# --- figures ----------------------------------------------------------------------------------------------------------------


def test_percentiles_of_known_times(clock):
    one_in_a_hundred = ScriptedSession(clock, lambda n: 10.0 if n % 100 == 99 else 1.0)
    report = run_measure({"base": one_in_a_hundred}, twin=ScriptedSession(clock, lambda n: 1.0), seconds=2.0)["base"]
    assert (report.p50_ms, report.p90_ms, report.p50_low_ms, report.p50_high_ms) == (1.0, 1.0, 1.0, 1.0)
    assert report.mean_ms == pytest.approx(1.09, rel=0.02)
    assert report.ratio is None
    assert report.noise == 0.0


def test_ratio_of_a_model_that_takes_half_the_time(clock):
    sessions = {"base": ScriptedSession(clock, jitter(2, 1)), "half": ScriptedSession(clock, jitter(1, 2))}
    report = run_measure(sessions, twin=ScriptedSession(clock, jitter(2, 3)))["half"]
    assert report.ratio == pytest.approx(0.5, abs=0.02)
    assert report.ratio_low <= report.ratio <= report.ratio_high
    assert compare(report) == "faster"


def test_same_model_twice_is_a_tie(clock):
    for seed in range(20):
        sessions = {"base": ScriptedSession(clock, jitter(1, seed)), "again": ScriptedSession(clock, jitter(1, 100 + seed))}
        report = run_measure(sessions, twin=ScriptedSession(clock, jitter(1, 200 + seed)), seed=seed)["again"]
        assert compare(report) == "tie"


def test_difference_inside_the_noise_floor_is_a_tie(clock):
    """The baseline differs from its own twin by a fifth: a tenth is nothing."""
    sessions = {"base": ScriptedSession(clock, jitter(1, 1)), "other": ScriptedSession(clock, jitter(0.9, 2))}
    report = run_measure(sessions, twin=ScriptedSession(clock, jitter(1.25, 3)))["other"]
    assert report.noise == pytest.approx(0.2, abs=0.02)
    assert report.ratio_high < 1
    assert compare(report) == "tie"


def test_disturbance_that_falls_on_all_alike_leaves_the_ratio(clock):
    """The machine gets three times slower half-way; interleaving cancels it."""

    def slowed(base: float, seed: int):
        times = jitter(base, seed)
        return lambda n: times(n) * (3 if n > 150 else 1)

    sessions = {"base": ScriptedSession(clock, slowed(2, 1)), "half": ScriptedSession(clock, slowed(1, 2))}
    report = run_measure(sessions, twin=ScriptedSession(clock, slowed(2, 3)), seconds=1.0)["half"]
    assert report.ratio == pytest.approx(0.5, abs=0.05)


def test_baseline_without_a_twin_runs_twice_a_round(clock):
    base, other = ScriptedSession(clock, lambda n: 1.0), ScriptedSession(clock, lambda n: 1.0)
    reports = run_measure({"base": base, "other": other}, seconds=0.0)
    assert base.count - reports["base"].warmup_runs == 2 * reports["base"].runs
    assert other.count - reports["other"].warmup_runs == reports["other"].runs


def test_unknown_baseline(clock):
    with pytest.raises(UsageError) as caught:
        run_measure({"a": ScriptedSession(clock, lambda n: 1.0)}, baseline="b")
    assert caught.value.code == "benchmark.baseline"


# --- the run itself ---------------------------------------------------------------------------------------------------------


def test_every_round_runs_every_model_once_in_changing_order(clock):
    journal: list[str] = []
    sessions = {name: ScriptedSession(clock, lambda n: 1.0, journal, name) for name in ("base", "b", "c")}
    twin = ScriptedSession(clock, lambda n: 1.0, journal, "twin")
    timings = collect(sessions, {}, baseline="base", twin=twin, seconds=0.0, min_runs=40, seed=3)
    timed = journal[-4 * len(timings.twin) :]
    rounds = [tuple(timed[i : i + 4]) for i in range(0, len(timed), 4)]
    assert len(rounds) == 40
    assert all(set(order) == {"base", "b", "c", "twin"} for order in rounds)
    assert len(set(rounds)) > 10


def test_start_is_told_between_warm_up_and_rounds(clock):
    session = ScriptedSession(clock, lambda n: 1.0)
    seen: list[int] = []
    timings = collect(
        {"base": session}, {}, baseline="base", seconds=0.0, min_runs=5, seed=0, on_start=lambda: seen.append(session.count)
    )
    assert seen == [timings.warmup_runs["base"]]


def test_spinning_workers_are_waited_for_and_ones_own_are_woken(clock, monkeypatch):
    """Workers spin for a while after every run; the run that is timed follows an untimed one of the same session."""
    journal: list[str] = []
    busy_until = [0]

    def run_and_spin(n: int) -> float:
        journal.append("busy" if clock.now_ns < busy_until[0] else "quiet")
        busy_until[0] = clock.now_ns + 30_000_000
        return 1.0

    def sleep(seconds: float) -> None:
        clock.now_ns += round(seconds * 1e9)

    monkeypatch.setattr(latency, "_is_any_worker_busy", lambda: clock.now_ns < busy_until[0])
    monkeypatch.setattr(latency.time, "sleep", sleep)
    session = ScriptedSession(clock, run_and_spin)
    timings = collect({"base": session}, {}, baseline="base", seconds=0.0, min_runs=5, seed=0, has_rests=True)
    timed = journal[timings.warmup_runs["base"] :]
    assert timed == ["quiet", "busy"] * 10
    assert set(timings.twin) == {1.0}


@pytest.mark.parametrize(("share", "is_busy"), [(0.0, False), (0.1, False), (0.5, True)])
def test_busy_worker_is_seen_by_the_cpu_time_of_the_process(monkeypatch, share, is_busy):
    now = [0.0]

    def tick() -> float:
        now[0] += 1e-6
        return now[0]

    monkeypatch.setattr(latency.time, "perf_counter", tick)
    monkeypatch.setattr(latency.time, "thread_time", lambda: now[0])
    monkeypatch.setattr(latency.time, "process_time", lambda: now[0] * (1 + share))
    assert latency._is_any_worker_busy() == is_busy


def test_worker_that_never_rests_is_not_waited_for_for_ever(clock, monkeypatch):
    monkeypatch.setattr(latency, "_is_any_worker_busy", lambda: True)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now_ns += round(seconds * 1e9)

    monkeypatch.setattr(latency.time, "sleep", sleep)
    assert latency.let_workers_rest()
    assert sum(slept) == pytest.approx(latency.MAX_REST_SECONDS, rel=0.01)


def test_order_is_drawn_from_the_seed(clock):
    def orders(seed: int) -> list[str]:
        journal: list[str] = []
        sessions = {name: ScriptedSession(clock, lambda n: 1.0, journal, name) for name in ("base", "b")}
        collect(sessions, {}, baseline="base", seconds=0.0, min_runs=20, seed=seed)
        return journal

    assert orders(1) == orders(1)
    assert orders(1) != orders(2)


def test_each_session_gets_its_own_request(clock):
    base, other = ScriptedSession(clock, lambda n: 1.0), ScriptedSession(clock, lambda n: 1.0)
    measure(
        {"base": base, "other": other},
        {"x": 1},
        requests={"other": {"y": 2}},
        baseline="base",
        is_on_target=False,
        threads=1,
        seconds=0.0,
        min_runs=3,
    )
    assert all(feeds == {"x": 1} for feeds in base.seen)
    assert all(feeds == {"y": 2} for feeds in other.seen)


def test_warm_up_goes_on_until_the_median_settles(clock):
    settling = ScriptedSession(clock, lambda n: max(1.0, 50.0 - n))
    runs = warm_up(settling, {})
    assert runs == settling.count
    assert runs > 49
    assert settle(ScriptedSession(clock, lambda n: 1.0), {}).is_settled


def test_warm_up_wants_three_windows_alike(clock):
    """Two windows at 2 ms, then 1 ms: the first two alone would have ended it."""
    stepping = ScriptedSession(clock, lambda n: 2.0 if n < 16 else 1.0)
    assert warm_up(stepping, {}) > 16 + 2 * 8


def test_warm_up_that_does_not_settle_is_told(clock):
    sessions = {"base": ScriptedSession(clock, lambda n: 1.1**n), "calm": ScriptedSession(clock, lambda n: 1.0)}
    reports = run_measure(sessions, seconds=0.0, min_runs=2)
    assert [name for name, report in reports.items() if not report.is_settled] == ["base"]


def test_too_few_warm_up_runs_tell_nothing(clock):
    found = settle(ScriptedSession(clock, lambda n: 900.0 * (n + 1)), {})
    assert (found.runs, found.is_settled) == (2, None)


def test_warm_up_ends_even_when_nothing_settles(clock):
    growing = ScriptedSession(clock, lambda n: 1.1**n)
    assert warm_up(growing, {}) < 150


def test_slow_model_still_gets_its_least_runs(clock):
    report = run_measure({"base": ScriptedSession(clock, lambda n: 900.0)}, seconds=0.001, min_runs=5)["base"]
    assert report.runs == 5


def test_progress_never_goes_back_or_past_the_end(clock):
    seen: list[float] = []
    run_measure({"base": ScriptedSession(clock, lambda n: 1.0)}, on_progress=lambda _text, done: seen.append(done))
    assert seen
    assert seen == sorted(seen)
    assert seen[-1] <= 1.0


def test_progress_of_a_run_without_a_time(clock):
    seen: list[float] = []
    sessions = {"base": ScriptedSession(clock, lambda n: 1.0)}
    run_measure(sessions, seconds=0.0, min_runs=64, on_progress=lambda _text, done: seen.append(done))
    assert seen == [0.25, 0.5, 0.75]


# --- statistics -------------------------------------------------------------------------------------------------------------


def test_bootstrap_interval_covers_the_true_median():
    """Of a hundred 95 % intervals about 95 hold the median that the draws come from."""
    held = 0
    for seed in range(100):
        samples = np.random.default_rng(seed).lognormal(0, 0.3, (200, 1))  # median 1
        low, high = np.percentile(bootstrap_medians(samples, seed=seed), [2.5, 97.5])
        held += low <= 1 <= high
    assert held >= 86  # binomial(100, 0.95): fewer has a probability below 0.1 %


def test_noise_floor_bounds_what_another_run_would_show():
    """The bound of one run holds the difference of medians in about 97.5 % of other runs of two equal sessions."""
    generator = np.random.default_rng(5)
    held = 0
    for seed in range(60):
        runs = generator.lognormal(0, 0.2, (300, 4))
        medians = np.median(runs, axis=0)
        held += abs(medians[2] / medians[3] - 1) <= noise_floor(runs[:, 0], runs[:, 1], seed=seed)
    assert held >= 50


def test_drift_is_the_second_half_over_the_first():
    jittered = np.random.default_rng(0).normal(1, 0.02, 400)
    jittered[200:] *= 1.1
    drift = drift_of(jittered, seed=0)
    assert drift.ratio == pytest.approx(1.1, abs=0.01)
    assert 1.08 < drift.low <= drift.ratio <= drift.high < 1.12
    assert drift_of(np.ones(3), seed=0).ratio == 1


def test_bootstrap_draws_the_same_rounds_for_every_model():
    column = np.random.default_rng(0).random(80)
    medians = bootstrap_medians(np.stack([column, 3 * column], axis=1), seed=1)
    np.testing.assert_allclose(medians[:, 1], 3 * medians[:, 0])


@given(st.integers(2, 5000), st.integers(1, 4))
def test_bootstrap_of_constant_times_is_that_constant(rounds, models):
    medians = bootstrap_medians(np.full((rounds, models), 2.5), seed=0)
    assert medians.shape == (latency.RESAMPLES, models)
    assert (medians == 2.5).all()


@given(ratio=st.floats(0.1, 10), below=st.floats(0, 0.5), above=st.floats(0, 0.5), noise=st.floats(0, 0.5, allow_nan=False))
def test_comparison_claims_nothing_inside_interval_or_noise(ratio, below, above, noise):
    report = a_report(ratio=ratio, ratio_low=ratio * (1 - below), ratio_high=ratio * (1 + above), noise=noise)
    verdict = compare(report)
    if report.ratio_low <= 1 <= report.ratio_high or abs(ratio - 1) <= noise:
        assert verdict == "tie"
    if verdict != "tie":
        assert verdict == ("faster" if ratio < 1 else "slower")
        assert abs(ratio - 1) > latency.MIN_NOISE


def a_report(**fields) -> LatencyReport:
    numbers = dict.fromkeys(("p50_ms", "p90_ms", "p99_ms", "mean_ms", "p50_low_ms", "p50_high_ms"), 1.0)
    return LatencyReport(
        host=fingerprint("onnxruntime", "1"), is_on_target=False, threads=1, warmup_runs=1, runs=2, **(numbers | fields)
    )


# --- real sessions ----------------------------------------------------------------------------------------------------------


def test_real_models_give_complete_reports(sample_dir):
    sessions = {name: open_session(sample_dir / "model.onnx") for name in ("base", "again")}
    feeds = {"image": np.zeros((1, 1, 28, 28), np.float32)}
    reports = measure(sessions, feeds, baseline="base", is_on_target=True, threads=1, seconds=0.05, min_runs=10)
    assert list(reports) == ["base", "again"]
    for report in reports.values():
        assert report.runs >= 10
        assert 0 < report.p50_ms <= report.p90_ms <= report.p99_ms
        assert report.p50_low_ms <= report.p50_ms <= report.p50_high_ms
        assert report.is_on_target
        assert report.host.runtime == "onnxruntime"
    assert reports["base"].ratio is None
    assert reports["again"].ratio_low <= reports["again"].ratio <= reports["again"].ratio_high


def test_report_survives_json(clock):
    report = run_measure({"base": ScriptedSession(clock, jitter(1, 1))})["base"]
    assert decode_json(encode_json(report), LatencyReport) == report
    assert all(math.isfinite(value) for value in msgspec.to_builtins(report).values() if isinstance(value, float))


def test_fingerprint_is_of_this_machine():
    found = fingerprint("onnxruntime", "1.2.3")
    host = probe_target()
    assert (found.arch, found.cpu, found.isa, found.cores) == (host.arch, host.cpu, host.isa, host.cores)
    assert (found.runtime, found.runtime_version) == ("onnxruntime", "1.2.3")
    assert found.os.startswith("Linux ")
