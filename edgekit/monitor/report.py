"""A replay as one HTML file: alarms, histograms against the reference, effects over time; no script, nothing from elsewhere.

>>> from edgekit.monitor.replay import ReplayReport
>>> empty = ReplayReport(windows=1, samples=5, streams_watched=1, slices=("all",), threshold=3, arl=20, alarms=(), streams=())
>>> "No drift" in render(empty, title="a recording")
True
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from edgekit.monitor.replay import QualityAt, ReplayAlarm, ReplayReport, StreamSummary

MAX_STREAMS = 24
MAX_ALARMS = 200
_WIDTH, _HEIGHT, _LEFT = 640, 120, 44
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --now: #b3460b; --reference: #7d8791; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9ba5b0; --line: #3d444d; --now: #ff9a57; --reference: #7d8791; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.n, th.n { text-align: right; }
figure { margin: 1.5rem 0; } figcaption { color: var(--soft); } svg { max-width: 100%; height: auto; }
.now { fill: var(--now); stroke: none; } .reference { fill: var(--reference); opacity: .55; }
.line { fill: none; stroke: var(--now); stroke-width: 1.6; } .soft { fill: none; stroke: var(--reference); }
.band { fill: var(--reference); opacity: .3; } .mark { stroke: var(--now); stroke-dasharray: 3 3; }
text { font: 11px system-ui, sans-serif; fill: var(--soft); } .axis { stroke: var(--line); } p.note { color: var(--soft); }
"""


def render(report: ReplayReport, *, title: str) -> str:
    """The whole page.

    Args:
        report: of the replay.
        title: what was replayed, against what.
    """
    alarming = [each.stream for each in (*report.alarms,) if each.slice == "all"]
    shown = sorted(
        (each for each in report.streams if each.slice == "all"),
        key=lambda each: (each.stream not in alarming, -(each.effect or 0.0)),
    )[:MAX_STREAMS]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_verdict(report))}</p>",
        _table(report.alarms, "Alarms") if report.alarms else "",
        _table(report.concept, "Labels against the estimate") if report.concept else "",
        _quality(report.quality) if report.quality else "",
        "<h2>Streams</h2>",
        *(
            _stream(each, [alarm for alarm in report.alarms if alarm.stream == each.stream and alarm.slice == "all"])
            for each in shown
        ),
        _notes(report),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(part for part in parts if part)
    name = f"<title>{escape(title)}</title>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}{name}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _verdict(report: ReplayReport) -> str:
    found = f"{len(report.alarms)} alarms" if report.alarms else "No drift"
    found += f", and {len(report.concept)} of labels" if report.concept else ""
    streams = f"{report.streams_watched} streams in {len(report.slices)} slices"
    return (
        f"{found} in {report.windows} windows of {report.samples} samples; {streams}, reference of {report.reference_samples}."
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(alarms: Sequence[ReplayAlarm], title: str) -> str:
    heads = ("window", "at", "stream", "slice", "delay", "PSI", "JS", "KS", "Wasserstein", "evidence", "what")
    right = {"window", "delay", "PSI", "JS", "KS", "Wasserstein", "evidence"}
    rows = []
    for alarm in alarms[:MAX_ALARMS]:
        cells = (
            str(alarm.window),
            alarm.place,
            alarm.stream + (" (with all)" if alarm.is_inhibited else ""),
            alarm.slice,
            "" if alarm.delay is None else str(alarm.delay),
            _number(alarm.effect),
            _number(alarm.jensen_shannon),
            _number(alarm.kolmogorov_smirnov),
            _number(alarm.wasserstein),
            f"{alarm.evidence:.1f} over {alarm.threshold:.1f}",
            alarm.what,
        )
        tags = [
            f'<td class="n">{escape(cell)}</td>' if head in right else f"<td>{escape(cell)}</td>"
            for head, cell in zip(heads, cells, strict=True)
        ]
        rows.append(f"<tr>{''.join(tags)}</tr>")
    head_row = "".join(f'<th class="n">{head}</th>' if head in right else f"<th>{head}</th>" for head in heads)
    more = f'<p class="note">and {len(alarms) - MAX_ALARMS} more</p>' if len(alarms) > MAX_ALARMS else ""
    return f"<h2>{title}</h2><table><thead><tr>{head_row}</tr></thead><tbody>{''.join(rows)}</tbody></table>{more}"


def _stream(stream: StreamSummary, alarms: Sequence[ReplayAlarm]) -> str:
    state = "alarms" if stream.is_alarm else "likely drifts" if stream.is_listed else "as in the reference"
    caption = f"{stream.stream}: {state}; PSI {_number(stream.effect)}, log evidence {stream.evidence:.1f}"
    drawn = _bars(stream) + _effects(stream, [alarm.window for alarm in alarms])
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawn}</figure>"


