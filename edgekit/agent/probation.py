"""A new model on live traffic: when it has earned its place, and when it has to go. Pure; the caller brings the time.

The counts survive restarts of worker and agent: they lie in the state, and each worker's tally is added to what was there.

    >>> from edgekit.schema.state import Probation
    >>> trial = Probation(slot="b", manifest="sha256:" + "0" * 64, counter=2, inferences=200)
    >>> judge(trial, ProbationConfig(inferences=200)).kind
    'commit'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from edgekit.agent.board import Tally, p95
from edgekit.agent.config import ProbationConfig
from edgekit.schema.state import Probation

MIN_FAILURES = 3
"""Fewer failures are no rate."""
MIN_LATENCIES = 50
LATENCY_SLACK_MS = 10.0
"""Below this difference a latency says more of the moment than of the model."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be done."""

    kind: Literal["wait", "commit", "abort"]
    code: str = ""
    reason: str = ""


def begin(trial: Probation, before: Sequence[float]) -> Probation:
    """A probation with the latencies of the model before, where there are enough of them."""
    return msgspec.structs.replace(trial, baseline_ms=p95(before) if len(before) >= MIN_LATENCIES else 0.0)


def add(trial: Probation, tally: Tally, *, served_s: float) -> Probation:
    """What a worker did, on top of what was done before it.

    Args:
        trial: as it was when the worker began.
        tally: of this worker.
        served_s: for how long it has served.
    """
    return msgspec.structs.replace(
        trial,
        inferences=trial.inferences + tally.inferences,
        failures=trial.failures + tally.failures,
        bad_outputs=trial.bad_outputs + tally.bad_outputs,
        served_s=trial.served_s + served_s,
    )


def judge(trial: Probation, limits: ProbationConfig, *, recent_ms: Sequence[float] = ()) -> Verdict:
    """Whether the model stays, goes, or has to prove more.

    Args:
        trial: everything that it did.
        limits: of the configuration.
        recent_ms: its last latencies.
    """
    if fault := _fault(trial, limits, recent_ms):
        name, reason = fault
        return Verdict(kind="abort", code=f"probation.{name}", reason=f"on probation: {reason}")
    is_served = 0 < limits.inferences <= trial.inferences - trial.failures
    if is_served or 0 < limits.seconds <= trial.served_s:
        return Verdict(kind="commit")
    return Verdict(kind="wait")


def _fault(trial: Probation, limits: ProbationConfig, recent_ms: Sequence[float]) -> tuple[str, str] | None:
    faults = (
        ("crashes", f"its worker died {trial.crashes} times", trial.crashes > limits.max_crashes),
        ("boot_loop", f"the agent was started {trial.starts} times without a clean end", trial.starts > limits.max_starts),
        (
            "failures",
            f"{trial.failures} of {trial.inferences} inferences failed",
            trial.failures >= MIN_FAILURES and trial.failures > limits.max_failure_share * trial.inferences,
        ),
        (
            "bad_outputs",
            f"{trial.bad_outputs} of {trial.inferences} answers held values that are not finite",
            trial.bad_outputs > limits.max_bad_outputs,
        ),
    )
    for name, reason, is_fault in faults:
        if is_fault:
            return name, reason
    if not limits.max_latency_ratio or not trial.baseline_ms or len(recent_ms) < MIN_LATENCIES:
        return None
    if sorted(recent_ms)[len(recent_ms) // 2] <= trial.baseline_ms:
        return None  # the usual answer is no slower: what is late is the device's moment, not the model
    found, limit = p95(recent_ms), max(trial.baseline_ms * limits.max_latency_ratio, trial.baseline_ms + LATENCY_SLACK_MS)
    return ("latency", f"p95 is {found:.3g} ms, {trial.baseline_ms:.3g} ms of the model before it") if found > limit else None


def describe(trial: Probation) -> dict[str, str | int | float | bool]:
    """Its figures, for a report."""
    return {
        "inferences": trial.inferences,
        "failures": trial.failures,
        "bad_outputs": trial.bad_outputs,
        "crashes": trial.crashes,
        "served_s": round(trial.served_s, 1),
    }
