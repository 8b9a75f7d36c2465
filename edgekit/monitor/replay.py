"""Recorded data through the watch: rows of a table, or windows that a fleet exported, judged as a server judges them.

Rows are cut into windows in their order; each window is what all devices would have sent in it. The engine, its budget and its
evidence are those of the fleet (:mod:`edgekit.monitor.watcher`): what alarms here alarms there.

>>> from edgekit.monitor.sketch import build_profile
>>> rng = np.random.default_rng(0)
>>> profile = build_profile({"x": rng.normal(size=(6000, 1))})
>>> data = {"x[0]": np.concatenate([rng.normal(size=2000), rng.normal(1.0, 1.0, 2000)])}
>>> found = replay(profile, frames_of_rows(data, profile, RowPlan(window=200)), WatchRule())
>>> [(alarm.stream, alarm.window) for alarm in found.alarms]
[('x[0]', 11)]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError, UsageError
from edgekit.monitor.compare import psi_over_time
from edgekit.monitor.intervals import ALL, DeviceWindow, Folder, Interval, SliceCounts, TopDevice, merge_slices
from edgekit.monitor.performance import CONFIDENCE_BINS, realise
from edgekit.monitor.sketch import confidence_cells, count_values, encode_counts, stream_values
from edgekit.monitor.streams import Watched, compare_watched, describe_change
from edgekit.monitor.watcher import Watcher, WatchRule, WatchState
from edgekit.schema.base import Record
from edgekit.schema.baseline import ReferenceProfile, StreamProfile

Array = NDArray[Any]
STATISTICS_WINDOWS = 12
LABEL_COLUMNS = ("labels", "label")


class RowPlan(Record, frozen=True, kw_only=True):
    """How rows become windows: ``window`` rows each, in their order or by ``time``; ``device`` and ``slices`` name columns."""

    window: int = 200
    time: str = ""
    device: str = ""
    slices: tuple[str, ...] = ()
    label: str = ""


class RecordedWindow(Record, frozen=True, kw_only=True):
    """One line of an export: what one device sent of a model in one window, and of which slices it is."""

    start_ms: int
    profile: int
    window: DeviceWindow
    slices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One window of a replay; ``place`` is where it begins, for people: a row, or a time."""

    interval: Interval
    place: str
    first_row: int


class ReplayAlarm(Record, frozen=True, kw_only=True):
    """One alarm: ``window`` is counted from 1, ``delay`` from the window in which drift is known to begin."""

    stream: str
    slice: str
    kind: str
    window: int
    place: str
    first_row: int
    evidence: float
    threshold: float
    delay: int | None = None
    ended: int = 0
    """The window in which the alarm ended; 0: it lasts."""
    is_inhibited: bool = False
    effect: float | None = None
    jensen_shannon: float | None = None
    kolmogorov_smirnov: float | None = None
    wasserstein: float | None = None
    samples: int = 0
    effective_samples: float = 0.0
    what: str = ""
    top_devices: tuple[TopDevice, ...] = ()


class StreamSummary(Record, frozen=True, kw_only=True):
    """One stream in one slice, after the last window."""

    stream: str
    slice: str
    kind: str
    effect: float | None
    evidence: float
    threshold: float
    is_alarm: bool
    is_listed: bool
    time_effect: float
    variation: float
    missing_share: float | None
    effects: tuple[float | None, ...] = ()
    """PSI with its bias taken off, window by window; for slice ``all``."""
    evidences: tuple[float | None, ...] = ()
    reference: tuple[float, ...] = ()
    now: tuple[float, ...] = ()
    """Shares of the last windows, for slice ``all``."""


class QualityAt(Record, frozen=True, kw_only=True):
    """Quality in one window."""

    window: int
    estimated: float | None
    estimated_low: float | None
    estimated_high: float | None
    realised: float | None
    labelled: int


class ReplayReport(Record, frozen=True, kw_only=True):
    """What a replay found. ``is_drift`` decides the command's exit code."""

    windows: int
    samples: int
    streams_watched: int
    slices: tuple[str, ...]
    threshold: float
    arl: float
    alarms: tuple[ReplayAlarm, ...]
    streams: tuple[StreamSummary, ...]
    quality: tuple[QualityAt, ...] = ()
    concept: tuple[ReplayAlarm, ...] = ()
    unreadable: int = 0
    reference_samples: int = 0
    notes: tuple[str, ...] = ()

    @property
    def is_drift(self) -> bool:
        """Whether anything alarmed."""
        return bool(self.alarms or self.concept)


