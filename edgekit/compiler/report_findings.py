"""What the search learned, as sections of the report: every function gives a section's content, None where it has none.

A picture shows the worst few; the folded table under it has all of them, and is the picture's text alternative.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from edgekit.compiler.findings import AuditFinding, Kernel, LayerSaturation, LayerSensitivity, RuntimeAudit, TensorRange
from edgekit.compiler.markup import Markup, element, join
from edgekit.compiler.report_figures import figure, key, tick
from edgekit.compiler.report_findings_plots import (
    Fall,
    Hurt,
    Length,
    Range,
    hurt_bars,
    hurt_ends,
    lengths,
    mark,
    range_bars,
    waterfall,
)
from edgekit.compiler.report_table import Cell, table
from edgekit.compiler.report_words import MINUS, NBSP, NONE, milliseconds, significant, typeset
from edgekit.compiler.result import OptimizeResult

SHOWN = 20
"""Rows of a picture."""
STEPS = 15
"""Layers of the waterfall, those that change most; the others are one step."""
OPERATORS = 8
"""Rows of an audit before its fold."""
TOLD = 3
"""Findings with the same repair before their fold."""
SILENT_DB = 200.0
"""The records' word for no noise at all."""
INT16_MAX = 32_767
PLANNED = "quantize-planned"
CURES = {"none": "none", "7-bit": "7-bit weights", "u8u8": "unsigned weights", "fp32": "kept in float32"}
PRECISIONS = {"int8": "int8", "fp32": "float32", "fp16": "float16", "conversion": "conversions", "other": "other"}
KINDS = {
    "float-island": "Float island",
    "unfused-pair": "Not fused",
    "conversion": "Conversions",
    "unknown-operator": "Unknown operator",
}
LADDER = {
    "calibrator": "the best calibrator for each tensor",
    "scales": "weights clipped where that is nearer, by channel",
    "feedback": "rounding with error feedback",
    "bias": "biases corrected",
}
Row = tuple[str, list[Cell]]


def subject(result: OptimizeResult) -> str:
    """The candidate that ``is_int8`` speaks of: the chosen one, or the search's mix where something else was chosen."""
    planned = [item.name for item in (result.chosen, *result.candidates) if any(step.name == PLANNED for step in item.lineage)]
    if planned:
        return planned[0]
    is_quantized = any(step.name.startswith("quantize") for step in result.chosen.lineage)
    is_told = any(item.is_int8 for item in result.findings.layers)
    return result.chosen.name if is_told or not is_quantized else "the search\u2019s mix"


def _about(result: OptimizeResult) -> str:
    """Said where the figures are not those of the chosen candidate."""
    name = subject(result)
    return "" if name == result.chosen.name else f" All this is of {name}; {result.chosen.name} was chosen."


# --- where int8 hurts --------------------------------------------------------------------------------------------------------


def sensitivity(result: OptimizeResult) -> Markup | None:
    """SQNR of the model's output with one layer in int8 at a time, lowest first."""
    found = sorted(result.findings.layers, key=lambda item: _order(item.enable_one_db))
    if not found:
        return None
    name = subject(result)
    rows = [_hurt(item, name) for item in found if math.isfinite(item.enable_one_db)][:SHOWN]
    kept = sum(not item.is_int8 for item in found)
    worst = found[0]
    caption = (
        f"The model\u2019s answers with only this layer in int8, against float32: a short bar hurts. Worst: {worst.layer} "
        f"({decibels(worst.enable_one_db)}); {kept} of {len(found)} layers stay in float32 in {name}.{_about(result)}"
    )
    if any(row.others is not None for row in rows):
        caption += (
            " A cross is the other way round: everything but this layer in int8, so far right means that this one is to blame."
        )
    if len(found) > len(rows):
        caption += f" Drawn are the {len(rows)} most sensitive."
    low, high = hurt_ends(rows)
    if any(not low <= value <= high for row in rows for value in row.marks):
        caption += " An arrow: the mark lies beyond the plot; the table has it."
    label = f"Sensitivity of the {len(rows)} most sensitive of {len(found)} layers; the table below has all."

    def draw(_name: str, width: int) -> Markup:
        return hurt_bars(rows, title="output SQNR, dB (short hurts)", format_tick=_tick, width=width, label=label)

    picture = figure(draw, caption, _hurt_legend(rows, name)) if rows else None
    return join(picture, _fold(f"As a table: {_count(found, 'layer')}", _layer_table(found, name)))


