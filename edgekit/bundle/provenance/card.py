"""The model card: what a person must know of a release before using it, written from the evidence and the owner's words.

The shape follows Mitchell et al. 2019, "Model Cards for Model Reporting". One content, two forms: :mod:`card_markdown` and
:mod:`card_html` render the sections that are built here. What nobody stated or measured is said to be so, never left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgekit.bundle.provenance.facts import (
    SHARES,
    ClassRecall,
    ReleaseFacts,
    class_recalls,
    share_interval,
)
from edgekit.bundle.provenance.intent import NOT_STATED, Intent
from edgekit.bundle.provenance.reliability import Reliability, Unmeasured
from edgekit.bundle.provenance.slsa import calibration_digests, tool_versions
from edgekit.schema.base import Scalar
from edgekit.schema.digest import hex_of
from edgekit.schema.manifest import BlobRef
from edgekit.schema.measurement import EvalReport, LatencyReport

MARKDOWN_PATH, HTML_PATH = "card.md", "card.html"
NOT_MEASURED = "not measured"
NONE = "-"
UNITS = {"sqnr_db": "dB", "bias_db": "dB"}


@dataclass(frozen=True)
class Points:
    """The owner's paragraphs; none is "not stated"."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class Note:
    """A paragraph of ours."""

    text: str


@dataclass(frozen=True)
class Fields:
    """Named values; a value that is a digest or a name is shown in a fixed-width font."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under headers; columns in ``right`` hold numbers."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bars:
    """The recall of each class, with what the mean is."""

    recalls: tuple[ClassRecall, ...]
    mean: float | None = None


@dataclass(frozen=True)
class Diagram:
    """The reliability diagram."""

    reliability: Reliability


Block = Points | Note | Fields | Table | Bars | Diagram


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One of the numbers on top."""

    title: str
    value: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """The whole card."""

    title: str
    lede: str
    figures: tuple[Figure, ...]
    sections: tuple[Section, ...]
    footer: str


def compose_card(facts: ReleaseFacts, evidence: Iterable[BlobRef]) -> Card:
    """Build the card.

    Args:
        facts: the release.
        evidence: the bill of materials and the provenance, which the card names by digest.
    """
    manifest, intent = facts.manifest, facts.intent
    sections = [
        Section("Intended use", _uses(intent)),
        Section("Data", _data(facts)),
        Section("Evaluation", _evaluation(facts)),
        Section("Calibration of probabilities", _calibration(facts)),
        Section("Operating conditions", _conditions(facts)),
        Section("Limits", _limits(facts)),
        Section("Ethical considerations", (Points(intent.ethical_considerations),)),
        Section("How it was made", _making(facts)),
        Section("Evidence", _evidence(facts, evidence)),
    ]
    if len(facts.variants) > 1:
        sections.insert(5, Section("Variants", _variants(facts)))
    return Card(
        title=f"{manifest.name} {manifest.version}",
        lede=" ".join(intent.description) or _lede(facts),
        figures=_figures(facts),
        sections=tuple(sections),
        footer=f"Model card of {manifest.name}@{manifest.version}, {manifest.created_at:%Y-%m-%d %H:%M} UTC, "
        f"written by edgekit {manifest.edgekit_version} from the evidence in the bundle.",
    )


def _lede(facts: ReleaseFacts) -> str:
    kind = "classifier" if facts.manifest.contract.task == "classification" else "model"
    each = facts.first
    return f"A {each.variant.precision} {kind} for {facts.manifest.target}, run by {each.variant.requires.runtime}."


# --- numbers ----------------------------------------------------------------------------------------------------------------


def size_text(count: float) -> str:
    """Bytes, decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def value_text(metric: str, value: float) -> str:
    """A metric's value with its unit."""
    unit = UNITS.get(metric, "")
    return f"{value:.1f} {unit}" if unit else f"{value:.4f}"


def range_text(low: float | None, high: float | None, form: str = ".4f") -> str:
    """An interval for people; empty without one."""
    return "" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def _interval(evaluation: EvalReport) -> str:
    if evaluation.metric not in SHARES:
        return ""
    return range_text(*share_interval(evaluation.value, evaluation.samples))


