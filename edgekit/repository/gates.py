"""The gates between channels: what was measured against what must hold. Pure: no files, no clock, no measurement.

contract       programs that talk to the release of the channel can talk to this one
golden         the golden samples pass on the machine that promotes
drop           of the metric, against the channel's present release, on the same samples
latency_ratio  against the same, interleaved; a difference inside the noise is a tie and passes
publishers     how many different publishers signed the bundle
hours          on the channel before

>>> parse_gates("drop<=0.02, hours>=24", Gates()).min_hours
24.0
>>> judge_hours(3.5, Gates(min_hours=24)).verdict
'failed'
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec

from edgekit.dataset.data import suggest
from edgekit.errors import UsageError
from edgekit.repository.store import Gates
from edgekit.schema.base import Record
from edgekit.schema.contract import Contract, InputSpec
from edgekit.schema.measurement import EvalReport, LatencyReport
from edgekit.schema.tensor import TensorSpec

GateName = Literal["contract", "golden", "drop", "latency_ratio", "publishers", "hours"]
GATE_NAMES: tuple[GateName, ...] = get_args(GateName)
NOTHING_TO_COMPARE = "the first release on this channel: nothing to compare with"
_LIMITS: dict[str, tuple[str, str]] = {
    "drop": ("max_drop", "<="),
    "latency_ratio": ("max_latency_ratio", "<="),
    "publishers": ("min_publishers", ">="),
    "hours": ("min_hours", ">="),
}
_TERM = re.compile(r"\s*([a-z_]+)\s*(<=|>=)\s*([0-9.]+)\s*\Z")
_EXAMPLE = 'For example "drop<=0.01, latency_ratio<=1.1, publishers>=2, hours>=24".'
Verdict = Literal["passed", "failed", "skipped"]


class GateResult(Record, frozen=True, kw_only=True):
    """What one gate said. ``value`` and ``limit`` are for people, ``measured`` is the figure where there is one."""

    gate: GateName
    verdict: Verdict
    value: str = ""
    limit: str = ""
    reason: str = ""
    measured: float | None = None


def parse_gates(text: str, base: Gates) -> Gates:
    """Limits as people write them, over those that hold already.

    Args:
        text: comma-separated terms of ``drop<=``, ``latency_ratio<=``, ``publishers>=`` and ``hours>=``; empty changes none.
        base: what holds where a term is missing.

    Raises:
        UsageError: ``gate.unparsable`` or ``gate.limit``.
    """
    changes: dict[str, Any] = {}
    for part in filter(str.strip, text.split(",")):
        match = _TERM.match(part)
        if match is None or match[1] not in _LIMITS:
            near = suggest(re.split(r"[<>=]", part)[0].strip(), list(_LIMITS), otherwise=_EXAMPLE)
            raise UsageError("gate.unparsable", f'--gate: "{part.strip()}" is not a limit.', hint=near)
        name, operator, number = match.groups()
        field, wanted = _LIMITS[name]
        if operator != wanted:
            raise UsageError("gate.unparsable", f'--gate: "{part.strip()}"; expected {name}{wanted}NUMBER.', hint=_EXAMPLE)
        changes[field] = _limit(name, number)
    return msgspec.structs.replace(base, **changes)


def _limit(name: str, text: str) -> float | int:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    is_whole = name != "publishers" or number.is_integer()
    if not (math.isfinite(number) and is_whole):
        raise UsageError("gate.limit", f"--gate: {name} {text}: not a limit.", hint=_EXAMPLE)
    return int(number) if name == "publishers" else number


def describe_gates(gates: Gates) -> str:
    """The limits as they are written.

    >>> describe_gates(Gates())
    'drop<=0.01, latency_ratio<=1.1, publishers>=1, hours>=0'
    """
    return ", ".join(f"{name}{operator}{getattr(gates, field):g}" for name, (field, operator) in _LIMITS.items())


def check_skips(names: Sequence[str], reason: str) -> tuple[GateName, ...]:
    """The gates that are to be skipped.

    Raises:
        UsageError: ``gate.unknown``, or ``gate.no_reason`` when nobody says why.
    """
    for name in names:
        if name not in GATE_NAMES:
            hint = suggest(name, list(GATE_NAMES), otherwise=f"Gates: {', '.join(GATE_NAMES)}.")
            raise UsageError("gate.unknown", f"--skip-gate {name}: no such gate.", hint=hint)
    if names and not reason.strip():
        raise UsageError("gate.no_reason", "--skip-gate without a reason.", hint="Give --reason; it goes into the audit log.")
    return tuple(name for name in GATE_NAMES if name in names)


# --- judging ----------------------------------------------------------------------------------------------------------------


def skipped(gate: GateName, reason: str) -> GateResult:
    """A gate that somebody switched off for this once."""
    return GateResult(gate=gate, verdict="skipped", reason=reason)


def unmeasured(gate: GateName, why: str, *, limit: str = "") -> GateResult:
    """A gate that could not be measured: it does not open."""
    return GateResult(gate=gate, verdict="failed", value="not measured", limit=limit, reason=why)


def first_release(gate: GateName) -> GateResult:
    """A comparison without anything to compare with."""
    return GateResult(gate=gate, verdict="passed", value="-", reason=NOTHING_TO_COMPARE)


def judge_contract(changes: ContractChanges) -> GateResult:
    """What changed for programs that use the model."""
    faults, warnings = changes.faults, changes.warnings
    value = f"{len(faults)} incompatible" if faults else f"{len(warnings)} compatible changes" if warnings else "the same"
    return GateResult(
        gate="contract",
        verdict="failed" if faults else "passed",
        value=value,
        limit="compatible",
        reason="; ".join((*faults, *warnings)),
    )


def judge_golden(*, is_passed: bool, worst_error: float, reason: str) -> GateResult:
    """The self-test of the variant that this machine runs."""
    return GateResult(
        gate="golden",
        verdict="passed" if is_passed else "failed",
        value=f"{worst_error:.0%} of the tolerance" if math.isfinite(worst_error) else "no answer",
        limit="100%",
        reason=reason,
        measured=worst_error if math.isfinite(worst_error) else None,
    )


def judge_drop(report: EvalReport, gates: Gates) -> GateResult:
    """The drop itself decides; where its interval reaches beyond the limit, that is said."""
    is_met = report.drop <= gates.max_drop
    value = f"{report.drop:+.4f}"
    reason = f"{report.metric} {report.value:.4f}, before {report.baseline:.4f}, {report.samples} samples"
    if report.drop_low is not None and report.drop_high is not None:
        value += f" [{report.drop_low:+.4f}, {report.drop_high:+.4f}]"
        if report.drop_low <= gates.max_drop < report.drop_high:
            reason += "; the interval holds the limit: more samples would tell"
    return GateResult(
        gate="drop",
        verdict="passed" if is_met else "failed",
        value=value,
        limit=f"<= {gates.max_drop:g}",
        reason=reason,
        measured=report.drop,
    )


def is_tie(report: LatencyReport) -> bool:
    """Whether the ratio cannot be told from 1."""
    assert report.ratio is not None
    assert report.ratio_low is not None
    assert report.ratio_high is not None
    return report.ratio_low <= 1 <= report.ratio_high or abs(report.ratio - 1) <= report.noise


def judge_latency(report: LatencyReport, gates: Gates) -> GateResult:
    """The ratio of medians; a tie passes whatever the limit is."""
    assert report.ratio is not None
    tie = is_tie(report)
    reason = f"{report.p50_ms:.3f} ms, noise {report.noise:.1%}, {report.runs} interleaved runs"
    if tie:
        reason = f"a tie: {reason}"
    elif (report.ratio_low or 0) <= gates.max_latency_ratio < (report.ratio_high or 0):
        reason += "; the interval holds the limit: more --seconds would tell"
    return GateResult(
        gate="latency_ratio",
        verdict="passed" if tie or report.ratio <= gates.max_latency_ratio else "failed",
        value=f"{report.ratio:.3f} [{report.ratio_low:.3f}, {report.ratio_high:.3f}]",
        limit=f"<= {gates.max_latency_ratio:g}",
        reason=reason,
        measured=report.ratio,
    )


def judge_publishers(names: Sequence[str], gates: Gates) -> GateResult:
    """How many different, trusted publishers signed."""
    reason = ", ".join(names) or "no signature is kept: publish the same bundle again to add it"
    return GateResult(
        gate="publishers",
        verdict="passed" if len(names) >= gates.min_publishers else "failed",
        value=str(len(names)),
        limit=f">= {gates.min_publishers}",
        reason=reason,
        measured=float(len(names)),
    )


def judge_hours(hours: float, gates: Gates) -> GateResult:
    """How long the release has been on the channel before."""
    return GateResult(
        gate="hours",
        verdict="passed" if hours >= gates.min_hours else "failed",
        value=f"{hours:.1f}",
        limit=f">= {gates.min_hours:g}",
        reason="" if hours >= gates.min_hours else f"{gates.min_hours - hours:.1f} h to go",
        measured=hours,
    )


# --- contracts --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContractChanges:
    """What is different for a program that uses the model: ``faults`` break it, ``warnings`` do not."""

    faults: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def compare_contracts(old: Contract, new: Contract) -> ContractChanges:
    """What a program that was written for ``old`` would notice of ``new``.

    Inputs may take more than before (a free axis for a fixed one); outputs keep name, type and shape, further ones come last;
    labels keep their places, further ones come last, and their axis grows with them.
    """
    faults, warnings = _input_changes(old.inputs, new.inputs)
    if old.task != new.task:
        faults.append(f"the task was {old.task}, is {new.task}")
    grown = _grown_labels(old.labels, new.labels)
    if grown:
        warnings.append(f"further labels: {', '.join(grown)}")
    elif old.labels != new.labels:
        faults.append(_label_fault(old.labels, new.labels))
    more, hints = _output_changes(old.outputs, new.outputs, len(old.labels), len(grown))
    return ContractChanges((*faults, *more), (*warnings, *hints))


def _input_changes(old: Sequence[InputSpec], new: Sequence[InputSpec]) -> tuple[list[str], list[str]]:
    faults: list[str] = []
    warnings: list[str] = []
    known = {spec.name: spec for spec in old}
    for spec in new:
        before = known.pop(spec.name, None)
        if before is None:
            faults.append(f"input {spec.name} is new: nobody sends it")
        elif before.dtype != spec.dtype:
            faults.append(f"input {spec.name} was {before.dtype}, is {spec.dtype}")
        elif not _takes(before.shape, spec.shape):
            faults.append(f"input {spec.name} was {_shape(before.shape)}, is {_shape(spec.shape)}")
        elif _ranges(before) != _ranges(spec):
            warnings.append(f"input {spec.name}: another range in the calibration data")
    return faults + [f"input {name} is gone" for name in known], warnings


def _ranges(spec: InputSpec) -> tuple[float | None, float | None]:
    return spec.minimum, spec.maximum


def _takes(old: tuple[int | str, ...], new: tuple[int | str, ...]) -> bool:
    """Whether whatever fitted the old shape fits the new one."""
    return len(old) == len(new) and all(isinstance(axis, str) or axis == before for before, axis in zip(old, new, strict=True))


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _grown_labels(old: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
    """The labels that came to the end; none where others changed, too."""
    return new[len(old) :] if new[: len(old)] == old else ()


def _label_fault(old: tuple[str, ...], new: tuple[str, ...]) -> str:
    gone = [label for label in old if label not in new]
    return f"labels removed: {', '.join(gone)}" if gone else "labels at other places"


def _output_changes(
    old: Sequence[TensorSpec], new: Sequence[TensorSpec], labels: int, grown: int
) -> tuple[list[str], list[str]]:
    faults: list[str] = []
    warnings = [f"output {spec.name} is new" for spec in new[len(old) :]]
    for place, before in enumerate(old):
        spec = new[place] if place < len(new) else None
        if spec is None or spec.name != before.name:
            faults.append(f"output {before.name} is gone or at another place")
        elif spec.dtype != before.dtype:
            faults.append(f"output {spec.name} was {before.dtype}, is {spec.dtype}")
        elif not _gives(before.shape, spec.shape, labels, grown):
            faults.append(f"output {spec.name} was {_shape(before.shape)}, is {_shape(spec.shape)}")
    return faults, warnings


def _gives(old: tuple[int | str, ...], new: tuple[int | str, ...], labels: int, grown: int) -> bool:
    """Whether a program that expected the old shape gets it; the labels' axis may have grown."""
    expected = (*old[:-1], labels + grown) if grown and old[-1:] == (labels,) else old
    return len(expected) == len(new) and all(
        isinstance(before, str) or axis == before for before, axis in zip(expected, new, strict=True)
    )
