"""Whether a slot's model may still serve: pure, the time is an argument.

Two things end a model's service: a recall (a signed deny-list, with a deadline) and the end of its release's validity. Both
work offline, by the device's clock, which never counts as earlier than what the device has verified before. Expired metadata
is neither: it blocks changes, never inference.

    >>> from datetime import UTC
    >>> from edgekit.schema.state import AgentState, Slot
    >>> find_ban(AgentState(device="cam-7"), Slot(name="a", model="kws"), datetime(2026, 1, 1, tzinfo=UTC)) is None
    True
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from edgekit.schema.release import Fallback, Recall
from edgekit.schema.state import AgentState, Slot
from edgekit.trust.floors import reference_time

BanKind = Literal["recalled", "expired"]


@dataclass(frozen=True, kw_only=True)
class Ban:
    """Why a slot's model may not serve, and what is to be done about it."""

    kind: BanKind
    reason: str
    fallback: Fallback

    @property
    def code(self) -> str:
        """For refusals and messages."""
        return f"release.{self.kind}"


def find_recall(recalls: Sequence[Recall], digests: Collection[str | None]) -> Recall | None:
    """The recall that names one of these digests, the earliest deadline first."""
    found = [recall for recall in recalls if recall.digest in digests]
    return min(found, key=lambda recall: recall.deadline, default=None)


def find_ban(state: AgentState, slot: Slot, now: datetime) -> Ban | None:
    """Why a slot's model may not serve at this time; None when it may."""
    time = reference_time(state.floors, now)
    recall = find_recall(state.recalls, (slot.manifest, slot.model_digest))
    name = f"{slot.model}@{slot.version}"
    if recall is not None and time >= recall.deadline:
        return Ban(kind="recalled", reason=f"{name} was recalled: {recall.reason}", fallback=recall.fallback)
    if slot.valid_until is not None and time >= slot.valid_until:
        until = f"{slot.valid_until:%Y-%m-%d %H:%M %Z}"  # in its own zone: year 1 has no UTC everywhere
        return Ban(kind="expired", reason=f"{name} was valid until {until}", fallback=slot.fallback)
    return None
