"""Two runs compared, on made-up times: what the machine did must not look like what the model did."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import numpy as np
import pytest

from edgekit.benchmark.comparison import compare_runs, find_slower
from edgekit.benchmark.fingerprint import fingerprint
from edgekit.errors import UsageError
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.benchmark import (
    BenchmarkRequest,
    BenchmarkRun,
    Conditions,
    ModelChange,
    RunComparison,
    Snapshot,
    ThreadRun,
    TimedModel,
)
from edgekit.schema.measurement import LatencyReport

ROUNDS = 300
HOST = fingerprint("onnxruntime", "1.32.0")


def report(median: float, noise: float, threads: int) -> LatencyReport:
    times = dict.fromkeys(("p50_ms", "p90_ms", "p99_ms", "mean_ms", "p50_low_ms", "p50_high_ms"), median)
    return LatencyReport(host=HOST, is_on_target=True, threads=threads, warmup_runs=24, runs=ROUNDS, noise=noise, **times)


def a_run(
    models: dict[str, tuple[str, float]], *, seed: int, noise: float = 0.002, threads: tuple[int, ...] = (1,), **request
) -> BenchmarkRun:
    """Models by name: which bytes (a letter), and the true milliseconds; rounds share what the machine does."""
    parts = []
    for count in threads:
        generator = np.random.default_rng(seed + count)
        shared = generator.lognormal(0, 0.05, ROUNDS)
        own = {name: shared * generator.lognormal(0, 0.01, ROUNDS) * median for name, (_bytes, median) in models.items()}
        before = Snapshot(monotonic_s=0.0, own_cpu_s=0.0)
        parts.append(
            ThreadRun(
                threads=count,
                cpus=(1,),
                reports={name: report(float(np.median(times)), noise, count) for name, times in own.items()},
                drift=1.0,
                drift_low=1.0,
                drift_high=1.0,
                conditions=Conditions(before=before, after=before),
                times_ms={name: tuple(times.tolist()) for name, times in own.items()},
            )
        )
    return BenchmarkRun(
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        edgekit_version="0",
        request=BenchmarkRequest(models=tuple(models), threads=threads, **request),
        baseline=next(iter(models)),
        models=tuple(
            TimedModel(name=name, path=name, digest="sha256:" + content * 64, size_bytes=1)
            for name, (content, _median) in models.items()
        ),
        runs=tuple(parts),
    )


def on_another_host(run: BenchmarkRun, **fields) -> BenchmarkRun:
    host = msgspec.structs.replace(HOST, **fields)
    parts = [
        msgspec.structs.replace(
            part, reports={name: msgspec.structs.replace(each, host=host) for name, each in part.reports.items()}
        )
        for part in run.runs
    ]
    return msgspec.structs.replace(run, runs=tuple(parts))


def changes(comparison: RunComparison) -> dict[str, ModelChange]:
    return {change.new_name: change for change in comparison.changes}


def said(old: BenchmarkRun, new: BenchmarkRun, **options) -> str:
    return "\n".join(compare_runs(old, new, **options).warnings)


OLD = a_run({"fp32": ("a", 2.0), "int8": ("b", 1.0)}, seed=1)


# --- the ratio --------------------------------------------------------------------------------------------------------------


def test_slower_machine_with_the_same_models_is_a_tie():
    comparison = compare_runs(OLD, a_run({"fp32": ("a", 2.6), "int8": ("b", 1.3)}, seed=2))
    found = changes(comparison)
    assert (found["fp32"].change, found["int8"].change) == ("reference", "tie")
    assert found["fp32"].ratio == pytest.approx(1.3, abs=0.03)
    assert found["int8"].ratio == pytest.approx(1.0, abs=0.01)
    assert found["int8"].is_corrected
    assert comparison.reference == "fp32"
    assert comparison.warnings == ()


def test_slower_model_on_a_faster_machine_is_slower():
    found = changes(compare_runs(OLD, a_run({"fp32": ("a", 1.0), "int8": ("c", 0.6)}, seed=2)))["int8"]
    assert found.new_p50_ms < found.old_p50_ms
    assert found.ratio == pytest.approx(1.2, abs=0.01)
    assert found.ratio_low <= found.ratio <= found.ratio_high
    assert (found.change, found.is_same_file) == ("slower", False)


def test_faster_model():
    assert changes(compare_runs(OLD, a_run({"fp32": ("a", 2.0), "int8": ("c", 0.8)}, seed=2)))["int8"].change == "faster"


def test_change_within_the_noise_of_both_runs_is_a_tie():
    noisy = a_run({"fp32": ("a", 2.0), "int8": ("c", 1.06)}, seed=2, noise=0.08)
    found = changes(compare_runs(OLD, noisy))["int8"]
    assert found.noise == pytest.approx(np.hypot(0.01, 0.08))
    assert found.ratio_low > 1
    assert found.change == "tie"


def test_interval_covers_the_true_ratio():
    """Of sixty 95 % intervals at least fifty hold the truth, 1.1 (binomial: fewer has a probability below 0.1 %)."""
    held = 0
    for seed in range(60):
        old = a_run({"fp32": ("a", 2.0), "int8": ("b", 1.0)}, seed=1000 + seed)
        new = a_run({"fp32": ("a", 3.0), "int8": ("c", 1.65)}, seed=2000 + seed)
        found = changes(compare_runs(old, new, seed=seed))["int8"]
        held += found.ratio_low <= 1.1 <= found.ratio_high
    assert held >= 50


def test_each_thread_count_is_compared_with_its_own():
    old = a_run({"fp32": ("a", 2.0), "int8": ("b", 1.0)}, seed=1, threads=(1, 2))
    new = a_run({"fp32": ("a", 2.0), "int8": ("b", 1.0)}, seed=1, threads=(2, 4))
    comparison = compare_runs(old, new)
    assert [change.threads for change in comparison.changes] == [2, 2]
    assert {change.ratio for change in comparison.changes} == {1.0}
    assert "not compared: 1, 4 threads" in comparison.warnings[0]


# --- the reference ----------------------------------------------------------------------------------------------------------


def test_without_a_common_file_times_are_compared_with_a_warning():
    new = a_run({"fp32": ("c", 2.6), "int8": ("d", 1.3)}, seed=2)
    comparison = compare_runs(OLD, new)
    assert comparison.reference is None
    assert [change.change for change in comparison.changes] == ["slower", "slower"]
    assert not any(change.is_corrected for change in comparison.changes)
    assert "plain times" in comparison.warnings[0]


def test_model_alone_has_no_reference():
    alone = [a_run({"fp32": ("a", median)}, seed=3) for median in (2.0, 3.0)]
    comparison = compare_runs(*alone)
    assert (comparison.reference, comparison.changes[0].change) == (None, "slower")
    assert comparison.changes[0].is_same_file


def test_other_common_file_stands_in_for_the_baseline():
    new = a_run({"fp32": ("c", 2.0), "int8": ("b", 1.3)}, seed=2)
    comparison = compare_runs(OLD, new)
    assert comparison.reference == "int8"
    assert changes(comparison)["fp32"].ratio == pytest.approx(1 / 1.3, abs=0.01)
    assert "the baselines differ; int8" in comparison.warnings[0]


def test_baseline_is_preferred_as_the_reference():
    old = a_run({"x": ("c", 1.0), "fp32": ("a", 2.0)}, seed=1)
    old = msgspec.structs.replace(old, baseline="fp32")
    new = msgspec.structs.replace(a_run({"x": ("c", 1.0), "fp32": ("a", 2.0)}, seed=2), baseline="fp32")
    assert compare_runs(old, new).reference == "fp32"


# --- names ------------------------------------------------------------------------------------------------------------------


def test_match_joins_other_names():
    new = a_run({"base": ("a", 2.0), "small": ("c", 1.5)}, seed=2)
    found = compare_runs(OLD, new, matches={"fp32": "base", "int8": "small"}).changes
    assert [(change.old_name, change.new_name, change.change) for change in found] == [
        ("fp32", "base", "reference"),
        ("int8", "small", "slower"),
    ]


def test_match_goes_before_equal_names():
    new = a_run({"fp32": ("a", 2.0), "int8": ("c", 1.0), "int4": ("d", 1.5)}, seed=2)
    comparison = compare_runs(OLD, new, matches={"int8": "int4"})
    assert [(change.old_name, change.new_name) for change in comparison.changes] == [("fp32", "fp32"), ("int8", "int4")]
    assert "only in the new run, not compared: int8" in comparison.warnings[0]


@pytest.mark.parametrize(("matches", "text"), [({"gone": "int8"}, "old run"), ({"int8": "gone"}, "new run")])
def test_match_that_names_no_model(matches, text):
    with pytest.raises(UsageError, match=text) as caught:
        compare_runs(OLD, OLD, matches=matches)
    assert caught.value.code == "benchmark.no_such_model"


@pytest.mark.parametrize("new", [a_run({"x": ("a", 1.0)}, seed=1), a_run({"fp32": ("a", 1.0)}, seed=1, threads=(2,))])
def test_nothing_in_common(new):
    with pytest.raises(UsageError) as caught:
        compare_runs(OLD, new)
    assert caught.value.code == "benchmark.nothing_in_common"


# --- warnings and the limit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"cpu": "Cortex-A72"}, "another processor"),
        ({"isa": ("avx2",)}, "another processor"),
        ({"cores": 77}, "another number of CPUs"),
        ({"os": "Linux 2.4"}, "another system"),
        ({"governor": "powersave"}, "another governor"),
        ({"runtime_version": "1.33.0"}, "another runtime: onnxruntime 1.32.0, then onnxruntime 1.33.0"),
    ],
)
def test_other_circumstances_are_told(fields, text):
    assert text in said(OLD, on_another_host(OLD, **fields))
    assert said(OLD, OLD) == ""


def test_other_settings_are_told():
    models = {"fp32": ("a", 2.0), "int8": ("b", 1.0)}
    assert "another batch: 1, then 8" in said(OLD, a_run(models, seed=1, batch=8))
    assert "only one of the runs used data" in said(OLD, a_run(models, seed=1, data="x.npz"))
    unpinned = msgspec.structs.replace(OLD, runs=(msgspec.structs.replace(OLD.runs[0], cpus=()),))
    assert "1 thread: pinned to CPU 1, then not pinned" in said(OLD, unpinned)


def test_limit_needs_the_whole_interval():
    comparison = compare_runs(OLD, a_run({"fp32": ("a", 2.0), "int8": ("c", 1.1)}, seed=2))
    found = changes(comparison)["int8"]
    assert find_slower(comparison, 1.05) == [found]
    assert find_slower(comparison, (found.ratio_low + found.ratio) / 2) == []
    assert find_slower(comparison, 1.2) == []


def test_slower_machine_never_fails_the_limit():
    slower = a_run({"fp32": ("a", 4.0), "int8": ("b", 2.0)}, seed=2)
    assert find_slower(compare_runs(OLD, slower), 1.0) == []


def test_comparison_survives_json():
    comparison = compare_runs(OLD, OLD)
    assert decode_json(encode_json(comparison), RunComparison) == comparison
