from __future__ import annotations

import re

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.compiler.gate import (
    Measured,
    check_budget,
    default_budget,
    find_pareto,
    is_tie,
    judge,
    parse_budget,
    pick_fastest,
)
from edgekit.errors import UsageError
from edgekit.evaluation.metric import resolve_metric
from edgekit.schema.digest import digest_bytes
from edgekit.schema.measurement import EvalReport, HostFingerprint, LatencyReport

HOST = HostFingerprint(
    arch="x86-64", cpu="c", isa=(), cores=2, ram_mb=1, os="o", python="3", runtime="onnxruntime", runtime_version="1"
)


def latency(
    p50: float, ratio: float | None, *, spread: float = 0.0, noise: float = 0.0, is_on_target: bool = True
) -> LatencyReport:
    return LatencyReport(
        host=HOST,
        is_on_target=is_on_target,
        threads=1,
        warmup_runs=5,
        runs=100,
        p50_ms=p50,
        p90_ms=p50,
        p99_ms=p50,
        mean_ms=p50,
        p50_low_ms=p50,
        p50_high_ms=p50,
        noise=noise,
        ratio=ratio,
        ratio_low=None if ratio is None else ratio - spread,
        ratio_high=None if ratio is None else ratio + spread,
    )


def quality(drop: float, high: float | None = None) -> EvalReport:
    return EvalReport(
        metric="top1",
        value=0.9 - drop,
        baseline=0.9,
        drop=drop,
        is_higher_better=True,
        samples=1000,
        data=digest_bytes(b""),
        isa=(),
        drop_low=None,
        drop_high=high,
    )


def candidate(name: str, ratio: float | None, size: int = 1_000_000, drop: float = 0.0, **timing) -> Measured:
    p50 = 1.0 if ratio is None else ratio
    return Measured(name=name, size_bytes=size, evaluation=quality(drop), latency=latency(p50, ratio, **timing))


FP32 = candidate("fp32", None)
BUDGET = parse_budget("top1_drop<=0.01")


def test_budget_parses():
    budget = parse_budget(" top1_drop <= 0.01,latency_ms<=5 , size_mb<=2, ram_mb<=64,top1>=.9")
    assert [term.quantity for term in budget.terms] == ["drop", "latency_ms", "size_mb", "ram_mb", "value"]
    assert [term.limit for term in budget.terms] == [0.01, 5.0, 2.0, 64.0, 0.9]
    assert budget.metric == "top1"


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("", 0, "missing"),
        ("top1_drop<=0.01,", 16, "missing"),
        ("latency_ms<5", 10, 'operator "<"'),
        ("latency_ms<=five", 12, "not a number"),
        ("latency_ms<=nan", 12, "not a number"),
        ("size_mb<=2, latencyms<=5", 12, 'no "latencyms"'),
        ("latency_ms>=5", 10, "upper limit"),
        ("size_mb<=2, size_mb<=3", 12, "second time"),
        ("fast please", 0, "is not"),
        ("latency_ms<=", 12, "not a number"),
    ],
)
def test_budget_unparsable(text, column, words):
    with pytest.raises(UsageError) as caught:
        parse_budget(text)
    assert caught.value.code == "budget.unparsable"
    assert words in caught.value.message
    caret = caught.value.message.splitlines()[-1]
    assert caret.index("^") - 2 == column
    assert caught.value.hint


def test_budget_typo_suggests_the_nearest():
    with pytest.raises(UsageError) as caught:
        parse_budget("latncy_ms<=5")
    assert '"latency_ms"' in caught.value.hint


def test_budget_names_another_metric():
    with pytest.raises(UsageError, match="agreement") as caught:
        parse_budget("agreement_drop<=0.01", metric="top1")
    assert caught.value.code == "budget.metric"
    with pytest.raises(UsageError) as caught:
        parse_budget("agreement>=0.9, top1_drop<=0.1")
    assert caught.value.code == "budget.metric"


def test_budget_names_the_users_own_metric():
    assert parse_budget("recall3_drop<=0.02", metric="metrics.py:recall3").metric == "recall3"


@given(st.text(max_size=30))
def test_budget_parses_or_says_why(text):
    try:
        budget = parse_budget(text)
    except UsageError as error:
        code = error.code
    else:
        code = "budget.parsed" if budget.terms else "empty"
    assert code.startswith("budget.")


