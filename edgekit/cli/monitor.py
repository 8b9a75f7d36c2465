"""``edgekit monitor``: recorded data against a model's baseline, judged as the fleet server judges what devices send."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgekit.cli.console import note, out, out_json, paint, table, warn
from edgekit.errors import DataError, EnvironmentFault, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgekit.monitor.replay import Frame, ReplayAlarm, ReplayReport
    from edgekit.monitor.watcher import WatchRule
    from edgekit.schema.baseline import ReferenceProfile

app = typer.Typer(
    help="Watch data: drift, answers and quality, with an alarm budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0, "hour": 3600.0, "d": 86_400.0, "day": 86_400.0, "week": 604_800.0}
_SPANS = {"hour": 1 / 24, "day": 1.0, "week": 7.0, "month": 30.0, "quarter": 91.0, "year": 365.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|sec|min|h|hour|d|day|week)s?\s*\Z")
_BUDGET = re.compile(
    r"\s*(\d+(?:\.\d+)?)\s*(?:/|per|a|an|in)\s*(?:(\d+(?:\.\d+)?)\s*(d|day)s?|(hour|day|week|month|quarter|year))\s*\Z"
)
EXIT_DRIFT = 1
MIN_JOINT_ROWS = 300
MAX_LINES = 40


@app.callback()
def group() -> None:
    """Watch data: drift, answers and quality, with an alarm budget."""


def parse_budget(text: str) -> tuple[float, float]:
    """How many false alarms in how many days: ``1/month``, ``2 per week``, ``1/90 days``.

    Raises:
        UsageError: ``monitor.budget``.
    """
    found = _BUDGET.match(text)
    if not found or float(found[1]) <= 0 or (found[2] and float(found[2]) <= 0):
        hint = 'For example "1/month", "2 per week", "1/90 days".'
        raise UsageError("monitor.budget", f"--budget {text!r}: not a budget of false alarms.", hint=hint)
    return float(found[1]), float(found[2]) if found[2] else _SPANS[found[4]]


def parse_duration(text: str, option: str) -> float:
    """Seconds: ``10min``, ``1h``, ``30 s``.

    Raises:
        UsageError: ``monitor.duration``.
    """
    found = _DURATION.match(text)
    if not found or float(found[1]) <= 0:
        raise UsageError("monitor.duration", f"{option} {text!r}: not a duration.", hint="For example 30s, 10min, 1h, 1d.")
    return float(found[1]) * _UNITS[found[2]]


@app.command()
def replay(
    data: Path = typer.Argument(
        ..., metavar="DATA", help="Rows as .csv, .parquet or .npz, oldest first; or .jsonl windows exported from the fleet."
    ),
    baseline: Path = typer.Option(..., "--baseline", metavar="BUNDLE|JSON", help="The release's bundle, or its profile."),
    budget: str = typer.Option("1/month", "--budget", metavar="N/TIME", help="False alarms of all streams together, at most."),
    window: int = typer.Option(200, "--window", metavar="ROWS", help="Rows that make a window."),
    every: str = typer.Option("10min", "--every", metavar="TIME", help="The time that a window stands for, for the budget."),
    slices: list[str] = typer.Option([], "--slice", metavar="COLUMN", help="Judge each value of this column by itself, too."),
    device: str = typer.Option("", "--device", metavar="COLUMN", help="Whose row it is: rows of one device count for less."),
    time: str = typer.Option("", "--time", metavar="COLUMN", help="Sort rows by it, and show it."),
    label: str = typer.Option("", "--label", metavar="COLUMN", help='True classes.  Default: "labels" or "label", if there.'),
    effect_floor: float = typer.Option(0.002, "--effect-floor", metavar="NATS", help="Smaller shifts do not matter."),
    drift_at: int = typer.Option(-1, "--drift-at", metavar="ROW", help="Drift is known to begin here: show the delay."),
    reference: Path | None = typer.Option(
        None, "--reference", metavar="DATA", help="Raw rows of the baseline: drift of columns together, which bins cannot show."
    ),
    concept: str = typer.Option("betting", "--concept", metavar="METHOD", help="betting, adwin, page-hinkley or ddm."),
    report: Path | None = typer.Option(None, "--report", metavar="FILE", help="Write the plots as one HTML page."),
    as_json: bool = typer.Option(False, "--json", help="The whole as JSON."),
) -> None:
    """Judge recorded data against a baseline: which columns drift, since when, by how much, in which slice.

    Exit code 1 when something alarmed.
    """
    from edgekit.monitor.replay import RowPlan, frames_of_rows
    from edgekit.monitor.replay import replay as run
    from edgekit.monitor.watcher import WatchRule

    alarms, days = parse_budget(budget)
    interval_s = parse_duration(every, "--every")
    if not 0 <= effect_floor < 1:
        raise UsageError("monitor.floor", f"--effect-floor {effect_floor}: expected nats a sample, 0 to below 1.")
    profile, crc, names = read_baseline(baseline)
    rule = WatchRule(alarms=alarms, days=days, effect_floor=effect_floor, interval_s=interval_s)
    columns: dict[str, Any] = {}
    if data.suffix.lower() == ".jsonl":
        frames: Iterator[Frame] = _exported(data, profile, crc, round(interval_s * 1000))
        _refuse_with_windows(device=device, time=time, label=label, reference=reference, slices=tuple(slices))
    else:
        from edgekit.dataset.table import read_table

        columns = read_table(data)
        plan = RowPlan(window=window, time=time, device=device, slices=tuple(slices), label=label)
        frames = frames_of_rows(columns, profile, plan)
    found = run(profile, frames, rule, drift_row=drift_at if drift_at >= 0 else None, class_names=names)
    found = _with_joint(found, columns, reference, rule, window=window, skip={device, time, label, *slices})
    found = _with_concept(found, columns, profile, concept, label=label, window=window)
    _say(found, data, baseline, report, as_json=as_json)
    if found.is_drift:
        raise typer.Exit(EXIT_DRIFT)


def read_baseline(path: Path) -> tuple[ReferenceProfile, int, tuple[str, ...]]:
    """The profile in a bundle or a JSON file, the CRC-32 by which telemetry names it, and the model's classes.

    Raises:
        DataError: ``baseline.not_found``.
        ArtifactError: ``baseline.none`` for a bundle without one, ``record.malformed``.
    """
    import zlib

    from edgekit.schema.base import decode_json
    from edgekit.schema.baseline import ReferenceProfile

    if not path.is_file():
        raise DataError("baseline.not_found", f"{path}: no such file.", hint="Give a bundle, or the profile's JSON.")
    if path.suffix.lower() != ".json":
        return _of_bundle(path)
    data = path.read_bytes()
    return decode_json(data, ReferenceProfile, name=str(path)), zlib.crc32(data), ()


def _of_bundle(path: Path) -> tuple[ReferenceProfile, int, tuple[str, ...]]:
    import zlib

    from edgekit.bundle.reader import read_bundle
    from edgekit.errors import ArtifactError
    from edgekit.schema.base import decode_json
    from edgekit.schema.baseline import ReferenceProfile

    bundle = read_bundle(path)
    ref = next((ref for ref in bundle.manifest.blobs if ref.role == "baseline"), None)
    if ref is None or ref.sealed is not None:
        what = "no drift baseline" if ref is None else "a drift baseline that only its devices can read"
        hint = "Pack it with --data, or give the profile's JSON."
        raise ArtifactError("baseline.none", f"{path}: the bundle has {what}.", hint=hint)
    data = bundle.blob(ref.digest)
    return decode_json(data, ReferenceProfile, name=ref.path), zlib.crc32(data), bundle.manifest.contract.labels


def _exported(path: Path, profile: ReferenceProfile, crc: int, interval_ms: int) -> Iterator[Frame]:
    from edgekit.monitor.replay import frames_of_windows, read_windows

    if not path.is_file():
        raise DataError("data.not_found", f"{path}: no such file.")
    return frames_of_windows(read_windows(path.read_bytes(), name=str(path)), profile, crc=crc, interval_ms=interval_ms)


def _refuse_with_windows(**options: Any) -> None:
    given = [f"--{name.removesuffix('s')}" for name, value in options.items() if value]
    if given:
        text = f"{', '.join(given)}: an export of windows has its devices, times, slices and labels already."
        raise UsageError("monitor.windows", text, hint="Leave them out; they are for rows.")


def _with_joint(
    found: ReplayReport, columns: Mapping[str, Any], reference: Path | None, rule: WatchRule, *, window: int, skip: set[str]
) -> ReplayReport:
    """The report with what columns show together, tested against raw rows of the reference."""
    if reference is None:
        return found
    import msgspec

    from edgekit.dataset.table import read_table
    from edgekit.monitor.replay import joint_alarms

    rows = max(window, MIN_JOINT_ROWS)
    skipped = skip | {"label", "labels"}
    alarms, notes = joint_alarms(read_table(reference), columns, rule, rows=rows, skip=skipped)
    return msgspec.structs.replace(found, alarms=(*found.alarms, *alarms), notes=(*found.notes, *notes))


def _with_concept(
    found: ReplayReport, columns: Mapping[str, Any], profile: ReferenceProfile, method: str, *, label: str, window: int
) -> ReplayReport:
    """The report with another detector's word on the labels; the bet is in it already."""
    from edgekit.monitor.concept import METHODS

    if method not in METHODS:
        raise UsageError("monitor.concept", f"--concept {method!r}: no such.", hint=f"Give one of {', '.join(METHODS)}.")
    if method == "betting":
        return found
    import msgspec

    from edgekit.monitor.concept import find_changes, make_detector
    from edgekit.monitor.replay import concept_alarms, errors_of

    wrong = errors_of(columns, profile, label=label)
    if wrong is None:
        raise DataError("monitor.labels", f"--concept {method}: the data has no labels with a classifier's scores.")
    places = find_changes(make_detector(method), wrong)
    return msgspec.structs.replace(found, concept=concept_alarms(places, method, window=window))


