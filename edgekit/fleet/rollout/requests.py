"""A rollout as people write it down, on the command line, in a TOML file or as JSON.

>>> str(parse_gate("error_share<=1%"))
'error_share <= 0.01'
"""

from __future__ import annotations

import difflib
import re
from datetime import UTC, datetime
from typing import cast, get_args

from edgekit.errors import UsageError
from edgekit.fleet.rollout.plan import parse_waves
from edgekit.fleet.rollout.records import MINUTE_MS, Comparison, Gate, GateMetric, RolloutSpec
from edgekit.fleet.selector import Selector
from edgekit.schema.base import Record
from edgekit.schema.desired import UpdatePolicy
from edgekit.schema.release import Release

DEFAULT_WAVES = "canary:5,10%,50%,100%"
DEFAULT_GATES = ("error_share<=0.02", "latency_p95_ratio<=1.5", "critical_alerts<=0")
MIN_SAMPLES = 100
_GATE = re.compile(r"\s*([a-z0-9_]+)\s*(<=|>=|<|>)\s*([0-9.eE+-]+)\s*(%?)\s*(?:min\s*(\d+))?\s*\Z")


class RolloutRequest(Record, frozen=True, kw_only=True):
    """What is asked for; times are minutes, shares are 0..1."""

    model: str
    version: str
    channel: str = ""
    to: str = ""
    """A selector; empty is every device that serves the model, or none yet."""
    waves: str = DEFAULT_WAVES
    gates: tuple[str, ...] = DEFAULT_GATES
    soak_min: float = 30.0
    deadline_min: float = 24 * 60.0
    max_failed: float = 0.02
    required_success: float = 0.95
    is_rolled_back_on_halt: bool = True
    needs_approval: bool = False
    not_before: datetime | None = None
    jitter_s: float = 0.0
    is_metered: bool = False
    is_full_allowed: bool = True
    reason: str = ""


def parse_gate(text: str) -> Gate:
    """A gate: ``metric comparison limit``, a limit in percent with ``%``, and ``min N`` for the samples that it needs.

    Raises:
        UsageError: ``rollout.gate``.
    """
    found = _GATE.match(text)
    metrics = get_args(GateMetric)
    if not found or found[1] not in metrics:
        near = difflib.get_close_matches(found[1], metrics, n=1) if found else []
        guess = f'Did you mean "{near[0]}"? ' if near else ""
        raise UsageError(
            "rollout.gate", f"gate {text!r}: not a gate.", hint=f"{guess}Write METRIC<=LIMIT with one of {', '.join(metrics)}."
        )
    try:
        limit = float(found[3]) / (100 if found[4] else 1)
    except ValueError as error:
        raise UsageError("rollout.gate", f"gate {text!r}: {found[3]!r} is no number.") from error
    metric, comparison = cast("GateMetric", found[1]), cast("Comparison", found[2])
    default = 1 if metric == "critical_alerts" else MIN_SAMPLES
    return Gate(metric=metric, comparison=comparison, limit=limit, min_samples=int(found[5] or default))


def make_spec(request: RolloutRequest, release: Release) -> RolloutSpec:
    """The whole plan of a request for a release.

    Raises:
        UsageError: ``rollout.waves``, ``rollout.gate``, ``rollout.limits``, ``selector.*``.
    """
    for name in ("max_failed", "required_success"):
        if not 0 <= getattr(request, name) <= 1:
            raise UsageError("rollout.limits", f"{name} is {getattr(request, name)}: expected a share from 0 to 1.")
    if request.soak_min < 0 or request.deadline_min <= 0 or request.jitter_s < 0:
        raise UsageError("rollout.limits", "soak, deadline and jitter: expected times that are not negative.")
    policy = UpdatePolicy(
        not_before=request.not_before.astimezone(UTC) if request.not_before else None,
        jitter_s=request.jitter_s,
        is_metered=request.is_metered,
        is_full_allowed=request.is_full_allowed,
    )
    return RolloutSpec(
        model=request.model,
        version=request.version,
        counter=release.info.counter,
        manifest=release.manifest_digest,
        selector=str(Selector.parse(request.to)),
        waves=parse_waves(request.waves),
        gates=tuple(parse_gate(text) for text in request.gates),
        soak_ms=round(request.soak_min * MINUTE_MS),
        deadline_ms=round(request.deadline_min * MINUTE_MS),
        max_failed=request.max_failed,
        required_success=request.required_success,
        is_rolled_back_on_halt=request.is_rolled_back_on_halt,
        needs_approval=request.needs_approval,
        policy=policy,
    )