def _figures(facts: ReleaseFacts) -> tuple[Figure, ...]:
    each, found = facts.first, []
    if evaluation := each.candidate.evaluation:
        interval = _interval(evaluation)
        text = f"95 %: {interval}, " if interval else ""
        found.append(
            Figure(
                title=evaluation.metric,
                value=value_text(evaluation.metric, evaluation.value),
                text=f"{text}{evaluation.samples} samples",
            )
        )
        drop = range_text(evaluation.drop_low, evaluation.drop_high, "+.4f")
        found.append(
            Figure(
                title="drop",
                value=f"{evaluation.drop:+.4f}",
                text="from the source model" + (f", 95 %: {drop}" if drop else ""),
            )
        )
    else:
        found.append(Figure(title="quality", value=NONE, text=NOT_MEASURED))
    if latency := each.candidate.latency:
        found.append(Figure(title="latency, median", value=f"{latency.p50_ms:.3g} ms", text=_where(latency)))
    else:
        found.append(Figure(title="latency", value=NONE, text=NOT_MEASURED))
    precision = f"{each.variant.precision}, {each.variant.format}"
    found.append(Figure(title="model size", value=size_text(each.model.size_bytes), text=precision))
    return tuple(found)


def _where(latency: LatencyReport) -> str:
    place = "the target" if latency.is_on_target else "not the target"
    return f"on {latency.host.cpu} ({place}), {_threads(latency)}"


def _threads(latency: LatencyReport) -> str:
    return f"{latency.threads} thread" + ("s" if latency.threads > 1 else "")


# --- sections ---------------------------------------------------------------------------------------------------------------


def _stated(texts: Sequence[str]) -> str:
    """Several points on one line."""
    points = [text.rstrip(".") for text in texts] if len(texts) > 1 else texts
    return "; ".join(points) or NOT_STATED


def _uses(intent: Intent) -> tuple[Block, ...]:
    rows = (
        ("users", _stated(intent.users)),
        ("out of scope", _stated(intent.out_of_scope)),
        ("owner", _stated(intent.owner)),
        ("contact", _stated(intent.contact)),
        ("licence", _stated(intent.licence)),
    )
    return Points(intent.intended_use), Fields(rows)


def _data(facts: ReleaseFacts) -> tuple[Block, ...]:
    evaluation, intent = facts.first.candidate.evaluation, facts.intent
    rows = [("training data", _stated(intent.training_data))]
    if calibrated := calibration_digests(facts.first):
        rows.append(("calibration data", ", ".join(f"sha256:{prefix}…" for prefix in calibrated)))
    if evaluation is None:
        return (Fields((*rows, ("evaluation data", NOT_MEASURED))),)
    is_given = bool(facts.data_source) and facts.data_digest == evaluation.data
    rows += [
        ("evaluation data", _stated(intent.evaluation_data)),
        ("evaluation samples", str(evaluation.samples)),
        ("evaluation source", facts.data_source if is_given else "not recorded; the digest tells it"),
        ("evaluation digest", evaluation.data),
    ]
    note = "The digest is SHA-256 over names, types, shapes and bytes of the arrays: the same samples have it in any format."
    blocks: list[Block] = [Fields(tuple(rows)), Note(note)]
    if any(hex_of(evaluation.data).startswith(prefix) for prefix in calibrated):
        blocks.append(Note("The ranges of the activations were taken from the data that the model was evaluated on."))
    return tuple(blocks)


def _evaluation(facts: ReleaseFacts) -> tuple[Block, ...]:
    evaluation = facts.first.candidate.evaluation
    if evaluation is None:
        return (Note(f"The quality of this model was {NOT_MEASURED}."),)
    name = evaluation.metric
    drop = range_text(evaluation.drop_low, evaluation.drop_high, "+.4f")
    rows = [
        (name, value_text(name, evaluation.value), _interval(evaluation) or NONE),
        (f"{name}, source model", value_text(name, evaluation.baseline), NONE),
        ("drop", f"{evaluation.drop:+.4f}", drop or NONE),
    ]
    for extra, value in sorted(evaluation.extra.items()):
        interval = range_text(*share_interval(value, evaluation.samples)) if extra in SHARES else ""
        rows.append((extra, value_text(extra, value), interval or NONE))
    blocks: list[Block] = [Table(headers=("metric", "value", "95 % interval"), rows=tuple(rows), right=(1, 2))]
    direction = "higher is better" if evaluation.is_higher_better else "lower is better"
    blocks.append(
        Note(
            f"{evaluation.samples} samples; {direction}; a positive drop is worse than the source model. Evaluated with "
            f"{' '.join(evaluation.isa) or 'an unnamed instruction set'}: int8 answers can differ between instruction sets."
        )
    )
    if recalls := class_recalls(facts, facts.first):
        blocks.append(Bars(recalls=recalls, mean=evaluation.extra.get("balanced_accuracy")))
    return tuple(blocks)


