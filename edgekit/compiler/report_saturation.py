"""The section about saturation: 16-bit sums that overflow on x86 without dot-product instructions, by layer."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.compiler.findings import LayerSaturation
from edgekit.compiler.markup import Markup, element, join
from edgekit.compiler.plot_layers import Length, lengths
from edgekit.compiler.report_figures import SHOWN, bar_key, figure, short_tick
from edgekit.compiler.report_table import Cell, Row, fold, named, names
from edgekit.compiler.report_words import MINUS, about, counted, percent
from edgekit.compiler.result import OptimizeResult

INT16_MAX = 32_767
CURES = {"none": "none", "7-bit": "7-bit weights", "u8u8": "unsigned weights", "fp32": "kept in float32"}


def saturation(result: OptimizeResult) -> Markup | None:
    """Overflows of 16-bit sums by layer, the largest share first; one sentence where there are none."""
    found = result.findings.saturation
    if not found:
        return None
    bad = sorted((item for item in found if item.overflowing), key=lambda item: -_overflow(item))
    what = "x86-64 processors without dot-product instructions (VNNI) add two products in 16 bits and cut off what is larger"
    if not bad:
        words = f"Nothing overflows in any of {len(found)} layers on calibration data. {what[0].upper()}{what[1:]}."
        return element("p", words + about(result))
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
        return lengths(rows, title="sums that overflow, %", format_tick=short_tick, width=width, label=label)

    entries = [bar_key("plain none", "not cured")] if cured < len(bad) else []
    entries += [bar_key("plain cured", "cured")] if cured else []
    picture = figure(draw, caption + about(result), element("ul", *entries, class_="legend"))
    return join(picture, fold(f"As a table: {counted(bad, 'layer')} with overflow", _leak_table(bad)))


def _cured(cured: int, count: int) -> str:
    if not cured:
        return "Nothing was done about it: this matters on such processors only."
    return "All of them are cured." if cured == count else f"{cured} of them are cured."


def _leak(item: LayerSaturation) -> Length:
    cure, share = CURES.get(item.cure, item.cure), percent(_overflow(item))
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
        texts = [f"{item.overflowing:,} of {item.pairs:,}", percent(_overflow(item)), f"{item.worst:,}".replace("-", MINUS)]
        texts.append(CURES.get(item.cure, item.cure))
        rows.append(("", [(named(item.layer, item.op_type), None), *((text, "number") for text in texts)]))
    return names(head, rows, "Saturation by layer")


def _overflow(item: LayerSaturation) -> float:
    return item.overflowing / max(item.pairs, 1)