# --- rows -------------------------------------------------------------------------------------------------------------------


def frames_of_rows(columns: Mapping[str, Array], profile: ReferenceProfile, plan: RowPlan) -> Iterator[Frame]:
    """Windows of a table's rows.

    Args:
        columns: by name, each [N] or [N, ...]: the model's inputs as tensors, or a column for each stream by its name; a
            classifier's scores as a tensor or as ``name_0`` and so on; labels.
        profile: what they are compared with.
        plan: how they are cut.

    Raises:
        DataError: ``monitor.columns`` when no stream finds its data, ``data.missing_column``.
        UsageError: ``monitor.window``.
    """
    if plan.window < 1:
        raise UsageError("monitor.window", f"--window {plan.window}: expected at least 1 row.")
    count = len(next(iter(columns.values()))) if columns else 0
    order = np.argsort(_column(columns, plan.time), kind="stable") if plan.time else np.arange(count)
    sources = [_source(stream, columns) for stream in profile.streams]
    if not any(source is not None for source in sources):
        names = ", ".join(stream.name for stream in profile.streams[:6])
        raise DataError(
            "monitor.columns",
            f"none of the data's columns ({', '.join(list(columns)[:6])}) belongs to the baseline's streams ({names}).",
            hint="Name columns as the baseline's streams, or give the model's input tensors in an .npz.",
        )
    right = _right(columns, profile, plan)
    devices = _column(columns, plan.device).astype(str) if plan.device else np.full(count, "one")
    slices = [(name, _column(columns, name).astype(str)) for name in plan.slices]
    for number, first in enumerate(range(0, count, plan.window)):
        rows = order[first : first + plan.window]
        folder, members = Folder(profile, start_ms=number), {}
        for device, chosen in _by_device(devices, slices, rows):
            members[device] = tuple(f"{name}={values[chosen[0]]}" for name, values in slices)
            folder.add([_device_window(device, profile, sources, chosen, right)])
        place = _place(columns, plan.time, rows[0], first)
        interval = folder.finish(members)
        if not plan.device:  # the parts that slices make of one source are no devices
            interval = msgspec.structs.replace(interval, variation=())
        yield Frame(interval=interval, place=place, first_row=first)


def _column(columns: Mapping[str, Array], name: str) -> Array:
    if name not in columns:
        raise DataError("data.missing_column", f"the data has no column {name!r}.", hint=f"Columns: {', '.join(columns)}.")
    return np.asarray(columns[name])


def _by_device(
    devices: Array, slices: Sequence[tuple[str, Array]], rows: NDArray[np.intp]
) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Rows of each device, and of each part of it where a slice's column changes within it."""
    keys = devices[rows]
    for _name, values in slices:
        keys = np.char.add(np.char.add(keys, "@"), values[rows])
    for key in np.unique(keys):
        yield str(key), rows[keys == key]


def _place(columns: Mapping[str, Array], time: str, row: np.intp, first: int) -> str:
    return str(columns[time][row]) if time else f"row {first}"


@dataclass(frozen=True)
class _Source:
    """Where a stream's values come from: its values, or for classes predicted class and bin."""

    values: NDArray[np.float64] | None = None
    predicted: NDArray[np.intp] | None = None
    bins: NDArray[np.intp] | None = None


def _source(stream: StreamProfile, columns: Mapping[str, Array]) -> _Source | None:
    tensor = _tensor(stream.tensor, columns)
    if stream.kind == "classes":
        found = confidence_cells(tensor.astype(np.float64)) if tensor is not None and tensor.ndim > 1 else None
        return _Source(predicted=found[0], bins=found[1]) if found is not None else None
    if stream.name in columns and columns[stream.name].ndim == 1 and columns[stream.name].dtype.kind in "biuf":
        return _Source(values=np.asarray(columns[stream.name], dtype=np.float64))
    if tensor is None:
        return None
    try:
        return _Source(values=stream_values(stream, tensor))
    except IndexError:
        return None