def _hurt(item: LayerSensitivity, name: str) -> Hurt:
    place = _place(item)
    times = f", {_ms(item.float_ms)} \u2192 {_ms(item.int8_ms)}{NBSP}ms" if _is_timed(item) else ""
    spoken = f"; float32 {_ms(item.float_ms)} ms, int8 {_ms(item.int8_ms)} ms" if _is_timed(item) else ""
    return Hurt(
        name=item.layer, kind=place, note=f"{decibels(item.enable_one_db)}, {place}", extra=times, value=item.enable_one_db,
        weights=_finite(item.weights_only_db), activations=_finite(item.activations_only_db),
        others=_finite(item.disable_one_db),
        title=f"{item.layer} ({item.op_type}): {decibels(item.enable_one_db)}; {place} in {name}{spoken}",
    )  # fmt: skip


def _hurt_legend(rows: Sequence[Hurt], name: str) -> Markup:
    """Only what occurs."""
    entries = [_sample("hurt int8", f"int8 in {name}")] if any(row.kind == "int8" for row in rows) else []
    entries += [_sample("hurt fp32", f"float32 in {name}")] if any(row.kind == "fp32" for row in rows) else []
    words = {"weights": "its weights alone", "activations": "its inputs alone", "others": "everything but this layer"}
    entries += [
        element("li", _icon(mark(part, 10.0, 10.0), "hurt int8"), text)
        for part, text in words.items()
        if any(getattr(row, part) is not None for row in rows)
    ]
    return element("ul", *entries, class_="legend")


def _layer_table(found: Sequence[LayerSensitivity], name: str) -> Markup:
    head: list[Cell] = [
        ("layer", None), ("only it in int8", "number"), ("its weights", "number"), ("its inputs", "number"),
        ("all but it", "number"), (f"in {name}", "number"), ("float32, ms", "number"), ("int8, ms", "number"),
    ]  # fmt: skip
    has_others = any(item.disable_one_db is not None for item in found)
    rows: list[Row] = []
    for item in found:
        cells: list[Cell] = [(_named(item.layer, item.op_type), None)]
        decibel = [item.enable_one_db, item.weights_only_db, item.activations_only_db, item.disable_one_db]
        cells += [(decibels(value), "number") for value in decibel]
        cells += [(text, "number") for text in (_place(item), _ms(item.float_ms), _ms(item.int8_ms))]
        rows.append(("", cells if has_others else cells[:4] + cells[5:]))
    return _names(head if has_others else head[:4] + head[5:], rows, "Sensitivity and time by layer")


# --- what each layer costs ---------------------------------------------------------------------------------------------------


def costs(result: OptimizeResult) -> Markup | None:
    """From float32 to the mix in milliseconds, layer by layer; None where no layer was timed."""
    timed = [item for item in result.findings.layers if _is_timed(item)]
    if not timed:
        return None
    name = subject(result)
    order = sorted(timed, key=lambda item: -abs(_change(item)))
    before = sum(item.float_ms or 0.0 for item in timed)
    after = before + sum(_change(item) for item in timed)
    fold = _fold(f"As a table: {_count(timed, 'layer')}", _cost_table(order, name))
    if not any(item.is_int8 for item in timed):
        words = f"{name} runs no layer in int8; all {len(timed)} take {milliseconds(before)} in float32.{_about(result)}"
        return join(element("p", words), fold)
    rows = _falls(order, name, before)
    label = (
        f"Waterfall from {milliseconds(before)} in float32 to {milliseconds(after)} in {name}; the table below has all layers."
    )

    def draw(_name: str, width: int) -> Markup:
        return waterfall(rows, title="sum over the layers, ms", format_tick=_tick, width=width, label=label)

    legend = [_sample("fall total", "total"), _sample("fall saves", f"saves time ({MINUS})")]
    legend += [_sample("fall costs", "costs time (+)")] if any(row.kind == "costs" for row in rows) else []
    caption = _cost_caption(result, timed, before, after)
    return join(figure(draw, caption, element("ul", *legend, class_="legend")), fold)


