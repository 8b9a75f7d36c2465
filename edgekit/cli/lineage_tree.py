"""A release's lineage as a tree for people.

>>> for line in draw(tree_of(trace(Path("repository"), "fashion", "1.1.0"))):  # doctest: +SKIP
...     print(line)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from edgekit.repository.audit import AuditEntry
from edgekit.repository.lineage import DeviceUse, Lineage, Placement, VariantLineage
from edgekit.schema.candidate import PassStep
from edgekit.schema.digest import short
from edgekit.schema.manifest import BlobRef


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A line of the tree with what hangs below it."""

    text: str
    below: tuple[Branch, ...] = ()


def draw(branch: Branch) -> list[str]:
    """The tree as lines.

    >>> tree = Branch(text="a", below=(Branch(text="b", below=(Branch(text="c"),)), Branch(text="d")))
    >>> print(*draw(tree), sep=chr(10))
    a
    ├─ b
    │  └─ c
    └─ d
    """
    lines = [branch.text]
    for number, each in enumerate(branch.below, 1):
        is_last = number == len(branch.below)
        first, *rest = draw(each)
        lines.append(("└─ " if is_last else "├─ ") + first)
        lines += [("   " if is_last else "│  ") + line for line in rest]
    return lines


def tree_of(lineage: Lineage) -> Branch:
    """What people look at."""
    parts = [
        *(_placement_branch(each) for each in lineage.placements),
        *(Branch(text=f"RECALLED {recall.deadline:%Y-%m-%d %H:%M}: {recall.reason}") for recall in lineage.recalls),
        Branch(text=f"signed by {', '.join(f'{key[:12]}…' for key in lineage.publishers) or 'nobody whose signature is kept'}"),
        Branch(text="acts", below=tuple(_act_branch(entry) for entry in lineage.acts)),
        *(_variant_branch(each) for each in lineage.variants),
        *_evidence_branch(lineage.evidence),
        _device_branch(lineage.devices),
    ]
    text = f"{lineage.name}@{lineage.version}  manifest {short(lineage.manifest)}…, packed {_day(lineage.created_at)}"
    return Branch(text=text, below=tuple(parts))


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"


def _placement_branch(each: Placement) -> Branch:
    words = [f"{each.channel}: release {each.counter}, {_day(each.published_at)}"]
    words += ["the newest"] if each.is_newest else []
    words += [f"valid until {_day(each.valid_until)}, then {each.fallback}"] if each.valid_until else []
    words += [f"{each.deltas} deltas"] if each.deltas else []
    below: tuple[Branch, ...] = ()
    for parent in reversed(each.parents):
        when = f" (release {parent.counter}, {_day(parent.published_at)})" if parent.published_at else " (removed since)"
        below = (Branch(text=f"replaced {parent.release}{when}", below=below),)
    return Branch(text=", ".join(words), below=below)


def _act_branch(entry: AuditEntry) -> Branch:
    words = f"{_day(entry.at)}  {entry.action} by {entry.actor}"
    where = entry.details.get("channel", "")
    below = tuple(Branch(text=f"{key}: {value}") for key, value in entry.details.items() if key.startswith("gate "))
    reason = entry.details.get("reason", "")
    return Branch(text=words + (f" to {where}" if where else "") + (f": {reason}" if reason else ""), below=below)


def _variant_branch(each: VariantLineage) -> Branch:
    source = each.source
    below = [
        Branch(text=f"source {source.spec}, {source.kind}, {short(source.digest)}…"),
        Branch(text=f"target {each.target}, {short(each.target_digest)}…"),
        *(_pass_branch(step) for step in each.passes),
    ]
    if each.evaluation is not None:
        found = each.evaluation
        text = f"{found.metric} {found.value:.4f}, drop {found.drop:+.4f}, {found.samples} samples, data {short(found.data)}…"
        below.append(Branch(text=text))
    if each.latency is not None:
        below.append(Branch(text=f"{each.latency.p50_ms:.3f} ms on {each.latency.host.cpu}"))
    if each.parity is not None:
        below.append(Branch(text=f"against {each.parity.reference}: {each.parity.sqnr_db:.1f} dB"))
    text = f"variant {each.name}: {each.format} {each.precision} for {each.requires.runtime}, {short(each.model.digest)}…"
    return Branch(text=text, below=tuple(below))


def _pass_branch(step: PassStep) -> Branch:
    settings = ", ".join(f"{key}={value}" for key, value in step.settings.items())
    versions = ", ".join(f"{tool} {version}" for tool, version in step.versions.items())
    return Branch(text=f"pass {step.name}" + (f" ({settings})" if settings else "") + (f" with {versions}" if versions else ""))


def _evidence_branch(refs: Sequence[BlobRef]) -> list[Branch]:
    below = tuple(Branch(text=f"{ref.role}: {ref.path}, {short(ref.digest)}…") for ref in refs)
    return [Branch(text="evidence", below=below)] if below else []


def _device_branch(devices: Sequence[DeviceUse] | None) -> Branch:
    if devices is None:
        return Branch(text="devices: ask a fleet server with --fleet URL")
    below = tuple(Branch(text=f"{use.use}  {use.site}/{use.device}") for use in devices)
    return Branch(text=f"devices: {len({(use.site, use.device) for use in devices})}", below=below)