def _tensor(name: str, columns: Mapping[str, Array]) -> Array | None:
    """A tensor by its name, or out of its columns ``name_0`` and so on."""
    if name in columns and columns[name].dtype.kind in "biuf":
        found = np.asarray(columns[name])
        return found.reshape(-1, 1) if found.ndim == 1 else found
    parts: list[Array] = []
    while f"{name}_{len(parts)}" in columns:
        parts.append(np.asarray(columns[f"{name}_{len(parts)}"], dtype=np.float64))
    return np.stack(parts, axis=1) if parts else None


def _right(columns: Mapping[str, Array], profile: ReferenceProfile, plan: RowPlan) -> tuple[Array, Array] | None:
    """Of each row whether its answer was right, and whether it has a label; None without scores or labels."""
    name = plan.label or next((each for each in LABEL_COLUMNS if each in columns), "")
    stream = next((each for each in profile.streams if each.kind == "classes"), None)
    if not name or stream is None:
        return None
    labels = _column(columns, name)
    scores = _tensor(stream.tensor, columns)
    if scores is None or scores.ndim < 2 or labels.dtype.kind not in "biuf":
        return None
    values = labels.astype(np.float64)
    has_label = np.isfinite(values) & (values >= 0)
    return scores.argmax(axis=1) == np.where(has_label, values, -1), has_label


def _device_window(
    device: str,
    profile: ReferenceProfile,
    sources: Sequence[_Source | None],
    rows: NDArray[np.intp],
    right: tuple[Array, Array] | None,
) -> DeviceWindow:
    sketches = tuple(
        encode_counts(_count(stream, source, rows)) for stream, source in zip(profile.streams, sources, strict=True)
    )
    labelled = int(right[1][rows].sum()) if right else 0
    return DeviceWindow(
        device=device,
        requests=len(rows),
        samples=len(rows),
        sketched=len(rows),
        sketches=sketches,
        labelled=labelled,
        right=int((right[0][rows] & right[1][rows]).sum()) if right else 0,
    )


def _count(stream: StreamProfile, source: _Source | None, rows: NDArray[np.intp]) -> NDArray[np.int64]:
    if stream.kind == "classes":
        table = np.zeros(len(stream.counts), dtype=np.int64)
        if source is not None and source.predicted is not None and source.bins is not None:
            is_one = len(stream.counts) == CONFIDENCE_BINS  # too many classes for a row each
            at = (0 if is_one else source.predicted[rows] * CONFIDENCE_BINS) + source.bins[rows]
            np.add.at(table, at[at < table.size], 1)
        return table
    if source is None or source.values is None:
        return np.zeros(len(stream.edges) + 2, dtype=np.int64)
    return count_values(source.values[rows], np.asarray(stream.edges))


# --- exported windows -------------------------------------------------------------------------------------------------------


def frames_of_windows(
    windows: Iterable[RecordedWindow], profile: ReferenceProfile, *, crc: int, interval_ms: int
) -> Iterator[Frame]:
    """Windows of an export, by intervals of time; those that were counted with another profile are left out.

    Args:
        windows: in any order.
        profile: the reference.
        crc: by which its windows are known.
        interval_ms: of the watch.
    """
    by_start: dict[int, list[RecordedWindow]] = {}
    for each in windows:
        if each.profile == crc:
            by_start.setdefault(each.start_ms - each.start_ms % interval_ms, []).append(each)
    row = 0
    for start_ms in sorted(by_start):
        found = by_start[start_ms]
        folder = Folder(profile, start_ms=start_ms)
        folder.add([each.window for each in found])
        yield Frame(
            interval=folder.finish({each.window.device: each.slices for each in found}),
            place=f"{np.datetime64(start_ms, 'ms')}Z",
            first_row=row,
        )
        row += sum(each.window.samples for each in found)


def read_windows(data: bytes, *, name: str) -> tuple[RecordedWindow, ...]:
    """The windows of an export: one JSON record a line.

    Raises:
        DataError: ``data.unreadable``.
    """
    decoder = msgspec.json.Decoder(RecordedWindow)
    try:
        return tuple(decoder.decode(line) for line in data.splitlines() if line.strip())
    except msgspec.DecodeError as error:
        raise DataError("data.unreadable", f"{name}: not an export of windows: {error}.") from error