def _falls(order: Sequence[LayerSensitivity], name: str, before: float) -> list[Fall]:
    """The steps: float32, the layers that change most with savings first, all others, the mix."""
    changed = [item for item in order if _change(item)]
    drawn = sorted(changed[:STEPS], key=_change)
    at = before
    rows = [
        Fall(name="all layers in float32", kind="total", note=milliseconds(at), title="all layers in float32", start=0, end=at)
    ]
    for item in drawn:
        change, words = _change(item), f"{_ms(item.float_ms)} \u2192 {_ms(item.int8_ms)}{NBSP}ms"
        rows.append(
            Fall(
                name=item.layer, kind="saves" if change < 0 else "costs", note=f"{_signed(change)}{NBSP}ms",
                extra=f" ({words})", title=f"{item.layer} ({item.op_type}): {words}", start=at, end=at + change,
            )
        )  # fmt: skip
        at += change
    rest = changed[STEPS:]
    if rest:
        change = sum(_change(item) for item in rest)
        kind = "saves" if change < 0 else "costs"
        note = f"{_signed(change)}{NBSP}ms"
        title = f"{len(rest)} other layers together: {note}"
        rows.append(Fall(name=f"all others ({len(rest)})", kind=kind, note=note, title=title, start=at, end=at + change))
        at += change
    rows.append(Fall(name=name, kind="total", note=milliseconds(at), title=f"layers of {name}", start=0, end=at))
    return rows


def _cost_caption(result: OptimizeResult, timed: Sequence[LayerSensitivity], before: float, after: float) -> str:
    name = subject(result)
    share = f" ({_signed(100 * (after / before - 1), 2)}{NBSP}%)" if before > 0 else ""
    parts = [f"Times inside the model on this host: {milliseconds(before)} in float32, {milliseconds(after)} in {name}{share}."]
    stay = [item for item in timed if not item.is_int8]
    if stay:
        spent = milliseconds(sum(item.float_ms or 0.0 for item in stay))
        parts.append(f"{len(stay)} layers stay in float32 and take {spent} either way.")
    audit = result.findings.audits.get(name)
    spent_on = [kernel.ms for kernel in audit.kernels if kernel.precision == "conversion" and kernel.ms] if audit else []
    apart = f": {milliseconds(sum(spent_on))} in {name}" if spent_on else ""
    parts.append(f"Conversions between int8 and float32 are not in these bars{apart}.")
    if any(not item.float_ms or not item.int8_ms for item in timed):
        parts.append("0: the runtime fuses the layer into another.")
    missing = len(result.findings.layers) - len(timed)
    if missing:
        parts.append(f"{missing} layers were not timed.")
    return " ".join(parts) + _about(result)


def _cost_table(order: Sequence[LayerSensitivity], name: str) -> Markup:
    head: list[Cell] = [
        ("layer", None), ("float32, ms", "number"), ("int8, ms", "number"), ("int8 would change it by", "number"),
        (f"in {name}", "number"), ("so it changes by", "number"),
    ]  # fmt: skip
    rows: list[Row] = []
    for item in order:
        gain = (item.int8_ms or 0.0) - (item.float_ms or 0.0)
        texts = [_ms(item.float_ms), _ms(item.int8_ms), _signed(gain), _place(item), _signed(_change(item))]
        rows.append(("", [(_named(item.layer, item.op_type), None), *((text, "number") for text in texts)]))
    return _names(head, rows, "Time by layer")


# --- ranges ------------------------------------------------------------------------------------------------------------------


