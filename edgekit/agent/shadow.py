"""The shadow slot: a candidate answers copies of live inputs beside the model that serves; the figures decide.

One sample is on its way at a time, and the next is asked for only when the candidate has rested as long as its share of the
processor demands: whatever comes meanwhile is not copied, so that nobody who asks waits for it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from edgekit.agent.config import ShadowConfig
from edgekit.agent.link import Compare, Compared, Sample

ASK_SECONDS = 2.0
LATENCY_SLACK_MS = 5.0
"""Below this difference a latency says more of the moment than of the model."""
ENOUGH = 20
"""So many samples are judged even where more were asked for."""


class Giver(Protocol):
    """Who answers live: a worker process."""

    async def next_sample(self, model: str, seconds: float) -> Sample | None:
        """The next answer with its input; None when there was none in time."""


class Taker(Protocol):
    """The candidate's worker process."""

    async def compare(self, asked: Compare, seconds: float) -> Compared | None:
        """How it answers; None when it did not."""


def _median(values: list[float]) -> float:
    """Without the statistics module, which costs the supervisor two megabytes."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2.0


@dataclass
class Findings:
    """What was seen."""

    samples: int = 0
    agreed: int = 0
    seconds: float = 0.0
    is_crashed: bool = False
    first_why: str = ""
    errors: list[float] = field(default_factory=list)
    deltas: list[float] = field(default_factory=list)
    live_ms: list[float] = field(default_factory=list)
    candidate_ms: list[float] = field(default_factory=list)

    @property
    def agreement(self) -> float:
        """Share of the samples that both answered alike."""
        return self.agreed / self.samples if self.samples else math.nan

    @property
    def latency_ratio(self) -> float:
        """The candidate's median latency over the live one's."""
        live = _median(self.live_ms) if self.live_ms else 0.0
        return _median(self.candidate_ms) / live if live > 0 and self.candidate_ms else math.nan

    def note(self, sample: Sample, found: Compared) -> None:
        """One comparison."""
        self.samples += 1
        self.agreed += found.is_agreed
        self.first_why = self.first_why or found.why
        self.live_ms.append(sample.inference_ms)
        self.candidate_ms.append(found.inference_ms)
        self.deltas.append(found.confidence_delta)
        if math.isfinite(found.error):
            self.errors.append(found.error)

    def fields(self) -> dict[str, str | int | float | bool]:
        """For the report."""
        found: dict[str, str | int | float | bool] = {"samples": self.samples, "seconds": round(self.seconds, 1)}
        if self.samples:
            found["agreement"] = round(self.agreement, 4)
            found["confidence_delta"] = round(sum(self.deltas) / len(self.deltas), 4)
        if self.errors:
            found["worst_error"] = round(max(self.errors), 6)
        if not math.isnan(self.latency_ratio):
            found["latency_ratio"] = round(self.latency_ratio, 3)
        return found


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``code`` is empty when the candidate may serve; ``is_final``: it never may."""

    code: str = ""
    reason: str = ""
    is_final: bool = True


def judge(findings: Findings, config: ShadowConfig) -> Verdict:
    """Whether the candidate may serve: pure."""
    if findings.is_crashed:
        return Verdict(code="shadow.crashed", reason=f"it died or hung at live input {findings.samples + 1}")
    if findings.samples < min(config.samples, ENOUGH):
        if config.is_switched_without_traffic:
            return Verdict(reason=f"{findings.samples} live inputs came within {config.max_s:g} s; it serves all the same")
        reason = f"{findings.samples} live inputs came within {config.max_s:g} s; {config.samples} are wanted"
        return Verdict(code="shadow.no_traffic", reason=reason, is_final=False)
    if findings.agreement < config.min_agreement:
        why = f": {findings.first_why}" if findings.first_why else ""
        seen = f"it agrees on {findings.agreement:.1%} of {findings.samples} live inputs"
        reason = f"{seen}, at least {config.min_agreement:.1%} are wanted{why}"
        return Verdict(code="shadow.disagrees", reason=reason)
    slower = _median(findings.candidate_ms) - _median(findings.live_ms)
    if config.max_latency_ratio and findings.latency_ratio > config.max_latency_ratio and slower > LATENCY_SLACK_MS:
        reason = f"it takes {findings.latency_ratio:.2f} times as long, at most {config.max_latency_ratio:g} are allowed"
        return Verdict(code="shadow.slow", reason=reason)
    return Verdict(reason=f"it agrees on {findings.agreement:.1%} of {findings.samples} live inputs")


async def watch_candidate(
    giver: Callable[[], Giver | None],
    taker: Taker,
    model: str,
    config: ShadowConfig,
    *,
    answer_s: float,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Findings:
    """Let the candidate answer copies of live inputs.

    Args:
        giver: who serves now; asked again for each sample, since a worker may be replaced meanwhile.
        taker: the candidate.
        model: the model's name.
        config: how many, how long, how much of the processor.
        answer_s: for how long the candidate may work on one input.
        is_stopped: whether nobody wants to know any more.
    """
    found, started = Findings(), time.monotonic()
    deadline = started + config.max_s
    while found.samples < config.samples and (left := deadline - time.monotonic()) > 0 and not is_stopped():
        live = giver()
        sample = await live.next_sample(model, min(left, ASK_SECONDS)) if live is not None else None
        if sample is None:
            await asyncio.sleep(min(left, 0.05))
            continue
        began = time.monotonic()
        asked = Compare(model=model, inputs=sample.inputs, outputs=sample.outputs, tolerance=config.tolerance)
        answer = await taker.compare(asked, answer_s)
        if answer is None:
            found.is_crashed = True
            break
        found.note(sample, answer)
        if found.agreed + (config.samples - found.samples) < config.min_agreement * config.samples and found.samples >= ENOUGH:
            break
        spent = time.monotonic() - began
        await asyncio.sleep(spent * (100.0 / config.cpu_percent - 1.0))
    found.seconds = time.monotonic() - started
    return found