# --- judging ----------------------------------------------------------------------------------------------------------------


def replay(
    profile: ReferenceProfile,
    frames: Iterable[Frame],
    rule: WatchRule,
    *,
    drift_row: int | None = None,
    class_names: Sequence[str] = (),
) -> ReplayReport:
    """Judge recorded windows.

    Args:
        profile: the reference.
        frames: the windows in order.
        rule: the budget.
        drift_row: the row at which drift is known to begin, for the delay of alarms.
        class_names: of the model's classes.

    Raises:
        DataError: ``data.empty``.
    """
    watcher = Watcher(profile, rule, class_names)
    run = _Replay(watcher, drift_row)
    for frame in frames:
        run.take(frame)
    if not run.frames:
        raise DataError("data.empty", "no window to judge.", hint="Give data of at least one row, counted with this baseline.")
    return run.report()


class _Replay:
    """A replay in progress."""

    def __init__(self, watcher: Watcher, drift_row: int | None) -> None:
        self._watcher, self._drift_row = watcher, drift_row
        self._state: WatchState = watcher.start()
        self.frames: list[Frame] = []
        self._evidence: list[dict[str, float]] = []
        self._alarms: dict[tuple[str, str], list[ReplayAlarm]] = {}
        self._concept: dict[str, list[ReplayAlarm]] = {}
        self._drift_window = 0

    def take(self, frame: Frame) -> None:
        """One more window."""
        self._state = self._watcher.advance(self._state, frame.interval)
        self.frames.append(frame)
        if self._drift_row is not None and frame.first_row <= self._drift_row:
            self._drift_window = len(self.frames)
        verdicts = self._watcher.verdicts(self._state)
        self._evidence.append({each.stream: each.evidence for each in verdicts if each.slice == ALL})
        for verdict in verdicts:
            self._note(self._alarms.setdefault((verdict.slice, verdict.stream), []), verdict, is_on=verdict.is_alarm)
        for concept in self._watcher.concepts(self._state):
            self._note(self._concept.setdefault(concept.slice, []), concept, is_on=concept.is_alarm)

    def _note(self, alarms: list[ReplayAlarm], verdict: Any, *, is_on: bool) -> None:
        is_open = bool(alarms) and not alarms[-1].ended
        if is_on and not is_open:
            alarms.append(self._alarm(verdict))
        elif not is_on and is_open:
            alarms[-1] = msgspec.structs.replace(alarms[-1], ended=len(self.frames))

    def _alarm(self, verdict: Any) -> ReplayAlarm:
        frame, window = self.frames[-1], len(self.frames)
        name = getattr(verdict, "stream", "labels")
        alarm = ReplayAlarm(
            stream=name,
            slice=verdict.slice,
            kind=getattr(verdict, "kind", "concept"),
            window=window,
            place=frame.place,
            first_row=frame.first_row,
            evidence=verdict.evidence,
            threshold=verdict.threshold,
            delay=window - self._drift_window + 1 if self._drift_row is not None and window >= self._drift_window else None,
            is_inhibited=verdict.is_inhibited,
        )
        watched = next((each for each in self._watcher.watched if each.name == name), None)
        return self._with_evidence(alarm, watched, verdict) if watched is not None else self._with_labels(alarm)

    def _recent(self, slice_name: str, windows: int = STATISTICS_WINDOWS) -> SliceCounts:
        """The windows from the alarm's beginnings: as many as its evidence comes from, at most a dozen."""
        parts = [frame.interval.slices[slice_name] for frame in self.frames[-windows:] if slice_name in frame.interval.slices]
        return merge_slices(parts, self._watcher.widths)

    def _with_evidence(self, alarm: ReplayAlarm, watched: Watched, verdict: Any) -> ReplayAlarm:
        windows = self._grown(watched.name) if alarm.slice == ALL else 3
        recent = self._recent(alarm.slice, windows)
        counts = watched.read(recent.cells(self._watcher.widths)[watched.source])
        n = float(counts.sum())
        effect = (1.0 + n * verdict.variation / max(1, recent.devices)) * verdict.time_effect
        found = compare_watched(watched, counts, design_effect=effect)
        stream = next(at for at, each in enumerate(self._watcher.watched) if each.name == watched.name)
        tops = self.frames[-1].interval.top
        return msgspec.structs.replace(
            alarm,
            effect=_known(found.psi),
            jensen_shannon=_known(found.jensen_shannon),
            kolmogorov_smirnov=_known(found.kolmogorov_smirnov),
            wasserstein=_known(found.wasserstein),
            samples=int(n),
            effective_samples=n / effect,
            what=describe_change(watched, counts)[0],
            top_devices=tops[stream] if alarm.slice == ALL and len(tops) > stream and len(tops[stream]) > 1 else (),
        )

    def _grown(self, stream: str) -> int:
        """Since how many windows the evidence has been growing."""
        values = [each.get(stream, -np.inf) for each in self._evidence]
        count = 1
        while count < min(len(values), STATISTICS_WINDOWS) and values[-count] > values[-count - 1]:
            count += 1
        return count

    def _with_labels(self, alarm: ReplayAlarm) -> ReplayAlarm:
        recent = self._recent(alarm.slice)
        found = realise(recent.right, recent.labelled)
        guess = self._watcher.estimate(recent.cells(self._watcher.widths))
        what = f"{found.accuracy:.1%} of {found.labelled} labelled answers right"
        if guess is not None and guess.samples:
            what += f", estimated {guess.accuracy:.1%}"
        return msgspec.structs.replace(alarm, what=what, samples=recent.labelled)

    def report(self) -> ReplayReport:
        """The whole."""
        watcher, state = self._watcher, self._state
        whole = [frame.interval.slices[ALL] for frame in self.frames]
        alarms = sorted((each for found in self._alarms.values() for each in found), key=lambda each: (each.window, each.slice))
        verdicts = watcher.verdicts(state)
        return ReplayReport(
            windows=len(self.frames),
            samples=sum(each.samples for each in whole),
            streams_watched=len(watcher.watched) * len(state.slices),
            slices=state.slices,
            threshold=float(np.log(watcher.arl(len(state.slices)))),
            arl=watcher.arl(len(state.slices)),
            alarms=tuple(alarms),
            streams=tuple(self._summary(verdict, whole) for verdict in verdicts),
            quality=tuple(self._quality()),
            concept=tuple(each for found in self._concept.values() for each in sorted(found, key=lambda alarm: alarm.window)),
            unreadable=sum(frame.interval.unreadable for frame in self.frames),
            reference_samples=watcher.profile.samples,
        )

    def _summary(self, verdict: Any, whole: Sequence[SliceCounts]) -> StreamSummary:
        watcher = self._watcher
        watched = next(each for each in watcher.watched if each.name == verdict.stream)
        counts = watched.read(self._recent(verdict.slice).cells(watcher.widths)[watched.source])
        n = float(counts.sum())
        reference = np.asarray(watched.reference.counts)
        is_all = verdict.slice == ALL
        series = np.stack([watched.read(each.cells(watcher.widths)[watched.source]) for each in whole]) if is_all else None
        effects = psi_over_time(reference, series) if series is not None else ()
        return StreamSummary(
            stream=verdict.stream,
            slice=verdict.slice,
            kind=verdict.kind,
            effect=_known(float(psi_over_time(reference, counts[None])[0])) if n else None,
            evidence=verdict.evidence if np.isfinite(verdict.evidence) else 0.0,
            threshold=verdict.threshold,
            is_alarm=verdict.is_alarm,
            is_listed=verdict.is_listed,
            time_effect=verdict.time_effect,
            variation=verdict.variation,
            missing_share=float(counts[-1] / n) if watched.reference.has_missing and n else None,
            effects=tuple(_known(float(value)) for value in effects),
            evidences=tuple(_known(each.get(verdict.stream, np.nan)) for each in self._evidence) if is_all else (),
            reference=tuple((reference / reference.sum()).tolist()) if is_all and reference.sum() else (),
            now=tuple((counts / n).tolist()) if is_all and n else (),
        )

    def _quality(self) -> Iterator[QualityAt]:
        watcher = self._watcher
        for number, frame in enumerate(self.frames, 1):
            counts = frame.interval.slices[ALL]
            guess = watcher.estimate(counts.cells(watcher.widths)) if counts.sketches else None
            found = realise(counts.right, counts.labelled)
            if (guess is None or not guess.samples) and not found.labelled:
                continue
            is_known = guess is not None and guess.samples > 0
            yield QualityAt(
                window=number,
                estimated=guess.accuracy if guess is not None and is_known else None,
                estimated_low=guess.low if guess is not None and is_known else None,
                estimated_high=guess.high if guess is not None and is_known else None,
                realised=_known(found.accuracy),
                labelled=found.labelled,
            )


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