def ranges(result: OptimizeResult) -> Markup | None:
    """Chosen against seen ranges of activations, worst SQNR first."""
    found = sorted(result.findings.ranges, key=lambda item: _order(item.sqnr_db))
    if not found:
        return None
    rows = [_range(item) for item in found if _is_range(item)][:SHOWN]
    cut = sum(item.clipped > 0 for item in found)
    caption = (
        f"The pale bar is what calibration saw, from its least to its largest value; the dark one is what 8 bits were given. "
        f"{cut} of {len(found)} ranges clip values. At the right how the range was found, and the SQNR of this tensor alone."
    )
    if len(found) > len(rows):
        caption += f" Drawn are the {len(rows)} worst."
    label = f"Chosen within seen ranges of the {len(rows)} worst of {len(found)} activations; the table below has all."

    def draw(_name: str, width: int) -> Markup:
        title = "place in the seen range, %"
        return range_bars(rows, title=title, format_tick=_percent_tick, width=width, label=label)

    entries = [_sample("range seen-key", "seen"), _sample("range", "chosen"), key("zero-key", "the value 0")]
    picture = figure(draw, caption + _about(result), element("ul", *entries, class_="legend")) if rows else None
    return join(picture, _fold(f"As a table: {_count(found, 'range')}", _range_table(found)))


def _is_range(item: TensorRange) -> bool:
    ends = (item.seen_low, item.seen_high, item.low, item.high)
    return all(math.isfinite(value) for value in ends) and item.seen_high > item.seen_low


def _range(item: TensorRange) -> Range:
    width = item.seen_high - item.seen_low
    low, high, zero = ((value - item.seen_low) / width for value in (item.low, item.high, 0.0))
    seen, chosen = _interval(item.seen_low, item.seen_high), _interval(item.low, item.high)
    return Range(
        name=item.tensor, kind="clips" if item.clipped > 0 else "whole", low=low, high=high, zero=zero,
        note=f"{item.method}, {decibels(item.sqnr_db)}", extra=f", clips {_share(item.clipped)}" if item.clipped > 0 else "",
        title=f"{item.tensor}: seen {seen}, chosen {chosen} by {item.method}, {_share(item.clipped)} clipped",
    )  # fmt: skip


def _range_table(found: Sequence[TensorRange]) -> Markup:
    head: list[Cell] = [
        ("activation", None), ("seen", "number"), ("chosen", "number"), ("by", "number"), ("SQNR", "number"),
        ("clipped", "number"),
    ]  # fmt: skip
    rows: list[Row] = []
    for item in found:
        seen, chosen = _interval(item.seen_low, item.seen_high), _interval(item.low, item.high)
        texts = [seen, chosen, item.method, decibels(item.sqnr_db), _share(item.clipped)]
        rows.append(("", [(item.tensor, None), *((text, "number") for text in texts)]))
    return _names(head, rows, "Ranges of activations")


# --- saturation --------------------------------------------------------------------------------------------------------------


def saturation(result: OptimizeResult) -> Markup | None:
    """Overflows of 16-bit sums by layer, the largest share first; one sentence where there are none."""
    found = result.findings.saturation
    if not found:
        return None
    bad = sorted((item for item in found if item.overflowing), key=lambda item: -_overflow(item))
    what = "x86-64 processors without dot-product instructions (VNNI) add two products in 16 bits and cut off what is larger"
    if not bad:
        words = f"Nothing overflows in any of {len(found)} layers on calibration data. {what[0].upper()}{what[1:]}."
        return element("p", words + _about(result))
    rows = [_leak(item) for item in bad[:SHOWN]]
    cured = sum(item.cure != "none" for item in bad)
    worst = max(abs(item.worst) for item in bad)
    caption = (
        f"{what}: {len(bad)} of {len(found)} layers would overflow on calibration data, by sums of up to {worst:,} where "
        f"{INT16_MAX:,} fits. {_cured(cured, len(bad))} At the right the share of the sums and the largest one."
    )
    if len(bad) > len(rows):
        caption += f" Drawn are the {len(rows)} worst."
    label = f"Share of overflowing sums in the {len(rows)} worst of {len(bad)} layers; the table below has all."

    def draw(_name: str, width: int) -> Markup:
        return lengths(rows, title="sums that overflow, %", format_tick=_tick, width=width, label=label)

    entries = [_sample("plain none", "not cured")] if cured < len(bad) else []
    entries += [_sample("plain cured", "cured")] if cured else []
    picture = figure(draw, caption + _about(result), element("ul", *entries, class_="legend"))
    return join(picture, _fold(f"As a table: {_count(bad, 'layer')} with overflow", _leak_table(bad)))


