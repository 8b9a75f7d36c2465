"""The section about the runtime's own graph: time by precision, what was found in it, and its operators."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.compiler.findings import AuditFinding, Kernel, RuntimeAudit
from edgekit.compiler.markup import Markup, element, join
from edgekit.compiler.plot_layers import Length, lengths
from edgekit.compiler.report_figures import figure, short_tick
from edgekit.compiler.report_table import Cell, Row, fold, names
from edgekit.compiler.report_words import NONE, bare_ms, counted, milliseconds, percent, typeset
from edgekit.compiler.result import OptimizeResult

TOLD = 3
"""Findings with the same repair before their fold."""
PRECISIONS = {"int8": "int8", "fp32": "float32", "fp16": "float16", "conversion": "conversions", "other": "other"}
KINDS = {
    "float-island": "Float island",
    "unfused-pair": "Not fused",
    "conversion": "Conversions",
    "unknown-operator": "Unknown operator",
}


def audits(result: OptimizeResult) -> Markup | None:
    """Operators of the runtime's own graph by precision, and what was found in it, by candidate."""
    parts = [_audit(name, audit) for name, audit in result.findings.audits.items()]
    return join(*parts) if parts else None


def _audit(name: str, audit: RuntimeAudit) -> Markup:
    times = [kernel.ms for kernel in audit.kernels if kernel.ms is not None]
    total = audit.total_ms if audit.total_ms is not None else sum(times) if times else None
    took = f", {milliseconds(total)} a run by its profiler" if total is not None else ""
    title = element("h3", name, " ", element("span", f"{audit.model}, {counted(audit.kernels, 'node')}{took}", class_="quiet"))
    found = _findings(audit.findings) if audit.findings else element("p", _clean(audit.kernels))
    if not audit.kernels:
        return element("div", title, found, class_="audit")
    operators = _operators(name, audit.kernels, total)
    return element("div", title, _mix(name, audit.kernels, total), found, operators, class_="audit")


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
        cure = f" {repair[0].upper()}{repair[1:]}." if repair else ""
        return element("li", element("b", KINDS[kind]), took, f": {texts[0]}.{typeset(cure)}")
    advice = element("p", element("b", "Repair:"), f" {typeset(repair)}") if repair else None
    shown = element("ul", *(element("li", words) for words in texts[:TOLD]))
    rest = None
    if len(texts) > TOLD:
        rest = fold(f"{len(texts) - TOLD} more", element("ul", *(element("li", words) for words in texts[TOLD:])))
    return element("li", element("b", f"{KINDS[kind]}, {len(found)} times"), took, advice, shown, rest)


def _mix(name: str, kernels: Sequence[Kernel], total: float | None) -> Markup:
    """Time by precision, or nodes where nothing was timed."""
    spent: dict[str, list[float]] = {}
    for kernel in kernels:
        spent.setdefault(kernel.precision, []).append((kernel.ms or 0.0) if total is not None else 1.0)
    whole = max(total if total is not None else float(len(kernels)), 1e-9)
    rows = []
    for kind in (kind for kind in PRECISIONS if kind in spent):
        value, nodes = sum(spent[kind]), counted(spent[kind], "node")
        note = f"{percent(value / whole, 2)}, {milliseconds(value)}" if total is not None else nodes
        words = PRECISIONS[kind]
        extra = f", {nodes}" if total is not None else ""
        rows.append(Length(name=words, kind=kind, value=value, note=note, extra=extra, title=f"{words}: {note}{extra}"))
    unit = "ms a run" if total is not None else "nodes"
    label = f"{name} by precision: {'; '.join(row.title for row in rows)}."

    def draw(_name: str, width: int) -> Markup:
        return lengths(rows, title=unit, format_tick=short_tick, width=width, label=label)

    return figure(draw, "By precision, conversions apart.")


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
        share = percent(sum(times) / total, 2) if times and total else NONE
        texts = [PRECISIONS[precision], str(len(nodes)), bare_ms(sum(times)) if times else NONE, share]
        rows.append(("", [(kind, None), *((text, "number") for text in texts)]))
    return fold(f"As a table: {counted(rows, 'operator')}", names(head, rows, f"Operators of {name} by precision"))