def _calibration(facts: ReleaseFacts) -> tuple[Block, ...]:
    measured = facts.reliability
    if isinstance(measured, Unmeasured):
        return (Note(f"{NOT_MEASURED}: {measured.reason}.".capitalize()),)
    part = "all" if measured.samples == measured.of else "evenly spread"
    evaluation = facts.first.candidate.evaluation
    is_same = evaluation is not None and evaluation.data == measured.data
    tone = "too sure of itself" if measured.confidence > measured.accuracy else "less sure than it could be"
    rows = (
        ("expected calibration error", f"{measured.error:.4f}"),
        ("mean probability of the answer", f"{measured.confidence:.4f}"),
        ("accuracy on the same samples", f"{measured.accuracy:.4f}"),
        ("samples", f"{measured.samples} of {measured.of} ({part})"),
        ("data", f"{measured.data} ({'the evaluation data' if is_same else 'not the evaluation data'})"),
    )
    how = "softmax of the outputs" if measured.is_softmax else "the outputs as they are"
    text = (
        f"Measured when the release was packed, on {facts.first.variant.name}; probabilities are {how}. On average the model "
        f"is {tone}, by {abs(measured.confidence - measured.accuracy):.4f}. The error is biased upwards where samples are few."
    )
    return Fields(rows), Note(text), Diagram(measured)


def _conditions(facts: ReleaseFacts) -> tuple[Block, ...]:
    each, manifest = facts.first, facts.manifest
    requires, latency = each.variant.requires, each.candidate.latency
    rows = [
        ("target", each.variant.target or manifest.target),
        ("runtime", f"{requires.runtime} {requires.runtime_version or '(any version)'} or newer"),
        ("architecture", " ".join(requires.arch) or "any"),
        ("instruction set", " ".join(requires.isa) or "nothing required"),
        ("memory of the device", f"{requires.ram_mb:g} MB" if requires.ram_mb is not None else "nothing required"),
        ("peak memory, measured", _memory(latency)),
    ]
    blocks: list[Block] = [Fields(tuple(rows))]
    if latency is None:
        blocks.append(Note(f"Latency was {NOT_MEASURED}."))
    else:
        blocks += _latency(latency)
    return (*blocks, *_interface(facts))


def _memory(latency: LatencyReport | None) -> str:
    return f"{latency.peak_rss_mb:.1f} MB" if latency and latency.peak_rss_mb is not None else NOT_MEASURED


def _latency(latency: LatencyReport) -> list[Block]:
    host = latency.host
    table = Table(
        headers=("latency", "ms", "95 % interval"),
        rows=(
            ("p50", f"{latency.p50_ms:.4g}", range_text(latency.p50_low_ms, latency.p50_high_ms, ".4g")),
            ("p90", f"{latency.p90_ms:.4g}", NONE),
            ("p99", f"{latency.p99_ms:.4g}", NONE),
        ),
        right=(1, 2),
    )
    place = "This is the target." if latency.is_on_target else "This is not the target: on the target it will differ."
    text = (
        f"Measured on {host.cpu} ({host.arch}, {host.cores} cores, {host.os}) with {host.runtime} {host.runtime_version}, "
        f"{_threads(latency)}, {latency.runs} runs after {latency.warmup_runs} to warm up; noise {latency.noise:.1%}. {place}"
    )
    return [table, Note(text)]


def _interface(facts: ReleaseFacts) -> tuple[Block, ...]:
    contract = facts.manifest.contract
    rows = [
        ("input", spec.name, f"{spec.dtype} {_shape(spec.shape)}", range_text(spec.minimum, spec.maximum, "g") or "not known")
        for spec in contract.inputs
    ]
    rows += [("output", spec.name, f"{spec.dtype} {_shape(spec.shape)}", NONE) for spec in contract.outputs]
    blocks: list[Block] = [Table(headers=("", "name", "type and shape", "range seen"), rows=tuple(rows))]
    if contract.thresholds:
        limits = tuple((label, f"{score:g}") for label, score in sorted(contract.thresholds.items()))
        blocks.append(Table(headers=("label", "counts from"), rows=limits, right=(1,)))
    if contract.labels:
        blocks.append(Note(f"Classes, in order: {', '.join(contract.labels)}."))
    return tuple(blocks)


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(str(axis) for axis in shape)}]"