def _cured(cured: int, count: int) -> str:
    if not cured:
        return "Nothing was done about it: this matters on such processors only."
    return "All of them are cured." if cured == count else f"{cured} of them are cured."


def _leak(item: LayerSaturation) -> Length:
    cure, share = CURES.get(item.cure, item.cure), _share(_overflow(item))
    return Length(
        name=item.layer, kind="none" if item.cure == "none" else "cured", value=100 * _overflow(item),
        note=f"{share}, {item.worst:,}", extra="" if item.cure == "none" else f", {cure}",
        title=f"{item.layer} ({item.op_type}): {item.overflowing:,} of {item.pairs:,} sums, up to {item.worst:,}; cure: {cure}",
    )  # fmt: skip


def _leak_table(bad: Sequence[LayerSaturation]) -> Markup:
    head: list[Cell] = [
        ("layer", None), ("sums that overflow", "number"), ("share", "number"), ("largest sum", "number"), ("cure", "number"),
    ]  # fmt: skip
    rows: list[Row] = []
    for item in bad:
        texts = [f"{item.overflowing:,} of {item.pairs:,}", _share(_overflow(item)), f"{item.worst:,}".replace("-", MINUS)]
        texts.append(CURES.get(item.cure, item.cure))
        rows.append(("", [(_named(item.layer, item.op_type), None), *((text, "number") for text in texts)]))
    return _names(head, rows, "Saturation by layer")


def _overflow(item: LayerSaturation) -> float:
    return item.overflowing / max(item.pairs, 1)


# --- what the runtime really runs --------------------------------------------------------------------------------------------


def audits(result: OptimizeResult) -> Markup | None:
    """Operators of the runtime's own graph by precision, and what was found in it, by candidate."""
    parts = [_audit(name, audit) for name, audit in result.findings.audits.items()]
    return join(*parts) if parts else None


def _audit(name: str, audit: RuntimeAudit) -> Markup:
    times = [kernel.ms for kernel in audit.kernels if kernel.ms is not None]
    total = audit.total_ms if audit.total_ms is not None else sum(times) if times else None
    took = f", {milliseconds(total)} a run by its profiler" if total is not None else ""
    title = element("h3", name, " ", element("span", f"{audit.model}, {_count(audit.kernels, 'node')}{took}", class_="quiet"))
    found = _findings(audit.findings) if audit.findings else element("p", _clean(audit.kernels))
    if not audit.kernels:
        return element("div", title, found, class_="audit")
    return element(
        "div", title, _mix(name, audit.kernels, total), _operators(name, audit.kernels, total), found, class_="audit"
    )


def _clean(kernels: Sequence[Kernel]) -> str:
    """Claims no more than an audit without findings says."""
    has_int8 = any(kernel.precision == "int8" for kernel in kernels)
    return "Nothing found: what was quantized runs in integers." if has_int8 else "Nothing found; nothing in it runs in int8."


def _findings(found: Sequence[AuditFinding]) -> Markup:
    """Findings of one kind that have the same repair are told together."""
    groups: dict[tuple[str, str], list[AuditFinding]] = {}
    for finding in found:
        groups.setdefault((finding.kind, finding.repair), []).append(finding)
    return element("ul", *(_group(kind, repair, items) for (kind, repair), items in groups.items()), class_="notes findings")