def test_default_budget_by_metric():
    def term(name: str, baseline: float):
        return default_budget(resolve_metric(name, has_labels=True, task="other"), baseline).terms[0]

    assert (term("top1", 0.9).name, term("top1", 0.9).limit) == ("top1_drop", 0.01)
    assert (term("agreement", 1).quantity, term("agreement", 1).operator, term("agreement", 1).limit) == ("value", ">=", 0.99)
    assert term("sqnr_db", 200).limit == 20
    assert term("mae", 12.0).limit == pytest.approx(0.12)


def test_fastest_wins():
    result = judge([FP32, candidate("int8-a", 0.6), candidate("int8-b", 0.5)], BUDGET, baseline="fp32")
    assert (result.chosen, result.is_budget_met) == ("int8-b", True)
    assert "2.00x faster" in result.verdicts["int8-b"].reason
    assert result.verdicts["int8-a"].status == "passed"
    assert "1.20x the time" in result.verdicts["int8-a"].reason


def test_slower_int8_leaves_fp32():
    result = judge([FP32, candidate("int8", 1.3, size=300_000)], BUDGET, baseline="fp32")
    assert result.chosen == "fp32"
    assert "1.30x slower than fp32 here" in result.verdicts["int8"].reason
    assert "int8 does not pay here" in result.sentence


def test_tie_is_decided_by_size_then_accuracy():
    small = candidate("int8-small", 0.99, size=300_000, drop=0.004)
    accurate = candidate("int8-accurate", 1.01, size=305_000, drop=0.001)
    result = judge([FP32, small, accurate], BUDGET, baseline="fp32")
    assert result.chosen == "int8-accurate"
    assert "% larger" in result.verdicts["fp32"].reason


def test_overlapping_intervals_tie():
    assert is_tie(candidate("a", 0.8, spread=0.06), candidate("b", 0.9, spread=0.06))
    assert not is_tie(candidate("a", 0.8, spread=0.01), candidate("b", 0.9, spread=0.01))
    assert is_tie(candidate("a", 0.8, noise=0.2), candidate("b", 0.9))


def test_accuracy_missed():
    result = judge([FP32, candidate("int8", 0.4, drop=0.05)], BUDGET, baseline="fp32")
    verdict = result.verdicts["int8"]
    assert (result.chosen, verdict.status, verdict.is_budget_met) == ("fp32", "missed", False)
    assert "top1_drop is 0.05, the budget wants at most 0.01" in verdict.reason
    assert "int8 costs too much" in result.sentence


def test_nothing_meets_the_budget_accuracy_first():
    budget = parse_budget("top1_drop<=0.01, latency_ms<=0.1")
    result = judge([FP32, candidate("int8", 0.3, drop=0.05), candidate("pruned", 0.6, drop=0.002)], budget, baseline="fp32")
    assert (result.chosen, result.is_budget_met) == ("pruned", False)
    assert result.verdicts["pruned"].status == "chosen"
    assert not result.verdicts["pruned"].is_budget_met
    assert "latency_ms is 0.6" in result.sentence


def test_failed_candidate_keeps_its_reason():
    result = judge([FP32, Measured(name="int8", failure="not made: no weights")], BUDGET, baseline="fp32")
    assert result.verdicts["int8"].status == "failed"
    assert result.verdicts["int8"].reason == "not made: no weights"
    assert "int8 was not possible" in result.sentence


def test_latency_of_another_host_is_noted():
    budget = parse_budget("latency_ms<=5")
    check = check_budget(candidate("a", 0.5, is_on_target=False), budget, target="raspberry-pi-4")[0]
    assert check.is_met
    assert check.note == "measured on this host, not on raspberry-pi-4"


def test_interval_beyond_the_limit_is_noted():
    item = Measured(name="a", evaluation=quality(0.008, high=0.02), latency=latency(1, 0.5))
    assert "more evaluation samples" in check_budget(item, BUDGET)[0].note


def test_interval_of_a_value_beyond_the_limit_is_noted():
    item = Measured(name="a", evaluation=quality(0.008, high=0.02), latency=latency(1, 0.5))
    assert "reaches 0.8800" in check_budget(item, parse_budget("top1>=0.89"))[0].note
    assert check_budget(item, parse_budget("top1>=0.87"))[0].note == ""


def test_memory_that_was_not_measured_is_said():
    check = check_budget(FP32, parse_budget("ram_mb<=1"))[0]
    assert check.value is None
    assert "could not be measured" in check.note


