"""Sections about layers: where int8 hurts, and from float32 to the mix in milliseconds, layer by layer.

A picture shows the few that matter most; the folded table under it has all of them, and is the picture's text alternative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgekit.compiler.findings import LayerSensitivity
from edgekit.compiler.markup import Markup, element, join
from edgekit.compiler.plot_layers import Hurt, hurt_bars, is_beyond, mark
from edgekit.compiler.report_figures import SHOWN, bar_key, figure, icon_of, short_tick
from edgekit.compiler.report_table import Cell, Row, fold, named, names
from edgekit.compiler.report_waterfall import Step, Total, falls, waterfall_figure
from edgekit.compiler.report_words import (
    NBSP,
    about,
    bare_ms,
    counted,
    decibels,
    finite,
    milliseconds,
    signed,
    subject,
    unknown_last,
)
from edgekit.compiler.result import OptimizeResult

STEPS = 12
"""Layers of the waterfall, those that change most; the others are one step."""


def sensitivity(result: OptimizeResult) -> Markup | None:
    """SQNR of the model's output with one layer in int8 at a time, lowest first."""
    found = sorted(result.findings.layers, key=lambda item: unknown_last(item.enable_one_db))
    if not found:
        return None
    name = subject(result)
    rows = [_hurt(item, name) for item in found if math.isfinite(item.enable_one_db)][:SHOWN]
    kept = sum(not item.is_int8 for item in found)
    worst = found[0]
    caption = (
        f"The model\u2019s answers with only this layer in int8, against float32: a short bar hurts. Worst: {worst.layer} "
        f"({decibels(worst.enable_one_db)}); {kept} of {len(found)} layers stay in float32 in {name}.{about(result)}"
    )
    if any(row.others is not None for row in rows):
        caption += (
            " A cross is the other way round: everything but this layer in int8, so far right means that this one is to blame."
        )
    if len(found) > len(rows):
        caption += f" Drawn are the {len(rows)} most sensitive."
    if is_beyond(rows):
        caption += " An arrow: the mark lies beyond the plot; the table has it."
    label = f"Sensitivity of the {len(rows)} most sensitive of {len(found)} layers; the table below has all."

    def draw(_name: str, width: int) -> Markup:
        return hurt_bars(rows, title="output SQNR, dB (short hurts)", format_tick=short_tick, width=width, label=label)

    picture = figure(draw, caption, _hurt_legend(rows, name)) if rows else None
    return join(picture, fold(f"As a table: {counted(found, 'layer')}", _layer_table(found, name)))


def _hurt(item: LayerSensitivity, name: str) -> Hurt:
    place = _place(item)
    times = f", {bare_ms(item.float_ms)} \u2192 {bare_ms(item.int8_ms)}{NBSP}ms" if _is_timed(item) else ""
    spoken = f"; float32 {bare_ms(item.float_ms)} ms, int8 {bare_ms(item.int8_ms)} ms" if _is_timed(item) else ""
    return Hurt(
        name=item.layer, kind=place, note=f"{decibels(item.enable_one_db)}, {place}", extra=times, value=item.enable_one_db,
        weights=finite(item.weights_only_db), activations=finite(item.activations_only_db),
        others=finite(item.disable_one_db),
        title=f"{item.layer} ({item.op_type}): {decibels(item.enable_one_db)}; {place} in {name}{spoken}",
    )  # fmt: skip