def _group(kind: str, repair: str, found: Sequence[AuditFinding]) -> Markup:
    times = [finding.ms for finding in found if finding.ms is not None]
    took = f" ({milliseconds(sum(times))})" if times else ""
    texts = [typeset(finding.text.rstrip(".")) for finding in found]
    if len(found) == 1:
        return element("li", element("b", KINDS[kind]), took, f": {texts[0]}. {typeset(repair)}".rstrip())
    advice = element("p", element("b", "Repair:"), f" {typeset(repair)}") if repair else None
    shown = element("ul", *(element("li", words) for words in texts[:TOLD]))
    rest = None
    if len(texts) > TOLD:
        rest = _fold(f"{len(texts) - TOLD} more", element("ul", *(element("li", words) for words in texts[TOLD:])))
    return element("li", element("b", f"{KINDS[kind]}, {len(found)} times"), took, advice, shown, rest)


def _mix(name: str, kernels: Sequence[Kernel], total: float | None) -> Markup:
    """Time by precision, or nodes where nothing was timed."""
    spent: dict[str, list[float]] = {}
    for kernel in kernels:
        spent.setdefault(kernel.precision, []).append((kernel.ms or 0.0) if total is not None else 1.0)
    whole = max(total if total is not None else float(len(kernels)), 1e-9)
    rows = []
    for kind in (kind for kind in PRECISIONS if kind in spent):
        value, nodes = sum(spent[kind]), _count(spent[kind], "node")
        note = f"{_share(value / whole, 2)}, {milliseconds(value)}" if total is not None else nodes
        words = PRECISIONS[kind]
        extra = f", {nodes}" if total is not None else ""
        rows.append(Length(name=words, kind=kind, value=value, note=note, extra=extra, title=f"{words}: {note}{extra}"))
    unit = "ms a run" if total is not None else "nodes"
    label = f"{name} by precision: {'; '.join(row.title for row in rows)}."

    def draw(_name: str, width: int) -> Markup:
        return lengths(rows, title=unit, format_tick=_tick, width=width, label=label)

    return figure(draw, "By precision, conversions apart; the operators follow.")


def _operators(name: str, kernels: Sequence[Kernel], total: float | None) -> Markup:
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.op_type, kernel.precision), []).append(kernel)
    order = sorted(groups.items(), key=lambda item: (-sum(kernel.ms or 0.0 for kernel in item[1]), -len(item[1])))
    head: list[Cell] = [
        ("operator", None), ("runs in", "number"), ("nodes", "number"), ("ms", "number"), ("share", "number"),
    ]  # fmt: skip
    rows: list[Row] = []
    for (kind, precision), nodes in order:
        times = [kernel.ms for kernel in nodes if kernel.ms is not None]
        share = _share(sum(times) / total, 2) if times and total else NONE
        texts = [PRECISIONS[precision], str(len(nodes)), _ms(sum(times)) if times else NONE, share]
        rows.append(("", [(kind, None), *((text, "number") for text in texts)]))
    label = f"Operators of {name} by precision"
    first = _names(head, rows[:OPERATORS], label)
    if len(rows) <= OPERATORS:
        return first
    return join(first, _fold(f"{len(rows) - OPERATORS} more operators", _names(head, rows[OPERATORS:], f"{label}, the rest")))


# --- the ladder --------------------------------------------------------------------------------------------------------------


def ladder(result: OptimizeResult) -> Markup | None:
    """What each refinement brought, in the order of trying, and whether it stayed."""
    steps = result.findings.ladder
    if not steps:
        return None
    head: list[Cell] = [
        ("step", None), ("before", "number"), ("after", "number"), ("change, dB", "number"), ("seconds", "number"),
        ("kept", "verdict"),
    ]  # fmt: skip
    rows: list[Row] = []
    for step in steps:
        change = None if step.before_db is None or step.score_db is None else step.score_db - step.before_db
        figures = [decibels(step.before_db), decibels(step.score_db), NONE if change is None else _signed(change, 2)]
        figures.append(significant(step.seconds, 2))
        kept = element(
            "span", element("b", "\u2713 kept" if step.is_kept else "\u2717 not kept"), element("small", _reason(step.reason))
        )
        words = LADDER.get(step.name)
        name = element("span", step.name, element("small", words, class_="quiet") if words else None, class_="step-name")
        rows.append(("", [(name, None), *((text, "number") for text in figures), (kept, "verdict")]))
    kept_steps = [step for step in steps if step.is_kept and step.before_db is not None and step.score_db is not None]
    gain = sum((step.score_db or 0.0) - (step.before_db or 0.0) for step in kept_steps)
    total = f"{len(kept_steps)} of {len(steps)} steps stayed, {_signed(gain, 2)}{NBSP}dB together."
    words = "SQNR of the model\u2019s output on calibration samples that the step was not made from; what does not gain goes."
    table_ = table(head, rows, label="The ladder, step by step", class_="as-cards ladder")
    return join(element("p", total), table_, element("p", words + _about(result), class_="quiet"))