# --- columns together, and labels by other detectors ------------------------------------------------------------------------


def joint_alarms(
    reference: Mapping[str, Array],
    columns: Mapping[str, Array],
    rule: WatchRule,
    *,
    rows: int,
    skip: Iterable[str] = (),
    seed: int = 0,
) -> tuple[tuple[ReplayAlarm, ...], tuple[str, ...]]:
    """Alarms of all numeric columns together, by two tests on blocks of rows, each with an e-detector of its own.

    Args:
        reference: raw rows of the baseline.
        columns: the recording, in its order.
        rule: the budget, of which each test has its own.
        rows: of a block.
        skip: columns that are no inputs.
        seed: of the random features and splits.

    Returns:
        The alarms, and notes for people.

    Raises:
        DataError: ``monitor.columns`` when they share no numeric column.
    """
    from edgekit.monitor.multivariate import MeanEmbedding, classify_domains, step_joint  # noqa: PLC0415 - few need it

    names = [name for name in reference if name in columns and name not in set(skip)]
    names = [name for name in names if columns[name].dtype.kind in "iuf" and reference[name].dtype.kind in "iuf"]
    if not names:
        raise DataError("monitor.columns", "the reference and the data share no numeric column.")
    known, found = (_stacked(each, names) for each in (reference, columns))
    embedding = MeanEmbedding.fit(known, seed=seed)
    some = known[np.random.default_rng(seed).permutation(len(known))[: 4 * rows]]
    blocks = max(1, len(found) // rows)
    arl = max(2.0, 2 * rule.days * 86_400.0 / rule.interval_s / rule.alarms)
    alarms: list[ReplayAlarm] = []
    log_m = {"mmd": -np.inf, "classifier": -np.inf}
    for block in range(blocks):
        part = found[block * rows : (block + 1) * rows]
        for test in (embedding.test(part), classify_domains(some, part, seed=seed + block)):
            before = log_m[test.method]
            log_m[test.method] = step_joint(before, test.p_value)
            if before <= np.log(arl) < log_m[test.method]:
                alarms.append(
                    ReplayAlarm(
                        stream=f"{len(names)} columns together",
                        slice=ALL,
                        kind=test.method,
                        window=block + 1,
                        place=f"row {block * rows}",
                        first_row=block * rows,
                        evidence=log_m[test.method],
                        threshold=float(np.log(arl)),
                        samples=test.samples,
                        what=f"{test.method}: {test.statistic:.4g}, p {test.p_value:.2g}",
                    )
                )
    return tuple(alarms), (f"columns together: {blocks} blocks of {rows} rows, taken as independent rows",)


def _stacked(columns: Mapping[str, Array], names: Sequence[str]) -> Array:
    return np.concatenate(
        [np.asarray(columns[name], dtype=np.float64).reshape(len(columns[name]), -1) for name in names], axis=1
    )


def errors_of(columns: Mapping[str, Array], profile: ReferenceProfile, *, label: str = "") -> NDArray[np.bool_] | None:
    """Of each labelled row whether the answer was wrong; None without labels or scores."""
    found = _right(columns, profile, RowPlan(label=label))
    return None if found is None else np.asarray(~found[0][found[1]], dtype=np.bool_)


def concept_alarms(places: Sequence[int], method: str, *, window: int) -> tuple[ReplayAlarm, ...]:
    """Changes that a detector found at some labelled rows, as alarms."""
    return tuple(
        ReplayAlarm(
            stream="labels",
            slice=ALL,
            kind="concept",
            window=at // window + 1,
            place=f"label {at}",
            first_row=at,
            evidence=0.0,
            threshold=0.0,
            what=f"{method}: the error rate changed",
        )
        for at in places
    )