def _hurt_legend(rows: Sequence[Hurt], name: str) -> Markup:
    """Only what occurs."""
    entries = [bar_key("hurt int8", f"int8 in {name}")] if any(row.kind == "int8" for row in rows) else []
    entries += [bar_key("hurt fp32", f"float32 in {name}")] if any(row.kind == "fp32" for row in rows) else []
    words = {"weights": "its weights alone", "activations": "its inputs alone", "others": "everything but this layer"}
    entries += [
        element("li", icon_of(mark(part, 10.0, 10.0), "hurt int8"), text)
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
        cells: list[Cell] = [(named(item.layer, item.op_type), None)]
        decibel = [item.enable_one_db, item.weights_only_db, item.activations_only_db, item.disable_one_db]
        cells += [(decibels(value), "number") for value in decibel]
        cells += [(text, "number") for text in (_place(item), bare_ms(item.float_ms), bare_ms(item.int8_ms))]
        rows.append(("", cells if has_others else cells[:4] + cells[5:]))
    return names(head if has_others else head[:4] + head[5:], rows, "Sensitivity and time by layer")


def costs(result: OptimizeResult) -> Markup | None:
    """From float32 to the mix in milliseconds, layer by layer; None where no layer was timed."""
    timed = [item for item in result.findings.layers if _is_timed(item)]
    if not timed:
        return None
    name = subject(result)
    order = sorted(timed, key=lambda item: -abs(_change(item)))
    before = sum(item.float_ms or 0.0 for item in timed)
    after = before + sum(_change(item) for item in timed)
    everything = fold(f"As a table: {counted(timed, 'layer')}", _cost_table(order, name))
    if not any(item.is_int8 for item in timed):
        words = f"{name} runs no layer in int8; in float32 they take {milliseconds(before)} together.{about(result)}"
        return join(element("p", words), everything)
    first = Total(name="all layers in float32", ms=before, title="all layers in float32")
    rows = falls(first, [_step(item) for item in timed], Total(name=name, ms=after, title=f"layers of {name}"), most=STEPS)
    label = f"Waterfall from {milliseconds(before)} in float32 to {milliseconds(after)} in {name}; the table below has all."
    caption = _cost_caption(result, timed, before, after)
    return join(waterfall_figure(rows, caption, title="sum over the layers, ms", label=label), everything)


def _step(item: LayerSensitivity) -> Step:
    words = f"{bare_ms(item.float_ms)} \u2192 {bare_ms(item.int8_ms)}{NBSP}ms"
    return Step(name=item.layer, change_ms=_change(item), words=words, title=f"{item.layer} ({item.op_type}), {words}")


def _cost_caption(result: OptimizeResult, timed: Sequence[LayerSensitivity], before: float, after: float) -> str:
    name = subject(result)
    share = f" ({signed(100 * (after / before - 1), 2)}{NBSP}%)" if before > 0 else ""
    parts = [f"Times inside the model on this host: {milliseconds(before)} in float32, {milliseconds(after)} in {name}{share}."]
    stay = [item for item in timed if not item.is_int8]
    if stay:
        spent = milliseconds(sum(item.float_ms or 0.0 for item in stay))
        parts.append(f"Kept in float32: {counted(stay, 'layer')}, {spent} either way.")
    audit = result.findings.audits.get(name)
    spent_on = [kernel.ms for kernel in audit.kernels if kernel.precision == "conversion" and kernel.ms] if audit else []
    apart = f": {milliseconds(sum(spent_on))} in {name}" if spent_on else ""
    parts.append(f"Conversions between int8 and float32 are not in these bars{apart}.")
    if any(not item.float_ms or not item.int8_ms for item in timed):
        parts.append("0: the runtime fuses the layer into another.")
    missing = [item for item in result.findings.layers if not _is_timed(item)]
    if missing:
        parts.append(f"Not timed: {counted(missing, 'layer')}.")
    return " ".join(parts) + about(result)


def _cost_table(order: Sequence[LayerSensitivity], name: str) -> Markup:
    head: list[Cell] = [
        ("layer", None), ("float32, ms", "number"), ("int8, ms", "number"), ("int8 would change it by", "number"),
        (f"in {name}", "number"), ("so it changes by", "number"),
    ]  # fmt: skip
    rows: list[Row] = []
    for item in order:
        gain = (item.int8_ms or 0.0) - (item.float_ms or 0.0)
        texts = [bare_ms(item.float_ms), bare_ms(item.int8_ms), signed(gain), _place(item), signed(_change(item))]
        rows.append(("", [(named(item.layer, item.op_type), None), *((text, "number") for text in texts)]))
    return names(head, rows, "Time by layer")


def _place(item: LayerSensitivity) -> str:
    return "int8" if item.is_int8 else "fp32"


def _is_timed(item: LayerSensitivity) -> bool:
    return finite(item.float_ms) is not None and finite(item.int8_ms) is not None


def _change(item: LayerSensitivity) -> float:
    """Milliseconds that the mix adds to a layer that was timed."""
    return (item.int8_ms or 0.0) - (item.float_ms or 0.0) if item.is_int8 else 0.0