def _reason(reason: str) -> str:
    return typeset(reason.replace("-", MINUS, 1) if reason.startswith("-") else reason)


def remarks(result: OptimizeResult) -> Markup | None:
    """What the search had to leave out, in its own words."""
    items = [element("li", typeset(f"{note[:1].upper()}{note[1:]}.".replace("..", "."))) for note in result.findings.notes]
    return element("ul", *items, class_="notes") if items else None


# --- words and pieces --------------------------------------------------------------------------------------------------------


def decibels(value: float | None) -> str:
    """An SQNR; the records write no noise at all as 200 dB."""
    if value is None or math.isnan(value):
        return NONE
    if value >= SILENT_DB:
        return "no noise"
    return f"{value:.1f}{NBSP}dB".replace("-", MINUS) if math.isfinite(value) else significant(value)


def _ms(value: float | None) -> str:
    return NONE if value is None else significant(value)


def _share(value: float, digits: int = 3) -> str:
    """Per cent; what is not quite all is not called all."""
    per_cent = 100 * value
    shown = f"{per_cent:.0f}" if per_cent >= 99.95 else f"{per_cent:.1f}" if per_cent >= 99.5 else significant(per_cent, digits)
    return f"{shown}{NBSP}%"


def _signed(value: float, digits: int = 3) -> str:
    sign = "+" if value > 0 else MINUS if value < 0 else "\u00b1"
    return f"{sign}{significant(abs(value), digits)}"


def _interval(low: float, high: float) -> str:
    return f"{significant(low)} \u2026 {significant(high)}"


def _tick(value: float, step: float) -> str:
    """Zero is short, since it stands at the edge."""
    return tick(value, step) if value else "0"


def _percent_tick(value: float, step: float) -> str:
    return _tick(100 * value, 100 * step)


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items)} {noun}{'s' if len(items) != 1 else ''}"


def _place(item: LayerSensitivity) -> str:
    return "int8" if item.is_int8 else "fp32"


def _is_timed(item: LayerSensitivity) -> bool:
    return _finite(item.float_ms) is not None and _finite(item.int8_ms) is not None


def _change(item: LayerSensitivity) -> float:
    """Milliseconds that the mix adds to a layer that was timed."""
    return (item.int8_ms or 0.0) - (item.float_ms or 0.0) if item.is_int8 else 0.0


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _order(value: float) -> float:
    """Unknown values last."""
    return math.inf if math.isnan(value) else value


def _named(name: str, op_type: str) -> Markup:
    return element("span", name, " ", element("small", op_type))


def _names(head: Sequence[Cell], rows: Iterable[Row], label: str) -> Markup:
    """A table whose first column may be long: it breaks rather than push the figures out of sight."""
    return table(head, list(rows), label=label, class_="as-cards names")


def _fold(summary: str, content: Markup) -> Markup:
    return element("details", element("summary", summary), content)


def _icon(sign: Markup, class_: str) -> Markup:
    return element(
        "svg", element("g", sign, class_=class_), viewBox="0 0 20 20", width=16, height=16, class_="icon", aria_hidden="true"
    )


def _sample(class_: str, words: str) -> Markup:
    """An entry of a legend that shows a bar."""
    bar = element("rect", x=1, y=5, width=18, height=10, class_="length")
    return element("li", _icon(bar, class_), words)