def _variants(facts: ReleaseFacts) -> tuple[Block, ...]:
    rows = []
    for each in facts.variants:
        variant, parity = each.variant, each.variant.parity
        evaluation, latency = each.candidate.evaluation, each.candidate.latency
        rows.append(
            (
                variant.name,
                f"{variant.requires.runtime}, {variant.target or facts.manifest.target}",
                size_text(each.model.size_bytes),
                value_text(evaluation.metric, evaluation.value) if evaluation else NOT_MEASURED,
                f"{latency.p50_ms:.3g} ms" if latency else NOT_MEASURED,
                "reference" if parity is None else _parity(parity.sqnr_db, parity.agreement),
            )
        )
    headers = ("variant", "for", "size", "quality", "p50", "parity")
    note = "A device takes the first variant whose requirements it meets. Parity is against the first, on the same samples."
    return Table(headers=headers, rows=tuple(rows), right=(2, 3, 4)), Note(note)


def _parity(sqnr_db: float, agreement: float | None) -> str:
    text = f"SQNR {sqnr_db:.1f} dB"
    return text if agreement is None else f"agreement {agreement:.4f}, {text}"


def _limits(facts: ReleaseFacts) -> tuple[Block, ...]:
    own = []
    if any(spec.minimum is not None for spec in facts.manifest.contract.inputs):
        own.append("Inputs outside the range seen in calibration are answered, but nobody measured how well.")
    if evaluation := facts.first.candidate.evaluation:
        own.append(f"Quality is known on {evaluation.samples} samples of one data set, and not for data of another kind.")
    if facts.first.candidate.latency is None or not facts.first.candidate.latency.is_on_target:
        own.append("Latency was not measured on the target.")
    if not facts.first.candidate.verdict.is_budget_met:
        own.append(f"The budget was missed: {facts.first.candidate.verdict.reason}.")
    blocks: list[Block] = [Points(facts.intent.limitations)]
    return (*blocks, *(Note(text) for text in own))


def _making(facts: ReleaseFacts) -> tuple[Block, ...]:
    blocks: list[Block] = []
    for each in facts.variants:
        candidate = each.candidate
        source = candidate.source
        rows = [("variant", each.variant.name)] if len(facts.variants) > 1 else []
        rows += [
            ("source model", f"{source.spec} ({source.kind}, {size_text(source.size_bytes)})"),
            ("source digest", source.digest),
            ("verdict", f"{candidate.verdict.status}: {candidate.verdict.reason}"),
            ("seed", str(candidate.seed)),
            ("made", f"{candidate.created_at:%Y-%m-%d %H:%M} UTC with edgekit {candidate.edgekit_version}"),
            ("tools", ", ".join(f"{name} {version}" for name, version in tool_versions(each).items()) or "none named"),
        ]
        blocks.append(Fields(tuple(rows)))
        if candidate.verdict.checks:
            blocks.append(
                Table(
                    headers=("budget", "limit", "measured", "met"),
                    rows=tuple(
                        (
                            check.name,
                            f"{'≤' if check.operator == '<=' else '≥'} {check.limit:g}",
                            NOT_MEASURED if check.value is None else f"{check.value:.4g}",
                            "yes" if check.is_met else "no",
                        )
                        for check in candidate.verdict.checks
                    ),
                    right=(1, 2),
                )
            )
        steps = tuple((step.name, _settings(step.settings), "; ".join(step.notes) or NONE) for step in candidate.lineage)
        if steps:
            blocks.append(Table(headers=("pass", "settings", "what it did"), rows=steps))
        else:
            blocks.append(Note("No pass changed the source model."))
    return tuple(blocks)


def _settings(settings: dict[str, Scalar]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in sorted(settings.items())) or NONE


def _evidence(facts: ReleaseFacts, evidence: Iterable[BlobRef]) -> tuple[Block, ...]:
    refs = (*facts.contents, *evidence)
    rows = tuple((f"{ref.path} ({ref.role}, {size_text(ref.size_bytes)})", ref.digest) for ref in refs)
    note = (
        "All of it is in the bundle, below one signed manifest. Check it with “edgekit bundle verify FILE --key PUB”; "
        "“edgekit bundle unpack FILE DIR” gives the files."
    )
    return Fields(rows), Note(note)