def _say(found: ReplayReport, data: Path, baseline: Path, report: Path | None, *, as_json: bool) -> None:
    if report is not None:
        from edgekit.durable import write_durably
        from edgekit.monitor.report import render

        try:
            write_durably(report, render(found, title=f"{data.name} against {baseline.name}").encode())
        except OSError as error:
            raise EnvironmentFault("output.unwritable", f"{report}: cannot be written: {error.strerror}.") from error
        note(f"wrote {report}")
    if as_json:
        out_json(found)
        return
    from edgekit.monitor.sketch import MIN_SAMPLES

    if found.reference_samples < MIN_SAMPLES:
        warn(f"the baseline has {found.reference_samples} samples: below {MIN_SAMPLES} small shifts are seen late")
    alarms = [*found.alarms, *found.concept]
    shown = [alarm for alarm in alarms if not alarm.is_inhibited]
    if shown:
        out(_alarm_table(shown[:MAX_LINES]))
        out()
    listed = [each for each in found.streams if each.is_listed and not each.is_alarm and each.slice == "all"]
    if listed:
        out(f"likely drifting, too: {', '.join(each.stream for each in listed)}")
    hidden = len(alarms) - min(len(shown), MAX_LINES)
    more = f", {hidden} more with --json" if hidden else ""
    counted = f"{found.streams_watched} streams, {found.windows} windows, {found.samples} samples"
    if alarms:
        out(f"{paint('drift', 'red', 'bold')}: {len(alarms)} alarms{more}  ({counted})")
    else:
        out(f"{paint('no drift', 'green', 'bold')}  ({counted})")
    out(_quality_line(found))
    for text in found.notes:
        note(text, "dim")


def _alarm_table(alarms: list[ReplayAlarm]) -> str:
    rows = [
        [
            str(alarm.window),
            alarm.place,
            alarm.stream,
            alarm.slice,
            "" if alarm.delay is None else str(alarm.delay),
            "" if alarm.effect is None else f"{alarm.effect:.3f}",
            f"{alarm.evidence:.1f} > {alarm.threshold:.1f}" if alarm.threshold else "",
            alarm.what,
        ]
        for alarm in alarms
    ]
    return table(["window", "at", "stream", "slice", "delay", "PSI", "evidence", "what"], rows, right=[0, 4, 5])


def _quality_line(found: ReplayReport) -> str:
    if not found.quality:
        return f"alarms above log evidence {found.threshold:.1f}: one false alarm in {found.arl:,.0f} windows of a stream"
    last = found.quality[-1]
    parts = []
    if last.estimated is not None:
        parts.append(
            f"estimated {last.estimated:.3f} ({last.estimated_low:.3f} to {last.estimated_high:.3f}, no concept drift)"
        )
    if last.realised is not None:
        parts.append(f"realised {last.realised:.3f} of {last.labelled} labels")
    return f"accuracy in the last window: {'; '.join(parts)}"