def test_more_accurate_but_outside_the_tie_with_the_fastest():
    fast = candidate("fast", 0.500, drop=0.002)
    middle = candidate("middle", 0.508, drop=0.001)
    accurate = candidate("accurate", 0.516, drop=0.0)
    result = judge([FP32, fast, middle, accurate], BUDGET, baseline="fp32")
    assert result.chosen == "middle"
    assert "more accurate, but not as fast" in result.verdicts["accurate"].reason
    assert "not more accurate" in result.verdicts["fast"].reason


points = st.builds(
    candidate,
    name=st.uuids().map(str),
    ratio=st.floats(0.1, 3),
    size=st.integers(1000, 10_000_000),
    drop=st.floats(-0.1, 0.3),
    spread=st.floats(0, 0.05),
)


@given(st.lists(points, min_size=1, max_size=8))
def test_winner_is_never_slower_than_fp32_beyond_noise(others):
    result = judge([FP32, *others], BUDGET, baseline="fp32")
    chosen = next(item for item in (FP32, *others) if item.name == result.chosen)
    assert result.is_budget_met
    assert all(check.is_met for check in result.verdicts[chosen.name].checks)
    fastest = min(
        (item for item in (FP32, *others) if result.verdicts[item.name].is_budget_met), key=lambda i: i.latency.p50_ms
    )
    assert is_tie(chosen, fastest)
    assert sum(verdict.status == "chosen" for verdict in result.verdicts.values()) == 1
    assert all(verdict.reason for verdict in result.verdicts.values())


@given(st.lists(points, min_size=1, max_size=8))
def test_pareto_front_holds_the_best_of_each(others):
    front = find_pareto(others)
    best = min(others, key=lambda item: (item.latency.ratio, item.size_bytes, item.evaluation.drop))
    assert best.name in front
    assert pick_fastest(others) in others
    for item in others:
        if item.name not in front:
            mine = np.array([item.evaluation.drop, item.latency.ratio, item.size_bytes])
            rivals = [np.array([o.evaluation.drop, o.latency.ratio, o.size_bytes]) for o in others if o.name in front]
            assert any((rival <= mine).all() for rival in rivals)


def test_reasons_have_no_format_leftovers():
    result = judge([FP32, candidate("int8", 0.5, drop=0.002)], BUDGET, baseline="fp32", target="host")
    for verdict in result.verdicts.values():
        assert not re.search(r"[{}]|None|nan", verdict.reason)


def sampled(name: str, ratio: float, drop: float, *, low: float, high: float, sqnr: float) -> Measured:
    report = msgspec.structs.replace(quality(drop, high), drop_low=low, extra={"sqnr_db": sqnr})
    return Measured(name=name, size_bytes=1_000_000, evaluation=report, latency=latency(ratio, ratio))


def test_candidate_that_only_just_meets_the_budget_is_not_chosen():
    lucky = sampled("lucky", 0.5, 0.009, low=0.001, high=0.017, sqnr=20.0)
    sure = sampled("sure", 0.6, 0.004, low=0.002, high=0.006, sqnr=30.0)
    judgement = judge([FP32, lucky, sure], BUDGET, baseline="fp32")
    assert judgement.chosen == "sure"
    assert judgement.verdicts["lucky"].status == "passed"
    assert "only just: 1000 samples leave it in doubt" in judgement.verdicts["lucky"].reason
    assert judge([FP32, lucky], parse_budget("top1_drop<=0.01, latency_ms<=0.7"), baseline="fp32").chosen == "lucky"


def test_tie_is_decided_by_fidelity_where_accuracy_is_within_its_interval():
    lucky = sampled("lucky", 0.5, -0.002, low=-0.004, high=0.001, sqnr=20.0)
    faithful = sampled("faithful", 0.5, 0.0, low=-0.003, high=0.003, sqnr=35.0)
    judgement = judge([FP32, lucky, faithful], BUDGET, baseline="fp32")
    assert judgement.chosen == "faithful"
    assert "answers less like fp32" in judgement.verdicts["lucky"].reason
    worse = sampled("worse", 0.5, 0.005, low=0.002, high=0.007, sqnr=60.0)
    assert judge([FP32, lucky, worse], BUDGET, baseline="fp32").chosen == "lucky"


def test_a_limit_is_not_missed_by_rounding():
    exact = candidate("exact", 0.5, drop=0.93 - 0.92)
    assert judge([FP32, exact], BUDGET, baseline="fp32").chosen == "exact"