def _bars(stream: StreamSummary) -> str:
    if not stream.reference or not stream.now:
        return ""
    top = max(*stream.reference, *stream.now)
    step = _WIDTH / len(stream.reference)
    parts = []
    for kind, values, inset in (("reference", stream.reference, 0.05), ("now", stream.now, 0.3)):
        for at, value in enumerate(values):
            height = value / top * (_HEIGHT - 4)
            box = f'x="{(at + inset) * step:.1f}" y="{_HEIGHT - height:.1f}" width="{step * (1 - 2 * inset):.1f}"'
            parts.append(f'<rect class="{kind}" {box} height="{height:.1f}"/>')
    label = f"shares by bin of {stream.stream}: reference wide and grey, the last windows narrow"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">{"".join(parts)}</svg>'


def _points(values: Sequence[float | None], top: float) -> str:
    step = (_WIDTH - _LEFT) / max(1, len(values) - 1)
    pairs = [
        f"{_LEFT + at * step:.1f},{_HEIGHT - 14 - min(value, top) / top * (_HEIGHT - 24):.1f}"
        for at, value in enumerate(values)
        if value is not None
    ]
    return " ".join(pairs)


def _effects(stream: StreamSummary, alarms: Sequence[int]) -> str:
    known = [value for value in stream.effects if value is not None]
    if len(known) < 2:
        return ""
    top = max(0.02, *known)
    step = (_WIDTH - _LEFT) / max(1, len(stream.effects) - 1)
    parts = [f'<polyline class="line" points="{_points(stream.effects, top)}"/>', _axis(top, len(stream.effects), "PSI")]
    for window in alarms:
        x = _LEFT + (window - 1) * step
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{_HEIGHT - 14}"/>')
    label = f"PSI of {stream.stream} by window, alarms at {', '.join(map(str, alarms)) or 'none'}"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">{"".join(parts)}</svg>'


def _axis(top: float, count: int, name: str) -> str:
    bottom = _HEIGHT - 14
    return (
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH}" y1="{bottom}" y2="{bottom}"/>'
        f'<text x="0" y="14">{escape(name)} {top:.2g}</text><text x="0" y="{bottom}">0</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT}">1</text><text x="{_WIDTH - 30}" y="{_HEIGHT}">{count}</text>'
    )


def _quality(points: Sequence[QualityAt]) -> str:
    if len(points) < 2:
        return ""
    low = [point.estimated_low for point in points]
    high = [point.estimated_high for point in points]
    bands = [pair for pair in (_points(high, 1.0), " ".join(reversed(_points(low, 1.0).split()))) if pair]
    parts = [f'<polygon class="band" points="{" ".join(bands)}"/>'] if len(bands) == 2 else []
    parts.append(f'<polyline class="soft" points="{_points([point.estimated for point in points], 1.0)}"/>')
    parts.append(f'<polyline class="line" points="{_points([point.realised for point in points], 1.0)}"/>')
    parts.append(_axis(1.0, points[-1].window, "accuracy"))
    caption = "Accuracy by window: estimated before labels (grey, with its band; assumes no concept drift), realised by labels."
    label = "estimated and realised accuracy by window"
    drawn = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<h2>Quality</h2><figure><figcaption>{caption}</figcaption>{drawn}</figure>"


def _notes(report: ReplayReport) -> str:
    bound = (
        f"A stream alarms when its log evidence exceeds {report.threshold:.1f}: a false alarm in {report.arl:,.0f} windows of a"
    )
    notes = [
        f"{bound} stream on average, so that all streams and slices together keep the budget.",
        "PSI has the bias of its sample size taken off. Effective samples and time effects are estimates.",
        *report.notes,
    ]
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
