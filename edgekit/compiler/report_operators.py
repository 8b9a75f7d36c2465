"""The section about operators: where the time was saved between the baseline and the chosen candidate.

The runtime names one kind of work differently by precision and fusion (Conv, FusedConv, QLinearConv): all these are one step.
Conversions between precisions and layouts are a step of their own.

>>> kind_of("NhwcFusedConv"), kind_of("MatMulIntegerToFloat"), kind_of("QLinearAdd"), kind_of("QuickGelu")
('Conv', 'MatMul, Gemm', 'Add', 'QuickGelu')
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from edgekit.compiler.findings import Kernel, RuntimeAudit
from edgekit.compiler.markup import Markup, join
from edgekit.compiler.report_table import Cell, Row, fold, names
from edgekit.compiler.report_waterfall import Step, Total, falls, waterfall_figure
from edgekit.compiler.report_words import NBSP, NONE, bare_ms, counted, milliseconds, signed
from edgekit.compiler.result import OptimizeResult

STEPS = 10
LEAST_SHARE = 0.005
"""Of the baseline's time: what changes less is drawn with the others."""
_BEFORE = re.compile(r"^(?:(?:QLinear|DynamicQuantize|Nhwc|Fused|Bias|Fast|Skip|Q)(?=[A-Z]))+")
_AFTER = re.compile(r"(?:IntegerToFloat|Integer|NBits)$")
PRODUCTS = frozenset({"MatMul", "Gemm"})
"""The runtime turns one into the other."""
CONVERSIONS = "conversions"
Kinds = dict[str, list[Kernel]]


def kind_of(op_type: str) -> str:
    """The kind of work that an operator does, whatever its precision."""
    kind = _AFTER.sub("", _BEFORE.sub("", op_type)) or op_type
    return "MatMul, Gemm" if kind in PRODUCTS else kind


def savings(result: OptimizeResult) -> Markup | None:
    """Waterfall by kind of operator; None where the baseline was chosen or one of the two was not timed."""
    first, last = result.baseline.name, result.chosen.name
    audits = result.findings.audits
    if first == last or not all(name in audits and _is_timed(audits[name]) for name in (first, last)):
        return None
    before, after = _by_kind(audits[first]), _by_kind(audits[last])
    steps = [_step(kind, before.get(kind, []), after.get(kind, [])) for kind in dict.fromkeys((*before, *after))]
    start, end = (sum(_spent(kernels) for kernels in kinds.values()) for kinds in (before, after))
    ends = (Total(name=name, ms=ms, title=f"all operators of {name}") for name, ms in ((first, start), (last, end)))
    rows = falls(next(ends), steps, next(ends), most=STEPS, least_ms=LEAST_SHARE * start)
    label = (
        f"Waterfall from {milliseconds(start)} of {first} to {milliseconds(end)} of {last} by kind of operator; table below."
    )
    picture = waterfall_figure(rows, _caption(result, start, end), title="sum over the operators, ms", label=label)
    return join(picture, fold(f"As a table: {counted(steps, 'kind')} of operators", _table(steps, before, after, first, last)))


def _is_timed(audit: RuntimeAudit) -> bool:
    return any(kernel.ms for kernel in audit.kernels)


def _by_kind(audit: RuntimeAudit) -> Kinds:
    kinds: Kinds = {}
    for kernel in audit.kernels:
        kinds.setdefault(CONVERSIONS if kernel.precision == "conversion" else kind_of(kernel.op_type), []).append(kernel)
    return kinds


def _spent(kernels: Sequence[Kernel]) -> float:
    return sum(kernel.ms or 0.0 for kernel in kernels)


def _step(kind: str, before: Sequence[Kernel], after: Sequence[Kernel]) -> Step:
    words = f"{bare_ms(_spent(before))} \u2192 {bare_ms(_spent(after))}{NBSP}ms"
    title = f"{kind}: {_nodes(before)} \u2192 {_nodes(after)}, {words}"
    return Step(name=kind, change_ms=_spent(after) - _spent(before), words=words, title=title)


def _nodes(kernels: Sequence[Kernel]) -> str:
    """How many of which operator, the most frequent first."""
    return ", ".join(f"{count}{NBSP}{op}" for op, count in Counter(kernel.op_type for kernel in kernels).most_common()) or NONE


def _caption(result: OptimizeResult, start: float, end: float) -> str:
    first, last = result.baseline, result.chosen
    share = f" ({signed(100 * (end / start - 1), 2)}{NBSP}%)" if start > 0 else ""
    parts = [f"{milliseconds(start)} in the operators of {first.name}, {milliseconds(end)} in those of {last.name}{share}."]
    parts.append("An operator and its forms in other precisions are one step; conversions are their own.")
    words = "By the runtime\u2019s profiler on this host, which adds a cost of its own to each operator"
    if first.latency is not None and last.latency is not None:
        medians = f"{milliseconds(first.latency.p50_ms)} and {milliseconds(last.latency.p50_ms)}"
        words += f": the medians without it are {medians}"
    return " ".join([*parts, f"{words}."])


def _table(steps: Sequence[Step], before: Kinds, after: Kinds, first: str, last: str) -> Markup:
    head: list[Cell] = [
        ("kind", None), (f"{first}, nodes", "number"), (f"{first}, ms", "number"), (f"{last}, nodes", "number"),
        (f"{last}, ms", "number"), ("change, ms", "number"),
    ]  # fmt: skip
    rows: list[Row] = []
    for step in sorted(steps, key=lambda step: step.change_ms):
        cells: list[Cell] = [(step.name, None)]
        for kernels in (before.get(step.name, []), after.get(step.name, [])):
            cells += [(_nodes(kernels), "number nodes"), (bare_ms(_spent(kernels)) if kernels else NONE, "number")]
        rows.append(("", [*cells, (signed(step.change_ms), "number")]))
    return names(head, rows, "Time by kind of operator")
